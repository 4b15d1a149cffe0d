"""The worker process of the tests of schedules: `python -m faults.scheduling`.

As faults.app, with schedules besides: what they are is in the environment, as the JSON of a list
of their options. Their jobs are of type "transactional", so that the ledger has each once.
"""

import json
import os
from typing import Any

from bgjob import Client, EnqueueRequest, Mux, Schedule, Schedules, Worker
from faults.app import (
    ENVIRONMENT,
    EventFile,
    Handlers,
    Ledger,
    Recorder,
    Settings,
    end_with_parent,
    serve,
)

SCHEDULES = "BGJOB_FAULTS_SCHEDULES"
"""The variable that holds the schedules of a worker process."""


def schedules(options: list[dict[str, Any]], queue: str) -> Schedules:
    """Make the service of these schedules."""
    request = EnqueueRequest(queue, "transactional")
    made = [Schedule(**one, request=request) for one in options]
    return Schedules(made, poll_interval=0.2)


def main() -> None:
    """Serve a worker with the schedules that the environment asks for."""
    end_with_parent()
    settings = Settings(**json.loads(os.environ[ENVIRONMENT]))
    file = EventFile(settings.events)
    client = Client(settings.dsn)
    handlers = Handlers(client, Ledger(settings.ledger), file.tell, queue=settings.queue)
    worker = Worker(
        client,
        settings.queue,
        handlers.register(Mux(), max_attempts=None, backoff=settings.backoff),
        concurrency=settings.concurrency,
        poll_interval=settings.poll_interval,
        lease=settings.lease,
        observer=Recorder(file.tell),
        services=[schedules(json.loads(os.environ[SCHEDULES]), settings.queue)],
    )
    serve(worker, file, settings.grace)


if __name__ == "__main__":
    main()
