import os

from bgjob import Client, Mux, Worker

mux = Mux().register("mail", lambda job: None)

with Client(os.environ["DATABASE_URL"]) as client:
    with Worker(client, {"high": 10, "low": 2}, mux, release="2026.11"):
        [worker] = client.workers()
        print(f"{worker.state}: {worker.queues}, types {worker.types}, release {worker.release}")
    [worker] = client.workers()
    print(f"{worker.state}, with {worker.counts.completed} jobs completed")
