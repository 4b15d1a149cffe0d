"""The contract in SQL: rows that any program may write, and bgjob's own statement for any driver."""

import asyncio
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from datetime import UTC, datetime, timedelta
from typing import Any, cast
from uuid import UUID

import asyncpg
import psycopg
import psycopg2
import pytest
from support.clients import HOSTILE
from support.database import row, rows, sleeper
from support.databases import Databases
from support.documents import DOCS, SCRIPT
from support.roles import Roles
from support.waiting import NEVER, eventually
from support.workers import Launcher, Recorder

import bgjob.sql
from bgjob import Client, EnqueueRequest, Job, Mux, RequestsRequiredError
from bgjob._engine.reply import Notice
from bgjob._sql import enqueues
from bgjob.job import new_id
from bgjob.sql import Paramstyle

GUIDE = (DOCS / "guide.md").read_text("utf-8")


@pytest.fixture(scope="module")
def home(databases: Databases, template: str) -> Iterator[str]:
    """The DSN of the module's database."""
    with databases.lend(template, may_keep=lambda: False) as dsn:
        yield dsn


@pytest.fixture
def dsn(home: str) -> Iterator[str]:
    yield home
    with psycopg.connect(home) as conn:
        conn.execute("delete from bgjob_job")


@pytest.fixture(scope="module")
def producer(home: str) -> Iterator[str]:
    """The DSN of a login with the privileges of a producer, and no others."""
    with closing(Roles(home)) as roles:
        roles.apply()
        yield roles.login("producer")


# -- rows ------------------------------------------------------------------------------------


def test_a_job_needs_a_queue_and_a_type_and_gets_the_rest_from_the_server(
    dsn: str, conn: psycopg.Connection, producer: str
) -> None:
    before = new_id()
    with psycopg.connect(producer) as own:
        for _ in range(3):
            own.execute(
                "insert into bgjob_job (queue, type) select 'q', 't' from generate_series(1, 100)"
            )
    ids = [id_ for (id_,) in rows(conn, "select id from bgjob_job order by next_run_at, id")]
    # The ids of the server and those of bgjob are of one kind and one order.
    assert before < ids[0] and ids == sorted(ids) and ids[-1] < new_id()
    assert len(set(ids)) == 300
    assert {(UUID(id_).version, UUID(id_).variant, str(UUID(id_)) == id_) for id_ in ids} == {
        (7, UUID(before).variant, True)
    }
    found: list[Job] = []
    with Client(dsn) as client:
        client.do("q", Mux().register("t", found.append))
    [job] = found
    assert (job.queue, job.type, job.arg, job.attempt) == ("q", "t", None, 1)
    assert (job.priority, job.exclusive, job.last_error) == (0, None, None)


def test_the_guide_lists_the_columns_that_a_producer_may_write_with_their_types_and_defaults(
    conn: psycopg.Connection,
) -> None:
    [section] = re.findall(r"^### Plain SQL\n(.*?)^###", GUIDE, re.MULTILINE | re.DOTALL)
    told = re.findall(r"^\| `(\w+)` \| ([\w() ]+) \| (.*?) \|", section, re.MULTILINE)
    [granted, own] = re.findall(r"insert \(([^)]*)\)\s+on bgjob_job\s+to bgjob_producer", SCRIPT)
    assert {name for name, *_ in told} == set(granted.split(", "))
    assert own == "group_id"
    real = {
        name: (
            kind.replace("character varying", "varchar").replace(
                "timestamp with time zone", "timestamptz"
            ),
            default,
        )
        for name, kind, default in rows(
            conn,
            "select attname, format_type(atttypid, atttypmod), pg_get_expr(adbin, adrelid) "
            "from pg_attribute left join pg_attrdef on adrelid = attrelid and adnum = attnum "
            "where attrelid = 'bgjob_job'::regclass and attnum > 0",
        )
    }
    for name, kind, default in told:
        assert kind == real[name][0]
        if name != "id":
            expected = None if default in ("null", "none") else default.strip("`")
            assert real[name][1] == expected, name
    needed = rows(
        conn,
        "select attname from pg_attribute where attrelid = 'bgjob_job'::regclass and attnum > 0 "
        "and attnotnull and not atthasdef",
    )
    assert {name for (name,) in needed} == {name for name, _, default in told if default == "none"}


