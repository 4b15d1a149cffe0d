"""Answers: a view as HTML or as JSON, an error as a page, a redirect after an action."""

import hashlib
from dataclasses import asdict
from typing import Any

import orjson
from jinja2 import Environment
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from bgjob.ext.web import notice
from bgjob.ext.web.frame import Frame, Section
from bgjob.ext.web.pages.overview import dead_last_hour
from bgjob.ext.web.parts import Trouble
from bgjob.ext.web.site import VERSION, Site
from bgjob.ext.web.views import Done, ErrorPage
from bgjob.ext.web.visit import Visit, database_of, tried

PRIVATE = {"cache-control": "private, no-cache", "vary": "Accept, Cookie, Authorization"}
"""Headers of what a browser may keep, if it asks each time whether it has changed."""


def wants_json(request: Request) -> bool:
    """Whether the answer is for a program."""
    accept = request.headers.get("accept", "")
    return route_path(request).startswith("/api/") or (
        "application/json" in accept and "text/html" not in accept
    )


def route_path(request: Request) -> str:
    """Return the path below the root."""
    path: str = request.scope["path"]
    root: str = request.scope.get("root_path", "")
    return path.removeprefix(root) if root and path.startswith(root + "/") else path


def json_response(value: object, status: int = 200) -> Response:
    """Return a value as JSON."""
    content = orjson.dumps(value, default=_default)
    return Response(content, status, media_type="application/json")


def _default(value: Any) -> Any:
    if hasattr(value, "_asdict"):
        return value._asdict()
    raise TypeError(type(value).__name__)


async def frame_of(visit: Visit, title: str, nav: Section | None, here: str) -> Frame:
    """Return what is around a page of this user."""
    dead = None
    lost = 0
    if visit.part is None and "look" in visit.can:
        found = await tried(visit.site.overview())
        dead = None if isinstance(found, Trouble) else dead_last_hour(found)
        workers = await tried(visit.site.workers())
        if not isinstance(workers, Trouble):
            lost = sum(worker.state == "lost" for worker in workers)
    said = notice.take(visit.request, visit.site.key) if visit.part is None else None
    settings = visit.site.settings
    return Frame(
        title=title,
        name=settings.name,
        colour=settings.colour,
        version=VERSION,
        root=visit.root,
        static=f"{visit.root}/static/{visit.site.stamp}",
        here=here,
        nav=nav,
        user=visit.access.user or None,
        can=visit.can,
        is_read_only=visit.is_read_only,
        is_part=visit.part is not None,
        now=visit.site.now,
        dead_last_hour=dead,
        lost_workers=lost,
        notice=said[0] if said else None,
        is_wrong=bool(said and said[1]),
        database=database_of(visit.request),
    )


async def page_response(
    visit: Visit, templates: Environment, template: str, view: object, frame: Frame
) -> Response:
    """Return a page; 304 if the browser has the same already."""
    content = templates.get_template(template).render(page=frame, view=view).encode()
    tag = f'W/"{hashlib.blake2b(content, digest_size=12).hexdigest()}"'
    headers = PRIVATE | {"etag": tag}
    if _has(visit.request, tag):
        return Response(status_code=304, headers=headers)
    response = Response(content, media_type="text/html", headers=headers)
    if frame.notice is not None:
        notice.clear(response, visit.request)
    return response


def _has(request: Request, tag: str) -> bool:
    given = request.headers.get("if-none-match", "")
    return tag in [each.strip() for each in given.split(",")]


def error_response(
    request: Request, site: Site, templates: Environment, error: ErrorPage
) -> Response:
    """Return an error, for a person or for a program."""
    can: frozenset[str] = getattr(request.state, "can", frozenset())
    if wants_json(request):
        return json_response({"error": asdict(error)}, error.status)
    root = request.scope.get("root_path", "")
    frame = Frame(
        title=error.title,
        name=site.settings.name if can else "",
        colour=site.settings.colour,
        version=VERSION,
        root=root,
        static=f"{root}/static/{site.stamp}",
        here=root + "/",
        nav=None,
        user=None,
        can=can,
        is_read_only=getattr(request.state, "is_read_only", False),
        is_part=False,
        now=site.now,
        database=database_of(request) if can else "",
    )
    content = templates.get_template("error.html").render(page=frame, view=error)
    return Response(content, error.status, media_type="text/html")


def done_response(visit: Visit, done: Done, to: str) -> Response:
    """Return what an action did: to a program as JSON, a browser goes back to its page."""
    if wants_json(visit.request):
        return json_response(done)
    response = RedirectResponse(visit.back(to), status_code=303)
    notice.give(response, visit.request, visit.site.key, done.done, is_wrong=done.count == 0)
    return response
