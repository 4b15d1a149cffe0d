"""The transaction of a handler: how it begins and ends, and the session that it runs in."""

from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from typing import LiteralString

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

_SAVEPOINT = "savepoint bgjob_settling"

ROLLBACK_TO_SAVEPOINT = b"rollback to savepoint bgjob_settling"
"""Leaves the transaction as it was before `complete_and_commit`, which has failed."""

# For one job it is planned in nearly half of the time.
_COMPLETE_ONE: LiteralString = """
    with gone as (
        delete from bgjob_job
        where id = {ids} and token = {tokens} and successor is null
            and current_setting('bgjob.claim', true) = {claim}
        returning id
    )
    select case count(*) when {count} then 1
        else ('bgjob: this transaction does not hold its jobs: ' || count(*))::int end
    from gone
"""
_COMPLETE_MANY: LiteralString = _COMPLETE_ONE.replace(
    "id = {ids} and token = {tokens}",
    "id = any ({ids}::text[]) and token = any ({tokens}::bigint[])",
)

PREPARE = (
    "begin; prepare bgjob_complete (text, bigint) as "
    + _COMPLETE_ONE.format(ids="$1", tokens="$2", claim="$2::text", count=1)
    + "; prepare bgjob_prepared as "
    "select set_config('bgjob.prepared', string_agg(name, ','), false) "
    "from pg_prepared_statements; commit; "
).encode()
"""Prepares what `complete_and_commit` executes, before `begin`. To plan the deletion for each job
takes more time than to execute it (benchmarks/transactional.py). It is a transaction of its own:
after its snapshot a handler could not choose the isolation of its transaction any more."""

PREPARED = {b"bgjob_complete", b"bgjob_prepared"}
"""The names of these statements."""

LIST_PREPARED = b"; execute bgjob_prepared"
"""Returns the names of all prepared statements of the session, after RESET, and stores them."""

SHOW_PREPARED = b"; show bgjob.prepared"
"""Returns the names that LIST_PREPARED has stored. It takes no snapshot; see PREPARE."""

# The plan is kept while the table grows; see Statement.prepare. Deferred triggers, which run at the
# commit, are planned with the default.
_EXECUTE = (
    "set local enable_seqscan = off; execute bgjob_complete ({ids}, {tokens}); "
    "set local enable_seqscan = on"
)


def complete_and_commit(
    claims: Sequence[Claimed], quote: Callable[[bytes], bytes], codec: str, *, is_prepared: bool
) -> bytes:
    """Return statements that delete completed jobs, and commit, as one string.

    It is one message: the server executes nothing until all of it has arrived. The deletion fails
    unless all jobs are held, none was replaced, and the transaction is the one that was opened for
    the first. So the commit is not executed, and the transaction can go on from
    ROLLBACK_TO_SAVEPOINT, to find out why.

    Args:
        claims: the claims.
        quote: returns a text as a literal.
        codec: Python's name of the client's encoding.
        is_prepared: whether the session has the statements of PREPARE.

    """
    first, count = claims[0], len(claims)
    found: Mapping[str, object]
    if count > 1:
        text, found = _COMPLETE_MANY, held(claims)
    else:
        text = _EXECUTE if is_prepared else _COMPLETE_ONE
        found = {"ids": first.job.id, "tokens": first.token}
    parts = {name: quote(str(part).encode(codec)).decode(codec) for name, part in found.items()}
    text = text.format(**parts, claim=f"'{first.token:d}'", count=count)
    return f"{_SAVEPOINT}; {text}; commit".encode(codec)
