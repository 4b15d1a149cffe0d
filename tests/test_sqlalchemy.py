"""Jobs in the transactions of SQLAlchemy, by each driver, in both colours.

The suite runs them with the version that is installed. With the oldest one, in an environment of
its own:

    pip install -e '.[test]' 'sqlalchemy[asyncio]==2.0.16' && python -m pytest tests/test_sqlalchemy.py
"""

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar, cast

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy import Integer, String, create_engine, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import IntegrityError, ProgrammingError
from sqlalchemy.ext.asyncio import (
    AsyncConnection,
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    mapped_column,
    scoped_session,
    sessionmaker,
)
from support.clients import HOSTILE
from support.database import count, row, rows, sleeper
from support.databases import Databases
from support.jobs import requests
from support.waiting import NEVER, eventually
from support.workers import Launcher, Recorder

from bgjob import (
    AsyncClient,
    BgjobError,
    Client,
    EnqueueConflictError,
    EnqueueRequest,
    Job,
    JobAlreadyExistsError,
    Mux,
    PayloadError,
    QueueRequiredError,
    RequestsRequiredError,
    Retry,
)
from bgjob.ext.sqlalchemy import (
    abulk_enqueue,
    aenqueue,
    asession_of,
    bulk_enqueue,
    dsn as dsn_of,
    enqueue,
    session_of,
)

DRIVERS = ["psycopg", "psycopg2", "psycopg_async", "asyncpg"]
KINDS = ["session", "connection"]


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"

    id: Mapped[str] = mapped_column(String, primary_key=True)
    number: Mapped[int] = mapped_column(Integer, default=0, unique=True)


@dataclass(frozen=True)
class SendMail:
    queue: ClassVar[str] = "mail"

    to: str


@pytest.fixture(scope="module")
def home(databases: Databases, template: str) -> Iterator[str]:
    """The DSN of the module's database."""
    with databases.lend(template, may_keep=lambda: False) as dsn:
        with psycopg.connect(dsn) as conn:
            conn.execute("create table orders (id text primary key, number int unique)")
        yield dsn


@pytest.fixture
def dsn(home: str) -> Iterator[str]:
    yield home
    with psycopg.connect(home) as conn:
        conn.execute("delete from bgjob_job; delete from bgjob_dead_job; delete from orders")


def url_of(dsn: str, driver: str) -> URL:
    parts = cast(dict[str, str], conninfo_to_dict(dsn))
    return URL.create(
        f"postgresql+{driver}",
        username=parts["user"],
        database=parts["dbname"],
        query={"host": parts["host"], "port": parts["port"]},
    )


class Opened:
    """A session or a connection of a program, to be used without `await`."""

    def __init__(self, target: Any, run: Callable[[Any], Any], *, is_async: bool) -> None:
        self.target = target
        self._run = run
        self._is_async = is_async

    def enqueue(self, request: Any, **options: Any) -> Any:
        call: Any = aenqueue if self._is_async else enqueue
        return self._run(call(self.target, request, **options))

    def bulk_enqueue(self, many: Any, **options: Any) -> Any:
        call: Any = abulk_enqueue if self._is_async else bulk_enqueue
        return self._run(call(self.target, many, **options))

    def execute(self, statement: str) -> list[tuple[Any, ...]]:
        result = self._run(self.target.execute(text(statement)))
        return [tuple(row) for row in result] if result.returns_rows else []

    def commit(self) -> None:
        self._run(self.target.commit())

    def rollback(self) -> None:
        self._run(self.target.rollback())


class Program:
    """A program that uses SQLAlchemy by one driver."""

    def __init__(self, dsn: str, driver: str) -> None:
        self.dsn = dsn
        self.driver = driver
        self.is_async = driver in ("psycopg_async", "asyncpg")
        self._stack = ExitStack()
        if self.is_async:
            self._runner = self._stack.enter_context(asyncio.Runner())

    def run(self, answer: Any) -> Any:
        return self._runner.run(answer) if self.is_async else answer

    def engine(self, **options: Any) -> Any:
        create: Any = create_async_engine if self.is_async else create_engine
        engine = create(url_of(self.dsn, self.driver), **options)
        self._stack.callback(lambda: self.run(engine.dispose()))
        return engine

    @contextmanager
    def open(self, kind: str = "session", **options: Any) -> Iterator[Opened]:
        engine = self.engine(**options)
        if kind == "session":
            target = AsyncSession(engine) if self.is_async else Session(engine)
        else:
            target = self.run(engine.connect()) if not self.is_async else self.run(started(engine))
        try:
            yield Opened(target, self.run, is_async=self.is_async)
        finally:
            self.run(target.close())

    def close(self) -> None:
        self._stack.close()


