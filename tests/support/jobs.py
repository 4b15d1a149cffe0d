"""Jobs for tests that need no database."""

from datetime import UTC, datetime

from bgjob import Job

NOON = datetime(2030, 1, 1, 12, tzinfo=UTC)


def a_job(type: str = "t", *, attempt: int = 1, last_error: str | None = None) -> Job:
    return Job("id", "q", type, None, attempt, last_error, 0, NOON, NOON, NOON)
