"""Starts the threads and tasks of a queue, replaces lost slots, and settles jobs of dead ones."""

import asyncio
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from math import inf
from time import monotonic
from typing import NamedTuple, TypeAlias

from bgjob._engine.outcome import Outcome, Release
from bgjob._handlers.route import Route
from bgjob._running.batch import halves
from bgjob._running.loop import Loop
from bgjob._sql.settlements import Claimed
from bgjob._worker.batch import Batch, members, running, unfinished
from bgjob._worker.batches import Gathering
from bgjob._worker.reservations import Reservations
from bgjob._worker.slots import Slot, Slots
from bgjob._worker.tasks import Tasks
from bgjob._worker.threads import Threads
from bgjob._worker.timeouts import UNWINDING, Attempt, Run
from bgjob.errors import BgjobError

_INTERRUPT_AGAIN = 0.05
"""Seconds to the next look at handlers of cancelled jobs that have not ended."""

_Key: TypeAlias = tuple[str, int]


class GivenUp(NamedTuple):
    """The cancelled jobs whose handlers were given up."""

    all: list[Claimed]
    silent: list[Claimed]
    """Those of which there is no outcome, unless a late one."""


class Executor:
    """Runs the jobs of a queue on threads and on the loop; for the control thread only.

    Args:
        slots: the slots.
        loop: where coroutine handlers run.

    """

    def __init__(self, slots: Slots, loop: Loop) -> None:
        self._slots = slots
        self._loop = loop
        self.reservations = reservations = Reservations(slots)
        self.tasks = Tasks(slots, loop, reservations, lambda claimed: self._threads.start(claimed))  # noqa: PLW0108 (made below)
        self._threads = Threads(slots, self.tasks, reservations)
        self.gathering: Gathering | None = None
        """The jobs of batch types that wait for others; None if there are no such types."""
        if slots.mux.batches:
            self.gathering = Gathering(slots.mux.batches, slots.release)
        self._rests: list[Batch] = []  # of batches whose slots were given up
        self._is_unclear = False
        self._interrupted: dict[_Key, float] = {}  # cancelled coroutines, since when
        self._interrupt_at = inf
        self.failure: RuntimeError | None = None
        """Why no handler can run any more."""

    def submit(self, batch: Sequence[Claimed], *, quick: bool = False) -> None:
        """Run jobs, in order, as slots become free.

        Jobs that are likely to be quick get one slot, until `spread` is called: waking
        ten threads costs more than a hundred such jobs, and they would only compete
        for the interpreter.
        """
        slots = self._slots
        slots.jobs.extend(batch)
        if quick:
            self._start(1 if slots.free == slots.concurrency else 0)
        else:
            self.spread()

    def spread(self) -> None:
        """Use a free slot for each waiting job, as far as there are any."""
        slots = self._slots
        self.reservations.put_back_overdue(monotonic())
        if slots.free and slots.jobs:
            self._start(len(slots.jobs))

    def _start(self, most: int) -> None:
        """Start free slots, on threads or on the loop as the next job needs."""
        slots = self._slots
        count = slots.take(most)
        if not count:
            return
        try:
            on_loop = slots.mux.runs_on_loop(slots.jobs[0].job)
        except IndexError:
            on_loop = False
        if on_loop:
            self.tasks.start(count)
        else:
            for _ in range(count):
                self._threads.start(None)

    @property
    def in_handlers(self) -> list[Claimed]:
        """The jobs that threads and tasks run. From any thread."""
        slots = [*self._threads.busy, *tuple(self.tasks.all.values())]
        held = [claimed for slot in slots if (claimed := slot.claimed) is not None]
        return [each for claimed in held for each in unfinished(claimed)]

    @property
    def next_timeout(self) -> float:
        """When to call `expire` next."""
        next_at = min(self._slots.timeouts.next_at, self._threads.retry_at, self._interrupt_at)
        next_at = min(next_at, self.reservations.overdue_at)
        next_at = min(next_at, self._slots.transactions.messages.overdue_at)
        return next_at if self.gathering is None else min(next_at, self.gathering.next_at)

    @property
    def usable(self) -> int:
        """The number of slots without those whose jobs have timed out and do not end.

        If no thread can start, it is the number of running ones.
        """
        slots = self._slots.concurrency - self._slots.timeouts.missing
        if self._threads.retry_at == inf:
            return slots
        return min(slots, len(self._threads.all) + len(self.tasks.all))

    def expire(self, now: float) -> list[Claimed]:
        """Fail the jobs that exceeded their timeouts and do not end; replace their slots.

        Those of a batch are set apart for `run_rests`. If a thread could not be started, try
        again. Run the batches whose jobs have waited for long enough.

        Returns:
            The failed jobs.

        """
        slots = self._slots
        overdue = slots.timeouts.overdue(now)
        for run in overdue:
            if slots.timeouts.slot_lost():
                slots.free_again()
            if isinstance(run.claimed, Batch) and self.gathering is not None:
                self._take_apart(run, run.claimed, self.gathering)
            if len(running(run.claimed)) == 1:
                slots.timed_out(running(run.claimed)[0].job, run.timeout)
                slots.done(run.fail(now, slots.clock.offset))
        slots.transactions.messages.end_overdue(now)
        if self._threads.retry_at <= now:
            self._threads.retry()
        if self.gathering is not None:
            slots.jobs.extend(self.gathering.due(now))
        self.spread()
        return [running(run.claimed)[0] for run in overdue]

    def _take_apart(self, run: Run, batch: Batch, gathering: Gathering) -> None:
        """Set the rest of a batch apart whose call was given up; a single job fails."""
        calls = batch.calls
        if len(batch.current) > 1:
            self._slots.hindered(run.timed_out())
            calls = [*halves(batch.current), *calls]
        rest = gathering.rest_of(batch, calls) if calls else None
        batch.left = 0
        if rest is not None:
            self._rests.append(rest)

    def run_rests(self) -> None:
        """Run what batches have left whose slots were given up, now that their sessions ended."""
        if self._rests:
            self._slots.jobs.extendleft(reversed(self._rests))
            self._rests.clear()

    def withdraw(self, lost: Collection[Claimed], *, is_end: bool) -> list[Claimed]:
        """Take back the jobs that have not started, also those that wait for others.

        What is left of a batch that has failed goes on, except at the worker's end: it would
        be gathered with the job that made it fail.

        Args:
            lost: the jobs that other workers may have; they are in no line any more.
            is_end: whether the worker ends.

        """
        self.reservations.put_back_all()
        taken = self._slots.lines.withdraw(lost)
        if self.gathering is None:
            return taken
        rests = [each for each in taken if isinstance(each, Batch) and each.is_rest]
        if is_end:
            rests += self._rests
            self._rests.clear()
            taken += [each for each in rests if each not in taken]
        else:
            taken = [each for each in taken if each not in rests]
            self._slots.jobs.extendleft(reversed(rests))
        for each in taken:
            if isinstance(each, Batch):
                each.left = 0
        released = [
            claimed
            for each in taken
            for claimed in (each.waiting if isinstance(each, Batch) else [each])
        ]
        return [*released, *self.gathering.withdraw()]

    def interrupt(self, cancelled: Iterable[Claimed], now: float) -> GivenUp:
        """Interrupt the handlers of cancelled jobs; call it again at `next_timeout`.

        A coroutine is cancelled. A thread is given up immediately, and a coroutine after a
        second: another slot replaces theirs.
        """
        waiting = {_key(claimed): claimed for claimed in cancelled}
        since = {key: at for key, at in self._interrupted.items() if key in waiting}
        given_up = GivenUp([], [])
        for slot in self._threads.busy:
            claimed = slot.claimed
            if claimed is not None and _is_wholly_in(claimed, waiting):
                self._give_up(slot, claimed, given_up, waiting)
        for slot in tuple(self.tasks.all.values()):
            claimed = slot.claimed
            if claimed is None or not _is_wholly_in(claimed, waiting):
                continue
            key = _key(claimed)
            if key not in since:
                since[key] = now
                self.tasks.interrupt(slot, claimed)
            elif now >= since[key] + UNWINDING:
                self._give_up(slot, claimed, given_up, waiting)
        # Jobs that are in no slot move to another one, or have just ended.
        self._interrupted = since
        self._interrupt_at = now + _INTERRUPT_AGAIN if len(waiting) > len(given_up.all) else inf
        if given_up.all:
            self.spread()
        return given_up

    def _give_up(
        self, slot: Slot, claimed: Claimed, given_up: GivenUp, cancelled: Mapping[_Key, Claimed]
    ) -> None:
        """Replace the slot of a handler that does not end, unless it has just ended."""
        run, timeouts = slot.run, self._slots.timeouts
        # Others of a batch have outcomes already.
        jobs = [each for each in unfinished(claimed) if _key(each) in cancelled]
        if isinstance(run, Run) and run.is_of(claimed):
            if not timeouts.give_up(run):
                return
            for each in jobs:
                self._slots.done(Outcome(each, Release(), None))
        else:
            slot.interrupt = interrupt = Attempt(claimed)
            if not interrupt.is_of(slot.claimed) or not interrupt.decide(is_overdue=True):
                return
            given_up.silent.extend(jobs)
        given_up.all.extend(jobs)
        if isinstance(claimed, Batch):
            claimed.left = 0
        if timeouts.slot_lost():
            self._slots.free_again()

    def close(self) -> None:
        """End the idle threads, and cancel the tasks; a running thread is left alone."""
        self._threads.close()
        self.tasks.close()

    # -- dead threads, tasks and loops ------------------------------------------------------

    def suspect(self) -> None:
        """Search for lost jobs at the next `watch`: a fault may have lost some."""
        self._is_unclear = self._slots.needs_watch = True

    def watch(self, held: Callable[[], Collection[Claimed]], patience: float) -> None:
        """Check that each thread, task and loop lives, so that no dead one holds a job.

        A job that ran on a dead one fails with an error that says so. One that never started is
        released, and its attempt not counted. Call `collect` first.

        Args:
            held: returns the submitted jobs without an outcome.
            patience: seconds for which a caller's loop may stand still.

        """
        self._slots.needs_watch = False
        dead = self._threads.take_dead()
        try:
            self._loop.look()
        except RuntimeError as error:  # no thread can start; the next check tries again
            self._slots.hindered(error)
        # First: a loop that is closed after this is left to the next check, which knows why.
        is_closed = self._loop.is_closed
        self.failure = self._loop.failure(patience, has_work=self.tasks.is_unwinding)
        dead += self.tasks.lose(is_closed=is_closed)
        while self.tasks.dead:
            dead.append(self.tasks.dead.popleft())
        for slot in dead:
            self._free(slot)
            if isinstance(slot.claimed, Batch):
                slot.claimed.left = 0
        if dead or self._is_unclear:
            self.tasks.start_again()
            self._settle(dead, held())
        self.spread()

    def _free(self, slot: Slot) -> None:
        self.reservations.cancel(slot)
        if slot.claimed is not None:  # it may have ended before it used the job's transaction
            self._slots.transactions.drop(slot.claimed)
        run, has_slot = slot.run, slot.has_slot
        if slot.interrupt is not None and slot.interrupt.is_overdue:
            run = slot.interrupt
        if run is not None and run.is_overdue:
            has_slot = self._slots.timeouts.slot_recovered(run)
        elif isinstance(run, Run):
            self._slots.timeouts.ended(run)
        if has_slot:
            self._slots.free_again()

    def _settle(self, dead: Iterable[Slot], unsettled: Collection[Claimed]) -> None:
        """Make an outcome for each job that is in no queue, no live slot and no outcome."""
        slots = self._slots
        errors = {
            _key(each): slot.error
            for slot in dead
            if slot.claimed is not None
            for each in members(slot.claimed)
        }
        # A job moves from the queue to a thread or a task, between these, and to the outcomes.
        # So each is read after those that it may come from.
        waiting = slots.lines.waiting
        with slots.lock:
            waiting += [*tuple(slots.jobs), *self.reservations.jobs]
        held = {_key(each) for claimed in waiting for each in members(claimed)}
        if self.gathering is not None:
            held |= {_key(each) for rest in self._rests for each in rest.all}
            held |= {_key(each) for each in self.gathering.waiting}
        claims = [slot.claimed for slot in self._threads.busy]
        claims += [slot.claimed for slot in self.tasks.moving.copy()]
        claims += [slot.claimed for slot in tuple(self.tasks.all.values())]
        claims += [slot.claimed for slot in self._threads.busy]
        held |= {
            _key(each)
            for claimed in (*claims, *tuple(slots.jobs))
            if claimed is not None
            for each in members(claimed)
        }
        held |= {_key(outcome.claimed) for outcome in tuple(slots.outcomes)}
        self._is_unclear = False
        for claimed in unsettled:
            key = _key(claimed)
            if key in held:
                continue
            if key in errors:
                slots.done(self._killed(claimed, errors[key]))
            elif None in claims:
                self._is_unclear = slots.needs_watch = True  # a live slot may be taking it now
            else:
                slots.done(Outcome(claimed, Release(), None))

    def _killed(self, claimed: Claimed, error: BaseException | None) -> Outcome:
        """Return the outcome of a job whose thread or task was ended."""
        if self.failure is not None or isinstance(error, asyncio.CancelledError):
            return Outcome(claimed, Release(), None)  # the caller's code ended its loop
        found = self._slots.isolated(claimed.job)
        route = found if isinstance(found, Route) else self._slots.decided(found)
        if not isinstance(route, Route):
            return Outcome(claimed, route, None)
        failure = BgjobError(
            "the thread or event loop that ran the job was ended"
            + ("" if error is None else f", by {type(error).__name__}: {error}")
        )
        failure.__cause__ = error
        return Outcome(claimed, route.failed(claimed.job, failure), None)


def _key(claimed: Claimed) -> _Key:
    return claimed.job.id, claimed.token


def _is_wholly_in(claimed: Claimed, cancelled: Mapping[_Key, Claimed]) -> bool:
    """Whether all that a slot runs was cancelled; otherwise a batch goes on without these."""
    if not isinstance(claimed, Batch):
        return _key(claimed) in cancelled
    claimed.gone.update(each for each in claimed.all if _key(each) in cancelled)
    return all(each in claimed.gone for each in unfinished(claimed))