async def started(engine: AsyncEngine) -> AsyncConnection:
    return await engine.connect()


@pytest.fixture(params=DRIVERS)
def program(request: pytest.FixtureRequest, dsn: str) -> Iterator[Program]:
    with closing(Program(dsn, request.param)) as program:
        yield program


@pytest.fixture(params=KINDS)
def opened(request: pytest.FixtureRequest, program: Program) -> Iterator[Opened]:
    with program.open(request.param) as opened:
        yield opened


# -- enqueues --------------------------------------------------------------------------------


def test_a_job_exists_and_wakes_a_worker_when_its_transaction_commits(
    opened: Opened, dsn: str, conn: psycopg.Connection
) -> None:
    observer = Recorder()
    with closing(Launcher(dsn, is_async=False)) as launcher:
        launcher.start(Mux().register("t", lambda _: None), observer=observer, poll_interval=NEVER)
        calls: dict[str, Callable[[str], Any]] = {
            "one": lambda id_: opened.enqueue(EnqueueRequest("q", "t", id=id_)),
            "many": lambda id_: opened.bulk_enqueue(requests(id_)),
        }
        for name, call in calls.items():
            assert call(f"undone {name}") in (f"undone {name}", [f"undone {name}"])
            opened.rollback()
            assert eventually(lambda: sleeper(conn) is not None)
            call(name)
            assert count(conn) == 0
            opened.commit()
            observer.wait_for("completed", name)
    assert sorted(event[1] for event in observer.of("started")) == ["many", "one"]


def test_a_duplicate_is_refused_and_the_transaction_goes_on(
    opened: Opened, conn: psycopg.Connection
) -> None:
    opened.execute("insert into orders (id) values ('before')")
    opened.enqueue(EnqueueRequest("q", "t", id="taken"))
    with pytest.raises(JobAlreadyExistsError, match="'taken'"):
        opened.enqueue(EnqueueRequest("q", "t", id="taken"))
    with pytest.raises(JobAlreadyExistsError) as raised:
        opened.bulk_enqueue(requests("a", "taken", "b", "b"))
    assert raised.value.ids == ("taken", "b")
    assert opened.bulk_enqueue(requests("c", "taken", "c"), on_conflict="skip") == ["c", None, None]
    newer = EnqueueRequest("q", "newer", id="taken", headers={"n": 1}, expires=60)
    assert opened.enqueue(newer, on_conflict="skip") is None
    assert opened.enqueue(newer, on_conflict="replace") == "taken"
    assert opened.bulk_enqueue([newer, newer], on_conflict="replace") == ["taken"] * 2
    with pytest.raises(RequestsRequiredError):
        opened.bulk_enqueue([])
    opened.execute("insert into orders (id) values ('after')")
    opened.commit()
    assert rows(conn, "select id from bgjob_job order by id") == [("c",), ("taken",)]
    assert rows(conn, "select id from orders order by id") == [("after",), ("before",)]


def test_every_option_arrives(program: Program, conn: psycopg.Connection) -> None:
    full: dict[str, Any] = {"priority": -3, "exclusive": "key"}
    run_at = datetime.now(UTC) + timedelta(hours=1)
    made = [
        EnqueueRequest("q", "t", bytes(range(256)), id="bytes", **full),
        EnqueueRequest("q", "t", {"é": None}, id="delayed", delay=60, **full),
        EnqueueRequest("q", "t", id="timed", run_at=run_at, headers={"é": ["✓", 1]}),
        *(EnqueueRequest(name, name, id=name, exclusive=name[:99]) for name in HOSTILE),
    ]
    select = (
        "select id, queue, type, arg, priority, exclusive, headers::text, case when id = 'timed' then next_run_at "
        "end, round(extract(epoch from next_run_at - created_at)) = 60 from bgjob_job order by id"
    )
    with Client(program.dsn) as client:
        client.bulk_enqueue(made)
    expected = rows(conn, select)
    for one_by_one in (True, False):
        conn.execute("delete from bgjob_job")
        with program.open("connection") as opened:
            if one_by_one:
                assert [opened.enqueue(request) for request in made] == [r.id for r in made]
            else:
                assert opened.bulk_enqueue(iter(made)) == [r.id for r in made]
            opened.commit()
        assert rows(conn, select) == expected


