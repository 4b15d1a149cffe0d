"""Uses of the library, for type checkers: a line that ends in `# error` is wrong, all others right.

test_typing.py runs mypy and pyright over it. Nothing imports it.
"""

from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from datetime import datetime
from typing import Any, ClassVar, Literal, assert_type

import asyncpg
import psycopg
from sqlalchemy import Connection, Engine, create_engine
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from bgjob import (
    AsyncClient,
    Client,
    Complete,
    EnqueueRequest,
    Job,
    LoggingObserver,
    MoveToDlq,
    Mux,
    Reschedule,
    Result,
    Retry,
)
from bgjob.checkpoint import AsyncCheckpoint, Checkpoint
from bgjob.codec import Codec
from bgjob.ext import asyncpg as of_asyncpg, sqlalchemy as of_sqlalchemy
from bgjob.group import Group


@dataclass
class Mail:
    to: str


@dataclass
class Letter:
    queue: ClassVar[str] = "post"
    street: str = ""


class State:
    pass


class Yaml(Codec[dict[str, int]]):
    def encode(self, value: dict[str, int], /) -> bytes:
        return repr(value).encode()

    def decode(self, data: bytes, /) -> dict[str, int]:
        return {"length": len(data)}


mux = Mux()

# -- a name: the function takes a job -------------------------------------------------------


@mux.handler("right")
def none(job: Job) -> None: ...


@mux.handler("right", queue="q", max_attempts=None, timeout=5, priority=1, exclusive=True)
def result(job: Job) -> Result | None:
    raise NotImplementedError


@mux.handler("right", keep=True, retry_priority=1, backoff=lambda attempt: 2.0 * attempt)
async def coroutine(job: Job) -> Retry:
    raise NotImplementedError


@mux.handler("right")
@mux.handler("two names")
def wider(job: object, *, state: State | None = None) -> Complete | MoveToDlq | Reschedule:
    raise NotImplementedError


@mux.handler("right")
def awaitable(job: Job) -> Awaitable[None]:
    raise NotImplementedError


@mux.handler("right", transactional=True)
def with_conn(job: Job, conn: psycopg.Connection, state: State) -> None: ...


@mux.handler("right", transactional=True)
async def with_aconn(job: Job, conn: psycopg.AsyncConnection[Any]) -> Result | None:
    raise NotImplementedError


def configured(length: int, job: Job) -> None: ...


mux.handler("right")(partial(configured, 5))
mux.handler("right")(lambda job: None)


@mux.handler("wrong")  # error
def wrong_argument(job: str) -> None: ...


@mux.handler("wrong")  # error
def no_argument() -> None: ...


@mux.handler("wrong")  # error
def by_name_only(*, job: Job) -> None: ...


@mux.handler("wrong")  # error
def wrong_result(job: Job) -> str:
    raise NotImplementedError


@mux.handler("wrong")  # error
def class_for_a_result(job: Job) -> type[Complete]:
    raise NotImplementedError


@mux.handler("wrong")  # error
async def wrong_result_of_a_coroutine(job: Job) -> int:
    raise NotImplementedError


@mux.handler("wrong", transactional=True)  # error
def conn_is_missing(job: Job) -> None: ...


@mux.handler("wrong", transactional=True)  # error
async def conn_is_missing_in_a_coroutine(job: Job) -> None: ...


@mux.handler("wrong", transactional=True)  # error
def conn_of_the_other_colour(job: Job, conn: psycopg.AsyncConnection) -> None: ...


@mux.handler("wrong", transactional=True)  # error
async def conn_of_the_other_colour_in_a_coroutine(job: Job, conn: psycopg.Connection) -> None: ...


@mux.handler("wrong", transactional=True)  # error
def conn_of_something_else(job: Job, conn: Connection) -> None: ...


@mux.handler("wrong", transactional=True)  # error
def wrong_result_in_a_transaction(job: Job, conn: psycopg.Connection) -> bool:
    raise NotImplementedError


@mux.handler("wrong", priorty=5)  # error
def wrong_option(job: Job) -> None: ...


@mux.handler("wrong", max_attempts="5")  # error
def wrong_value_of_an_option(job: Job) -> None: ...


# -- a checkpoint ---------------------------------------------------------------------------