def test_the_line_of_the_guide_wakes_the_workers_of_an_insert_by_hand(
    launcher: Launcher, conn: psycopg.Connection, producer: str
) -> None:
    [lines] = re.findall(
        r"^```sql\n(insert into bgjob_job.*?)^```", GUIDE, re.MULTILINE | re.DOTALL
    )
    insert, wake = lines.splitlines()
    observer = Recorder()
    launcher.start(
        Mux().register("confirm", lambda job: print(job.json()["order"])),
        "mail",
        observer=observer,
        poll_interval=NEVER,
    )
    with psycopg.connect(producer, autocommit=True) as own:
        # In its transaction, and after it; a notification without a queue is for all.
        for times, texts in enumerate(
            ([f"begin; {insert} {wake} commit"], [insert, wake], [insert, "notify bgjob"]), 1
        ):
            assert eventually(lambda: sleeper(conn) is not None)
            for text in texts:
                own.execute(cast(Any, text))
            observer.wait_for("completed", times=times)
        later = "clock_timestamp() + interval '100 ms'"
        own.execute(
            "insert into bgjob_job (id, queue, type, arg, next_run_at) "
            f"values ('later', 'mail', 'confirm', '{{\"order\": 1}}', {later}), "
            f"('past', 'mail', 'confirm', '{{\"order\": 1}}', '2000-01-01')"
        )
        own.execute("notify bgjob, 'mail'")
        observer.wait_for("completed", "past")
        observer.wait_for("completed", "later")
    assert observer.of("error") == []


def test_a_notification_by_hand_is_for_one_queue_or_all() -> None:
    assert Notice.read_by_hand("", "q") == Notice.read_by_hand("q", "q") == Notice(later=True)
    assert Notice.read_by_hand("r", "q") is None


