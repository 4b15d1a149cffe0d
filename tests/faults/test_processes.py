"""Faults 1 to 7: what happens to processes."""

import random
import signal
import threading
import time
from datetime import datetime
from math import log2
from typing import Any, Literal

import psycopg
import pytest
from support.waiting import PATIENCE, eventually

from bgjob import Job, Mux
from bgjob.mux import Handler
from faults.world import Process, World

Colour = Literal["thread", "async"]
Type = Literal["plain", "transactional"]

both_colours = pytest.mark.parametrize("colour", ["thread", "async"])
both_workers = pytest.mark.parametrize("is_async", [False, True], ids=["Worker", "AsyncWorker"])
both_types = pytest.mark.parametrize("type", ["plain", "transactional"])

SLACK = 5.0
"""Seconds that a busy host may add to a poll interval."""

HELD = "select id, attempt from bgjob_job where token is not null or attempt <> 0"


def outcomes(process: Process, id: str) -> list[str]:
    """What a worker told of a job, but for its start."""
    names = ("completed", "retried", "rescheduled", "dead", "lost")
    return [event[0] for event in process.of(*names) if event[1] == id]


def in_flight(process: Process) -> set[str]:
    """The jobs that a worker has started, and of which it has told no more."""
    running: set[str] = set()
    for name, *details in process.events():
        if name == "started":
            running.add(details[0])
        elif name in ("completed", "retried", "rescheduled", "dead", "lost"):
            running.discard(details[0])
    return running


# -- 1: kill -9 of random workers, many times, under load --------------------------------


def enqueue_some(world: World, dice: random.Random, count: int) -> None:
    """Enqueue ordinary, transactional, delayed and retried jobs, that take some time."""
    for _ in range(count):
        arg: dict[str, Any] = {"sleep": dice.uniform(0, 0.08)}
        match dice.randrange(8):
            case 0 | 1:
                arg |= {"then": dice.choice(["retry", "raise"]), "until": dice.randint(2, 3)}
            case 2:
                arg |= {"then": "reschedule", "times": dice.randint(1, 2)}
            case 3:
                arg |= {"children": dice.randint(1, 2)}
        delay = dice.uniform(0, 1.5) if dice.random() < 0.2 else 0.0
        world.enqueue(dice.choice(["plain", "transactional"]), delay=delay, **arg)


@pytest.mark.parametrize(("seed", "colour"), [(1, "thread"), (2, "async")])
def test_workers_killed_at_random_under_load_lose_nothing_and_repeat_no_transaction(
    world: World, seed: int, colour: Colour
) -> None:
    dice = random.Random(seed)
    workers = [world.start(colour=colour) for _ in range(3)]
    left: list[tuple[str, int, datetime]] = []
    with world.watch() as watch:
        for _ in range(4):
            enqueue_some(world, dice, 40)
            victim = workers.pop(dice.randrange(3))
            assert eventually(lambda: in_flight(victim))
            victim.kill()
            for id, lease_until in world.query(
                "select id, lease_until from bgjob_job where lease_until is not null "
                "and id = any(%s)",
                [list(in_flight(victim))],
            ):
                left.append((id, victim.pid, lease_until))
            workers.append(world.start(colour=colour))
        world.done()
        assert eventually(lambda: world.live() == 0)  # the children, too
    ids, pids, leases = zip(*left, strict=True)
    again = world.query(
        "select k.id, extract(epoch from min(l.at) - k.lease_until)::float8 "
        "from unnest(%s::text[], %s::int[], %s::timestamptz[]) k (id, pid, lease_until) "
        "join ledger l on l.job_id = k.id and l.pid <> k.pid and l.at > k.lease_until "
        "group by k.id, k.lease_until",
        [list(ids), list(pids), list(leases)],
    )
    # A settlement may have been under way when its worker was killed.
    assert len(set(ids) - {id for id, _ in again}) <= 2
    longest = max(late for _, late in again)
    print(
        f"seed {seed}: {len(world.jobs)} jobs, 4 kills, {len(left)} jobs in flight at them; "
        f"freed at most {watch.longest:.2f} s after the end of their lease of {world.lease:g} s, "
        f"done again elsewhere at most {longest:.2f} s after it"
    )
    world.saw("jobs of killed workers ran elsewhere", again)
    assert watch.longest <= world.poll_interval + SLACK
    assert longest <= world.poll_interval + SLACK


