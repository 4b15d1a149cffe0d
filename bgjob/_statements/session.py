"""What a session needs, and finds: settings, rights, the schema."""

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import NamedTuple

from bgjob._statements.statement import Statement, nothing, scalar


def schema_comment() -> Statement[str | None]:
    """Give the comment that carries the schema's version; None without the table."""
    return Statement(
        "select obj_description(to_regclass('bgjob_job'), 'pg_class') "
        "where to_regclass('bgjob_job') is not null "
        "and to_regclass('bgjob_dead_job') is not null "
        "and to_regclass('bgjob_exclusive') is not null "
        "and to_regclass('bgjob_pause') is not null",
        None,
        lambda rows: (rows[0][0] or "") if rows else None,
    )


class Lack(NamedTuple):
    """A column that is not there, or a privilege that the role has not."""

    relation: str
    column: str | None
    """None if it is about the whole table."""
    privilege: str
    role: str
    is_absent: bool


# What is selected by position needs the whole table's privilege.
_TABLE_NEEDS = (
    ("bgjob_job", "select"),
    ("bgjob_job", "delete"),
    ("bgjob_exclusive", "select"),
    ("bgjob_exclusive", "delete"),
)
_COLUMN_NEEDS = (
    ("bgjob_job", "select", "id queue type arg priority created_at"),
    (
        "bgjob_job",
        "update",
        (
            "attempt last_error priority deaths exclusive waits next_run_at token lease_until "
            "updated_at"
        ),
    ),
    ("bgjob_exclusive", "insert", "key"),
    ("bgjob_exclusive", "update", "job_id token"),
    (
        "bgjob_dead_job",
        "insert",
        (
            "job_id queue type arg attempt last_error priority exclusive next_run_at "
            "job_created_at job_updated_at"
        ),
    ),
    ("bgjob_dead_job", "select", "job_id"),
    ("bgjob_pause", "select", "queue until"),
)


def lacks(
    table_needs: Iterable[tuple[str, str]] = _TABLE_NEEDS,
    column_needs: Iterable[tuple[str, str, str]] = _COLUMN_NEEDS,
) -> Statement[list[Lack]]:
    """List what a worker (by default) needs of the tables and has not; whole tables first."""
    needs: list[tuple[str, str | None, str]] = [
        (relation, None, privilege) for relation, privilege in table_needs
    ]
    needs += [
        (relation, column, privilege)
        for relation, privilege, columns in column_needs
        for column in columns.split()
    ]
    relations, columns, privileges = zip(*needs, strict=True)
    return Statement(
        """
        select n.relation, n.name, n.privilege, current_user::text,
            n.name is not null and a.attnum is null
        from unnest(%(relations)s::text[], %(columns)s::text[], %(privileges)s::text[])
            with ordinality as n (relation, name, privilege, position)
        left join pg_attribute a on a.attrelid = to_regclass(n.relation) and a.attname = n.name
            and not a.attisdropped
        where case
            when n.name is null then not has_table_privilege(to_regclass(n.relation), n.privilege)
            when a.attnum is null then true
            else not has_column_privilege(n.relation, a.attnum, n.privilege)
        end
        order by n.position
        """,
        {
            "relations": list(relations),
            "columns": list(columns),
            "privileges": list(privileges),
        },
        lambda rows: [Lack(*row) for row in rows],
    )


class Backend(NamedTuple):
    """The server's process that answers."""

    pid: int
    """Behind a pooler it is not the one connected to."""
    is_read_only: bool


def backend() -> Statement[Backend]:
    """Tell who answers."""
    return Statement(
        "select pg_backend_pid(), current_setting('transaction_read_only')::bool",
        None,
        lambda rows: Backend(*rows[0]),
    )


def clock() -> Statement[datetime]:
    """Tell the database's time."""
    return Statement("select clock_timestamp()", None, scalar)


def session(settings: Mapping[str, str]) -> Statement[None]:
    """Set parameters for the rest of the session."""
    return Statement(
        "select set_config(name, value, false) "
        "from unnest(%(names)s::text[], %(values)s::text[]) as s (name, value)",
        {"names": list(settings), "values": list(settings.values())},
        nothing,
    )
