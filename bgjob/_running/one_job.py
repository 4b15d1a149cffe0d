"""One job outside a worker: claimed, given its key, run and settled.

`Client.do` and `bgjob.testing.drain` run jobs one after the other, for their caller. The steps
are the same for all four colours of them: `hold` claims, the handler runs, `settle` stores how
it ended. Nothing extends the lease. A step is a list of statements, whose answers it receives,
or a Run. Whether statements are sent in a transaction, and where a handler runs, is the
caller's part.
"""

from collections import deque
from collections.abc import Awaitable, Callable, Collection, Coroutine, Generator, Sequence
from contextlib import closing
from contextvars import copy_context
from dataclasses import replace
from functools import partial
from time import monotonic, time
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast

import orjson

from bgjob._engine.outcome import Committed, CommitUnknown, Fenced
from bgjob._engine.protocol import Exchange
from bgjob._engine.reply import Reply
from bgjob._handlers.expiry import decided
from bgjob._handlers.route import Awaiting, NeedsKey, Route
from bgjob._postgres.connection import ConnectionParameters
from bgjob._postgres.fork import ForkGuard, call_in_children
from bgjob._running.ending import Ending, NotBegun
from bgjob._running.transaction import Transactions
from bgjob._sql.claims import claim_any
from bgjob._sql.keys import blocked
from bgjob._sql.session import clock
from bgjob._sql.settlements import Claimed
from bgjob._sql.statement import Statement
from bgjob._sql.survey import survey
from bgjob._sql.tokens import Tokens
from bgjob.job import Job
from bgjob.mux import Mux
from bgjob.result import Complete, MoveToDlq, Reschedule, Result, Retry

T = TypeVar("T")

_TOKENS = Tokens()
"""Of all single jobs of this process, by its own clock."""
call_in_children(_TOKENS.renew)

_MOST_KEYS = 1_000_000
"""The most exclusive keys to check when no job is due."""


class Run(NamedTuple):
    """A step that runs the handler of a claimed job; the answer is how that ended."""

    claimed: Claimed
    route: Route | Retry | Reschedule | MoveToDlq
    """Its route; or the result of a job that must not run, which is the answer."""
    ends_at: float
    """When its lease ends, by this process's clock."""
    lease: float
    """Seconds."""
    severed: deque[Claimed]
    """Gets its claim if the connection of its transaction is lost: the session may go on."""


Step: TypeAlias = Sequence[Statement[Any]] | Run
Steps: TypeAlias = Generator[Step, Any, T]


class Ended(NamedTuple):
    """A job that is over."""

    job: Job
    stored: Result | NotBegun | None
    """None: the claim had been lost, and the result was dropped."""


def one_job(queue: str, mux: Mux, lease: float) -> Steps[Ended | None]:
    """Claim, run and settle one due job; None if none is due."""
    run = yield from hold(queue, mux, lease, claim_any, frees_keys=True)
    return None if run is None else (yield from settle(run, (yield run)))


def hold(
    queue: str,
    mux: Mux,
    lease: float,
    claim: Callable[..., Statement[list[Job]]],
    *,
    frees_keys: bool,
) -> Steps[Run | None]:
    """Claim the first due job that has no key or gets it; None if none is due.

    Args:
        queue: the queue.
        mux: the handlers; a job's type may define its key.
        lease: seconds.
        claim: makes the claim from the queue, the lease and a token.
        frees_keys: whether to search for jobs whose key is free, if no other job is due.
            Workers do so as they poll.

    """
    token = _TOKENS.make(time())
    statement = claim(queue, lease=lease, token=token)
    while True:
        jobs = yield from ask(statement)
        if not jobs:
            # As a worker's sweep.
            looks: list[Statement[Any]] = [survey(queue)]
            if frees_keys:
                looks.append(blocked(queue, after="", limit=_MOST_KEYS))
            lines, *free = yield looks
            groups = [group for line in lines for group in line.over]
            keys = free[0].keys if free else []
            if groups or keys:
                yield from _exchange(queue, Exchange(groups=groups, release=keys))
                jobs = yield from ask(statement)
        if not jobs:
            return None
        [job] = jobs
        # In a context of its own, which the type's callable may change.
        now = 0.0
        is_unknown = mux.unknown_for is not None and mux.route_of(job.type) is None
        if job.expires is not None or is_unknown:
            now = (yield from ask(clock())).timestamp()
        run = copy_context().run(_routed, Claimed(job, token), mux, now, lease)
        if run.claimed.job.exclusive is not None:
            exchange = Exchange(acquire=[run.claimed], slots=mux.slots)
            reply = yield from _exchange(queue, exchange)
            slots = reply.acquired.get((job.id, token), 0)
            if slots is None:  # undecided
                yield from _exchange(queue, Exchange(release_jobs=[run.claimed]))
            if not slots:
                continue  # it waits for its key: claim another
            if slots > 1:  # others may have the rest
                yield from _exchange(queue, Exchange(release=[str(run.claimed.job.exclusive)]))
        return run


def _routed(claimed: Claimed, mux: Mux, now: float, lease: float) -> Run:
    ends_at = monotonic() + lease
    route = decided(mux.route(claimed.job), now)
    if isinstance(route, NeedsKey):
        claimed = claimed._replace(job=claimed.job._replace(exclusive=route.key))
        route = decided(mux.route(claimed.job), now)
    assert not isinstance(route, NeedsKey)  # noqa: S101 (the job has its key)
    return Run(claimed, route, ends_at, lease, deque())


def settle(run: Run, ending: Ending) -> Steps[Ended]:
    """Store how a job ended, release its key, and end its group if it was the last of that."""
    ended = yield from _stored(run, ending)
    group = run.claimed.job.group
    if group is not None and group != ended.job.id:
        yield from _exchange(ended.job.queue, Exchange(groups=[group]))
    return ended


