"""What happens to `bgjob worker --processes`: to a child, and to the parent."""

import os
import re
import signal
import time
from pathlib import Path

import pytest
from support.waiting import PATIENCE, eventually

from faults.world import Process, World

WORKING = (
    "select distinct pid from ledger where kind in ('plain', 'transactional') and job_id = any(%s)"
)


def start(world: World, *args: str, processes: int = 2) -> Process:
    """Start a parent of worker processes; each runs one job at a time."""
    argv = ("-m", "bgjob", "worker", "faults.app:make", "--processes", str(processes), *args)
    return world.command(*argv, concurrency=1, lease=1.0)


def held(world: World, count: int, gate: str = "gate") -> tuple[list[str], list[int]]:
    """Return so many new jobs, each held in a child of its own, and the children's pids."""
    ids = [f"{len(world.jobs)}-{n}" for n in range(count)]
    world.enqueue("plain", *ids, hold=gate)
    assert eventually(lambda: len(world.query(WORKING, [ids])) == count), [
        process.output for process in world.processes
    ]
    return ids, [pid for (pid,) in world.query(WORKING, [ids])]


def started(parent: Process) -> list[int]:
    """Return the pids of all children so far."""
    return [int(pid) for pid in re.findall(r"process \d+: pid (\d+)", parent.output)]


