"""Changes of the primary under load: `pytest -m cluster`, which takes 20 to 40 minutes.

Ten worker processes and four producers have a connection string with all servers. The primary is
switched, killed, stopped and cut off, again and again; after each change the new one's first
commit begins the time until the first job's effect, and until each worker has had one. None of
them is restarted, and an old primary that is stopped or cut off comes back only then.
"""

import contextlib
import itertools
import random
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, LiteralString, NamedTuple

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from support.waiting import eventually

from bgjob import AsyncClient, Client, EnqueueRequest
from bgjob.ext.embedded import _bin_dir_of_wheel
from bgjob.schedule import Schedule
from bgjob.schedules import Schedules
from bgjob.schema import init_sql
from cluster.losses import Losses
from cluster.patroni import PATIENCE, Cluster, Node, cluster_of, in_time, missing
from faults.app import LEDGER
from faults.places import Place, ask_for_places, last_place, place
from faults.soak import BACKLOG, Monitor, Producer
from faults.world import World

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]

ROUNDS = 5
"""Of the four ways in which a primary changes."""

WORKERS = 10

KEYS = 10


Goes = Callable[[Node], object]
"""Waits until work goes on at a new primary: in each worker process."""


def switch(cluster: Cluster, primary: Node, goes_on: Goes) -> Node:
    """Ask Patroni to make another server the primary."""
    status, answer = primary.ask("POST", "switchover", {"leader": primary.name})
    assert status == 200, answer
    new = cluster.wait_for_primary(other_than=primary)
    goes_on(new)
    return new


def kill(cluster: Cluster, primary: Node, goes_on: Goes) -> Node:
    """Kill the server; its Patroni lives, and starts it again if no other one may follow."""
    killed = primary.postmaster
    primary.kill_server()
    new = cluster.wait_for_primary(than_process=killed)
    goes_on(new)
    return new


def stop(cluster: Cluster, primary: Node, goes_on: Goes) -> Node:
    """Stop the server and its Patroni until work goes on at another primary."""
    primary.signal(signal.SIGSTOP)
    try:
        new = cluster.wait_for_primary(other_than=primary)
        goes_on(new)
    finally:
        primary.signal(signal.SIGCONT)
    return new


def cut_off(cluster: Cluster, primary: Node, goes_on: Goes) -> Node:
    """Cut the primary off from etcd and the others, while clients still reach it."""
    primary.cut_off()
    try:
        new = cluster.wait_for_primary(other_than=primary)
        goes_on(new)
    finally:
        primary.mend()
    return new


CHANGES = (switch, kill, stop, cut_off)


class Change(NamedTuple):
    """A change of the primary."""

    way: str
    timeline: int
    """That of the old primary."""
    began: float
    first: float
    """Seconds from the new primary's first commit to the first effect of a job."""
    all: float
    """Seconds from there until each worker process had one."""


class Scene:
    """A cluster with workers and producers."""

    def __init__(self, cluster: Cluster, world: World) -> None:
        self.cluster = cluster
        self.world = world
        self.changes: list[Change] = []

    def change(self, way: Callable[[Cluster, Node, Goes], Node]) -> None:
        """Change the primary; wait until each worker has effects, and the cluster is whole."""
        old = self.cluster.wait_for_primary()
        with psycopg.connect(self.cluster.dsn_of(old)) as conn:
            timeline = place(conn).timeline
        began = time.time()
        accepted: Future[float] = Future()
        args = (old, old.postmaster, accepted)
        threading.Thread(target=self._watch, args=args, name="accepted").start()
        effects: list[float] = []

        def goes_on(new: Node) -> None:
            effects[:] = self._first_effects(new, accepted.result(PATIENCE))

        new = way(self.cluster, old, goes_on)
        first, *_, last = effects
        self.changes.append(Change(way.__name__, timeline, began, first, last))
        print(
            f"{len(self.changes):2} {way.__name__:8}{first:5.2f} s, all workers{last:6.2f} s",
            flush=True,
        )
        self.world.saw(f"{old.name} was followed by {new.name}: {way.__name__}")
        assert new is old or in_time(old.is_standby)
        self.cluster.wait_until_whole()

    def _watch(self, old: Node, process: int | None, accepted: "Future[float]") -> None:
        """Note when another server than the old primary commits, or that one as a new process."""
        until = time.monotonic() + PATIENCE
        with contextlib.ExitStack() as stack:
            sessions: dict[Node, psycopg.Connection[Any]] = {}
            while time.monotonic() < until:
                for node in self.cluster.nodes:
                    if node is old and node.postmaster in (None, process):
                        continue
                    try:
                        if node not in sessions:
                            conn = psycopg.connect(
                                self.cluster.dsn_of(node, dbname="jobs"),
                                connect_timeout=2,
                                autocommit=True,
                            )
                            sessions[node] = stack.enter_context(contextlib.closing(conn))
                        accepted.set_result(_committed_at(sessions[node]))
                        return
                    except psycopg.Error:
                        if node in sessions and sessions[node].closed:
                            del sessions[node]
                time.sleep(0.02)

    def _first_effects(self, node: Node, since: float) -> list[float]:
        """The seconds until each worker process had its first effect, the least first."""
        pids = {process.pid for process in self.world.processes}
        found: dict[int, float] = {}
        with psycopg.connect(self.cluster.dsn_of(node, dbname="jobs"), autocommit=True) as conn:

            def have_effects() -> bool:
                rows = conn.execute(
                    "select pid, extract(epoch from min(at))::float8 from ledger "
                    "where at > to_timestamp(%s) and kind in ('plain', 'transactional') "
                    "group by pid",
                    [since],
                ).fetchall()
                found.update(rows)
                return found.keys() >= pids

            has_all = eventually(have_effects, 60)
        assert has_all, f"{pids - found.keys()} had no effect after {since}"
        return sorted(at - since for at in found.values())

    def tell(self) -> None:
        """Print how long it took."""
        for way in CHANGES:
            changes = [each for each in self.changes if each.way == way.__name__]
            for what, seconds in (
                ("first effect", sorted(each.first for each in changes)),
                ("all workers", sorted(each.all for each in changes)),
            ):
                told = ", ".join(f"{each:.2f}" for each in seconds)
                print(
                    f"{way.__name__}: {what}: median {statistics.median(seconds):.2f} s of {told}"
                )


