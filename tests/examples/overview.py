import os

from bgjob import Client, EnqueueRequest

with Client(os.environ["DATABASE_URL"]) as client:
    client.bulk_enqueue([EnqueueRequest("overview", "mail", {"n": n}) for n in range(30)])
    client.enqueue(EnqueueRequest("overview", "report", delay=3600))
    client.pause("overview")
    for queue in client.overview("overview", cap=20).queues:
        print(f"{queue.queue}: {queue.due} due, {queue.delayed} delayed, {queue.running} running")
        print("the oldest has been due for", round(queue.oldest_due_age or 0), "s")
        print("paused:", queue.is_paused)
