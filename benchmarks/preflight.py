"""How long a preflight takes over a million jobs, and whether its memory stays constant."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import harness
import work
from figures import Figures, at_least, at_most, figure
from harness import Bench
from memory import resident
from work import QUEUE, Child

from bgjob import JsonCodec, Mux, RawCodec
from bgjob.preflight import check


@dataclass
class Confirm:
    """The payload of half of the jobs; the others are JSON without a class."""

    job_type: ClassVar[str] = "confirm"
    order: int
    to: str
    lines: list[int] = field(default_factory=list)


_FILL = """
    insert into bgjob_job (id, queue, type, arg)
    select gen_random_uuid(), %s, case when n %% 2 = 0 then 'confirm' else 'json' end,
        convert_to(format('{"order":%%s,"to":"user%%s@example.com","lines":[1,2,3,4]}', n, n), 'UTF8')
    from generate_series(1, %s) n
"""

_FILL_DEAD = """
    insert into bgjob_dead_job (job_id, queue, type, arg, attempt, last_error, priority,
        next_run_at, job_created_at, job_updated_at)
    select n, %s, 'confirm', '{}', 3,
        case when n %% 10 = 0 then 'PayloadError: no' else 'ValueError: no' end, 0,
        now(), now(), now()
    from generate_series(1, %s) n
"""


def main(bench: Bench) -> Mapping[str, object]:
    """Count, read and decode the same jobs, in a new process each time."""
    jobs = 100_000 if bench.options.quick else 1_000_000
    bench.fresh(lambda: _fill(bench, jobs))
    curves: list[list[float]] = []
    runs = bench.repeat("preflight", lambda: _run(bench, jobs, curves))
    return {
        "benchmark": "preflight",
        "jobs": jobs,
        "counted": figure(runs["counted_per_s"]),
        "read": figure(runs["read_per_s"]),
        "sampled": figure(runs["sampled_per_s"]),
        "decoded": {
            "floor": "the same payloads, read and not decoded",
            "jobs_per_s": figure(runs["decoded_per_s"], runs["read_per_s"], at_least(0.4)),
        },
        "memory": {
            "floor": "after the second tenth",
            "mib_of_last_tenth": figure(
                runs["mib_of_last_tenth"], runs["mib_of_second_tenth"], at_most(1.05)
            ),
        },
        "mib_by_tenth": curves,
    }


def _fill(bench: Bench, jobs: int) -> None:
    bench.admin.execute(_FILL, [QUEUE, jobs])
    bench.admin.execute(_FILL_DEAD, [QUEUE, jobs // 10])


def _run(bench: Bench, jobs: int, curves: list[list[float]]) -> Figures:
    rates = {
        how: jobs / Child(_seconds, bench.dsn, jobs, how).result(10 * work.PATIENCE)
        for how in ("counted", "read", "sampled", "decoded")
    }
    curve = Child(_resident_by_tenth, bench.dsn, jobs).result(10 * work.PATIENCE)
    curves.append([round(size, 1) for size in curve])
    return {
        **{f"{how}_per_s": rate for how, rate in rates.items()},
        "mib_of_second_tenth": curve[1],
        "mib_of_last_tenth": curve[-1],
    }


def _never(_: Any) -> None:
    raise RuntimeError("a preflight runs no handler")


def _seconds(dsn: str, jobs: int, how: str) -> float:
    mux = Mux()
    match how:
        case "counted":
            mux.register("confirm", _never).register("json", _never)
        case "read":
            mux.register("confirm", _never, codec=RawCodec())
            mux.register("json", _never, codec=RawCodec())
        case _:
            mux.register(Confirm, _never).register("json", _never, codec=JsonCodec())
    report = check(dsn, mux, sample=1000 if how == "sampled" else None)
    if (report.jobs, report.lost) != (jobs, 0):
        raise RuntimeError(f"{report.jobs} of {jobs} jobs, of which {report.lost} do not fit")
    return report.seconds


def _resident_by_tenth(dsn: str, jobs: int) -> list[float]:
    """Decode all jobs; return the resident memory after each tenth."""
    curve: list[float] = []
    seen = 0

    class Counting(JsonCodec):
        def decode(self, data: bytes, /) -> Any:
            nonlocal seen
            seen += 1
            if seen % (jobs // 10) == 0:
                curve.append(resident())
            return super().decode(data)

    mux = Mux().register("confirm", _never, codec=Counting())
    check(dsn, mux.register("json", _never, codec=Counting()))
    return curve


if __name__ == "__main__":
    harness.main(main, __doc__)
