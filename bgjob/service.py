"""Services: periodic SQL that a worker runs alongside its jobs."""

from collections.abc import Callable, Iterable
from math import inf
from typing import Any, Protocol

import psycopg

from bgjob.errors import ScheduleError

_FIRST_PAUSE = 1.0
"""Seconds before a service that failed is run again; doubles."""

_LONGEST_PAUSE = 60.0

_REST = 0.05
"""Seconds between two rounds of services while jobs run."""


class Service(Protocol):
    """Periodic SQL that a worker runs between exchanges, on its own connection (autocommit).

    Pass services to `Worker(..., services=[...])`. The same thread extends the leases of
    the worker's jobs: keep each run well under a second, and leave the rest to the
    next. A statement that takes over 10 s is cancelled.

    A service runs first when the worker starts; `run()` raises a BgjobError that it
    raises then. The observer's `worker_error` receives whatever it raises later, and the
    service runs again after a second, which doubles up to a minute. It does not run
    while the worker shuts down or has no connection.
    """

    def run(self, conn: psycopg.Connection[Any], /) -> float:
        """Do one piece of work; return the seconds until the next run.

        The worker rolls back whatever this leaves uncommitted.
        """
        ...


class _Duty:
    __slots__ = ("due_at", "pause", "service")

    def __init__(self, service: Service) -> None:
        self.service = service
        self.due_at = -inf
        self.pause = _FIRST_PAUSE


class ServiceTimer:
    """Decides when each service of one worker runs next; not thread-safe.

    Raises:
        TypeError: an item is not a service.

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
        """When the next service is due; infinite without one."""
        self.pressing_at = inf
        """When it is due even while jobs run."""
        self._plan()

    def add(self, service: Service) -> None:
        """Run one more service from now on."""
        self._duties.append(_Duty(service))
        self._plan()

    def begin(self) -> None:
        """Make all services due: the worker starts."""
        for duty in self._duties:
            duty.due_at, duty.pause = -inf, _FIRST_PAUSE

    def run(
        self,
        lend: Callable[[Callable[[psycopg.Connection[Any]], float]], float],
        clock: Callable[[], float],
        failed: Callable[[BaseException], object],
    ) -> None:
        """Run the due services.

        Args:
            lend: calls a service with the worker's connection.
            clock: returns the time.
            failed: receives what a service raises; an exception of its own ends the round.

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
        """Run no service any more."""
        self._duties.clear()
        self._plan()

    def _plan(self) -> None:
        self.due_at = min((duty.due_at for duty in self._duties), default=inf)
        self.pressing_at = max(self.due_at, self._rested_at)


def _checked(wait: object, service: Service) -> float:
    if isinstance(wait, bool) or not isinstance(wait, int | float) or not wait >= 0:
        raise TypeError(
            f"run() of {service!r} must return the seconds until its next run, not {wait!r}"
        )
    return wait