# -- 2: kill -9 between the handler's effect and its settlement ----------------------------


@both_types
@both_colours
def test_a_worker_killed_between_effect_and_settlement_repeats_only_jobs_that_are_not_transactional(
    world: World, colour: Colour, type: Type
) -> None:
    world.enqueue(type, "a", then="kill", until=2)
    first = world.start(colour=colour)
    first.wait_for("effect", "a")
    assert first.wait() == -9
    second = world.start(colour=colour)
    world.done()
    world.witness(second, "completed", "a")
    assert world.rows("a") == (2 if type == "plain" else 1)


@both_types
@both_colours
def test_a_worker_killed_in_the_middle_of_a_settlement_settles_once_or_not_at_all(
    world: World, colour: Colour, type: Type
) -> None:
    waits = (
        "select count(*) from pg_stat_activity where datname = current_database() "
        "and wait_event_type = 'Lock' and query ~ 'delete'"
    )
    # A lease that is not extended while the settlement waits.
    first = world.start(colour=colour, lease=3)
    world.enqueue(type, "a", hold="gate")
    first.wait_for("effect", "a")
    with psycopg.connect(world.dsn) as conn:
        conn.execute("select from bgjob_job where id = 'a' for update")
        world.release("gate", 1, 2)
        world.saw("the settlement waits for the row", eventually(lambda: world.value(waits)))
        first.kill()
    second = world.start(colour=colour)
    world.done()
    # If the settlement was committed after all, there was nothing to run again.
    assert world.rows("a", type) == 1 + second.heard("effect", "a") * (type == "plain")


# -- 3: SIGSTOP for longer than the lease, then SIGCONT --------------------------------------


@both_types
@both_colours
@pytest.mark.parametrize("then", ["complete", "raise"])
def test_a_worker_that_slept_longer_than_its_lease_changes_nothing_of_the_newer_claim(
    world: World, colour: Colour, type: Type, then: str
) -> None:
    claim = "select token, attempt, last_error, next_run_at from bgjob_job where id = 'a'"
    world.enqueue(type, "a", hold="gate", then=then, until=2)
    first = world.start(colour=colour)
    first.wait_for("effect", "a")
    first.stop()
    second = world.start(colour=colour)
    second.wait_for("effect", "a")
    newer = world.query(claim)
    first.cont()
    world.release("gate", 1)
    world.witness(first, "lost", "a")
    assert world.query(claim) == newer
    # It goes on, and runs new jobs.
    world.enqueue(type, "b")
    world.done("b")
    assert world.query(claim) == newer
    world.release("gate", 2)
    world.witness(second, "completed", "a")
    assert outcomes(first, "a") == ["lost"]
    pids = [pid for (pid,) in world.query("select pid from ledger where job_id = 'a' and pid <> 0")]
    assert pids == ([first.pid, second.pid] if type == "plain" else [second.pid])


# -- 4: a handler that kills its own process each time ---------------------------------------


def supervise(world: World, *ids: str, **options: Any) -> list[Process]:
    """Keep a worker process running until these jobs have ended; return all processes."""
    started = [world.start(**options)]
    deadline = time.monotonic() + 45
    while world.live(*ids):
        assert time.monotonic() < deadline, (
            world.query("select * from bgjob_job"),
            [process.events() for process in started],
        )
        if not started[-1].alive:
            started.append(world.start(**options))
        time.sleep(0.05)
    return started


