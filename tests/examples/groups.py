import os

from bgjob import Client, EnqueueRequest, Job, MoveToDlq, Mux, Result

mux = Mux()


@mux.handler("page")
def page(job: Job) -> Result | None:
    if job.json() == 3:
        return MoveToDlq("page 3 is missing")
    print("rendered page", job.json())
    return None


@mux.handler("bind")
def bind(job: Job) -> None:
    print("bound the book,", job.group_dead, "page is missing")


with Client(os.environ["DATABASE_URL"]) as client:
    with client.group(then=EnqueueRequest("books", "bind", id="book-1")) as group:
        for number in (1, 2, 3):
            group.enqueue(EnqueueRequest("books", "page", number))
    print(client.explain("book-1").reasons[0].text.split(";")[0])
    for _ in range(4):
        client.do("books", mux)
    [dead] = client.dlq.list(group="book-1")
    print(dead.last_error)
