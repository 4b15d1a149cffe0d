"""Fault 64: jobs expire while their workers are killed, stopped, or busy."""

import pytest

from faults.app import Colour
from faults.world import World


@pytest.mark.parametrize("type", ["plain", "transactional"])
@pytest.mark.parametrize("colour", ["thread", "async"])
def test_a_job_that_expired_while_its_worker_was_killed_or_stopped_is_not_run_again(
    world: World, type: str, colour: Colour
) -> None:
    """The first run of each was in time; its repetition would not be."""
    for id_ in ("killed", "stopped"):
        world.enqueue(type, id_, hold="gate")
    killed, stopped = (world.start(colour=colour, concurrency=1) for _ in range(2))
    killed.wait_for("effect")
    stopped.wait_for("effect")
    killed.kill()
    stopped.stop()
    world.query("update bgjob_job set expires = clock_timestamp()")
    other = world.start(colour=colour)
    for id_ in ("killed", "stopped"):
        other.wait_for("dead", id_)
    world.release("gate", 1)
    stopped.cont()
    world.enqueue(type, "next")
    world.done("next")
    world.saw("JobExpiredError", all("JobExpired" in event[3] for event in other.of("dead")))
    dead = world.query("select job_id, attempt from bgjob_dead_job order by job_id")
    assert dead == [("killed", 2), ("stopped", 2)]
    # At most the first run of each had its effect; of a transactional job not even that.
    assert all(world.rows(id_, type) <= (type == "plain") for id_ in ("killed", "stopped"))