@mux.handler("right")
def saves(job: Job, checkpoint: Checkpoint[Mail]) -> Result | None:
    if checkpoint.value is not None:
        assert_type(checkpoint.value.to, str)
    checkpoint.save(Mail("ann"))
    with checkpoint.transaction() as conn:
        assert_type(conn, psycopg.Connection[Any])
        checkpoint.save(Mail("ann"))
    checkpoint.save("ann")  # error
    checkpoint.value.to  # error
    checkpoint.value = Mail("ann")  # error
    checkpoint.stopping()  # error
    return Reschedule(0) if checkpoint.stopping else None


@mux.handler(Mail, timeout=5)
async def asaves(mail: Mail, *, checkpoint: AsyncCheckpoint[list[int]], job: Job) -> None:
    assert_type(checkpoint.value, list[int] | None)
    await checkpoint.save([5])
    async with checkpoint.transaction() as conn:
        assert_type(conn, psycopg.AsyncConnection[Any])
        await checkpoint.save([5, 6])
    await checkpoint.save(["5"])  # error
    with checkpoint.transaction():  # error
        pass


@mux.handler("right")
def saves_anything(job: Job, checkpoint: Checkpoint) -> None:
    checkpoint.save({"rows": 5})
    assert_type(checkpoint.value, Any | None)


@mux.handler("wrong")  # error
def saves_and_returns(job: Job, checkpoint: Checkpoint[int]) -> int:
    raise NotImplementedError


mux.register("right", saves).register(Mail, asaves)
mux.register("wrong", asaves)  # error

# -- a class: the function takes a value of it ----------------------------------------------


@mux.handler(Mail)
def send(mail: Mail) -> None: ...


@mux.handler(Mail, queue="mail")
async def asend(mail: Mail, *, job: Job, state: State) -> Result | None:
    raise NotImplementedError


@mux.handler(Mail)
@mux.handler(Letter)
def either(message: Mail | Letter) -> None: ...


@mux.handler(Mail, transactional=True)
def send_with_conn(mail: Mail, conn: psycopg.Connection, job: Job) -> Retry | None:
    raise NotImplementedError


@mux.handler(Letter, transactional=True)
@mux.handler(Mail, transactional=True)
async def either_with_conn(message: Letter | Mail, conn: psycopg.AsyncConnection) -> None: ...


@mux.handler(Mail)  # error
def other_class(mail: Letter) -> None: ...


@mux.handler(Mail)  # error
def job_for_a_value(job: Job) -> None: ...


@mux.handler("wrong")  # error
def value_for_a_job(mail: Mail) -> None: ...


@mux.handler(Mail)  # error
async def other_class_in_a_coroutine(mail: Letter) -> None: ...


@mux.handler(Mail)  # error
def wrong_result_of_a_class(mail: Mail) -> str:
    raise NotImplementedError


@mux.handler(Mail)  # error
async def wrong_result_of_a_class_in_a_coroutine(mail: Mail) -> bytes:
    raise NotImplementedError


@mux.handler(Mail, transactional=True)  # error
def conn_is_missing_for_a_class(mail: Mail) -> None: ...


@mux.handler(Mail, transactional=True)  # error
def other_class_in_a_transaction(mail: Letter, conn: psycopg.Connection) -> None: ...


@mux.handler(Mail, transactional=True)  # error
async def class_and_the_other_colour(mail: Mail, conn: psycopg.Connection) -> None: ...


@mux.handler(Mail, transactional=True)  # error
def wrong_result_of_a_class_in_a_transaction(mail: Mail, conn: psycopg.Connection) -> int:
    raise NotImplementedError


@mux.handler(5)  # error
def no_type(job: Job) -> None: ...


# -- a codec: the function takes what it decodes --------------------------------------------


@mux.handler("right", codec=Yaml())
def decoded(value: dict[str, int]) -> None: ...


@mux.handler("right", codec=Yaml(), transactional=True)
async def adecoded(value: dict[str, int], conn: psycopg.AsyncConnection) -> None: ...


@mux.handler("wrong", codec=Yaml())  # error
def not_decoded(value: dict[str, str]) -> None: ...


@mux.handler(Mail, codec=Yaml())  # error
def codec_of_another_class(mail: Mail) -> None: ...


