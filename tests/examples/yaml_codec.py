import os
import threading
from datetime import date
from typing import Any

import yaml

from bgjob import Client, EnqueueRequest, Mux, Worker


class Yaml:
    def encode(self, value: Any) -> bytes:
        text: str = yaml.safe_dump(value)
        return text.encode()

    def decode(self, data: bytes) -> Any:
        return yaml.safe_load(data)


done = threading.Event()
mux = Mux()


@mux.handler("publish", codec=Yaml())
def publish(page: dict[str, Any]) -> None:
    print("publishing", page["title"], "of", page["day"].year)
    done.set()


with Client(os.environ["DATABASE_URL"]) as client, Worker(client, "pages", mux):
    page = {"title": "News", "day": date(2030, 1, 1)}
    client.enqueue(EnqueueRequest("pages", "publish", page, codec=Yaml()))
    done.wait()
