"""The state of the server: who keeps dead rows, who waits for whom, what is used up.

What other roles run, and since when, is hidden from a role without pg_read_all_stats. Their
process, name, transaction numbers and locks are not, so these statements find a culprit in any
case. A hidden column is null, also `backend_type`: a condition on it has to allow for that.
"""

from typing import LiteralString, NamedTuple

from bgjob._sql.statement import Statement, nothing, scalar

_BOUNDS = {
    "transaction_read_only": "on",
    "lock_timeout": "1s",
    "jit": "off",
    # The statistics of a queue are always wrong; see WORKER_SETTINGS.
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
}


def bounds(application: str = "bgjob doctor", *, seconds: int = 5) -> Statement[None]:
    """Make this transaction read-only, and limit how long its statements take and wait.

    Args:
        application: the name of the session meanwhile.
        seconds: how long a statement may take.

    """
    settings = {"application_name": application, "statement_timeout": f"{seconds}s"} | _BOUNDS
    return Statement(
        "select set_config(name, value, true) "
        "from unnest(%(names)s::text[], %(values)s::text[]) as s (name, value)",
        {"names": [*settings], "values": [*settings.values()]},
        nothing,
    )


class Server(NamedTuple):
    """The server, as this session sees it."""

    version: str
    is_in_recovery: bool
    is_read_only: bool
    """Whether transactions of this role in this database are read-only by default."""
    autovacuum: bool
    track_counts: bool
    track_activities: bool
    now: float
    """Its clock, in seconds since 1970."""
    pid: int
    """The server process that answers."""


def server() -> Statement[Server]:
    """Return the server's version, role, settings and time."""
    return Statement(
        """
        select current_setting('server_version'), pg_is_in_recovery(),
            current_setting('default_transaction_read_only')::bool,
            current_setting('autovacuum')::bool, current_setting('track_counts')::bool,
            current_setting('track_activities')::bool,
            extract(epoch from clock_timestamp())::float8, pg_backend_pid()
        """,
        None,
        lambda rows: Server(*rows[0]),
    )


class Connections(NamedTuple):
    """Connections in use, and how many there may be."""

    scope: str
    """'server', 'database' or 'role'."""
    name: str | None
    """Of the database or role."""
    used: int
    most: int


def connections() -> Statement[list[Connections]]:
    """Count the connections that are in use, against each limit that holds for this role."""
    return Statement(
        """
        with session (database, role) as materialized (
            select datid, usesysid from pg_stat_activity where usesysid is not null
        )
        select 'server', null::text, (select count(*) from session where database is not null),
            current_setting('max_connections')::int
                - current_setting('superuser_reserved_connections')::int
                - coalesce(current_setting('reserved_connections', true)::int, 0)
        union all
        select 'database', d.datname::text,
            (select count(*) from session where database = d.oid), d.datconnlimit
        from pg_database d
        join pg_roles r on r.rolname = session_user and not r.rolsuper
        where d.datname = current_database() and d.datconnlimit > 0
        union all
        select 'role', r.rolname::text,
            (select count(*) from session where role = r.oid), r.rolconnlimit
        from pg_roles r
        where r.rolname = session_user and r.rolconnlimit > 0 and not r.rolsuper
        """,
        None,
        lambda rows: [Connections(*row) for row in rows],
    )


class NotifyQueue(NamedTuple):
    """The server's queue of notifications, which all its databases share."""

    usage: float
    """From 0 to 1."""
    idle_pid: int | None
    """The session that has been idle in a transaction for longest, as far as this role sees."""


def notify_queue() -> Statement[NotifyQueue]:
    """Return how full the queue of notifications is, and who may hold it up."""
    return Statement(
        """
        select pg_notification_queue_usage(), (
            select pid from pg_stat_activity
            where state in ('idle in transaction', 'idle in transaction (aborted)')
            order by xact_start limit 1
        )
        """,
        None,
        lambda rows: NotifyQueue(*rows[0]),
    )


class Rights(NamedTuple):
    """What this role may see of other sessions."""

    role: str
    hidden: int
    """Sessions of this database whose query is hidden from it."""


def rights() -> Statement[Rights]:
    """Count the sessions whose query is hidden from this role."""
    return Statement(
        """
        select current_user::text, count(*) filter (
            where query = '<insufficient privilege>' and pid <> pg_backend_pid()
        )
        from pg_stat_activity where datname = current_database()
        """,
        None,
        lambda rows: Rights(*rows[0]),
    )


