"""Background jobs on PostgreSQL: no other server, no lost job."""

from bgjob.client import AsyncClient, Client
from bgjob.dlq import DlqRetention
from bgjob.errors import (
    BgjobError,
    EmptyQueueError,
    JobAlreadyExistsError,
    LeaseLostError,
    QueueRequiredError,
    RequestsRequiredError,
    SchemaError,
    TypeRequiredError,
    UnknownTypeError,
)
from bgjob.job import DeadJob, EnqueueRequest, Job
from bgjob.mux import Mux
from bgjob.observer import LoggingObserver, NoopObserver, Observer
from bgjob.result import Backoff, Complete, MoveToDlq, Reschedule, Result, Retry
from bgjob.stats import QueueStats
from bgjob.worker import AsyncWorker, Worker

__all__ = [
    "AsyncClient",
    "AsyncWorker",
    "Backoff",
    "BgjobError",
    "Client",
    "Complete",
    "DeadJob",
    "DlqRetention",
    "EmptyQueueError",
    "EnqueueRequest",
    "Job",
    "JobAlreadyExistsError",
    "LeaseLostError",
    "LoggingObserver",
    "MoveToDlq",
    "Mux",
    "NoopObserver",
    "Observer",
    "QueueRequiredError",
    "QueueStats",
    "RequestsRequiredError",
    "Reschedule",
    "Result",
    "Retry",
    "SchemaError",
    "TypeRequiredError",
    "UnknownTypeError",
    "Worker",
]
