"""The transaction of a handler: how it begins and ends, and the session that it runs in."""

from collections.abc import Sequence
from hashlib import sha256
from typing import LiteralString

from bgjob._postgres.commands import Command
from bgjob._sql.session import IS_OURS
from bgjob._sql.settlements import Claimed, held
from bgjob._sql.statement import Statement, column, nothing, number_array, scalar, text_array


def payload(claimed: Claimed) -> Statement[list[bytes | None]]:
    """Return the payload of a job in a list, which is empty if the job is no longer held."""
    return Statement(
        "select arg from bgjob_job where id = %(id)s and token = %(token)s",
        {"id": claimed.job.id, "token": claimed.token},
        column,
    )


def checkpoint(claimed: Claimed) -> Statement[list[bytes | None]]:
    """Return the checkpoint of a job in a list, which is empty if the job is no longer held."""
    return Statement(
        "select checkpoint from bgjob_job where id = %(id)s and token = %(token)s",
        {"id": claimed.job.id, "token": claimed.token},
        column,
    )


def save_checkpoint(claimed: Claimed, data: bytes | None, *, lease: float) -> Statement[list[str]]:
    """Store a checkpoint and extend the lease; return the job's id, if it is still held.

    No index covers what it changes, so the update is heap-only. The worker's own extensions
    write the same lease: whichever comes last is the longer.

    Args:
        claimed: the claim.
        data: what to store; None leaves it as it is.
        lease: seconds.

    """
    set_it: LiteralString = "" if data is None else "checkpoint = %(data)b,"
    return Statement(
        f"""
        update bgjob_job
        set {set_it} lease_until = clock_timestamp() + %(lease)s * interval '1 second'
        where id = %(id)s and token = %(token)s
        returning id
        """,
        {"id": claimed.job.id, "token": claimed.token, "lease": lease, "data": data},
        column,
    )


def session_name(claimed: Claimed, codec: str = "utf-8") -> str:
    """Return the name of a transactional handler's session while it holds this claim.

    It is unique over all workers of a schema. Those of two schemas could both claim a job of
    the same id in the same millisecond, each as the worker of the same number: if one of the
    two leases ends, both transactions are rolled back, and run again. It is ASCII, as
    `application_name` has to be. SQL computes it as SESSION_NAME.

    Args:
        claimed: the claim.
        codec: Python's name of the server's encoding. Both digest the stored bytes, because
            the server may store ids that it cannot convert.

    """
    stored = claimed.job.id.encode(codec, "backslashreplace")
    return f"bgjob {claimed.token:d} {sha256(stored).hexdigest()[:16]}"


SESSION_NAME: LiteralString = """
    format(
        'bgjob %%s %%s', {0},
        left(encode(sha256(convert_to({1}, getdatabaseencoding())), 'hex'), 16)
    )
"""
"""The name of the session that holds the claim of a token (0) and an id (1); see `session_name`."""

# An unused connection whose other end has vanished would keep its locks for two hours.
_KEEPALIVE = (
    "; set local tcp_keepalives_idle = 30; set local tcp_keepalives_interval = 10; "
    "set local tcp_keepalives_count = 3"
)


# This limit ends an active transaction as well; since version 17.
_NO_LIMIT = "; set local transaction_timeout = 0"
_LIMITED_SINCE = 17_00_00


def begin(claimed: Claimed, *, over_tcp: bool, server_version: int, codec: str = "utf-8") -> bytes:
    """Open a handler's transaction, and mark it with its claim.

    One mark (bgjob.claim) lasts until the transaction ends. The other (bgjob.committed) is
    undone by a rollback and survives a commit. The lease limits how long the handler may take
    and be idle: the worker that frees the claim ends the session, which it knows by its name.
    Read committed, whatever the default is, because an extension of the lease must not make
    the settlement fail.
    """
    return (
        "begin isolation level read committed; "
        f"set local bgjob.claim = '{claimed.token:d}'; "
        f"set bgjob.committed = '{claimed.token:d}'; "
        f"set local application_name = '{session_name(claimed, codec)}'; "
        f"set local idle_in_transaction_session_timeout = 0{_KEEPALIVE if over_tcp else ''}"
        f"{_NO_LIMIT if server_version >= _LIMITED_SINCE else ''}"
    ).encode()


