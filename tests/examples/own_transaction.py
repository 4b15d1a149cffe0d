import os

import psycopg

from bgjob import Client, EnqueueRequest, Job, Mux

dsn = os.environ["DATABASE_URL"]
client = Client(dsn)
mux = Mux()


@mux.handler("confirm", transactional=True)
def confirm(job: Job, conn: psycopg.Connection) -> None:  # a coroutine gets an AsyncConnection
    order = job.json()["order"]
    conn.execute("update orders set confirmed = true where id = %s", [order])
    client.enqueue(EnqueueRequest("mail", "thank", {"order": order}), conn=conn)


with psycopg.connect(dsn) as conn:
    conn.execute("create table orders (id text primary key, confirmed bool default false)")

with psycopg.connect(dsn) as conn:  # commits at its end, or rolls back
    conn.execute("insert into orders (id) values (%s)", ["order-2"])
    client.enqueue(EnqueueRequest("mail", "confirm", {"order": "order-2"}), conn=conn)

client.do("mail", mux)
with psycopg.connect(dsn) as conn:
    print("orders:", conn.execute("select id, confirmed from orders").fetchall())
print("jobs:", [stats.type for stats in client.stats("mail")])
client.close()
