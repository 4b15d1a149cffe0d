"""Sessions: their settings, privileges and schema."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import LiteralString, NamedTuple

from bgjob._postgres.cursor import Texts
from bgjob._sql.statement import Statement, column, nothing, scalar

SETTINGS = {
    # The meaning of statements, parameters and results.
    "client_encoding": "UTF8",
    "datestyle": "ISO",
    "intervalstyle": "postgres",
    "timezone": "UTC",
    "standard_conforming_strings": "on",
    "array_nulls": "on",
    "bytea_output": "hex",
    "extra_float_digits": "1",
    "transform_null_equals": "off",
    # A statement sees all earlier commits: a retry has to see the job's current row.
    "default_transaction_isolation": "read committed",
    "default_transaction_deferrable": "off",
    # An idle session of the library is in use.
    "idle_session_timeout": "0",
    # A session whose host has vanished is not.
    "tcp_keepalives_idle": "30",  # seconds
    "tcp_keepalives_interval": "10",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": "60s",
}
"""Settings of each session of the library's own, whatever the database's and role's defaults.

In a caller's session nothing is set: statements and parameters there are written so that
none of these matters. A setting that this server does not have is left out.
"""

WORKER_SETTINGS = SETTINGS | {
    "application_name": "bgjob",
    "idle_in_transaction_session_timeout": "0",
    # A locked row is left for later, and delays only its own job; see Engine.reject.
    "lock_timeout": "100ms",
    "statement_timeout": "10s",
    # A host that falls asleep within a transaction must not keep its rows locked.
    "transaction_timeout": "20s",
    # The plans of the claim are index scans in order, whatever the statistics say: the
    # statistics of a queue are always wrong.
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "enable_sort": "off",
    # Only the index of the suspects has their full order; forbid sorting another one.
    "enable_incremental_sort": "off",
    # A batch is joined by hashing. If the planner expects no row, as after a vacuum of a
    # drained table, it would compare every pair: 75 ms for 500 retries.
    "enable_nestloop": "off",
    "jit": "off",
    # With these settings one plan serves any parameters; a sweep was planned again each
    # time, in 0.2 ms, and ran for 0.07.
    "plan_cache_mode": "force_generic_plan",
}
"""Settings of the session in which a worker claims and settles."""

_LOCAL_SETTINGS = {
    name: value
    for name, value in WORKER_SETTINGS.items()
    if name not in SETTINGS and name != "transaction_timeout"  # it cannot be set in one
}

SERVICE_SETTINGS = {"lock_timeout": "5s"}
"""Differences while a service uses that session: it waits for locks, and cannot try later."""


def schema_comment() -> Statement[str | None]:
    """Return the comment with the schema's version; None without the tables."""
    return Statement(
        "select obj_description(to_regclass('bgjob_job'), 'pg_class') "
        "where to_regclass('bgjob_job') is not null "
        "and to_regclass('bgjob_dead_job') is not null "
        "and to_regclass('bgjob_exclusive') is not null "
        "and to_regclass('bgjob_pause') is not null "
        "and to_regclass('bgjob_limit') is not null",
        None,
        lambda rows: (rows[0][0] or "") if rows else None,
    )


def drop_tables(tables: Sequence[LiteralString]) -> LiteralString:
    """Return the text that drops tables; partitions go with their table."""
    return f"drop table {', '.join(tables)};"


def empty_tables() -> LiteralString:
    """Return the text that deletes what programs and people have written, for a test."""
    return """
        truncate bgjob_job, bgjob_dead_job, bgjob_exclusive, bgjob_schedule, bgjob_pause,
            bgjob_limit, bgjob_ration, bgjob_history, bgjob_result
    """


def forget_session() -> LiteralString:
    """Return the text that brings an idle session to its state after the connect.

    As "discard all", but prepared statements and plans, which a driver may count on, are kept.
    """
    return """
        close all; set session authorization default; reset all; unlisten *;
        select pg_advisory_unlock_all(); discard temp; discard sequences
    """


def time_zone() -> LiteralString:
    """Return the text that sets the time zone, its parameter, until the transaction ends."""
    return "select set_config('TimeZone', %s, true)"


class Lack(NamedTuple):
    """A missing column, or a privilege that the role does not have."""

    relation: str
    column: str | None
    """None for the whole table."""
    privilege: str
    role: str
    is_absent: bool


