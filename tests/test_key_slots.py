"""Slots of a key: where their number is kept, and which jobs of the key may run."""

from typing import Any

import psycopg
import pytest
from support.database import count, row, rows
from support.waiting import PATIENCE, eventually
from support.workers import Gate, Launcher

from bgjob import Client, EnqueueRequest, Job, MoveToDlq, Mux, Result, Retry, cli
from bgjob._sql import enqueues
from bgjob.schedule import Schedule
from bgjob.schedules import Schedules
from bgjob.testing import drain


def request(id: str = "a", queue: str = "q", **options: Any) -> EnqueueRequest:
    key: dict[str, Any] = {"exclusive": "k", "slots": 3}
    return EnqueueRequest(queue, "t", id=id, **key | options)


@pytest.mark.parametrize("slots", [0, -1, 32768, True, 2.0, "3"])
def test_slots_are_a_number_that_a_smallint_can_hold(slots: Any) -> None:
    with pytest.raises(ValueError, match="slots must be an integer from 1 to 32767, not"):
        request(slots=slots)
    with pytest.raises(ValueError, match="slots of job type 't' must be an integer from 1"):
        Mux().register("t", lambda _: None, exclusive=True, slots=slots)


def test_slots_without_a_key_are_refused() -> None:
    with pytest.raises(ValueError, match="name the key too"):
        request(exclusive=None)
    with pytest.raises(ValueError, match="the type has none: pass exclusive=True too"):
        Mux().register("t", lambda _: None, slots=3)


def test_a_type_gives_its_slots_to_the_jobs_whose_keys_it_names() -> None:
    def key(job: Job) -> str | None:
        return None if job.arg is None else str(job.json())

    mux = Mux().register("t", lambda _: None, queue="q", exclusive=key, slots=2)
    named = [mux.request("t", "x"), mux.request("t"), mux.request("t", "x", exclusive="mine")]
    assert [(r.exclusive, r.slots) for r in named] == [("x", 2), (None, None), ("mine", None)]
    assert mux.slots == {"t": 2}


def test_jobs_without_slots_have_no_column_for_them() -> None:
    plain, keyed = EnqueueRequest("q", "t"), request(slots=None)
    for made in (
        enqueues.enqueue(plain, notify=True),
        enqueues.enqueue(keyed, notify=True),
        enqueues.enqueue_many([plain, keyed], notify=True),
    ):
        assert "slots" not in made.text
        assert isinstance(made.params, dict) and "slots" not in made.params


def test_slots_reach_every_place_that_keeps_a_job(
    client: Any, conn: psycopg.Connection, dsn: str
) -> None:
    answers: list[Result | None] = [Retry(0, error="x"), MoveToDlq("why")]
    mux = Mux().register("t", lambda _: answers.pop(0) if answers else None)
    kept = "select slots from bgjob_job"
    client.bulk_enqueue([request("b"), request("c", slots=None), EnqueueRequest("q", "t", id="d")])
    assert rows(conn, f"{kept} order by id") == [(3,), (None,), (None,)]
    conn.execute("delete from bgjob_job")
    client.enqueue(request(), on_conflict="replace")
    client.enqueue(request(slots=4), on_conflict="replace")
    assert client.jobs.get("a").slots == 4
    client.enqueue(request(slots=None), on_conflict="replace")
    assert [job.slots for job in client.jobs.list(queue="q").jobs] == [None]
    conn.execute("delete from bgjob_job")
    client.enqueue(request())
    client.do("q", mux)
    assert row(conn, kept) == (3,)
    client.do("q", mux)
    assert client.dlq.get("a").slots == 3
    client.dlq.requeue("a")
    client.jobs.cancel("a")
    client.dlq.requeue("a")
    assert row(conn, kept) == (3,)
    drain(dsn, "q", mux)
    assert count(conn) == count(conn, "bgjob_exclusive") == 0


def test_a_successor_has_the_slots_of_its_request(dsn: str, conn: psycopg.Connection) -> None:
    with Client(dsn) as client:
        client.enqueue(request())

        def replace(job: Job) -> None:
            client.enqueue(request(slots=5), on_conflict="replace")

        client.do("q", Mux().register("t", replace))
        assert row(conn, "select slots from bgjob_job") == (5,)
        with conn.transaction():
            conn.execute("update bgjob_job set token = 1, lease_until = 'infinity'")
        client.enqueue(request(slots=6), on_conflict="replace")
        client.jobs.cancel("a")
        assert rows(conn, "select slots from bgjob_dead_job order by id") == [(5,), (6,)]