_IDLE: LiteralString = "10000"
"""Milliseconds that a transaction may last whose handler has ended."""


def claim_of_transaction() -> Statement[str | None]:
    """Return the token of the claim that this transaction was opened for.

    The next statement locks the job's row, which a sweep then skips: a worker that is stopped
    now must not keep the transaction open.
    """
    return Statement(
        "select current_setting('bgjob.claim', true), "
        f"set_config('idle_in_transaction_session_timeout', '{_IDLE}', true)",
        None,
        scalar,
        prepare=None,
    )


def end_sessions(claims: Sequence[Claimed]) -> Statement[None]:
    """End the sessions of handlers whose claims were freed or given up, with their locks.

    Sessions of other roles are left alone.
    """
    return Statement(
        f"""
        select pg_terminate_backend(a.pid) from pg_stat_activity a
        where {IS_OURS} and a.application_name = any (array(
            select {SESSION_NAME.format("c.token", "c.id")}
            from unnest(%(ids)s::text[], %(tokens)s::bigint[]) as c (id, token)
        ))
        """,
        {
            "ids": text_array([claimed.job.id for claimed in claims]),
            "tokens": number_array([claimed.token for claimed in claims]),
        },
        nothing,
        prepare=False,
    )


COMMIT = b"commit"

RESET = (
    b"close all; set session authorization default; reset all; unlisten *; "
    b"select pg_advisory_unlock_all(); discard temp; discard sequences"
)
"""Resets the session that the handler used, after its transaction: everything that `discard all`
resets, except for prepared statements."""

DEALLOCATE = b"; deallocate all"
"""Drops the prepared statements too, after RESET."""

ROLLBACK = b"rollback; select current_setting('bgjob.committed', true)"
"""Rolls back; the second result is the token of a claim whose transaction had committed."""

_SAVEPOINT = b"savepoint bgjob_settling"

ROLLBACK_TO_SAVEPOINT = b"rollback to savepoint bgjob_settling"
"""Leaves the transaction as it was before `complete_and_commit`, which has failed."""

# For one job it is planned in nearly half of the time. That is done for each transaction: a handler
# may leave a session without its prepared statements.
_COMPLETE: LiteralString = """
    with gone as (
        delete from bgjob_job
        where id = {ids} and token = {tokens} and successor is null
            and current_setting('bgjob.claim', true) = $3
        returning id
    )
    select case count(*) when $4 then 1
        else ('bgjob: this transaction does not hold its jobs: ' || count(*))::int end
    from gone
"""
_COMPLETE_ONE = _COMPLETE.format(ids="$1", tokens="$2").encode()
_COMPLETE_MANY = _COMPLETE.format(ids="any ($1::text[])", tokens="any ($2::bigint[])").encode()


def complete_and_commit(
    claims: Sequence[Claimed], *, over_tcp: bool, server_version: int, codec: str
) -> list[Command]:
    """Return commands that delete completed jobs, and commit; they are sent together.

    The deletion fails unless all jobs are held, none was replaced, and the transaction is the one
    that was opened for the first. So the commit is not executed, and the transaction can go on from
    ROLLBACK_TO_SAVEPOINT, to find out why.

    Args:
        claims: the claims.
        over_tcp: whether a part of the commands may arrive alone, as that of many jobs may anyway.
            Then the server ends the transaction after a while; before version 17 only with the
            connection.
        server_version: as of `psycopg.ConnectionInfo`.
        codec: Python's name of the client's encoding.

    """
    first, count = claims[0], len(claims)
    token, is_one = b"%d" % first.token, count == 1
    if is_one:
        found = [first.job.id.encode(codec), token]
    else:
        found = [str(part).encode(codec) for part in held(claims).values()]
    is_limited = (over_tcp or not is_one) and server_version >= _LIMITED_SINCE
    return [
        Command(_SAVEPOINT),
        *([Command(f"set local transaction_timeout = {_IDLE}".encode())] if is_limited else ()),
        Command(_COMPLETE_ONE if is_one else _COMPLETE_MANY, [*found, token, b"%d" % count]),
        Command(COMMIT),
    ]
