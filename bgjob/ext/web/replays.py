"""Canaries and rests of groups, which go on while no one looks.

They run as tasks of this process, and are known to it alone. If it ends, what is dead stays dead.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from bgjob import triage
from bgjob.ext.web.database import Writer
from bgjob.ext.web.views import Canary, Rest

_logger = logging.getLogger("bgjob.web")

_MOST = 200
"""Groups of which the last canary and rest are known."""


@dataclass(slots=True)
class _Group:
    canary: Canary | None = None
    rest: Rest | None = None
    canary_task: "asyncio.Task[None] | None" = None
    rest_task: "asyncio.Task[None] | None" = None

    @property
    def is_busy(self) -> bool:
        return any(task and not task.done() for task in (self.canary_task, self.rest_task))


class Replays:
    """The replays of one page."""

    def __init__(self, writer: Writer, clock: Callable[[], datetime]) -> None:
        self._writer = writer
        self._clock = clock
        self._groups: OrderedDict[str, _Group] = OrderedDict()

    def canary(self, fingerprint: str) -> Canary | None:
        """Return the last canary of a group."""
        return self._known(fingerprint).canary

    def rest(self, fingerprint: str) -> Rest | None:
        """Return the last rest of a group."""
        return self._known(fingerprint).rest

    def is_running(self, fingerprint: str) -> bool:
        """Whether the rest of a group is being moved."""
        task = self._known(fingerprint).rest_task
        return task is not None and not task.done()

    async def start_canary(self, fingerprint: str, *, force: bool, by: str | None) -> Canary:
        """Move a job back and watch it; return once it is in its queue.

        Raises:
            CanaryRefusedError: nothing would run it, or there is none.
            ValueError: it is not a fingerprint.

        """
        group = self._group(fingerprint)
        loop = asyncio.get_running_loop()
        moved: asyncio.Future[None] = loop.create_future()
        started_at = self._clock()

        def progress(found: triage.Canary) -> None:
            group.canary = _canary(found, started_at, by, is_over=False)
            if not moved.done():
                moved.set_result(None)

        async def watch() -> None:
            try:
                found = await self._writer.dlq.canary(fingerprint, force=force, progress=progress)
            except Exception as error:
                if moved.done():
                    _logger.exception("canary of group %s", fingerprint)
                    if group.canary is not None:
                        group.canary = replace(group.canary, state="undecided", error=str(error))
                else:
                    moved.set_exception(error)
            else:
                group.canary = _canary(found, started_at, by, is_over=True)
                if not moved.done():
                    moved.set_result(None)

        group.canary_task = loop.create_task(watch())
        await moved
        assert group.canary is not None  # noqa: S101 (progress or the verdict has set it)
        return group.canary

    def start_rest(
        self,
        fingerprint: str,
        *,
        upto: int,
        total: int,
        rate: float,
        stop_after: int,
        by: str | None,
    ) -> None:
        """Move the rest of a group back."""
        group = self._group(fingerprint)
        group.rest = begun = Rest(
            "running", total, 0, 0, 0, rate, stop_after, self._clock(), None, by
        )

        def progress(found: triage.Rest) -> None:
            group.rest = replace(
                begun, total=found.jobs, back=found.moved, left=found.left, died=found.failed
            )

        async def move() -> None:
            found = await self._writer.dlq.rest(
                fingerprint, upto=upto, rate=rate, stop_after=stop_after, progress=progress
            )
            progress(found)
            self._end(group, "braked" if found.is_stopped else "done")

        group.rest_task = asyncio.get_running_loop().create_task(
            self._ended(move(), group, fingerprint)
        )

    async def stop(self, fingerprint: str) -> bool:
        """Stop moving the rest; True if it was under way."""
        group = self._known(fingerprint)
        if group.rest_task is None or group.rest_task.done():
            return False
        group.rest_task.cancel()
        await asyncio.wait([group.rest_task])
        return True

    async def close(self) -> None:
        """End what is under way on this loop."""
        loop = asyncio.get_running_loop()
        tasks = [
            task
            for group in self._groups.values()
            for task in (group.canary_task, group.rest_task)
            if task is not None and not task.done() and task.get_loop() is loop
        ]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _ended(
        self, move: Coroutine[Any, Any, None], group: _Group, fingerprint: str
    ) -> None:
        try:
            await move
        except asyncio.CancelledError:
            self._end(group, "stopped")
        except Exception as error:
            _logger.exception("the rest of group %s", fingerprint)
            self._end(group, "failed", str(error))
        rest = group.rest
        if rest is not None:
            _logger.info("the rest of group %s: %s, %d back", fingerprint, rest.state, rest.back)

    def _end(self, group: _Group, state: Any, error: str | None = None) -> None:
        if group.rest is not None:
            group.rest = replace(group.rest, state=state, ended_at=self._clock(), error=error)

    def _known(self, fingerprint: str) -> _Group:
        return self._groups.get(fingerprint) or _Group()

    def _group(self, fingerprint: str) -> _Group:
        """Return a group, and forget those of long ago."""
        group = self._groups.setdefault(fingerprint, _Group())
        self._groups.move_to_end(fingerprint)
        for key in [*self._groups][:-_MOST]:
            if not self._groups[key].is_busy:
                del self._groups[key]
        return group


def _canary(found: triage.Canary, started_at: datetime, by: str | None, *, is_over: bool) -> Canary:
    state: str = found.verdict
    if state == "undecided" and not is_over:
        state = "waiting" if found.claimed is None else "running"
    is_good = None if found.verdict == "undecided" else found.verdict == "completed"
    return Canary(
        found.id, found.queue, found.type, started_at, state, is_good, found.error or None, by
    )
