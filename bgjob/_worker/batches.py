"""Batches: jobs of one type that a slot runs in one call of their handler.

The control thread gathers claimed jobs by type. When there are as many as a call may have, or
one of them has waited for `batch_wait`, they become a Batch. That goes to the slots in the
place of a job, and poses there as the first of its jobs. A slot runs it: the call, and after one
that raised the halves, each with its outcomes as soon as it has ended.

What was tried: slots that take further jobs of the type out of the deque. Several slots took the
parts of one batch from each other, and one that waited for more jobs kept other types from running.
"""

import asyncio
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from math import inf
from time import monotonic
from typing import Any, Final, cast

from bgjob._engine.outcome import Outcome, Release
from bgjob._handlers.batch import BatchRoute, strangers_text
from bgjob._handlers.route import COMPLETE, Route
from bgjob._running.batch import COMMITTED, Called, answered, batch_in_transaction, failed
from bgjob._running.ending import NotBegun
from bgjob._sql.claims import ELSEWHERE
from bgjob._sql.settlements import Claimed
from bgjob._worker.batch import Batch
from bgjob._worker.failures import drop_locals, error_of
from bgjob._worker.slots import Slot, Slots, quick_outcome
from bgjob.errors import BgjobError, JobTimeoutError


class Told:
    """Returned for a batch: its jobs have their outcomes already."""


TOLD: Final = Told()


class Gathering:
    """The claimed jobs that wait for others of their type; for the control thread only.

    Args:
        routes: the batch handlers by job type.
        displaced: takes a job that this worker has claimed again before it started.

    """

    def __init__(
        self, routes: Mapping[str, BatchRoute], displaced: Callable[[Claimed], None]
    ) -> None:
        self._routes = routes
        self._displaced = displaced
        self._waiting: dict[str, dict[str, Claimed]] = {}  # by type and id, in claim order
        self._until: dict[str, float] = {}  # by type
        self._batches: list[Batch] = []
        self.most_wait = inf
        """The most seconds for which a job waits for others: with a limit it has to start soon."""
        self.has_flushed = False
        """Whether some have waited for long enough, since this was last reset."""

    @property
    def next_at(self) -> float:
        """When to call `due` next."""
        return min(self._until.values(), default=inf)

    @property
    def waiting(self) -> list[Claimed]:
        """The jobs that wait, in order."""
        return [claimed for jobs in self._waiting.values() for claimed in jobs.values()]

    def add(
        self, claims: Sequence[Claimed], suspects: Collection[int], now: float
    ) -> list[Claimed]:
        """Take the jobs of batch types; return the others, and full batches.

        A job with a large payload or a key is run like that of another type, and one that may have
        killed workers is a batch of its own.

        Args:
            claims: the jobs.
            suspects: the tokens of claims whose jobs may have killed workers.
            now: the time.

        """
        ready: list[Claimed] = []
        for claimed in claims:
            job = claimed.job
            route = self._routes.get(job.type)
            is_spent = route is None or job.attempt > route.policy.last_attempt
            is_alone = job.arg is ELSEWHERE or job.exclusive is not None
            if route is None or is_spent or is_alone:
                ready.append(claimed)
            elif claimed.token in suspects:
                ready.append(self._batch([claimed]))
            else:
                waiting = self._waiting.setdefault(job.type, {})
                if not waiting:
                    self._until[job.type] = now + min(route.policy.batch_wait, self.most_wait)
                if job.id in waiting:
                    self._displaced(waiting.pop(job.id))
                waiting[job.id] = claimed
                if len(waiting) == route.policy.batch:
                    ready.append(self._take(job.type))
        return ready + self.due(now)

    def due(self, now: float) -> list[Claimed]:
        """Return the batches whose jobs have waited for long enough."""
        due: list[Claimed] = [
            self._take(type_) for type_, until in [*self._until.items()] if until <= now
        ]
        self.has_flushed = self.has_flushed or bool(due)
        return due

    def withdraw(self) -> list[Claimed]:
        """Take back all jobs that wait."""
        jobs = self.waiting
        self._waiting.clear()
        self._until.clear()
        return jobs

    def rest_of(self, run: Batch, calls: list[list[Claimed]]) -> Batch:
        """Return what is left of a batch whose slot was given up."""
        run.left = 0
        rest = self._batch([claimed for call in calls for claimed in call])
        rest.calls, rest.is_rest, rest.gone = calls, True, run.gone
        return rest

    def _take(self, type_: str) -> Batch:
        del self._until[type_]
        return self._batch([*self._waiting.pop(type_).values()])

    def _batch(self, claims: list[Claimed]) -> Batch:
        self._batches = [batch for batch in self._batches if batch.left]
        self._batches.append(batch := Batch.of(claims))
        return batch

    @property
    def merged(self) -> int:
        """How many jobs run in the calls of others, and need no slot."""
        return sum(batch.left - 1 for batch in self._batches if batch.has_begun and batch.left)


