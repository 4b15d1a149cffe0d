"""A database moves to a new server by logical replication, with the steps of operations.md."""

import itertools
import random
import re
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from conftest import find_bin_dir
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.errors import ReadOnlySqlTransaction
from support.documents import DOCS
from support.waiting import eventually

from bgjob import EnqueueRequest, Limit, Mux
from bgjob.ext.embedded import EmbeddedServer
from bgjob.schedule import Schedule
from bgjob.schedules import Schedules
from bgjob.schema import init_sql
from faults.app import LEDGER
from faults.soak import Producer
from faults.world import World

SETTINGS = {
    "fsync": "off",
    "wal_level": "logical",
    "max_connections": "100",
    "wal_receiver_status_interval": "1s",
}

SLOTS = 4
"""Of each worker but two."""

WAYS: list[dict[str, Any]] = [
    {},
    {"linger": 0.1},
    {"children": 2},
    {"then": "retry", "until": 2},
    {"then": "reschedule"},
    {"then": "dlq"},
]

CONTENT = """
    select coalesce(md5(string_agg(t::text, e'\\n' order by t::text)), ''), count(*) from {} as t
"""


def steps() -> Iterator[tuple[str, list[str]]]:
    """The section's blocks of SQL: on which server, and the statements."""
    text = (DOCS / "operations.md").read_text("utf-8")
    [section] = re.findall(r"^## A new major version$(.*?)^## ", text, re.MULTILINE | re.DOTALL)
    for server, block in re.findall(
        r"^ *```sql\n *-- on the (old|new) server\n(.*?)^ *```$", section, re.MULTILINE | re.DOTALL
    ):
        yield server, [each.strip() for each in re.split(r";$", block, flags=re.MULTILINE)][:-1]


class Pair:
    """The old server and the new one, with a session of a superuser on each, as in psql."""

    def __init__(self, old: EmbeddedServer, new: EmbeddedServer) -> None:
        for server in (old, new):
            with psycopg.connect(server.dsn, autocommit=True) as conn:
                conn.execute("create database shop")
            with psycopg.connect(make_conninfo(server.dsn, dbname="shop")) as conn:
                conn.execute(init_sql().encode())
                conn.execute(LEDGER.encode())
                conn.execute("alter table run replica identity full")
        self.old_dsn, self.new_dsn = (
            make_conninfo(server.dsn, dbname="shop") for server in (old, new)
        )
        self._admins = {
            "old": psycopg.connect(self.old_dsn, autocommit=True, application_name="psql"),
            "new": psycopg.connect(self.new_dsn, autocommit=True, application_name="psql"),
        }
        self._steps = steps()
        both = [conninfo_to_dict(server.dsn) for server in (old, new)]
        self.dsn = make_conninfo(
            old.dsn,
            dbname="shop",
            host=",".join(str(each["host"]) for each in both),
            port=",".join(str(each["port"]) for each in both),
            target_session_attrs="read-write",
        )

    def close(self) -> None:
        for admin in self._admins.values():
            admin.close()

    def ask(self, server: str, query: str) -> list[tuple[object, ...]]:
        cursor = self._admins[server].execute(query.encode())
        return cursor.fetchall() if cursor.description else []

    def take(self, *, until: list[tuple[object, ...]] | None = None) -> list[tuple[object, ...]]:
        """Take the next step of the section; return the rows of its last statement.

        Args:
            until: the rows to repeat that statement for.

        """
        server, statements = next(self._steps)
        for statement in statements:
            statement = statement.replace("host=old dbname=shop user=postgres", self.old_dsn)
            rows = self.ask(server, statement)
        if until is not None:
            assert eventually(lambda: self.ask(server, statement) == until), statement
        return rows

    def contents(self) -> dict[str, list[list[tuple[object, ...]]]]:
        """What is in each table, on both servers."""
        tables = self.ask(
            "old",
            "select oid::regclass::text from pg_class "
            "where relkind = 'r' and relnamespace = 'public'::regnamespace",
        )
        return {
            str(table): [self.ask(server, CONTENT.format(table)) for server in ("old", "new")]
            for (table,) in tables
        }


pytestmark = pytest.mark.timeout(120)


@pytest.fixture(params=["same", "15"])
def pair(request: pytest.FixtureRequest, quick_bin_dir: Path) -> Iterator[Pair]:
    """Two servers of the run's version; one of version 15, and one of the wheel's."""
    old: Path | None = quick_bin_dir
    new: Path | None = quick_bin_dir
    if request.param != "same":
        try:
            old, new = find_bin_dir(request.param), find_bin_dir("embedded")
        except pytest.UsageError as error:
            pytest.skip(str(error))
    with (
        EmbeddedServer(bin_dir=old, settings=SETTINGS) as old_server,
        EmbeddedServer(bin_dir=new, settings=SETTINGS) as new_server,
    ):
        pair = Pair(old_server, new_server)
        try:
            yield pair
        finally:
            pair.close()


class Production:
    """Enqueues jobs of all kinds one after the other, on a thread."""

    def __init__(self, world: World) -> None:
        self.count = 0
        self._dice = random.Random(15)
        self._end = threading.Event()
        enqueue = world.client.bulk_enqueue
        self._producer = Producer("p", world, self._dice, enqueue, lambda: True)
        self._thread = threading.Thread(target=self._run, name="production")
        self._thread.start()

    def _run(self) -> None:
        while not self._end.wait(0.01):
            kind = self._dice.choice(["plain", "transactional"])
            self._producer.produce(kind, self._dice.choice(WAYS))
            self.count += 1

    def end(self) -> None:
        self._end.set()
        self._thread.join()
        self._producer.join()


