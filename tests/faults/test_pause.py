"""A pause holds for every process: claims, deaths during it, and its end."""

from typing import Literal

import pytest
from support.waiting import eventually

from faults.world import World

Colour = Literal["thread", "async"]

both_colours = pytest.mark.parametrize("colour", ["thread", "async"])

SLOW_CLAIMS = """
    create function linger() returns trigger language plpgsql as
        'begin perform pg_sleep(0.02); return null; end';
    create trigger linger before update on bgjob_job for each statement execute function linger()
"""
"""Each claim looks for a pause 20 ms before it takes its jobs."""


def claims(world: World) -> dict[str, int | None]:
    """The live jobs, each with the token of its claim."""
    return dict(world.query("select id, token from bgjob_job"))


@both_colours
def test_no_process_claims_from_a_queue_once_its_pause_has_returned(
    world: World, colour: Colour
) -> None:
    world.query(SLOW_CLAIMS)
    workers = [world.start(colour=colour) for _ in range(2)]
    kept = 0
    for _ in range(6):
        world.enqueue_many("plain", 200, sleep=0.005, mute=True, ledger=False)
        enough = world.live() - 1
        assert eventually(lambda: world.live() <= enough)
        world.client.pause("q")
        before = claims(world)
        held = {id: token for id, token in before.items() if token is not None}
        while running := {id: token for id, token in claims(world).items() if token is not None}:
            assert running.items() <= held.items()
        after = claims(world)
        assert before.keys() - after.keys() <= held.keys()  # nor claimed, and done, between looks
        kept += len(after)
        world.enqueue_many("transactional", 1)
        world.client.resume("q")
    world.saw("jobs that a pause kept waiting", kept)
    world.done()
    for worker in workers:
        world.witness(worker, "completed")
    assert all(not worker.of("error", "lost") for worker in workers)


@both_colours
def test_jobs_in_flight_when_their_worker_was_killed_wait_for_the_end_of_the_pause(
    world: World, colour: Colour
) -> None:
    world.enqueue("plain", "a", hold="gate")
    first = world.start(colour=colour)
    first.wait_for("effect", "a")
    world.client.pause("q")
    second = world.start(colour=colour)
    world.enqueue("transactional", "b", "c")
    first.kill()
    freed = "select deaths from bgjob_job where id = 'a' and token is null"
    assert eventually(lambda: world.query(freed) == [(1,)])
    second.wait_for("empty")
    assert not second.of("started")
    assert set(claims(world).values()) == {None}
    world.release("gate", 1, 2)
    world.client.resume("q")
    world.done()
    world.witness(second, "completed", "a")


@both_colours
def test_a_pause_outlives_its_workers_and_ends_at_its_time(world: World, colour: Colour) -> None:
    world.enqueue("transactional", "a", "b")
    [[end]] = world.query("select now() + interval '2 s'")
    world.client.pause("q", end)
    first = world.start(colour=colour)
    first.wait_for("empty")
    first.terminate()
    assert first.wait() == 0
    second = world.start(colour=colour)
    world.done()
    world.witness(second, "completed", "a")
    assert not first.of("started")
    assert world.value("select min(at) >= %s from ledger", [end])