# -- a batch: the function takes a list -----------------------------------------------------


@mux.handler("right", batch=500)
def jobs_at_once(jobs: list[Job]) -> None: ...


@mux.handler("right", batch=500, batch_wait=0.2, queue="q", timeout=5)
async def sequence_of_jobs(jobs: Sequence[Job], *, state: State) -> dict[str, Retry]:
    raise NotImplementedError


@mux.handler("right", batch=500, transactional=True)
def jobs_with_conn(jobs: list[Job], conn: psycopg.Connection) -> Mapping[str, Result]:
    raise NotImplementedError


@mux.handler("right", batch=500, transactional=True)
async def jobs_with_aconn(jobs: list[Job], conn: psycopg.AsyncConnection) -> Result | None:
    raise NotImplementedError


@mux.handler(Mail, batch=500)
def mails(mails: list[Mail], jobs: list[Job]) -> dict[str, MoveToDlq | Complete | None]:
    raise NotImplementedError


@mux.handler(Mail, batch=500, transactional=True)
async def amails(mails: Sequence[Mail], conn: psycopg.AsyncConnection) -> None: ...


@mux.handler("right", codec=Yaml(), batch=500, batch_wait=0)
def decoded_at_once(values: list[dict[str, int]]) -> None: ...


@mux.handler("right", codec=Yaml(), batch=500, transactional=True)
def decoded_in_transaction(values: list[dict[str, int]], conn: psycopg.Connection) -> None: ...


mux.register("right", jobs_at_once, batch=500, batch_wait=1)
mux.register("right", jobs_with_conn, batch=500, transactional=True)
mux.register(Mail, mails, batch=500).register("right", decoded_at_once, codec=Yaml(), batch=2)


@mux.handler("wrong", batch=500)  # error
def one_job_for_a_batch(job: Job) -> None: ...


@mux.handler("wrong")  # error
def a_batch_for_one_job(jobs: list[Job]) -> None: ...


@mux.handler("wrong", batch_wait=1.0)  # error
def wait_without_a_batch(jobs: list[Job]) -> None: ...


@mux.handler("wrong", batch="500")  # error
def wrong_batch(jobs: list[Job]) -> None: ...


@mux.handler("wrong", batch=500)  # error
def wrong_result_of_a_batch(jobs: list[Job]) -> list[Result]:
    raise NotImplementedError


@mux.handler("wrong", batch=500)  # error
async def wrong_results_by_id(jobs: list[Job]) -> dict[str, str]:
    raise NotImplementedError


@mux.handler("wrong", batch=500)  # error
def results_by_number(jobs: list[Job]) -> dict[int, Result]:
    raise NotImplementedError


@mux.handler("wrong", batch=500, transactional=True)  # error
def conn_is_missing_for_a_batch(jobs: list[Job]) -> None: ...


@mux.handler("wrong", batch=500, transactional=True)  # error
async def batch_and_the_other_colour(jobs: list[Job], conn: psycopg.Connection) -> None: ...


@mux.handler(Mail, batch=500)  # error
def one_value_for_a_batch(mail: Mail) -> None: ...


@mux.handler(Mail, batch=500)  # error
def other_class_in_a_batch(mails: list[Letter]) -> None: ...


@mux.handler(Mail, batch=500, transactional=True)  # error
def batch_of_a_class_without_conn(mails: list[Mail]) -> None: ...


@mux.handler("wrong", codec=Yaml(), batch=500)  # error
def batch_not_decoded(values: list[str]) -> None: ...


mux.register("wrong", none, batch=500)  # error
mux.register(Mail, send, batch=500)  # error


# -- a decorated function keeps its type ----------------------------------------------------


