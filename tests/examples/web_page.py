import asyncio
import os
from dataclasses import replace

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Mount

from bgjob import Client, EnqueueRequest
from bgjob.ext.web import Access, Shown, create_app


def access(request: Request) -> Access | None:
    user = request.headers.get("x-user")  # your own session, single sign-on, anything
    return Access(user, {"look", "pause"}) if user else None


def redact(shown: Shown) -> Shown | None:
    return None if shown.type == "salary" else replace(shown, arg=b'"of our customer"')


def audit(user: str, action: str, targets: tuple[str, ...], count: int) -> None:
    print(user, "did:", action, *targets)


dsn = os.environ["DATABASE_URL"]
page = create_app(dsn, access=access, redact=redact, on_action=audit)
app = Starlette(routes=[Mount("/jobs-page", page)])


async def main() -> None:
    browser = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost")
    print("unknown:", (await browser.get("/jobs-page/")).status_code)
    browser.headers["x-user"] = "bob"
    job = (await browser.get("/jobs-page/api/jobs/mail-1")).json()
    print(job["why"]["reasons"][0]["text"], job["payload"]["text"])
    browser.headers["sec-fetch-site"] = "same-origin"  # as with the forms of the page
    print((await browser.post("/jobs-page/api/queues/mail/pause")).json()["done"])
    print("cancel:", (await browser.post("/jobs-page/jobs/mail-1/cancel")).status_code)
    await page.close()


with Client(dsn) as client:
    client.enqueue(EnqueueRequest("mail", "send", {"to": "ann@example.com"}, id="mail-1"))
asyncio.run(main())
