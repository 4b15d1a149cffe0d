"""Fault 63: a rolling deploy, in which old workers claim jobs of a type that only new ones know."""

import pytest

from faults.app import Colour
from faults.world import World

OLD = "transactional"  # the type that the old workers do not know


@pytest.mark.parametrize("colour", ["thread", "async"])
def test_a_rolling_deploy_buries_no_job_of_a_type_that_old_workers_do_not_know(
    world: World, colour: Colour
) -> None:
    old = [world.start(colour=colour, without=OLD, unknown_for=60.0) for _ in range(2)]
    new_jobs = [f"new-{n}" for n in range(20)]
    for id_ in new_jobs:
        world.enqueue("transactional", id_)
    for worker in old:
        worker.wait_for("rescheduled")
    # Jobs that they know go on meanwhile.
    for n in range(20):
        world.enqueue("plain", f"old-{n}")
    world.done(*(f"old-{n}" for n in range(20)))
    old[0].kill()
    world.start(colour=colour, unknown_for=60.0)
    old[1].terminate()
    world.done()
    assert world.query("select count(*) from bgjob_dead_job") == [(0,)]
    # Those that the killed one held were charged for its death.
    attempts = world.query("select max(attempt) from ledger where kind = 'transactional'")
    assert attempts[0][0] <= 2
    assert all(world.rows(id_, "transactional") == 1 for id_ in new_jobs)
    world.saw("jobs of unknown types were put back", old[1].heard("rescheduled"))