def _stored(run: Run, ending: Ending) -> Steps[Ended]:
    job = run.claimed.job
    exchange = conclusion(run.claimed, ending, _kept(run))
    reply = yield from _exchange(job.queue, exchange)
    ends = exchange.complete or exchange.returned or exchange.postpone or exchange.dead_letter
    if ends and job.id not in reply.settled:  # it is lost, or was replaced while it ran
        reply = yield from _exchange(job.queue, replace(exchange, follows=True))
    is_held = job.id in reply.settled
    if run.severed and is_held:  # it cannot commit any more
        yield from _exchange(job.queue, Exchange(end=run.severed))
    match ending:
        case Committed(result):
            return _ended(job, result)
        case NotBegun():
            return Ended(job, ending)
        case CommitUnknown(result) if not is_held and monotonic() < run.ends_at:
            return _ended(job, result)  # only the commit can have removed the job
        case CommitUnknown(_, otherwise):
            return Ended(job, otherwise if is_held else None)
        case Fenced():
            return Ended(job, None)
        case result:
            return _ended(job, result if is_held else None)


def _ended(job: Job, result: Result | None) -> Ended:
    if job.keep is not None and isinstance(result, Complete) and result.value is not None:
        result = Complete(orjson.loads(result.value))  # as the handler gave it
    return Ended(job, result)


def conclusion(claimed: Claimed, ending: Ending, kept: Collection[str] = ()) -> Exchange:
    """Return the exchange that settles a job and releases its key.

    A job that its own transaction settled needs only the release. That transaction does not
    release the key: it would keep it locked until it ends, and may not see other sessions'
    commits since it began.
    """
    exchange = Exchange(kept=kept)
    match ending:
        case Fenced():
            return exchange
        case Committed():
            pass
        case NotBegun():
            exchange.release_jobs.append(claimed)
        case CommitUnknown(_, otherwise):
            exchange.store(claimed, otherwise)
        case result:
            exchange.store(claimed, result)
    if claimed.job.exclusive is not None:
        exchange.release.append(claimed.job.exclusive)
    return exchange


def _kept(run: Run) -> Collection[str]:
    is_kept = isinstance(run.route, Route) and run.route.policy.keep
    return (run.claimed.job.type,) if is_kept else ()


def ask(statement: Statement[T]) -> Steps[T]:
    """Return the answer to a statement."""
    [answer] = yield [statement]
    return cast("T", answer)


def _exchange(queue: str, exchange: Exchange) -> Steps[Reply]:
    plan = exchange.statements(queue, 0.0)
    answers = yield [statement for statement, _ in plan]
    reply = Reply()
    for (_, store), answer in zip(plan, answers, strict=True):
        store(reply, answer)
    return reply


# -- running a handler ----------------------------------------------------------------


def run_on_thread(
    run: Run,
    connection_parameters: Callable[[], ConnectionParameters],
    wait: Callable[[Coroutine[Any, Any, Ending]], Ending],
) -> Ending:
    """Run a plain handler on this thread, and a coroutine one by `wait`."""
    ran = _begin(run, connection_parameters)
    if isinstance(ran, Awaiting):
        return wait(_await(ran.route, run, connection_parameters))
    return ran


async def run_in_task(
    run: Run,
    connection_parameters: Callable[[], ConnectionParameters],
    on_thread: "Callable[[Callable[[], Ending | Awaiting]], Awaitable[Ending | Awaiting]]",
) -> Ending:
    """Run a coroutine handler in this task, and a plain one by `on_thread`."""
    begin = partial(_begin, run, connection_parameters)
    is_plain = isinstance(run.route, Route) and not run.route.is_coroutine
    ran = await on_thread(begin) if is_plain else begin()
    if isinstance(ran, Awaiting):
        return await _await(ran.route, run, connection_parameters)
    return ran


def _begin(
    run: Run, connection_parameters: Callable[[], ConnectionParameters]
) -> Ending | Awaiting:
    """Run a handler as far as it need not be awaited."""
    claimed, route, _, lease, _ = run
    if not isinstance(route, Route):
        return route
    if route.is_coroutine:
        return Awaiting(route)
    if not route.needs_session:
        return route.run(claimed.job)
    with closing(_transactions(run, connection_parameters())) as transactions:
        if route.is_transactional:
            return transactions.run(route, claimed)
        from bgjob._running.checkpoints import SessionStore  # noqa: PLC0415 (few jobs have one)

        store = SessionStore(transactions, claimed, lease=lease)
        return store.load() or route.holding(store).run(claimed.job)


def _transactions(run: Run, connection_parameters: ConnectionParameters) -> Transactions:
    transactions = Transactions(connection_parameters, ForkGuard())
    transactions.severed = run.severed
    return transactions


async def _await(
    route: Route, run: Run, connection_parameters: Callable[[], ConnectionParameters]
) -> Ending:
    claimed = run.claimed
    if not route.needs_session:
        return await _awaited(route, claimed)
    with closing(_transactions(run, connection_parameters())) as transactions:
        if route.is_transactional:
            return await transactions.run_async(route, claimed)
        from bgjob._running.checkpoints import AsyncSessionStore  # noqa: PLC0415 (few jobs have one)

        store = AsyncSessionStore(transactions, claimed, lease=run.lease)
        return await store.load() or await _awaited(route.holding(store), claimed)


async def _awaited(route: Route, claimed: Claimed) -> Ending:
    try:
        return route.judge(claimed.job, await route.awaited(claimed.job))
    except BaseException as error:
        return route.failed(claimed.job, error)