def is_gone(pid: int) -> bool:
    """Whether there is no such process; a zombie without a waiting parent counts as gone."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_killed_child_is_started_again_and_its_job_done(world: World) -> None:
    parent = start(world)
    ids, pids = held(world, 2)
    os.kill(pids[0], signal.SIGKILL)
    world.saw("a child was killed", eventually(lambda: "was killed by SIGKILL" in parent.output))
    # The other still holds its job: only a new process can take the first again.
    assert eventually(lambda: len(world.query(WORKING, [ids])) == 3)
    world.release("gate", 1, 2)
    world.done()
    assert len({*pids} | {pid for (pid,) in world.query(WORKING, [ids])}) == 3


def test_a_child_that_is_asked_to_end_is_started_again(world: World) -> None:
    parent = start(world)
    ids, pids = held(world, 2)
    world.release("gate", 1)
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    world.done()
    assert eventually(lambda: parent.output.count("has ended with status 0") == 2)
    _, others = held(world, 2, "other")
    world.saw("two new processes work", not {*others} & {*pids})
    world.release("other", 1)
    world.done()


def test_no_orphan_is_left_when_the_parent_is_killed(world: World) -> None:
    parent = start(world, "--grace", "1000")
    ids, pids = held(world, 2)
    parent.must_end_well = False
    parent.signal(signal.SIGKILL)
    assert parent._popen.wait(PATIENCE) == -signal.SIGKILL
    assert eventually(lambda: parent.output.count("the parent process ends, shutting down") == 2)
    late = world.enqueue("plain")
    world.release("gate", 1)
    assert eventually(lambda: all(map(is_gone, pids)))
    # It was a shutdown: what ran is settled, and nothing else was begun.
    assert world.live(*ids) == 0
    world.saw("the children claimed nothing more", world.live(*late) == 1)
    other = world.start()
    world.done()
    world.witness(other, "completed", *late)


@pytest.mark.parametrize("target", ["faults.app:make", "hangs:make"])
def test_no_orphan_is_left_when_the_parent_is_killed_while_its_children_start(
    world: World, tmp_path: Path, target: str
) -> None:
    (tmp_path / "hangs.py").write_text(
        "import time\nprint('it hangs', flush=True)\ntime.sleep(3600)"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    argv = ("-m", "bgjob", "worker", target, "--processes", "2", "--grace", "1000")
    parent = world.command(*argv, env={"PYTHONPATH": path})
    parent.must_end_well = False
    assert eventually(lambda: len(started(parent)) == 2)
    if target == "hangs:make":
        assert eventually(lambda: parent.output.count("it hangs") == 2)
    parent.signal(signal.SIGKILL)
    assert parent._popen.wait(PATIENCE) == -signal.SIGKILL
    gone = eventually(lambda: all(map(is_gone, started(parent))))
    world.saw("the children have gone", gone)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_terminated_parent_waits_until_its_children_have_finished_their_jobs(
    world: World, signum: signal.Signals
) -> None:
    parent = start(world, "--grace", "1000")
    ids, pids = held(world, 2)
    parent.signal(signum)
    assert eventually(lambda: parent.output.count("the parent process ends, shutting down") == 2)
    late = world.enqueue("plain")
    world.release("gate", 1)
    assert parent.wait() == 0, parent.output
    assert all(map(is_gone, pids))
    assert world.live(*ids) == 0
    world.saw("the children claimed nothing more", world.live(*late) == 1)
    other = world.start()
    world.done()
    world.witness(other, "completed", *late)


def test_a_signal_to_all_processes_counts_once(world: World) -> None:
    # As a terminal's Ctrl-C, and systemd's KillMode=control-group.
    parent = start(world, "--grace", "1000")
    ids, pids = held(world, 2)
    for pid in [*pids, parent.pid]:
        os.kill(pid, signal.SIGTERM)
    assert eventually(lambda: parent.output.count("shutting down") == 3)
    world.release("gate", 1)
    assert parent.wait() == 0, parent.output
    world.saw("both finished what they ran", world.live(*ids) == 0)


def test_a_signal_that_follows_the_parents_counts_as_the_same(world: World) -> None:
    parent = start(world, "--grace", "1000")
    ids, pids = held(world, 2)
    parent.signal(signal.SIGTERM)
    assert eventually(lambda: parent.output.count("the parent process ends, shutting down") == 2)
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    world.release("gate", 1)
    assert parent.wait() == 0, parent.output
    world.saw("both finished what they ran", world.live(*ids) == 0)


BLOCKED = """
import runpy, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
sys.argv[0] = "bgjob"
runpy.run_module("bgjob", run_name="__main__", alter_sys=True)
"""


def test_a_parent_that_no_signal_tells_of_its_childrens_end_ends_all_the_same(world: World) -> None:
    # A signal that comes just before the parent waits is handled when it has waited.
    argv = ("worker", "faults.app:make", "--processes", "2", "--grace", "1000")
    parent = world.command("-c", BLOCKED, *argv, concurrency=1, lease=1.0)
    ids, _ = held(world, 2)
    parent.signal(signal.SIGTERM)
    assert eventually(lambda: parent.output.count("the parent process ends, shutting down") == 2)
    world.release("gate", 1)
    assert parent.wait() == 0, parent.output
    world.saw("both finished what they ran", world.live(*ids) == 0)


def test_a_second_signal_ends_all_processes_immediately(world: World) -> None:
    parent = start(world, "--grace", "1000")
    ids, pids = held(world, 2)
    parent.must_end_well = False
    parent.signal(signal.SIGTERM)
    assert eventually(lambda: parent.output.count("the parent process ends, shutting down") == 2)
    parent.signal(signal.SIGINT)
    assert parent.wait() == 128 + signal.SIGINT
    assert eventually(lambda: all(map(is_gone, pids)))
    world.saw("what ran is left to its lease", world.live(*ids) == 2)
    world.release("gate", 2)
    world.start()
    world.done()


def test_a_child_that_does_not_end_is_killed_after_the_grace_period_and_2_s(world: World) -> None:
    parent = start(world, "--grace", "0.5")
    ids, pids = held(world, 2)
    os.kill(pids[0], signal.SIGSTOP)
    began = time.monotonic()
    parent.terminate()
    assert parent.wait() == 0, parent.output
    assert time.monotonic() - began >= 2.5
    assert all(map(is_gone, pids))
    world.saw("it was killed", "does not end, and is killed" in parent.output)
    world.release("gate", 1)  # the other one's attempt was given back
    world.release("gate", 2)
    world.start()
    world.done()


def test_children_that_die_too_often_end_the_others_and_the_parent(world: World) -> None:
    parent = start(world, "--grace", "1000")
    parent.must_end_well = False
    [kept], [keeper] = held(world, 1)
    world.release("gate", 1)  # it is to be finished, whenever it comes to that
    killed: set[int] = set()
    deadline = time.monotonic() + PATIENCE
    while parent.alive and time.monotonic() < deadline:
        for pid in {*started(parent)} - killed - {keeper}:
            killed.add(pid)
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    assert parent.wait() == 1, parent.output
    assert len(killed) == 6
    told = "bgjob: 6 processes died within 10 s; bgjob starts no more\n"
    world.saw("too many died", told in parent.output)
    pauses = [float(n) for n in re.findall(r"is started again after (\S+) s", parent.output)]
    assert pauses == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2]
    assert is_gone(keeper)
    assert world.live(kept) == 0


def test_a_target_that_cannot_be_served_is_reported_and_ends_the_parent(world: World) -> None:
    argv = ("-m", "bgjob", "worker", "faults.app:missing", "--processes", "6")
    parent = world.command(*argv)
    parent.must_end_well = False
    assert parent.wait() == 1
    assert "bgjob: there is no 'missing' in faults.app\n" in parent.output
    world.saw("too many died", "bgjob starts no more" in parent.output)