def _committed_at(conn: psycopg.Connection[Any]) -> float:
    """Commit on a connection; return when, by the server's clock. A standby refuses."""
    conn.execute("insert into probe default values")
    [[now]] = conn.execute("select extract(epoch from clock_timestamp())::float8").fetchall()
    return float(now)


_ENDED: LiteralString = """
    select exists (select from bgjob_history where job_id = any(%s))
        or exists (select from bgjob_dead_job where job_id = any(%s))
"""
"""As the producers' own query, but for jobs that are kept: an ordinary handler may have its effect at
the new primary, and its job was only at the old one."""


@contextlib.contextmanager
def producing(
    world: World, dsn: str, note: Callable[[Place], object] | None = None
) -> Iterator[list[Producer]]:
    """Produce in each way, one by one and in bulk, until the end of a `with` block.

    With `note` each commit is asked for its place, before it is acknowledged to the world by
    the same thread. One that cannot tell counts as without an answer.
    """
    monitor = Monitor(world)
    coroutine = AsyncClient(dsn)
    plain = Client(dsn)
    world.run(_nothing())
    if note is not None:
        ask_for_places(coroutine)
        ask_for_places(plain)

    def written() -> None:
        if note is not None:
            note(last_place())

    def written_on(conn: psycopg.Connection[Any]) -> None:
        if note is not None:
            note(place(conn))

    def one_by_one(requests: list[EnqueueRequest]) -> None:
        if len(requests) == 1:
            plain.enqueue(requests[0])
        else:
            plain.bulk_enqueue(requests)
        written()

    def with_keys(requests: list[EnqueueRequest]) -> None:
        plain.bulk_enqueue(
            [replace(each, exclusive=f"key {hash(each.id) % KEYS}") for each in requests]
        )
        written()

    async def enqueue(requests: list[EnqueueRequest]) -> Place | None:
        await coroutine.bulk_enqueue(requests)
        return None if note is None else last_place()

    def awaited(requests: list[EnqueueRequest]) -> None:
        at = world.run(enqueue(requests))
        if note is not None and at is not None:
            note(at)

    def in_a_transaction(requests: list[EnqueueRequest]) -> None:
        with psycopg.connect(dsn) as conn:
            conn.execute("select txid_current()")
            plain.bulk_enqueue(requests, conn=conn)
            conn.commit()
            written_on(conn)

    ways = [one_by_one, awaited, in_a_transaction, with_keys]
    more: dict[str, Any] = {} if note is None else {"repeated": written_on, "anywhere": _ENDED}
    producers = [
        Producer(name, world, random.Random(name), way, lambda: monitor.backlog < BACKLOG, **more)
        for name, way in zip("abcd", ways, strict=True)
    ]
    monitor.start()
    for producer in producers:
        producer.start()
    try:
        yield producers
    finally:
        for producer in producers:
            producer.end()
        for producer in producers:
            producer.join()
        monitor.stop()
        world.run(coroutine.close())
        plain.close()


async def _nothing() -> None: ...


@pytest.fixture
def programs(bin_dir: Path | None) -> Path:
    return bin_dir or _bin_dir_of_wheel()


TICK = Schedule("s", every=1, missed="all", request=EnqueueRequest("scheduled", "transactional"))


