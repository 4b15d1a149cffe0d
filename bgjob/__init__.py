"""Background jobs on PostgreSQL: no other server, no lost job."""

from bgjob.client import AsyncClient, Client
from bgjob.codec import Codec, JsonCodec, RawCodec
from bgjob.errors import (
    BgjobError,
    EmptyQueueError,
    JobAlreadyExistsError,
    LeaseLostError,
    PayloadError,
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
from bgjob.worker import AsyncWorker, Worker

__all__ = [
    "AsyncClient",
    "AsyncWorker",
    "Backoff",
    "BgjobError",
    "Client",
    "Codec",
    "Complete",
    "DeadJob",
    "EmptyQueueError",
    "EnqueueRequest",
    "Job",
    "JobAlreadyExistsError",
    "JsonCodec",
    "LeaseLostError",
    "LoggingObserver",
    "MoveToDlq",
    "Mux",
    "NoopObserver",
    "Observer",
    "PayloadError",
    "QueueRequiredError",
    "RawCodec",
    "RequestsRequiredError",
    "Reschedule",
    "Result",
    "Retry",
    "SchemaError",
    "TypeRequiredError",
    "UnknownTypeError",
    "Worker",
]