class BatchCalls:
    """Runs batches in slots. Thread-safe.

    Args:
        slots: where outcomes go.

    """

    def __init__(self, slots: Slots) -> None:
        self._slots = slots

    # -- async -------------------------------------------------------------------------

    async def run_async(self, me: Slot, batch: Batch, is_ending: Callable[[], bool]) -> Told | None:
        """Run the calls of a batch; None if the slot was given up meanwhile.

        Args:
            me: the slot.
            batch: the batch.
            is_ending: whether the worker or its loop ends.

        """
        slots = self._slots
        route = slots.mux.batches[batch.job.type]
        self._drop_expired(batch)
        unexplained: BaseException | None = None
        for claims in self._calls(batch):
            run = None if route.policy.timeout is None else slots.timeouts.limit(route, batch)
            limited = route
            if run is not None:
                me.run = run
                limited = cast("BatchRoute", run.route)
            began = monotonic()
            called = await self._call_async(limited, claims, batch)
            if run is not None:
                if not slots.timeouts.ended(run):
                    return None
                me.run = None
            if isinstance(called, NotBegun):
                if not isinstance(called.error, asyncio.CancelledError):
                    slots.hindered(called.error)
                    await slots.transactions.rest_async()
                batch.calls.insert(0, claims)
                break
            error = _error_of(called)
            if slots.fork_guard.is_child:
                slots.fork_guard.end(error)
            if error is not None and await _was_cancelled_async(error, is_ending):
                batch.interrupted = batch.left
                batch.calls.insert(0, claims)
                break
            if called.error is not None:
                self._tell_timeout(called.error)
                unexplained = called.error
            elif error is not None:
                unexplained = None
                if isinstance(error, JobTimeoutError) and run is not None:
                    slots.timed_out(claims[0].job, run.timeout)
            self._ended(batch, route, claims, called, began)
        self._leave(batch, route, unexplained)
        return TOLD

    async def _call_async(
        self, route: BatchRoute, claims: list[Claimed], batch: Batch
    ) -> Called | NotBegun:
        jobs = [claimed.job for claimed in claims]
        started = self._started(batch, jobs)
        if route.is_transactional:
            steps = batch_in_transaction(route, claims)
            return await self._slots.transactions.run_steps_async(
                steps, route, claims[0], started, jobs
            )
        if started is not None:
            started(jobs[0])
        try:
            return answered(route, claims, await route.handler(jobs))
        except BaseException as error:
            return failed(route, claims, error)

    # -- sync: made from the async text by .ci/colours.py; do not edit -----------------

    def run(self, me: Slot, batch: Batch, is_ending: Callable[[], bool]) -> Told | None:
        """Run the calls of a batch; None if the slot was given up meanwhile.

        Args:
            me: the slot.
            batch: the batch.
            is_ending: whether the worker or its loop ends.

        """
        slots = self._slots
        route = slots.mux.batches[batch.job.type]
        self._drop_expired(batch)
        unexplained: BaseException | None = None
        for claims in self._calls(batch):
            run = None if route.policy.timeout is None else slots.timeouts.limit(route, batch)
            limited = route
            if run is not None:
                me.run = run
                limited = cast("BatchRoute", run.route)
            began = monotonic()
            called = self._call(limited, claims, batch)
            if run is not None:
                if not slots.timeouts.ended(run):
                    return None
                me.run = None
            if isinstance(called, NotBegun):
                if not isinstance(called.error, asyncio.CancelledError):
                    slots.hindered(called.error)
                    slots.transactions.rest()
                batch.calls.insert(0, claims)
                break
            error = _error_of(called)
            if slots.fork_guard.is_child:
                slots.fork_guard.end(error)
            if error is not None and _was_cancelled(error, is_ending):
                batch.interrupted = batch.left
                batch.calls.insert(0, claims)
                break
            if called.error is not None:
                self._tell_timeout(called.error)
                unexplained = called.error
            elif error is not None:
                unexplained = None
                if isinstance(error, JobTimeoutError) and run is not None:
                    slots.timed_out(claims[0].job, run.timeout)
            self._ended(batch, route, claims, called, began)
        self._leave(batch, route, unexplained)
        return TOLD

    def _call(self, route: BatchRoute, claims: list[Claimed], batch: Batch) -> Called | NotBegun:
        jobs = [claimed.job for claimed in claims]
        started = self._started(batch, jobs)
        if route.is_transactional:
            steps = batch_in_transaction(route, claims)
            return self._slots.transactions.run_steps(steps, route, claims[0], started, jobs)
        if started is not None:
            started(jobs[0])
        try:
            return answered(route, claims, route.handler(jobs))
        except BaseException as error:
            return failed(route, claims, error)

    # -- both colours ------------------------------------------------------------------

    def _drop_expired(self, batch: Batch) -> None:
        """Dead-letter the jobs that have expired, before the first call."""
        slots = self._slots
        for claimed in batch.waiting:
            if claimed.job.expires is None:
                continue
            found = slots.mux.route(claimed.job)
            route = found if isinstance(found, Route) else slots.decided(found)
            if not isinstance(route, Route):
                batch.calls = [[each for each in call if each != claimed] for call in batch.calls]
                slots.done(Outcome(claimed, route, None))
                batch.left -= 1

    def _calls(self, batch: Batch) -> Iterator[list[Claimed]]:
        """Yield the calls that are left, of the jobs that were not cancelled."""
        while batch.calls:
            if batch.has_begun and self._slots.is_stopping:
                return
            claims = batch.calls.pop(0)
            if batch.gone:
                self._release(batch, [claimed for claimed in claims if claimed in batch.gone])
                claims = [claimed for claimed in claims if claimed not in batch.gone]
            if claims:
                batch.current = claims
                batch.has_begun = True
                yield claims

    def _started(self, batch: Batch, jobs: Sequence[Any]) -> Callable[[Any], None] | None:
        """Return what tells the observer that jobs start, once for each."""
        started = self._slots.started
        if started is None or batch.is_told:
            return None

        def tell(_: object) -> None:
            batch.is_told = True
            for job in jobs:
                started(job)

        return tell

    def _ended(
        self,
        batch: Batch,
        route: BatchRoute,
        claims: list[Claimed],
        called: Called,
        began: float,
    ) -> None:
        slots = self._slots
        if called.strangers and not batch.has_strangers:
            batch.has_strangers = True
            slots.hindered(BgjobError(strangers_text(route.calling, called.strangers)))
        ran = (monotonic() - began) / len(claims)
        at = slots.clock.offset + began
        batch.calls[:0] = called.again
        if slots.is_behind:
            for _, ending in called.endings:
                if ending is not COMPLETE and ending is not COMMITTED:  # nearly all are
                    drop_locals(ending)
        slots.outcomes.extend(
            [quick_outcome((claimed, ending, ran, at)) for claimed, ending in called.endings]
        )
        batch.left -= len(called.endings)
        slots.finished()

    def _tell_timeout(self, error: BaseException) -> None:
        if isinstance(error, JobTimeoutError):
            self._slots.hindered(error)

    def _leave(self, batch: Batch, route: BatchRoute, unexplained: BaseException | None) -> None:
        """Release the jobs of calls that do not follow; tell of an error that did not return."""
        if batch.calls:
            self._release(batch, batch.waiting)
            batch.calls = []
        elif unexplained is not None:
            hint = BgjobError(
                f"{route.calling.name} raised {type(unexplained).__name__} in a call with several "
                "jobs, and not with fewer of them: each has a result of its own"
            )
            hint.__cause__ = unexplained
            self._slots.hindered(hint)

    def _release(self, batch: Batch, claims: Sequence[Claimed]) -> None:
        for claimed in claims:
            self._slots.done(Outcome(claimed, Release(), None))
        batch.left -= len(claims)


def _error_of(called: Called) -> BaseException | None:
    """Return what a call raised, with several jobs or with one."""
    if called.error is not None:
        return called.error
    if len(called.endings) == 1:
        error = error_of(called.endings[0][1])
        return error if isinstance(error, BaseException) else None
    return None


async def _was_cancelled_async(error: BaseException, is_ending: Callable[[], bool]) -> bool:
    """Whether a call ended because its task was cancelled, for the end of the worker or its jobs.

    Another cancellation is a failure of the handler's.
    """
    task = asyncio.current_task()
    if task is None or task.get_loop() is not asyncio.get_running_loop():
        raise error  # the coroutine was discarded, with a closed loop
    if not task.cancelling() or not isinstance(error, asyncio.CancelledError):
        return False
    return is_ending()


def _was_cancelled(error: BaseException, is_ending: Callable[[], bool]) -> bool:  # noqa: ARG001
    return False
