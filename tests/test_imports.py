"""What a program imports: what it asks for, and nothing that it does not use."""

import ast
import json
import subprocess
import sys
import threading
import typing
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import bgjob
from bgjob import AsyncClient, Client
from bgjob._running import do

ENQUEUES = """
from bgjob import Client, EnqueueRequest
with Client(sys.argv[1]) as client:
    client.enqueue(EnqueueRequest("q", "t", {"n": 1}))
    client.bulk_enqueue([EnqueueRequest("q", "t") for _ in range(600)])
"""

WORKS = """
from threading import Event
from bgjob import Client, Mux, Worker
ran = Event()
with Client(sys.argv[1]) as client, Worker(client, "q", Mux().register("t", lambda _: ran.set())):
    assert ran.wait(30)
"""

ASKS_ALL = """
from bgjob import Client
with Client(sys.argv[1]) as client:
    client.dlq.list(), client.jobs.list(), client.schedules.list(), client.limits.list()
    client.stats(), client.overview(), client.workers(), client.minutes(), client.doctor("horizon")
    client.explain(queue="q"), client.measure()
"""

QUESTIONS = {
    "_cli", "_diagnosis", "_explanation", "_preflight", "_triage", "cron", "dlq", "explanation",
    "ext", "jobs", "limits", "measurements", "schedule", "schedules", "sql", "testing", "timetable",
    "triage",
}  # fmt: skip
"""Modules that neither an enqueue nor a worker needs."""

WORKER = {"_engine", "_handlers", "_worker", "event", "minutes", "mux", "result", "stats", "worker"}


def imported(program: str, dsn: str = "") -> set[str]:
    """Run a program in an interpreter of its own; return what it has imported of bgjob."""
    names = "{name.split('.')[1] for name in sys.modules if name.startswith('bgjob.')}"
    code = f"import json, sys\n{program}\nprint(json.dumps(sorted({names})))"
    command = [sys.executable, "-c", code, dsn]
    ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=50)
    return set(json.loads(ended.stdout))


def test_an_import_of_the_package_alone_imports_no_module() -> None:
    assert imported("import bgjob") == set()


def test_a_program_that_enqueues_imports_no_worker_and_no_answer(dsn: str) -> None:
    found = imported(ENQUEUES, dsn)
    assert "client" in found
    assert found & (QUESTIONS | WORKER) == set()


def test_a_program_that_works_imports_no_answer(dsn: str) -> None:
    with Client(dsn) as client:
        client.enqueue(bgjob.EnqueueRequest("q", "t"))
    found = imported(WORKS, dsn)
    assert found >= WORKER
    assert found & QUESTIONS == set()


def test_a_program_that_asks_imports_what_it_asks(dsn: str) -> None:
    found = imported(ASKS_ALL, dsn)
    assert found >= {"_diagnosis", "_explanation", "dlq", "jobs", "limits", "timetable", "stats"}
    assert "_engine" not in found


def test_every_name_is_where_the_package_says_that_it_is() -> None:
    text = Path(bgjob.__file__).read_text("utf-8")
    written = {
        (node.module, alias.name)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bgjob.")
        for alias in node.names
    }
    read = {
        (f"bgjob.{module}", name)
        for module, names in bgjob._NAMES.items()
        for name in names.split()
    }
    assert read == written
    assert {name for _, name in read} | {"__version__"} == set(bgjob.__all__)
    for module, name in read:
        assert getattr(bgjob, name) is getattr(sys.modules[module], name)


def test_the_package_lists_its_names_before_they_are_imported() -> None:
    assert imported("import bgjob; assert set(bgjob.__all__) <= set(dir(bgjob))") == set()


def test_all_names_can_be_imported_at_once() -> None:
    assert imported("from bgjob import *; Worker, Client, Minutes, only") >= WORKER


def test_a_module_is_an_attribute_of_the_package_without_an_import_of_its_own() -> None:
    assert imported("import bgjob; bgjob.errors.SchemaError, bgjob.stats.Overview") == {
        "errors",
        "stats",
    }


@pytest.mark.parametrize("name", ["Clinet", "clinet", "_worker_", "__wrapped__"])
def test_a_name_that_the_package_does_not_have_is_an_attribute_error(name: str) -> None:
    with pytest.raises(AttributeError, match=f"module 'bgjob' has no attribute '{name}'"):
        getattr(bgjob, name)
    assert not hasattr(bgjob, name)


def test_a_module_that_misses_a_package_says_which() -> None:
    code = "import sys; sys.modules['orjson'] = None; import bgjob; bgjob.codec"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert "import of orjson halted" in ended.stderr


@pytest.mark.parametrize("cls", [Client, AsyncClient])
def test_calls_of_do_that_come_first_at_the_same_time_share_what_close_ends(
    cls: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = threading.Barrier(2)

    def made(*_: object) -> object:
        with suppress(threading.BrokenBarrierError):  # only one is made at a time
            both.wait(0.3)
        return object()

    monkeypatch.setattr(do, "Do", made)
    monkeypatch.setattr(do, "AsyncDo", made)
    client = cls("")
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(lambda _: client._do, range(2))
    assert first is second is client._do


@pytest.mark.parametrize("cls", [Client, AsyncClient])
def test_the_types_of_what_makes_a_client_and_what_it_enqueues_can_be_read(cls: Any) -> None:
    # Containers that inject dependencies read those of __init__.
    for function in (cls.__init__, cls.enqueue, cls.bulk_enqueue):
        assert typing.get_type_hints(function)["return"]