def test_a_database_moves_to_a_new_major_version_while_its_jobs_run(pair: Pair) -> None:
    world = World(pair.dsn, lease=5.0, poll_interval=0.2)
    is_good = False
    try:
        move(world, pair)
        is_good = True
    finally:
        world.close(judge=is_good)


def move(world: World, pair: Pair) -> None:
    assert pair.take() == []  # the new server is closed to clients
    for colour in ("thread", "async"):
        world.start(colour=colour, concurrency=SLOTS)
    tick = Schedule("s", every=1, missed="all", request=EnqueueRequest("scheduled", "plain"))
    world.worker(world.mux(), queue="scheduled", services=[Schedules([tick])], concurrency=1)
    kept = Mux().register("kept", lambda job: None, keep=True)
    world.worker(kept, queue="kept")
    world.worker(world.mux(), queue="limited", concurrency=SLOTS)

    client = world.client
    client.pause("paused")
    client.limits.set("queue", "limited", Limit(concurrency=1))
    world.enqueue("plain", "paused", queue="paused", ledger=False)
    client.enqueue(EnqueueRequest("kept", "kept", id="kept"))
    client.enqueue(EnqueueRequest("q", "plain", id="early", keep=3600))
    client.enqueue(EnqueueRequest("q", "plain", id="late", keep=3600, delay=3600))
    then = EnqueueRequest("q", "plain", {"told": True}, id="then")
    with client.group(then=then) as group:
        group.enqueue_many(
            EnqueueRequest("q", "plain", id=id, delay=delay)
            for id, delay in (("member", 0), ("last", 3600))
        )
    production = Production(world)
    try:
        pair.take()  # publication
        pair.take()  # subscription
        pair.take(until=[(0,)])  # all tables are copied
        # These run while it moves.
        world.enqueue("chunks", "chunks", count=40, sleep=0.05)
        for key in ("a", "b"):
            ids = [f"{key}{n}" for n in range(20)]
            world.enqueue("plain", *ids, exclusive=key, timed=True, linger=0.05)
        ids = [f"limited{n}" for n in range(20)]
        world.enqueue("plain", *ids, queue="limited", timed=True, linger=0.05)
        assert eventually(lambda: world.rows("limited3") and world.rows("a3"))

        pair.take(until=[])  # the old server is closed to clients
        with pytest.raises(ReadOnlySqlTransaction), psycopg.connect(pair.old_dsn) as conn:
            conn.execute("insert into ledger values ('id', 1, 'kind', 1)")
        pair.take(until=[(True,)])  # the new server has all
        contents = pair.contents()
        for table, (there, here) in contents.items():
            assert there == here, table
        [[number]] = pair.ask("old", "select max(id) from bgjob_dead_job")
        for (statement,) in pair.take():
            pair.ask("new", str(statement))
        sequences = "select sequencename, last_value from pg_sequences order by 1"
        assert pair.ask("new", sequences) == pair.ask("old", sequences)
        began = production.count
        pair.take()  # the new server is open
        assert eventually(lambda: production.count > began + 20)
    finally:
        # If a step failed, both servers are closed, and the producer would wait.
        pair.ask("new", "alter database shop reset default_transaction_read_only")
        production.end()

    client.jobs.run_now(["late", "last"])
    world.enqueue("plain", "fails", then="dlq")
    world.done(*(id for id in world.jobs if id != "paused"))
    world.saw("a job died on the new server", world.live("fails") == 0)
    assert world.query("select id > %s from bgjob_dead_job where job_id = 'fails'", [number]) == [
        (True,)
    ]
    assert world.live("paused") == 1
    assert client.result("early").value == client.wait("late", timeout=30) == {"attempt": 1}
    assert eventually(lambda: world.rows("then", "told 0"))
    assert len(client.history("kept")) == 1
    assert world.value("select count(distinct token) from ledger where kind = 'chunks'") == 40
    assert world.value("select count(*) from ledger where kind = 'chunks'") == 40
    # Of one key, and of the queue with the limit, one handler ran at a time.
    assert not world.query(
        "select a.job_id, b.job_id from run a join run b on a.began < b.began "
        "and b.began < a.ended and left(a.job_id, 2) = left(b.job_id, 2) "
        "and a.key is not distinct from b.key"
    )
    # What ran twice was in a handler when its connection was ended, or had ended and was not settled.
    twice = world.query(
        "select job_id from ledger where kind = 'plain' group by job_id having count(*) > 1"
    )
    assert len(twice) <= 8 * SLOTS, twice
    # The schedule missed no tick.
    ticks = world.query(
        "select distinct substr(job_id, 12)::timestamptz from ledger "
        "where job_id like 'schedule:s:%' order by 1"
    )
    assert len(ticks) > 3
    assert {after - before for (before,), (after,) in itertools.pairwise(ticks)} == {
        timedelta(seconds=1)
    }
    # Nothing was written on the old server.
    assert {table: there for table, (there, _) in pair.contents().items()} == {
        table: there for table, (there, _) in contents.items()
    }
