"""The fixtures of bgjob.ext.pytest_plugin serve a user's project."""

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from typing import TypeAlias

import pytest

import bgjob

SHOP = """
from bgjob import Client, EnqueueRequest, Job, Mux

mux = Mux()


@mux.handler("confirm", transactional=True)
def confirm(job: Job, conn) -> None:
    conn.execute("update orders set confirmed = true where id = %s", [job.json()["order"]])


def order(client: Client, conn, id: str) -> None:
    conn.execute("insert into orders (id) values (%s)", [id])
    client.enqueue(EnqueueRequest("mail", "confirm", {"order": id}), conn=conn)
"""

CONFTEST = """
import psycopg
import pytest

from bgjob.schema import init_sql

pytest_plugins = ["bgjob.ext.pytest_plugin"]


@pytest.fixture(scope="session")
def bgjob_migrate():
    def migrate(dsn):
        with psycopg.connect(dsn) as conn:
            conn.execute(init_sql())
            conn.execute("create table orders (id text, confirmed bool default false)")

    return migrate
"""

TESTS = '''
import subprocess
import sys

import pytest
import shop
from bgjob import EnqueueRequest, JobCompleted, Mux, Worker
from bgjob.testing import RecordingObserver, assert_enqueued, assert_not_enqueued, drain


def test_an_order_is_confirmed(bgjob_client, bgjob_conn):
    shop.order(bgjob_client, bgjob_conn, "order-2")
    drain(bgjob_conn, "mail", shop.mux)
    assert bgjob_conn.execute("select confirmed from orders").fetchall() == [(True,)]


def test_nothing_is_left_of_an_order(bgjob_client, bgjob_conn):
    shop.order(bgjob_client, bgjob_conn, "order-2")
    assert_enqueued(bgjob_conn, "confirm", arg={"order": "order-2"}, count=1)


@pytest.mark.parametrize("number", range(2))
def test_a_worker_runs(bgjob_client, bgjob_conn, number):
    assert_not_enqueued(bgjob_client)
    heard = RecordingObserver()
    with Worker(bgjob_client, "q", Mux().register("t", lambda _: None), observer=heard):
        bgjob_client.enqueue(EnqueueRequest("q", "t", id="same"))
        heard.wait_for(JobCompleted, id="same")


def test_the_server_is_one_for_the_session(bgjob_server, bgjob_dsn):
    assert "bgjob_test_" in bgjob_dsn and bgjob_server.pid
    with open("servers", "a") as file:
        file.write(f"{bgjob_server.pid}\\n")


def test_a_failure_is_the_handlers(bgjob_dsn):
    """Not part of the suite: run by name."""
    from bgjob import Client

    mux = Mux()

    @mux.handler("bad")
    def bad(job):
        raise ValueError("from the handler")

    with Client(bgjob_dsn) as client:
        client.enqueue(EnqueueRequest("q", "bad", id="j"))
        drain(client, "q", mux)
'''


Run: TypeAlias = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def project(tmp_path: Path) -> Run:
    """Return a function that runs pytest in a user's project."""
    (tmp_path / "shop.py").write_text(SHOP)
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_shop.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    places = [str(Path(bgjob.__file__).parents[1]), str(tmp_path), os.environ.get("PYTHONPATH")]
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, places))

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *args],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=150,
            check=False,
        )

    return run


@pytest.mark.timeout(180)  # servers start
def test_the_fixtures_serve_a_users_project(project: Run, tmp_path: Path) -> None:
    run = project("-n", "0")
    assert run.returncode == 1, run.stdout + run.stderr
    assert "5 passed" in run.stdout and "1 failed" in run.stdout
    [pid] = (tmp_path / "servers").read_text().split()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)
    # The one that fails shows the handler's line and the job, and nothing of ours.
    assert '>       raise ValueError("from the handler")' in run.stdout
    assert "of job 'j' of type 'bad', attempt 1" in run.stdout
    assert "def _steps" not in run.stdout


@pytest.mark.timeout(180)  # servers start
def test_the_fixtures_serve_several_processes(project: Run, tmp_path: Path) -> None:
    run = project("-n", "2", "--deselect", "test_shop.py::test_a_failure_is_the_handlers")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "5 passed" in run.stdout


def test_two_containers_that_share_a_server_never_name_a_database_alike(empty_dsn: str) -> None:
    # In two containers the process ids are the same, too.
    containers = []
    for _ in range(2):
        spec = find_spec("bgjob.ext.pytest_plugin")
        assert spec is not None and spec.loader is not None
        containers.append(module_from_spec(spec))
        spec.loader.exec_module(containers[-1])
    with ExitStack() as stack:
        names = [
            stack.enter_context(container._database(empty_dsn, "template1"))[0]
            for container in containers
        ]
        assert len(set(names)) == 2
