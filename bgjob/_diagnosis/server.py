"""Rows to findings: the server, the clocks, a pooler, connections, notifications, rights."""

from collections.abc import Sequence

from bgjob._sql.server import Connections, NotifyQueue, Rights, Server
from bgjob._words import count, identifier, lasting
from bgjob.doctor import Finding, Limits

_SKEW = 1.0
"""Seconds by which two clocks always may differ."""

_SKEW_OF_TEXTS = 3600.0
"""Seconds from which ids, logs and cron texts mislead."""


def server(server: Server, round_trip: float) -> list[Finding]:
    """Report a server on which workers cannot work, or that cannot care for its tables."""
    found = []
    facts = server._asdict() | {"round_trip": round_trip}

    def bad(text: str, remedy: str) -> None:
        found.append(Finding("server", "bad", text, remedy, facts))

    if server.is_in_recovery:
        bad(
            "the server is a standby, on which nothing can be written",
            "connect to the primary: name all hosts in the connection string, with "
            "target_session_attrs=read-write",
        )
    elif server.is_read_only:
        bad(
            "transactions are read-only by default, so nothing can be enqueued or claimed",
            "set default_transaction_read_only to off where it is on: alter database, alter role, "
            "alter system or the connection string",
        )
    for name, is_on, harm in (
        ("autovacuum", server.autovacuum, "dead rows pile up until claims stand still"),
        ("track_counts", server.track_counts, "autovacuum does not know what to vacuum"),
        ("track_activities", server.track_activities, "nobody sees which sessions are at work"),
    ):
        if not is_on:
            bad(
                f"{name} is off: {harm}",
                f"alter system set {name} = on; select pg_reload_conf()",
            )
    return found or [
        Finding(
            "server",
            "ok",
            f"PostgreSQL {server.version}, primary, {round_trip * 1e3:.1f} ms away",
            facts=facts,
        )
    ]


def clock(ahead: float, round_trip: float) -> list[Finding]:
    """Report a difference between this host's clock and the server's.

    Args:
        ahead: seconds by which this host's clock is ahead.
        round_trip: seconds between the question and its answer: half of it is the error.

    """
    skew = abs(ahead)
    facts = {"ahead": ahead, "round_trip": round_trip}
    if skew <= max(_SKEW, round_trip):
        text = f"the clocks of this host and of the server differ by {skew:.1f} s"
        return [Finding("clock", "ok", text, facts=facts)]
    direction = "ahead of" if ahead > 0 else "behind"
    text = f"this host's clock is {lasting(skew)} {direction} the server's"
    remedy = "synchronise the clocks of both hosts (NTP)"
    if skew > _SKEW_OF_TEXTS:
        text += "; new ids, logs and the ticks of cron texts are off by as much"
        return [Finding("clock", "warn", text, remedy, facts)]
    text += "; harmless: only the database's clock counts"
    return [Finding("clock", "note", text, remedy, facts)]


def pooler(server: Server, pid: int, *, prepares: bool) -> list[Finding]:
    """Report a pooler: a server process answers that is not the connection's own.

    Args:
        server: its answer.
        pid: the server process of the connection, as the driver knows it.
        prepares: whether the driver may prepare statements on the connection.

    """
    facts = {"pid": pid, "answered": server.pid}
    if server.pid == pid:
        return [Finding("pooler", "ok", "there is no pooler in between", facts=facts)]
    if prepares:
        return [
            Finding(
                "pooler",
                "warn",
                "there is a pooler in between, and this pool's connections prepare statements, "
                "which PgBouncer before 1.21 loses",
                'make the pool with kwargs={"prepare_threshold": None}, or use PgBouncer 1.21',
                facts,
            )
        ]
    return [
        Finding(
            "pooler",
            "note",
            "there is a pooler in between: workers are not notified of new jobs, but poll",
            "to start jobs within milliseconds, give workers a connection string past the pooler",
            facts,
        )
    ]


def connections(rows: Sequence[Connections], limits: Limits) -> list[Finding]:
    """Report that connections run out, for the server, this database or this role."""
    found = []
    for row in rows:
        part = row.used / row.most if row.most > 0 else 1.0
        if part < limits.connections:
            continue
        of = "" if row.name is None else f" of {row.scope} {row.name}"
        remedies = {
            "server": "raise max_connections",
            "database": f"alter database {identifier(row.name or '')} connection limit N",
            "role": f"alter role {identifier(row.name or '')} connection limit N",
        }
        found.append(
            Finding(
                "connections",
                "bad" if part >= limits.connections_bad else "warn",
                f"{row.used:,} of {row.most:,} connections{of} are in use",
                "close idle ones (smaller pools, fewer processes, a pooler), or: "
                + remedies[row.scope],
                row._asdict(),
            )
        )
    if found or not rows:
        return found
    first = rows[0]
    text = f"{first.used:,} of {first.most:,} connections are in use"
    return [Finding("connections", "ok", text, facts=first._asdict())]


def notify(row: NotifyQueue, limits: Limits) -> list[Finding]:
    """Report that notifications pile up: when their queue is full, enqueues fail."""
    text = f"the server's queue of notifications is filled to {row.usage:.1%}"
    facts = row._asdict()
    if row.usage < limits.notify:
        return [Finding("notify", "ok", text, facts=facts)]
    remedy = (
        "end the oldest transaction of a session that listens, in any database of the server"
        + (
            ": select pid, datname, usename, application_name from pg_stat_activity "
            "where state like 'idle in transaction%' order by xact_start"
            if row.idle_pid is None
            else f"; the longest idle one: select pg_terminate_backend({row.idle_pid})"
        )
    )
    return [
        Finding(
            "notify",
            "bad" if row.usage >= limits.notify_bad else "warn",
            f"{text}: a session listens in a transaction that does not end; once the queue is "
            "full, every enqueue that notifies fails",
            remedy,
            facts,
        )
    ]


def rights(row: Rights) -> list[Finding]:
    """Report that other roles' queries are hidden from this role."""
    if not row.hidden:
        return [
            Finding("rights", "ok", "the queries of all sessions can be seen", facts=row._asdict())
        ]
    return [
        Finding(
            "rights",
            "note",
            f"role {row.role} does not see what {count(row.hidden, 'session')} of other roles "
            "run, and since when",
            f"as a superuser: grant pg_read_all_stats to {identifier(row.role)}",
            row._asdict(),
        )
    ]
