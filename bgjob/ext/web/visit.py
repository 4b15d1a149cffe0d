"""One request of one user, as a page sees it."""

import asyncio
from collections.abc import Awaitable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TypeVar
from urllib.parse import unquote

import psycopg
from psycopg import errors
from starlette.exceptions import HTTPException
from starlette.requests import Request

from bgjob.errors import SchemaError
from bgjob.ext.web.access import Access
from bgjob.ext.web.frame import READING
from bgjob.ext.web.parts import Trouble
from bgjob.ext.web.site import Site
from bgjob.job import check_name

T = TypeVar("T")

DATABASE = "bgjob.database"
"""The key in the scope of the database's name, where the page is over several."""

_LONGEST = 255
_PATIENCE = 5.0


@dataclass(frozen=True, slots=True)
class Visit:
    """One request.

    Attributes:
        site: what it is served with.
        request: the request.
        access: the user, and what the user may do.
        is_read_only: whether nothing can be changed here.
        part: the part of the page that is asked for; None for all of it.
        is_api: whether it is asked for under /api.

    """

    site: Site
    request: Request
    access: Access
    is_read_only: bool
    part: str | None
    is_api: bool

    @property
    def can(self) -> frozenset[str]:
        """The permissions that count here."""
        held = frozenset(self.access.permissions)
        return held & READING if self.is_read_only else held

    @property
    def root(self) -> str:
        """The prefix of the page's addresses."""
        root: str = self.request.scope.get("root_path", "")
        return root.rstrip("/")

    def wants(self, *parts: str) -> bool:
        """Whether one of these parts, or the whole page, is asked for."""
        return self.part is None or self.part in parts

    def field(self, name: str) -> str:
        """Return a field of the query; empty if it is missing. Raise 400 if it is too long."""
        value = self.request.query_params.get(name, "")
        if len(value) > _LONGEST or "\0" in value:
            raise HTTPException(400, f"{name} must have at most {_LONGEST} characters, and no NUL")
        return value

    def name(self, what: str) -> str:
        """Return a name from the path. Raise 404 if nothing can have it."""
        value: str = self.request.path_params[what]
        try:
            check_name(what, value)
        except ValueError as error:
            raise HTTPException(404, str(error)) from None
        return value

    def back(self, to: str) -> str:
        """Return the address to go back to: one of ours, or else the first page's."""
        return own_path(to, self.root)


def database_of(request: Request) -> str:
    """Return the name of the database that is asked for; empty if the page has only one."""
    name: str = request.scope.get(DATABASE, "")
    return name


async def tried(asked: Awaitable[T], *, within: float = _PATIENCE) -> T | Trouble:
    """Return an answer, or what is said in its place.

    What the whole page cannot do without, such as a server that answers, is raised.

    Args:
        asked: what is awaited.
        within: seconds for all its statements together; 5 by default, as no one looks at an
            empty page for longer. What is kept goes on for the next viewer.

    """
    try:
        async with asyncio.timeout(within):
            return await asked
    except (psycopg.Error, SchemaError, TimeoutError) as error:
        trouble = trouble_of(error)
        if trouble is None:
            raise
        return trouble


def trouble_of(error: Exception) -> Trouble | None:
    """Return what is said of an error of one part; None if it concerns the whole page."""
    match error:
        case errors.QueryCanceled() | TimeoutError():
            return Trouble(
                "This took too long.", "It is asked again in a minute; or narrow what is asked for."
            )
        case errors.InsufficientPrivilege():
            return Trouble(
                f"The page's role may not read this: {error.diag.message_primary}.",
                "Give it what privileges.sql gives to bgjob_operator.",
            )
        case errors.LockNotAvailable():
            return Trouble(
                "Another session has locked the table.", "Who it is: bgjob doctor --check locks"
            )
        case errors.UndefinedTable() | errors.UndefinedColumn():
            return Trouble(
                f"The schema is older than this page: {error.diag.message_primary}.",
                "What is missing: bgjob doctor --check schema",
            )
        case SchemaError():
            return Trouble(str(error), "What is missing: bgjob doctor --check schema")
    return None


def seconds_ago(at: datetime, age: float | None) -> datetime | None:
    """Return when something of this age began; to the millisecond, so that it stays the same."""
    if age is None:
        return None
    try:
        then = at - timedelta(seconds=age)
    except OverflowError:
        then = datetime.min.replace(tzinfo=at.tzinfo)
    return then.replace(microsecond=then.microsecond // 1000 * 1000)


def own_path(to: str, root: str) -> str:
    """Return a path if it is one of ours, and otherwise the first page's."""
    path = to.partition("?")[0].partition("#")[0]
    segments = map(unquote, path.split("/"))
    is_ours = (
        path.startswith(root + "/")
        and not path.startswith(("//", "/\\"))
        and not ({".", ".."} & {*segments})
        and "\\" not in to
        and to.isprintable()
        and to.isascii()
    )
    return to if is_ours else f"{root}/"
