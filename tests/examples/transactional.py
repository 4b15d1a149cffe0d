import os

import psycopg

from bgjob import Client, EnqueueRequest, Job, Mux

dsn = os.environ["DATABASE_URL"]
mux = Mux()


@mux.handler("confirm", transactional=True, backoff=lambda attempt: 0.0)
def confirm(job: Job, conn: psycopg.Connection) -> None:
    conn.execute("insert into confirmed (id) values (%s)", [job.id])
    client.enqueue(EnqueueRequest("thanks", "thank", id=f"thanks for {job.id}"), conn=conn)
    if job.attempt == 1:
        raise ConnectionError("too early")


def look(title: str) -> None:
    [(confirmed,)] = conn.execute("select count(*) from confirmed").fetchall()
    print(f"{title}: {confirmed} confirmed, queues with jobs:", [s.queue for s in client.stats()])


with Client(dsn) as client, psycopg.connect(dsn, autocommit=True) as conn:
    conn.execute("create table confirmed (id text primary key)")
    client.enqueue(EnqueueRequest("orders", "confirm", id="order-1"))
    client.do("orders", mux)
    look("rolled back")
    client.do("orders", mux)
    look("committed")
