"""The round trips on the connections of handlers, counted by libpq's trace."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import psycopg
import pytest

from bgjob._running.sessions import HandlerConnection


class Turns:
    """Traces the sessions that are opened for plain handlers, all into one file."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._path = directory / "trace"
        self._trace = self._path.open("ab", buffering=0)
        self.sessions: list[int] = []
        """The server's processes."""
        monkeypatch.setattr(HandlerConnection, "connect", self._connect)

    def _connect(self, **options: Any) -> HandlerConnection:
        connection = psycopg.Connection.connect.__func__(HandlerConnection, **options)  # type: ignore[attr-defined]
        connection.pgconn.trace(self._trace.fileno())
        self.sessions.append(connection.info.backend_pid)
        return connection  # type: ignore[no-any-return]

    def begin(self) -> None:
        """Count from here."""
        self._trace.truncate(0)

    def count(self) -> int:
        """Return the round trips since `begin`."""
        said = self._path.read_text().splitlines()
        directions = [line.split("\t")[1] for line in said if "\t" in line]
        return sum(a != b for a, b in pairwise(directions)) // 2 + 1

    def close(self) -> None:
        self._trace.close()
