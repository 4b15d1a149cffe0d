import os

import psycopg2

import bgjob.sql
from bgjob import Client, EnqueueRequest, Job, Mux

mux = Mux()


@mux.handler("confirm")
def confirm(job: Job) -> None:
    print("confirming", job.id)


requests = [EnqueueRequest("mail", "confirm", id=f"order-{n}") for n in range(3)]
conn = psycopg2.connect(os.environ["DATABASE_URL"])
with conn, conn.cursor() as cursor:  # commits at its end, or rolls back
    cursor.execute(*bgjob.sql.enqueue(requests[0]))
    print("written:", cursor.rowcount)

    cursor.execute(*bgjob.sql.enqueue(requests[0]))
    print("written, as the id is taken:", cursor.rowcount)

    cursor.execute(*bgjob.sql.enqueue_many(requests))
    [written, *_] = cursor.fetchone()
    print("written:", sorted(written))
conn.close()

with Client(os.environ["DATABASE_URL"]) as client:
    client.do("mail", mux)