async def called(job: Job, conn: psycopg.Connection, aconn: psycopg.AsyncConnection) -> None:
    none(job)
    none(job=job)
    assert_type(result(job), Result | None)
    assert_type(await coroutine(job), Retry)
    wider("anything", state=State())
    with_conn(job, conn, state=State())
    await with_aconn(job, conn=aconn)
    send(Mail("ann"))
    assert_type(await asend(Mail("ann"), job=job, state=State()), Result | None)
    either(Letter("street"))
    either(Mail("ann"))
    assert_type(send_with_conn(Mail("ann"), conn, job), Retry | None)
    await either_with_conn(Letter("street"), aconn)
    decoded({"length": 5})
    none("job")  # error
    wider(job, state=5)  # error
    with_conn(job, aconn, State())  # error
    send(Letter("street"))  # error
    await asend(Mail("ann"), job=job)  # error
    either("text")  # error
    send_with_conn(Mail("ann"), aconn, job)  # error
    send_with_conn(Mail("ann"), conn)  # error
    decoded({"length": "5"})  # error


# -- register -------------------------------------------------------------------------------

mux.register("right", none).register("right", coroutine, queue="q")
mux.register("right", with_conn, transactional=True)
mux.register("right", with_aconn, transactional=True)
mux.register(Mail, send).register(Mail, asend).register(Letter, either)
mux.register(Mail, send_with_conn, transactional=True)
mux.register("right", decoded, codec=Yaml())
mux.register("wrong", with_conn, transactional="yes")  # error
mux.register("wrong", none, transactional=True)  # error
mux.register("wrong", send)  # error
mux.register(Letter, send)  # error
mux.register(Letter, send_with_conn, transactional=True)  # error
mux.register("wrong", wrong_result)  # error

# -- where the database is ------------------------------------------------------------------


def text() -> str:
    return ""


def mapping() -> dict[str, Any]:
    return {"host": "db", "port": 5432}


async def awaited_mapping() -> dict[str, str]:
    return {"host": "db"}


def takes_an_argument(name: str) -> str:
    return name


def number() -> int:
    return 5


Client(text)
Client(mapping)
AsyncClient(mapping)
AsyncClient(awaited_mapping)
Client(awaited_mapping)  # error
Client(takes_an_argument)  # error
AsyncClient(number)  # error
Client(5)  # error

# -- other libraries ------------------------------------------------------------------------

request = EnqueueRequest("q", "t", {"order": 5})
engine: Engine = create_engine("postgresql+psycopg://")
async_engine: AsyncEngine = create_async_engine("postgresql+asyncpg://")
scoped = scoped_session(sessionmaker(engine))

Client(of_sqlalchemy.dsn(engine))
AsyncClient(of_sqlalchemy.dsn(async_engine))
of_sqlalchemy.dsn(engine.url)
Client(engine)  # error


def in_a_session(session: Session, connection: Connection, conn: psycopg.Connection) -> None:
    assert_type(of_sqlalchemy.enqueue(session, request), str)
    assert_type(of_sqlalchemy.enqueue(session, request, on_conflict="skip"), str | None)
    of_sqlalchemy.enqueue(connection, Mail("ann"), queue="mail", delay=5)
    of_sqlalchemy.enqueue(scoped, Letter("street"))
    ids = of_sqlalchemy.bulk_enqueue(session, [request], on_conflict="skip")
    assert_type(ids, list[str | None])
    with of_sqlalchemy.session_of(conn) as opened:
        assert_type(opened, Session)
    of_sqlalchemy.enqueue(engine, request)  # error
    of_sqlalchemy.enqueue(conn, request)  # error
    of_sqlalchemy.enqueue(session, {"order": 5})  # error
    of_sqlalchemy.enqueue(session, Mail("ann"), dely=5)  # error
    of_sqlalchemy.bulk_enqueue(session, [Mail("ann")])  # error
    of_sqlalchemy.bulk_enqueue(session, [request], on_conflict="ignore")  # error
    of_sqlalchemy.session_of(session)  # error


async def in_an_async_session(
    session: AsyncSession, connection: AsyncConnection, aconn: psycopg.AsyncConnection
) -> None:
    assert_type(await of_sqlalchemy.aenqueue(session, request), str)
    await of_sqlalchemy.aenqueue(connection, Mail("ann"), queue="mail")
    await of_sqlalchemy.abulk_enqueue(session, [request])
    async with of_sqlalchemy.asession_of(aconn) as opened:
        assert_type(opened, AsyncSession)
    of_sqlalchemy.enqueue(session, request)  # error
    await of_sqlalchemy.aenqueue(aconn, request)  # error
    await of_sqlalchemy.aenqueue(async_engine, request)  # error
    of_sqlalchemy.session_of(aconn)  # error


