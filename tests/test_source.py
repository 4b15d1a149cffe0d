"""Functions that give a client and its workers the connection parameters, and pools that have them."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import psycopg
import pytest
from conftest import MIGRATION
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import DictRow
from psycopg_pool import AsyncConnectionPool, ConnectionPool
from sqlalchemy.orm import sessionmaker
from support.clients import Colour
from support.waiting import NEVER, eventually
from support.workers import Launcher, Recorder

from bgjob import AsyncClient, Client, EnqueueRequest, Job, Mux, Worker
from bgjob._postgres.connection import SourceError
from bgjob._sql.server import server as version_of_server
from bgjob.ext.embedded import EmbeddedServer
from bgjob.ext.web.database import Reader, parameters_of
from bgjob.testing import adrain, drain

REQUEST = EnqueueRequest("q", "t")


def nothing(job: Job) -> None: ...


def in_transaction(job: Job, conn: psycopg.Connection) -> None:
    conn.execute("select 1")


async def in_async_transaction(job: Job, conn: psycopg.AsyncConnection) -> None:
    await conn.execute("select 1")


def handlers(*, is_async: bool = False) -> Mux:
    if is_async:
        return Mux().register("t", in_async_transaction, transactional=True)
    return Mux().register("t", in_transaction, transactional=True)


class Login:
    """A role whose password changes, and a function that knows the current one or not."""

    def __init__(self, dsn: str, name: str) -> None:
        self.name = name
        self.conn = psycopg.connect(dsn, autocommit=True)
        self.execute("create role {name} superuser login password {password}", password="first")
        self.parameters = {**conninfo_to_dict(dsn), "user": name, "password": "first"}
        self.asked = 0

    def execute(self, statement: Any, **values: str) -> None:
        names = {"name": sql.Identifier(self.name)}
        self.conn.execute(sql.SQL(statement).format(**names, **values))

    def rotate(self) -> None:
        """Change the password, and end the sessions that were opened with the old one."""
        self.execute("alter role {name} password {password}", password="second")
        self.conn.execute(
            "select pg_terminate_backend(pid, 5000) from pg_stat_activity where usename = %s",
            [self.name],
        )

    def learn(self) -> None:
        self.parameters["password"] = "second"

    def __call__(self) -> dict[str, Any]:
        self.asked += 1
        return dict(self.parameters)

    async def coroutine(self) -> dict[str, Any]:
        await asyncio.sleep(0)
        return self()

    def close(self) -> None:
        self.conn.close()


@pytest.fixture(scope="module")
def guarded(quick_bin_dir: Path) -> Iterator[str]:
    """The DSN of a server that asks every role but postgres for a password."""
    with EmbeddedServer(bin_dir=quick_bin_dir, settings={"fsync": "off"}) as server:
        hba = server.data_dir / "pg_hba.conf"
        hba.write_text("local all postgres trust\nlocal all all scram-sha-256\n")
        with psycopg.connect(server.dsn, autocommit=True) as conn:
            conn.execute("select pg_reload_conf()")
            conn.execute(MIGRATION.read_bytes())
        yield server.dsn


@pytest.fixture(params=[False, True], ids=["Client", "AsyncClient"])
def is_async(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def login(guarded: str, request: pytest.FixtureRequest) -> Iterator[Login]:
    with closing(
        Login(guarded, f"app_{request.node.callspec.id}_{request.node.name[7:15]}")
    ) as login:
        yield login


@pytest.mark.both_colours
def test_a_worker_and_a_client_come_back_after_their_password_was_rotated(
    login: Login, guarded: str, is_async: bool
) -> None:
    source: Any = login.coroutine if is_async else login
    observer = Recorder()
    with (
        closing(Launcher(guarded, is_async=is_async)) as launcher,
        closing(Colour(guarded, is_async=is_async)) as colour,
    ):
        client = colour.client(source)
        launcher.start(
            handlers(is_async=is_async), dsn=source, observer=observer, poll_interval=NEVER
        )
        client.enqueue(REQUEST)
        observer.wait_for("completed")
        assert not observer.of("error")

        login.rotate()
        observer.wait_for("error", times=2)
        assert any("password authentication failed" in str(e[1]) for e in observer.of("error"))
        login.learn()
        client.enqueue(EnqueueRequest("q", "t"))
        observer.wait_for("completed", times=2)


@pytest.mark.both_colours
def test_a_worker_calls_the_functions_of_a_pool(login: Login, guarded: str, is_async: bool) -> None:
    observer = Recorder()
    login.rotate()
    login.learn()
    kwargs: Any = login.coroutine if is_async else login
    pool: Any = AsyncConnectionPool if is_async else ConnectionPool
    with closing(Launcher(guarded, is_async=is_async)) as launcher:
        source = pool(lambda: "application_name=of_a_pool", kwargs=kwargs, open=False)
        launcher.start(handlers(is_async=is_async), dsn=source, observer=observer)
        launcher.enqueue("1")
        observer.wait_for("completed")
        names = login.conn.execute(
            "select application_name from pg_stat_activity where usename = %s", [login.name]
        ).fetchall()
        assert len(names) == 2  # the worker's session, and the handler's
        assert ("of_a_pool",) in names


class Marked(psycopg.Connection[Any]):
    pass


def test_a_worker_refuses_a_pool_with_a_connection_class_of_its_own(dsn: str) -> None:
    with ConnectionPool(dsn, connection_class=Marked, min_size=1, open=True) as pool:
        client = Client(pool)
        client.enqueue(REQUEST)
        with pytest.raises(TypeError, match="connection_class Marked: give the worker's Client a"):
            Worker(client, "q", Mux().register("t", nothing)).run()
    with (
        ConnectionPool(dsn, connection_class=psycopg.Connection[DictRow], open=True) as typed,
        Worker(Client(typed), "q", handlers(), observer=(observer := Recorder())),
    ):
        observer.wait_for("completed")


def test_jobs_are_run_and_read_with_parameters_from_a_function(dsn: str) -> None:
    def source() -> str:
        parts = conninfo_to_dict(dsn)
        return f"postgresql+psycopg://{parts.pop('user')}@/{parts.pop('dbname')}?{urlencode(parts)}"

    with Client(source) as client:
        client.enqueue(REQUEST)
        client.do("q", handlers())
        client.enqueue(REQUEST)
        drain(client, "q", handlers())
        assert client.stats("q") == []


def test_jobs_are_run_and_read_with_parameters_from_a_coroutine_function(dsn: str) -> None:
    async def source() -> str:
        await asyncio.sleep(0)
        return dsn

    async def main() -> None:
        async with AsyncClient(source) as client:
            for mux in (handlers(), handlers(is_async=True)):
                await client.enqueue(EnqueueRequest("q", "t"))
                await client.do("q", mux)
                await client.enqueue(EnqueueRequest("q", "t"))
                await adrain(client, "q", mux)
            async with Reader(parameters_of(client)) as reader:
                assert await reader.read(version_of_server())
            assert not await client.stats("q")

    asyncio.run(main())


def takes_an_argument(name: str) -> str:
    return name


async def coroutine_function() -> str:
    return ""


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (5, "source must be a connection string, a function that returns the connection param"),
        (takes_an_argument, "source must be a function without arguments: <function takes"),
        (coroutine_function, "a coroutine function, which only an AsyncClient takes"),
        (sessionmaker(), r"not sessionmaker: pass bgjob.ext.sqlalchemy.dsn\(\) of it"),
    ],
)
def test_what_is_no_source_is_refused_when_the_client_is_made(source: Any, text: str) -> None:
    with pytest.raises(TypeError, match=text):
        Client(source)


def raising() -> str:
    raise LookupError("no secret")


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (raising, "parameters failed: LookupError: no secret"),
        (lambda: 5, "must return a connection string, or a mapping such as .*, not int"),
        (lambda: "user:se@cret", "this is not a connection string"),
    ],
)
def test_a_client_raises_immediately_when_its_function_fails(
    source: Callable[[], Any], text: str, is_async: bool, dsn: str
) -> None:
    with closing(Colour(dsn, is_async=is_async)) as colour:
        with pytest.raises(SourceError, match=text) as caught:
            colour.client(source).enqueue(REQUEST)
        assert "se@cret" not in str(caught.value)
        assert caught.value.__cause__ is not None


def test_a_worker_goes_on_when_its_function_has_failed(
    launcher: Launcher, caplog: pytest.LogCaptureFixture
) -> None:
    failures: list[Exception] = []

    def source() -> str:
        if failures:
            raise failures.pop()
        return launcher.dsn

    observer = Recorder()
    launcher.start(handlers(), dsn=source, observer=observer)
    launcher.enqueue("1")
    observer.wait_for("completed", "1")
    failures += [LookupError("no secret")] * 2
    with psycopg.connect(launcher.dsn) as conn:
        conn.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity"
            " where datname = current_database() and application_name like 'bgjob%'"
            " and pid <> pg_backend_pid()"
        )
    assert eventually(lambda: not failures)
    launcher.enqueue("2")
    observer.wait_for("completed", "2")
    records = [record for record in caplog.records if record.name.startswith("bgjob")]
    assert not records  # it is an outage, and no fault of the worker's
