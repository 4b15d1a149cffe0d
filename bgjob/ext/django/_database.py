"""What libpq needs to know of settings.DATABASES, and psycopg's connections below Django's."""

from typing import Any

import psycopg
from django.core.exceptions import ImproperlyConfigured
from django.db import connections
from psycopg.conninfo import make_conninfo
from psycopg.pq import Conninfo


def dsn(using: str = "default") -> str:
    """Return the connection string of a database of settings.DATABASES, for a Client.

    It contains the password. Of OPTIONS it has what libpq knows, such as `service`, `passfile`
    and `sslmode`, and `assume_role`. It does not have Django's own, such as `pool` and
    `isolation_level`. In a test it is that of the test database.

    Args:
        using: the alias of the database.

    Raises:
        ConnectionDoesNotExist: settings.DATABASES has no such alias.
        ImproperlyConfigured: the database is not PostgreSQL, or has no name.

    """
    connection = checked(using)
    known = {option.keyword.decode() for option in Conninfo.get_defaults()}
    parameters = {
        name: value
        for name, value in connection.get_connection_params().items()
        if name in known and value is not None
    }
    if role := connection.settings_dict["OPTIONS"].get("assume_role"):
        escaped = role.replace("\\", "\\\\").replace(" ", "\\ ")
        parameters["options"] = f"{parameters.get('options', '')} -c role={escaped}".strip()
    return make_conninfo(**parameters)


def checked(using: str) -> Any:
    """Return Django's connection of an alias; raise ImproperlyConfigured for another database."""
    connection: Any = connections[using]
    if connection.vendor != "postgresql":
        raise ImproperlyConfigured(
            f"bgjob needs PostgreSQL, and DATABASES[{using!r}] is {connection.vendor}: pass the "
            "alias of a PostgreSQL database (using=..., or --database)"
        )
    return connection


def driver(using: str) -> psycopg.Connection[Any] | None:
    """Return psycopg's connection below Django's, which is opened; None if it is psycopg2's."""
    connection = checked(using)
    connection.ensure_connection()
    own = connection.connection
    return own if isinstance(own, psycopg.Connection) else None
