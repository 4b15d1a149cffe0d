"""How long it takes to group a million dead jobs, to move some back, and to tell a failure."""

from collections.abc import Callable, Mapping
from functools import partial
from time import perf_counter

import harness
from figures import Figures, at_most, percentile
from harness import Bench

from bgjob import Client
from bgjob._failure import error_text, fingerprint

_CALLS = 5
_TOLD = 5000

# Of 40 groups one has three quarters of the jobs, and one a tenth.
_DEAD = """
    insert into bgjob_dead_job (
        job_id, queue, type, arg, attempt, last_error, priority, next_run_at, job_created_at,
        job_updated_at, moved_at, fingerprint
    )
    select 'dead-' || n, case when n %% 10 = 1 then 'reports' else 'mail' end, 'send',
        '{"order": 1}', 3,
        'ConnectionError: mail server ''mx-' || n || ''' is away' || repeat(
            e'\\n  at shop/mail.py:88 in send', 3
        ),
        0, now(), now(), now(), now() - (%(jobs)s - n) * interval '400 ms',
        case when n %% 4 < 3 then 1 when n %% 10 = 3 then 2 else 3 + n %% 38 end
    from generate_series(1, %(jobs)s) as n
"""

# As an operator would have to group them without fingerprints.
_BY_TEXT = r"""
    select type, regexp_replace(regexp_replace(split_part(left(last_error, 300), E'\n', 1),
        '''[^'']*''|"[^"]*"', '<>', 'g'), '\d+', '0', 'g'), count(*), min(id), max(id)
    from bgjob_dead_job group by 1, 2
"""


def main(bench: Bench) -> Mapping[str, object]:
    """Group them, beside their texts; move the largest group back, beside one requeue."""
    jobs = 100_000 if bench.options.quick else 1_000_000
    report: dict[str, object] = {
        "benchmark": "triage",
        "dead": jobs,
        "floor": "the texts, grouped by regular expressions; the first line of an error",
    }
    bench.fresh(lambda: bench.admin.execute(_DEAD, {"jobs": jobs}))
    bench.admin.execute("vacuum (analyze) bgjob_dead_job")
    with Client(bench.dsn) as client:
        report["groups"] = bench.compare(
            "groups",
            partial(_timed, client.dlq.groups, _CALLS),
            partial(_timed, partial(bench.admin.execute, _BY_TEXT), 1),
            {"median_ms": at_most(200, "median")},
        )
        since = client.dlq.list(limit=1)[0].moved_at
        for title, groups in (
            ("of_a_queue", partial(client.dlq.groups, queue="reports")),
            ("since", partial(client.dlq.groups, moved_after=since)),
        ):
            runs = bench.repeat(title, partial(_timed, groups, _CALLS))
            report[title] = {"median_ms": runs["median_ms"]}
        report["rest"] = _rest(client)
    report["failure"] = bench.compare("failure", _told, _first_lines)
    return report


def _timed(call: Callable[[], object], times: int) -> Figures:
    took = []
    for _ in range(times):
        began = perf_counter()
        call()
        took.append((perf_counter() - began) * 1000)
    return {"median_ms": percentile(took, 0.5)}


def _rest(client: Client) -> Figures:
    began = perf_counter()
    rest = client.dlq.rest(f"{2:012x}", rate=None)
    return {"jobs_per_s": rest.moved / (perf_counter() - began)}


def _raised() -> Exception:
    def send() -> None:
        raise ConnectionError("mail server 'mx-1' is away")

    try:
        send()
    except ConnectionError as error:
        return error
    raise AssertionError


def _told() -> Figures:
    error = _raised()
    began = perf_counter()
    for _ in range(_TOLD):
        error_text(error)
    middle = perf_counter()
    for _ in range(_TOLD):
        fingerprint("send", error)
    ended = perf_counter()
    return {
        "text_us": (middle - began) / _TOLD * 1e6,
        "fingerprint_us": (ended - middle) / _TOLD * 1e6,
    }


def _first_lines() -> Figures:
    error = _raised()
    began = perf_counter()
    for _ in range(_TOLD):
        f"{type(error).__name__}: {error}".replace("\0", "\ufffd").encode("utf-8", "replace")
    return {"text_us": (perf_counter() - began) / _TOLD * 1e6}


if __name__ == "__main__":
    harness.main(main, __doc__)
