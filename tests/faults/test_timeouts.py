"""Fault 13: a handler that never returns. Its timeout tells of it, and other slots go on."""

from typing import Literal

import pytest

from faults.world import Process, World

Colour = Literal["thread", "async"]

# A thread is replaced, a coroutine is cancelled.
pytestmark = pytest.mark.both_colours

each_colour = pytest.mark.parametrize("colour", ["thread", "async"])
each_type = pytest.mark.parametrize("type", ["plain", "transactional"])

TIMEOUT = 0.5


LEASE = 10.0
"""Seconds, of each world here: no busy host takes it away, and what runs again is owed to its timeout."""


def start(world: World, colour: Colour = "thread", concurrency: int = 2) -> Process:
    return world.start(colour=colour, concurrency=concurrency, timeout=TIMEOUT)


@each_colour
@each_type
def test_13_a_handler_that_never_returns_is_reported_and_other_slots_go_on(
    world: World, colour: Colour, type: str
) -> None:
    worker = start(world, colour)
    world.enqueue(type, "hangs", hold="gate")
    worker.wait_for("effect", "hangs")
    world.enqueue_many(type, 20)
    world.done(*[id for id in world.jobs if id != "hangs"])
    world.witness(worker, "timed_out", "hangs")
    # It hangs again, in another slot, and is reported again.
    world.witness(worker, "timed_out", "hangs", times=2)
    worker.wait_for("retried", "hangs", times=2)
    told = [event[0] for event in worker.of("timed_out", "retried") if event[1] == "hangs"]
    assert told[:4] == ["timed_out", "retried"] * 2
    world.release("gate", *range(1, 100))
    world.done()
    worker.wait_for("completed", "hangs")
    assert not worker.of("lost", "error")


@each_type
def test_13_jobs_that_hang_in_all_slots_and_their_replacements_leave_the_queue_to_others(
    world: World, type: str
) -> None:
    first = start(world)
    world.enqueue(type, *[f"hangs{n}" for n in range(4)], hold="gate")
    # Two in its slots, and two in those that take their place; who is retried comes after them.
    first.wait_for("timed_out", times=4)
    assert {event[2] for event in first.of("timed_out")} == {1}
    second = start(world, concurrency=8)
    world.enqueue_many(type, 50)
    world.release("gate", *range(2, 100))
    world.done()
    second.wait_for("completed", times=50)  # its events may come later than its settlements
    assert not first.of("completed")
    # It works again as soon as its threads do, which hang in their first attempts.
    world.release("gate", 1)
    second.terminate()
    assert second.wait() == 0
    world.enqueue(type, "last")
    world.witness(first, "completed", "last")
    assert not first.of("lost", "error")


@each_colour
@each_type
def test_13_a_worker_that_is_killed_with_jobs_that_hang_loses_none_of_them(
    world: World, colour: Colour, type: str
) -> None:
    world.lease = 1.0
    first = start(world, colour)
    world.enqueue(type, *[f"hangs{n}" for n in range(2)], hold="gate")
    world.witness(first, "timed_out")
    first.kill()
    second = start(world, colour)
    world.release("gate", *range(2, 100))
    world.done()
    for n in range(2):
        second.wait_for("completed", f"hangs{n}")


@each_colour
@each_type
def test_13_a_worker_with_jobs_that_hang_ends_when_it_is_terminated(
    world: World, colour: Colour, type: str
) -> None:
    worker = start(world, colour)
    world.enqueue(type, "hangs", hold="gate")
    world.witness(worker, "timed_out", "hangs")
    worker.terminate()
    assert worker.wait() == 0
    assert worker.of("stopped") == [("stopped", True)]
    start(world, colour)
    world.release("gate", *range(1, 100))
    world.done()
