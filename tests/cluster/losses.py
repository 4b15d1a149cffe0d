"""What asynchronous replication may lose, decided for each commit by its place in the log.

The last primary's log is one history, and each commit before the place where a primary was
followed by the next is part of it. In that history all is as on one server: a job is there from its
enqueue to its end, and what a transactional handler wrote is there if the job ended, once. What
lies beside it are the acknowledgements of commits that it lacks: of enqueues, and of what an
ordinary handler wrote on a connection of its own.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

import psycopg

from bgjob import EnqueueRequest
from faults.places import Place, Timelines
from faults.world import World

_FOUND = """
    select 'live', id, 0, 1 from bgjob_job
    union all select 'dead', job_id, 0, 1 from bgjob_dead_job
    union all select 'ended', job_id, attempt, 1 from bgjob_history
    union all select kind, job_id, attempt, count(*) from ledger group by kind, job_id, attempt
"""


class Losses:
    """What was acknowledged, and what the last primary has of it.

    Args:
        world: whose workers keep completed jobs, and tell of the places of their commits.
        acknowledged: where each job's enqueue was acknowledged.

    Attributes:
        timelines: those of the last primary.
        jobs: the jobs that are gone, with their places.
        effects: rows of ordinary handlers that are gone, with their places.

    """

    def __init__(self, world: World, acknowledged: Mapping[str, Place]) -> None:
        with psycopg.connect(world.dsn) as conn:
            self.timelines = Timelines(conn)
            found = conn.execute(_FOUND).fetchall()
        self._world = world
        self._acknowledged = acknowledged
        self._live = {id for what, id, _, _ in found if what == "live"}
        self._dead = {id for what, id, _, _ in found if what == "dead"}
        self._ended: dict[str, list[int]] = defaultdict(list)
        self._rows: Counter[tuple[str, int]] = Counter()
        """By job and attempt, those of reschedules among them."""
        self.runs: Counter[str] = Counter()
        """The others by job."""
        for what, id, attempt, count in found:
            if what == "ended":
                self._ended[id].append(attempt)
            elif what not in ("live", "dead"):
                self._rows[id, attempt] += count
                self.runs[id] += count if what != "rescheduled" else 0
        self._written = self._told("written")
        self._enqueued = self._told("enqueued")
        self.jobs: dict[str, Place] = {}
        self.effects: dict[tuple[str, int], Place] = {}

    def _told(self, name: str) -> Mapping[tuple[str, int], list[Place]]:
        told = defaultdict(list)
        for process in self._world.processes:
            for _, id, attempt, *at in process.of(name):
                told[id, attempt].append(Place(*at))
        return told

    def judge(self) -> list[str]:
        """Find what is gone, and return what of it was committed before the end of a timeline."""
        has, wrong = self.timelines.has, list[str]()
        for job in self._world.jobs.values():
            at = self._acknowledged[job.id]
            if not self._is_there(job.id):
                self.jobs[job.id] = at
                if has(at):
                    wrong.append(f"{job} is gone, which was acknowledged at {at}")
            if job.type == "transactional":
                ends = len(self._ended[job.id])
                if job.arg.get("then") != "dlq" and self.runs[job.id] != ends:
                    wrong.append(f"{job} ended {ends} times, with {self.runs[job.id]} effects")
                if ends > 1:
                    wrong.append(f"{job} ended {ends} times")
            elif children := self._world.children(job.id):
                wrong += self._missing_children(job.id, children)
        for (id, attempt), places in self._written.items():
            # A lost attempt is made again, with the same number.
            kept = sum(map(has, places))
            if self._rows[id, attempt] < kept:
                wrong.append(f"a row of {id}, attempt {attempt} is gone: {places}")
            elif self._rows[id, attempt] < len(places):
                self.effects[id, attempt] = next(each for each in places if not has(each))
        for id, attempts in self._ended.items():
            wrong += [
                f"attempt {attempt} of {id} has ended, of which no worker tells a row"
                for attempt in attempts
                if not self._rows[id, attempt] and not self._written[id, attempt]
            ]
        return wrong

    def _is_there(self, id: str) -> bool:
        return id in self._live or id in self._dead or bool(self._ended[id])

    def _missing_children(self, id: str, children: list[str]) -> list[str]:
        wrong = []
        missing = [child for child in children if not self._is_there(child)]
        for attempt in self._ended[id] if missing else ():
            places = self._enqueued[id, attempt]
            if not places or any(map(self.timelines.has, places)):
                wrong.append(
                    f"{missing} are gone, which {id}, attempt {attempt}, enqueued: {places}"
                )
            self.jobs.update((child, places[0]) for child in missing if places)
        return wrong

    def again(self) -> list[EnqueueRequest]:
        """What to enqueue again: what is gone, and what ended with a row that is gone."""
        requests = []
        for job in self._world.jobs.values():
            if not self._is_done(job.id):
                requests.append(EnqueueRequest("q", job.type, job.arg or None, id=job.id))
            else:
                requests += [
                    EnqueueRequest("q", "plain", id=child)
                    for child in self._world.children(job.id)
                    if not self._is_done(child)
                ]
        return requests

    def _is_done(self, id: str) -> bool:
        return id in self._live or id in self._dead or self.runs[id] > 0
