"""The web page, asked without a server and without `await`."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
from starlette.requests import Request

from bgjob.ext.web import Access, WebApp, create_app
from bgjob.ext.web.frame import PERMISSIONS

OURS = {"sec-fetch-site": "same-origin"}
"""What a browser sends with a form of the page's own."""

HOST = "http://jobs.example"


class Pages:
    """An application and a client of it; one event loop for both."""

    def __init__(self, app: Any, runner: asyncio.Runner) -> None:
        self.app = app
        self._runner = runner
        transport = httpx.ASGITransport(app)
        self._client = httpx.AsyncClient(transport=transport, base_url=HOST)

    @property
    def cookies(self) -> httpx.Cookies:
        return self._client.cookies

    def ask(self, method: str, url: str, **options: Any) -> httpx.Response:
        return self._runner.run(self._client.request(method, url, **options))

    def get(self, url: str, **headers: str) -> httpx.Response:
        return self.ask("GET", url, headers=headers)

    def json(self, url: str) -> Any:
        answer = self.get(url, accept="application/json")
        assert answer.status_code == 200, answer.text
        return answer.json()

    def post(
        self, url: str, fields: Any = None, headers: dict[str, str] | None = None
    ) -> httpx.Response:
        return self.ask("POST", url, data=fields, headers=OURS if headers is None else headers)

    def together(self, *urls: str) -> list[httpx.Response]:
        async def gathered() -> list[httpx.Response]:
            return await asyncio.gather(*map(self._client.get, urls))

        return self._runner.run(gathered())

    def close(self) -> None:
        self._runner.run(self._client.aclose())
        if isinstance(self.app, WebApp):
            self._runner.run(self.app.close())


@contextmanager
def pages_of(app: Any) -> Iterator[Pages]:
    with asyncio.Runner() as runner:
        pages = Pages(app, runner)
        try:
            yield pages
        finally:
            pages.close()


def may(*permissions: str, user: str = "ann") -> Callable[[Request], Access]:
    """Return a check that lets everybody in, with these permissions."""
    return lambda _: Access(user, frozenset(permissions))  # type: ignore[arg-type]


def all_but(*permissions: str) -> Callable[[Request], Access]:
    return may(*(PERMISSIONS - set(permissions)))


@contextmanager
def opened(dsn: str, **options: Any) -> Iterator[Pages]:
    """Open the page of a database; by default everything is allowed."""
    with pages_of(create_app(dsn, **{"access": may(*PERMISSIONS)} | options)) as pages:
        yield pages
