"""The dead are grouped by how they died; one is tried, then the rest."""

import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import psycopg
import pytest

from bgjob import (
    CanaryRefusedError,
    Client,
    EnqueueRequest,
    Job,
    MoveToDlq,
    Mux,
    Reschedule,
    Result,
    Retry,
    Worker,
)
from bgjob.triage import Canary, Rest
from support.database import count, rows
from support.roles import Roles
from support.waiting import NEVER, PATIENCE, eventually


def decline(job: Job) -> MoveToDlq:
    return MoveToDlq(f"card '{job.id}' was declined")


def confirm(job: Job) -> None:
    raise ConnectionError(f"mail server {job.id} is away\nsecond line")


MUX = Mux().register("pay", decline).register("confirm", confirm, max_attempts=1)


def kill(client: Any, type: str, *ids: str, queue: str = "q", mux: Mux = MUX) -> None:
    for id_ in ids:
        client.enqueue(EnqueueRequest(queue, type, id=id_, arg={"to": id_}))
        client.do(queue, mux)


def test_dead_jobs_are_grouped_by_how_they_died(client: Any, conn: psycopg.Connection) -> None:
    kill(client, "confirm", "1", "22")
    kill(client, "pay", "a")
    kill(client, "confirm", "333", queue="other")
    kill(client, "unheard-of", "b")
    groups = client.dlq.groups()
    assert [(g.jobs, g.queues, g.type, g.id, g.title) for g in groups] == [
        (3, ("other", "q"), "confirm", "333", "ConnectionError: mail server 0 is away"),
        (1, ("q",), "unheard-of", "b", groups[1].title),
        (1, ("q",), "pay", "a", "card <> was declined"),
    ]
    assert groups[1].title.startswith("UnknownTypeError: no handler is registered for job type <>")
    [three, *_] = groups
    dead = client.dlq.list(fingerprint=three.fingerprint)
    assert [job.id for job in dead] == ["333", "22", "1"]
    assert {job.fingerprint for job in dead} == {three.fingerprint}
    assert (three.first, three.last) == (dead[2].moved_at, dead[0].moved_at)
    assert (three.number, three.error) == (dead[0].number, dead[0].last_error)
    assert "second line\n  at test_triage.py:" in three.error
    assert client.dlq.groups(limit=1) == [three]
    assert [g.jobs for g in client.dlq.groups(queue="q", older_than=0)] == [2, 1, 1]
    assert client.dlq.groups(moved_after=three.last + timedelta(hours=1)) == []
    conn.execute("update bgjob_dead_job set fingerprint = 0 where job_id = 'a'")
    conn.execute("update bgjob_dead_job set fingerprint = -1 where job_id = 'b'")
    groups = client.dlq.groups()
    assert [g.fingerprint for g in groups[1:]] == ["ffffffffffffffff", "000000000000"]
    assert [client.dlq.purge(fingerprint=g.fingerprint) for g in groups] == [3, 1, 1]


def test_the_title_of_an_exception_group_has_a_leaf(client: Any) -> None:
    def fail(_: Job) -> None:
        raise ExceptionGroup("tasks", [OSError("gone 1"), OSError("gone 1"), KeyError("to")])

    kill(client, "t", "a", mux=Mux().register("t", fail, max_attempts=1))
    [group] = client.dlq.groups()
    assert group.title == "ExceptionGroup: tasks (0 sub-exceptions): OSError: gone 0"


def test_dead_jobs_are_chosen_by_group_by_number_and_up_to_a_number(client: Any) -> None:
    kill(client, "pay", *"abcdef")
    [group] = client.dlq.groups()
    numbers = {job.id: job.number for job in client.dlq.list()}
    up_to_c = client.dlq.list(upto=numbers["c"])
    assert [job.id for job in up_to_c] == ["c", "b", "a"]
    assert client.dlq.requeue(numbers=[numbers["b"], numbers["f"], 10**9]) == ["b", "f"]
    assert client.dlq.requeue(fingerprint=group.fingerprint, upto=numbers["c"]) == ["a", "c"]
    assert client.dlq.purge(fingerprint=group.fingerprint, numbers=[numbers["d"]]) == 1
    assert client.dlq.purge(fingerprint="0123456789ab") == 0
    assert client.dlq.list(numbers=[]) == []
    assert [job.id for job in client.dlq.list()] == ["e"]