def scene_of(cluster: Cluster, **options: Any) -> Scene:
    """Make the database on the primary, and start the workers, one of which has a schedule."""
    with psycopg.connect(cluster.dsn(), autocommit=True) as conn:
        conn.execute("create database jobs")
    dsn = cluster.dsn(dbname="jobs", connect_timeout=2)
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute(init_sql().encode())
        conn.execute(LEDGER.encode())
        conn.execute("create table probe (at timestamptz default now())")
        conn.execute("create index on ledger (job_id)")
        conn.execute("create index on ledger (at)")
        # A primary that changes now, on a busy host, must not lose the tables.
        [made] = conn.execute("select pg_current_wal_lsn()").fetchone() or [None]
        has_all = "select count(*) = 2 from pg_stat_replication where replay_lsn >= %s::pg_lsn"
        assert in_time(lambda: conn.execute(has_all, [made]).fetchone() == (True,))
    world = World(dsn, lease=3.0, poll_interval=0.5)
    for number in range(WORKERS):
        colour = "async" if number % 2 else "thread"
        # A handler's own SQL on a server that is stopped would wait until it goes on.
        world.start(colour=colour, concurrency=4, timeout=12.0, max_attempts=1000, **options)
    mux = world.mux(max_attempts=1000)
    world.worker(mux, queue="scheduled", services=[Schedules([TICK])], lease=3.0)
    return Scene(cluster, world)


def check_schedule(world: World) -> None:
    """Check that each tick had one effect, and that the schedule goes on."""
    query = (
        "select substr(job_id, 12)::timestamptz from ledger "
        "where job_id like 'schedule:s:%' order by 1"
    )
    found = len(world.query(query))
    assert eventually(lambda: len(world.query(query)) > found)
    ticks = [tick for (tick,) in world.query(query)]
    gaps = {after - before for before, after in itertools.pairwise(ticks)}
    assert gaps == {timedelta(seconds=1)}, gaps


def test_with_synchronous_replication_nothing_is_lost(programs: Path) -> None:
    with cluster_of(programs, is_synchronous=True) as cluster:
        scene = scene_of(cluster)
        world = scene.world
        is_good = False
        try:
            with producing(world, world.dsn):
                for _ in range(ROUNDS):
                    for way in CHANGES:
                        scene.change(way)
            world.done(timeout=120)
            check_schedule(world)
            scene.tell()
            print(f"{len(world.jobs):,} jobs")
            assert all(process.alive for process in world.processes)
            is_good = True
        finally:
            world.close(judge=is_good)


def test_with_asynchronous_replication_the_last_commits_are_lost_and_nothing_else(
    programs: Path,
) -> None:
    """What the new primary lacks of the old one's log is lost, and nothing that it has."""
    with cluster_of(programs, is_synchronous=False) as cluster:
        scene = scene_of(cluster, keep=True, tells_places=True)
        world = scene.world
        at: dict[str, Place] = {}
        times: dict[str, float] = {}
        noted = threading.local()
        acknowledge = world.acknowledge

        def note(where: Place) -> None:
            noted.place, noted.time = where, time.time()

        def note_acknowledged(*ids: str, **options: Any) -> None:
            at.update(dict.fromkeys(ids, noted.place))
            times.update(dict.fromkeys(ids, noted.time))
            acknowledge(*ids, **options)

        world.acknowledge = note_acknowledged  # type: ignore[method-assign]
        is_good = False
        try:
            with producing(world, world.dsn, note):
                for _ in range(ROUNDS):
                    for way in CHANGES:
                        scene.change(way)
            world.done(timeout=120)
            losses = Losses(world, at)
            wrong = losses.judge()
            tell_losses(scene, losses, times)
            assert not wrong, f"{len(wrong)} wrong, {losses.timelines.ends}: {wrong[:10]}"
            # Their ids are free: enqueued again, they run.
            world.client.bulk_enqueue(losses.again())
            world.done(timeout=60)
            check_schedule(world)
            scene.tell()
            assert all(process.alive for process in world.processes)
            is_good = True
        finally:
            world.close(judge=is_good)


def tell_losses(scene: Scene, losses: Losses, times: Mapping[str, float]) -> None:
    """Print what each change has lost."""
    for change in scene.changes:
        jobs = [id for id, at in losses.jobs.items() if at.timeline == change.timeline]
        since = [times[id] - change.began for id in jobs if id in times]
        rows = [at for at in losses.effects.values() if at.timeline == change.timeline]
        span = f", enqueued {min(since):.2f} to {max(since):.2f} s after it began" if since else ""
        print(f"{change.way:8}lost {len(jobs):4} jobs and {len(rows):4} rows{span}")
    again = sum(runs > 1 for runs in losses.runs.values())
    print(
        f"{len(losses.jobs)} of {len(scene.world.jobs):,} jobs were lost, {len(losses.effects)} rows "
        f"of ordinary handlers; {again} jobs had more than one row"
    )
