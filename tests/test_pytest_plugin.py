"""The fixtures of bgjob.ext.pytest_plugin serve a user's project."""

import os
import re
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec, module_from_spec
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict
from support.nursery import fork
from support.roles import Roles

import bgjob
from bgjob.ext import pytest_plugin

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
import os
from pathlib import Path

import psycopg
import pytest

from bgjob.ext import embedded
from bgjob.schema import init_sql

embedded._bin_dir_of_wheel = lambda: Path(os.environ["PROGRAMS"])  # with a quicker initdb

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


@dataclass
class Outcome:
    """How a run of pytest ended."""

    status: int
    text: str

    def counts(self) -> dict[str, int]:
        """Return the numbers of its last line: of passed, failed and errors."""
        last = self.text.rstrip().splitlines()[-1]
        found = re.findall(r"(\d+) (passed|failed|error)", last)
        return {name: int(number) for number, name in found}


@dataclass
class Project:
    """A user's project, in which pytest runs."""

    folder: Path

    def write(self, **files: str) -> None:
        for name, text in files.items():
            (self.folder / f"{name}.py").write_text(text)

    def run(self, *args: str, **variables: str) -> Outcome:
        places = [str(Path(bgjob.__file__).parents[1]), str(self.folder)]
        others = ("PYTEST_", "BGJOB_", "CI", "BUILD_NUMBER")  # in CI it tells each error twice
        env = {k: v for k, v in os.environ.items() if not k.startswith(others)}
        env |= {"PYTHONPATH": os.pathsep.join(places), **variables}
        output = self.folder / "output"
        with output.open("wb") as file:
            options = ("-q", "-p", "no:cacheprovider")
            process = fork("pytest", *options, *args, env=env, output=file, cwd=self.folder)
        assert process.stdin is not None
        process.stdin.close()
        return Outcome(process.wait(150), output.read_text())


INI = """
[pytest]
filterwarnings =
    error
    ignore:The configuration option:pytest.PytestDeprecationWarning
"""


@pytest.fixture
def project(tmp_path: Path) -> Project:
    (tmp_path / "pytest.ini").write_text(INI)
    project = Project(tmp_path)
    project.write(conftest='pytest_plugins = ["bgjob.ext.pytest_plugin"]')
    return project


@pytest.fixture
def shop_project(project: Project, quick_bin_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.setenv("PROGRAMS", str(quick_bin_dir))
    project.write(shop=SHOP, conftest=CONFTEST, test_shop=TESTS)
    return project


@pytest.mark.timeout(180)  # servers start
def test_the_fixtures_serve_a_users_project(shop_project: Project, tmp_path: Path) -> None:
    run = shop_project.run("-n", "0")
    assert run.counts() == {"passed": 5, "failed": 1}, run.text
    [pid] = (tmp_path / "servers").read_text().split()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)
    # The one that fails shows the handler's line and the job, and nothing of ours.
    assert '>       raise ValueError("from the handler")' in run.text
    assert "of job 'j' of type 'bad', attempt 1" in run.text
    assert "def _steps" not in run.text


@pytest.mark.timeout(180)  # servers start
def test_the_fixtures_serve_several_processes(shop_project: Project) -> None:
    run = shop_project.run("-n", "2", "--deselect", "test_shop.py::test_a_failure_is_the_handlers")
    assert run.counts() == {"passed": 5}, run.text


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


# -- the server ---------------------------------------------------------------------------------

NAMED = """
from psycopg.conninfo import conninfo_to_dict


def test_the_server_is_the_one_that_was_named(bgjob_dsn, bgjob_server, bgjob_conn):
    assert "bgjob_test_" in bgjob_dsn
    assert conninfo_to_dict(bgjob_server.dsn)["dbname"] == "WANTED"
    assert bgjob_conn.execute("select count(*) from bgjob_job").fetchone() == (0,)
"""


