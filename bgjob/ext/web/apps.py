"""The pages of several databases as one ASGI application."""

import asyncio
import re
from collections.abc import Mapping
from datetime import UTC, datetime

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import Receive, Scope, Send

from bgjob.ext.web import guard
from bgjob.ext.web.access import Access
from bgjob.ext.web.answers import json_response, page_response, route_path, wants_json
from bgjob.ext.web.app import FILES, NO_LOOK, PROBES, WebApp, check_root, other
from bgjob.ext.web.frame import Frame
from bgjob.ext.web.pages import databases
from bgjob.ext.web.site import VERSION
from bgjob.ext.web.visit import DATABASE, Visit

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*", re.ASCII)
_TAKEN = frozenset({"api", "livez", "readyz", "static", "metrics"})


class WebApps:
    """The pages of several databases as one ASGI application.

    The first page shows how each database is. One that does not answer within 2 s is shown as
    such, and holds up no other. The pages of a database are below its name, with the options and
    the access that its own application has. A user sees only those that their access lets in.

    Args:
        apps: what `create_app` returned for each database, by name: letters, digits, `_`, `.`
            and `-`. They are closed with this one.
        root_path: the prefix under which a proxy shows the page; see `create_app`. The
            applications themselves have none.

    Raises:
        ValueError: no application, an invalid name or `root_path`, or an application with a
            `root_path` of its own.

    """

    def __init__(self, apps: Mapping[str, WebApp], *, root_path: str = "") -> None:
        check_root(root_path)
        if not apps:
            raise ValueError("name at least one database")
        for name, app in apps.items():
            if not _NAME.fullmatch(name) or name in _TAKEN:
                raise ValueError(
                    f"{name!r} is not a name for a database here: letters, digits, _, . and - are "
                    f"allowed, and {', '.join(sorted(_TAKEN))} are taken"
                )
            if app.root:
                raise ValueError(f"the root_path of {name!r} has to be that of all: pass it here")
        self._apps = dict(apps)
        self._first = next(iter(self._apps.values()))
        self._root = root_path.rstrip("/")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await other(self, scope, receive, send)
            return
        scope = guard.with_root(scope, self._root)
        request = Request(scope, receive)
        below = route_path(request)
        name, slash, _ = below.removeprefix("/").partition("/")
        if name in self._apps:
            root = f"{scope.get('root_path', '')}/{name}"
            if slash:
                inside = {"root_path": root, "path": scope.get("root_path", "") + below}
                await self._apps[name]({**scope, **inside, DATABASE: name}, receive, send)
            else:
                to = RedirectResponse(f"{root}/", 307)
                await to(scope, receive, guard.guarded(scope, send))
            return
        try:
            response = await self._answer(request, below)
        except Exception as error:
            response = self._first.error_of(request, error)
        await response(scope, receive, guard.guarded(scope, send))

    async def close(self) -> None:
        """Close the connections of all, for a host that runs no lifespan."""
        await asyncio.gather(*(app.close() for app in self._apps.values()))

    async def _answer(self, request: Request, path: str) -> Response:
        if request.method not in guard.SAFE:
            raise HTTPException(405, headers={"allow": "GET, HEAD"})
        if path in PROBES:  # whichever database answers: the page is there for it
            return PlainTextResponse("ok\n")
        if path.startswith(FILES):
            return self._first.file_of(path)
        found = await self._allowed(request)
        if isinstance(found, Response):
            return found
        if path not in {"/", "/api", "/api/"}:
            raise HTTPException(404, "There is no such page.")
        part = request.query_params.get("part")
        if part not in {None, "databases"}:
            raise HTTPException(404, f"This page has no part {part!r}.")
        rows = await asyncio.gather(*(databases.row(n, self._apps[n].site) for n in found))
        view = databases.DatabasesPage(tuple(rows))
        if wants_json(request):
            return json_response(view)
        template = "databases" if part is None else "databases_databases"
        visit = Visit(self._first.site, request, next(iter(found.values())), True, part, False)
        frame = _frame(visit)
        return await page_response(visit, self._first.templates, f"{template}.html", view, frame)

    async def _allowed(self, request: Request) -> dict[str, Access] | Response:
        """Return the databases that the user may see; or the answer to one who may see none."""
        checked: dict[int, Access | None] = {}  # by the check, which several may have
        found: dict[str, Access] = {}
        refusal: HTTPException | None = None
        for name, app in self._apps.items():
            check = app.site.settings.access
            theirs = Request(app.scope_of(request.scope), request.receive)
            try:
                guard.check_host(theirs, app.site.settings.hosts)
                if id(check) not in checked:
                    entered = await app.entered(theirs)
                    if isinstance(entered, Response):
                        return entered
                    checked[id(check)] = entered
            except HTTPException as error:
                refusal = refusal or error
                continue
            access = checked[id(check)]
            if access is not None and "look" in access.permissions:
                found[name] = access
        if found:
            return found
        if refusal is not None:
            raise refusal
        if any(access is not None for access in checked.values()):
            raise HTTPException(403, NO_LOOK)
        return self._first.unknown(request)


def _frame(visit: Visit) -> Frame:
    settings = visit.site.settings
    return Frame(
        title="Databases",
        name=settings.name,
        colour=settings.colour,
        version=VERSION,
        root=visit.root,
        static=f"{visit.root}/static/{visit.site.stamp}",
        here=f"{visit.root}/",
        nav=None,
        user=visit.access.user or None,
        can=frozenset(),  # each database has its own
        is_read_only=False,
        is_part=visit.part is not None,
        now=datetime.now(UTC),
    )
