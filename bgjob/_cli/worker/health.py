"""How a process of `bgjob worker` is, for probes: by HTTP, as a file, to systemd.

    report    how it is at this moment: a value; of one worker, or of several processes
    Health    serves reports and metrics by HTTP, touches the file, and tells systemd

- It is live while its control threads turn. Neither the jobs nor the database matter: a handler
  may run for hours, and a restart mends no database.
- It is ready while it is connected for each queue, of each worker, from the end of its start until
  it is asked to end.
- The answers are numbers that are in memory. So a probe takes a millisecond while the server,
  a handler or the event loop hangs.
"""

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from math import inf
from typing import Any, Protocol

import orjson

from bgjob._cli.health import HealthOptions
from bgjob._cli.listener import Answer, HttpServer, Request, shown
from bgjob._cli.worker.systemd import Systemd
from bgjob._logger import log as _log

_TOUCH = 5.0
"""Seconds between two touches of the file."""


@dataclass(frozen=True, slots=True)
class Report:
    """How a process is."""

    is_live: bool
    is_ready: bool
    has_started: bool
    details: Mapping[str, Any]
    """More of it, for people; JSON."""


def workers_of(details: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """Return the details of each worker of a process, which mostly has one."""
    workers: Sequence[Mapping[str, Any]] = details.get("workers", [details])
    return workers


def late_text(details: Mapping[str, Any]) -> str:
    """Return which queues are late or stand still, from the details of a report."""
    said: list[str] = []
    for worker in workers_of(details):
        where = f" of {worker['database']}" if "database" in worker else ""
        said += [
            f"the control thread of queue {name!r}{where} is late by {queue['late']:.0f} s"
            for name, queue in worker.get("queues", {}).items()
            if queue["late"] > 0
        ]
        said += [
            f"queue {name!r}{where} claims nothing, and its oldest due job waits for {age:.0f} s"
            for name, age in worker.get("stalled", {}).items()
        ]
    return "; ".join(said) or "no queue says why"


class Metered(Protocol):
    """Renders metrics."""

    def __call__(self, accept: str, /) -> Answer: ...


class Health:
    """Tells how this process is, from its start to its end.

    Args:
        options: where.
        report: returns how it is, to any thread.
        metrics: renders its metrics.

    Raises:
        ListenError: it cannot listen on the address.

    """

    def __init__(
        self, options: HealthOptions, report: Callable[[], Report], metrics: Metered
    ) -> None:
        self._report = report
        self._metrics = metrics
        self._file = options.alive_file
        self._systemd = Systemd(os.environ)
        self._ended = threading.Event()
        self._was_live = True
        self._server: HttpServer | None = None
        if options.address is not None:
            self._server = HttpServer(options.address, self._answer)
        watchdog = self._systemd.watchdog
        every = min(
            inf if watchdog is None else watchdog / 2, inf if self._file is None else _TOUCH
        )
        self._thread: threading.Thread | None = None
        if every < inf:
            self._thread = threading.Thread(
                target=self._beat, args=(every,), name="bgjob-beat", daemon=True
            )
            self._thread.start()

    def running(self) -> None:
        """Report that the start is complete."""
        if self._server is not None:
            _log.info("probes are answered on %s", shown(self._server.address))
        self._systemd.tell("READY=1", "STATUS=running")

    def stopping(self) -> None:
        """Report that it begins to end."""
        self._systemd.tell("STOPPING=1", "STATUS=shutting down")

    def close(self) -> None:
        """End it, and remove the file."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(1.0)
        if self._server is not None:
            self._server.close()
        if self._file is not None:
            with suppress(OSError):
                self._file.unlink(missing_ok=True)

    def _beat(self, every: float) -> None:
        while not self._ended.is_set():
            report = self._looked()
            if report.is_live:
                self._systemd.tell("WATCHDOG=1")
                self._touch()
            self._ended.wait(every)

    def _looked(self) -> Report:
        """Return how the process is, and log once that it is not live any more."""
        report = self._report()
        if self._was_live and not report.is_live:
            _log.error("this process is not live: %s", late_text(report.details))
        self._was_live = report.is_live
        return report

    def _touch(self) -> None:
        if self._file is not None:
            try:
                self._file.touch()
            except OSError as error:
                _log.warning("cannot touch %s: %s", self._file, error)

    def _answer(self, request: Request) -> Answer | None:
        if request.path == "/metrics":
            return self._metrics(request.accept)
        report = self._looked()
        match request.path:
            case "/livez":
                is_well = report.is_live
            case "/readyz":
                is_well = report.is_ready
            case "/startupz":
                is_well = report.has_started
            case _:
                return None
        body = {
            "live": report.is_live,
            "ready": report.is_ready,
            "started": report.has_started,
            **report.details,
        }
        return Answer(
            HTTPStatus.OK if is_well else HTTPStatus.SERVICE_UNAVAILABLE,
            orjson.dumps(body, option=orjson.OPT_APPEND_NEWLINE),
            "application/json",
        )