def test_a_typed_job_is_enqueued_as_by_a_client(program: Program, conn: psycopg.Connection) -> None:
    with program.open() as opened:
        id_ = opened.enqueue(SendMail("ann"), queue="letters", priority=3)
        opened.bulk_enqueue([EnqueueRequest.of(SendMail("bob"), id="b")])
        with pytest.raises(PayloadError):
            opened.enqueue(SendMail(cast(str, 1)))
        with pytest.raises(TypeError, match="priority given together with a request"):
            opened.enqueue(EnqueueRequest("q", "t"), priority=1)
        with pytest.raises(QueueRequiredError):
            opened.enqueue(EnqueueRequest("", "t"))
        opened.commit()
    select = "select id, queue, type, arg, priority from bgjob_job order by arg"
    assert rows(conn, select) == [
        (id_, "letters", "SendMail", b'{"to":"ann"}', 3),
        ("b", "mail", "SendMail", b'{"to":"bob"}', 0),
    ]


def test_in_autocommit_a_bulk_is_written_whole_or_not_at_all(
    program: Program, conn: psycopg.Connection
) -> None:
    with program.open("connection", isolation_level="AUTOCOMMIT") as opened:
        opened.enqueue(EnqueueRequest("q", "t", id="taken"))
        assert count(conn) == 1
        with pytest.raises(JobAlreadyExistsError):
            opened.bulk_enqueue(requests("a", "taken"))
        assert count(conn) == 1
        assert opened.bulk_enqueue(requests("a", "b")) == ["a", "b"]
        assert count(conn) == 3


def test_a_bulk_of_several_statements_is_written_whole_or_not_at_all(
    dsn: str, conn: psycopg.Connection
) -> None:
    with closing(Program(dsn, "psycopg")) as program, program.open() as opened:
        many = [EnqueueRequest("q", "t", id=f"{n:05}") for n in range(10_001)]
        with pytest.raises(JobAlreadyExistsError, match="'00000'"):
            opened.bulk_enqueue([*many, many[0]])
        assert opened.execute("select count(*) from bgjob_job") == [(0,)]
        assert opened.bulk_enqueue(iter(many)) == [request.id for request in many]
        opened.commit()
    assert count(conn) == 10_001


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_a_conflict_that_the_transaction_cannot_see_names_the_remedy(
    program: Program, conn: psycopg.Connection, level: str
) -> None:
    for many in (False, True):
        with program.open(isolation_level=level) as opened:
            opened.execute("select count(*) from bgjob_job")
            id_ = f"taken {many}"
            conn.execute("insert into bgjob_job (id, queue, type) values (%s, 'q', 't')", [id_])
            with pytest.raises(
                EnqueueConflictError, match="repeat the whole transaction"
            ) as raised:
                if many:
                    opened.bulk_enqueue(requests(id_))
                else:
                    opened.enqueue(EnqueueRequest("q", "t", id=id_))
            assert raised.value.ids == (id_,)
            opened.rollback()
            with pytest.raises(JobAlreadyExistsError):
                opened.enqueue(EnqueueRequest("q", "t", id=id_))


def test_an_error_of_the_database_is_sqlalchemys(program: Program) -> None:
    with program.open() as opened:
        opened.execute("set local search_path = pg_catalog")
        with pytest.raises(ProgrammingError, match="bgjob_job"):
            opened.enqueue(EnqueueRequest("q", "t"))


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_a_two_phase_transaction_enqueues_and_does_not_notify(
    dsn: str, conn: psycopg.Connection, driver: str
) -> None:
    done: list[str] = []
    with (
        closing(Launcher(dsn, is_async=False)) as launcher,
        closing(Program(dsn, driver)) as program,
    ):
        launcher.start(Mux().register("t", lambda job: done.append(job.id)), poll_interval=0.2)
        assert eventually(lambda: sleeper(conn) is not None)
        with Session(program.engine(), twophase=True) as session:
            enqueue(session, EnqueueRequest("q", "t", id="one"))
            bulk_enqueue(session, requests("many"))
            session.prepare()
            session.commit()
        assert eventually(lambda: sorted(done) == ["many", "one"])


