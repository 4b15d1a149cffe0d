"""Batch handlers: one call for many jobs, and each job ends as if it had been alone."""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from math import ceil, log2
from pathlib import Path
from typing import Any

import psycopg
import pytest
from support.database import all_done, row, rows
from support.jobs import a_job
from support.turns import Turns
from support.waiting import NEVER, PATIENCE, eventually
from support.workers import Launcher, Recorder, Style, both_styles

from bgjob import (
    Client,
    Complete,
    EnqueueRequest,
    Job,
    MoveToDlq,
    Mux,
    Reschedule,
    Retry,
)
from bgjob._engine.batch_pace import BatchPace
from bgjob._engine.outcome import Outcome
from bgjob._handlers.batch import BatchRoute
from bgjob._sql.claims import ELSEWHERE
from bgjob._sql.settlements import Claimed
from bgjob._worker.batch import Batch, members
from bgjob._worker.batches import Gathering
from bgjob.testing import drain

WHOLE: Any = {"batch_wait": NEVER}
"""A batch waits until it is full."""

LEDGER = "create table ledger (job_id text)"
WRITE = "insert into ledger select unnest(%s::text[])"


class Calls:
    """A batch handler that records the ids of each call, and returns what `body` does."""

    def __init__(self, body: Callable[[Sequence[Job]], Any] = lambda _: None) -> None:
        self.ids: list[list[str]] = []
        self._body = body

    def _record(self, jobs: Sequence[Job]) -> Any:
        self.ids.append([job.id for job in jobs])
        return self._body(jobs)

    def of(self, style: Style, *, transactional: bool = False) -> Any:
        def plain(jobs: list[Job]) -> Any:
            return self._record(jobs)

        async def coroutine(jobs: list[Job]) -> Any:
            return self._record(jobs)

        def plain_in_transaction(jobs: list[Job], conn: psycopg.Connection[Any]) -> Any:
            conn.execute(WRITE, [[job.id for job in jobs]])
            return self._record(jobs)

        async def in_transaction(jobs: list[Job], conn: psycopg.AsyncConnection[Any]) -> Any:
            await conn.execute(WRITE, [[job.id for job in jobs]])
            return self._record(jobs)

        if transactional:
            return plain_in_transaction if style == "plain" else in_transaction
        return plain if style == "plain" else coroutine


def mux_of(type: Any, handler: Any, **options: Any) -> Mux:
    return Mux().register(type, handler, **options)


def names(count: int) -> list[str]:
    return [f"j{number:03}" for number in range(count)]


def poisoned(id_: str) -> Callable[[Sequence[Job]], None]:
    def body(jobs: Sequence[Job]) -> None:
        if any(job.id == id_ for job in jobs):
            raise ValueError(f"cannot do {id_}")

    return body


transactional_or_not = pytest.mark.parametrize(
    "transactional", [False, True], ids=["ordinary", "transactional"]
)


# -- what a call is ----------------------------------------------------------------------------


@both_styles
def test_a_call_has_the_jobs_that_were_claimed_in_their_order(
    launcher: Launcher, style: Style
) -> None:
    calls, observer = Calls(), Recorder()
    mux = Mux().register("t", calls.of(style), batch=20, **WHOLE)
    launcher.enqueue(*names(40))
    launcher.start(mux, observer=observer, concurrency=1)
    observer.wait_for("completed", times=40)
    assert calls.ids == [names(40)[:20], names(40)[20:]]
    assert Counter(observer.of("started", "completed")) == Counter(
        (what, id_, 1) for what in ("started", "completed") for id_ in names(40)
    )
    assert not observer.of("error")


def test_a_job_waits_for_others_no_longer_than_the_batch_wait(launcher: Launcher) -> None:
    calls, observer = Calls(), Recorder()
    mux = Mux().register("t", calls.of("plain"), batch=500, batch_wait=0.01)
    launcher.start(mux, observer=observer, poll_interval=NEVER)
    launcher.enqueue("a", "b")
    observer.wait_for("completed", times=2)
    assert sorted(id_ for ids in calls.ids for id_ in ids) == ["a", "b"]