@pytest.mark.parametrize(
    ("how", "colour", "max_attempts", "killers"),
    [
        ("exit", "async", 3, 1),
        ("exit", "thread", 1, 1),
        ("kill", "async", 1, 2),
        ("kill", "thread", 2, 2),
    ],
)
def test_a_job_that_kills_its_process_each_time_is_dead_lettered_and_its_neighbours_complete(
    world: World, how: str, colour: Colour, max_attempts: int, killers: int
) -> None:
    # All of them run when the first killer kills.
    bad = [f"killer {n}" for n in range(killers)]
    good = [f"neighbour {n:02}" for n in range(30)]
    world.enqueue("plain", *good[:15], hold="neighbours")
    world.enqueue("plain", *bad, hold="killers", then=how)
    world.enqueue("plain", *good[15:], hold="neighbours")
    later = range(2, max_attempts + 5)
    world.release("neighbours", *later)
    world.release("killers", *later)

    def release() -> None:
        if eventually(lambda: world.value("select count(*) from ledger where attempt = 1") >= all_):
            world.release("killers", 1)

    all_ = len(good) + len(bad)
    releasing = threading.Thread(target=release)
    releasing.start()
    started = supervise(
        world, *bad, *good, colour=colour, max_attempts=max_attempts, concurrency=40
    )
    releasing.join()
    assert set(good) < in_flight(started[0])
    dead = dict(world.query("select job_id, last_error from bgjob_dead_job"))
    assert set(dead) == set(bad)
    for error in dead.values():
        world.saw(f"an error that says that the worker died: {error}", "died" in error)
    deaths = [process.wait() for process in started if not process.alive]
    assert set(deaths) == {-9 if how == "kill" else 1}
    # Each killer's attempts, two that are granted beyond them, and those of groups that halve.
    groups = log2(len(good) + killers) + 1
    assert len(deaths) <= killers * (max_attempts + 2 + groups)


@pytest.mark.parametrize("max_attempts", [1, 3])
def test_neighbours_that_were_claimed_ahead_of_their_slot_are_not_punished_for_a_killer(
    world: World, max_attempts: int
) -> None:
    killer = "killer"
    good = [f"neighbour {n:02}" for n in range(60)]
    with psycopg.connect(world.dsn) as conn:
        world.enqueue("plain", *good[:30], conn=conn)
        world.enqueue("plain", killer, conn=conn, then="exit")
        world.enqueue("plain", *good[30:], conn=conn)
    world.acknowledge(killer, then="exit")
    world.acknowledge(*good)
    first = world.start(max_attempts=max_attempts, concurrency=2)
    assert first.wait() == 1
    claimed = world.value("select count(*) from bgjob_job where token is not null")
    supervise(world, *good, killer, max_attempts=max_attempts, concurrency=2)
    [(id, error)] = world.query("select job_id, last_error from bgjob_dead_job")
    assert id == killer
    world.saw(f"an error that says that the worker died: {error}", "died" in error)
    world.saw("neighbours were claimed with the killer", claimed > 1)


# -- 5: SIGTERM while busy, with the command-line worker ---------------------------------------


def serve(world: World, grace: float, **options: Any) -> Process:
    argv = ("-m", "bgjob", "worker", "faults.app:make", "--grace", str(grace))
    process = world.command(*argv, **options)
    process.wait_for("started")
    return process


@both_types
@both_colours
def test_a_terminated_worker_finishes_running_jobs_and_releases_those_that_have_not_started(
    world: World, colour: Colour, type: Type
) -> None:
    # One slot is held, and quick jobs flow through the other: some wait for it nearly always.
    # A stop makes them slow to the worker, so that it is not tried again immediately.
    world.enqueue(type, "slow", hold="gate")
    quick = world.enqueue_many("plain", 20_000, mute=True, ledger=False)
    written = world.value("select xmin::text from bgjob_job where id = %s", quick[:1])
    worker = serve(world, PATIENCE, colour=colour, concurrency=2)
    worker.wait_for("effect", "slow")

    def is_caught() -> bool:
        """Stop it, and look whether it has claimed jobs that have not started."""
        worker.wait_for("completed", times=len(worker.of("completed")) + 200)
        worker.stop()
        started = {id for _, id, _ in worker.of("started")}
        if {id for id, _ in world.query(HELD)} - started:
            return True
        worker.cont()
        return False

    assert eventually(is_caught)
    worker.terminate()
    worker.cont()
    assert eventually(lambda: world.query(HELD) == [("slow", 1)])
    late = world.enqueue_many(type, 5)
    world.release("gate", 1)
    assert worker.wait() == 0, worker.output
    # What had begun is settled, and told of.
    assert world.query(HELD) == []
    assert in_flight(worker) == set()
    world.witness(worker, "completed", "slow")
    ran = {id for _, id, _ in worker.of("started")}
    left = {id for (id,) in world.query("select id from bgjob_job")}
    assert left == {"slow", *quick, *late} - ran
    # Nothing was claimed any more, and what had been claimed and not begun was given back.
    assert left > set(late)
    released = "select count(*) from bgjob_job where id = any(%s) and xmin::text <> %s"
    world.saw("jobs were given back", world.value(released, [quick, written]))


