import os
import threading
from datetime import timedelta

from bgjob import Client, EnqueueRequest, Job, Mux, Schedule, Schedules, Worker

done = threading.Event()
mux = Mux()


@mux.handler("report")
def report(job: Job) -> None:
    print("report of", job.json()["shop"])
    done.set()


client = Client(os.environ["DATABASE_URL"])
schedules = [
    Schedule(
        "morning-report",
        cron="0 9 * * *",  # or six fields, with the second first
        tz="Europe/Berlin",
        request=EnqueueRequest("reports", "report", {"shop": "Mitte"}),
    ),
    Schedule(
        "refresh",
        every=timedelta(minutes=5),
        missed="skip",
        request=EnqueueRequest("reports", "refresh"),
    ),
]
with Worker(client, "reports", mux, services=[Schedules(schedules)]):
    client.schedules.run("morning-report")  # once, now; its ticks stay as they are
    done.wait()

client.schedules.pause("refresh")
for schedule in client.schedules.list():
    print(schedule.name, "is paused:" if schedule.paused else "comes at", schedule.spec)
client.close()
