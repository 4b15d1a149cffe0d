"""Keeps several worker processes running: the parent of `bgjob worker --processes`.

Each child holds a lifeline; see `child`.
"""

import logging
import os
import signal
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from math import inf
from queue import Empty, SimpleQueue
from time import monotonic
from types import FrameType
from typing import TYPE_CHECKING

from bgjob._cli.health import HealthOptions
from bgjob._cli.worker.child import ChildProcess, how_ended
from bgjob._cli.worker.systemd import VARIABLES
from bgjob._logger import log as _log
from bgjob.errors import BgjobError

if TYPE_CHECKING:
    from bgjob._cli.worker.health import Health
    from bgjob._cli.worker.reports import Place, Reports

_FIRST_PAUSE = 0.1  # seconds before a dead process is started again; doubles
_LONGEST_PAUSE = 10.0
_MOST_DEATHS = 5
_WINDOW = 10.0  # seconds: after more deaths than that within it, no process is started again
# Seconds between two looks at the processes, and at what they report. A signal wakes this one
# sooner, unless it comes just before the wait begins: then it is handled when that is over.
_LOOK = 0.5
_STOOD_STILL = 5.0  # seconds between two looks after which this process stood still itself
_LATE = 2.0  # seconds after the grace period within which a child has to end


class ProcessesError(BgjobError):
    """The processes died too often."""


def supervise(
    arguments: Sequence[str],
    *,
    module: str,
    count: int,
    grace: float,
    env: Mapping[str, str],
    health: HealthOptions,
) -> None:
    """Run `count` worker processes until a signal comes; return when they have ended.

    A process that ends is started again, after 0.1 s, doubling up to 10 s while it
    lives for less than 10 s. After a signal they have the grace period and 2 s;
    a second signal kills them, and ends this process immediately. From the main thread.

    Args:
        arguments: of `bgjob`, for each process.
        module: what they run with python -m: bgjob, or a module that wraps it.
        count: the number of processes.
        grace: seconds that each of them waits for its handlers.
        env: their environment.
        health: where this process tells how they are. Then it also kills one that does not
            live any more, which is started again.

    Raises:
        ListenError: the address of the probes is in use, for example.
        ProcessesError: more than five of them died within 10 s; the others have been shut down.

    """
    arguments = [*arguments, "--with-pid"]
    env = {name: value for name, value in env.items() if name not in VARIABLES}
    with ExitStack() as stack:
        reports, told = None, None
        if health.is_wanted:
            from bgjob._cli.worker.health import Health  # noqa: PLC0415 (only where it is used)
            from bgjob._cli.worker.reports import Reports  # noqa: PLC0415

            counts = health.address is not None
            reports = Reports(count, counts=counts)
            arguments += ["--counted"] if counts else []
            told = stack.enter_context(closing(Health(health, reports.report, reports.render)))
        children = [
            _Child(number, ChildProcess(arguments, env, module=module), reports)
            for number in range(1, count + 1)
        ]
        _Parent(children, grace, reports, told).run()


class _Child:
    """A place for a process, which is started again when it ends."""

    def __init__(self, number: int, process: ChildProcess, reports: "Reports | None") -> None:
        self.start_at = -inf
        """When to start it; inf while it runs."""
        self.process = process
        self._number = number
        self._reports = reports
        self.place: Place | None = None
        """What it reports."""
        self._started_at = 0.0
        self._pause = _FIRST_PAUSE

    def start(self) -> None:
        """Start the process; raise OSError as ChildProcess.start does."""
        self._started_at, self.start_at = monotonic(), inf
        heard = self.process.start(reports=self._reports is not None)
        if self._reports is not None and heard is not None:
            self.place = self._reports.listen(self._number, self.process.pid, heard)
        _log.info("%s: pid %d", self, self.process.pid)

    def ended(self) -> int | None:
        """Return the exit status if the process has ended since the last call."""
        status = self.process.ended()
        if status is not None and self.place is not None:
            self.place.end()
        return status

    def put_off(self) -> float:
        """Schedule the next start; return the seconds until then."""
        now = monotonic()
        if now - self._started_at >= _WINDOW:
            self._pause = _FIRST_PAUSE
        pause, self._pause = self._pause, min(2 * self._pause, _LONGEST_PAUSE)
        self.start_at = now + pause
        return pause

    def __str__(self) -> str:
        return f"process {self._number}"


