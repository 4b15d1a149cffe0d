"""Services: periodic SQL that a worker runs beside its jobs."""

from collections.abc import Callable, Iterable
from math import inf
from typing import Any, Protocol

import psycopg

from bgjob.errors import ScheduleError

_FIRST_PAUSE = 1.0
"""Seconds before a service that failed is run again; doubles."""

_LONGEST_PAUSE = 60.0

_REST = 0.05
"""Seconds between two rounds of services while jobs flow."""


class Service(Protocol):
    """Periodic SQL that a worker runs between exchanges, on its own connection (autocommit).

    Give services to `Worker(..., services=[...])`. The leases of the worker's jobs
    are extended by the same thread: keep each run well under a second, and leave
    the rest to the next. A statement that takes over 10 s is cancelled.

    A service is first run when the worker starts: a BgjobError that it raises then is raised
    by `run()`. Whatever it raises later is told to the observer (`worker_error`),
    and it is run again after a second, which doubles up to a minute. It is not
    run while the worker shuts down, or has no connection.
    """

    def run(self, conn: psycopg.Connection[Any], /) -> float:
        """Do what is due; give the seconds until it is to run again.

        What it leaves uncommitted is rolled back.
        """
        ...


class _Duty:
    __slots__ = ("due_at", "pause", "service")

    def __init__(self, service: Service) -> None:
        self.service = service
        self.due_at = -inf
        self.pause = _FIRST_PAUSE


class Rota:
    """When each service of one worker is run next; not thread-safe.

    Raises:
        TypeError: something is not a service.

    """

    def __init__(self, services: Iterable[Service]) -> None:
        self._duties = [_Duty(service) for service in services]
        for duty in self._duties:
            if not callable(getattr(duty.service, "run", None)):
                raise TypeError(
                    f"services must have a method run(conn), and {duty.service!r} has none"
                )
        self._rested_at = -inf
        self.due_at = inf
        """When the next is due; infinite where there is none."""
        self.pressing_at = inf
        """When it is due even while jobs flow."""
        self._plan()

    def begin(self) -> None:
        """Let all be due: a worker starts."""
        for duty in self._duties:
            duty.due_at, duty.pause = -inf, _FIRST_PAUSE

    def run(
        self,
        lend: Callable[[Callable[[psycopg.Connection[Any]], float]], float],
        clock: Callable[[], float],
        failed: Callable[[BaseException], object],
    ) -> None:
        """Run what is due.

        Args:
            lend: calls a service with the worker's connection.
            clock: gives the time.
            failed: is told what a service raises; what it raises itself ends the round.

        """
        try:
            for duty in self._duties:
                if duty.due_at > clock():
                    continue
                try:
                    wait = _checked(lend(duty.service.run), duty.service)
                except ScheduleError as error:
                    duty.due_at, duty.pause = clock() + error.wait, _FIRST_PAUSE
                    failed(error)
                except BaseException as error:  # whatever it raises, even SystemExit
                    duty.due_at = clock() + duty.pause
                    duty.pause = min(2 * duty.pause, _LONGEST_PAUSE)
                    failed(error)
                else:
                    duty.due_at = clock() + wait
                    duty.pause = _FIRST_PAUSE
        finally:
            self._rested_at = clock() + _REST
            self._plan()

    def end(self) -> None:
        """Run nothing more."""
        self._duties.clear()
        self._plan()

    def _plan(self) -> None:
        self.due_at = min((duty.due_at for duty in self._duties), default=inf)
        self.pressing_at = max(self.due_at, self._rested_at)


def _checked(wait: object, service: Service) -> float:
    if isinstance(wait, bool) or not isinstance(wait, int | float) or not wait >= 0:
        raise TypeError(
            f"run() of {service!r} must return the seconds until it is to run again, not {wait!r}"
        )
    return wait
