import os

import psycopg

from bgjob import Client, EnqueueRequest, Job, JobCompleted, JobMovedToDlq, MoveToDlq, Mux, Worker
from bgjob.testing import RecordingObserver

dsn = os.environ["DATABASE_URL"]
mux = Mux()
calls: list[int] = []


@mux.handler("store", batch=500, batch_wait=0.2, transactional=True, max_attempts=1)
def store(jobs: list[Job], conn: psycopg.Connection) -> dict[str, MoveToDlq]:
    calls.append(len(jobs))
    degrees = [job.json() for job in jobs if job.json() is not None]
    conn.execute("insert into readings select unnest(%s::int[])", [degrees])
    return {job.id: MoveToDlq("no reading") for job in jobs if job.json() is None}


with Client(dsn) as client, psycopg.connect(dsn, autocommit=True) as conn:
    conn.execute("create table readings (degrees int check (degrees > -274))")
    client.bulk_enqueue(
        EnqueueRequest("sensors", "store", None if n == 7 else -300 if n == 77 else n)
        for n in range(500)
    )
    observer = RecordingObserver()
    with Worker(client, "sensors", mux, observer=observer, concurrency=1):
        observer.wait_for(JobCompleted, count=498)
        observer.wait_for(JobMovedToDlq, count=2)
    print("stored:", conn.execute("select count(*), min(degrees) from readings").fetchone())
    for dead in client.dlq.list():
        print(dead.json(), "-", (dead.last_error or "").splitlines()[0][:58])
    print("jobs in each call:", calls)
