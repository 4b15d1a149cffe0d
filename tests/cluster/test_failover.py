"""Changes of the primary under load: `pytest -m cluster`, which takes 20 minutes on a quiet host.

Ten worker processes and four producers have a connection string with all servers. The primary is
switched, killed, stopped and cut off, again and again; after each change the new one's first
commit begins the time until the first job's effect. None of them is restarted.
"""

import contextlib
import itertools
import random
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from support.waiting import eventually

from bgjob import AsyncClient, Client, EnqueueRequest
from bgjob.ext.embedded import _bin_dir_of_wheel
from bgjob.schedule import Schedule
from bgjob.schedules import Schedules
from bgjob.schema import init_sql
from cluster.patroni import PATIENCE, Cluster, Node, cluster_of, missing
from faults import oracle
from faults.app import LEDGER
from faults.soak import BACKLOG, Monitor, Producer
from faults.world import World

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]

ROUNDS = 5
"""Of the four ways in which a primary changes."""

WORKERS = 10

LAG = 3.0
"""Seconds by which a replica that is not synchronous may be behind, on a busy host."""

LONGEST = 60.0
"""Seconds from the enqueue of a job to its end, with its retries and a change between."""

KEYS = 10


def switch(cluster: Cluster, primary: Node) -> Node:
    """Ask Patroni to make another server the primary."""
    status, answer = primary.ask("POST", "switchover", {"leader": primary.name})
    assert status == 200, answer
    return cluster.wait_for_primary(other_than=primary)


def kill(cluster: Cluster, primary: Node) -> Node:
    """Kill the server; its Patroni lives, and starts it again if no other one may follow."""
    killed = primary.postmaster
    primary.kill_server()
    return cluster.wait_for_primary(than_process=killed)


def stop(cluster: Cluster, primary: Node) -> Node:
    """Stop the server and its Patroni until there is another primary, and let them go on."""
    primary.signal(signal.SIGSTOP)
    try:
        new = cluster.wait_for_primary(other_than=primary)
        time.sleep(3)  # both are there, as far as clients can tell
    finally:
        primary.signal(signal.SIGCONT)
    return new


def cut_off(cluster: Cluster, primary: Node) -> Node:
    """Cut the primary off from etcd and the others, while clients still reach it."""
    primary.cut_off()
    try:
        new = cluster.wait_for_primary(other_than=primary)
        time.sleep(3)
    finally:
        primary.mend()
    return new


CHANGES = (switch, kill, stop, cut_off)


class Scene:
    """A cluster with workers and producers."""

    def __init__(self, cluster: Cluster, world: World) -> None:
        self.cluster = cluster
        self.world = world
        self.times: list[tuple[str, float]] = []
        """The way of each change, and the seconds from the new primary's first commit to the first
        effect of a job."""

    def change(self, way: Callable[[Cluster, Node], Node]) -> tuple[float, float]:
        """Change the primary; wait until jobs have effects again, and the cluster is whole.

        Returns:
            When it began, and when the old primary was a standby.

        """
        old = self.cluster.wait_for_primary()
        began = time.time()
        accepted: list[float] = []
        watching = threading.Thread(target=self._watch, args=(old, old.postmaster, accepted))
        watching.start()
        new = way(self.cluster, old)
        watching.join()
        first = self._first_effect(new, accepted[0])
        self.times.append((way.__name__, first - accepted[0]))
        print(f"{len(self.times):2} {way.__name__:8}{first - accepted[0]:5.2f} s", flush=True)
        self.world.saw(f"{old.name} was followed by {new.name}: {way.__name__}")
        assert new is old or eventually(old.is_standby, PATIENCE)
        ended = time.time()
        self.cluster.wait_until_whole()
        return began, ended

    def _watch(self, old: Node, process: int | None, accepted: list[float]) -> None:
        """Note when another server than the old primary commits, or that one as a new process."""
        until = time.monotonic() + PATIENCE
        while not accepted and time.monotonic() < until:
            for node in self.cluster.nodes:
                if node is old and node.postmaster in (None, process):
                    continue
                with (
                    contextlib.suppress(psycopg.Error),
                    psycopg.connect(
                        self.cluster.dsn_of(node, dbname="jobs"), connect_timeout=2
                    ) as conn,
                ):
                    conn.execute("insert into probe default values")
                    conn.commit()
                    [[now]] = conn.execute(
                        "select extract(epoch from clock_timestamp())::float8"
                    ).fetchall()
                    accepted.append(now)
                    return
            time.sleep(0.02)

    def _first_effect(self, node: Node, since: float) -> float:
        found: list[float] = []

        def has_effect() -> bool:
            with (
                contextlib.suppress(psycopg.Error),
                psycopg.connect(
                    self.cluster.dsn_of(node, dbname="jobs"), connect_timeout=2
                ) as conn,
            ):
                [[at]] = conn.execute(
                    "select extract(epoch from min(at))::float8 from ledger "
                    "where at > to_timestamp(%s) and kind in ('plain', 'transactional')",
                    [since],
                ).fetchall()
                if at is not None:
                    found.append(at)
            return bool(found)

        assert eventually(has_effect, 60), "no job had an effect"
        return found[0]

    def tell(self) -> None:
        """Print how long it took."""
        for way in CHANGES:
            seconds = sorted(each for name, each in self.times if name == way.__name__)
            told = ", ".join(f"{each:.2f}" for each in seconds)
            print(f"{way.__name__}: median {statistics.median(seconds):.2f} s of {told}")


