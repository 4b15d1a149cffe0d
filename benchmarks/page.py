"""How long each page of `bgjob web` takes over 1,000,000 live and as many dead jobs."""

import asyncio
from collections.abc import Mapping
from functools import partial
from time import perf_counter

import harness
import httpx
import overview
from figures import Figures, at_most, figure, percentile
from harness import Bench

from bgjob.ext.web import Access, create_app

_PAGES = {
    "overview": "/",
    "overview_part": "/?part=queues",
    "queue": "/queues/mail",
    "jobs": "/jobs",
    "jobs_of_a_state": "/jobs?queue=mail&state=due",
    "jobs_by_prefix": "/jobs?id=job-",
    "jobs_by_error": "/jobs?error=no+job+has+this",
    "jobs_by_type": "/jobs?type=nothing",
    "job_due": "/jobs/job-777777",
    "job_that_waits_for_a_key": "/jobs/job-777710",
    "no_job": "/jobs/nothing",
    "dead": "/dead",
    "dead_by_error": "/dead?error=no+job+has+this",
    "schedules": "/schedules",
    "workers": "/workers",
    "doctor": "/doctor?run=1",
}
_CALLS = 10


def main(bench: Bench) -> Mapping[str, object]:
    """Ask for each page several times, without a network in between."""
    jobs = 100_000 if bench.options.quick else 1_000_000
    bench.fresh(partial(overview.fill, bench, jobs, 3))
    bench.admin.execute("vacuum (analyze) bgjob_dead_job, bgjob_exclusive")
    runs = bench.repeat("page", lambda: asyncio.run(_run(bench)))
    return {
        "benchmark": "page",
        "jobs": jobs,
        "dead": jobs,
        "calls": _CALLS,
        **{
            name: figure(took, goal=at_most(2000 if "first" in name else 500, "median"))
            for name, took in runs.items()
        },
    }


async def _run(bench: Bench) -> Figures:
    app = create_app(bench.dsn, access=lambda _: Access("benchmark"))
    transport = httpx.ASGITransport(app)
    figures = {}
    async with httpx.AsyncClient(transport=transport, base_url="http://page", timeout=60) as client:
        for name, path in _PAGES.items():
            took = []
            for _ in range(_CALLS):
                began = perf_counter()
                answer = await client.get(path, headers={"accept": "text/html"})
                took.append((perf_counter() - began) * 1000)
                answer.raise_for_status()
            figures[f"{name}_first_ms"] = took[0]
            figures[f"{name}_ms"] = percentile(took, 0.5)
    return figures


if __name__ == "__main__":
    harness.main(main, __doc__)