@pytest.mark.both_colours
@both_types
@both_colours
def test_a_handler_that_outlives_the_grace_period_is_left_to_its_lease(
    world: World, colour: Colour, type: Type
) -> None:
    world.enqueue(type, "slow", hold="gate")
    world.release("gate", 2)
    worker = serve(world, 1, colour=colour, concurrency=2)
    worker.wait_for("effect", "slow")
    worker.terminate()
    began = time.monotonic()
    assert worker.wait() == 0, worker.output
    took = time.monotonic() - began
    assert 1 <= took < 1 + 2 + SLACK
    assert outcomes(worker, "slow") == []
    # Its attempt is given back; a coroutine was cancelled, and holds its lease no more.
    held = colour == "thread"
    assert world.query("select attempt, token is not null from bgjob_job") == [(0, held)]
    world.release("gate", 1)
    other = world.start(colour=colour)
    world.done()
    world.witness(other, "completed", "slow")


@both_colours
def test_a_second_signal_ends_the_worker_immediately(world: World, colour: Colour) -> None:
    world.enqueue("plain", "slow", hold="gate")
    world.release("gate", 2)
    worker = serve(world, 2 * PATIENCE, colour=colour)
    worker.wait_for("effect", "slow")

    def ended() -> bool:
        worker.terminate()  # the kernel may merge two signals
        return not worker.alive

    assert eventually(ended)
    assert worker.wait() == 128 + signal.SIGTERM
    assert outcomes(worker, "slow") == []
    other = world.start(colour=colour)
    world.done()
    world.witness(other, "completed", "slow")


# -- 6: shutdown() called twice, before run(), from inside a handler, from several threads ------


@pytest.mark.both_colours
@both_workers
def test_shutdown_may_be_called_twice(world: World, is_async: bool) -> None:
    worker = world.worker(world.mux(is_async=is_async), is_async=is_async)
    world.enqueue("plain", "a")
    world.witness(worker, "completed", "a")
    assert worker.shutdown()
    assert worker.shutdown()
    assert worker.shutdown(0)


@pytest.mark.both_colours
@both_workers
def test_a_worker_that_was_shut_down_before_it_ran_raises_and_claims_nothing(
    world: World, is_async: bool
) -> None:
    world.enqueue("plain", "a")
    early = world.make(world.mux(is_async=is_async), is_async=is_async)
    assert early.shutdown()
    with pytest.raises(RuntimeError, match="runs once") as caught:
        running = early.worker.run()
        if running is not None:
            world.run(running)
    world.saw(str(caught.value))
    assert world.query(HELD) == []
    assert early.events() == []


@pytest.mark.both_colours
@both_workers
@pytest.mark.parametrize("style", ["plain", "coroutine"])
def test_a_handler_may_shut_its_own_worker_down(world: World, is_async: bool, style: str) -> None:
    ends: Any = None
    answered = threading.Event()

    async def coroutine(job: Job) -> None:
        nonlocal ends
        answer = local.worker.shutdown()
        if not isinstance(answer, bool):
            await answer
        answered.set()

    def plain(job: Job) -> None:
        answer = local.worker.shutdown()
        if not isinstance(answer, bool):
            import asyncio

            asyncio.run(answer)
        answered.set()

    handler: Handler = plain if style == "plain" else coroutine
    world.enqueue("t", "a", "b", ledger=False)
    local = world.make(Mux().register("t", handler), is_async=is_async)
    running = local.worker.run()
    if running is not None:
        world.run(running)
    assert answered.wait(PATIENCE)
    assert local.shutdown()
    world.witness(local, "completed", "a")
    assert world.query("select id, attempt, token from bgjob_job") == [("b", 0, None)]


