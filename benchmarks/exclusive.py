"""What exclusive keys cost: other jobs, while many wait for a key; and jobs with keys."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from time import monotonic, perf_counter, sleep

import floor
import harness
import work
from figures import Figures, at_least
from harness import Bench
from work import QUEUE

from bgjob import Client, EnqueueRequest, Job, Mux, Worker

_WAITING = 20_000
_KEYED = 20_000
_KEYS = 100

_HELD = "held"
_HOLDERS_QUEUE = "holders"


def main(bench: Bench) -> Mapping[str, object]:
    """Drain jobs beside others that wait for a key; drain jobs that have keys."""
    count = 20_000 if bench.options.quick else 100_000
    keyed = _KEYED // 4 if bench.options.quick else _KEYED
    return {
        "benchmark": "exclusive",
        "jobs": count,
        "waiting": _WAITING,
        "keyed_jobs": keyed,
        "keys": _KEYS,
        "concurrency": work.CONCURRENCY,
        "beside": {
            "floor": "the same without jobs that wait for a key that is held",
            **bench.compare(
                "beside",
                lambda: _beside(bench, count),
                lambda: work.drain(bench, work.fill(bench, count), lambda ran: ran.plain),
                {"jobs_per_s": at_least(0.8)},
            ),
        },
        "among": {
            "floor": "the same without jobs that want a key that is held, and are put aside",
            **bench.compare(
                "among",
                lambda: _among(bench, count),
                lambda: work.drain(bench, work.fill(bench, count), lambda ran: ran.plain),
            ),
        },
        "keyed": _compare(bench, "keyed", keyed, keys=_KEYS),
        "one key": _compare(bench, "one key", keyed, keys=1),
        "a key each": _compare(bench, "a key each", keyed, keys=keyed),
    }


def _compare(bench: Bench, title: str, count: int, *, keys: int) -> dict[str, object]:
    def measured() -> Figures:
        return _drain(bench, count, keys=keys)

    goal = {"jobs_per_s": at_least(0.5)}
    return {
        "floor": "the same without keys",
        **bench.compare(title, measured, lambda: _drain(bench, count, keys=0), goal),
        "bare": {
            "floor": "one connection that claims 1000 rows, inserts their keys, looks for other "
            "jobs of these, deletes the rows and then the keys; no handler",
            **bench.compare(f"{title}, bare", measured, lambda: _bare(bench, count, keys=keys)),
        },
    }


def _beside(bench: Bench, count: int) -> Figures:
    """Drain jobs while others wait for a key."""
    with Client(bench.dsn) as client:
        bench.fresh()
        with _held(client):
            client.bulk_enqueue(_wanting())
            with Worker(client, QUEUE, Mux()):
                _wait_until_waiting(bench)
            batch = work.requests(count)
            client.bulk_enqueue(batch)
            bench.settle()
            return work.drain(bench, [r.id for r in batch], lambda ran: ran.plain)


def _among(bench: Bench, count: int) -> Figures:
    """Drain jobs among others that claims still find, and that then wait for a key."""
    with Client(bench.dsn) as client:
        bench.fresh()
        with _held(client):
            batch, wanting = work.requests(count), _wanting()
            step = count // _WAITING
            mixed = []
            for number, request in enumerate(wanting):
                mixed += [request, *batch[number * step : (number + 1) * step]]
            client.bulk_enqueue(mixed)
            bench.settle()
            return work.drain(bench, [r.id for r in batch], lambda ran: ran.plain)


def _drain(bench: Bench, count: int, *, keys: int) -> Figures:
    return work.drain(bench, _fill(bench, count, keys=keys), lambda ran: ran.plain)


def _bare(bench: Bench, count: int, *, keys: int) -> Figures:
    _fill(bench, count, keys=keys)
    with floor.connect(bench.dsn) as connection:
        began = perf_counter()
        floor.drain_keyed(connection, count)
        took = perf_counter() - began
    work.check_left(bench)
    return {"jobs_per_s": count / took}


def _fill(bench: Bench, count: int, *, keys: int) -> list[str]:
    """Make new tables with jobs of so many keys, or without keys; return their ids."""
    batch = [
        EnqueueRequest(QUEUE, "noop", {"n": n}, exclusive=f"key {n % keys}" if keys else None)
        for n in range(count)
    ]
    with Client(bench.dsn) as client:
        bench.fresh(lambda: client.bulk_enqueue(batch))
    return [r.id for r in batch]


def _wanting() -> list[EnqueueRequest]:
    return [EnqueueRequest(QUEUE, "never", exclusive=_HELD) for _ in range(_WAITING)]


@contextmanager
def _held(client: Client) -> Iterator[None]:
    """Hold the key, by a job of another queue."""
    started, gate = threading.Event(), threading.Event()

    def hold(_: Job) -> None:
        started.set()
        gate.wait()

    client.enqueue(EnqueueRequest(_HOLDERS_QUEUE, "hold", exclusive=_HELD))
    with Worker(client, _HOLDERS_QUEUE, Mux().register("hold", hold)):
        if not started.wait(work.PATIENCE):
            raise RuntimeError("the key is not held")
        try:
            yield
        finally:
            gate.set()


def _wait_until_waiting(bench: Bench) -> None:
    give_up_at = monotonic() + work.PATIENCE
    query = "select from bgjob_job where waits"
    while bench.admin.execute(query).rowcount < _WAITING:
        if monotonic() > give_up_at:
            raise RuntimeError(f"not all jobs wait for the key after {work.PATIENCE:g} s")
        sleep(0.01)


if __name__ == "__main__":
    harness.main(main, __doc__)