def test_the_server_is_named_by_an_option_the_environment_or_the_ini_file(
    project: Project, dsn: str
) -> None:
    project.write(test_named=NAMED.replace("WANTED", str(conninfo_to_dict(dsn)["dbname"])))
    ini = "-o", f"bgjob_dsn={dsn}"
    assert project.run(*ini).status == 0
    assert project.run("--bgjob-dsn", dsn, BGJOB_TEST_DSN="nonsense").status == 0
    run = project.run(*ini, BGJOB_TEST_DSN="nonsense")
    assert run.counts() == {"error": 1}
    assert "BGJOB_TEST_DSN: this is not a connection string" in run.text


def test_the_server_is_in_memory_if_there_is_room_and_no_other_place_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pytest_plugin, "_MEMORY", tmp_path)
    monkeypatch.setattr(pytest_plugin, "_ROOM", 0)
    monkeypatch.setenv("TMPDIR", "/var/tmp")
    assert pytest_plugin._memory() is None
    monkeypatch.delenv("TMPDIR")
    assert pytest_plugin._memory() == tmp_path
    monkeypatch.setattr(pytest_plugin, "_ROOM", 1 << 60)
    assert pytest_plugin._memory() is None
    monkeypatch.setattr(pytest_plugin, "_MEMORY", tmp_path / "missing")
    assert pytest_plugin._memory() is None


def test_a_role_that_may_not_create_databases_is_told_the_remedy(roles: Roles) -> None:
    with pytest.raises(psycopg.errors.InsufficientPrivilege) as caught:
        pytest_plugin._database(roles.login(), "template1").__enter__()
    assert "alter role … createdb" in caught.value.__notes__[0]


# -- coroutines -----------------------------------------------------------------------------------

MIGRATES_ASYNC = """
import psycopg
import pytest

from bgjob.schema import init_sql

pytest_plugins = ["bgjob.ext.pytest_plugin"]
left_open = []  # as by the pool of an engine


@pytest.fixture(scope="session")
def bgjob_migrate():
    async def migrate(dsn):
        conn = await psycopg.AsyncConnection.connect(dsn)
        left_open.append(conn)
        await conn.execute(init_sql())
        await conn.execute("create table orders (id text)")
        await conn.commit()

    yield migrate
    left_open[0].pgconn.finish()
"""

ASYNCIO = """
import asyncio

import pytest
import pytest_asyncio

from bgjob import AsyncWorker, EnqueueRequest, JobCompleted, Mux
from bgjob.testing import (
    RecordingObserver,
    aassert_enqueued,
    aassert_not_enqueued,
    adrain,
    assert_enqueued,
    assert_not_enqueued,
)

pytestmark = [pytest.mark.asyncio]
mux = Mux()


@mux.handler("t", transactional=True)
async def handle(job, conn):
    await conn.execute("insert into orders (id) values (%s)", [job.id])


@pytest.fixture
def plain(bgjob_client):
    return bgjob_client.enqueue(EnqueueRequest("q", "t", id="plain"))


@pytest_asyncio.fixture
async def order(bgjob_async_client):
    yield await bgjob_async_client.enqueue(EnqueueRequest("q", "t", id="order"))
    await aassert_not_enqueued(bgjob_async_client)


@pytest.mark.parametrize("number", range(2))
async def test_a_worker_runs_the_jobs_of_fixtures_of_both_kinds(
    bgjob_async_client, bgjob_conn, plain, order, number
):
    heard = RecordingObserver()
    async with AsyncWorker(bgjob_async_client, "q", mux, observer=heard):
        await asyncio.to_thread(heard.wait_for, JobCompleted, count=2)
    assert sorted(bgjob_conn.execute("select id from orders")) == [("order",), ("plain",)]


@pytest.mark.parametrize("number", range(2))
async def test_a_transaction_ends_with_its_test(bgjob_async_client, bgjob_async_conn, number):
    await aassert_not_enqueued(bgjob_async_client)
    request = EnqueueRequest("q", "t", id="uncommitted")
    await bgjob_async_client.enqueue(request, conn=bgjob_async_conn)
    await aassert_enqueued(bgjob_async_conn, count=1)
    assert [job.id for job, _ in await adrain(bgjob_async_conn, "q", mux)] == ["uncommitted"]
    found = await bgjob_async_conn.execute("select id from orders")
    assert await found.fetchall() == [("uncommitted",)]


async def test_a_fixture_may_be_asked_for_in_a_loop(request, bgjob_dsn):
    client = request.getfixturevalue("bgjob_async_client")
    conn = request.getfixturevalue("bgjob_async_conn")
    await client.enqueue(EnqueueRequest("q", "t"), conn=conn)
    await aassert_enqueued(conn, count=1)


if not pytestmark:  # in auto mode nothing has to be marked

    def test_a_plain_test_has_what_an_async_fixture_did(order, bgjob_client, bgjob_conn):
        assert_enqueued(bgjob_client, id=order)
        bgjob_conn.execute("delete from bgjob_job")
        bgjob_conn.commit()
"""