@pytest.mark.both_colours
@both_workers
def test_several_threads_may_shut_a_worker_down_concurrently(world: World, is_async: bool) -> None:
    worker = world.worker(world.mux(is_async=is_async), is_async=is_async)
    world.enqueue("plain", "a", hold="gate")
    assert eventually(lambda: world.rows("a"))
    answers: list[bool] = []
    threads = [
        threading.Thread(target=lambda: answers.append(worker.shutdown(PATIENCE))) for _ in range(5)
    ]
    for thread in threads:
        thread.start()
    world.enqueue("plain", "b")
    world.release("gate", 1)
    for thread in threads:
        thread.join(PATIENCE)
    assert answers == [True] * 5
    world.witness(worker, "completed", "a")
    assert world.query(HELD) == []


# -- 7: a fork after the client or the worker was opened -----------------------------------------


NOTE_SESSIONS = """
    create function note_session() returns trigger language plpgsql as $$ begin
        insert into ledger (job_id, attempt, kind, pid)
        values (coalesce(new.id, old.id), 0, tg_op, pg_backend_pid());
        return null;
    end $$;
    create trigger note_session after insert or delete on bgjob_job
        for each row execute function note_session();
"""


def sessions(world: World, operation: str) -> dict[str, int]:
    """Which session of the server wrote or deleted a job."""
    return dict(world.query("select job_id, pid from ledger where kind = %s", [operation]))


@pytest.mark.parametrize("case", ["client", "async_client"])
def test_a_client_in_a_forked_child_has_a_connection_of_its_own(world: World, case: str) -> None:
    world.query(NOTE_SESSIONS)
    process = world.command("-m", "faults.forking", case)
    assert process.wait() == 0, process.output
    world.witness(process, "child")
    assert process.of("child") == [("child", 0)]
    pids = sessions(world, "INSERT")
    assert pids["before"] == pids["after"] != pids["child"]


@pytest.mark.parametrize("case", ["pool", "async_pool"])
def test_a_forked_child_never_shares_a_connection_of_the_pool_that_its_client_borrowed(
    world: World, case: str
) -> None:
    world.query(NOTE_SESSIONS)
    process = world.command("-m", "faults.forking", case)
    assert process.wait() == 0, process.output
    assert process.of("child") == [("child", 0)]
    pids = sessions(world, "INSERT")
    [(answer, _, *error)] = process.of("refused", "accepted")
    world.saw(f"{answer} in the child: {error}")
    if answer == "refused":
        assert "fork" in error[0]
        assert "child" not in pids
    else:
        assert pids["child"] != pids["before"]
    assert pids["before"] == pids["after"]


@pytest.mark.parametrize("case", ["unused_pool", "async_unused_pool"])
def test_a_forked_child_refuses_a_pool_that_was_opened_before_and_not_used(
    world: World, case: str
) -> None:
    world.query(NOTE_SESSIONS)
    process = world.command("-m", "faults.forking", case)
    assert process.wait() == 0, process.output
    assert process.of("child") == [("child", 0)]
    for _, _, error in process.of("refused"):
        world.saw(error)
        assert "fork" in error
    assert process.of("accepted") == []
    assert list(sessions(world, "INSERT")) == ["after"]


def test_a_forked_child_may_open_a_pool_that_was_made_before(world: World) -> None:
    world.query(NOTE_SESSIONS)
    process = world.command("-m", "faults.forking", "pool_of_child")
    assert process.wait() == 0, process.output
    world.witness(process, "accepted")
    assert list(sessions(world, "INSERT")) == ["child", "of a client of the child"]


