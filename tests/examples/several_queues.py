import os
import threading

from bgjob import Client, EnqueueRequest, Job, Mux, Worker

mux = Mux()
mail_is_out, backed_up = threading.Event(), threading.Semaphore(0)


@mux.handler("backup")
def backup(job: Job) -> None:
    mail_is_out.wait()
    print(job.queue, job.id)
    backed_up.release()


@mux.handler("mail")
def mail(job: Job) -> None:
    print(job.queue, job.id)
    mail_is_out.set()


with Client(os.environ["DATABASE_URL"]) as client:
    client.bulk_enqueue([EnqueueRequest("low", "backup", id=f"backup-{n}") for n in range(3)])
    client.enqueue(EnqueueRequest("high", "mail", id="mail-1"))
    with Worker(client, {"high": 10, "low": 1}, mux):
        for _ in range(3):
            backed_up.acquire()