@contextlib.contextmanager
def producing(world: World, dsn: str) -> Iterator[list[Producer]]:
    """Produce in each way, one by one and in bulk, until the end of a `with` block."""
    monitor = Monitor(world)
    coroutine = AsyncClient(dsn)
    plain = Client(dsn)
    world.run(_nothing())

    def one_by_one(requests: list[EnqueueRequest]) -> None:
        if len(requests) == 1:
            plain.enqueue(requests[0])
        else:
            plain.bulk_enqueue(requests)

    def with_keys(requests: list[EnqueueRequest]) -> None:
        plain.bulk_enqueue(
            [replace(each, exclusive=f"key {hash(each.id) % KEYS}") for each in requests]
        )

    def awaited(requests: list[EnqueueRequest]) -> None:
        world.run(coroutine.bulk_enqueue(requests))

    def in_a_transaction(requests: list[EnqueueRequest]) -> None:
        with psycopg.connect(dsn) as conn:
            conn.execute("select txid_current()")
            plain.bulk_enqueue(requests, conn=conn)

    ways = [one_by_one, awaited, in_a_transaction, with_keys]
    producers = [
        Producer(name, world, random.Random(name), way, lambda: monitor.backlog < BACKLOG)
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


TICK = Schedule("s", every=1, missed="all", request=EnqueueRequest("scheduled", "plain"))


def scene_of(cluster: Cluster) -> Scene:
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
    world = World(dsn, lease=3.0, poll_interval=0.5)
    for number in range(WORKERS):
        colour = "async" if number % 2 else "thread"
        # A handler's own SQL on a server that is stopped would wait until it goes on.
        world.start(colour=colour, concurrency=4, timeout=12.0, max_attempts=1000)
    mux = world.mux(max_attempts=1000)
    world.worker(mux, queue="scheduled", services=[Schedules([TICK])], lease=3.0)
    return Scene(cluster, world)


def check_schedule(world: World) -> None:
    """Check that no tick was left out, and that the schedule goes on."""
    query = (
        "select distinct substr(job_id, 12)::timestamptz from ledger "
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
    """What was acknowledged shortly before the primary was killed may be gone, whole."""
    with cluster_of(programs, is_synchronous=False) as cluster:
        scene = scene_of(cluster)
        world = scene.world
        acknowledged: dict[str, float] = {}
        unsafe: list[tuple[float, float]] = []
        plain_acknowledge = world.acknowledge

        def acknowledge(*ids: str, **options: Any) -> None:
            acknowledged.update(dict.fromkeys(ids, time.time()))
            plain_acknowledge(*ids, **options)

        world.acknowledge = acknowledge  # type: ignore[method-assign]
        is_good = False
        try:
            with producing(world, world.dsn):
                for _ in range(ROUNDS):
                    for way in CHANGES:
                        time.sleep(LAG)  # what is written first is with the replicas
                        unsafe.append(scene.change(way))
            world.done(timeout=120)
            lost = _lost(world, acknowledged)
            for request, at in lost:
                # A plain handler may have written on the old primary, and have ended on the new one.
                before = LAG if request.type == "transactional" else LONGEST
                assert any(began - before < at < ended for began, ended in unsafe), (request, at)
            scene.tell()
            print(f"{len(lost)} of {len(world.jobs):,} jobs were lost")
            # Their ids are free: enqueued again, they run.
            if lost:
                world.client.bulk_enqueue([request for request, _ in lost])
            world.done(timeout=60)
            check_schedule(world)
            assert all(process.alive for process in world.processes)
            is_good = True
        finally:
            world.close(judge=is_good)


def _lost(world: World, acknowledged: Mapping[str, float]) -> list[tuple[EnqueueRequest, float]]:
    """The jobs of which there is neither a row nor an effect, and when they were there.

    A plain handler has connections of its own. One may lead to the old primary and another to the
    new one, so that its effect is there and the jobs that it enqueued are not.
    """
    there = {id for (id,) in world.query("select id from bgjob_job")}
    there |= {id for (id,) in world.query("select job_id from bgjob_dead_job")}
    effects = dict(
        world.query(
            "select job_id, extract(epoch from max(at))::float8 from ledger "
            "where kind in ('plain', 'transactional') group by job_id"
        )
    )
    lost = []
    for job in world.jobs.values():
        if job.id not in there and job.id not in effects:
            request = EnqueueRequest("q", job.type, job.arg or None, id=job.id)
            lost.append((request, acknowledged[job.id]))
        elif job.id in effects and job.id not in there and job.type == "plain":
            lost += [
                (EnqueueRequest("q", "plain", id=child), effects[job.id])
                for child in world.children(job.id)
                if child not in there and child not in effects
            ]
    return lost