def test_the_statements_of_the_go_program_in_the_guide_run(
    dsn: str, conn: psycopg.Connection, producer: str
) -> None:
    [program] = re.findall(r"^```go\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)
    order, *ours = re.findall(r"`([^`]+)`, (.*)\)$", program, re.MULTILINE)
    assert order[0].startswith("insert into orders")
    values = {'"mail"': "mail", '"confirm"': "confirm", "payload": b'{"order": 2}'}
    with psycopg.connect(producer) as own, psycopg.RawCursor(own) as cursor:
        for text, arguments in ours:
            cursor.execute(text, [values[name] for name in arguments.split(", ")], binary=True)
    found: list[Any] = []
    with Client(dsn) as client:
        client.do("mail", Mux().register("confirm", lambda job: found.append(job.json())))
    assert found == [{"order": 2}]


# -- bgjob's statement -----------------------------------------------------------------------

Sent = list[tuple[Any, ...]]
Parameters = Mapping[str, object] | Sequence[object]


def by_psycopg(dsn: str, text: Any, parameters: Any) -> Sent:
    with psycopg.connect(dsn) as conn:
        return conn.execute(text, parameters).fetchall()


def by_psycopg2(dsn: str, text: Any, parameters: Any) -> Sent:
    with closing(psycopg2.connect(dsn)) as conn, conn, conn.cursor() as cursor:
        cursor.execute(text, parameters)
        return list(cursor.fetchall())


def by_asyncpg(dsn: str, text: Any, parameters: Any) -> Sent:
    async def send() -> Sent:
        parts = psycopg.conninfo.conninfo_to_dict(dsn)
        conn = await asyncpg.connect(
            host=parts["host"], port=parts.get("port"), user=parts["user"], database=parts["dbname"]
        )
        try:
            return [tuple(row) for row in await conn.fetch(text, *parameters)]
        finally:
            await conn.close()

    return asyncio.run(send())


def by_numbers(dsn: str, text: str, parameters: Any) -> Sent:
    """As a driver of the style "numeric" would: no driver of PostgreSQL here has it."""
    with psycopg.connect(dsn) as conn, psycopg.RawCursor(conn) as cursor:
        return cursor.execute(cast(Any, re.sub(r":(\d+)", r"$\1", text)), parameters).fetchall()


def by_names(dsn: str, text: str, parameters: Any) -> Sent:
    """As a driver of the style "named" would."""
    return by_psycopg(dsn, re.sub(r":([a-z_]+)", r"%(\1)s", text), parameters)


DRIVERS: Sequence[tuple[Paramstyle, Callable[[str, Any, Any], Sent]]] = [
    ("pyformat", by_psycopg),
    ("pyformat", by_psycopg2),
    ("named", by_names),
    ("numeric", by_numbers),
    ("dollar", by_asyncpg),
]
in_every_driver = pytest.mark.parametrize(
    ("style", "send"), DRIVERS, ids=[send.__name__ for _, send in DRIVERS]
)

WRITTEN = """
    select id, queue, type, arg, priority, exclusive, headers::text, attempt, waits, token,
        case when id = 'timed' then next_run_at::text
            else extract(epoch from next_run_at - created_at)::int::text end
    from bgjob_job order by id
"""

REQUESTS = [
    EnqueueRequest("q", "t", id="plain"),
    EnqueueRequest("q", "t", bytes(range(256)), id="bytes", priority=-32768),
    EnqueueRequest("q", "t", {"a": "é"}, id="delayed", delay=60, exclusive="key", priority=1),
    EnqueueRequest("q", "t", id="headers", headers={"é": ["✓", 1], "n": None}),
    EnqueueRequest("q", "t", id="timed", run_at=datetime.now(UTC) + timedelta(hours=1)),
    EnqueueRequest("q", "t", id="past", run_at=datetime(2000, 1, 1, tzinfo=UTC)),
    *(EnqueueRequest(name, name, id=name, exclusive=name[:99]) for name in HOSTILE),
]


@in_every_driver
def test_the_statement_writes_what_a_client_writes(
    style: Paramstyle,
    send: Callable[..., Sent],
    dsn: str,
    conn: psycopg.Connection,
    producer: str,
) -> None:
    with Client(producer) as client:
        for request in REQUESTS:
            client.enqueue(request)
    expected = rows(conn, WRITTEN)
    conn.execute("delete from bgjob_job")

    for request in REQUESTS[:6]:
        assert len(send(producer, *bgjob.sql.enqueue(request, style))) == 1
        assert send(producer, *bgjob.sql.enqueue(request, style)) == []
    [[written, *_]] = send(producer, *bgjob.sql.enqueue_many(REQUESTS, style))
    assert sorted(written) == sorted(HOSTILE)
    assert rows(conn, WRITTEN) == expected
    assert row(conn, "select min(next_run_at) > now() - interval '1 hour' from bgjob_job")[0]


@in_every_driver
def test_the_statement_wakes_a_sleeping_worker(
    style: Paramstyle, send: Callable[..., Sent], dsn: str, conn: psycopg.Connection, producer: str
) -> None:
    observer = Recorder()
    mux = Mux().register("t", lambda _: None)
    with closing(Launcher(dsn, is_async=False)) as launcher:
        launcher.start(mux, observer=observer, poll_interval=NEVER)
        for request in (EnqueueRequest("q", "t"), EnqueueRequest("q", "t", delay=0.05)):
            for statement in (
                bgjob.sql.enqueue(request, style),
                bgjob.sql.enqueue_many([EnqueueRequest("q", "t", delay=request.delay)], style),
            ):
                assert eventually(lambda: sleeper(conn) is not None)
                done = len(observer.of("completed"))
                send(producer, *statement)
                observer.wait_for("completed", times=done + 1)


@pytest.mark.parametrize("notify", [False, True])
def test_the_statement_is_the_one_that_bgjob_sends(*, notify: bool) -> None:
    def spaceless(text: Any) -> str:
        return re.sub(r"\s+|(?<=\))b", "", text.replace(")b", ")s"))

    for request in REQUESTS[:6]:
        text, parameters = bgjob.sql.enqueue(request, notify=notify)
        own = enqueues.enqueue(request, notify=notify)
        assert (spaceless(text), parameters) == (spaceless(own.text), own.params)
        assert ("notify" in text) is notify
    text, _ = bgjob.sql.enqueue_many(iter(REQUESTS), notify=notify)
    assert spaceless(text) == spaceless(enqueues.enqueue_many(REQUESTS, notify=notify).text)
    assert ("notify" in text) is notify


def test_the_texts_do_not_depend_on_the_job() -> None:
    texts = {
        bgjob.sql.enqueue(EnqueueRequest(f"q{n}", "t", n, priority=n), "dollar")[0]
        for n in range(9)
    }
    texts |= {
        bgjob.sql.enqueue(EnqueueRequest("q", "t", exclusive="k", id=f"{n}"), "dollar")[0]
        for n in range(9)
    }
    assert len(texts) == 2


def test_a_statement_in_an_unknown_style_or_for_no_job_is_refused() -> None:
    with pytest.raises(ValueError, match="paramstyle must be one of .*dollar, not 'qmark'"):
        bgjob.sql.enqueue(EnqueueRequest("q", "t"), cast(Any, "qmark"))
    with pytest.raises(RequestsRequiredError):
        bgjob.sql.enqueue_many([], "dollar")