def test_scoped_sessions_are_sessions(dsn: str, conn: psycopg.Connection) -> None:
    engine = create_engine(url_of(dsn, "psycopg"))
    scoped = scoped_session(sessionmaker(engine))
    enqueue(scoped, EnqueueRequest("q", "t", id="sync"))
    scoped.commit()
    scoped.remove()
    engine.dispose()

    async def asynchronous() -> None:
        engine = create_async_engine(url_of(dsn, "asyncpg"))
        scoped = async_scoped_session(async_sessionmaker(engine), asyncio.current_task)
        await aenqueue(scoped, EnqueueRequest("q", "t", id="async"))
        await abulk_enqueue(scoped, requests("asyncs"))
        await scoped.commit()
        await scoped.remove()
        await engine.dispose()

    asyncio.run(asynchronous())
    assert rows(conn, "select id from bgjob_job order by id") == [
        ("async",),
        ("asyncs",),
        ("sync",),
    ]


def test_another_target_is_refused_with_the_remedy(dsn: str) -> None:
    job = EnqueueRequest("q", "t")
    engine, async_engine = (
        create_engine(url_of(dsn, "psycopg")),
        create_async_engine(url_of(dsn, "asyncpg")),
    )
    for target, error in [
        (engine, r"not Engine: open a transaction \(with engine.begin\(\) as connection\)"),
        (AsyncSession(async_engine), "not AsyncSession: use aenqueue or abulk_enqueue"),
        (sessionmaker(engine), "must be a Session or a Connection, not sessionmaker"),
        ("postgresql://", "must be a Session or a Connection, not str"),
    ]:
        for call in (lambda t: enqueue(t, job), lambda t: bulk_enqueue(t, [job])):
            with pytest.raises(TypeError, match=error):
                call(cast(Any, target))
    for other, error in [
        (async_engine, r"not AsyncEngine: open a transaction"),
        (
            Session(engine),
            "must be an AsyncSession or an AsyncConnection, not Session: use enqueue",
        ),
    ]:
        for acall in (lambda t: aenqueue(t, job), lambda t: abulk_enqueue(t, [job])):
            with pytest.raises(TypeError, match=error):
                asyncio.run(acall(cast(Any, other)))
    lite = create_engine("sqlite://")
    with lite.connect() as connection, pytest.raises(TypeError, match="not on sqlite by pysqlite"):
        enqueue(connection, job)
    lite.dispose()
    engine.dispose()


def test_a_client_refuses_the_connections_of_others_with_the_remedy(
    dsn: str, plain_client: Client
) -> None:
    job = EnqueueRequest("q", "t")
    remedies = {
        "bgjob.ext.sqlalchemy enqueues on it": Session(create_engine(url_of(dsn, "psycopg"))),
        "bgjob.sql.enqueue returns the statement": object(),
        "a Client takes a Connection": object.__new__(psycopg.AsyncConnection),
    }
    for remedy, conn in remedies.items():
        for call in (
            plain_client.enqueue,
            lambda r, conn: plain_client.bulk_enqueue([r], conn=conn),
        ):
            with pytest.raises(TypeError, match=f"conn must be a psycopg.Connection, .*{remedy}"):
                call(job, conn=cast(Any, conn))

    async def asynchronous() -> None:
        async with AsyncClient(dsn) as plain_client:
            for remedy, conn in list(remedies.items())[:2]:
                with pytest.raises(TypeError, match=f"psycopg.AsyncConnection, .*{remedy}"):
                    await plain_client.enqueue(job, conn=cast(Any, conn))
                with pytest.raises(TypeError, match=f"psycopg.AsyncConnection, .*{remedy}"):
                    await plain_client.bulk_enqueue([job], conn=cast(Any, conn))

    asyncio.run(asynchronous())


def test_it_needs_no_greenlet_in_a_program_without_coroutines() -> None:
    code = "import sys; sys.modules['greenlet'] = None; import bgjob.ext.sqlalchemy"
    subprocess.run([sys.executable, "-c", code], check=True)


# -- connection strings ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("postgresql://u@h/d", {"user": "u", "host": "h", "dbname": "d"}),
        (
            "postgresql+psycopg2://u:a%20%27%40%25w@h:5433/d?sslmode=require&application_name=shop",
            {
                "user": "u",
                "password": "a '@%w",
                "host": "h",
                "port": "5433",
                "dbname": "d",
                "sslmode": "require",
                "application_name": "shop",
            },
        ),
        (
            "postgresql+asyncpg://u@h/d?ssl=verify-full&prepared_statement_cache_size=0",
            {"user": "u", "host": "h", "dbname": "d", "sslmode": "verify-full"},
        ),
        (
            "postgresql+psycopg://u@/d?host=a:1&host=b:2&target_session_attrs=read-write",
            {
                "user": "u",
                "host": "a,b",
                "port": "1,2",
                "dbname": "d",
                "target_session_attrs": "read-write",
            },
        ),
        ("postgresql+psycopg://", {}),
    ],
)
def test_the_connection_string_of_a_url(url: str, expected: dict[str, str]) -> None:
    assert conninfo_to_dict(dsn_of(url)) == conninfo_to_dict(dsn_of(make_url(url))) == expected