def worker_sessions() -> Statement[int]:
    """Count the sessions of workers in this database, by their names; none behind a pooler."""
    return Statement(
        """
        select count(*) from pg_stat_activity
        where datname = current_database() and application_name ~ '^bgjob( -?[0-9]+( .*)?)?$'
        """,
        None,
        scalar,
    )


# Whether this role may end session or prepared transaction {owner}: a superuser's only if it is
# a superuser.
_MAY_END: LiteralString = """(
    select case when o.rolsuper then me.rolsuper else
        pg_has_role(me.oid, o.oid, 'usage') or {signal} end
    from pg_roles o, pg_roles me where o.oid = {owner} and me.rolname = current_user
)"""
_MAY_TERMINATE = _MAY_END.format(
    owner="a.usesysid", signal="pg_has_role(me.oid, 'pg_signal_backend', 'usage')"
)
_MAY_ROLL_BACK = _MAY_END.format(
    owner="(select oid from pg_roles where rolname = p.owner)", signal="false"
)


class Holder(NamedTuple):
    """One that holds the vacuum horizon back: dead rows that it could still see are kept."""

    kind: str
    """'session', 'standby', 'slot' or 'prepared'."""
    name: str
    """The process id, the slot's name, or the transaction's identifier."""
    database: str | None
    """Its database if that is another one."""
    role: str | None
    application: str | None
    address: str | None
    state: str | None
    transactions: int
    """Transactions that have begun since."""
    seconds: float | None
    """The age of its transaction; None if it has none, or is hidden from this role."""
    query: str | None
    may_end: bool | None
    """Whether this role may end it; None if that cannot be told here."""
    follows: bool
    """Whether it only waits for another transaction that is open: its snapshot begins there."""


def holders() -> Statement[list[Holder]]:
    """List what keeps dead rows of this database, the oldest first, at most twenty.

    A snapshot here begins with the oldest transaction that writes in any database of the server,
    so those of other databases count too. A logical slot keeps dead rows of catalogs only
    (`catalog_xmin`), and is left out. So is a vacuum: it holds nothing back. A process that
    serves a standby is connected to no database.
    """
    return Statement(
        f"""
        with running as materialized (
            select backend_xid as xid, pid from pg_stat_activity where backend_xid is not null
            union all
            select transaction, null from pg_prepared_xacts
        )
        select kind, name, database, role, application, address, state, transactions, seconds,
            query, may_end, exists (
                select from running r where r.xid = h.xmin and r.pid is distinct from h.pid
            ) as follows
        from (
            select 'session' as kind, a.pid::text as name, a.pid, a.backend_xmin as xmin,
                nullif(a.datname, current_database())::text as database, a.usename::text as role,
                a.application_name as application,
                case when a.backend_start is not null
                    then coalesce(host(a.client_addr), 'local') end as address,
                a.state, greatest(
                    case when a.datname = current_database() then age(a.backend_xmin) end,
                    age(a.backend_xid)
                ) as transactions,
                extract(epoch from clock_timestamp() - a.xact_start)::float8 as seconds,
                left(a.query, 120) as query, {_MAY_TERMINATE} as may_end
            from pg_stat_activity a
            where (
                    a.backend_xid is not null
                    or a.datname = current_database() and a.backend_xmin is not null
                )
                and a.pid <> pg_backend_pid()
                and a.pid not in (select pid from pg_stat_progress_vacuum where pid is not null)
            union all
            select 'standby', r.pid::text, r.pid, r.backend_xmin, null, r.usename::text,
                r.application_name, coalesce(host(r.client_addr), 'local'), r.state,
                age(r.backend_xmin), null, null, null
            from pg_stat_replication r
            where r.backend_xmin is not null and not exists (
                select from pg_stat_activity a where a.pid = r.pid and a.datid is not null
            )
            union all
            select 'slot', s.slot_name::text, null, s.xmin, null, null, (
                    select application_name from pg_stat_replication r where r.pid = s.active_pid
                ), null, case when s.active then 'active' else 'inactive' end,
                age(s.xmin), null, null, null
            from pg_replication_slots s where s.xmin is not null
            union all
            select 'prepared', p.gid, null, null, nullif(p.database, current_database())::text,
                p.owner::text, null, null, 'prepared', age(p.transaction),
                extract(epoch from clock_timestamp() - p.prepared)::float8, null, {_MAY_ROLL_BACK}
            from pg_prepared_xacts p
        ) as h
        order by transactions desc nulls last, follows, seconds desc nulls last limit 20
        """,
        None,
        lambda rows: [Holder(*row) for row in rows],
    )


