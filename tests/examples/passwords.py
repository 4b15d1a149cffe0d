import os
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict

from bgjob import Client, EnqueueRequest, Job, Mux

mux = Mux()


def new_token() -> str:
    print("asking for a token")
    return "a password that is valid for some minutes"


def source() -> dict[str, Any]:
    return {**conninfo_to_dict(os.environ["DATABASE_URL"]), "password": new_token()}


@mux.handler("confirm", transactional=True)
def confirm(job: Job, conn: psycopg.Connection) -> None:
    print("confirming", job.json())


with Client(source) as client:
    client.enqueue(EnqueueRequest("mail", "confirm", 1))  # opens a connection
    client.enqueue(EnqueueRequest("mail", "confirm", 2))  # uses it
    client.do("mail", mux)  # opens another, for the transaction of the handler
