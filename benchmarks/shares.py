"""How evenly workers share a busy queue, and what a claim costs among many."""

from collections.abc import Mapping, Sequence
from statistics import mean, pstdev
from time import monotonic, sleep

import harness
import psycopg
import replicas
from figures import Figures, Goal, at_least, at_most, figure
from harness import Bench
from psycopg.conninfo import make_conninfo
from replicas import Plan, Replicas
from work import QUEUE

from bgjob import Client, EnqueueRequest
from bgjob._sql.notices import BY_HAND
from bgjob.ext.embedded import EmbeddedServer
from bgjob.schema import init_sql

_SPARE = 50
"""Connections beside those of the workers."""

_FILL = f"""
    insert into bgjob_job (id, queue, type, next_run_at)
    select 'job-' || n, '{QUEUE}', 'noop', now() - interval '1 hour' + n * interval '1 us'
    from generate_series(1, %s) as n
"""

_SLEEP = 0.005
"""Seconds of a job that is not a no-op."""

_SLEEP_OF_MANY = 0.02
"""The same for many workers, whose jobs of 5 ms are more than two processors can run."""

_FASTEST = 100_000
"""No-op jobs a second, at most."""

_MANY = 50
"""From this number of workers on, they run half as many."""

_GROWING = 4.0
"""Seconds in which the claims of all workers grow from one job to as many as they will have."""

_BURST = 120
_BURST_SLEEP = 0.02

_CLAIM = "update bgjob_job set%skip locked%"

_WAITS = """
    select count(*) filter (where wait_event_type = 'Lock')::float8,
        count(*) filter (where wait_event_type = 'LWLock')::float8,
        count(*)::float8
    from pg_stat_activity
    where state = 'active' and pid <> pg_backend_pid() and backend_type = 'client backend'
"""

_GOALS: Mapping[str, Goal] = {
    "least_share": at_least(0.8, "median"),
    "most_share": at_most(1.2, "median"),
    "waiting_for_transactions": at_most(0.01, "median"),
}


def main(bench: Bench) -> Mapping[str, object]:
    """Drain a backlog by two replicas, and by many, on a server of its own.

    Many workers with no-op jobs share the processors, and not the queue: each claim walks over the
    rows that the others have claimed since its last one, so that a job costs the server ten times
    as much. There is no goal for them.
    """
    many, processes, seconds = (12, 3, 2.0) if bench.options.quick else (100, 4, 20.0)
    two = [Plan(1, concurrency=10)] * 2
    settings = {
        "max_connections": str(many + _SPARE),
        "shared_preload_libraries": "pg_stat_statements",
    }
    with (
        EmbeddedServer(settings=settings) as server,
        psycopg.connect(server.dsn, autocommit=True) as admin,
    ):
        admin.execute("create extension pg_stat_statements schema public")

        def bursts(name: str, plans: Sequence[Plan], rounds: int) -> dict[str, object]:
            runs = bench.repeat(name, lambda: _burst(admin, server.dsn, plans, rounds))
            return {name: figure(values) for name, values in runs.items()}

        def run(
            name: str, plans: Sequence[Plan], goals: Mapping[str, Goal] = _GOALS
        ) -> dict[str, object]:
            runs = bench.repeat(name, lambda: _drain(admin, server.dsn, plans, seconds))
            return {name: figure(values, goal=goals.get(name)) for name, values in runs.items()}

        return {
            "benchmark": "shares",
            "workers": many,
            "processes": processes,
            "seconds": seconds,
            "sleep_ms": _SLEEP * 1e3,
            "sleep_ms_of_many": _SLEEP_OF_MANY * 1e3,
            "burst_of_20_ms": bursts(
                "burst",
                [Plan(1, concurrency=10, handler_s=_BURST_SLEEP)] * 2,
                3 if bench.options.quick else 20,
            ),
            "two": run("two, no-op", two),
            "two_slow": run("two, 5 ms", [Plan(1, concurrency=10, handler_s=_SLEEP)] * 2),
            "many": run("many, no-op", replicas.spread(many, processes), goals={}),
            "many_slow": run(
                "many, 20 ms", replicas.spread(many, processes, handler_s=_SLEEP_OF_MANY)
            ),
        }


