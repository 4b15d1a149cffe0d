import os
from collections.abc import Callable
from typing import Any

from bgjob import Client, EnqueueRequest, Job, Mux


def named(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def middleware(handler: Callable[..., Any]) -> Callable[..., Any]:
        def call(job: Job, *conn: Any) -> Any:
            print(name, "before", handler.__name__)
            result = handler(job, *conn)
            print(name, "after")
            return result

        call.__name__ = handler.__name__
        return call

    return middleware


mux = Mux(middleware=[named("outer")])


@mux.handler("greet", middleware=[named("inner")])
def greet(job: Job) -> None:
    print("hello,", job.json())


with Client(os.environ["DATABASE_URL"]) as client:
    client.enqueue(EnqueueRequest("greetings", "greet", "world"))
    client.do("greetings", mux)
