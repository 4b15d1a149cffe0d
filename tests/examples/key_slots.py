import os
import threading

from bgjob import Client, EnqueueRequest, Job, Mux, Worker

mux = Mux()
two_run, all_are_done = threading.Barrier(2), threading.Semaphore(0)
running: list[str] = []


@mux.handler("export")
def export(job: Job) -> None:
    running.append(job.id)
    if two_run.wait() == 0:  # for the other one; one of both prints
        print(len(running), "at once")
    two_run.wait()
    running.remove(job.id)
    two_run.wait()
    all_are_done.release()


with Client(os.environ["DATABASE_URL"]) as client:
    for n in range(4):
        client.enqueue(EnqueueRequest("exports", "export", exclusive="tenant:42", slots=2))
    with Worker(client, "exports", mux, concurrency=10):
        for _ in range(4):
            all_are_done.acquire()
