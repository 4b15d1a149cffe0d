"""A trial, not a part of bgjob: claims that visit 32 lanes in turn, on the index of claims.

A lane is a priority here, by a hash of a tenant. A claim takes an equal share of each lane, and
fills up with what is left. The outcome is in README.md.
"""

from collections.abc import Mapping, Sequence
from operator import itemgetter
from time import perf_counter
from typing import Any
from zlib import crc32

import floor
import harness
import work
from figures import Figures, at_least, percentile
from harness import Bench
from work import QUEUE

from bgjob import Client, EnqueueRequest

Row = tuple[Any, ...]

LANES = 32
TENANTS = 1000
BEHIND = 100_000
"""The jobs of one tenant that wait before another's first."""

_DELETE = "delete from bgjob_job where id = any (%s::text[]) and token = %s"

_LINE = f"""
    from unnest(%(lanes)s::smallint[], %(marks)s::timestamptz[]) as line (lane, since)
    cross join lateral (
        select ctid from bgjob_job
        where queue = '{QUEUE}' and priority = line.lane
            and next_run_at >= line.since and next_run_at <= now()
            and not waits and lease_until is null
        order by next_run_at
        {{part}}
        for update skip locked
    ) as due
"""

_CLAIM = f"""
    with share as materialized (
        select due.ctid {_LINE.format(part="limit %(share)s")} limit {floor.BATCH}
    ), free as (
        select {floor.BATCH} - count(*) as jobs from share
    ), rest as materialized (
        select due.ctid {_LINE.format(part="offset %(share)s limit (select jobs from free)")}
        limit (select jobs from free)
    )
    update bgjob_job
    set token = %(token)s, lease_until = clock_timestamp() + interval '30 s', attempt = attempt + 1
    where ctid = any (array(select ctid from share union all select ctid from rest))
    returning id, type, arg, attempt, next_run_at, priority
"""


def main(bench: Bench) -> Mapping[str, object]:
    """Drain one lane and 32 in turn; then count the claims until another tenant's first job."""
    count = 20_000 if bench.options.quick else 100_000
    tenants = [f"tenant:{number}" for number in range(TENANTS)]
    return {
        "benchmark": "lanes",
        "jobs": count,
        "lanes": LANES,
        "drain": {
            "floor": "the floor of drain.py: one lane, without a list of them",
            **bench.compare(
                "32 lanes",
                lambda: _drain(bench, [tenants[n % TENANTS] for n in range(count)]),
                lambda: _drain_one(bench, count),
                {"jobs_per_s": at_least(0.8)},
            ),
        },
        "idle_claim": {
            "floor": "the same statement with one lane",
            **bench.compare("idle", lambda: _idle(bench, LANES), lambda: _idle(bench, 1)),
        },
        "first_of_another": _claims_of_others(bench, tenants),
    }


def _drain(bench: Bench, tenants: Sequence[str]) -> Figures:
    _fill(bench, tenants)
    began = perf_counter()
    claimed = sum(len(rows) for rows in _claims(bench))
    took = perf_counter() - began
    work.check_left(bench)
    return {"jobs_per_s": claimed / took}


def _drain_one(bench: Bench, count: int) -> Figures:
    work.fill(bench, count)
    with floor.connect(bench.dsn) as connection:
        began = perf_counter()
        floor.drain(connection, count)
        took = perf_counter() - began
    return {"jobs_per_s": count / took}


def _claims_of_others(bench: Bench, tenants: Sequence[str]) -> Mapping[str, object]:
    """Return after how many claims each other tenant's first job is claimed."""
    large, *others = tenants
    _fill(bench, [large] * BEHIND + others)
    first: dict[str, int] = {}
    for number, rows in enumerate(_claims(bench), 1):
        for tenant in {bytes(row[2]).decode() for row in rows}:
            first.setdefault(tenant, number)
    waits = [first[f'"{tenant}"'] for tenant in others]
    return {
        "waiting_before": BEHIND,
        "other_tenants": len(others),
        "in_the_first_two_claims": sum(claim <= 2 for claim in waits),
        "in_the_lane_of_the_large_one": sum(_lane(t) == _lane(large) for t in others),
        "claims_at_most": max(waits),
    }


def _claims(bench: Bench) -> list[list[Row]]:
    """Claim and delete until none is left; return the rows of each claim."""
    marks: dict[int, object] = dict.fromkeys(range(LANES), "-infinity")
    claims: list[list[Row]] = []
    with floor.connect(bench.dsn) as connection:
        claim, delete = connection.cursor(binary=True), connection.cursor()
        while rows := claim.execute(_CLAIM, _from(marks, len(claims))).fetchall():
            marks |= {row[5]: row[4] for row in sorted(rows, key=itemgetter(4))}
            ids = f"{{{','.join([row[0] for row in rows])}}}"
            delete.execute(_DELETE, [ids, len(claims)])
            claims.append(rows)
    return claims


def _idle(bench: Bench, lanes: int) -> Figures:
    """Claim where nothing is due, as an idle worker does when it is notified."""
    bench.fresh()
    marks: dict[int, object] = dict.fromkeys(range(lanes), "-infinity")
    with floor.connect(bench.dsn) as connection:
        claim, waited = connection.cursor(binary=True), []
        for token in range(500):
            began = perf_counter()
            claim.execute(_CLAIM, _from(marks, token)).fetchall()
            waited.append((perf_counter() - began) * 1000)
    return {"p50_ms": percentile(waited, 0.5)}


def _from(marks: Mapping[int, object], token: int) -> dict[str, object]:
    share = -(-floor.BATCH // len(marks))
    return {"lanes": [*marks], "marks": [*marks.values()], "share": share, "token": token}


def _fill(bench: Bench, tenants: Sequence[str]) -> None:
    requests = [EnqueueRequest(QUEUE, "noop", t, priority=_lane(t)) for t in tenants]
    with Client(bench.dsn) as client:
        bench.fresh(lambda: client.bulk_enqueue(requests))


def _lane(tenant: str) -> int:
    return crc32(tenant.encode()) % LANES


if __name__ == "__main__":
    harness.main(main, __doc__)
