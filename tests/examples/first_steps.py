import os
import threading

from bgjob import Client, EnqueueRequest, Job, MoveToDlq, Mux, NoopObserver, Result, Retry, Worker

client = Client(os.environ["DATABASE_URL"])  # or a psycopg_pool.ConnectionPool of yours
mux = Mux()
done = threading.Event()


@mux.handler("charge")
def charge(job: Job) -> Result | None:
    if "card" not in job.json():
        return MoveToDlq("no card on file")  # kept with its error, until you requeue or purge it
    if job.attempt == 1:
        return Retry(delay=0.5, error="bank is busy")  # an exception retries too, with backoff
    print("charged on attempt", job.attempt, "after:", job.last_error)
    client.enqueue(EnqueueRequest("shop", "confirm", job.json()))
    return None  # completed: the job's row is deleted


@mux.handler("confirm")
async def confirm(job: Job) -> None:  # coroutines and plain functions mix freely
    print("confirmed order", job.json()["order"])
    done.set()


client.enqueue(EnqueueRequest("shop", "charge", {"order": 7, "card": "4242"}))
client.enqueue(EnqueueRequest("shop", "charge", {"order": 8}, id="charge-8"))

worker = Worker(client, "shop", mux, concurrency=4, observer=NoopObserver())  # the default logs
worker.run()  # returns immediately; the worker has threads of its own
done.wait()
worker.shutdown()  # finishes running jobs, gives back those that have not started
print("dead:", [(dead.id, dead.last_error) for dead in client.dlq.list()])
client.close()
