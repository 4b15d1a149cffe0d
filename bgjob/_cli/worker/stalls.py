"""Notices that a queue stands still: its jobs are due, its slots are free, nothing is claimed.

For `--live-within`. The database is asked, over a connection of its own, only where nothing was
claimed for so long. What cannot be asked is no stall: a restart mends no database.
"""

import threading
from collections.abc import Mapping
from time import monotonic
from typing import Protocol

import psycopg

from bgjob._logger import log as _log
from bgjob._postgres.connection import Connection, ConnectionParameters, options
from bgjob._sql.execute import run
from bgjob._sql.overviews import overview
from bgjob._sql.server import bounds
from bgjob.workers import QueueHealth, WorkerHealth

_PATIENCE = 10.0
_LONGEST = 15.0
"""Seconds between two looks, at most."""


class _Group(Protocol):
    @property
    def connection_parameters(self) -> ConnectionParameters: ...
    def health(self) -> WorkerHealth: ...


class Stalls:
    """Looks for queues that stand still, on a thread of its own.

    Args:
        within: seconds for which a queue may claim nothing while jobs are due.
        group: the worker.

    """

    def __init__(self, within: float, group: _Group) -> None:
        self.queues: Mapping[str, float] = {}
        """Those that stand still, with the seconds for which their oldest job has been due."""
        self._within = within
        self._group = group
        self._began_at = monotonic()
        threading.Thread(target=self._run, name="bgjob-stalls", daemon=True).start()

    def _run(self) -> None:
        pause = threading.Event()
        while not self._group.health().has_ended:
            pause.wait(min(self._within / 4, _LONGEST))
            health = self._group.health()
            idle = [name for name, queue in health.queues.items() if self._is_idle(queue)]
            try:
                self.queues = self._ask(idle) if idle and health.is_ready else {}
            except psycopg.Error as error:
                self.queues = {}
                _log.warning("cannot ask whether jobs are due: %s", error)

    def _is_idle(self, queue: QueueHealth) -> bool:
        since = monotonic() - self._began_at
        quiet = since if queue.claimed is None else min(queue.claimed, since)
        return queue.busy < queue.slots and quiet > self._within

    def _ask(self, queues: list[str]) -> Mapping[str, float]:
        found = {}
        with Connection.connect(
            **options(self._group.connection_parameters, within=_PATIENCE), autocommit=True
        ) as connection:
            connection.patience = _PATIENCE
            for name in queues:
                with connection.transaction():
                    run(connection, bounds("bgjob worker"))
                    seen = run(connection, overview(name, cap=1)).queues
                for queue in seen:
                    age = queue.oldest_due_age
                    if not queue.is_paused and age is not None and age > self._within:
                        found[name] = age
        return found
