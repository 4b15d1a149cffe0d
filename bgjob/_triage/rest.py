"""Move all dead jobs of a group back, in batches, with a rate and a brake."""

from collections import deque
from collections.abc import Callable
from math import ceil, inf
from time import monotonic
from typing import NamedTuple

from bgjob._sql import dead, enqueues, triage
from bgjob._sql.dead import DeadFilter
from bgjob._triage import Pause, Steps
from bgjob.triage import Rest

_FIRST, _BATCH = 10, 100
"""Jobs in the first batch, and in the largest: each has twice as many as the one before, so that
the brake sees a few fail before hundreds do."""

_WATCHED = 1000
"""The latest jobs that were moved, whose failures are counted."""


class Options(NamedTuple):
    """The arguments of `rest`; see AsyncDlq."""

    upto: int | None
    rate: float | None
    stop_after: int | None
    notify: bool
    progress: Callable[[Rest], object] | None


def rest(fingerprint: str, options: Options) -> Steps[Rest]:
    """Move the jobs back, those first that died first."""
    if options.rate is not None and not 0 < options.rate < inf:
        raise ValueError(f"rate must be above 0 jobs a second, or None, not {options.rate!r}")
    if options.stop_after is not None and options.stop_after < 0:
        raise ValueError(f"stop_after must be from 0, or None, not {options.stop_after!r}")
    group = dead.number_of(fingerprint)
    start: triage.Start = yield triage.start(group, options.upto)
    # Not beyond: those that die again have greater numbers, and would go round.
    upto = start.last if options.upto is None else min(options.upto, start.last)
    most = _BATCH if options.rate is None else min(_BATCH, ceil(options.rate))
    size = min(_FIRST, most)
    watched: deque[str] = deque(maxlen=_WATCHED)
    done = Rest(fingerprint, start.jobs, 0, 0, 0, upto, is_stopped=False)
    after = 0
    while True:
        began = monotonic()
        failed: int = yield triage.failed_again(group, start.last, [*watched])
        done = done._replace(failed=failed)
        if options.stop_after is not None and failed > options.stop_after:
            return done._replace(is_stopped=True)
        numbers: list[int] = yield triage.batch(group, after, upto, limit=size)
        if not numbers:
            return done
        requeued: dead.Requeued = yield dead.requeue(DeadFilter(numbers=numbers))
        if options.notify and requeued.queues:
            yield enqueues.tell_all(requeued.queues)
        watched += requeued.ids
        left = len(numbers) - len(requeued.ids)
        done = done._replace(moved=done.moved + len(requeued.ids), left=done.left + left)
        if options.progress is not None:
            options.progress(done)
        after, size = numbers[-1], min(2 * size, most)
        if options.rate is not None:
            yield Pause(max(len(numbers) / options.rate - (monotonic() - began), 0.0))
