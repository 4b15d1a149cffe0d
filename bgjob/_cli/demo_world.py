"""The world of `bgjob demo --web`: a shop whose jobs keep flowing, and some go wrong.

There is something of each kind to see and to do:

    mail         confirmations and newsletters; some attempts fail, and succeed later
    files        the source files of Python's standard library, counted again and again
    reports      long jobs; two of one customer never run at the same time
    charges      paused: its jobs wait until somebody resumes it
    imports      its jobs wait for a worker, and there is none
    invoices     died while the tax office was away; it is back, so they may be put back
    thumbnails   die of an error that is still there, which a canary shows
"""

import asyncio
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from itertools import count, cycle, islice
from pathlib import Path
from random import Random
from threading import Event, Thread
from time import monotonic

import psycopg

from bgjob._cli.demo_jobs import count_file, find_files
from bgjob._cli.progress import say
from bgjob.client import Client
from bgjob.job import EnqueueRequest, Job
from bgjob.minutes import Minutes
from bgjob.mux import Mux
from bgjob.observer import NoopObserver
from bgjob.result import Backoff
from bgjob.schedule import Schedule
from bgjob.schedules import Schedules
from bgjob.worker import Worker

_PACE = 0.25
"""Seconds between two rounds of new jobs."""

_AWAY = 10.0
"""Seconds for which the tax office is away: the first invoices die within them."""

_FAILING = 0.08
"""The part of the confirmations that fail."""

_GRACE = 1.0
"""Seconds for the handlers that run when the demo ends."""

_random = Random()  # noqa: S311 (no secret)

_CUSTOMERS = ("ada", "barbara", "donald", "edsger", "grace")

_QUEUES = {"mail": 8, "files": 4, "reports": 3, "charges": 2, "invoices": 2, "thumbnails": 2}

_SCHEDULES = (
    Schedule("newsletter", request=EnqueueRequest("mail", "newsletter"), every=20),
    Schedule("clean up", request=EnqueueRequest("files", "clean_up"), every=timedelta(minutes=5)),
    Schedule("yearly report", request=EnqueueRequest("reports", "report"), every=timedelta(365)),
)


@contextmanager
def running(client: Client, root: Path) -> Iterator[None]:
    """Keep the world running: two workers, and a thread that enqueues.

    Args:
        client: of a database with the tables; the world enqueues and pauses with it.
        root: the folder whose source files are counted.

    """
    stop = Event()
    mux = _make_mux(root)
    schedules = Schedules(_SCHEDULES)
    silent = NoopObserver()
    workers = [
        Worker(
            client, _QUEUES, mux, services=[schedules, Minutes()], observer=silent, release="2.0"
        ),
        Worker(client, {"mail": 4}, mux, services=[Minutes()], observer=silent, release="1.9"),
    ]
    client.pause("charges")
    client.bulk_enqueue(_first())
    producer = Thread(target=_produce, args=(client, root, stop), name="bgjob-demo-producer")
    with ExitStack() as stack:
        for worker in workers:
            worker.run()
            stack.callback(worker.shutdown, _GRACE)
        producer.start()
        stack.callback(producer.join)
        stack.callback(stop.set)
        yield


def _make_mux(root: Path) -> Mux:
    mux = Mux()
    back_at = monotonic() + _AWAY

    @mux.handler("confirmation", backoff=Backoff(base=2.0))
    async def confirm(_: Job) -> None:
        await asyncio.sleep(_random.uniform(0.02, 0.5))
        if _random.random() < _FAILING:
            raise ConnectionError("mail server 'smtp-3.example.com' does not answer")

    @mux.handler("newsletter")
    @mux.handler("clean_up")
    @mux.handler("charge")
    async def work(_: Job) -> None:
        await asyncio.sleep(_random.uniform(0.2, 2.0))

    @mux.handler("count_file")
    def count_one(job: Job) -> None:
        count_file(root / job.json()["file"])

    @mux.handler("report")
    async def report(_: Job) -> None:
        await asyncio.sleep(_random.uniform(20.0, 90.0))

    @mux.handler("invoice", max_attempts=1)
    async def invoice(_: Job) -> None:
        if monotonic() < back_at:
            raise ConnectionError("the tax office is away")
        await asyncio.sleep(0.3)

    @mux.handler("thumbnail", max_attempts=1)
    async def thumbnail(job: Job) -> None:
        await asyncio.sleep(0.2)
        if job.json()["image"].endswith(".tiff"):
            raise ValueError(f"there is no decoder for {job.json()['image']!r}")

    return mux


def _first() -> Iterator[EnqueueRequest]:
    """Return the jobs that are there from the start."""
    for number in range(60):
        yield EnqueueRequest("invoices", "invoice", {"number": number, "token": "not to be shown"})
    for number in range(40):
        yield EnqueueRequest("charges", "charge", {"order": number, "card": "not to be shown"})
    for number in range(12):
        yield EnqueueRequest("imports", "import_catalogue", {"page": number})
        yield EnqueueRequest("thumbnails", "thumbnail", {"image": f"scan-{number}.tiff"})
    for number in range(50):
        yield EnqueueRequest("mail", "newsletter", {"issue": number}, delay=60.0 * number)


def _produce(client: Client, root: Path, stop: Event) -> None:
    """Enqueue a few jobs, again and again."""
    files = cycle(sorted(find_files(root)))
    for number in count():
        if stop.wait(_PACE):
            return
        try:
            client.bulk_enqueue(_round(number, islice(files, 2)))
        except psycopg.Error as error:  # the page shows more of it
            say(f"the demo cannot enqueue: {error}")


def _round(number: int, files: Iterable[str]) -> Iterator[EnqueueRequest]:
    for file in files:
        yield EnqueueRequest("files", "count_file", {"file": file})
    for _ in range(3):
        customer = _random.choice(_CUSTOMERS)
        yield EnqueueRequest("mail", "confirmation", {"to": f"{customer}@example.com"})
    yield EnqueueRequest("thumbnails", "thumbnail", {"image": f"photo-{number}.jpeg"})
    if number % 40 == 0:  # every ten seconds
        customer = _random.choice(_CUSTOMERS)
        yield EnqueueRequest(
            "reports", "report", {"customer": customer}, exclusive=f"customer:{customer}"
        )
        yield EnqueueRequest("charges", "charge", {"order": number, "card": "not to be shown"})
    if number % 240 == 0:  # every minute
        yield EnqueueRequest("thumbnails", "thumbnail", {"image": f"scan-{number}.tiff"})
