"""How long an import of bgjob takes, what it imports, and how soon a worker starts a job."""

import json
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from time import monotonic
from typing import Any

import harness
import work
from figures import Figures, at_most, figure
from harness import Bench

from bgjob import Client, EnqueueRequest

_RUNTIME = "import orjson, psycopg, psycopg_pool, typing_extensions"

_PROGRAMS = {
    "enqueues": "from bgjob import Client, EnqueueRequest",
    "works": "from bgjob import Client, Mux, Worker",
}
"""What a program imports that only enqueues, and one with a worker."""

# Each one is the whole program of a new interpreter.

_IMPORT = """
import sys
from time import perf_counter
before = set(sys.modules)
began = perf_counter()
{}
took = perf_counter() - began
import json
new = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print(json.dumps([took, sorted(new - sys.stdlib_module_names)]))
"""

_FIRST_JOB = """
import sys
from threading import Event
from time import monotonic
from bgjob import Client, Mux, Worker
started = []
ran = Event()
def handler(job):
    started.append(monotonic())
    ran.set()
with Client(sys.argv[1]) as client:
    worker = Worker(client, "startup", Mux().register("noop", handler))
    began = monotonic()
    with worker:
        ran.wait(30)
import json
print(json.dumps([began, started]))
"""


def main(bench: Bench) -> Mapping[str, object]:
    """Start new interpreters, one after the other."""
    everything = set(_imported("from bgjob import *")[1])
    optional = sorted(everything - set(_imported(_RUNTIME)[1]) - {"bgjob"})
    first = bench.repeat("first job", lambda: _first_job(bench))
    return {
        "benchmark": "startup",
        **{
            name: {
                "floor": _RUNTIME,
                **bench.compare(name, partial(_took, statement), partial(_took, _RUNTIME)),
            }
            for name, statement in _PROGRAMS.items()
        },
        "optional_packages": {
            "imported": figure([len(optional)], goal=at_most(0, "median")),
            "names": optional,
        },
        "first_job": {name: figure(values) for name, values in first.items()},
    }


def _fresh_interpreter(program: str, *args: str) -> Any:
    command = [sys.executable, "-c", program, *args]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    return json.loads(done.stdout)


def _took(statement: str) -> Figures:
    return {"ms": _imported(statement)[0] * 1000}


def _imported(statement: str) -> tuple[float, list[str]]:
    """Return the seconds of an import, and what it loaded beyond the standard library."""
    seconds, packages = _fresh_interpreter(_IMPORT.format(statement))
    return seconds, packages


def _first_job(bench: Bench) -> Figures:
    bench.fresh()
    with Client(bench.dsn) as client:
        client.enqueue(EnqueueRequest("startup", "noop"))
    began = monotonic()  # one clock for all processes of a host
    run_at, started = _fresh_interpreter(_FIRST_JOB, bench.dsn)
    if len(started) != 1:
        raise RuntimeError(f"one job was to run once, and had {len(started)} runs")
    work.check_left(bench)
    return {
        "ms_from_run": (started[0] - run_at) * 1000,
        "ms_from_process_start": (started[0] - began) * 1000,
    }


if __name__ == "__main__":
    harness.main(main, __doc__)