@pytest.mark.parametrize("mode", ["strict", "auto"])
def test_clients_serve_fixtures_and_tests_of_both_kinds_under_pytest_asyncio(
    project: Project, dsn: str, mode: str
) -> None:
    tests = ASYNCIO
    if mode == "auto":
        tests = tests.replace("[pytest.mark.asyncio]", "[]")
        tests = tests.replace("@pytest_asyncio.fixture", "@pytest.fixture")
    project.write(conftest=MIGRATES_ASYNC, test_async=tests)
    run = project.run("-o", f"asyncio_mode={mode}", BGJOB_TEST_DSN=dsn)
    assert run.counts() == {"passed": 5 if mode == "strict" else 6}, run.text


ANYIO = """
import pytest

from bgjob import EnqueueRequest, Mux
from bgjob.testing import adrain

pytest_plugins = ["bgjob.ext.pytest_plugin"]  # when pytest has read its options
pytestmark = pytest.mark.anyio


@pytest.fixture
async def order(bgjob_async_client):
    return await bgjob_async_client.enqueue(EnqueueRequest("q", "t"))


async def test_a_job_runs(bgjob_async_client, order):
    mux = Mux().register("t", lambda _: None)
    assert [job.id for job, _ in await adrain(bgjob_async_client, "q", mux)] == [order]


async def test_a_transaction_is_there(bgjob_async_client, bgjob_async_conn):
    await bgjob_async_client.enqueue(EnqueueRequest("q", "t"), conn=bgjob_async_conn)


async def test_a_plain_client_is_there(bgjob_client, anyio_backend_name):
    bgjob_client.enqueue(EnqueueRequest("q", "t"))
"""


def test_under_anyio_clients_serve_asyncio_and_trio_is_told_what_to_do(
    project: Project, dsn: str
) -> None:
    project.write(conftest="", test_anyio=ANYIO)
    run = project.run("-k", "asyncio and not uvloop or trio", BGJOB_TEST_DSN=dsn)
    assert run.counts() == {"passed": 4, "error": 2}, run.text
    assert run.text.count("work on asyncio only, not on trio: run the test with any") == 2


# -- pytest-django ------------------------------------------------------------------------------------

SETTINGS = """
import os

from psycopg.conninfo import conninfo_to_dict

server = conninfo_to_dict(os.environ["BGJOB_TEST_DSN"])
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": os.environ["NAME"],
        "USER": server["user"],
        "HOST": server["host"],
        "PORT": server["port"],
    },
    "other": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"},
}
INSTALLED_APPS = ["orders"]
SECRET_KEY = "secret"
USE_TZ = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
"""

ORDERS = """
from django.db import connection, models

import bgjob.sql
from bgjob import EnqueueRequest, Mux

mux = Mux()


class Order(models.Model):
    confirmed = models.BooleanField(default=False)

    class Meta:
        app_label = "orders"


@mux.handler("confirm", transactional=True)
def confirm(job, conn):
    conn.execute("update orders_order set confirmed = true where id = %s", [job.json()["order"]])


def place():
    order = Order.objects.create()
    request = EnqueueRequest("mail", "confirm", {"order": order.id}, id="order")
    with connection.cursor() as cursor:
        cursor.execute(*bgjob.sql.enqueue(request))
    return order
"""

