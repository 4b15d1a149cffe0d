"""The page as an ASGI application, on its own or mounted in another one."""

from collections.abc import Iterable
from typing import Protocol, cast

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocketClose

from bgjob.client import AsyncClient, Client
from bgjob.ext.web import guard, routes, troubles
from bgjob.ext.web.access import Access, Check
from bgjob.ext.web.answers import (
    done_response,
    error_response,
    frame_of,
    json_response,
    page_response,
    route_path,
    wants_json,
)
from bgjob.ext.web.database import parameters_of
from bgjob.ext.web.form import parsed
from bgjob.ext.web.frame import COLOURS, Colour
from bgjob.ext.web.metrics import Exporter
from bgjob.ext.web.redaction import Payloads, Redact, Redaction
from bgjob.ext.web.rendering import environment
from bgjob.ext.web.schemes import Proxies
from bgjob.ext.web.site import OnAction, Settings, Site
from bgjob.ext.web.traces import check_template
from bgjob.ext.web.views import ConfirmPage
from bgjob.ext.web.visit import Visit, own_path

FILES = "/static/"
PROBES = frozenset({"/livez", "/readyz"})

UNKNOWN = "You are not signed in here."
NO_LOOK = "You may not see this page: ask for the permission 'look'."


def create_app(
    source: str | Client | AsyncClient,
    *,
    access: Check,
    redact: Redact | None = None,
    payloads: Payloads = "mask",
    on_action: OnAction | None = None,
    name: str = "",
    colour: Colour = "grey",
    read_only: bool = False,
    root_path: str = "",
    hosts: Iterable[str] | None = None,
    trust: Iterable[str] = (),
    metrics: bool = False,
    trace_url: str = "",
) -> "WebApp":
    """Return the page as an ASGI application.

    Mount it in a program of yours (FastAPI, Starlette, Django), or run it on its own with any
    ASGI server. It opens connections of its own when the first request needs them: at most four
    to read, on which every statement is read-only and takes at most 2 s, and one to write. They
    are closed at the end of the lifespan, or with the process where a host runs none.

    Args:
        source: a connection string, or a client whose parameters are used. Its role needs the
            privileges of `bgjob_operator`, and those of `bgjob_editor` to change live jobs.
        access: who may do what: a function from a starlette Request to an Access, or to None
            for an unknown user, who gets 401. It may be a coroutine function. It may raise
            starlette's HTTPException, for example to lead to a log-in page.
            There is no default: the page is closed until you say who may see it. TokenAccess,
            UsersAccess and ProxyAccess are ready-made.
        redact: a function that decides what is shown of a job's payload and error, everywhere;
            see Shown. By default both are shown, but for `payloads`. It hides what is shown
            and not what is searched: a list can still be filtered by a part of the error.
        payloads: "mask" (the default) shows dots for values whose names look secret, at any
            depth; a user with the permission `payloads` can ask for them. "show" shows
            everything, "hide" shows no payload to anybody.
        on_action: called after each action with the user's name, the action, its targets and
            how many jobs or queues it changed; it may be a coroutine function. Each action
            is also logged on `bgjob.web`.
        name: the name of the installation, such as "production", for the header.
        colour: its colour there: grey, blue, green, orange, red or purple.
        read_only: whether nothing can be changed, whatever the permissions. A page on a standby
            notices that on its own.
        root_path: the prefix under which a proxy shows the page, such as "/bgjob". A mount sets
            it on its own.
        hosts: the host names for which it answers, and 421 for any other, so that no page of
            another site reaches it by a name of its own. None (the default) leaves that to the
            program that it is mounted in.
        trust: the addresses of reverse proxies, such as "127.0.0.1/32", whose
            X-Forwarded-Proto counts; none by default.
        metrics: whether it answers on `/metrics` what the database holds, for a Prometheus that
            has access, for example by a Bearer token; False by default. It needs the extra
            `prometheus`. One exporter for a database is enough: this, or `bgjob metrics`.
        trace_url: the address at which another site shows a trace, with {trace_id} in its place,
            such as "https://traces.example.com/trace/{trace_id}": the page of a job whose headers
            have a `traceparent` links to it. No link by default.

    Raises:
        ImportError: `metrics` without its extra.
        TypeError: `source` or `access` is of a wrong type.
        ValueError: an invalid connection string, colour, `payloads`, `root_path`, `trace_url`
            or network.

    """
    if not callable(access):
        raise TypeError(f"access must be a function of a request, not {type(access).__name__}")
    if colour not in COLOURS:
        raise ValueError(f"colour must be one of {', '.join(COLOURS)}, not {colour!r}")
    if payloads not in {"show", "mask", "hide"}:
        raise ValueError(f"payloads must be show, mask or hide, not {payloads!r}")
    check_root(root_path)
    if trace_url:
        check_template(trace_url)
    settings = Settings(
        access=access,
        on_action=on_action,
        name=name,
        colour=colour,
        is_read_only=read_only,
        hosts=None if hosts is None else guard.hosts_of(hosts),
        trace_url=trace_url,
    )
    site = Site(settings, Redaction(payloads, redact), parameters_of(source))
    return WebApp(site, root_path.rstrip("/"), Proxies(trust), Exporter(site) if metrics else None)