@pytest.mark.parametrize("wrong", ["", "4f1c", "4F1C9A0E2B77", "0x4f1c9a0e2b", "a" * 17, 7])
def test_what_is_not_a_fingerprint_is_refused(client: Any, wrong: Any) -> None:
    with pytest.raises(ValueError, match="12 hexadecimal digits.*bgjob triage"):
        client.dlq.list(fingerprint=wrong)


# -- a canary ----------------------------------------------------------------------------


class Shop:
    """A worker of queue q whose jobs of type t end as they are told."""

    def __init__(self, dsn: str) -> None:
        self.mode = "dead"
        self.released = threading.Event()
        self._client = Client(dsn)
        mux = Mux().register("t", self.handle)
        # Only a notification wakes it.
        self.worker = Worker(self._client, "q", mux, poll_interval=NEVER, concurrency=4)

    def handle(self, _: Job) -> Result | None:
        match self.mode:
            case "dead":
                return MoveToDlq(f"server {threading.get_ident()} is away")
            case "dead otherwise":
                return MoveToDlq("another thing")
            case "failed":
                raise ConnectionError("not yet")
            case "the same":
                return Retry(NEVER, error="server 7 is away")
            case "rescheduled":
                return Reschedule(NEVER)
            case "hangs":
                assert self.released.wait(PATIENCE)
        return None


@pytest.fixture
def shop(dsn: str) -> Iterator[Shop]:
    shop = Shop(dsn)
    with shop._client, shop.worker:
        assert eventually(lambda: shop._client.workers())
        yield shop
        shop.released.set()


def test_a_canary_tells_how_it_ends(shop: Shop, client: Any, conn: psycopg.Connection) -> None:
    for n, mode in enumerate(["completed", "dead", "failed", "rescheduled"]):
        shop.mode = "dead"
        client.enqueue(EnqueueRequest("q", "t", id=f"old {mode}"))
        client.enqueue(EnqueueRequest("q", "t", id=mode, delay=0.001))
        assert eventually(lambda: {dead.id for dead in client.dlq.list()} >= {f"old {mode}", mode})
        [group] = client.dlq.groups()
        shop.mode = mode
        seen: list[Canary] = []
        canary = client.dlq.canary(group.fingerprint, wait=PATIENCE, progress=seen.append)
        assert (canary.verdict, canary.id, canary.queue, canary.type) == (mode, mode, "q", "t")
        assert canary.status == (0 if mode == "completed" else 3)
        assert seen[0].id == mode
        assert {each.verdict for each in seen} == {"undecided"}
        error = {"dead": "server", "failed": "ConnectionError: not yet\n  at test_triage.py:"}
        assert canary.error.startswith(error.get(mode, ""))
        again = client.dlq.get(mode)
        assert canary.number == (again and again.number)
        assert (count(conn), bool(again)) == (n - 1 if n > 1 else 0, mode == "dead")
        client.dlq.purge()


class SeenRunning(Exception):
    pass


def test_a_canary_that_runs_tells_its_worker(shop: Shop, client: Any) -> None:
    client.enqueue(EnqueueRequest("q", "t", id="a"))
    assert eventually(lambda: client.dlq.get("a"))
    shop.mode = "hangs"
    seen: list[Canary] = []

    def tell(canary: Canary) -> None:
        seen.append(canary)
        if canary.claimed is not None:
            raise SeenRunning

    with pytest.raises(SeenRunning):
        client.dlq.canary(client.dlq.get("a").fingerprint, wait=PATIENCE, progress=tell)
    [worker] = client.workers()
    assert [(each.worker, each.verdict) for each in seen] == [
        (None, "undecided"),
        (worker.number, "undecided"),
    ]


