"""A database of any encoding: texts that it cannot hold are escaped, names are refused."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest
from conftest import MIGRATION
from support.databases import Databases
from support.waiting import PATIENCE, eventually
from support.workers import Launcher, Recorder, session_of

from bgjob import AsyncClient, Client, EnqueueRequest, Job, MoveToDlq, Mux, Schedule, Schedules
from bgjob._engine.protocol import Claim, Exchange
from bgjob._postgres.cursor import server_codec
from bgjob._sql.settlements import Claimed
from bgjob._sql.transactions import begin
from bgjob.testing import drain

HELD = {"LATIN1": "é", "EUC_JP": "エラー", "WIN1252": "€", "SQL_ASCII": "é€✓😀"}
TEXT = {name: f"5 € {held} ✓ 😀" for name, held in HELD.items()}
STORED = {
    "LATIN1": r"5 \u20ac é \u2713 \U0001f600",
    "EUC_JP": r"5 \u20ac エラー \u2713 \U0001f600",
    "WIN1252": r"5 € € \u2713 \U0001f600",
    "SQL_ASCII": TEXT["SQL_ASCII"],
}
EVERY_BYTE = bytes(range(256))


@pytest.fixture(params=list(HELD))
def encoding(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def dsn(databases: Databases, encoding: str) -> Iterator[str]:
    """The DSN of a database of that encoding, with the schema."""
    with databases.make(template="template0", encoding=encoding) as (_, dsn):
        with psycopg.connect(dsn) as conn:
            conn.execute(MIGRATION.read_bytes())
        yield dsn


def errors(client: Client) -> dict[str, str | None]:
    return {dead.id: dead.last_error for dead in client.dlq.list()}


def test_an_error_text_that_the_server_cannot_hold_is_stored_in_escaped_form(
    launcher: Launcher, dsn: str, encoding: str
) -> None:
    text, held = TEXT[encoding], HELD[encoding]

    def dead_letter(job: Job) -> MoveToDlq:
        return MoveToDlq(text)

    async def dead_letter_async(job: Job) -> MoveToDlq:
        return MoveToDlq(text)

    def dead_letter_with(job: Job, conn: psycopg.Connection[Any]) -> MoveToDlq:
        conn.execute("select 1")
        return MoveToDlq(text)

    async def dead_letter_async_with(job: Job, conn: psycopg.AsyncConnection[Any]) -> MoveToDlq:
        return MoveToDlq(text)

    def fail(job: Job) -> None:
        raise ValueError(text)

    mux = Mux().register("plain", dead_letter).register("coroutine", dead_letter_async)
    mux.register("transactional", dead_letter_with, transactional=True)
    mux.register("both", dead_letter_async_with, transactional=True)
    mux.register("fails", fail, max_attempts=2, backoff=lambda _: 0.0)
    mux.register("t", lambda job: None)
    types = ["plain", "coroutine", "transactional", "both", "fails"]
    recorder = Recorder()
    with Client(dsn) as client:
        for kind in types:
            client.enqueue(EnqueueRequest("q", kind, EVERY_BYTE, id=f"{kind} {held}"))
        request = EnqueueRequest(f"q{held}", "t", id=held, exclusive=held)
        assert client.bulk_enqueue([request]) == [held]
        assert client.bulk_enqueue([request], on_conflict="skip") == [None]
        schedule = Schedule(held, request=EnqueueRequest("s", "t", EVERY_BYTE), every=1)
        launcher.start(
            mux,
            {"q": 2, f"q{held}": 1},
            observer=recorder,
            services=[Schedules([schedule])],
            poll_interval=0.1,
        )
        assert eventually(lambda: len(errors(client)) == len(types)), recorder.events
        found = errors(client)
        stored = STORED[encoding]
        first, place = str(found.pop(f"fails {held}")).splitlines()
        assert (first, place[-8:]) == (f"ValueError: {stored}", " in fail")
        assert set(found.values()) == {stored}
        assert {dead.arg for dead in client.dlq.list()} == {EVERY_BYTE}
        assert eventually(lambda: recorder.of("completed") == [("completed", held, 1)])
        assert [status.name for status in client.schedules.list()] == [held]
        assert client.dlq.requeue(error=held if encoding != "WIN1252" else "5 ")
    assert not recorder.of("error"), recorder.of("error")


def test_a_job_that_is_run_by_hand_may_fail_with_any_text(dsn: str, encoding: str) -> None:
    mux = Mux().register("t", lambda _: MoveToDlq(TEXT[encoding]))
    with Client(dsn) as client:
        client.enqueue(EnqueueRequest("q", "t", id="a"))
        client.do("q", mux)
        client.enqueue(EnqueueRequest("q", "t", id="b"))
        drain(client, "q", mux)
        assert errors(client) == dict.fromkeys("ab", STORED[encoding])
    with psycopg.connect(dsn) as conn:  # in the encoding of the database
        Client(dsn).enqueue(EnqueueRequest("q", "t", id="c"), conn=conn)
        drain(conn, "q", mux)
        conn.commit()
    assert errors(Client(dsn)) == dict.fromkeys("abc", STORED[encoding])


@pytest.mark.parametrize("encoding", ["LATIN1", "EUC_JP", "WIN1252"], indirect=True)
def test_a_name_that_the_database_cannot_hold_is_refused_where_it_is_enqueued(
    dsn: str, encoding: str
) -> None:
    names: dict[str, Any] = {"queue": "q", "type": "t", "id": "i", "exclusive": "k"}
    with Client(dsn) as client, psycopg.connect(dsn) as conn:
        for name in names:
            for own in (None, conn):
                request = EnqueueRequest(**{**names, name: "✓"})
                with pytest.raises(ValueError, match=f"✓.*{encoding}"):
                    client.enqueue(request, conn=own)
                with pytest.raises(ValueError, match=f"✓.*{encoding}"):
                    client.bulk_enqueue([request], conn=own)
                if name != "exclusive":
                    many = [EnqueueRequest(**{**names, name: f"✓{n:04}"}) for n in range(600)]
                    with pytest.raises(ValueError, match=f"✓0.*{encoding}"):
                        client.bulk_enqueue(many, conn=own)
                conn.rollback()

        async def enqueue() -> None:
            async with AsyncClient(dsn) as other:
                with pytest.raises(ValueError, match=f"✓.*{encoding}"):
                    await other.enqueue(EnqueueRequest("q", "✓"))
                with pytest.raises(ValueError, match=f"✓.*{encoding}"):
                    await other.bulk_enqueue([EnqueueRequest("q", "✓")])

        asyncio.run(enqueue())
        assert client.stats() == []
        client.enqueue(EnqueueRequest("q", "t"))


@pytest.mark.parametrize("how", ["given up", "freed by a sweep", "taken over by do"])
def test_the_session_of_a_claim_ends_with_it_for_any_characters_of_the_id(
    launcher: Launcher, dsn: str, encoding: str, how: str
) -> None:
    ids = [f"{HELD[encoding]} {n}" for n in range(2)]
    lock = "select pg_advisory_xact_lock(1, hashtext(%s))"
    entered: list[tuple[str, int]] = []
    released = threading.Event()

    def handler(job: Job, conn: psycopg.Connection[Any]) -> None:
        conn.execute(lock, [job.id])
        entered.append((job.id, job.attempt))
        if how == "given up" and job.attempt == 1:
            released.wait(PATIENCE)

    limit = 0.2 if how == "given up" else None
    mux = Mux().register("t", handler, transactional=True, timeout=limit, backoff=lambda _: 0.0)
    with (
        Client(dsn) as client,
        psycopg.connect(dsn) as conn,
        closing(psycopg.connect(dsn)) as first,
        closing(psycopg.connect(dsn)) as second,
    ):
        client.bulk_enqueue([EnqueueRequest("q", "t", id=id_) for id_ in ids])
        if how != "given up":
            conn.execute(
                "update bgjob_job set token = 7, attempt = 1, lease_until = now() - interval '1 s'"
            )
            conn.commit()
            for zombie, id_ in zip((first, second), ids, strict=True):
                now = datetime.now(UTC)
                job = Job(id_, "q", "t", None, 1, None, 0, now, now, now)
                codec = server_codec(zombie)
                zombie.execute(
                    begin(Claimed(job, 7), over_tcp=False, server_version=0, codec=codec)
                )
                zombie.execute(lock, [id_])
        if how == "taken over by do":
            for _ in ids:
                client.do("q", mux)
        else:
            launcher.start(mux, concurrency=4, poll_interval=0.1)
        assert eventually(lambda: {id_ for id_, attempt in entered if attempt == 2} == {*ids})
        assert eventually(lambda: not client.stats())
        released.set()
        for zombie in () if how == "given up" else (first, second):
            with pytest.raises(psycopg.OperationalError, match="terminating connection"):
                zombie.execute("select 1")


@pytest.mark.parametrize("encoding", ["LATIN1"], indirect=True)
def test_a_session_reads_names_in_the_encoding_that_it_has_at_the_time(
    launcher: Launcher, dsn: str
) -> None:
    session = session_of(dsn)
    session.open()

    def claim(token: int) -> list[str]:
        marks = {0: datetime(2020, 1, 1, tzinfo=UTC)}
        return [job.id for job in session.exchange(Exchange(claim=Claim(1, token, marks))).claimed]

    try:
        launcher.enqueue("é1")
        assert claim(1) == ["é1"]
        session.use_server_encoding()
        launcher.enqueue("é2")
        assert claim(2) == ["é2"]
        session.lend(lambda _: 0.0)  # ends with a worker's settings
        launcher.enqueue("é3")
        assert claim(3) == ["é3"]
    finally:
        session.close()


# -- a row that cannot be read ---------------------------------------------------------------

# In SQL_ASCII psycopg cannot decode it; in WIN1252 the server cannot convert it.
UNREADABLE = {"SQL_ASCII": b"bad\xff\xfe", "WIN1252": b"bad\x81"}


@pytest.mark.parametrize("encoding", list(UNREADABLE), indirect=True)
@pytest.mark.parametrize("state", ["due", "held", "died"])
def test_a_job_that_cannot_be_read_is_dead_lettered_and_its_neighbours_complete(
    launcher: Launcher, dsn: str, encoding: str, state: str
) -> None:
    done: list[str] = []
    recorder = Recorder()
    with Client(dsn) as client, psycopg.connect(dsn, autocommit=True) as conn:
        client.bulk_enqueue(
            EnqueueRequest("q", "t", id=f"a{n:03}", headers={"tenant": "é✓"}) for n in range(120)
        )
        conn.execute(
            "select set_config('client_encoding', current_setting('server_encoding'), false)"
        )
        conn.execute(
            b"update bgjob_job set id = '%s' || id where id in ('a007', 'a064', 'a119')"
            % UNREADABLE[encoding]
        )
        if encoding == "SQL_ASCII":  # readable only without them
            conn.execute(
                b"""update bgjob_job set headers = '{"x": "\xff"}' where id like 'bad%a007'"""
            )
        if state == "held":
            conn.execute("update bgjob_job set token = 1, lease_until = now() - interval '1 s'")
        elif state == "died":
            conn.execute("update bgjob_job set deaths = 1 where id like 'bad%'")
        launcher.start(
            Mux().register("t", lambda job: done.append(job.id)),
            observer=recorder,
            poll_interval=0.1,
            lease=2,
            concurrency=8,
        )
        assert eventually(lambda: len(set(done)) == 117), recorder.of("error")
        assert eventually(lambda: len(client.dlq.list()) == 3), recorder.of("error")
        found = [(dead.id, dead.arg, dead.last_error) for dead in client.dlq.list()]
        for id_, arg, error in found:
            assert id_.startswith(("bad\\377\\376a", "bad\\201a"))
            assert (arg, "could not be read" in str(error)) == (None, True)
        kept = sorted(str(dict(dead.headers)) for dead in client.dlq.list())
        lost = ["{}"] if encoding == "SQL_ASCII" else []
        assert kept == sorted([*lost, *["{'tenant': 'é✓'}"] * (3 - len(lost))])
        assert [group.jobs for group in client.dlq.groups()] == [3]
        assert len(done) == 117
        assert any("could not be read" in str(error) for _, error in recorder.of("error"))
        assert eventually(
            lambda: [(s.due, s.running, s.dead) for s in client.stats()] == [(0, 0, 3)]
        )
