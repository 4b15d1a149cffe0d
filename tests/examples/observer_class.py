import os
import threading

from bgjob import Client, EnqueueRequest, Job, Mux, NoopObserver, Worker

mux = Mux().register("import", lambda job: print("importing", job.id))
finished = threading.Event()


class Watch(NoopObserver):  # override the events you need
    def job_completed(self, job: Job, /) -> None:
        print("completed", job.id)

    def job_moved_to_dlq(self, job: Job, error: str | BaseException, /) -> None:
        print("dead", job.id, "because", error)
        finished.set()

    def worker_error(self, error: BaseException, /) -> None:
        print("trouble:", error)


with Client(os.environ["DATABASE_URL"]) as client:
    client.enqueue(EnqueueRequest("files", "import", id="a.csv"))
    with Worker(client, "files", mux, concurrency=1, observer=Watch()):
        client.enqueue(EnqueueRequest("files", "export", id="b.csv", delay=0.1))
        finished.wait()
