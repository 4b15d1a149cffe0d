"""Groups: `then` runs once, when no job of its group is live any more, and is told how many died."""

import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import psycopg
import pytest
from support.clients import Colour
from support.database import rows
from support.jobs import a_job
from support.pages import opened
from support.statements import ask
from support.waiting import eventually

from bgjob import (
    Client,
    Complete,
    EmptyQueueError,
    EnqueueConflictError,
    EnqueueRequest,
    Job,
    JobAlreadyExistsError,
    LeaseLostError,
    MoveToDlq,
    Mux,
    Result,
    Worker,
    cli,
)
from bgjob._sql.groups import end_groups
from bgjob._sql.settlements import Claimed, DeadLettered, complete, dead_letter
from bgjob.testing import drain


def job(id: str, type: str = "job", **options: Any) -> EnqueueRequest:
    return EnqueueRequest("q", type, id=id, **options)


THEN = job("then", "then")


class Handlers:
    """A mux with types "job", "bad", which dies, and "then", and the jobs that it ran."""

    def __init__(self) -> None:
        self.ran: list[Job] = []
        self.mux = (
            Mux().register("job", self.run).register("then", self.run).register("bad", self._die)
        )

    def run(self, job: Job) -> None:
        self.ran.append(job)

    def _die(self, job: Job) -> Result:
        self.ran.append(job)
        return MoveToDlq("bad")

    @property
    def ids(self) -> list[str]:
        return [job.id for job in self.ran]

    @property
    def told(self) -> list[int | None]:
        """What each `then` was told."""
        return [job.group_dead for job in self.ran if job.type == "then"]


def do_all(client: Any, mux: Mux) -> None:
    while True:
        try:
            client.do("q", mux)
        except EmptyQueueError:
            return


def write(client: Any, *jobs: EnqueueRequest, then: EnqueueRequest = THEN, **options: Any) -> None:
    with client.group(then=then, **options) as group:
        for each in jobs:
            assert group.enqueue(each) == each.id


# -- when it runs ----------------------------------------------------------------------


def test_then_runs_once_after_all_jobs_of_the_group_and_is_told_how_many_died(client: Any) -> None:
    write(client, job("a"), job("b", "bad"), job("c", delay=3600), job("d", "bad"))
    client.enqueue(job("e"))
    handlers = Handlers()
    do_all(client, handlers.mux)
    assert handlers.ids == ["a", "b", "d", "e"]
    assert {job.id: job.group for job in handlers.ran} == dict.fromkeys("abd", "then") | {"e": None}
    assert client.jobs.get("then").waits_for_group
    client.jobs.run_now("c")
    do_all(client, handlers.mux)
    assert handlers.ids[4:] == ["c", "then"]
    assert handlers.ran[-1].group == "then"
    assert handlers.told == [2]
    assert {dead.id for dead in client.dlq.list(group="then")} == {"b", "d"}
    assert {dead.group for dead in client.dlq.list()} == {"then"}


@pytest.mark.parametrize("is_own", [True, False])
def test_an_empty_group_is_over_at_once(colour: Colour, client: Any, is_own: bool) -> None:
    if is_own:
        write(client)
    else:
        caller = colour.connect()
        write(client, conn=caller)
        caller.commit()
    handlers = Handlers()
    do_all(client, handlers.mux)
    assert (handlers.ids, handlers.told) == (["then"], [0])


def test_jobs_that_died_expired_or_were_cancelled_are_counted(
    client: Any, conn: psycopg.Connection
) -> None:
    write(client, job("done"), job("bad", "bad"), job("late", expires=60), job("cancelled"))
    conn.execute("update bgjob_job set expires = now() where id = 'late'")
    client.jobs.cancel("cancelled")
    handlers = Handlers()
    do_all(client, handlers.mux)
    assert handlers.told == [3]


def test_the_end_of_the_last_job_by_a_cancel_is_found(client: Any) -> None:
    write(client, job("a", delay=3600))
    handlers = Handlers()
    do_all(client, handlers.mux)
    assert handlers.ids == []
    client.jobs.cancel("a")
    do_all(client, handlers.mux)
    assert handlers.told == [1]