DJANGO = """
import pytest
from django.db import transaction
from django.test import TestCase, TransactionTestCase
from orders.models import Order, mux, place

from bgjob import AsyncWorker, EnqueueRequest, JobCompleted, Mux, Worker
from bgjob.testing import RecordingObserver, assert_enqueued, assert_not_enqueued, drain


@pytest.mark.parametrize("number", range(2))
def test_jobs_of_the_tests_transaction_run_in_it(bgjob_conn, db, number):
    assert_not_enqueued(bgjob_conn)
    order = place()
    assert_enqueued(bgjob_conn, "confirm", arg={"order": order.id}, count=1)
    drain(bgjob_conn, "mail", mux)
    assert Order.objects.get().confirmed


@pytest.mark.django_db
def test_what_connects_elsewhere_is_refused(bgjob_client):
    pass


@pytest.mark.parametrize("number", range(2))
@pytest.mark.django_db(transaction=True)
def test_a_worker_runs_committed_jobs(bgjob_client, bgjob_conn, number):
    assert_not_enqueued(bgjob_conn)
    with transaction.atomic():
        place()
    heard = RecordingObserver()
    with Worker(bgjob_client, "mail", mux, observer=heard):
        heard.wait_for(JobCompleted, id="order")
    assert Order.objects.get().confirmed
    bgjob_client.enqueue(EnqueueRequest("mail", "left over", id="order"))


@pytest.mark.asyncio
async def test_a_coroutine_has_a_client_of_djangos_database(transactional_db, bgjob_async_client):
    assert await bgjob_async_client.enqueue(EnqueueRequest("q", "t", id="order"))


class OrdersTest(TestCase):
    @pytest.fixture(autouse=True)
    def _fixtures(self, bgjob_conn):
        self.conn = bgjob_conn

    def test_jobs_run_in_the_transaction(self):
        place()
        assert len(drain(self.conn, "mail", mux)) == 1
        assert Order.objects.get().confirmed

    def test_nothing_is_left(self):
        assert_not_enqueued(self.conn)
        place()


class CommittedOrdersTest(TransactionTestCase):
    @pytest.fixture(autouse=True)
    def _fixtures(self, bgjob_client):
        self.jobs = bgjob_client

    def test_jobs_are_committed(self):
        assert_not_enqueued(self.jobs)
        place()
        assert len(drain(self.jobs, "mail", mux)) == 1


@pytest.mark.django_db(databases=["other"])
def test_a_test_of_another_database_of_django_has_one_of_its_own(bgjob_dsn):
    assert "bgjob_test_" in bgjob_dsn


def test_a_test_without_djangos_database_has_one_of_its_own(bgjob_dsn, bgjob_client):
    assert "bgjob_test_" in bgjob_dsn
    assert_not_enqueued(bgjob_client)
"""


def test_jobs_are_in_the_database_of_pytest_django_where_a_test_uses_it(
    project: Project, dsn: str, conn: psycopg.Connection
) -> None:
    name = f"django_{conninfo_to_dict(dsn)['dbname']}"
    (project.folder / "orders").mkdir()
    project.write(
        **{
            "settings": SETTINGS,
            "test_django": DJANGO,
            "orders/__init__": "",
            "orders/models": ORDERS,
        }
    )
    environment = {"BGJOB_TEST_DSN": dsn, "DJANGO_SETTINGS_MODULE": "settings", "NAME": name}
    run = project.run("-n", "1", **environment)
    assert run.counts() == {"passed": 10, "error": 1}, run.text
    assert "this test runs in a transaction of Django's, and no other connection" in run.text
    left = conn.execute("select datname from pg_database where datname like %s", [f"%{name}%"])
    assert left.fetchall() == []
