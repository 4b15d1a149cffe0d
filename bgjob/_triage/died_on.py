"""The workers on which dead jobs ran last."""

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from bgjob._sql.tokens import NUMBERS
from bgjob.workers import WorkerStatus


class DiedOn(NamedTuple):
    """A worker that moved jobs to the dead-letter table.

    `host`, `pid` and `release` are None if the worker was not seen within a day, and the release
    also if the worker was not told.
    """

    number: int
    jobs: int
    host: str | None
    pid: int | None
    release: str | None


def died_on(workers: Iterable[int | None], known: Iterable[WorkerStatus]) -> list[DiedOn]:
    """Count dead jobs by worker, the one with most of them first.

    Args:
        workers: of each job the number that its row has; None counts for nothing.
        known: the workers that `client.workers()` lists.

    """
    counts = Counter(worker for worker in workers if worker is not None)
    seen = {worker.number % NUMBERS: worker for worker in reversed([*known])}
    return [
        DiedOn(number, jobs, None, None, None)
        if (worker := seen.get(number)) is None
        else DiedOn(worker.number, jobs, worker.host, worker.pid, worker.release)
        for number, jobs in counts.most_common()
    ]
