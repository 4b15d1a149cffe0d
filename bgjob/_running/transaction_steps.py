"""The steps of a transactional job: run its handler, settle it, and commit.

The handler receives a connection with an open transaction, and its result is stored in that
transaction: both commit, or neither does. A retry and an exception roll it back, and are stored
afterwards like any other handler's. Without a connection the handler is not entered, and no
attempt has begun.

The steps are taken by `transaction`, on a session of the worker's, and by `testing`, on the
caller's own connection.
"""

from collections.abc import Callable, Generator, Sequence
from enum import Enum, auto
from typing import Any, NamedTuple, TypeAlias

from bgjob._engine.outcome import Committed, CommitUnknown, Fenced
from bgjob._handlers.route import Route, has_bad_value
from bgjob._running.ending import Ending
from bgjob._sql.settlements import Claimed, Settlements
from bgjob._sql.statement import Statement
from bgjob.result import Complete, MoveToDlq, Reschedule, Result

_KEEPS = (Complete, Reschedule, MoveToDlq)


class Call:
    """A step that runs the handler; the answer is its return value."""


class Settle(NamedTuple):
    """A step that settles jobs; the answer is a Settled, or None if the transaction is over."""

    statements: list[Statement[list[str]]]


class Finish(NamedTuple):
    """A step that completes jobs and commits, in one round trip.

    The answer is False if a job is not held, or was replaced, or the transaction is not the one
    that was opened for them, or the statement failed: nothing was changed, and a Settle tells
    which.
    """

    claims: Sequence[Claimed]
    reserve: Callable[[], Claimed | None] | None = None
    """Returns the job whose transaction is to begin in the same message, if any."""


class Settled(NamedTuple):
    """The transaction has settled its jobs, as far as they were still held."""

    token: str | None
    """The claim that the transaction was opened for; another one is the handler's own."""
    ids: list[str]
    """The ids of those that were held."""


class End(Enum):
    """A step that ends the transaction.

    A rollback answers the token of a committed claim, "" if there is none, or None if the session
    cannot tell any more.
    """

    COMMIT = auto()
    ROLLBACK = auto()


TransactionStep: TypeAlias = Call | Finish | Settle | End


def settle(
    ended: Sequence[tuple[Claimed, Result]], *, keeps: bool
) -> Generator[Settle, Settled | None, Settled | None]:
    """Settle jobs of one claim, as far as they are held; the answer is that of a Settle.

    Those that the usual statements have passed over are lost, or were replaced while they ran.
    """
    job, token, _ = ended[0][0]
    ids: list[str] = []
    for follows in (False, True):
        settlements = Settlements(kept=(job.type,) if keeps else (), follows=follows)
        for claimed, result in ended:
            if claimed.job.id not in ids:
                settlements.store(claimed, result)
        settled = yield Settle(settlements.settlements(job.queue))
        if settled is None or settled.token != str(token):
            return settled
        ids += settled.ids
        if len(ids) == len(ended):
            break
    return Settled(str(token), ids)


def in_transaction(
    route: Route, claimed: Claimed, reserve: Callable[[], Claimed | None] | None = None
) -> Generator[TransactionStep, Any, Ending]:
    """Run a handler in a transaction that has begun, and settle its job; see Finish."""
    __tracebackhide__ = True
    job, token = claimed.job, str(claimed.token)
    try:
        returned = yield Call()
        result = route.judge(job, returned)
        commits = returned is None or isinstance(returned, _KEEPS)
        commits = commits and not has_bad_value(returned, result)
    except BaseException as error:
        result, commits = route.failed(job, error), False
    is_usual = isinstance(result, Complete) and not route.policy.keep and job.keep is None
    if commits and is_usual:
        try:
            if (yield Finish([claimed], reserve)):
                return Committed(result)
        except BaseException as error:
            return CommitUnknown(result, route.failed(job, error))
    if commits:
        try:
            settled = yield from settle([(claimed, result)], keeps=route.policy.keep)
            if settled is None or settled.token != token:
                result, commits = MoveToDlq(route.transaction_ended()), False
            elif not settled.ids:
                yield End.ROLLBACK
                return Fenced()
        except BaseException as error:
            result, commits = route.failed(job, error), False
    if not commits:
        committed = yield End.ROLLBACK
        # Another run would repeat the part that the handler itself committed.
        return MoveToDlq(route.transaction_ended()) if committed == token else result
    try:
        yield End.COMMIT
    except BaseException as error:
        return CommitUnknown(result, route.failed(job, error))
    return Committed(result)