def test_a_dead_job_that_is_requeued_before_the_end_makes_the_group_wait_for_it(
    client: Any,
) -> None:
    write(client, job("a", "bad"), job("b", delay=3600))
    handlers = Handlers()
    do_all(client, handlers.mux)
    assert client.dlq.requeue("a") == ["a"]
    client.jobs.cancel("b")
    assert client.jobs.get("then").waits_for_group
    do_all(client, Mux().register("bad", lambda _: None).register("then", handlers.run))
    assert handlers.told == [1]


def test_a_dead_job_that_is_requeued_after_the_end_runs_without_another_then(client: Any) -> None:
    write(client, job("a", "bad"))
    handlers = Handlers()
    do_all(client, handlers.mux)
    client.dlq.requeue("a")
    do_all(client, handlers.mux)
    assert handlers.ids == ["a", "then", "a"]


def test_a_second_group_with_the_id_of_one_that_is_over_counts_only_its_own_dead(
    client: Any,
) -> None:
    handlers = Handlers()
    for n in range(2):
        write(client, job(f"{n}", "bad"))
        do_all(client, handlers.mux)
    assert handlers.told == [1, 1]


@pytest.mark.parametrize("die", [False, True])
def test_two_that_settle_the_last_two_jobs_in_the_same_moment_make_then_due_once(
    dsn: str, plain_client: Client, die: bool
) -> None:
    rounds, barrier = 40, threading.Barrier(2)
    for n in range(rounds):
        write(plain_client, job(f"{n}/0"), job(f"{n}/1"), then=job(f"{n}", "then", priority=1))

    def settle(which: int) -> list[str]:
        due = []
        with psycopg.connect(dsn, autocommit=True) as conn:
            for n in range(rounds):
                id_, token = f"{n}/{which}", 2 * n + which
                conn.execute("update bgjob_job set token = %s where id = %s", [token, id_])
                held = [Claimed(a_job(id=id_), token)]
                barrier.wait()
                if die:
                    ask(conn, dead_letter([DeadLettered(each, "why", 0) for each in held]))
                else:
                    ask(conn, complete(held))
                due += ask(conn, end_groups([f"{n}"], notify=True))
        return due

    with ThreadPoolExecutor(2) as pool:
        due = [id_ for ids in pool.map(settle, range(2)) for id_ in ids]
    assert sorted(due) == sorted(f"{n}" for n in range(rounds))
    handlers = Handlers()
    do_all(plain_client, handlers.mux)
    assert handlers.told == [2 * die] * rounds


# -- how it is written -----------------------------------------------------------------


def nothing_written(conn: psycopg.Connection) -> bool:
    return rows(conn, "select id from bgjob_job") == []


def test_an_exception_in_the_block_writes_nothing(client: Any, conn: psycopg.Connection) -> None:
    with pytest.raises(ZeroDivisionError), client.group(then=THEN) as group:
        group.enqueue(job("a"))
        raise ZeroDivisionError
    assert nothing_written(conn)
    with pytest.raises(RuntimeError, match="group 'then' has been written"):
        group.enqueue(job("b"))


@pytest.mark.parametrize("taken", ["then", "a", "b"])
def test_a_taken_id_writes_nothing_and_the_callers_transaction_goes_on(
    colour: Colour, client: Any, conn: psycopg.Connection, taken: str
) -> None:
    client.enqueue(job(taken))
    caller = colour.connect()
    caller.execute("create table own (n int)")
    with pytest.raises(JobAlreadyExistsError) as raised:
        write(client, job("b"), job("a"), *[job("twice")] * (2 if taken == "b" else 1), conn=caller)
    assert raised.value.ids == (("b", "twice") if taken == "b" else (taken,))
    caller.commit()
    assert rows(conn, "select id from bgjob_job") == [(taken,)]
    assert rows(conn, "select * from own") == []


@pytest.mark.parametrize("commits", [True, False])
def test_a_group_in_the_callers_transaction_exists_if_that_commits(
    colour: Colour, client: Any, conn: psycopg.Connection, commits: bool
) -> None:
    caller = colour.connect()
    write(client, job("a"), conn=caller)
    assert nothing_written(conn)
    if not commits:
        caller.rollback()
        assert nothing_written(conn)
        return
    caller.commit()
    handlers = Handlers()
    do_all(client, handlers.mux)
    assert handlers.ids == ["a", "then"]


def test_a_group_in_a_two_phase_transaction(colour: Colour, client: Any) -> None:
    caller = colour.connect()
    caller.tpc_begin("x")
    write(client, conn=caller)
    caller.tpc_prepare()
    caller.tpc_commit()
    handlers = Handlers()
    do_all(client, handlers.mux)
    assert handlers.told == [0]


