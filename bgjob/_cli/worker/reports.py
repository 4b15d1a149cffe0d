"""What the processes of `--processes` report to their parent: a line of JSON a second.

Each has a pipe for it beside its lifeline. The parent adds the metrics up, answers probes for all
of them, and kills a process that is not live any more, or is silent: it takes the part that a
service manager has for a single process.
"""

import os
import threading
from collections.abc import Mapping
from time import monotonic
from typing import Any, NamedTuple

import orjson

from bgjob._cli.listener import Answer
from bgjob._cli.worker.health import Report, late_text, workers_of
from bgjob._cli.worker.probe import NO_METRICS, Probe, load_metering
from bgjob.workers import LATE, QueueHealth

_EVERY = 1.0
"""Seconds between two reports."""

_STARTS_WITHIN = 60.0
"""Seconds to the first report: an interpreter has to start."""

_DIES_WITHIN = 15.0
"""Seconds within which a killed process should be gone."""


class Reporter:
    """Reports to the parent, on a thread of its own.

    Args:
        fd: one end of a pipe.
        probe: knows how this process is.

    """

    def __init__(self, fd: int, probe: Probe) -> None:
        os.set_inheritable(fd, False)
        self._fd = fd
        self._probe = probe
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="bgjob-reports", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Report a last time, and end."""
        self._ended.set()
        self._thread.join(1.0)

    def _run(self) -> None:
        is_last = False
        while True:
            line = orjson.dumps(self._line(), option=orjson.OPT_APPEND_NEWLINE)
            try:
                while line:
                    line = line[os.write(self._fd, line) :]
            except OSError:  # the parent is gone, and this process ends, too
                return
            if is_last:
                return
            is_last = self._ended.wait(_EVERY)

    def _line(self) -> dict[str, Any]:
        report = self._probe.report()
        metering = self._probe.metering
        return {
            "live": report.is_live,
            "ready": report.is_ready,
            "started": report.has_started,
            "details": report.details,
            "metrics": None if metering is None else metering.take(),
        }


class _Seen(NamedTuple):
    """How the worker of another process is."""

    queues: Mapping[str, QueueHealth]
    number: int | None
    program: str
    release: str | None


class Place:
    """The reports of the process in one of the parent's places. Thread-safe."""

    def __init__(self) -> None:
        self.pid = 0
        """0 while there is none."""
        self.said: Mapping[str, Any] = {}
        self._quiet_after = 0.0
        self._killed_at: float | None = None

    def begin(self, pid: int) -> None:
        """Record that a process was started."""
        self.pid, self.said, self._killed_at = pid, {}, None
        self._quiet_after = monotonic() + _STARTS_WITHIN

    def hear(self, said: Mapping[str, Any]) -> None:
        """Record what it says, unless it was killed: its last reports may be read later."""
        if self._killed_at is not None:
            return
        self.said = said
        self._quiet_after = monotonic() + LATE

    def forgive(self) -> None:
        """Begin again to wait for its next report: the parent itself stood still."""
        self._quiet_after = max(self._quiet_after, monotonic() + LATE)

    def end(self) -> None:
        """Record that the process has ended."""
        self.pid, self.said = 0, {}

    def killed(self) -> None:
        """Record that it was killed."""
        self._killed_at = monotonic()
        self.said = {}

    @property
    def fault(self) -> str | None:
        """Why it should be killed; None if it should not be, or was."""
        if not self.pid or self._killed_at is not None:
            return None
        if monotonic() > self._quiet_after:
            return "is silent"
        if self.said.get("live") is not False:
            return None
        details = self.said.get("details", {})
        return f"is not live ({late_text(details)})"

    @property
    def is_live(self) -> bool:
        """Whether it lives, or is about to be started again."""
        if self._killed_at is None:
            return True
        return not self.pid or monotonic() - self._killed_at < _DIES_WITHIN

    @property
    def seen(self) -> list[_Seen]:
        """How its workers are."""
        workers = workers_of(self.said.get("details", {}))
        return [_seen(worker) for worker in workers if worker.get("queues")]


def _seen(details: Mapping[str, Any]) -> _Seen:
    queues = {
        name: QueueHealth(
            slots=queue["slots"],
            busy=queue["busy"],
            is_connected=queue["connected"],
            turned=queue["turned"],
            late=queue["late"],
            claimed=queue["claimed"],
        )
        for name, queue in details["queues"].items()
    }
    return _Seen(queues, details["number"], details["program"], details["release"])


class Reports:
    """Reads the reports of all processes, and makes one of them.

    Args:
        count: the number of processes.
        counts: whether their metrics are added up.

    """

    def __init__(self, count: int, *, counts: bool) -> None:
        self._places = [Place() for _ in range(count)]
        self.is_stopping = False
        self._has_started: set[int] = set()  # the places whose process has started once
        metering = load_metering() if counts else None
        self._sum = None if metering is None else metering.summed(self._seen)

    def _seen(self) -> list[_Seen]:
        return [seen for place in self._places for seen in place.seen]

    def listen(self, number: int, pid: int, fd: int) -> Place:
        """Read what a new process reports, on a thread of its own, until it ends.

        Args:
            number: that of its place, from 1.
            pid: that of the process.
            fd: the other end of its pipe.

        """
        place = self._places[number - 1]
        place.begin(pid)
        threading.Thread(
            target=self._listen, args=(number, place, fd), name="bgjob-reports", daemon=True
        ).start()
        return place

    def _listen(self, number: int, place: Place, fd: int) -> None:
        key = object()
        with os.fdopen(fd, "rb") as lines:
            for line in lines:
                if not line.endswith(b"\n"):
                    break  # it was killed while it wrote
                said = orjson.loads(line)
                if said["metrics"] is not None and self._sum is not None:
                    self._sum.take_over(key, said["metrics"])
                if said["started"]:
                    self._has_started.add(number)
                place.hear(said)
        if self._sum is not None:
            self._sum.ended(key)

    @property
    def have_started(self) -> bool:
        """Whether each place has had a process that started."""
        return len(self._has_started) == len(self._places)

    def report(self) -> Report:
        """Return how the processes are, to any thread."""
        places = self._places
        return Report(
            is_live=all(place.is_live for place in places),
            is_ready=not self.is_stopping and all(place.said.get("ready") for place in places),
            has_started=self.have_started,
            details={
                "stopping": self.is_stopping,
                "processes": [
                    {
                        "pid": place.pid or None,
                        "live": place.said.get("live"),
                        "ready": place.said.get("ready", False),
                        "started": place.said.get("started", False),
                        **place.said.get("details", {}),
                    }
                    for place in places
                ],
            },
        )

    def render(self, accept: str) -> Answer:
        """Return the metrics of all processes together."""
        return NO_METRICS if self._sum is None else self._sum.render(accept)
