"""What a handler gives as the value of its job."""

import orjson

from bgjob.codec import has_non_finite
from bgjob.job import Job

MOST_BYTES = 1_000_000
"""Of the JSON of a value: it is kept in a table, and sent with other settlements."""


def encoded(value: object, job: Job) -> bytes:
    """Return a value as it is stored.

    Raises:
        TypeError, ValueError: JSON cannot express it, or it is too large.

    """
    what = f"the value of job {job.id!r} of type {job.type!r}, whose result is kept,"
    try:
        data = orjson.dumps(value)
    except TypeError as error:  # orjson's JSONEncodeError is one
        raise TypeError(f"{what} cannot be encoded as JSON: {error}") from error
    if b"null" in data and has_non_finite(value):
        raise ValueError(f"{what} holds NaN or infinity, which JSON cannot express")
    if len(data) > MOST_BYTES:
        raise ValueError(
            f"{what} has {len(data):,} bytes as JSON, and at most {MOST_BYTES:,} are kept: store "
            "it elsewhere, and return where it is"
        )
    return data