@both_styles
def test_a_mapping_tells_the_jobs_of_a_call_apart(launcher: Launcher, style: Style) -> None:
    observer = Recorder()

    def body(_: Sequence[Job]) -> Mapping[str, Any]:
        return {
            "j001": Complete(),
            "j002": Retry(NEVER, "not yet"),
            "j003": MoveToDlq("never"),
            "j004": Reschedule(NEVER),
            "j005": "yes",
            "who": Complete(),
        }

    calls = Calls(body)
    mux = Mux().register("t", calls.of(style), batch=6, **WHOLE, max_attempts=1)
    mux.register("retried", calls.of(style), batch=6, **WHOLE)
    launcher.enqueue(*names(6), type="retried")
    launcher.start(mux, observer=observer)
    observer.wait_for("error")
    assert eventually(
        lambda: len(observer.of("completed", "retried", "dead", "rescheduled")) == 6
    ), observer.events
    by_id = {
        event[1]: event for event in observer.of("completed", "retried", "dead", "rescheduled")
    }
    assert by_id["j000"][0] == by_id["j001"][0] == "completed"
    assert by_id["j002"] == ("retried", "j002", 1, NEVER, "not yet")
    assert by_id["j003"] == ("dead", "j003", 1, "never")
    assert by_id["j004"][0] == "rescheduled"
    assert by_id["j005"][0] == "retried"
    assert "returned str; return Complete()" in by_id["j005"][4]
    [(_, error)] = observer.of("error")
    assert "returned results for 'who', which are not ids of its jobs" in str(error)


def test_a_result_holds_for_all_jobs_of_a_call(launcher: Launcher) -> None:
    observer = Recorder()
    calls = Calls(lambda _: MoveToDlq("all"))
    mux = Mux().register("t", calls.of("plain"), batch=3, **WHOLE)
    launcher.enqueue(*names(3))
    launcher.start(mux, observer=observer)
    observer.wait_for("dead", times=3)
    assert calls.ids == [names(3)]


