"""How many jobs a second are enqueued in bulk, compared with a binary COPY of their rows."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import floor
import harness
import work
from figures import Figures, at_least
from harness import Bench

from bgjob import Client, EnqueueRequest

# The rows and the connection are made before the time is taken, and of `bulk` the requests.

_PAYLOAD = "abcdefghijkl"


@dataclass(frozen=True, slots=True)
class Noop:
    """A typed job with the payload of the others."""

    queue: ClassVar[str] = work.QUEUE

    i: int
    p: str


def main(bench: Bench) -> Mapping[str, object]:
    """Write the same rows both ways."""
    count = 10_000 if bench.options.quick else 50_000
    return {
        "benchmark": "bulk",
        "jobs": count,
        "floor": "binary copy",
        "bulk": bench.compare(
            "bulk",
            lambda: _enqueue(bench, count),
            lambda: _copy(bench, count),
            {"jobs_per_s": at_least(0.7)},
        ),
        "made": bench.compare(
            "made",
            lambda: _make_and_enqueue(bench, count, _made),
            lambda: _copy(bench, count),
            {"jobs_per_s": at_least(0.5)},
        ),
        "typed": bench.compare(
            "typed",
            lambda: _make_and_enqueue(bench, count, _typed),
            lambda: _copy(bench, count),
            {"jobs_per_s": at_least(0.5)},
        ),
    }


def _enqueue(bench: Bench, count: int) -> Figures:
    bench.fresh()
    requests = _made(count)
    with Client(bench.dsn) as client:
        client.dlq.list(limit=1)
        return work.write(bench, count, lambda: client.bulk_enqueue(requests))


def _make_and_enqueue(
    bench: Bench, count: int, make: Callable[[int], Sequence[EnqueueRequest]]
) -> Figures:
    bench.fresh()
    with Client(bench.dsn) as client:
        client.dlq.list(limit=1)
        return work.write(bench, count, lambda: client.bulk_enqueue(make(count)))


def _copy(bench: Bench, count: int) -> Figures:
    bench.fresh()
    rows = floor.rows(_made(count))
    with floor.connect(bench.dsn) as connection:
        return work.write(bench, count, lambda: floor.copy(connection, rows))


def _made(count: int) -> list[EnqueueRequest]:
    return [EnqueueRequest(work.QUEUE, "noop", {"i": n, "p": _PAYLOAD}) for n in range(count)]


def _typed(count: int) -> list[EnqueueRequest]:
    return [EnqueueRequest.of(Noop(n, _PAYLOAD)) for n in range(count)]


if __name__ == "__main__":
    harness.main(main, __doc__)