@pytest.mark.parametrize(("mode", "same"), [("failed", False), ("the same", True)])
def test_a_canary_with_one_try_is_dead_again_instead_of_retried(
    shop: Shop, client: Any, conn: psycopg.Connection, mode: str, same: bool
) -> None:
    client.enqueue(EnqueueRequest("q", "t", b"arg", id="a", exclusive="k", priority=3))
    assert eventually(lambda: client.dlq.get("a"))
    before = client.dlq.get("a")
    shop.mode = mode
    canary = client.dlq.canary(before.fingerprint, one_try=True)
    assert (canary.verdict, count(conn)) == ("failed", 0)
    [dead] = client.dlq.list()
    assert (dead.number, dead.last_error) == (canary.number, canary.error)
    assert (dead.attempt, dead.fingerprint == before.fingerprint) == (1, same)
    for name in ("arg", "exclusive", "priority", "created_at"):
        assert getattr(dead, name) == getattr(before, name)
    shop.mode = "completed"  # nothing holds its key
    assert client.dlq.canary(dead.fingerprint).verdict == "completed"


def test_a_canary_that_nothing_would_run_is_refused_unless_it_is_forced(
    client: Any, conn: psycopg.Connection, dsn: str
) -> None:
    kill(client, "t", "a", mux=Mux())
    [group] = client.dlq.groups()

    def refused(fingerprint: str = group.fingerprint) -> str:
        with pytest.raises(CanaryRefusedError) as caught:
            client.dlq.canary(fingerprint)
        assert len(client.dlq.list()) == 1
        return str(caught.value)

    assert "no live worker is known that claims from queue 'q'" in refused()
    with Client(dsn) as other, Worker(other, "q", MUX):
        assert eventually(lambda: client.workers())
        assert "none of the 1 live workers of queue 'q' has a handler for type 't'" in refused()
    client.pause("q")
    assert "queue 'q' is paused" in refused()
    assert "no dead job has the fingerprint '0123456789ab'" in refused("0123456789ab")
    canary = client.dlq.canary(group.fingerprint, wait=0, force=True)
    assert (canary.verdict, canary.status) == ("undecided", 4)
    assert (count(conn), client.dlq.list()) == (1, [])


def test_a_canary_is_a_job_whose_id_is_free_and_that_died_last(shop: Shop, client: Any) -> None:
    kill(client, "t", *"abc", mux=Mux().register("t", lambda _: MoveToDlq("why")), queue="other")
    kill(client, "t", "b", mux=Mux().register("t", lambda _: MoveToDlq("else")), queue="other")
    client.enqueue(EnqueueRequest("other", "t", id="c"))
    group = next(g for g in client.dlq.groups() if g.title == "why")
    canary = client.dlq.canary(group.fingerprint, wait=0, force=True)
    assert (canary.id, canary.verdict) == ("a", "undecided")


def test_a_dead_job_tells_the_worker_that_moved_it(shop: Shop, client: Any) -> None:
    client.enqueue(EnqueueRequest("q", "t", id="a"))
    kill(client, "t", "b", queue="other")
    assert eventually(lambda: client.dlq.get("a"))
    [worker] = client.workers()
    assert (client.dlq.get("a").worker, client.dlq.get("b").worker) == (worker.number, None)


def test_an_operator_tries_again_and_with_one_try_an_editor(
    shop: Shop, roles: Roles, conn: psycopg.Connection
) -> None:
    client = shop._client
    client.bulk_enqueue([EnqueueRequest("q", "t", id=id_) for id_ in "abc"])
    assert eventually(lambda: len(client.dlq.list()) == 3)
    shop.mode = "the same"
    with Client(roles.login("operator")) as operator:
        [group] = operator.dlq.groups()
        with pytest.raises(CanaryRefusedError, match="bgjob_editor"):
            operator.dlq.canary(group.fingerprint, one_try=True)
        assert operator.dlq.canary(group.fingerprint).verdict == "failed"
        assert operator.dlq.rest(group.fingerprint, upto=1, rate=None).moved == 1
    assert count(conn) == 2
    shop.mode = "dead"
    client.enqueue(EnqueueRequest("q", "t", id="d"))
    assert eventually(lambda: client.dlq.get("d"))
    shop.mode = "failed"
    with Client(roles.login("operator", "editor")) as both:
        fingerprint = both.dlq.list(limit=1)[0].fingerprint
        assert both.dlq.canary(fingerprint, one_try=True).number is not None