def test_jobs_of_a_schedule_and_of_the_command_have_their_slots(
    launcher: Launcher, conn: psycopg.Connection, dsn: str
) -> None:
    schedules = Schedules([Schedule("often", every=86400, request=request())])
    launcher.start(Mux(), "other", services=[schedules])
    assert eventually(lambda: count(conn, "bgjob_schedule") == 1)
    assert row(conn, "select exclusive, slots from bgjob_schedule") == ("k", 3)
    conn.execute("update bgjob_schedule set tick = tick - interval '1 day', next_run_at = null")
    assert eventually(lambda: count(conn) == 1)
    args = ["enqueue", "q", "t", "--exclusive", "k", "--slots", "2", "--dsn", dsn]
    assert cli.main(args) == 0
    assert rows(conn, "select slots from bgjob_job order by slots") == [(2,), (3,)]


@pytest.mark.parametrize("named", [False, True], ids=["the request", "the type"])
def test_so_many_jobs_of_a_key_run_and_the_next_when_one_ends(
    launcher: Launcher, conn: psycopg.Connection, *, named: bool
) -> None:
    gates = [Gate() for _ in range(4)]
    mux = Mux()
    for n in range(2 if named else 1):  # another type has the same key
        policy: Any = {"exclusive": lambda _: "k", "slots": 2} if named else {}
        mux.register("t" * (n + 1), lambda job: gates[int(job.id)](job), **policy)
    options: dict[str, Any] = {"exclusive": None, "slots": None} if named else {"slots": 2}
    launcher.client.bulk_enqueue([request(str(n), **options) for n in range(4)])
    for _ in range(2):
        launcher.start(mux, concurrency=8, poll_interval=0.1)
    gates[0].wait()
    gates[1].wait()
    assert eventually(
        lambda: rows(conn, "select id from bgjob_job where waits") == [("2",), ("3",)]
    )
    reason = launcher.client.explain("3").reasons[0]
    assert reason.code == "key_held"
    assert reason.text.startswith(
        "It waits for one of the 2 slots of the exclusive key 'k', of which job '0' (queue 'q', "
        "type 't') holds one since "
    )
    assert reason.text.endswith("; '1' holds the others; 1 of its queue come before it.")
    for ends, starts in ((1, 2), (0, 3)):
        gates[ends].released.set()
        gates[starts].wait()
        assert sum(not gate.released.is_set() for gate in gates if gate.runs) == 2
    gates[2].released.set()
    gates[3].released.set()
    assert eventually(lambda: count(conn) == count(conn, "bgjob_exclusive") == 0)


def test_a_worker_with_one_slot_leaves_the_other_slots_of_a_key_to_others(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    gates = {id_: Gate() for id_ in "abc"}
    mux = Mux().register("t", lambda job: gates[job.id](job))
    launcher.client.bulk_enqueue([request(id_) for id_ in "abc"])
    for _ in range(3):
        launcher.start(mux, concurrency=1, poll_interval=PATIENCE)
    for gate in gates.values():
        gate.wait()
    for gate in gates.values():
        gate.released.set()
    assert eventually(lambda: count(conn) == count(conn, "bgjob_exclusive") == 0)


def test_a_job_with_fewer_slots_starts_only_where_so_few_run(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    gates = {id_: Gate() for id_ in "abcd"}
    slots = {"a": 3, "b": 3, "c": None, "d": 3}
    mux = Mux().register("t", lambda job: gates[job.id](job))
    launcher.client.bulk_enqueue([request(id_, slots=slots[id_]) for id_ in "abcd"])
    launcher.start(mux, concurrency=8, poll_interval=0.05)

    def runs(*ids: str) -> bool:
        started = {id_ for id_, gate in gates.items() if gate.runs and not gate.released.is_set()}
        return started == {*ids}

    assert eventually(lambda: runs("a"))  # with what a claim brings comes its smallest number
    gates["a"].released.set()
    assert eventually(lambda: runs("b"))
    gates["b"].released.set()
    assert eventually(lambda: runs("c"))
    gates["c"].released.set()
    assert eventually(lambda: runs("d"))
    gates["d"].released.set()
    assert eventually(lambda: count(conn) == 0)


def test_do_leaves_the_slots_that_are_free_to_others(client: Any, conn: psycopg.Connection) -> None:
    client.bulk_enqueue([request(id_, slots=2) for id_ in "abc"])
    # As after a claim that met them while others had the slots.
    conn.execute("insert into bgjob_exclusive (key) values ('k')")
    conn.execute("update bgjob_job set waits = true where id > 'a'")
    seen: list[Any] = []

    def handle(job: Job) -> None:
        seen.append([job.id, *rows(conn, "select id from bgjob_job where waits")])

    for _ in range(3):
        client.do("q", Mux().register("t", handle))
    assert seen == [["a", ("c",)], ["b"], ["c"]]