def test_a_conflict_in_a_repeatable_read_transaction_names_the_remedy(
    colour: Colour, client: Any
) -> None:
    caller = colour.connect()
    caller.execute("set transaction isolation level repeatable read")
    caller.execute("select 1")
    client.enqueue(THEN)
    with pytest.raises(EnqueueConflictError, match="'then'"):
        write(client, job("a"), conn=caller)


def test_an_error_in_a_generator_writes_nothing(client: Any, conn: psycopg.Connection) -> None:
    def requests() -> Iterator[EnqueueRequest]:
        yield job("a")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), client.group(then=THEN) as group:
        group.enqueue_many(requests())
    assert nothing_written(conn)


JOBS = 10_600
"""More than one chunk, and in the second one enough for a COPY."""


@pytest.mark.parametrize("headers", [{}, {"n": 1}])
def test_thousands_of_jobs_of_a_generator_are_copied_into_the_group(
    plain_client: Client, conn: psycopg.Connection, headers: dict[str, Any]
) -> None:
    made: list[str] = []

    def requests() -> Iterator[EnqueueRequest]:
        for n in range(JOBS):
            made.append(f"{n:05}")
            yield job(made[-1], headers=headers)

    with plain_client.group(then=THEN) as group:
        group.enqueue_many(requests())
        assert made == []
        group.enqueue_many([])
    query = (
        "select count(*), count(headers) from bgjob_job where group_id = 'then' and id <> 'then'"
    )
    assert rows(conn, query) == [(JOBS, JOBS if headers else 0)]


@dataclass
class Page:
    n: int
    queue: ClassVar[str] = "q"


def test_typed_jobs_and_headers_that_every_enqueue_gets(colour: Colour) -> None:
    @contextmanager
    def tenant(requests: Iterable[EnqueueRequest]) -> Iterator[Iterable[EnqueueRequest]]:
        yield (request.with_headers({"tenant": 7}) for request in requests)

    client = colour.client(on_enqueue=tenant)
    seen: list[tuple[Any, Any]] = []

    def page(page: Page, job: Job) -> None:
        seen.append((page, job.headers["tenant"]))

    with client.group(then=Page(2)) as group:
        group.enqueue(Page(1), priority=1)
    do_all(client, Mux().register(Page, page))
    assert seen == [(Page(1), 7), (Page(2), 7)]


def test_what_is_no_group_is_refused_and_says_why(client: Any) -> None:
    plain = Job("a", "q", "t", None, 1, None, 0, *[None] * 3)  # type: ignore[arg-type]
    refused: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (TypeError, "then=request, or of=job", {}),
        (TypeError, "then=request, or of=job", {"then": THEN, "of": plain}),
        (TypeError, "of must be the Job of a handler, not str", {"of": "then"}),
        (ValueError, "'a' is not one of a group", {"of": plain}),
        (ValueError, "'a' is not one of a group", {"of": plain._replace(group="a")}),
        (ValueError, "no delay and no run_at", {"then": job("then", delay=1)}),
    ]
    for error, text, options in refused:
        with pytest.raises(error, match=text):
            client.group(**options)


# -- jobs that add jobs ----------------------------------------------------------------


@pytest.mark.parametrize("transactional", [True, False])
def test_a_job_of_a_group_adds_jobs_to_it(plain_client: Client, transactional: bool) -> None:
    handlers = Handlers()

    def add(job: Job, *conn: Any) -> None:
        handlers.run(job)
        if job.id < "aaa":
            given = {"conn": conn[0]} if conn else {}
            with plain_client.group(of=job, **given) as group:
                group.enqueue(EnqueueRequest("q", "add", id=f"{job.id}a", priority=1))

    options: dict[str, Any] = {"transactional": transactional}
    handlers.mux.register("add", add, **options)
    write(plain_client, job("a", "add"))
    do_all(plain_client, handlers.mux)
    assert handlers.ids == ["a", "aa", "aaa", "then"]


def test_a_job_that_is_over_adds_nothing(client: Any, conn: psycopg.Connection) -> None:
    handlers = Handlers()
    write(client, job("a"), job("b", delay=3600))
    do_all(client, handlers.mux)
    with (
        pytest.raises(LeaseLostError, match="job 'a' is over"),
        client.group(of=handlers.ran[0]) as group,
    ):
        group.enqueue(job("c"))
    assert rows(conn, "select id from bgjob_job order by id") == [("b",), ("then",)]


