"""The world of `bgjob demo --web`: a shop whose jobs keep flowing, and some go wrong.

There is something of each kind to see and to do:

    mail         confirmations and newsletters; some attempts fail, and succeed later
    files        the source files of Python's standard library, counted again and again
    reports      long jobs; two of one customer never run at the same time
    charges      paused: its jobs wait until somebody resumes it
    imports      its jobs wait for a worker, and there is none
    invoices     died while the tax office was away; it is back, so they may be put back
    thumbnails   some die of an error that is still there, which a canary shows; limited

The world begins with a past, because charts and groups of dead jobs tell little without one: the
counts of an hour are made up, and the first dead jobs, which did die, are dated back.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from itertools import count, cycle, islice
from pathlib import Path
from random import Random
from threading import Event, Thread
from time import monotonic

import psycopg

from bgjob._cli.demo_jobs import find_files
from bgjob._cli.demo_place import DemoError
from bgjob._cli.demo_shop import make_mux
from bgjob._cli.progress import say
from bgjob.client import Client
from bgjob.job import EnqueueRequest
from bgjob.limit import Limit
from bgjob.minutes import Minutes
from bgjob.observer import NoopObserver
from bgjob.schedule import Schedule
from bgjob.schedules import Schedules
from bgjob.worker import Worker

_PACE = 0.25
"""Seconds between two rounds of new jobs."""

_GRACE = 1.0
"""Seconds for the handlers that run when the demo ends."""

_PATIENCE = 30.0
"""Seconds within which the first jobs die; a slow host needs two."""

_INVOICES, _SCANS = 60, 12
"""The jobs that die at the start."""

_random = Random()  # noqa: S311 (no secret)

_CUSTOMERS = ("ada", "barbara", "donald", "edsger", "grace")

_QUEUES = {"mail": 8, "files": 4, "reports": 3, "charges": 2, "invoices": 2, "thumbnails": 2}

_SCHEDULES = (
    Schedule("newsletter", request=EnqueueRequest("mail", "newsletter"), every=20),
    Schedule("clean up", request=EnqueueRequest("files", "clean_up"), every=timedelta(minutes=5)),
    Schedule("yearly report", request=EnqueueRequest("reports", "report"), every=timedelta(365)),
)

_COUNTS = """
insert into bgjob_minute (
    minute, queue, type, completed, retried, rescheduled, dead, lost, timed_out, cancelled,
    runs, run_seconds, longest_run, wait_seconds, longest_wait
)
select
    date_trunc('minute', clock_timestamp()) - n * interval '1 minute', queue, type,
    round(rate * (0.75 + 0.25 * sin(n / 9.0) + 0.15 * random()) + 2 * random() - 1),
    round(rate * failing * random() * 2), 0, 0, 0, 0, 0,
    rate, rate * seconds, 2 * seconds, rate * 0.01, 0.1
from generate_series(1, 60) as n, (values
    ('mail', 'confirmation', 720, 0.08, 0.25), ('files', 'count_file', 480, 0, 0.001),
    ('thumbnails', 'thumbnail', 240, 0, 0.2), ('reports', 'report', 3, 0, 55)
) as t (queue, type, rate, failing, seconds)
"""

# The later its number, the later a job died: 45 s lie between two of them.
_DATE_BACK = """
update bgjob_dead_job
set moved_at = moved_at - ago, job_created_at = job_created_at - ago,
    job_updated_at = job_updated_at - ago, next_run_at = next_run_at - ago
from (select id as number, (max(id) over () - id) * interval '45 s' as ago from bgjob_dead_job) as t
where id = number
"""


@contextmanager
def running(dsn: str, client: Client, root: Path) -> Iterator[None]:
    """Keep the world running: two workers, and a thread that enqueues.

    Args:
        dsn: a database with the tables, and no jobs.
        client: of that database; the world enqueues and pauses with it.
        root: the folder whose source files are counted.

    Raises:
        DemoError: the first jobs did not die.

    """
    stop = Event()
    mux = make_mux(root)
    schedules = Schedules(_SCHEDULES)
    silent = NoopObserver()
    workers = [
        Worker(
            client, _QUEUES, mux, services=[schedules, Minutes()], observer=silent, release="2.0"
        ),
        Worker(client, {"mail": 4}, mux, services=[Minutes()], observer=silent, release="1.9"),
    ]
    client.pause("charges")
    client.limits.set("type", "thumbnail", Limit(2, "10/s"))
    client.bulk_enqueue(_first())
    producer = Thread(target=_produce, args=(client, root, stop), name="bgjob-demo-producer")
    with ExitStack() as stack:
        for worker in workers:
            worker.run()
            stack.callback(worker.shutdown, _GRACE)
        _make_past(dsn, client, stop)
        producer.start()
        stack.callback(producer.join)
        stack.callback(stop.set)
        yield


def _make_past(dsn: str, client: Client, stop: Event) -> None:
    give_up_at = monotonic() + _PATIENCE
    while len(client.dlq.list(limit=_INVOICES + _SCANS)) < _INVOICES + _SCANS:
        if monotonic() > give_up_at:
            raise DemoError(f"the first jobs did not run within {_PATIENCE:g} s")
        stop.wait(0.1)
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute(_COUNTS)
        conn.execute(_DATE_BACK)


def _first() -> Iterator[EnqueueRequest]:
    """Return the jobs that are there from the start."""
    for number in range(_INVOICES):
        yield EnqueueRequest("invoices", "invoice", {"number": number, "token": "not to be shown"})
    for number in range(_SCANS):
        yield EnqueueRequest("imports", "import_catalogue", {"page": number})
        yield EnqueueRequest("thumbnails", "thumbnail", {"image": f"scan-{number}.tiff"})
    for number in range(40):
        yield EnqueueRequest("charges", "charge", {"order": number, "card": "not to be shown"})
    for number in range(1, 50):
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
    if number % 240 == 200:  # noqa: PLR2004 (every minute)
        yield EnqueueRequest("thumbnails", "thumbnail", {"image": f"scan-{number}.tiff"})
