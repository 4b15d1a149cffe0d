"""Live workers with handlers that this release lacks: jobs that they would still handle."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from bgjob._preflight.report import Finding
from bgjob._words import count
from bgjob.workers import WorkerStatus

_NAMED = 5
"""The types that a finding names; those with most jobs."""


def of_workers(
    workers: Sequence[WorkerStatus],
    types: Collection[str],
    queues: Collection[str] | None,
    jobs: Mapping[tuple[str, str], int],
) -> Iterator[Finding]:
    """Yield a note for each release whose live workers have other types.

    Args:
        workers: the registered workers.
        types: the types of this release.
        queues: the queues to look at; None for all.
        jobs: the number of live jobs by queue and type.

    """
    releases: dict[tuple[str | None, str], list[WorkerStatus]] = defaultdict(list)
    for worker in workers:
        if worker.is_alive and (queues is None or not worker.queues.keys().isdisjoint(queues)):
            releases[worker.release, worker.program].append(worker)
    for (release, program), group in sorted(releases.items(), key=lambda item: str(item[0])):
        served = {queue for worker in group for queue in worker.queues}
        served = served if queues is None else served & {*queues}
        lacking = {type_ for worker in group for type_ in worker.types}.difference(types)
        if lacking:
            who = f"release {release} of {program}" if release else program
            waiting = {type_: sum(jobs.get((q, type_), 0) for q in served) for type_ in lacking}
            yield _of_release(who, len(group), served, waiting)


def _of_release(
    who: str, workers: int, served: Iterable[str], waiting: Mapping[str, int]
) -> Finding:
    by_jobs = sorted(waiting, key=lambda type_: (-waiting[type_], type_))
    named = [f"{type_!r} ({count(waiting[type_], 'live job')})" for type_ in by_jobs[:_NAMED]]
    if more := len(by_jobs) - len(named):
        named.append(f"{more:,} more")
    on = ", ".join(map(repr, sorted(served)))
    have = "has handlers" if workers == 1 else "have handlers"
    return Finding(
        "other_release",
        "note",
        f"{count(workers, 'live worker')} ({who}) on {on} {have} for types that this release "
        f"lacks: {', '.join(named)}",
        "as long as they run, they handle those jobs that they claim first; where both run, this "
        "release dead-letters those that it claims: let the old workers end last, or pause the "
        "queue until they have",
        count=sum(waiting.values()),
        problem="types of live workers",
    )
