"""The conditions that must hold after every fault; see the five parts."""

import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from faults.world import Acknowledged, World

_SLACK = 5.0
"""Seconds that a busy host may add to a poll interval."""

_PATIENCE = 20.0
"""Seconds for the server to notice that a session's other end is gone."""

_SHOWN = 10


def check_claims(world: "World") -> None:
    """Part 3, while workers run: no claim is older than lease + poll interval."""
    if not world.is_working:
        return
    old = (
        "select id, type, attempt, lease_until, clock_timestamp() from bgjob_job "
        "where lease_until < clock_timestamp() - make_interval(secs => %s)"
    )
    # A fault may have ended only now: the workers have one interval from here.
    deadline = time.monotonic() + world.poll_interval + _SLACK
    while left := world.query(old, [world.poll_interval]):
        assert time.monotonic() < deadline, f"claims outlived lease + poll interval: {left}"
        time.sleep(0.05)


def check(world: "World") -> None:
    """Parts 1, 2, 4 and 5, when the workers were shut down."""
    _check_sessions(world)
    _check_tasks(world)
    _check_jobs(world)
    assert world.named, "the test named no error or event: world.saw() or world.witness()"


def _check_sessions(world: "World") -> None:
    """Part 4: no transaction of the library is open, and no advisory lock is left."""
    transactions = (
        "select pid, application_name, state, query from pg_stat_activity "
        "where datname = current_database() and pid <> pg_backend_pid() "
        "and backend_type = 'client backend' and xact_start is not null"
    )
    locks = (
        "select pid, mode, classid, objid from pg_locks where locktype = 'advisory' "
        "and database = (select oid from pg_database where datname = current_database())"
    )
    deadline = time.monotonic() + _PATIENCE
    for what, query in (("transactions are open", transactions), ("locks are left", locks)):
        while left := world.query(query):
            assert time.monotonic() < deadline, f"{what}: {left}"
            time.sleep(0.05)


def _check_jobs(world: "World") -> None:
    """Part 1: nothing is lost. Part 2: as many effects as there must be."""
    # One statement, one snapshot.
    found = world.query(
        "select 'live', id, '', 1 from bgjob_job "
        "union all select 'dead', job_id, '', count(*) from bgjob_dead_job group by job_id "
        "union all select 'row', job_id, kind, count(*) from ledger group by job_id, kind"
    )
    live = {id for where, id, _, _ in found if where == "live"}
    dead = {id for where, id, _, _ in found if where == "dead"}
    rows = {(id, kind): count for where, id, kind, count in found if where == "row"}

    ended = _ended(world)
    lost: list[str] = []
    wrong: list[str] = []
    for job in world.jobs.values():
        effects = rows.get((job.id, job.type), 0)
        is_done = bool(effects) if job.ledger else job.id in ended
        if job.id not in live and job.id not in dead and not is_done:
            lost.append(f"{job.id} ({job.type} {job.arg})")
        elif job.type == "transactional" and job.ledger:
            wrong += _wrong_effects(job, job.id in live, job.id in dead, rows)
        # A plain handler may have ended between its row and its children.
        is_whole = job.type == "transactional" or not (job.id in live or job.id in dead)
        for child in world.children(job.id):
            exists = child in live or child in dead or (child, "plain") in rows
            if effects and is_whole and not exists:
                lost.append(f"{child} (a child)")
            elif exists and not effects and job.type == "transactional":
                wrong.append(f"{child} exists, whose parent's transaction did not commit")
    assert not lost, f"{len(lost)} jobs are lost: {lost[:_SHOWN]}"
    assert not wrong, f"{len(wrong)} wrong effects: {wrong[:_SHOWN]}"


def _ended(world: "World") -> set[str]:
    """The jobs whose end a worker or the test reported.

    A worker that was killed may have settled jobs without reporting it: of its jobs the
    start counts.
    """
    ended = set(world.ended)
    for worker in (*world.processes, *world.locals):
        # A child that a worker process has forked, and one that was ended, cannot tell.
        names = ("completed",) if worker.ended_well else ("started", "completed")
        ended.update(event[1] for event in worker.of(*names))
    return ended


def _wrong_effects(
    job: "Acknowledged", is_live: bool, is_dead: bool, rows: dict[tuple[str, str], int]
) -> list[str]:
    """What is wrong with the ledger rows of a transactional job."""
    effects = rows.get((job.id, job.type), 0)
    dead_letters_itself = job.arg.get("then") == "dlq"
    expected = 0 if is_live or (is_dead and not dead_letters_itself) else 1
    wrong = []
    if effects != expected:
        where = "live" if is_live else "dead" if is_dead else "done"
        wrong.append(f"{job.id} {job.arg} is {where} and has {effects} ledger rows")
    wanted = job.arg.get("times", 1) if job.arg.get("then") == "reschedule" else 0
    rescheduled = rows.get((job.id, "rescheduled"), 0)
    if rescheduled > wanted or (expected and rescheduled < wanted):
        wrong.append(f"{job.id} {job.arg} has {rescheduled} rows of reschedules, not {wanted}")
    return wrong


def _check_tasks(world: "World") -> None:
    """Part 4: no task is left."""
    deadline = time.monotonic() + _PATIENCE
    while left := world.tasks:
        assert time.monotonic() < deadline, f"tasks are left: {left}"
        time.sleep(0.02)


def check_threads(world: "World") -> None:
    """Part 4: no thread is left."""
    deadline = time.monotonic() + _PATIENCE
    while left := set(threading.enumerate()) - world.threads:
        assert time.monotonic() < deadline, f"threads are left: {left}"
        time.sleep(0.02)