def test_the_connection_string_of_an_engine_makes_a_client(program: Program) -> None:
    source = dsn_of(program.engine())
    with Client(source) as client:
        assert client.enqueue(EnqueueRequest("q", "t", id="a")) == "a"


def test_a_url_without_a_connection_string_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match="needs PostgreSQL, not mysql"):
        dsn_of("mysql+mysqldb://u@h/d")
    with pytest.raises(
        ValueError, match=r"does not know odd, timeout .*query\(\['odd', 'timeout'\]"
    ):
        dsn_of("postgresql+asyncpg://u@h/d?timeout=3&odd=1")


def test_a_client_takes_a_url_with_a_driver_and_refuses_what_hides_or_has_no_string(
    dsn: str,
) -> None:
    url = url_of(dsn, "psycopg")
    with Client(str(url)) as client:
        client.enqueue(EnqueueRequest("q", "t"))
    engine = create_engine(url.set(password="secret"))
    for client_of in (Client, AsyncClient):
        for source in (engine, engine.url):
            with pytest.raises(
                TypeError, match=r"not (Engine|URL): pass bgjob.ext.sqlalchemy.dsn\(\)"
            ):
                client_of(cast(Any, source))
        with pytest.raises(ValueError, match=r"the password is \*\*\*.*dsn\(engine\)"):
            client_of(str(engine.url))
        with pytest.raises(ValueError, match=r"libpq does not know: pass .*dsn\(url\)") as raised:
            client_of("postgresql+asyncpg://u:secret@h/d?ssl=require")
        assert "secret" not in str(raised.value)
    engine.dispose()


# -- sessions of handlers --------------------------------------------------------------------


class Work(BgjobError):
    pass


async def by_async_session(conn: Any, work: Callable[[Session], Any], *make: Any) -> Any:
    async with asession_of(conn, *make) as session:
        return await session.run_sync(work)


def by_session(conn: Any, work: Callable[[Session], Any], *make: Any) -> Any:
    with session_of(conn, *make) as session:
        return work(session)


def done_in_a_handler(
    client: Client, work: Callable[[Session], Any], *make: Any, is_async: bool
) -> Any:
    """Run a job whose handler does this work in a session; return the job's result."""

    def plain(job: Job, conn: psycopg.Connection) -> Any:
        return by_session(conn, work, *make)

    async def coroutine(job: Job, conn: psycopg.AsyncConnection) -> Any:
        return await by_async_session(conn, work, *make)

    client.enqueue(EnqueueRequest("handled", "t"))
    mux = Mux().register("t", coroutine if is_async else plain, transactional=True)
    return client.do("handled", mux)


both_colours = pytest.mark.parametrize("is_async", [False, True], ids=["session_of", "asession_of"])


def orders(conn: psycopg.Connection) -> list[str]:
    return [id_ for (id_,) in rows(conn, "select id from orders order by id")]


@both_colours
def test_what_a_handler_does_in_its_session_commits_with_its_job(
    plain_client: Client, conn: psycopg.Connection, *, is_async: bool
) -> None:
    def work(session: Session) -> None:
        session.add(Order(id="committed", number=1))
        session.commit()
        assert orders(conn) == []  # the worker commits
        enqueue(session, EnqueueRequest("q", "t", id="one"))
        assert bulk_enqueue(session, requests("many")) == ["many"]
        with pytest.raises(JobAlreadyExistsError):
            bulk_enqueue(session, requests("more", "many"))
        session.add(Order(id="undone", number=2))
        session.flush()
        session.rollback()  # what was enqueued, too
        session.add(Order(id="duplicate", number=1))
        with pytest.raises(IntegrityError):
            session.flush()
        session.rollback()
        enqueue(session, EnqueueRequest("q", "t", id="kept"))
        session.add(Order(id="pending", number=2))

    for _ in range(2):
        done_in_a_handler(plain_client, work, is_async=is_async)
        assert orders(conn) == ["committed", "pending"]
        assert rows(conn, "select id from bgjob_job") == [("kept",)]
        conn.execute("delete from orders; delete from bgjob_job")