# Selecting by ctid needs the privilege on the whole table.
_TABLE_NEEDS = (
    ("bgjob_job", "select"),
    ("bgjob_job", "delete"),
    ("bgjob_exclusive", "select"),
    ("bgjob_exclusive", "delete"),
    ("bgjob_result", "select"),
    ("bgjob_result", "delete"),
    ("bgjob_ration", "select"),
    ("bgjob_ration", "delete"),
)
_HOLDER = "tokens queue since since_id until until_id places slots"
_COLUMN_NEEDS = (
    (
        "bgjob_job",
        "select",
        (
            "id queue type arg priority created_at headers expires successor successor_arg "
            "group_id group_dead keep slots"
        ),
    ),
    (
        "bgjob_job",
        "insert",
        (
            "id queue type arg priority exclusive next_run_at created_at headers expires group_id "
            "keep slots"
        ),
    ),
    (
        "bgjob_job",
        "update",
        (
            "attempt last_error priority deaths exclusive waits next_run_at token lease_until "
            "updated_at checkpoint group_dead slots limited"
        ),
    ),
    ("bgjob_exclusive", "insert", f"key place {_HOLDER}"),
    ("bgjob_exclusive", "update", _HOLDER),
    (
        "bgjob_dead_job",
        "insert",
        (
            "job_id queue type arg attempt last_error fingerprint worker priority exclusive "
            "next_run_at job_created_at job_updated_at checkpoint headers expires group_id "
            "group_dead keep slots"
        ),
    ),
    ("bgjob_dead_job", "select", "job_id token job_created_at group_id"),
    (
        "bgjob_result",
        "insert",
        "id until value error queue type arg attempt token created_at ended_at",
    ),
    (
        "bgjob_result",
        "update",
        "until value error queue type arg attempt token created_at ended_at",
    ),
    ("bgjob_pause", "select", "queue until"),
    ("bgjob_limit", "select", "scope name is_set concurrency rate burst tokens used_at"),
    ("bgjob_limit", "insert", "scope name is_set"),
    ("bgjob_limit", "update", "concurrency rate burst tokens used_at"),
    ("bgjob_ration", "insert", "scope name holder places wanted until"),
    ("bgjob_ration", "update", "places wanted until"),
)


def lacks(
    table_needs: Iterable[tuple[str, str]] = _TABLE_NEEDS,
    column_needs: Iterable[tuple[str, str, str]] = _COLUMN_NEEDS,
) -> Statement[list[Lack]]:
    """List missing columns and privileges, by default a worker's; whole tables first."""
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
            "columns": Texts(columns),
            "privileges": list(privileges),
        },
        lambda rows: [Lack(*row) for row in rows],
    )


IS_OURS = """
    a.datname = current_database() and a.usename = session_user and pg_has_role(a.usesysid, 'usage')
"""
"""Whether session `a` of pg_stat_activity has this role, and this role may end it."""


class Backend(NamedTuple):
    """The server process that answers."""

    pid: int
    """Behind a pooler it differs from the one of the connection."""
    is_read_only: bool
    at: datetime
    """Its time."""


def backend() -> Statement[Backend]:
    """Return the server process that answers, and its time."""
    return Statement(
        "select pg_backend_pid(), current_setting('transaction_read_only')::bool, "
        "clock_timestamp()",
        None,
        lambda rows: Backend(*rows[0]),
    )


def clock() -> Statement[datetime]:
    """Return the database's time."""
    return Statement("select clock_timestamp()", None, scalar)


def transaction() -> Statement[None]:
    """Set a worker's settings for this transaction, behind a pooler that shares sessions."""
    return Statement(
        "select set_config(name, value, true) "
        "from unnest(%(names)s::text[], %(values)s::text[]) as s (name, value)",
        {"names": [*_LOCAL_SETTINGS], "values": [*_LOCAL_SETTINGS.values()]},
        nothing,
    )


def lost(asked: Mapping[str, str]) -> Statement[list[str]]:
    """Return the names of settings whose value is another one, for a session's start.

    Args:
        asked: the settings that the connection string asks for, by their names.

    """
    return Statement(
        """
        with held as materialized (
            select name, value, current_setting(name, true) as value_held
            from unnest(%(names)s::text[], %(values)s::text[]) as s (name, value)
        ), wanted as materialized (
            -- As the server writes it, until the end of this transaction.
            select name, value_held, set_config(name, value, true) as value_wanted from held
        )
        select name from wanted
        -- A list is the same with and without spaces.
        where replace(value_held, ' ', '') is distinct from replace(value_wanted, ' ', '')
        order by name
        """,
        {"names": list(asked), "values": list(asked.values())},
        column,
    )


class Hidden(NamedTuple):
    """A table whose row-level security may hide rows."""

    relation: str
    role: str


def hidden() -> Statement[list[Hidden]]:
    """List the tables whose row-level security does not let this role see all rows."""
    return Statement(
        """
        select c.relname::text, current_user::text
        from unnest(array['bgjob_job', 'bgjob_exclusive', 'bgjob_pause', 'bgjob_limit']) as n (name)
        join pg_class c on c.oid = to_regclass(n.name)
        where row_security_active(c.oid) and (
            exists (select from pg_policy p where p.polrelid = c.oid and not p.polpermissive)
            or not exists (
                select from pg_policy p
                where p.polrelid = c.oid and p.polpermissive and p.polcmd = '*'
                    and pg_get_expr(p.polqual, p.polrelid) = 'true'
                    and exists (
                        select from unnest(p.polroles) as r (role)
                        where r.role = 0 or pg_has_role(r.role, 'usage')
                    )
            )
        )
        order by 1
        """,
        None,
        lambda rows: [Hidden(*row) for row in rows],
    )


def session(pid: int, settings: Mapping[str, str] = SETTINGS) -> Statement[None]:
    """Set parameters for the rest of the session.

    Settings that this version of the server does not have are skipped.

    Args:
        pid: the server process that the driver knows. If another one answers there is a
            pooler, which shares its sessions: then nothing is set.
        settings: by default those of the library's own sessions.

    """
    return Statement(
        "select set_config(name, value, false) "
        "from unnest(%(names)s::text[], %(values)s::text[]) as s (name, value) "
        "where pg_backend_pid() = %(pid)s and current_setting(name, true) is not null",
        {"pid": pid, "names": list(settings), "values": list(settings.values())},
        nothing,
    )
