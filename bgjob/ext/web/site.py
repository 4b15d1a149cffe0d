"""What one page is served with: its settings, its connections, and the answers that are kept."""

import asyncio
import hashlib
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from importlib import resources
from typing import Any, TypeAlias, TypeVar

import bgjob
from bgjob._postgres.connection import ConnectionParameters
from bgjob._sql.server import Server
from bgjob.ext.web.access import Check
from bgjob.ext.web.database import Reader, Writer
from bgjob.ext.web.frame import Colour
from bgjob.ext.web.kept import Kept
from bgjob.ext.web.parts import Trace
from bgjob.ext.web.redaction import Redaction, Shown
from bgjob.ext.web.replays import Replays
from bgjob.ext.web.traces import trace_of
from bgjob.stats import Overview
from bgjob.workers import WorkerStatus

T = TypeVar("T")

OnAction: TypeAlias = Callable[[str, str, tuple[str, ...], int], object]
"""Called after an action with the user's name, the action, what it was asked for (for example ids)
and how many it changed. It may return an awaitable."""

_CHECKED = 10.0
"""Seconds for which it is known what the server is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the operator of a page has chosen; see create_app."""

    access: Check
    on_action: OnAction | None
    name: str
    colour: Colour
    is_read_only: bool
    hosts: frozenset[str] | None
    trace_url: str


@dataclass(slots=True)
class Site:
    """A page's settings, connections and memory; of one process."""

    settings: Settings
    redaction: Redaction
    parameters: ConnectionParameters
    reader: Reader = field(init=False)
    writer: Writer = field(init=False)
    replays: Replays = field(init=False)
    kept: Kept = field(init=False, default_factory=Kept)
    key: bytes = field(init=False, default_factory=lambda: secrets.token_bytes(32))
    """Signs notices."""
    files: dict[str, tuple[bytes, str]] = field(init=False)
    """The static files by name: content and media type."""
    stamp: str = field(init=False)
    """Changes with their content."""
    _offset: timedelta = field(init=False, default=timedelta())

    def __post_init__(self) -> None:
        self._open()
        self.files = _files()
        digest = hashlib.sha256()
        for name, (content, _) in sorted(self.files.items()):
            digest.update(name.encode() + b"\0" + content)
        self.stamp = digest.hexdigest()[:16]

    @property
    def now(self) -> datetime:
        """The time of the database's clock, as far as it is known."""
        return datetime.now(UTC) + self._offset

    async def keep(
        self, key: object, ask: Callable[[], Awaitable[T]], *, at_least: float = 2.0
    ) -> T:
        """Return an answer that all viewers share."""
        return await self.kept.get(key, ask, at_least=at_least)

    async def server(self) -> Server:
        """Return what the server is; raise SchemaError unless the tables are there."""
        return await self.keep("server", self.reader.check, at_least=_CHECKED)

    async def is_read_only(self) -> bool:
        """Whether nothing can be written: so it was told, or the server is a standby."""
        if self.settings.is_read_only:
            return True
        server = await self.server()
        return server.is_in_recovery or server.is_read_only

    async def overview(self) -> Overview:
        """Return the numbers of all queues."""

        async def ask() -> Overview:
            found = await self.reader.overview()
            self._offset = found.at - datetime.now(UTC)
            return found

        return await self.keep("overview", ask)

    def trace_of(self, shown: Shown) -> Trace | None:
        """Return the link to the trace of a job, if its headers may be seen and name one."""
        left = self.redaction.of(replace(shown, arg=None, error=None))
        return None if left is None else trace_of(left.headers, self.settings.trace_url)

    async def workers(self) -> list[WorkerStatus]:
        """Return the registered workers."""
        return await self.keep("workers", self.reader.workers)

    async def close(self) -> None:
        """Close the connections; a later request opens others."""
        await self.replays.close()
        await self.kept.close()
        reader, writer = self.reader, self.writer
        self._open()
        await asyncio.gather(reader.close(), writer.close())

    def _open(self) -> None:
        """Make the clients; they connect when they are used."""
        self.reader = Reader(self.parameters)
        self.writer = Writer(self.parameters)
        self.replays = Replays(self.writer, lambda: self.now)


_MEDIA = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


def _files() -> dict[str, tuple[bytes, str]]:
    found: dict[str, tuple[bytes, str]] = {}
    folder: Any = resources.files("bgjob.ext.web") / "static"
    for file in folder.iterdir():
        suffix = "." + file.name.rpartition(".")[2]
        if suffix in _MEDIA:
            found[file.name] = (file.read_bytes(), _MEDIA[suffix])
    return found


VERSION = bgjob.__version__