def test_whoever_settles_a_job_waits_for_the_transaction_that_adds_to_its_group(
    plain_client: Client, conn: psycopg.Connection
) -> None:
    handlers = Handlers()
    with psycopg.connect(conn.info.dsn) as adding:

        def add(job: Job) -> None:
            with plain_client.group(of=job, conn=adding) as group:
                group.enqueue(EnqueueRequest("q", "job", id="b"))
            handlers.run(job)

        handlers.mux.register("add", add)
        write(plain_client, job("a", "add"))
        running = threading.Thread(target=do_all, args=(plain_client, handlers.mux))
        running.start()
        waits = "select count(*) from pg_stat_activity where wait_event_type = 'Lock'"
        assert eventually(lambda: handlers.ids == ["a"] and rows(conn, waits) == [(1,)])
        adding.commit()
        running.join()
    assert handlers.ids == ["a", "b", "then"]


def test_the_id_of_then_stays_taken_as_long_as_its_result_is_kept(client: Any) -> None:
    then = job("then", "then", keep=60, exclusive="key", headers={"n": 1}, expires=60)
    write(client, job("a", keep=60), then=then)
    with pytest.raises(JobAlreadyExistsError):
        write(client, then=then)
    handlers = Handlers()
    do_all(client, handlers.mux)
    assert handlers.ids == ["a", "then"]
    assert (handlers.ran[1].exclusive, handlers.ran[1].headers) == ("key", {"n": 1})
    # Whoever did not get the answer learns that all of it has been written, and has run.
    with pytest.raises(JobAlreadyExistsError) as taken:
        write(client, job("a", keep=60), then=then)
    assert taken.value.ids == ("then",)
    assert client.result("then").state == "completed"


# -- steering --------------------------------------------------------------------------


def test_then_that_was_cancelled_while_it_waited_waits_again_after_a_requeue(client: Any) -> None:
    write(client, job("a", delay=3600))
    client.jobs.cancel("then")
    client.dlq.requeue("then")
    handlers = Handlers()
    do_all(client, handlers.mux)
    assert handlers.ids == []
    client.jobs.run_now("a")
    do_all(client, handlers.mux)
    assert (handlers.ids, handlers.told) == (["a", "then"], [0])


def test_then_that_died_after_its_group_is_due_after_a_requeue_and_still_knows_the_dead(
    client: Any,
) -> None:
    write(client, job("a", "bad"), then=job("then", "bad"))
    handlers = Handlers()
    do_all(client, handlers.mux)
    assert client.dlq.get("then").group_dead == 1
    client.dlq.requeue("then")
    do_all(client, handlers.mux)
    assert [(job.id, job.group_dead) for job in handlers.ran[1:]] == [("then", 1)] * 2


def test_then_that_was_made_to_run_before_the_end_runs_once_and_was_told_nothing(
    client: Any,
) -> None:
    write(client, job("a", delay=3600))
    client.jobs.run_now("then")
    handlers = Handlers()
    do_all(client, handlers.mux)
    client.jobs.run_now("a")
    do_all(client, handlers.mux)
    assert (handlers.ids, handlers.told) == (["then", "a"], [None])


def test_a_job_that_is_replaced_stays_in_its_group_and_then_goes_on_waiting(
    plain_client: Client,
) -> None:
    client, handlers = plain_client, Handlers()
    write(client, job("a"), job("b", delay=3600))
    new = [job("a", delay=3600), job("b"), job("then", "then", arg=b"new")]

    def replace(job: Job) -> None:
        if not handlers.ran:
            client.bulk_enqueue(new, on_conflict="replace")
        handlers.run(job)

    do_all(client, Mux().register("job", replace))
    assert handlers.ids == ["a", "b"]
    successor, then = client.jobs.get("a"), client.jobs.get("then")
    assert successor is not None and successor.group == "then"
    assert then is not None and then.waits_for_group
    client.jobs.run_now("a")
    do_all(client, handlers.mux)
    assert [(job.id, job.arg) for job in handlers.ran[2:]] == [("a", None), ("then", b"new")]