async def of_asyncpgs(
    connection: asyncpg.Connection, pool: asyncpg.Pool, session: AsyncSession
) -> None:
    assert_type(await of_asyncpg.enqueue(connection, request), str)
    assert_type(await of_asyncpg.enqueue(connection, request, on_conflict="skip"), str | None)
    await of_asyncpg.enqueue(pool, Mail("ann"), queue="mail")
    assert_type(await of_asyncpg.bulk_enqueue(pool, [request]), list[str | None])
    await of_asyncpg.enqueue(connection, {"order": 5})  # error
    await of_asyncpg.enqueue(connection, Mail("ann"), dely=5)  # error
    await of_asyncpg.bulk_enqueue(pool, [Mail("ann")])  # error
    await of_asyncpg.bulk_enqueue(pool, [request], on_conflict="ignore")  # error


# -- an id that is taken ---------------------------------------------------------------------


async def coalesced(client: Client, async_client: AsyncClient, request: EnqueueRequest) -> None:
    assert_type(client.enqueue(request), str)
    assert_type(client.enqueue(request, on_conflict="replace"), str)
    assert_type(client.enqueue(request, on_conflict="skip"), str | None)
    assert_type(client.enqueue(Mail("ann"), queue="mail", on_conflict="skip"), str | None)
    assert_type(await async_client.enqueue(Mail("ann"), queue="q", on_conflict="replace"), str)
    assert_type(client.debounce(request, 5, at_most=60), str)
    assert_type(await async_client.debounce(Mail("ann"), 5, id="a", queue="mail"), str)
    client.enqueue(request, on_conflict="ignore")  # error
    client.debounce(Mail("ann"), 5, queue="mail")  # error
    client.debounce(Mail("ann"), 5, id="a", run_at=None)  # error
    client.debounce(request)  # error


# -- groups ----------------------------------------------------------------------------------


async def grouped(
    client: Client,
    async_client: AsyncClient,
    job: Job,
    conn: psycopg.Connection,
    aconn: psycopg.AsyncConnection,
) -> None:
    with client.group(then=request, conn=conn) as group:
        assert_type(group, Group)
        assert_type(group.enqueue(request), str)
        assert_type(group.enqueue(Mail("ann"), queue="mail", priority=1), str)
        group.enqueue_many(request for _ in range(3))
        group.enqueue(Mail("ann"), dely=5)  # error
        group.enqueue_many([Mail("ann")])  # error
    async with async_client.group(of=job, conn=aconn) as group:
        assert_type(group.enqueue(request), str)
        await group.enqueue(request)  # error
    assert_type((job.group, job.group_dead), tuple[str | None, int | None])
    client.group()  # error
    client.group(then=request, of=job)  # error
    client.group(then=request, conn=aconn)  # error
    client.group(of="then")  # error


# -- observers: a subclass has the signatures of Observer ------------------------------------


class Loud(LoggingObserver):
    def job_completed(self, job: Job, /) -> None:
        super().job_completed(job)

    def job_will_be_retried(
        self, job: Job, delay: float, error: str | BaseException | None, /
    ) -> None:
        super().job_will_be_retried(job, delay, error)

    def job_moved_to_dlq(self, job: Job, error: str | BaseException, /) -> None:
        super().job_moved_to_dlq(job, error)


class Wrong(LoggingObserver):
    def job_cancelled(self, job: str, /) -> None:  # error
        pass


def results(client: Client) -> None:
    request = EnqueueRequest("q", "t", keep=60)
    assert_type(client.enqueue(request), str)
    client.enqueue(Mail("a"), queue="q", keep=60.0)
    client.enqueue(Mail("a"), queue="q", keep="1h")  # error
    client.debounce(Letter(), 1, id="a", keep=60)  # error
    assert_type(client.result("a").state, Literal["pending", "completed", "failed"])
    assert_type(client.result("a").error, str | None)
    assert_type(client.wait("a", timeout=60), Any)


async def results_async(client: AsyncClient) -> None:
    assert_type((await client.result("a")).until, datetime | None)
    assert_type(await client.wait("a"), Any)


def gives(job: Job) -> Result:
    return Complete({"any": ["value"]})


mux.register("gives", gives)