class _Parent:
    def __init__(
        self,
        children: Sequence[_Child],
        grace: float,
        reports: "Reports | None",
        told: "Health | None",
    ) -> None:
        self._children = children
        self._reports = reports
        self._told = told
        self._is_told = False
        self._looked_at = monotonic()
        self._grace = grace
        self._signum = 0
        self._deaths: deque[float] = deque()
        # A simple queue, because a signal may arrive while it is in use.
        self._calls: SimpleQueue[None] = SimpleQueue()

    def run(self) -> None:
        with self._signals():
            try:
                while not self._signum and len(self._deaths) <= _MOST_DEATHS:
                    self._tend()
                self._shut_down()
            finally:
                for child in self._children:  # none is left, except after a fault of this module
                    child.process.kill()
                    child.process.wait()
        if not self._signum:
            raise ProcessesError(
                f"{len(self._deaths)} processes died within {_WINDOW:g} s; bgjob starts no more"
            )

    @contextmanager
    def _signals(self) -> Iterator[None]:
        answers = {
            signal.SIGTERM: self._answer,
            signal.SIGINT: self._answer,
            signal.SIGCHLD: lambda *_: self._calls.put(None),
        }
        before = {signum: signal.signal(signum, answer) for signum, answer in answers.items()}
        try:
            yield
        finally:
            for signum, answer in before.items():
                signal.signal(signum, answer)

    def _answer(self, signum: int, _: FrameType | None) -> None:
        if self._signum:
            for child in self._children:
                child.process.kill()
            os._exit(128 + signum)
        self._signum = signum
        if self._reports is not None:
            self._reports.is_stopping = True
        self._calls.put(None)

    def _tend(self) -> None:
        """Start the processes that are due, and wait until something happens."""
        for child in self._children:
            if self._signum or child.start_at > monotonic():
                continue
            try:
                child.start()
            except OSError as error:  # the host has no more processes or memory
                child.process.let_go()
                self._died(child, f"cannot be started: {error}")
        until = min(child.start_at for child in self._children)
        self._wait(until)
        if self._reports is not None:
            self._look(self._reports)
        for child in self._children:
            if (status := child.ended()) is not None:
                self._died(child, how_ended(status), is_well=status == 0)

    def _look(self, reports: "Reports") -> None:
        """Kill the processes that do not live any more, and tell once that all have started."""
        places = [(child, child.place) for child in self._children if child.place is not None]
        before, self._looked_at = self._looked_at, monotonic()
        if self._looked_at - before > _STOOD_STILL:
            for _, place in places:
                place.forgive()
        for child, place in places:
            if (fault := place.fault) is not None:
                _log.error("%s %s, and is killed", child, fault)
                place.killed()
                child.process.kill()
        if self._told is not None and not self._is_told and reports.have_started:
            self._is_told = True
            self._told.running()

    def _died(self, child: _Child, how: str, *, is_well: bool = False) -> None:
        pause = child.put_off()
        if not is_well:
            now = monotonic()
            self._deaths.append(now)
            while self._deaths[0] < now - _WINDOW:
                self._deaths.popleft()
        level = logging.INFO if is_well else logging.ERROR
        _log.log(level, "%s %s; it is started again after %g s", child, how, pause)

    def _shut_down(self) -> None:
        _log.info(
            "%s, shutting down",
            signal.Signals(self._signum).name if self._signum else "too many processes died",
        )
        if self._told is not None:
            self._told.stopping()
        if self._reports is not None:
            self._reports.is_stopping = True
        for child in self._children:
            child.process.let_go()
        end = monotonic() + self._grace + _LATE
        while running := [child for child in self._children if child.process.runs]:
            self._wait(end)
            is_late = monotonic() >= end
            for child in running:
                if (status := child.ended()) is not None:
                    _log.log(
                        logging.WARNING if status else logging.INFO,
                        "%s %s",
                        child,
                        how_ended(status),
                    )
                elif is_late:
                    _log.error("%s does not end, and is killed", child)
                    child.process.kill()
                    child.process.wait()

    def _wait(self, until: float) -> None:
        """Wait until a signal comes, a child ends, the time is reached, or it is time to look."""
        left = max(until - monotonic(), 0)
        with suppress(Empty):
            self._calls.get(timeout=min(left, _LOOK))
