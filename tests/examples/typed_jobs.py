import os
import threading
from dataclasses import dataclass
from typing import ClassVar

from bgjob import Client, EnqueueRequest, Mux, NoopObserver, PayloadError, Worker

done = threading.Event()
mux = Mux()


@dataclass(frozen=True)
class SendMail:
    queue: ClassVar[str] = "mail"
    max_attempts: ClassVar[int] = 5

    to: str
    copies: int = 1


@mux.handler(SendMail)
def send_mail(mail: SendMail) -> None:
    print("sending", mail.copies, "to", mail.to)
    done.set()


with Client(os.environ["DATABASE_URL"]) as client:
    client.enqueue(EnqueueRequest("mail", "SendMail", {"to": ["bob"]}))  # from another release
    client.enqueue(SendMail(to="ann@example.com"), delay=0.1)
    try:
        client.enqueue(SendMail(to="carol@example.com", copies="two"))  # type: ignore[arg-type]
    except PayloadError as error:
        print(error)
    with Worker(client, "mail", mux, concurrency=1, observer=NoopObserver()):
        done.wait()
    for dead in client.dlq.list():
        print(dead.last_error, "-", dead.arg)
