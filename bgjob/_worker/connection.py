"""The connection of a control thread: each wait for the server ends."""

import inspect
import select
from collections.abc import Callable
from math import inf
from time import monotonic
from typing import Any

from psycopg.abc import RV, PQGen
from psycopg.waiting import Ready, Wait
from typing_extensions import override

from bgjob._postgres.connection import Connection, Silence, give_up

PATIENCE = 10.0
"""Seconds without an answer of the server, after which the connection is given up."""

_MOMENT = 0.001
"""Seconds of waiting for the server after which `meanwhile` is called."""

_SLICE = 0.25
"""Seconds after which a wait checks whether the worker's time is over."""

_EVENTS = {
    Wait.R: select.POLLIN,
    Wait.W: select.POLLOUT,
    Wait.RW: select.POLLIN | select.POLLOUT,
}
_READY = {
    0: Ready.RW,  # an error or a hang-up: reading shows which
    select.POLLIN: Ready.R,
    select.POLLOUT: Ready.W,
    select.POLLIN | select.POLLOUT: Ready.RW,
}


class WorkerConnection(Connection):
    """A connection whose waits all end."""

    patience = PATIENCE

    meanwhile: Callable[[], object] = staticmethod(lambda: None)
    """Called when an answer takes more than a moment."""

    ends_at: Callable[[], float] = staticmethod(lambda: inf)
    """When to stop waiting for any answer."""

    @override
    def wait(self, gen: PQGen[RV], *_: Any, **__: Any) -> RV:
        # Only poll(): each system call here releases the interpreter to the handlers'
        # threads, and has to get it back.
        try:
            wanted = next(gen)
            poll = select.poll()
            poll.register(self.pgconn.socket, _EVENTS[wanted])
            while True:
                ready = poll.poll(_MOMENT * 1000)
                if not ready:
                    self.meanwhile()
                    ready = self._wait_long(poll)
                if not ready:
                    raise Silence(self.patience)
                event = ready[0][1]
                again = gen.send(_READY[event & (select.POLLIN | select.POLLOUT)])
                if again != wanted:
                    wanted = again
                    poll.modify(self.pgconn.socket, _EVENTS[wanted])
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]
        except BaseException:
            if inspect.getgeneratorstate(gen) == inspect.GEN_SUSPENDED:
                give_up(self, gen)  # interrupted between a query and its answer
            raise

    def _wait_long(self, poll: select.poll) -> list[tuple[int, int]]:
        end = monotonic() + self.patience
        while (left := min(end, self.ends_at()) - monotonic()) > 0:
            if ready := poll.poll(min(left, _SLICE) * 1000):
                return ready
        return []
