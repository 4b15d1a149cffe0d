import os
from datetime import timedelta
from threading import Event

from bgjob import Client, EnqueueRequest, Job, Minutes, MoveToDlq, Mux, Result, Worker

mux = Mux()
done = Event()


@mux.handler("mail")
def send(job: Job) -> Result | None:
    if job.id != "m-9":
        return None
    done.set()
    return MoveToDlq("no such address")


with Client(os.environ["DATABASE_URL"]) as client:
    client.bulk_enqueue([EnqueueRequest("minutes", "mail", id=f"m-{n}") for n in range(10)])
    with Worker(client, "minutes", mux, services=[Minutes(days=7)], observer=[]):
        done.wait()
    [mail] = client.minutes(timedelta(hours=1), by="type", queue="minutes").series
    print(f"{mail.type}: {mail.total.completed} completed, {mail.total.dead} dead")
    print(f"{mail.total.failure_ratio:.0%} failed")
    [chart] = client.minutes(timedelta(hours=1), step=60, queue="minutes").series
    print(len(chart.steps), "bars")