def _drain(
    admin: psycopg.Connection[object], dsn: str, plans: Sequence[Plan], seconds: float
) -> Figures:
    """Run the workers over a backlog for some seconds; return the share of each.

    The more jobs a claim has, the longer until all have claimed as often: the coefficient of
    variation falls with the root of the seconds.
    """
    dsn = _fresh(admin, dsn)
    slots = sum(plan.workers * plan.concurrency for plan in plans)
    rate = _FASTEST / (2 if sum(plan.workers for plan in plans) >= _MANY else 1)
    if plans[0].handler_s:
        rate = min(rate, slots / plans[0].handler_s)
    with replicas.running(dsn, plans) as workers:
        # In one transaction: all workers see the whole backlog at the same moment.
        with admin.transaction():
            admin.execute(_FILL, [int(rate * (_GROWING + seconds) * 1.2)])
            admin.execute("select pg_stat_statements_reset()")
            admin.execute("select pg_notify(%s, %s)", [BY_HAND, QUEUE])
        sleep(_GROWING)
        before, began, waits = _ran(workers), monotonic(), [0.0, 0.0, 0.0]
        while monotonic() < began + seconds:
            sleep(0.05)
            row = admin.execute(_WAITS).fetchone()
            assert isinstance(row, tuple)
            waits = [more + count for more, count in zip(waits, row, strict=True)]
        after, took = _ran(workers), monotonic() - began
        if not admin.execute("select from bgjob_job where lease_until is null limit 1").fetchall():
            raise RuntimeError("there were not enough jobs")
        claims = _claims(admin)
    ran = [late - early for late, early in zip(after, before, strict=True)]
    usual = mean(ran)
    return {
        "least_share": min(ran) / usual,
        "most_share": max(ran) / usual,
        "coefficient_of_variation": pstdev(ran) / usual,
        "jobs_per_s": sum(ran) / took,
        "waiting_for_transactions": waits[0] / max(waits[2], 1),
        "waiting_in_the_server": waits[1] / max(waits[2], 1),
        **claims,
    }


def _burst(
    admin: psycopg.Connection[object], dsn: str, plans: Sequence[Plan], rounds: int
) -> Figures:
    """Enqueue jobs at once, again and again, into an idle queue; return the shares of all."""
    dsn = _fresh(admin, dsn)
    uneven, took = [], []
    with Client(dsn) as client, replicas.running(dsn, plans) as workers:
        ran = _ran(workers)
        for _ in range(rounds):
            sleep(0.5)  # all are idle
            began = monotonic()
            client.bulk_enqueue(EnqueueRequest(QUEUE, "noop") for _ in range(_BURST))
            while sum(now := _ran(workers)) < sum(ran) + _BURST:
                sleep(0.005)
            took.append(monotonic() - began)
            shares = [late - early for late, early in zip(now, ran, strict=True)]
            uneven.append(max(shares) / mean(shares))
            ran = now
    return {"most_share": mean(uneven), "burst_ms": mean(took) * 1e3}


def _ran(workers: Replicas) -> list[int]:
    return [count for reading in workers.read() for count in reading.ran]


def _fresh(admin: psycopg.Connection[object], dsn: str) -> str:
    """Make new tables; return how to connect to them."""
    admin.execute("drop schema if exists bench cascade")
    admin.execute("create schema bench")
    admin.execute("set search_path = bench, public")
    admin.execute(init_sql())
    return make_conninfo(dsn, options="-c search_path=bench")


def _claims(admin: psycopg.Connection[object]) -> Figures:
    row = admin.execute(
        """
        select sum(total_exec_time) / sum(calls), sum(rows) / sum(calls), sum(calls)::float8
        from pg_stat_statements where query ilike %s
        """,
        [f"%{_CLAIM}"],
    ).fetchone()
    assert isinstance(row, tuple)
    return {"claim_ms": float(row[0]), "jobs_per_claim": float(row[1])}


if __name__ == "__main__":
    harness.main(main, __doc__)
