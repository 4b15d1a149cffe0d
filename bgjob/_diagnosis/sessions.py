"""Rows to findings: who holds the vacuum horizon, and who waits for whose lock."""

import re
from collections.abc import Sequence

from bgjob._sql.server import Holder, TableLock, Wait
from bgjob._words import count, identifier, lasting, literal, one_line
from bgjob.doctor import Finding, Limits

_HANDLER = re.compile(r"bgjob -?\d+ [0-9a-f]{16}")
"""The name of a session while it runs a transactional handler."""

_SECRET = "<insufficient privilege>"  # noqa: S105 (the server's text for a hidden query)


def horizon(holders: Sequence[Holder], dead: int, limits: Limits) -> list[Finding]:
    """Report each holder of the horizon that is too old.

    A young transaction is not to blame for the old one that its snapshot begins with: that one
    is in the list as well.

    Args:
        holders: all, the oldest first.
        dead: the dead rows of bgjob's tables.
        limits: how old is too old.

    """
    found = [_held(holder, dead, limits) for holder in holders if _is_old(holder, limits)]
    if found:
        return found
    text = (
        f"nothing keeps dead rows for over {lasting(limits.horizon_seconds)} or "
        f"{limits.horizon_transactions:,} transactions"
    )
    return [Finding("horizon", "ok", text)]


def _is_old(holder: Holder, limits: Limits) -> bool:
    if (holder.seconds or 0) > limits.horizon_seconds:
        return True
    return holder.transactions > limits.horizon_transactions and not holder.follows


def _held(holder: Holder, dead: int, limits: Limits) -> Finding:
    who = _who(holder.role, holder.application, holder.address, holder.state)
    if holder.database:
        who = f" of database {holder.database}{who}"
    span = f"keeps dead rows of the last {count(holder.transactions, 'transaction')}"
    if holder.seconds is not None:
        span += f", for {lasting(holder.seconds)}"
    match holder.kind:
        case "session":
            what = f"session {holder.name}{who}"
            if _HANDLER.fullmatch(holder.application or ""):
                what += ", a transactional handler of a worker,"
            remedy = _terminate(int(holder.name), holder.role, may_end=holder.may_end)
        case "prepared":
            what = f"prepared transaction {holder.name}{who}"
            remedy = f"rollback prepared {literal(holder.name)}{_only(holder)}"
            if holder.database:
                remedy = f"in database {holder.database}: {remedy}"
        case "slot":
            what = f"replication slot {holder.name}{who}"
            remedy = (
                _ON_STANDBY
                if holder.state == "active"
                else f"if its standby will not return: select pg_drop_replication_slot("
                f"{literal(holder.name)})"
            )
        case _:
            what = f"standby {holder.name}{who}"
            remedy = _ON_STANDBY
    if holder.query and holder.query != _SECRET:
        span += f": {one_line(holder.query)}"
    if dead > limits.horizon_dead_rows:
        span += f"; bgjob's tables have {dead:,} dead rows"
    return Finding(
        "horizon",
        "bad" if dead > limits.horizon_dead_rows else "warn",
        f"{what} {span}",
        remedy,
        holder._asdict() | {"dead_rows": dead},
    )


_ON_STANDBY = (
    "on that standby, end the oldest query: select pid, query from pg_stat_activity "
    "where backend_xmin is not null order by xact_start; or there: "
    "alter system set hot_standby_feedback = off; select pg_reload_conf()"
)


def locks(waits: Sequence[Wait], held: Sequence[TableLock], limits: Limits) -> list[Finding]:
    """Report sessions that wait for a lock, with who has it, and locks of whole tables."""
    found = []
    blamed: set[int | None] = set()
    for wait in waits:
        if wait.seconds > limits.lock_seconds:
            blamed.add(wait.blocker_pid)
            found.append(_waits(wait))
    for lock in held:
        if lock.pid in blamed and lock.pid is not None:
            continue
        # If its age is hidden, it may be one of a moment; if not, a wait shows it.
        if lock.seconds is not None and lock.seconds > limits.lock_seconds:
            found.append(_locks(lock))
    if found:
        return found
    text = f"nobody has waited for a lock for over {lasting(limits.lock_seconds)}"
    return [Finding("locks", "ok", text)]


def _waits(wait: Wait) -> Finding:
    text = (
        f"session {wait.pid}{_who(wait.role, wait.application)}, which uses {wait.relation}, "
        f"waits for a lock for {lasting(wait.seconds)}"
    )
    if wait.blocker_pid is not None:
        blocker = _who(wait.blocker_role, wait.blocker_application, wait.blocker_state)
        text += f"; session {wait.blocker_pid}{blocker} has it"
        remedy = _terminate(wait.blocker_pid, wait.blocker_role, may_end=wait.blocker_may_end)
    elif wait.prepared:
        text += f"; a prepared transaction has it: {', '.join(wait.prepared)}"
        remedy = "; ".join(f"rollback prepared {literal(gid)}" for gid in wait.prepared)
    else:
        text += "; a prepared transaction, or a session that has just ended, has it"
        remedy = "select gid, prepared from pg_prepared_xacts; then: rollback prepared 'GID'"
    return Finding("locks", "bad", text, remedy, wait._asdict())


def _locks(lock: TableLock) -> Finding:
    who = _who(lock.role, lock.application, lock.state)
    since = "" if lock.seconds is None else f", for {lasting(lock.seconds)}"
    if lock.pid is None:
        what = f"prepared transaction {lock.prepared}{who}"
        remedy = f"rollback prepared {literal(lock.prepared or '')}"
    else:
        what = f"session {lock.pid}{who}"
        remedy = _terminate(lock.pid, lock.role, may_end=lock.may_end)
    return Finding(
        "locks",
        "bad",
        f"{what} has {lock.mode} on {lock.relation}{since}: workers cannot use the table",
        remedy,
        lock._asdict(),
    )


def _who(*parts: str | None) -> str:
    text = ", ".join(one_line(part) for part in parts if part)
    return f" ({text})" if text else ""


def _terminate(pid: int, role: str | None, *, may_end: bool | None) -> str:
    statement = f"select pg_terminate_backend({pid})"
    if may_end is False:
        owner = "a superuser" if role is None else f"{identifier(role)} or a superuser"
        statement += f"  -- as {owner}"
    return statement


def _only(holder: Holder) -> str:
    if holder.may_end is not False:
        return ""
    return f"  -- as {identifier(holder.role or '')} or a superuser"