def test_what_is_no_answer_fails_all_jobs_of_a_call(launcher: Launcher) -> None:
    observer = Recorder()
    calls = Calls(lambda jobs: [job.id for job in jobs])
    mux = Mux().register("t", calls.of("plain"), batch=3, **WHOLE, max_attempts=1)
    launcher.enqueue(*names(3))
    launcher.start(mux, observer=observer)
    observer.wait_for("dead", times=3)
    assert calls.ids == [names(3)]
    assert "None, or a mapping from ids to these" in observer.of("dead")[0][3]


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("batch", [None, 2])
def test_a_transaction_is_settled_in_a_round_trip_or_two(
    dsn: str,
    conn: psycopg.Connection,
    batch: int | None,
    keep: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    counted: list[int] = []

    def handle(_: Any, conn: psycopg.Connection[Any]) -> None:
        counted.append(turns.count())
        turns.begin()
        conn.execute("select 1")

    options: Any = {"batch": batch, **WHOLE} if batch else {}
    mux = Mux().register("t", handle, transactional=True, keep=keep, **options)
    with closing(Turns(tmp_path, monkeypatch)) as turns:
        with closing(Launcher(dsn, is_async=False)) as launcher:
            launcher.enqueue(*names(2 * (batch or 1)))
            launcher.start(mux, concurrency=1)
            assert eventually(lambda: all_done(conn))
    # Its statement; the settlement with the commit and the reset, or apart from them; and the begin
    # of the next.
    assert counted[1:] == [4 if keep else 3]
    assert len(turns.sessions) == 1


# -- a call that raises --------------------------------------------------------------------------


@both_styles
@transactional_or_not
def test_a_poison_job_among_500_fails_alone(
    launcher: Launcher, conn: psycopg.Connection, style: Style, transactional: bool
) -> None:
    conn.execute(LEDGER)
    calls, observer = Calls(poisoned("j321")), Recorder()
    mux = mux_of(
        "t",
        calls.of(style, transactional=transactional),
        batch=500,
        **WHOLE,
        max_attempts=1,
        transactional=transactional,
    )
    launcher.enqueue(*names(500))
    launcher.start(mux, observer=observer, concurrency=1)
    observer.wait_for("dead", "j321")
    observer.wait_for("completed", times=499)
    assert len(calls.ids) <= 2 * ceil(log2(500)) + 1
    assert calls.ids.count(["j321"]) == 1
    neighbours = [id_ for id_ in names(500) if id_ != "j321"]
    assert Counter(observer.of("completed")) == Counter(("completed", id_, 1) for id_ in neighbours)
    assert observer.of("dead") == [("dead", "j321", 1, "cannot do j321")]
    assert not observer.of("error", "lost", "retried")
    if transactional:
        assert sorted(id_ for (id_,) in rows(conn, "select job_id from ledger")) == neighbours
    assert all_done(conn)


def test_an_error_of_a_call_that_its_halves_do_not_repeat_is_told(launcher: Launcher) -> None:
    observer = Recorder()

    def body(jobs: Sequence[Job]) -> None:
        if len(jobs) == 4:
            raise ConnectionError("once")

    calls = Calls(body)
    mux = Mux().register("t", calls.of("plain"), batch=4, **WHOLE)
    launcher.enqueue(*names(4))
    launcher.start(mux, observer=observer)
    observer.wait_for("completed", times=4)
    observer.wait_for("error")
    [(_, error)] = observer.of("error")
    assert "raised ConnectionError in a call with several jobs" in str(error)
    assert str(error.__cause__) == "once"


def test_a_job_whose_effect_a_deferred_constraint_refuses_fails_alone(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    """The commit itself is refused, which no call has seen."""
    conn.execute("create table known (id text primary key)")
    conn.execute("create table ledger (job_id text references known deferrable initially deferred)")
    conn.execute("insert into known select unnest(%s::text[])", [names(8)])
    conn.execute("delete from known where id = 'j005'")
    observer = Recorder()
    mux = Mux().register(
        "t",
        Calls().of("plain", transactional=True),
        batch=8,
        **WHOLE,
        max_attempts=1,
        transactional=True,
    )
    launcher.enqueue(*names(8))
    launcher.start(mux, observer=observer)
    observer.wait_for("dead", "j005")
    observer.wait_for("completed", times=7)
    assert "foreign key constraint" in observer.of("dead")[0][3]
    assert row(conn, "select count(*), count(distinct job_id) from ledger") == (7, 7)


@both_styles
def test_a_retry_in_a_transactional_call_rolls_it_back_and_the_others_run_again(
    launcher: Launcher, conn: psycopg.Connection, style: Style
) -> None:
    conn.execute(LEDGER)
    observer = Recorder()
    calls = Calls(lambda jobs: {job.id: Retry(NEVER) for job in jobs if job.id == "j001"})
    mux = Mux().register(
        "t", calls.of(style, transactional=True), batch=4, **WHOLE, transactional=True
    )
    launcher.enqueue(*names(4))
    launcher.start(mux, observer=observer)
    observer.wait_for("completed", times=3)
    observer.wait_for("retried", "j001")
    assert calls.ids == [names(4), ["j000", "j002", "j003"]]
    assert sorted(rows(conn, "select job_id from ledger")) == [("j000",), ("j002",), ("j003",)]


def test_a_batch_handler_that_ends_its_transaction_repeats_no_job(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    conn.execute(LEDGER)
    observer = Recorder()

    def handle(jobs: list[Job], conn: psycopg.Connection[Any]) -> None:
        conn.execute(WRITE, [[job.id for job in jobs]])
        conn.execute("commit")

    mux = Mux().register("t", handle, batch=3, **WHOLE, transactional=True)
    launcher.enqueue(*names(3))
    launcher.start(mux, observer=observer)
    observer.wait_for("dead", times=3)
    assert "ended the transaction it was given" in observer.of("dead")[0][3]
    assert row(conn, "select count(*) from ledger") == (3,)


# -- cancels, timeouts, shutdown -------------------------------------------------------------------


class Halted:
    """The body of a call that waits the first time."""

    def __init__(self) -> None:
        self.entered, self.released = threading.Event(), threading.Event()

    def __call__(self, _: Sequence[Job]) -> None:
        if not self.entered.is_set():
            self.entered.set()
            assert self.released.wait(PATIENCE)


@transactional_or_not
def test_a_cancelled_job_leaves_the_others_of_its_call_alone(
    launcher: Launcher, conn: psycopg.Connection, transactional: bool
) -> None:
    conn.execute(LEDGER)
    halted, observer = Halted(), Recorder()
    calls = Calls(halted)
    mux = mux_of(
        "t",
        calls.of("plain", transactional=transactional),
        batch=4,
        **WHOLE,
        transactional=transactional,
    )
    launcher.enqueue(*names(4))
    launcher.start(mux, observer=observer)
    assert halted.entered.wait(PATIENCE)
    assert launcher.client.jobs.cancel("j002")
    observer.wait_for("cancelled", "j002")
    halted.released.set()
    observer.wait_for("completed", times=3)
    rest = ["j000", "j001", "j003"]
    assert calls.ids == ([names(4), rest] if transactional else [names(4)])
    if transactional:
        assert sorted(id_ for (id_,) in rows(conn, "select job_id from ledger")) == rest
    assert [dead.id for dead in launcher.client.dlq.list()] == ["j002"]


def test_a_job_that_is_cancelled_while_it_waits_for_others_is_in_no_call(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    calls, observer = Calls(), Recorder()
    mux = Mux().register("t", calls.of("plain"), batch=3, **WHOLE)
    launcher.enqueue("a", "b")
    launcher.start(mux, observer=observer, concurrency=8)
    assert eventually(lambda: row(conn, "select count(token) from bgjob_job") == (2,))
    assert launcher.client.jobs.cancel("a")
    observer.wait_for("cancelled", "a")
    launcher.enqueue("c", "d")
    observer.wait_for("completed", times=3)
    assert sorted(calls.ids[0]) == ["b", "c", "d"]


def test_the_call_is_given_up_when_all_its_jobs_are_cancelled(launcher: Launcher) -> None:
    halted, observer = Halted(), Recorder()
    calls = Calls(halted)
    mux = Mux().register("t", calls.of("plain"), batch=3, batch_wait=0.01)
    launcher.enqueue(*names(3))
    launcher.start(mux, observer=observer, concurrency=1)
    assert halted.entered.wait(PATIENCE)
    for id_ in names(3):
        assert launcher.client.jobs.cancel(id_)
    launcher.enqueue("next")
    observer.wait_for("completed", "next")  # in another slot
    halted.released.set()
    assert observer.of("completed") == [("completed", "next", 1)]


@both_styles
@transactional_or_not
def test_a_job_that_hangs_times_out_alone(
    launcher: Launcher, conn: psycopg.Connection, style: Style, transactional: bool
) -> None:
    conn.execute(LEDGER)
    observer, released = Recorder(), threading.Event()
    calls: list[list[str]] = []

    def plain(jobs: list[Job], *conns: Any) -> None:
        calls.append([job.id for job in jobs])
        for each in conns:
            each.execute(WRITE, [calls[-1]])
        if "j005" in calls[-1]:
            assert released.wait(PATIENCE)

    async def coroutine(jobs: list[Job], *conns: Any) -> None:
        calls.append([job.id for job in jobs])
        for each in conns:
            await each.execute(WRITE, [calls[-1]])
        if "j005" in calls[-1]:
            await asyncio.sleep(PATIENCE)

    mux = mux_of(
        "t",
        plain if style == "plain" else coroutine,
        batch=8,
        **WHOLE,
        timeout=0.2,
        max_attempts=1,
        transactional=transactional,
    )
    launcher.enqueue(*names(8))
    launcher.start(mux, observer=observer, concurrency=4)
    observer.wait_for("dead", "j005")
    observer.wait_for("completed", times=7)
    released.set()
    assert len(calls) <= 2 * 3 + 1
    assert observer.of("timed_out") == [("timed_out", "j005", 1, 0.2)]
    assert observer.of("dead")[0][3].startswith("job 'j005' of type 't' did not end within")
    texts = [str(error) for _, error in observer.of("error")]
    assert "a call with 8 jobs of type 't', from 'j000' on, did not end" in texts[0]
    neighbours = [id_ for id_ in names(8) if id_ != "j005"]
    assert Counter(observer.of("completed")) == Counter(("completed", id_, 1) for id_ in neighbours)
    if transactional:
        assert eventually(
            lambda: sorted(id_ for (id_,) in rows(conn, "select job_id from ledger")) == neighbours
        )


def test_jobs_that_wait_for_others_go_back_with_their_attempt_at_the_end(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    calls = Calls()
    mux = Mux().register("t", calls.of("plain"), batch=500, **WHOLE)
    launcher.enqueue(*names(5))
    worker = launcher.start(mux)
    assert eventually(lambda: row(conn, "select count(token) from bgjob_job") == (5,))
    assert launcher.shutdown(worker, timeout=NEVER)
    assert calls.ids == []
    assert rows(conn, "select distinct attempt, token from bgjob_job") == [(0, None)]


@both_styles
def test_at_the_end_a_running_call_is_waited_for_and_not_repeated_in_halves(
    launcher: Launcher, conn: psycopg.Connection, style: Style
) -> None:
    halted, calls = Halted(), list[int]()

    async def coroutine(jobs: list[Job]) -> None:
        calls.append(len(jobs))
        halted.entered.set()
        while not halted.released.is_set():
            await asyncio.sleep(0.005)
        raise ValueError("too late")

    def plain(jobs: list[Job]) -> None:
        calls.append(len(jobs))
        halted(jobs)
        raise ValueError("too late")

    mux = Mux().register("t", plain if style == "plain" else coroutine, batch=4, **WHOLE)
    launcher.enqueue(*names(4))
    worker = launcher.start(mux)
    assert halted.entered.wait(PATIENCE)
    ending = threading.Thread(target=launcher.shutdown, args=[worker], kwargs={"timeout": NEVER})
    ending.start()
    assert eventually(lambda: worker._group._controls[0]._slots.is_stopping)
    halted.released.set()
    ending.join()
    assert not calls[1:]
    assert rows(conn, "select distinct attempt, token from bgjob_job") == [(0, None)]


@pytest.mark.parametrize("launcher", [False], indirect=True)
def test_coroutines_that_the_grace_period_ends_give_their_jobs_back(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    entered = threading.Event()

    async def endless(jobs: list[Job]) -> None:
        entered.set()
        await asyncio.sleep(NEVER)

    mux = Mux().register("t", endless, batch=4, **WHOLE)
    launcher.enqueue(*names(4))
    worker = launcher.start(mux)
    assert entered.wait(PATIENCE)
    launcher.shutdown(worker, timeout=0)
    assert rows(conn, "select distinct attempt, token from bgjob_job") == [(0, None)]


# -- beside other jobs -------------------------------------------------------------------------------


def test_a_job_with_a_key_runs_in_a_call_of_its_own_and_in_the_order_of_its_key(
    launcher: Launcher,
) -> None:
    observer, calls = Recorder(), Calls()
    mux = Mux().register("t", calls.of("plain"), batch=10, batch_wait=0.01)
    launcher.client.bulk_enqueue(
        [EnqueueRequest("q", "t", id=f"{key}{n}", exclusive=key) for n in range(3) for key in "ab"]
        + [EnqueueRequest("q", "t", id=f"free{n}") for n in range(3)]
    )
    launcher.start(mux, observer=observer)
    observer.wait_for("completed", times=9)
    alone = [ids[0] for ids in calls.ids if len(ids) == 1]
    for key in "ab":
        assert [id_ for id_ in alone if id_[0] == key] == [f"{key}{n}" for n in range(3)]
    assert calls.ids.count(["free0", "free1", "free2"]) == 1


@both_styles
def test_two_jobs_of_a_key_never_run_at_once_beside_batches_that_fail(
    launcher: Launcher, conn: psycopg.Connection, style: Style
) -> None:
    calls: list[list[str]] = []
    running, most = Counter[str | None](), Counter[str | None]()
    lock = threading.Lock()

    def begin(jobs: list[Job]) -> None:
        with lock:
            calls.append([job.id for job in jobs])
            running.update({job.exclusive for job in jobs})
            for key, count in running.items():
                most[key] = max(most[key], count)

    def end(jobs: list[Job]) -> None:
        with lock:
            running.subtract({job.exclusive for job in jobs})
        if any(job.id == "free007" for job in jobs):
            raise ValueError("poison")

    def plain(jobs: list[Job]) -> None:
        begin(jobs)
        time.sleep(0.0005)
        end(jobs)

    async def coroutine(jobs: list[Job]) -> None:
        begin(jobs)
        await asyncio.sleep(0.0005)
        end(jobs)

    handler: Any = plain if style == "plain" else coroutine
    keys = [None, "a", "b", "c"]
    requests = [
        EnqueueRequest("q", "t", id=f"{key or 'free'}{n:03}", exclusive=key)
        for n in range(40)
        for key in keys
    ]
    launcher.client.bulk_enqueue(requests)
    for _ in range(2):
        launcher.start(
            mux_of("t", handler, batch=10, batch_wait=0.01, max_attempts=1),
            concurrency=4,
            poll_interval=0.05,
        )
    assert all_done(conn)
    assert rows(conn, "select job_id from bgjob_dead_job") == [("free007",)]
    alone = [ids[0] for ids in calls if len(ids) == 1]
    for key in "abc":
        assert [id_ for id_ in alone if id_[0] == key] == [f"{key}{n:03}" for n in range(40)]
        assert most[key] == 1
    assert all(id_.startswith("free") for ids in calls if len(ids) > 1 for id_ in ids)


def test_the_jobs_of_a_call_are_in_the_order_of_their_priorities(launcher: Launcher) -> None:
    observer, calls = Recorder(), Calls()
    mux = Mux().register("t", calls.of("plain"), batch=6, **WHOLE)
    launcher.client.bulk_enqueue(
        [EnqueueRequest("q", "t", id=f"{n}", priority=-n) for n in range(6)]
    )
    launcher.start(mux, observer=observer, concurrency=1)
    observer.wait_for("completed", times=6)
    assert calls.ids == [["5", "4", "3", "2", "1", "0"]]


def test_slow_jobs_of_another_type_are_not_held_back_by_a_worker_with_batches(
    launcher: Launcher,
) -> None:
    """Another worker runs them: those that a claim brought in excess are released."""
    released, ran, lock = threading.Event(), list[str](), threading.Lock()

    def slow(job: Job) -> None:
        with lock:
            ran.append(job.id)
        assert released.wait(PATIENCE)

    mux = Mux().register("t", Calls().of("plain"), batch=500).register("slow", slow)
    launcher.enqueue(*names(200))
    first = launcher.start(mux, concurrency=2)
    assert eventually(lambda: launcher.client.stats("q") == [])
    launcher.enqueue(*(f"s{n}" for n in range(12)), type="slow")
    launcher.start(mux, concurrency=10)
    assert eventually(lambda: len(ran) == 12)
    released.set()
    assert first


def test_a_large_payload_is_read_for_a_call_of_its_own(launcher: Launcher) -> None:
    observer = Recorder()
    sizes: list[list[int]] = []
    mux = Mux().register(
        "t",
        lambda jobs: sizes.append([len(job.arg or b"") for job in jobs]),
        batch=4,
        batch_wait=0.01,
    )
    launcher.client.bulk_enqueue(
        [EnqueueRequest("q", "t", bytes(size), id=str(size)) for size in (1, 200_000, 2, 300_000)]
    )
    launcher.start(mux, observer=observer)
    observer.wait_for("completed", times=4)
    assert sorted(sizes) == [[1, 2], [200_000], [300_000]]
    assert len(observer.of("started")) == 4


def test_the_jobs_of_a_batch_that_have_expired_are_not_in_its_call(launcher: Launcher) -> None:
    observer, calls = Recorder(), Calls()
    mux = Mux().register("t", calls.of("plain"), batch=4, **WHOLE)
    late = datetime.now(UTC) - timedelta(hours=1)
    launcher.client.bulk_enqueue(
        [
            EnqueueRequest("q", "t", id=id_, expires=expires)
            for id_, expires in [("a", late), ("b", None), ("c", timedelta(hours=1)), ("d", late)]
        ]
    )
    launcher.start(mux, observer=observer)
    observer.wait_for("completed", times=2)
    observer.wait_for("dead", times=2)
    assert calls.ids == [["b", "c"]]
    assert [id_ for _, id_, _ in observer.of("started")] == ["b", "c"]
    assert "the job expired at" in observer.of("dead")[0][3]


# -- payloads, middleware, state, do -----------------------------------------------------------------


@dataclass(frozen=True)
class Mail:
    to: str


@both_styles
@transactional_or_not
def test_a_payload_that_cannot_be_decoded_fails_alone(
    launcher: Launcher, style: Style, transactional: bool
) -> None:
    observer = Recorder()
    got: list[tuple[list[str], list[str]]] = []

    def plain(mails: list[Mail], *_: Any, jobs: list[Job]) -> dict[str, Any]:
        got.append(([mail.to for mail in mails], [job.id for job in jobs]))
        return {jobs[-1].id: Reschedule(NEVER)}

    async def coroutine(mails: list[Mail], *_: Any, jobs: list[Job]) -> dict[str, Any]:
        return plain(mails, jobs=jobs)

    mux = mux_of(
        Mail,
        plain if style == "plain" else coroutine,
        batch=3,
        **WHOLE,
        transactional=transactional,
    )
    launcher.client.bulk_enqueue(
        [
            EnqueueRequest("q", "Mail", {"to": to}, id=id_)
            for id_, to in [("a", "ann"), ("b", 7), ("c", "cat")]
        ]
    )
    launcher.start(mux, observer=observer)
    observer.wait_for("dead", "b")
    observer.wait_for("completed", "a")
    observer.wait_for("rescheduled", "c")
    assert got == [(["ann", "cat"], ["a", "c"])]
    assert "field 'to' must be str, not int" in observer.of("dead")[0][3]


def test_middleware_of_a_batch_handler_is_called_with_the_jobs(launcher: Launcher) -> None:
    observer, seen = Recorder(), list[Any]()

    def counting(handle: Callable[..., Any]) -> Callable[..., Any]:
        def counted(jobs: list[Job]) -> Any:
            seen.append([job.id for job in jobs])
            return handle(jobs[:-1])

        return counted

    calls = Calls()
    mux = Mux(middleware=[counting]).register("t", calls.of("plain"), batch=3, **WHOLE)
    launcher.enqueue(*names(3))
    launcher.start(mux, observer=observer)
    observer.wait_for("completed", times=3)
    assert seen == [names(3)]
    assert calls.ids == [names(2)]


def test_a_batch_handler_gets_the_state(dsn: str) -> None:
    got: list[tuple[int, int]] = []

    def handle(jobs: list[Job], *, state: int) -> None:
        got.append((len(jobs), state))

    mux = Mux().register("t", handle, batch=3).bound(5)
    with Client(dsn) as client:
        client.enqueue(EnqueueRequest("q", "t"))
        assert client.do("q", mux) == Complete()
    assert got == [(1, 5)]


@both_styles
@transactional_or_not
def test_do_and_drain_call_a_batch_handler_with_one_job(
    dsn: str, conn: psycopg.Connection, style: Style, transactional: bool
) -> None:
    conn.execute(LEDGER)
    calls = Calls(lambda jobs: {jobs[0].id: MoveToDlq("no"), "who": Complete()})
    mux = mux_of(
        "t", calls.of(style, transactional=transactional), batch=3, transactional=transactional
    )
    with Client(dsn) as client:
        client.bulk_enqueue([EnqueueRequest("q", "t", id=id_) for id_ in names(3)])
        assert client.do("q", mux) == MoveToDlq("no")
        assert [ran.result for ran in drain(client, "q", mux)] == [MoveToDlq("no")] * 2
    assert calls.ids == [[id_] for id_ in names(3)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch of job type 't' must be from 1 to 1000 jobs"),
        ({"batch": 1001}, "batch of job type 't' must be from 1 to 1000 jobs"),
        ({"batch": True}, "batch of job type 't' must be from 1 to 1000 jobs"),
        ({"batch": 2, "exclusive": True}, "has both exclusive= and batch="),
        ({"batch": 2, "exclusive": lambda job: job.id}, "has both exclusive= and batch="),
        ({"batch_wait": 1.0}, "has batch_wait= and no batch="),
        ({"batch": 2, "batch_wait": -1.0}, "batch_wait of job type 't'"),
    ],
)
def test_a_wrong_batch_is_refused_when_it_is_registered(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Mux().register("t", lambda jobs: None, **options)
    assert Mux().register("t", lambda jobs: None, batch=2, batch_wait=timedelta(seconds=1))


def test_a_handler_that_does_not_take_what_a_batch_has_is_refused() -> None:
    with pytest.raises(TypeError, match=r"is called as handler\(jobs, conn\)"):
        mux_of("t", lambda jobs: None, batch=2, transactional=True)


# -- the parts ----------------------------------------------------------------------------------------


def gathering(batch: int = 3) -> tuple[Gathering, list[Claimed]]:
    displaced: list[Claimed] = []
    mux = Mux().register("t", lambda jobs: None, batch=batch, batch_wait=1.0, max_attempts=1)
    return Gathering(mux.batches, displaced.append), displaced


def claims(*ids: str, token: int = 1, **options: Any) -> list[Claimed]:
    return [Claimed(a_job(id=id_, **options), token) for id_ in ids]


def test_suspects_large_payloads_and_exhausted_jobs_are_not_mixed_with_others() -> None:
    gathered, _ = gathering()
    [suspect] = claims("s", token=7)
    [large] = claims("l", arg=ELSEWHERE)
    [spent] = claims("e", attempt=4)
    ready = gathered.add([*claims("a", "b"), suspect, large, spent, *claims("c")], {7}, 0.0)
    assert [[c.job.id for c in members(each)] for each in ready] == [
        ["s"],
        ["l"],
        ["e"],
        ["a", "b", "c"],
    ]
    assert [isinstance(each, Batch) for each in ready] == [True, False, False, True]


def test_a_job_that_the_worker_has_claimed_again_is_in_its_batch_once() -> None:
    gathered, displaced = gathering()
    [old], [new] = claims("a", token=1), claims("a", token=2)
    assert gathered.add([old, new], (), 0.0) == []
    assert displaced == [old]
    assert gathered.next_at == 1.0
    [batch] = gathered.due(1.0)
    assert [*members(batch)] == [new]
    assert gathered.waiting == []


def test_a_claim_has_room_for_a_batch_in_each_free_slot_but_not_for_single_jobs() -> None:
    pace = BatchPace(2, {"t": 100})
    assert pace.capacity == 2 + 2  # nothing is known of the jobs
    pace.claimed(claims(*names(20)), 0.0)
    pace.merged, pace.free = 19, 1
    assert pace.capacity - pace.running >= 100  # they were of batches, and a slot is free
    pace.finished([Outcome(claimed, Complete(), 1.0) for claimed in claims(*names(20))])
    pace.claimed(claims(*names(40), type="slow"), 0.0)
    pace.merged, pace.free = 0, 1
    assert pace.capacity - pace.running <= 0


def test_jobs_that_wait_for_others_are_not_stale() -> None:
    pace = BatchPace(1, {"t": 100}, only_batches=True)
    pace.claimed(claims(*names(50)), 0.0)
    pace.gathered = 50
    assert pace.stale_at == float("inf")
    assert pace.has_free_slot
    pace.gathered = 0
    pace.flushed(9.0)
    assert 9.0 < pace.stale_at < 10.0
    pace.merged = 49
    assert pace.stale_at == float("inf")


def test_the_routes_of_a_batch_handler_judge_alike() -> None:
    mux = Mux().register("t", lambda jobs: None, batch=2)
    route = mux.batches["t"]
    assert isinstance(route, BatchRoute)
    answer = route.answer([a_job(id="a"), a_job(id="b")], {"b": Retry(1.0)})
    assert answer.results == {"a": Complete(), "b": Retry(1.0)}
    assert answer.undone == {"b"}