class Wait(NamedTuple):
    """A session that waits for a lock, and one that has it."""

    pid: int
    role: str | None
    application: str | None
    seconds: float
    relation: str
    """One of bgjob's tables that the session uses."""
    blocker_pid: int | None
    """None if a prepared transaction has the lock."""
    blocker_role: str | None
    blocker_application: str | None
    blocker_state: str | None
    blocker_may_end: bool | None
    prepared: list[str]
    """The prepared transactions that lock bgjob's tables, if one of them has the lock."""


class TableLock(NamedTuple):
    """A lock that keeps workers from a table."""

    pid: int | None
    """None for a prepared transaction."""
    prepared: str | None
    relation: str
    mode: str
    role: str | None
    application: str | None
    state: str | None
    seconds: float | None
    """The age of its transaction; None if it is hidden from this role."""
    may_end: bool | None


_OURS = """
    lock as materialized (
        select * from pg_locks where database = (
            select oid from pg_database where datname = current_database()
        ) or database is null
    ), ours as materialized (
        select c.oid, c.relname from unnest(%(tables)s::text[]) as n (name)
        join pg_class c on c.oid = to_regclass(n.name)
    )
"""
# A prepared transaction keeps the virtual number of its session, until the server restarts. Its
# lock of its own number leads from one to the other.
_OF_PREPARED = """
    p.database = current_database() and l.pid is null and l.virtualtransaction = (
        select x.virtualtransaction from lock x
        where x.locktype = 'transactionid' and x.granted and x.pid is null
            and x.transactionid = p.transaction
        limit 1
    )
"""


def lock_waits(tables: list[str]) -> Statement[list[Wait]]:
    """List sessions that use these tables and wait for a lock, the longest wait first.

    A client that was killed while it waits is among them: the server does not notice. A blocking
    process 0 is a prepared transaction's.
    """
    return Statement(
        f"""
        with {_OURS}, waiting as materialized (
            select w.pid,
                extract(epoch from clock_timestamp() - min(w.waitstart))::float8 as seconds,
                (
                    select ours.relname::text from lock l join ours on ours.oid = l.relation
                    where l.pid = w.pid order by l.granted, ours.relname limit 1
                ) as relation
            from lock w
            where not w.granted and w.waitstart is not null and w.pid <> pg_backend_pid()
            group by w.pid order by 2 desc limit 1000
        )
        select w.pid, a.usename::text, a.application_name, w.seconds, w.relation,
            nullif(b.pid, 0), h.usename::text, h.application_name, h.state, h.may_end,
            case when b.pid = 0 then array(
                select p.gid from pg_prepared_xacts p where exists (
                    select from lock l join ours on ours.oid = l.relation
                    where {_OF_PREPARED}
                ) order by p.prepared limit 10
            ) else '{{}}'::text[] end
        from (select * from waiting where relation is not null order by seconds desc limit 10) as w
        left join pg_stat_activity a on a.pid = w.pid
        left join lateral (
            select distinct b.pid from unnest(pg_blocking_pids(w.pid)) as b (pid)
            order by b.pid limit 3
        ) as b on true
        left join lateral (
            select a.usename, a.application_name, a.state, {_MAY_TERMINATE} as may_end
            from pg_stat_activity a where a.pid = b.pid
        ) as h on true
        order by w.seconds desc, b.pid
        """,
        {"tables": tables},
        lambda rows: [Wait(*row) for row in rows],
    )


def table_locks(tables: list[str]) -> Statement[list[TableLock]]:
    """List locks of whole tables that keep workers from them, at most ten."""
    return Statement(
        f"""
        with {_OURS}
        select l.pid, p.gid, ours.relname::text, l.mode, coalesce(a.usename, p.owner)::text,
            a.application_name, a.state,
            extract(epoch from clock_timestamp() - coalesce(a.xact_start, p.prepared))::float8,
            case when p.gid is null then {_MAY_TERMINATE} else {_MAY_ROLL_BACK} end
        from lock l
        join ours on ours.oid = l.relation
        left join pg_stat_activity a on a.pid = l.pid
        left join pg_prepared_xacts p on {_OF_PREPARED}
        where l.locktype = 'relation' and l.granted and l.pid is distinct from pg_backend_pid()
            and l.mode in (
            'ShareLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock'
        )
        order by 8 desc nulls last, ours.relname limit 10
        """,
        {"tables": tables},
        lambda rows: [TableLock(*row) for row in rows],
    )
