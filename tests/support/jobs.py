"""Jobs and requests for tests."""

from datetime import UTC, datetime
from typing import Any

from bgjob import EnqueueRequest, Job

NOON = datetime(2030, 1, 1, 12, tzinfo=UTC)


def a_job(
    type: str = "t",
    arg: bytes | None = None,
    *,
    id: str = "id",
    attempt: int = 1,
    last_error: str | None = None,
) -> Job:
    return Job(id, "q", type, arg, attempt, last_error, 0, NOON, NOON, NOON)


def requests(*ids: str, **options: Any) -> list[EnqueueRequest]:
    return [EnqueueRequest("q", "t", id=id_, **options) for id_ in ids]