@pytest.mark.parametrize("case", ["worker", "async_worker"])
def test_a_running_worker_is_refused_to_a_forked_child_and_works_on(
    world: World, case: str
) -> None:
    world.query(NOTE_SESSIONS)
    colour = "async" if case == "async_worker" else "thread"
    process = world.command("-m", "faults.forking", case, colour=colour)
    assert process.wait() == 0, process.output
    assert process.of("child") == [("child", 0)]
    refused = {what: error for _, what, error in process.of("refused")}
    world.saw("run() refused in the child", "runs once" in refused["run"])
    world.saw("shutdown() refused in the child", "fork" in refused["shutdown"])
    pids = sessions(world, "DELETE")
    assert pids["before"] == pids["after"]


@pytest.mark.parametrize("case", ["made", "async_made"])
def test_a_worker_made_before_a_fork_works_in_the_child_or_explains_why_not(
    world: World, case: str
) -> None:
    colour = "async" if case == "async_made" else "thread"
    process = world.command("-m", "faults.forking", case, colour=colour)
    assert process.wait() == 0, process.output
    assert process.of("child") == [("child", 0)], process.output
    [(answer, _, *error)] = process.of("refused", "accepted")
    world.saw(f"{answer} in the child: {error}")
    if answer == "refused":
        assert "fork" in error[0]
        assert outcomes(process, "before") == []
    else:
        assert outcomes(process, "before") == ["completed"]
        assert process.of("stopped") == [("stopped", True)]


@pytest.mark.parametrize("case", ["handler", "async_handler"])
def test_a_child_forked_by_a_handler_runs_no_job_and_shares_no_connection(
    world: World, case: str
) -> None:
    ids = [f"{n:02}" for n in range(60)]
    world.enqueue("transactional", *ids[:20])
    world.enqueue("fork", "forks", ledger=False)
    world.enqueue("transactional", *ids[20:40])
    world.enqueue("fork in a transaction", "forks and commits", ledger=False)
    world.enqueue("transactional", *ids[40:])
    process = world.command("-m", "faults.forking", case)
    world.done()
    world.witness(process, "completed", "forks")
    world.witness(process, "completed", "forks and commits")
    # Both children have ended, and left all work and all effects to their parent.
    assert None not in [code for _, code in process.of("child")]
    assert {pid for (pid,) in world.query("select pid from ledger")} == {process.pid}
    assert world.rows("forks and commits") == 1
    assert sorted(id for _, id, _ in process.of("effect")) == sorted(ids)
    assert process.of("lost", "retried", "dead") == []


# -- the worker that is notified for all dies -----------------------------------------------


NOTIFY_LOCKS = (
    "select count(*) from pg_locks where locktype = 'advisory' and granted and objsubid = 2 "
    "and database = (select oid from pg_database where datname = current_database())"
)


def pick_up(world: World) -> float:
    """Enqueue a job; the seconds until its handler ran."""
    [[before]] = world.query("select clock_timestamp()")
    [id] = world.enqueue("plain")
    assert eventually(lambda: world.rows(id) and not world.live(id))
    seconds: float = (
        world.value("select at from ledger where job_id = %s", [id]) - before
    ).total_seconds()
    return seconds


def test_the_death_of_the_worker_that_is_notified_leaves_the_others_notified(world: World) -> None:
    workers = []
    for locks in (1, 2, 2, 2):  # it holds the notify lock, is its deputy, relies on them
        workers.append(world.start(poll_interval=10.0, lease=30.0))
        expected = locks
        assert eventually(lambda: world.value(NOTIFY_LOCKS) == expected)
    held, deputy, *_ = workers
    held.kill()
    one = pick_up(world)
    # The deputy took the lock, and another its place.
    assert eventually(lambda: world.value(NOTIFY_LOCKS) == 2)
    deputy.kill()
    workers[2].kill()
    both = pick_up(world)
    print(f"picked up {one:.3f} s after the holder's death, {both:.3f} s after a second and third")
    assert one < 1.0
    assert both < 2.0
    world.saw("three workers killed", [one, both])
    world.done()