# -- the rest ----------------------------------------------------------------------------


GROUP = "00000000002a"


def bury(conn: psycopg.Connection, jobs: int, queue: str = "q") -> None:
    conn.execute(
        "insert into bgjob_dead_job (job_id, queue, type, attempt, last_error, priority, "
        "next_run_at, job_created_at, job_updated_at, fingerprint) "
        "select 'job ' || n, %s, 't', 1, 'why', 0, now(), now(), now(), 42 "
        "from generate_series(1, %s) n",
        [queue, jobs],
    )


def test_the_rest_goes_back_in_batches_those_first_that_died_first(
    shop: Shop, client: Any, conn: psycopg.Connection
) -> None:
    bury(conn, 250)
    bury(conn, 1)  # job 1 died twice
    conn.execute("update bgjob_dead_job set fingerprint = 7 where job_id = 'job 3'")
    client.enqueue(EnqueueRequest("other", "t", id="job 2"))
    shop.mode = "completed"
    seen: list[Rest] = []
    rest = client.dlq.rest(GROUP, rate=None, progress=seen.append)
    assert (rest.jobs, rest.moved, rest.left, rest.failed) == (250, 248, 1, 0)
    assert [each.moved for each in seen] == [9, 29, 69, 149, 248]
    assert (seen[-1], rest.status) == (rest, 0)
    assert [dead.id for dead in client.dlq.list()] == ["job 3", "job 2", "job 1"]
    assert eventually(lambda: rows(conn, "select id from bgjob_job") == [("job 2",)])
    assert client.dlq.rest("0123456789ab").jobs == 0


@pytest.mark.parametrize("mode", ["dead", "dead otherwise", "failed"])
def test_the_rest_stops_when_jobs_fail_again_and_goes_on_later(
    shop: Shop, client: Any, conn: psycopg.Connection, mode: str
) -> None:
    bury(conn, 150)
    last = client.dlq.list(limit=1)[0].number
    shop.mode = mode

    def wait(rest: Rest) -> None:
        failed = (
            "select (select count(*) from bgjob_job where attempt = 1 and token is null)"
            " + (select count(*) from bgjob_dead_job where fingerprint <> 42)"
        )
        assert eventually(lambda: rows(conn, failed) == [(rest.moved,)])

    rest = client.dlq.rest(GROUP, rate=1e6, stop_after=29, progress=wait)
    assert rest == Rest(GROUP, 150, 30, 0, 30, last, is_stopped=True)
    assert rest.status == 3
    shop.mode = "completed"
    rest = client.dlq.rest(GROUP, upto=rest.upto, rate=None, stop_after=None)
    assert (rest.jobs, rest.moved, rest.is_stopped) == (120, 120, False)


@pytest.mark.parametrize("upto", [None, 10**12])
def test_jobs_that_die_again_meanwhile_are_not_moved_again(
    shop: Shop, client: Any, upto: int | None
) -> None:
    shop.mode = "dead"
    client.bulk_enqueue([EnqueueRequest("q", "t") for _ in range(120)])
    assert eventually(lambda: len(client.dlq.list(limit=200)) == 120)
    [group] = client.dlq.groups()
    rest = client.dlq.rest(group.fingerprint, rate=1e6, stop_after=None, upto=upto)
    assert (rest.moved, rest.upto) == (120, group.number)
    assert eventually(lambda: len(client.dlq.list(limit=200)) == 120)
    rest = client.dlq.rest(group.fingerprint, upto=rest.upto)
    assert (rest.jobs, rest.moved) == (0, 0)


@pytest.mark.parametrize("wrong", [{"rate": 0}, {"rate": float("inf")}, {"stop_after": -1}])
def test_a_wrong_rate_or_brake_is_refused(client: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
        client.dlq.rest(GROUP, **wrong)
