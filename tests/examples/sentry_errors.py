import os
from threading import Event
from typing import Any

import sentry_sdk

from bgjob import Client, EnqueueRequest, Job, JobMovedToDlq, Mux, Worker, only
from bgjob.ext.sentry import Sentry


def show(event: Any, hint: Any) -> None:
    [error] = event["exception"]["values"]
    print(error["type"], error["value"], event["tags"], event["contexts"]["bgjob"]["attempt"])


# Events are printed here, and not sent.
sentry_sdk.init("https://key@example.com/1", before_send=show, auto_enabling_integrations=False)
sentry = Sentry()
mux = Mux(middleware=[sentry.middleware])
died = Event()


@mux.handler("import", max_attempts=2, backoff=lambda attempt: 0)
def import_(job: Job) -> None:
    sentry_sdk.set_tag("file", job.json())
    raise ValueError("not a table")


with Client(os.environ["DATABASE_URL"], on_enqueue=sentry.on_enqueue) as client:
    client.enqueue(EnqueueRequest("imports", "import", "photo.png"))
    observers = [sentry, only(lambda event: died.set(), JobMovedToDlq)]
    Worker(client, "imports", mux, observer=observers).run_until(died)
