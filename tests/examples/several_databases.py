import os
import threading
from concurrent.futures import ThreadPoolExecutor

import psycopg
from psycopg.conninfo import make_conninfo

from bgjob import Client, EnqueueRequest, Job, Mux, Worker
from bgjob.schema import init_sql

SHOP = os.environ["DATABASE_URL"]
MAIL = make_conninfo(SHOP, options="-c search_path=mail")  # in yours, one of another server
clients = {"shop": Client(SHOP), "mail": Client(MAIL)}
mux = Mux()
stop = threading.Event()


def client_of(queue: str) -> Client:
    return clients["mail" if queue in ("mail", "newsletter") else "shop"]


@mux.handler("order")
def order(job: Job) -> None:
    print(job.queue, job.json())
    client_of("mail").enqueue(EnqueueRequest("mail", "thanks", job.arg))


@mux.handler("thanks")
def thanks(job: Job) -> None:
    print(job.queue, job.json())
    stop.set()


def work(worker: Worker) -> None:
    try:
        while not stop.is_set():
            try:
                return worker.run_until(stop)
            except psycopg.OperationalError as error:  # away at the start
                print(error)
                stop.wait(5)  # the others work
    finally:
        stop.set()  # a worker that breaks ends the program


with psycopg.connect(MAIL) as conn:
    conn.execute("create schema mail")
    conn.execute(init_sql().encode())

client_of("orders").enqueue(EnqueueRequest("orders", "order", "7"))
workers = [Worker(client_of(queue), queue, mux) for queue in ("orders", "mail")]
with ThreadPoolExecutor(len(workers)) as threads:
    for _ in threads.map(work, workers):
        pass
print("both have ended")
