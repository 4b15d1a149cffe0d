import logging
import os
import sys
from threading import Event

from bgjob import (
    Client,
    EnqueueRequest,
    Job,
    JobCompleted,
    JobMovedToDlq,
    LoggingObserver,
    MoveToDlq,
    Mux,
    Result,
    Worker,
    only,
)

logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
mux = Mux()
finished = Event()


@mux.handler("import")
def import_(job: Job) -> Result | None:
    return MoveToDlq("not a table") if job.json() == "photo.png" else None


def report(event: JobCompleted) -> None:
    print("imported", event.job.json())


def alert(event: JobMovedToDlq) -> None:
    print("look at", event.job.json(), "because it is", event.error)
    finished.set()


observers = [
    LoggingObserver(),
    only(report, JobCompleted, queue="files"),
    only(alert, JobMovedToDlq, type="import"),
]
with Client(os.environ["DATABASE_URL"]) as client:
    client.enqueue(EnqueueRequest("files", "import", "a.csv", id="first"))
    client.enqueue(EnqueueRequest("files", "import", "photo.png", id="second"))
    with Worker(client, "files", mux, observer=observers):
        finished.wait()
