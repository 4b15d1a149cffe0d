import os

from psycopg.conninfo import make_conninfo

from bgjob import Client, EnqueueRequest, Job, Mux, SchemaError, Worker

dsn = os.environ["DATABASE_URL"]
mux = Mux()


@mux.handler("last")
def last(job: Job) -> None:
    worker.shutdown()  # inside a handler it does not wait


try:
    elsewhere = make_conninfo(dsn, options="-c search_path=elsewhere")
    Worker(Client(elsewhere), "work", mux, init_timeout=5).run()
except SchemaError as error:
    print(str(error).partition(";")[0])

with Client(dsn) as client:
    worker = Worker(client, "work", mux)
    worker.run()
    client.enqueue(EnqueueRequest("work", "last"))
    worker.wait()
    print("it ended because it was asked to" if worker.failure is None else worker.failure)
