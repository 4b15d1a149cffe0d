import os

from bgjob import Client, EnqueueRequest, Job, Mux

mux = Mux()


@mux.handler("index")
def index(job: Job) -> None:
    print("indexing revision", job.json())
    if job.json() == 2:  # somebody saves the document while it is being indexed
        for revision in (3, 4):
            save(revision)


def save(revision: int) -> None:
    newest = EnqueueRequest("search", "index", revision, id="document-7")
    client.enqueue(newest, on_conflict="replace")


with Client(os.environ["DATABASE_URL"]) as client:
    for revision in (1, 2):
        save(revision)
    client.do("search", mux)
    client.do("search", mux)
    # At most once in ten minutes, and two minutes after the last change.
    client.debounce(EnqueueRequest("search", "index", 5, id="document-7"), 120, at_most=600)
    waiting = client.jobs.list().jobs
    print(len(waiting), "waits:", waiting[0].state)
