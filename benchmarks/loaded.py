"""How long jobs wait for a busy worker: 5,000 jobs a second, of 1 ms each."""

import asyncio
from collections.abc import Mapping, Sequence
from time import monotonic, sleep

import harness
import work
from figures import Figures, at_most, figure, percentile
from harness import Bench
from work import QUEUE, Child

from bgjob import AsyncClient, AsyncWorker, Client, EnqueueRequest, Job, Mux

_RATE = 5000  # jobs a second
_TOGETHER = 5  # jobs that become due at once: every millisecond
_WORK = 0.001  # seconds that a handler takes
_CONCURRENCY = 100


def main(bench: Bench) -> Mapping[str, object]:
    """Offer jobs on a schedule; measure from it, and from the return of the enqueue."""
    seconds = 5 if bench.options.quick else 60
    runs = bench.repeat("loaded", lambda: asyncio.run(_run(bench, seconds)))
    rates = runs["enqueued_per_s"]
    return {
        "benchmark": "loaded",
        "seconds": seconds,
        "offered_jobs_per_s": _RATE,
        "concurrency": _CONCURRENCY,
        "from_schedule": {
            "p50_ms": figure(runs["p50_ms"]),
            "p99_ms": figure(runs["p99_ms"], goal=at_most(20, "median")),
        },
        "from_return": {
            "p50_ms": figure(runs["p50_ms_from_return"]),
            "p99_ms": figure(runs["p99_ms_from_return"], goal=at_most(20, "median")),
        },
        "growth": {
            "floor": "from the schedule, the first third",
            "p99_ms_of_last_third": figure(
                runs["p99_ms_of_last_third"], runs["p99_ms_of_first_third"], at_most(1.5)
            ),
        },
        "producer": {
            "floor": "the schedule",
            "jobs_per_s": figure(rates, [_RATE] * len(rates)),
            "p99_ms_late": figure(runs["p99_ms_late"]),
        },
        # The latencies are then those of a lower rate.
        "warning": "the producer could not offer the rate" if min(rates) < 0.98 * _RATE else None,
    }


async def _run(bench: Bench, seconds: int) -> Figures:
    bench.fresh()
    count = _RATE * seconds
    ran: list[tuple[int, float]] = []  # the job's number, and when it started
    all_ran = asyncio.Event()

    async def handler(job: Job) -> None:
        ran.append((int(job.arg or b""), monotonic()))
        await asyncio.sleep(_WORK)
        if len(ran) == count:
            all_ran.set()

    async with AsyncClient(bench.dsn) as client:
        mux = Mux().register("work", handler)
        async with AsyncWorker(client, QUEUE, mux, concurrency=_CONCURRENCY):
            producer = Child(_produce, bench.dsn, count)
            patience = seconds + work.PATIENCE
            began, returned = await asyncio.to_thread(producer.result, patience)
            await asyncio.wait_for(all_ran.wait(), work.PATIENCE)
    if sorted(number for number, _ in ran) != list(range(count)):
        raise RuntimeError(f"{len(ran)} runs of {count} jobs; each of them must run once")
    work.check_left(bench)

    due = [_due(began, number) for number in range(count)]
    waited = _ms([(due[number], started) for number, started in sorted(ran)])
    from_return = _ms([(returned[number], started) for number, started in ran])
    third = count // 3
    return {
        "p50_ms": percentile(waited, 0.5),
        "p99_ms": percentile(waited, 0.99),
        "p50_ms_from_return": percentile(from_return, 0.5),
        "p99_ms_from_return": percentile(from_return, 0.99),
        "p99_ms_of_first_third": percentile(waited[:third], 0.99),
        "p99_ms_of_last_third": percentile(waited[-third:], 0.99),
        "enqueued_per_s": count / (returned[-1] - began),
        "p99_ms_late": percentile(_ms(list(zip(due, returned, strict=True))), 0.99),
    }


def _ms(spans: Sequence[tuple[float, float]]) -> list[float]:
    return [(end - begin) * 1000 for begin, end in spans]


def _due(began: float, number: int) -> float:
    """Return the time at which a job is to be enqueued by the schedule."""
    return began + (number // _TOGETHER + 1) * _TOGETHER / _RATE


def _produce(dsn: str, count: int) -> tuple[float, list[float]]:
    """Enqueue on schedule; return when it began, and when each job's enqueue returned."""
    returned: list[float] = []
    with Client(dsn) as client:
        client.dlq.list(limit=1)
        began = monotonic()  # one clock for all processes of a host
        while (first := len(returned)) < count:
            sleep(max(0.0, _due(began, first) - monotonic()))
            due = int((monotonic() - began) * _RATE) // _TOGETHER * _TOGETHER
            numbers = range(first, min(due, count))
            if numbers:
                client.bulk_enqueue([EnqueueRequest(QUEUE, "work", b"%d" % n) for n in numbers])
                returned += [monotonic()] * len(numbers)
    return began, returned


if __name__ == "__main__":
    harness.main(main, __doc__)