def check_root(root_path: str) -> None:
    """Raise ValueError unless it can be the prefix of the page."""
    if root_path and not root_path.startswith("/"):
        raise ValueError(f"root_path must begin with a slash, such as /bgjob, not {root_path!r}")


class Closes(Protocol):
    """An application with connections."""

    async def close(self) -> None:
        """Close them."""
        ...


async def other(app: Closes, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer what is no request: the lifespan, or a web socket, which is refused."""
    if scope["type"] != "lifespan":
        await WebSocketClose()(scope, receive, send)
        return
    while True:
        message = await receive()
        if message["type"] == "lifespan.startup":
            await send({"type": "lifespan.startup.complete"})
        else:
            await app.close()
            await send({"type": "lifespan.shutdown.complete"})
            return


class WebApp:
    """The ASGI application that `create_app` returns.

    A program uses `close`. The rest is for WebApps.
    """

    def __init__(self, site: Site, root: str, proxies: Proxies, exporter: Exporter | None) -> None:
        self.site = site
        self.root = root
        self.proxies = proxies
        self._exporter = exporter
        self.templates = environment()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await other(self, scope, receive, send)
            return
        request = Request(self.scope_of(scope), receive)
        try:
            response = await self._answer(request)
        except Exception as error:
            response = self.error_of(request, error)
        await response(request.scope, receive, guard.guarded(request.scope, send))

    def scope_of(self, scope: Scope) -> Scope:
        """Return the scope with the prefix and the scheme that count here."""
        return guard.with_scheme(guard.with_root(scope, self.root), self.proxies)

    async def close(self) -> None:
        """Close the connections, for a host that runs no lifespan."""
        await self.site.close()

    async def _answer(self, request: Request) -> Response:
        path = route_path(request)
        if request.method not in guard.METHODS:
            raise HTTPException(405, headers={"allow": ", ".join(sorted(guard.METHODS))})
        if path in PROBES:
            return await self._probe(path)
        guard.check_host(request, self.site.settings.hosts)
        if path.startswith(FILES):
            return self.file_of(path)
        body = b""
        if request.method == "POST":
            body = await guard.body_of(request)
            guard.check_origin(request)
        access = await self.entered(request)
        if isinstance(access, Response):
            return access
        if access is None:
            return self.unknown(request)
        if "look" not in access.permissions:
            raise HTTPException(403, NO_LOOK)
        if path == "/metrics" and self._exporter is not None and request.method in guard.SAFE:
            return await self._exporter.answer(request.headers.get("accept", ""))
        is_api = path == "/api" or path.startswith("/api/")
        visit = Visit(
            self.site,
            request,
            access,
            await self.site.is_read_only(),
            request.query_params.get("part") if request.method in guard.SAFE else None,
            is_api,
        )
        request.state.can, request.state.is_read_only = visit.can, visit.is_read_only
        path = path.removeprefix("/api") if is_api else path
        if request.method == "POST":
            return await self._act(visit, path, body)
        return await self._look(visit, path)

    async def entered(self, request: Request) -> Access | Response | None:
        """Return the user, or what a token in the address leads to; None if there is none."""
        check = self.site.settings.access
        arrive = getattr(check, "arrive", None)
        if arrive is not None and (arrived := arrive(request)) is not None:
            return cast("Response", arrived)
        return await guard.access_of(request, check)

    async def _look(self, visit: Visit, path: str) -> Response:
        await self.site.server()
        if (download := routes.found(routes.DOWNLOADS, path)) is not None:
            ask, visit.request.scope["path_params"] = download
            return await ask(visit)
        found = routes.found(routes.PAGES, path or "/")
        if found is None:
            raise HTTPException(404, "There is no such page.")
        page, params = found
        visit.request.scope["path_params"] = params
        if visit.part is not None and visit.part not in page.parts:
            raise HTTPException(404, f"This page has no part {visit.part!r}.")
        view = await page.ask(visit)
        if wants_json(visit.request):
            return json_response(view)
        frame = await frame_of(visit, page.title.format(**params), page.nav, page.here(visit))
        template = page.template if visit.part is None else f"{page.template}_{visit.part}"
        return await page_response(visit, self.templates, f"{template}.html", view, frame)

    async def _act(self, visit: Visit, path: str, body: bytes) -> Response:
        found = routes.found(routes.ACTIONS, path)
        if found is None:
            if routes.found(routes.PAGES, path or "/") is None:
                raise HTTPException(404, "There is no such action.")
            raise HTTPException(405, headers={"allow": "GET, HEAD"})
        action, visit.request.scope["path_params"] = found
        form = parsed(body, visit.request.headers.get("content-type", ""))
        back = form.back
        answer = await action.run(visit, form)
        if not isinstance(answer, ConfirmPage):
            return done_response(visit, answer, back)
        if wants_json(visit.request):
            return json_response({"confirm": answer}, 409)
        frame = await frame_of(visit, answer.title, None, answer.back)
        return await page_response(visit, self.templates, "confirm.html", answer, frame)

    async def _probe(self, path: str) -> Response:
        if path == "/readyz":
            try:
                await self.site.server()
            except Exception:
                return PlainTextResponse("not ready\n", 503)
        return PlainTextResponse("ok\n")

    def file_of(self, path: str) -> Response:
        """Return a file of static/."""
        stamp, _, name = path.removeprefix(FILES).partition("/")
        if name not in self.site.files:
            raise HTTPException(404, "There is no such file.")
        content, media = self.site.files[name]
        is_current = stamp == self.site.stamp
        keep = "public, max-age=31536000, immutable" if is_current else "no-cache"
        return Response(content, media_type=media, headers={"cache-control": keep})

    def unknown(self, request: Request) -> Response:
        """Return 401; or a page that asks again, as a browser sends no strict cookie with a link.

        A link on another site leads here without the cookie. This page's own refresh has it.
        """
        headers = request.headers
        if (
            headers.get("sec-fetch-site") in {"cross-site", "same-site"}
            and headers.get("sec-fetch-mode") == "navigate"
            and request.method == "GET"
        ):
            sent = request.scope.get("raw_path", b"/").decode("latin-1")
            query = request.scope["query_string"].decode("latin-1")
            here = own_path(
                f"{sent}?{query}" if query else sent, request.scope.get("root_path", "")
            )
            view = {"here": here}
            content = self.templates.get_template("again.html").render(page=None, view=view)
            return Response(content, media_type="text/html")
        challenge: dict[str, str] = getattr(self.site.settings.access, "challenge", {})
        text = f"{UNKNOWN} {getattr(self.site.settings.access, 'advice', '')}".rstrip()
        raise HTTPException(401, text, headers=challenge)

    def error_of(self, request: Request, error: Exception) -> Response:
        """Return the page of an error."""
        page, headers = troubles.of(error)
        if page is None:
            return Response(status_code=getattr(error, "status_code", 500), headers=headers)
        response = error_response(request, self.site, self.templates, page)
        response.headers.update(headers)
        return response
