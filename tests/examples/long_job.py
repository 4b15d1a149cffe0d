import os
import threading

import psycopg

from bgjob import Client, EnqueueRequest, Job, Mux, Reschedule, Result, Worker
from bgjob.checkpoint import Checkpoint

dsn = os.environ["DATABASE_URL"]
mux = Mux()
deployed, imported = threading.Event(), threading.Event()


@mux.handler("import")
def import_file(job: Job, checkpoint: Checkpoint[int]) -> Result | None:
    print(f"attempt {job.attempt} goes on from line {checkpoint.value or 0}")
    for line in range(checkpoint.value or 0, 1000, 100):
        with checkpoint.transaction() as conn:
            conn.execute("insert into line select generate_series(%s::int, %s)", [line, line + 99])
            checkpoint.save(line + 100)
        if line == 400:
            worker.shutdown()  # a deploy
            deployed.set()
        if checkpoint.stopping:
            return Reschedule(0)
    imported.set()
    return None


with Client(dsn) as client, psycopg.connect(dsn, autocommit=True) as conn:
    conn.execute("create table line (number integer primary key)")
    client.enqueue(EnqueueRequest("files", "import", id="orders.csv"))
    for done in deployed, imported:
        worker = Worker(client, "files", mux)
        with worker:
            done.wait()
        if job := client.jobs.get("orders.csv"):
            print(f"{job.state}, attempts {job.attempt}, checkpoint {job.checkpoint!r}")
    [(lines,)] = conn.execute("select count(*) from line").fetchall()
    print(f"{lines} lines are there")
