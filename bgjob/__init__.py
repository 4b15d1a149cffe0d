"""Background jobs on PostgreSQL: no other server, no lost job."""

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
from bgjob.job import DeadJob, EnqueueRequest, Job, PastJob
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
    "JobLeaseLost",
    "JobMovedToDlq",
    "JobRescheduled",
    "JobStarted",
    "JobTimedOut",
    "JobTimeoutError",
    "JobWillBeRetried",
    "JsonCodec",
    "LeaseLostError",
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
    "UnknownScheduleError",
    "UnknownTypeError",
    "Worker",
    "WorkerCounts",
    "WorkerError",
    "WorkerStatus",
    "__version__",
    "only",
]