def test_explain_says_what_then_waits_for(client: Any) -> None:
    write(client, job("a"), job("b"))
    client.enqueue(job("c"))
    [reason, *_] = client.explain("then").reasons
    assert (reason.code, reason.blocks, reason.remedy) == (
        ("group", False, "see what holds that one up: bgjob explain b")
    )
    assert reason.text == (
        "It runs when no job of its group is live any more: 2 are, 0 of them running; the last one "
        "is 'b'."
    )
    assert reason.facts == {"live": 2, "running": 0, "last": "b", "is_exact": True}
    client.jobs.cancel(["a", "b"])
    [reason, *_] = client.explain("then").reasons
    assert (reason.code, reason.facts) == ("group", {"live": 0})
    assert "the next full look of a worker of its queue makes it due" in reason.text


def test_the_command_and_the_page_show_the_group_of_a_job(
    dsn: str,
    plain_client: Client,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write(plain_client, job("a"), job("b", "bad"))
    plain_client.do("q", Handlers().mux)
    plain_client.do("q", Handlers().mux)
    write(plain_client, job("c"), then=job("waits", "then"))
    monkeypatch.setenv("BGJOB_DSN", dsn)

    def shown(*command: str) -> dict[str, str]:
        assert cli.main([*command]) == 0
        return dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())

    assert shown("job", "show", "c")["group"] == "waits"
    assert shown("job", "show", "then")["group_dead"] == "1"
    assert shown("dlq", "show", "b")["group"] == "then"
    with opened(dsn) as page:
        link = '<dt>{}</dt><dd><a href="/jobs/{}">'
        assert link.format("Group", "waits") in page.get("/jobs/c").text
        assert "when no job of its group is live" in page.get("/jobs/waits").text
        assert "when no job of its group is live" not in page.get("/jobs/then").text
        dead = plain_client.dlq.get("b")
        assert dead is not None
        assert link.format("Of the group", "then") in page.get(f"/dead/{dead.number}").text


# -- workers and drains ----------------------------------------------------------------


@pytest.mark.parametrize("transactional", [True, False])
def test_a_worker_of_another_queue_is_told_at_once(dsn: str, transactional: bool) -> None:
    ended = threading.Event()
    told: list[int | None] = []

    def then(job: Job) -> None:
        told.append(job.group_dead)
        ended.set()

    def bad(job: Job, *_: Any) -> Result:
        return MoveToDlq("bad") if job.id == "a" else Complete()

    # Neither of them polls within the test.
    options: dict[str, Any] = {"transactional": transactional}
    first = Mux().register("job", bad, **options)
    with (
        Client(dsn) as client,
        Worker(client, "q", first, poll_interval=300),
        Worker(client, "other", Mux().register("then", then), poll_interval=300),
    ):
        write(client, *[job(each) for each in "abc"], then=EnqueueRequest("other", "then"))
        assert ended.wait(60)
    assert told == [1]


def test_a_group_whose_last_job_was_cancelled_is_found_by_the_next_look_at_the_queue(
    dsn: str,
) -> None:
    handlers = Handlers()
    with Client(dsn) as client:
        write(client, job("a", delay=3600))
        with Worker(client, "q", handlers.mux, poll_interval=0.02):
            client.jobs.cancel("a")
            assert eventually(lambda: handlers.told == [1])


def test_a_worker_that_stops_ends_the_groups_of_what_it_has_settled(
    dsn: str, conn: psycopg.Connection
) -> None:
    entered, leave = threading.Event(), threading.Event()

    def wait(_: Job) -> None:
        entered.set()
        leave.wait()

    with Client(dsn) as client:
        worker = Worker(client, "q", Mux().register("job", wait), poll_interval=300)
        worker.run()
        write(client, job("a"))
        assert entered.wait(60)
        stopping = threading.Thread(target=worker.shutdown)
        stopping.start()
        leave.set()
        stopping.join()
    assert rows(conn, "select id, group_dead from bgjob_job") == [("then", 0)]


def test_a_drain_runs_then_also_within_the_tests_transaction(dsn: str) -> None:
    handlers = Handlers()
    with Client(dsn) as client, psycopg.connect(dsn) as conn:
        write(client, job("a"), job("b", delay=3600), conn=conn)
        ran = drain(conn, "q", handlers.mux)
        assert [each.job.id for each in ran] == ["a"]
        client.jobs.cancel("b", conn=conn)
        assert [each.job.id for each in drain(conn, "q", handlers.mux)] == ["then"]
        conn.rollback()
    assert handlers.told == [1]
