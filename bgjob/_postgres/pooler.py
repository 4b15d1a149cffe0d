"""What a pooler may do: lose settings, mix up prepared statements, refuse transactions."""

import re
from collections.abc import Sequence

from psycopg.errors import DuplicatePreparedStatement, InvalidSqlStatementName, ProtocolViolation

from bgjob.errors import PoolerError

MIXED_UP = (DuplicatePreparedStatement, InvalidSqlStatementName)
"""Errors of statements that are prepared where a pooler shares its sessions."""

_SETTING = re.compile(r"(?:-c\s*|--)([\w.-]+)=((?:\\.|[^\\\s])*)")
_ESCAPED = re.compile(r"\\(.)")


def asked_settings(options: str) -> dict[str, str]:
    """Return the settings in libpq's `options`, such as "-c search_path=jobs"."""
    return {
        name.replace("-", "_"): _ESCAPED.sub(r"\1", value)
        for name, value in _SETTING.findall(options)
    }


def check_lost(names: Sequence[str]) -> None:
    """Raise PoolerError if settings are lost."""
    if names:
        raise PoolerError(
            f"the pooler in between has lost what the connection string sets: {', '.join(names)}. "
            "Set it for the role (alter role … set …) or the database, or connect past the pooler"
        )


def mixed_up() -> PoolerError:
    """Return the error to raise from one of MIXED_UP."""
    return PoolerError(
        "the pool's connections prepare statements, and the pooler in between mixes them up: make "
        'the pool with kwargs={"prepare_threshold": None}, or use PgBouncer 1.21 with its '
        "max_prepared_statements"
    )


def check_mode(error: ProtocolViolation) -> None:
    """Raise PoolerError if this error came from a pooler in statement mode."""
    if "transaction blocks not allowed" not in str(error):
        return
    raise PoolerError(
        "the pooler in between is in statement mode, in which there are no transactions: give "
        "this database pool_mode = transaction or session, or connect past the pooler"
    ) from error
