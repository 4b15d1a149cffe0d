"""Fault 69: results that are kept, and the ids that they take, while answers and processes die."""

import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import psycopg
import pytest
from support.waiting import PATIENCE, eventually

from bgjob import AsyncClient, Client, EnqueueRequest, JobAlreadyExistsError
from faults.app import Colour
from faults.proxy import Proxy
from faults.world import World

HOUR = 3600.0
LONG = 30.0

both_colours = pytest.mark.parametrize("colour", ["thread", "async"])


def enqueue(world: World, *ids: str, type: str = "plain", **arg: Any) -> None:
    world.client.bulk_enqueue(
        [EnqueueRequest("q", type, arg or None, id=id_, keep=HOUR) for id_ in ids]
    )
    world.acknowledge(*ids, type=type, **arg)


def outcomes(world: World) -> list[tuple[str, bytes | None, str | None, int]]:
    """The results that are kept, by id."""
    return world.query(
        "select id, value, error, attempt from bgjob_result where until is not null order by id"
    )


@pytest.mark.parametrize("how", ["enqueue", "bulk_enqueue"])
@pytest.mark.parametrize("is_async", [False, True], ids=["Client", "AsyncClient"])
def test_an_enqueue_whose_answer_was_lost_and_that_is_repeated_after_its_job_has_run_is_refused(
    proxy: Proxy, world: World, is_async: bool, how: str
) -> None:
    dsn = proxy.dsn(world.dsn)
    client: Any = AsyncClient(dsn) if is_async else Client(dsn)
    request = EnqueueRequest("q", "plain", id="a", keep=HOUR)
    with ExitStack() as stack:
        stack.callback(lambda: world.answer(client.close()))
        cut = proxy.cut_after_commit("insert into bgjob_job")
        with pytest.raises(psycopg.OperationalError) as lost:
            world.answer(
                client.enqueue(request) if how == "enqueue" else client.bulk_enqueue([request])
            )
        world.saw(str(lost.value))
        assert cut.wait(PATIENCE)
        world.acknowledge("a")
        world.start()
        assert eventually(lambda: world.live("a") == 0)
        for _ in range(2):
            with pytest.raises(JobAlreadyExistsError) as taken:
                world.answer(client.enqueue(request))
            assert taken.value.ids == ("a",)
            assert world.answer(client.bulk_enqueue([request], on_conflict="skip")) == [None]
        assert world.answer(client.wait("a", timeout=PATIENCE)) == {"attempt": 1}
    world.done()
    assert world.rows("a") == 1


@pytest.mark.every_combination
@both_colours
@pytest.mark.parametrize("moment", ["after", "before"])
@pytest.mark.parametrize("then", ["complete", "dlq"])
def test_a_settlement_whose_answer_was_lost_keeps_one_result(
    proxy: Proxy, world: World, colour: Colour, moment: str, then: str
) -> None:
    enqueue(world, "a", hold="gate", then=then, until=2)
    worker = world.start(colour=colour, dsn=proxy.dsn(world.dsn), lease=LONG)
    worker.wait_for("effect", "a")
    cut = (proxy.cut_after_commit if moment == "after" else proxy.cut_before_commit)(
        "insert into bgjob_result"
    )
    world.release("gate", 1)
    assert cut.wait(PATIENCE)
    world.done()
    world.witness(worker, "dead" if then == "dlq" else "completed", "a")
    world.witness(worker, "error")
    [(id_, value, error, attempt)] = outcomes(world)
    assert (id_, attempt, world.rows("a")) == ("a", 1, 1)
    assert value == (b'{"attempt":1}' if then == "complete" else None)
    assert error == (None if then == "complete" else "the handler gives up")


@both_colours
@pytest.mark.parametrize("type", ["plain", "transactional"])
def test_a_worker_that_is_killed_at_a_settlement_leaves_both_the_job_and_no_result_or_neither(
    proxy: Proxy, world: World, colour: Colour, type: str
) -> None:
    # One is killed when its settlement was committed, and knows nothing of it; one before that.
    for moment in ("after", "before"):
        enqueue(world, moment, type=type, hold=moment)
        victim = world.start(colour=colour, concurrency=1, dsn=proxy.dsn(world.dsn))
        victim.must_end_well = False
        victim.wait_for("effect", moment)
        cut = (proxy.cut_after_commit if moment == "after" else proxy.cut_before_commit)(
            "insert into bgjob_result"
        )
        world.release(moment, 1)
        assert cut.wait(PATIENCE)
        victim.signal(signal.SIGKILL)
        victim.wait(PATIENCE)
        has_result = moment in {id_ for id_, *_ in outcomes(world)}
        world.saw("the job or the result", has_result != (world.live(moment) == 1))
    world.release("before", 2)
    world.release("after", 2)
    other = world.start(colour=colour)
    world.done()
    for id_ in ("after", "before"):
        assert world.client.wait(id_, timeout=PATIENCE)["attempt"] in (1, 2)
    assert len(outcomes(world)) == 2
    assert other.runs
    if type == "transactional":
        assert [world.rows(id_, type) for id_ in ("after", "before")] == [1, 1]


def test_waiters_outlive_a_restart_of_the_server(hurt: World, server: Any) -> None:
    enqueue(hurt, "a", hold="gate")
    worker = hurt.start(lease=LONG)
    worker.wait_for("effect", "a")

    async def wait() -> Any:
        async with AsyncClient(hurt.dsn) as client:
            return await client.wait("a", timeout=PATIENCE)

    with ThreadPoolExecutor() as threads:
        plain = threads.submit(hurt.client.wait, "a", timeout=PATIENCE)
        waiting = threads.submit(hurt.run, wait())
        assert eventually(
            lambda: (
                hurt.value(
                    "select count(*) from pg_stat_activity where application_name = 'bgjob results' "
                    "and state = 'idle' and query ~ 'bgjob_result r'"
                )
                == 2
            )
        )
        server.restart()
        hurt.release("gate", 1, 2)  # the handler's own connection was lost, too
        assert plain.result() == waiting.result() != {"attempt": 0}
    hurt.done()
    hurt.witness(worker, "error")
