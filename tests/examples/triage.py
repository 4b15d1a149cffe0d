import os
from time import sleep

from bgjob import Client, EnqueueRequest, Job, Mux, NoopObserver, Worker


class MailServer:
    is_away = True

    def send(self, job: Job) -> None:
        if self.is_away:
            raise ConnectionError(f"mail server 'mx-{job.id}' is away")


server = MailServer()
mux = Mux().register("confirm", server.send, max_attempts=1)

with (
    Client(os.environ["DATABASE_URL"]) as client,
    Worker(client, "triage", mux, observer=NoopObserver()),
):
    client.bulk_enqueue([EnqueueRequest("triage", "confirm", id=str(n)) for n in range(40)])
    while len(client.dlq.list(queue="triage")) < 40:
        sleep(0.01)

    [group] = client.dlq.groups(queue="triage")
    print(group.jobs, "times", group.title)
    print(group.error.splitlines()[1])

    canary = client.dlq.canary(group.fingerprint)
    print("canary:", canary.verdict, "-", canary.error.partition(" '")[0])

    server.is_away = False
    if client.dlq.canary(group.fingerprint).verdict == "completed":
        rest = client.dlq.rest(group.fingerprint, rate=1000)
        print(rest.moved, "of", rest.jobs, "are back,", rest.failed, "failed again")
