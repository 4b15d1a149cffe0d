"""Background jobs on PostgreSQL: no other server, no lost job.

A module is imported when a program first asks for a name of it: one that only enqueues loads no
worker, and none loads what answers questions that it does not ask.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bgjob._worker.observers import only
    from bgjob.client import AsyncClient, Client
    from bgjob.codec import Codec, JsonCodec, RawCodec
    from bgjob.dlq import DlqRetention
    from bgjob.errors import (
        BgjobError,
        CanaryRefusedError,
        ClientClosedError,
        EmptyQueueError,
        EnqueueConflictError,
        JobAlreadyExistsError,
        JobExpiredError,
        JobFailedError,
        JobTimeoutError,
        LeaseLostError,
        LoopBlockedError,
        PayloadError,
        PoolerError,
        QueueRequiredError,
        RequestsRequiredError,
        ScheduleError,
        SchemaError,
        StateRequiredError,
        TypeRequiredError,
        UnknownResultError,
        UnknownScheduleError,
        UnknownTypeError,
    )
    from bgjob.event import (
        Event,
        JobCancelled,
        JobCompleted,
        JobLeaseLost,
        JobMovedToDlq,
        JobRescheduled,
        JobStarted,
        JobTimedOut,
        JobWillBeRetried,
        QueueIsEmpty,
        WorkerError,
    )
    from bgjob.job import DeadJob, EnqueueRequest, Job, JobResult, PastJob
    from bgjob.limit import Limit, LimitStatus
    from bgjob.minutes import Minutes
    from bgjob.mux import Mux
    from bgjob.observer import LoggingObserver, NoopObserver, Observer
    from bgjob.result import Backoff, Complete, MoveToDlq, Reschedule, Result, Retry
    from bgjob.schedule import Schedule, ScheduleStatus
    from bgjob.schedules import Schedules
    from bgjob.stats import (
        CappedCount,
        MinuteCounts,
        MinuteReport,
        MinuteSeries,
        Overview,
        QueueOverview,
        QueueStats,
    )
    from bgjob.worker import AsyncWorker, Worker
    from bgjob.workers import RunningJob, WorkerCounts, WorkerStatus
__version__ = "0.1.0"

__all__ = [
    "AsyncClient",
    "AsyncWorker",
    "Backoff",
    "BgjobError",
    "CanaryRefusedError",
    "CappedCount",
    "Client",
    "ClientClosedError",
    "Codec",
    "Complete",
    "DeadJob",
    "DlqRetention",
    "EmptyQueueError",
    "EnqueueConflictError",
    "EnqueueRequest",
    "Event",
    "Job",
    "JobAlreadyExistsError",
    "JobCancelled",
    "JobCompleted",
    "JobExpiredError",
    "JobFailedError",
    "JobLeaseLost",
    "JobMovedToDlq",
    "JobRescheduled",
    "JobResult",
    "JobStarted",
    "JobTimedOut",
    "JobTimeoutError",
    "JobWillBeRetried",
    "JsonCodec",
    "LeaseLostError",
    "Limit",
    "LimitStatus",
    "LoggingObserver",
    "LoopBlockedError",
    "MinuteCounts",
    "MinuteReport",
    "MinuteSeries",
    "Minutes",
    "MoveToDlq",
    "Mux",
    "NoopObserver",
    "Observer",
    "Overview",
    "PastJob",
    "PayloadError",
    "PoolerError",
    "QueueIsEmpty",
    "QueueOverview",
    "QueueRequiredError",
    "QueueStats",
    "RawCodec",
    "RequestsRequiredError",
    "Reschedule",
    "Result",
    "Retry",
    "RunningJob",
    "Schedule",
    "ScheduleError",
    "ScheduleStatus",
    "Schedules",
    "SchemaError",
    "StateRequiredError",
    "TypeRequiredError",
    "UnknownResultError",
    "UnknownScheduleError",
    "UnknownTypeError",
    "Worker",
    "WorkerCounts",
    "WorkerError",
    "WorkerStatus",
    "__version__",
    "only",
]

_NAMES = {
    "_worker.observers": "only",
    "client": "AsyncClient Client",
    "codec": "Codec JsonCodec RawCodec",
    "dlq": "DlqRetention",
    "errors": (
        "BgjobError CanaryRefusedError ClientClosedError EmptyQueueError EnqueueConflictError "
        "JobAlreadyExistsError JobExpiredError JobFailedError JobTimeoutError LeaseLostError "
        "LoopBlockedError PayloadError PoolerError QueueRequiredError RequestsRequiredError "
        "ScheduleError SchemaError StateRequiredError TypeRequiredError UnknownResultError "
        "UnknownScheduleError UnknownTypeError"
    ),
    "event": (
        "Event JobCancelled JobCompleted JobLeaseLost JobMovedToDlq JobRescheduled JobStarted "
        "JobTimedOut JobWillBeRetried QueueIsEmpty WorkerError"
    ),
    "job": "DeadJob EnqueueRequest Job JobResult PastJob",
    "limit": "Limit LimitStatus",
    "minutes": "Minutes",
    "mux": "Mux",
    "observer": "LoggingObserver NoopObserver Observer",
    "result": "Backoff Complete MoveToDlq Reschedule Result Retry",
    "schedule": "Schedule ScheduleStatus",
    "schedules": "Schedules",
    "stats": "CappedCount MinuteCounts MinuteReport MinuteSeries Overview QueueOverview QueueStats",
    "worker": "AsyncWorker Worker",
    "workers": "RunningJob WorkerCounts WorkerStatus",
}
"""The names of each module, as above: these are what is imported."""

if not TYPE_CHECKING:  # a checker would take any name for one of this module

    def __getattr__(name: str) -> object:
        for module, names in _NAMES.items():
            if name in names.split():
                value = getattr(import_module(f"bgjob.{module}"), name)
                globals()[name] = value
                return value
        if not name.startswith("_"):
            try:
                return import_module(f"bgjob.{name}")
            except ModuleNotFoundError as error:
                if error.name != f"bgjob.{name}":
                    raise
        raise AttributeError(f"module 'bgjob' has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
