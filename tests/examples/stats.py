import os

from bgjob import Client, EnqueueRequest, Mux, Retry

with Client(os.environ["DATABASE_URL"]) as client:
    client.bulk_enqueue([EnqueueRequest("stats", "mail", {"n": n}) for n in range(3)])
    client.enqueue(EnqueueRequest("stats", "report", delay=3600))
    client.do("stats", Mux().register("mail", lambda job: Retry(60, error="not yet")))
    for s in client.stats("stats"):
        print(f"{s.type}: {s.due} due, {s.delayed} delayed, {s.retries} retries, {s.dead} dead")
