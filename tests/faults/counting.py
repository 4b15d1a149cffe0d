"""A worker process whose handlers only remember: `python -m faults.counting`.

It writes the ledger in the end, so that the handlers cost next to nothing.
"""

import json
import os
import signal
import threading

import psycopg

from bgjob import Client, Job, Mux, NoopObserver, Worker
from faults.app import ENVIRONMENT, EventFile, Settings, end_with_parent


class Lost(NoopObserver):
    """Reports lost leases and errors only."""

    def __init__(self, file: EventFile) -> None:
        self._file = file

    def job_lease_lost(self, job: Job, /) -> None:
        self._file.tell(("lost", job.id, job.attempt))

    def worker_error(self, error: BaseException, /) -> None:
        self._file.tell(("error", str(error)))


def main() -> None:
    """Serve the worker that the environment asks for, until SIGTERM."""
    end_with_parent()
    settings = Settings(**json.loads(os.environ[ENVIRONMENT]))
    file = EventFile(settings.events)
    ran: list[tuple[str, int]] = []

    def handler(job: Job) -> None:
        ran.append((job.id, job.attempt))

    async def coroutine(job: Job) -> None:
        ran.append((job.id, job.attempt))

    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    mux = Mux().register("plain", coroutine if settings.colour == "async" else handler)
    with Client(settings.dsn) as client:
        worker = Worker(
            client,
            settings.queue,
            mux,
            concurrency=settings.concurrency,
            lease=settings.lease,
            poll_interval=settings.poll_interval,
            observer=Lost(file),
        )
        worker.run()
        file.tell(("running", os.getpid()))
        stop.wait()
        worker.shutdown(None)
        with psycopg.connect(settings.ledger) as conn, conn.cursor() as cursor:
            with cursor.copy("copy ledger (job_id, attempt, kind, pid) from stdin") as copy:
                for id, attempt in ran:
                    copy.write_row((id, attempt, "plain", os.getpid()))
        file.tell(("ran", len(ran)))


if __name__ == "__main__":
    main()