@both_colours
def test_a_handler_that_fails_or_retries_undoes_what_its_session_committed(
    plain_client: Client, conn: psycopg.Connection, *, is_async: bool
) -> None:
    def fails(session: Session) -> None:
        session.add(Order(id="a", number=1))
        session.commit()
        raise Work("no")

    def retries(session: Session) -> Retry:
        session.add(Order(id="a", number=1))
        session.commit()
        return Retry(NEVER, "not yet")

    result = done_in_a_handler(plain_client, fails, is_async=is_async)
    assert isinstance(result, Retry) and isinstance(result.error, Work)
    assert done_in_a_handler(plain_client, retries, is_async=is_async) == Retry(NEVER, "not yet")
    assert orders(conn) == []


@both_colours
def test_a_session_of_the_programs_own_kind(
    plain_client: Client, conn: psycopg.Connection, *, is_async: bool
) -> None:
    class Own(Session):
        pass

    class AsyncOwn(AsyncSession):
        sync_session_class = Own

    elsewhere = create_engine("postgresql+psycopg://nowhere.invalid/")
    make: Any = (
        async_sessionmaker(class_=AsyncOwn, expire_on_commit=False, binds={Order: elsewhere})
        if is_async
        else sessionmaker(elsewhere, class_=Own, expire_on_commit=False, binds={Order: elsewhere})
    )

    def work(session: Session) -> None:
        assert isinstance(session, Own) and not session.expire_on_commit
        session.add(Order(id="a", number=1))

    done_in_a_handler(plain_client, work, make, is_async=is_async)
    assert orders(conn) == ["a"]


@both_colours
def test_a_block_that_raises_is_undone_and_the_handler_may_go_on(
    plain_client: Client, conn: psycopg.Connection, *, is_async: bool
) -> None:
    def fails(session: Session) -> None:
        session.add(Order(id="undone", number=1))
        session.flush()
        raise Work("no")

    def good(session: Session) -> None:
        session.add(Order(id="done", number=1))

    def plain(job: Job, conn: psycopg.Connection) -> None:
        with pytest.raises(Work):
            by_session(conn, fails)
        by_session(conn, good)

    async def coroutine(job: Job, conn: psycopg.AsyncConnection) -> None:
        with pytest.raises(Work):
            await by_async_session(conn, fails)
        await by_async_session(conn, good)

    plain_client.enqueue(EnqueueRequest("handled", "t"))
    mux = Mux().register("t", coroutine if is_async else plain, transactional=True)
    plain_client.do("handled", mux)
    assert orders(conn) == ["done"]


def test_sessions_of_many_handlers_at_the_same_time(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    def work(session: Session) -> None:
        order = session.get(Order, "a", with_for_update=True)
        assert order is not None
        order.number += 1

    def plain(job: Job, conn: psycopg.Connection) -> None:
        by_session(conn, work)

    async def coroutine(job: Job, conn: psycopg.AsyncConnection) -> None:
        await by_async_session(conn, work)

    conn.execute("insert into orders (id, number) values ('a', 0)")
    mux = Mux().register("t", coroutine if launcher.is_async else plain, transactional=True)
    launcher.enqueue(*map(str, range(40)))
    launcher.start(mux, concurrency=8)
    assert eventually(lambda: row(conn, "select number from orders")[0] == 40)


def test_a_session_needs_a_connection_of_its_colour_in_a_transaction(dsn: str) -> None:
    with (
        psycopg.connect(dsn) as own,
        pytest.raises(TypeError, match="AsyncConnection, not Connection: see session_of"),
    ):
        asyncio.run(by_async_session(own, lambda _: None))
    with pytest.raises(
        TypeError, match="must be a psycopg.Connection, not object: see asession_of"
    ):
        by_session(object(), lambda _: None)
    with psycopg.connect(dsn, autocommit=True) as own:
        with pytest.raises(ValueError, match=r"begin one \(with conn.transaction\(\)\)"):
            by_session(own, lambda _: None)
        with own.transaction():
            by_session(own, lambda session: session.add(Order(id="a", number=1)))
    with psycopg.connect(dsn) as own:
        by_session(own, lambda session: session.add(Order(id="b", number=2)))
        own.rollback()
    with psycopg.connect(dsn) as own:
        assert orders(own) == ["a"]
