"""One call of a batch handler: what became of each of its jobs.

A call that raises is repeated in halves, so that the job that makes it fail ends up alone: among n
jobs after 2 * log2(n) + 1 calls at most. That one fails as a single job would; the other calls are
not charged an attempt, because the claim was charged once.

All effects and all settlements of a transactional call are one commit. If a job is not held any
more, or is to be retried, the transaction is rolled back, and the others run again without it.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from bgjob._engine.outcome import Committed, CommitUnknown, Fenced
from bgjob._handlers.batch import Answer, BatchRoute
from bgjob._handlers.route import COMPLETE
from bgjob._running.transaction_steps import Call, End, Finish, TransactionStep, settle
from bgjob._sql.settlements import Claimed
from bgjob.result import Complete, MoveToDlq, Result

COMMITTED = Committed(COMPLETE)
"""How nearly all jobs of transactional handlers end."""

BatchEnding: TypeAlias = Result | Committed | CommitUnknown | Fenced
"""How a job of a call ended: settled already, or a result to store."""


@dataclass(slots=True)
class Called:
    """What became of a call's jobs."""

    endings: list[tuple[Claimed, BatchEnding]] = field(default_factory=list)
    """Of those that have ended."""
    again: list[list[Claimed]] = field(default_factory=list)
    """The others, in the calls that are to follow."""
    strangers: list[object] = field(default_factory=list)
    """Ids that the handler answered for, and that are not of its jobs."""
    error: BaseException | None = None
    """What a call with several jobs raised."""


def halves(claims: Sequence[Claimed]) -> list[list[Claimed]]:
    """Return the two parts of a call that failed."""
    middle = (len(claims) + 1) // 2
    return [[*claims[:middle]], [*claims[middle:]]]


def failed(route: BatchRoute, claims: Sequence[Claimed], error: BaseException) -> Called:
    """Return what follows from a call that raised: halves, or the failure of its only job."""
    if len(claims) > 1:
        return Called(again=halves(claims), error=error)
    return Called([(claimed, route.failed(claimed.job, error)) for claimed in claims])


def answered(route: BatchRoute, claims: Sequence[Claimed], returned: object) -> Called:
    """Return what follows from a call that returned, without a transaction."""
    answer = route.answer([claimed.job for claimed in claims], returned)
    return Called(_endings(claims, answer), strangers=answer.strangers)


def batch_in_transaction(
    route: BatchRoute, claims: Sequence[Claimed]
) -> Generator[TransactionStep, Any, Called]:
    """Run a batch handler in a transaction that has begun, and settle its jobs."""
    __tracebackhide__ = True
    token = str(claims[0].token)
    error: BaseException | None = None
    answer = Answer({})
    try:
        returned = yield Call()
        answer = route.answer([claimed.job for claimed in claims], returned)
    except BaseException as raised:
        error = raised
    if error is None and not answer.undone:
        completes_all = {*map(type, answer.results.values())} == {Complete}
        keeps = route.policy.keep or any(claimed.job.keep is not None for claimed in claims)
        if completes_all and not keeps:
            try:
                if (yield Finish(claims)):
                    return _committed(claims, answer)
            except BaseException as raised:
                return (yield from _not_committed(route, claims, answer, raised))
        try:
            settled = yield from settle(_each(claims, answer), keeps=route.policy.keep)
            if settled is None or settled.token != token:
                yield End.ROLLBACK
                return _ended_by_handler(route, claims)
            if len(settled.ids) == len(claims):
                try:
                    yield End.COMMIT
                except BaseException as raised:
                    return (yield from _not_committed(route, claims, answer, raised))
                return _committed(claims, answer)
            held = set(settled.ids)
            lost = [claimed for claimed in claims if claimed.job.id not in held]
            yield End.ROLLBACK
            rest = [claimed for claimed in claims if claimed.job.id in held]
            return Called([(claimed, Fenced()) for claimed in lost], again=[rest] if rest else [])
        except BaseException as raised:
            error = raised
    committed = yield End.ROLLBACK
    if committed == token:
        return _ended_by_handler(route, claims)  # another run would repeat what it committed
    if error is not None:
        return failed(route, claims, error)
    undone = [claimed for claimed in claims if claimed.job.id in answer.undone]
    rest = [claimed for claimed in claims if claimed.job.id not in answer.undone]
    return Called(_endings(undone, answer), [rest] if rest else [], answer.strangers)


def _each(claims: Sequence[Claimed], answer: Answer) -> list[tuple[Claimed, Any]]:
    return [(claimed, answer.results[claimed.job.id]) for claimed in claims]


def _endings(claims: Sequence[Claimed], answer: Answer) -> list[tuple[Claimed, BatchEnding]]:
    return [*_each(claims, answer)]


def _committed(claims: Sequence[Claimed], answer: Answer) -> Called:
    return Called(
        [
            (claimed, COMMITTED if result is COMPLETE else Committed(result))
            for claimed, result in zip(claims, answer.results.values(), strict=True)
        ],
        strangers=answer.strangers,
    )


def _not_committed(
    route: BatchRoute, claims: Sequence[Claimed], answer: Answer, error: BaseException
) -> Generator[TransactionStep, Any, Called]:
    if (yield End.ROLLBACK) == "":
        # The server's refusal, for example by a deferred constraint, is certain.
        return failed(route, claims, error)
    endings: list[tuple[Claimed, BatchEnding]] = [
        (claimed, CommitUnknown(result, route.failed(claimed.job, error)))
        for claimed, result in _each(claims, answer)
    ]
    return Called(endings, strangers=answer.strangers)


def _ended_by_handler(route: BatchRoute, claims: Sequence[Claimed]) -> Called:
    error = route.transaction_ended()
    return Called([(claimed, MoveToDlq(error)) for claimed in claims])
