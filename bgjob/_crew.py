"""The queues of one worker: a control thread each, and what they share."""

import asyncio
import os
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from math import inf
from time import monotonic

from bgjob._audience import Audience, audience
from bgjob._control import LAST_WORDS, Control
from bgjob._duration import Duration, seconds
from bgjob._events import Events
from bgjob._state import State
from bgjob.client import AsyncClient, Client
from bgjob.errors import BgjobError, QueueRequiredError
from bgjob.job import check_name
from bgjob.mux import Mux
from bgjob.service import Rota, Service

Queues = str | Mapping[str, int]
"""A queue, or several, each with its concurrency."""


class Crew:
    """Starts and ends the control threads together. Thread-safe."""

    def __init__(
        self,
        client: Client | AsyncClient,
        queues: Queues,
        mux: Mux,
        *,
        concurrency: int | None,
        poll_interval: Duration,
        lease: Duration,
        observer: Audience | None,
        notify: bool,
        services: Iterable[Service],
        state: State | None,
        init_timeout: Duration,
    ) -> None:
        poll, held = seconds(poll_interval, "poll_interval"), seconds(lease, "lease")
        if poll < 0.001:  # noqa: PLR2004
            raise ValueError(f"poll_interval must be at least 0.001 s, not {poll_interval!r}")
        if held < 1:
            raise ValueError(f"lease must be at least 1 s, not {lease!r}")
        self._patience = seconds(init_timeout, "init_timeout")
        if self._patience < 1:
            raise ValueError(f"init_timeout must be at least 1 s, not {init_timeout!r}")
        self._mux = mux
        self._shared = state
        slots_of = _slots(queues, concurrency)
        self._events = Events(audience(observer), ", ".join(slots_of))
        rota = Rota(services)
        self._controls: list[Control] = []
        for queue, slots in slots_of.items():
            self._controls.append(
                Control(
                    lambda: client.recipe,
                    queue,
                    concurrency=slots,
                    poll_interval=poll,
                    lease=held,
                    events=self._events,
                    notify=notify,
                    served=slots_of.keys(),
                    rota=rota,
                )
            )
            rota = Rota(())  # the services are the first one's
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._opened = self._asked = False
        self._give_up_at = inf
        self._at_work = 0  # controls whose handlers have not all ended
        self._alive = 0  # controls that have not ended
        self.done: Future[None] = Future()

    def open(self, loop: asyncio.AbstractEventLoop | None) -> None:
        """Connect and start; raises what keeps the worker from working."""
        with self._lock:
            if self._opened or self._asked:
                raise RuntimeError("a worker runs once: make a new one")
            mux = self._connect(loop)
            try:
                self._start(mux, loop)
            except BaseException:
                # Out of threads, or of sockets. What was started ends.
                self._asked = True
                self._give_up(monotonic())
                for control in self._controls:
                    if not control.has_run:
                        control.disconnect()
                raise

    def _connect(self, loop: asyncio.AbstractEventLoop | None) -> Mux:
        if self._shared is None:
            self._mux.check_bound()
        mux, end = self._mux, monotonic() + self._patience
        try:
            # The first one, which runs the services, comes when all others can work.
            for control in reversed(self._controls):
                control.connect(max(end - monotonic(), 0.1))
            if self._shared is not None:
                mux = mux.bound(self._shared.open(loop))
            self._events.open()
        except BaseException:
            for control in self._controls:
                control.disconnect()
            self._close_state()
            raise
        return mux

    def _start(self, mux: Mux, loop: asyncio.AbstractEventLoop | None) -> None:
        self._opened = True
        self._pid = os.getpid()
        for control in self._controls:
            self._at_work += 1
            self._alive += 1
            control.done.add_done_callback(self._ended)
            control.start(mux, loop, self._leave)

    def stop(self, timeout: Duration | None) -> None:
        """Begin to shut down; of several grace periods the one that ends first counts."""
        if os.getpid() != self._pid:
            raise BgjobError(
                "this worker runs in the process that called run(), not in a fork of it"
            )
        end = inf if timeout is None else monotonic() + seconds(timeout, "timeout")
        with self._lock:
            self._asked = True
            if not self._opened:
                self._opened = True
                self.done.set_result(None)
        self._give_up(end)

    def _give_up(self, end: float) -> None:
        self._give_up_at = min(end, self._give_up_at)
        for control in self._controls:
            control.stop(end)

    @property
    def failure(self) -> BaseException | None:
        """Why it ended by itself."""
        return next((c.failure for c in self._controls if c.failure is not None), None)

    @property
    def was_asked(self) -> bool:
        """Whether somebody shut it down; it may also end by itself, where nothing can run."""
        return self._asked and self.failure is None

    @property
    def is_inside(self) -> bool:
        """Whether the caller is one whom the worker waits for: a handler, or the observer."""
        is_observer = threading.current_thread() is self._events.thread
        return is_observer or any(control.is_inside for control in self._controls)

    @property
    def tasks(self) -> set[asyncio.Task[None]]:
        """What is left on the caller's loop."""
        return {task for control in self._controls for task in control.tasks}

    @property
    def abandoned(self) -> int:
        """Jobs that were left to their leases."""
        return sum(control.abandoned for control in self._controls)

    def _leave(self) -> None:
        """Close what is shared when the last handler of the last queue has ended."""
        with self._lock:
            self._at_work -= 1
            is_last = not self._at_work
        if is_last:
            self._close_state()
            self._events.close(LAST_WORDS)

    def _close_state(self) -> None:
        if self._shared is None:
            return
        patience = max(LAST_WORDS, self._give_up_at - monotonic()) if self._asked else LAST_WORDS
        try:
            self._shared.close(None if patience == inf else patience, lambda: self.tasks)
        except BaseException as error:
            self._events.error(error)

    def _ended(self, _: "Future[None]") -> None:
        with self._lock:
            self._alive -= 1
            is_last = not self._alive
        if is_last:
            self.done.set_result(None)
        elif not self._asked:  # one that fails takes the others with it
            self._give_up(monotonic() + LAST_WORDS)


def _slots(queues: Queues, concurrency: int | None) -> dict[str, int]:
    """Give the concurrency of each queue; raise where that cannot be."""
    if isinstance(queues, str):
        slots = {queues: 1 if concurrency is None else concurrency}
    elif isinstance(queues, Mapping):
        if concurrency is not None:
            raise ValueError("give concurrency, or a mapping from queues to theirs, not both")
        slots = dict(queues)
    else:
        raise TypeError(
            f"queue must be a str, not {type(queues).__name__}; or, for several queues, a mapping "
            "from their names to their concurrency, such as {'high': 10, 'low': 2}"
        )
    if not slots or not all(slots):
        raise QueueRequiredError("queue is required: name the queue to work on")
    for queue, count in slots.items():
        check_name("queue", queue)
        if type(count) is not int or count < 1:
            raise ValueError(f"concurrency must be at least 1, not {count!r}: of queue {queue!r}")
    return slots
