"""The values that cross the queue: a request to enqueue, a job to run, a dead job."""

import os
import struct
import time
from collections.abc import Iterator, Mapping
from dataclasses import InitVar, dataclass, field, fields
from datetime import datetime
from typing import Any, NamedTuple, Required, Self, TypedDict, Unpack

import orjson

from bgjob._checks import Duration, seconds
from bgjob._headers import NO_HEADERS, checked
from bgjob.codec import (
    Codec,
    JsonCodec,
    TypedJob,
    check_codec,
    class_option,
    codec_of,
    json_payload,
    type_name,
)
from bgjob.errors import QueueRequiredError, TypeRequiredError

_LONGEST_KEY = 2600
"""Bytes of a key, queue and id together: an index row has at most 2,704 bytes."""

_LONGEST_NAME = 255
_SMALLINT = range(-32768, 32768)
_JSON = JsonCodec()
_NOW, _USUAL = 0.0, 0


class EnqueueOptions(TypedDict, total=False):
    """The options of EnqueueRequest that the enqueue of a typed job accepts."""

    queue: str
    id: str
    delay: Duration
    run_at: datetime | None
    priority: int
    exclusive: str | None
    headers: Mapping[str, Any]
    expires: Duration | datetime | None


class DebounceOptions(TypedDict, total=False):
    """The options of EnqueueRequest that the debounce of a typed job accepts."""

    queue: str
    id: Required[str]
    priority: int
    exclusive: str | None
    headers: Mapping[str, Any]
    expires: Duration | datetime | None


@dataclass(frozen=True, slots=True)
class EnqueueRequest:
    """A job to enqueue; checked and encoded when it is made, so that nothing fails later.

    Attributes:
        queue: the queue whose workers run it; 1 to 255 characters, no NUL.
        type: the job type whose handler runs it; 1 to 255 characters, no NUL.
        arg: `bytes` are stored as they are, None as NULL; anything else is
            encoded as JSON when the request is made. With a `codec` it holds the
            encoded bytes.
        id: unique among live jobs, so that enqueuing twice is harmless; 1 to
            255 characters. By default a new time-ordered UUID (version 7).
        delay: seconds or a timedelta before the job is due, from the moment it
            is written, by the database's clock.
        run_at: an aware datetime at which the job is due, instead of a delay;
            one in the past means now.
        priority: -32768 to 32767, 0 by default; lower runs first.
        exclusive: a key of 1 to 255 characters; key, queue and id together have at
            most 2,600 bytes. Of all jobs with this key, in any queue and on any
            host, one runs at a time, and those of one queue run in the order in
            which they are due. None by default.
        headers: a small JSON object beside the payload, for what accompanies the job and is not
            its argument (a tenant, a request id, the context of a trace): `job.headers`.
            Names are str, values what orjson encodes, without NUL; at most 4,096 bytes as
            JSON in ASCII, because each claim and retry writes them again. A copy that cannot
            be changed is kept. Empty by default.
        expires: an aware datetime, or seconds or a timedelta from the moment the job is
            written, by the database's clock. A job that a worker would start later is not
            run: it goes to the dead-letter table with a JobExpiredError. This holds for
            its retries as well. None (the default): it never expires.
        codec: encodes `arg` if that is not None; an argument of the constructor
            only. JSON by default. Register the handler with the same codec.

    Raises:
        QueueRequiredError, TypeRequiredError: the queue or type is empty.
        ValueError: a text too long or with a character that PostgreSQL cannot hold,
            a delay or priority out of range, both a delay and a run_at, a naive
            run_at or expires, a job that expires before it is due, NaN or infinity in
            `arg` or `headers`, or too large headers.
        TypeError: an `arg` or `headers` that JSON cannot express, or a value of a wrong type.

    """

    queue: str
    type: str
    arg: Any = None
    id: str = field(default_factory=lambda: new_id(), kw_only=True)  # noqa: PLW0108 (defined below)
    delay: Duration = field(default=_NOW, kw_only=True)
    run_at: datetime | None = field(default=None, kw_only=True)
    priority: int = field(default=_USUAL, kw_only=True)
    exclusive: str | None = field(default=None, kw_only=True)
    headers: Mapping[str, Any] = field(default=NO_HEADERS, kw_only=True)
    expires: Duration | datetime | None = field(default=None, kw_only=True)
    payload: bytes | None = field(init=False, repr=False, compare=False)
    """The stored bytes of `arg`; None for NULL."""
    codec: InitVar[Codec[Any]] = field(default=_JSON, kw_only=True)

    def __post_init__(self, codec: Codec[Any]) -> None:
        if not self.queue:
            raise QueueRequiredError("queue is required: name the queue whose workers run the job")
        if not self.type:
            raise TypeRequiredError("type is required: name the handler that runs the job")
        check_name("queue", self.queue)
        check_name("type", self.type)
        check_name("id", self.id)
        if self.exclusive is not None:
            check_key("exclusive", self.exclusive, self.queue, self.id)
        if self.delay is not _NOW:
            seconds(self.delay, "delay")
        if self.run_at is not None:
            if self.delay:
                raise ValueError("give delay or run_at, not both")
            if self.run_at.utcoffset() is None:
                raise ValueError(
                    "run_at must be an aware datetime, such as datetime.now(UTC): "
                    f"{self.run_at!r} has no time zone"
                )
        if self.priority is not _USUAL:
            check_priority(self.priority, "priority")
        if self.expires is not None:
            self._check_expires(self.expires)
        if self.headers is not NO_HEADERS:
            object.__setattr__(self, "headers", checked(self.headers))
        if type(codec) is not JsonCodec:
            # The request keeps the encoded bytes and not the codec, so that a copy of it is equal.
            object.__setattr__(self, "arg", _encoded(self.arg, self.type, codec))
        object.__setattr__(self, "payload", json_payload(self.arg, self.type))

    def _check_expires(self, expires: Duration | datetime) -> None:
        if isinstance(expires, datetime):
            if expires.utcoffset() is None:
                raise ValueError(
                    "expires must be an aware datetime, such as datetime.now(UTC) + "
                    f"timedelta(hours=1), or a duration: {expires!r} has no time zone"
                )
            is_dead = self.run_at is not None and expires <= self.run_at
        else:
            is_dead = seconds(expires, "expires") <= seconds(self.delay, "delay")
        if is_dead:
            raise ValueError(
                f"the job expires ({expires}) before it is due, and would never run: give a later "
                "expires"
            )

    @property
    def expires_at(self) -> datetime | None:
        """When it expires, if that is a time."""
        return self.expires if isinstance(self.expires, datetime) else None

    @property
    def expires_in(self) -> float | None:
        """How many seconds after it is written it expires, if that is a duration."""
        if self.expires is None or isinstance(self.expires, datetime):
            return None
        return seconds(self.expires, "expires")

    @classmethod
    def of(cls, value: TypedJob, /, **options: Unpack[EnqueueOptions]) -> Self:
        """Make the request of a typed job: its class names the type, its value is the arg.

        Args:
            value: an instance of a dataclass, a pydantic model, a msgspec Struct, or
                any class with a `codec: ClassVar[Codec]`. The class may set
                `job_type: ClassVar[str]` (its name by default),
                `queue: ClassVar[str]` and `priority: ClassVar[int]`.
            options: queue, id, delay, run_at, priority, exclusive, headers and expires, as
                for a request; they take precedence over the class.

        Raises:
            QueueRequiredError: neither the class nor the options name a queue.
            PayloadError: a field of the value does not match its annotation.
            TypeError: the class is not a job type, or a value has a wrong type.
            ValueError: as for a request.

        """
        if isinstance(value, type | EnqueueRequest):
            raise TypeError(f"a typed job is a value of a class of yours, not {value!r}")
        class_ = type(value)
        codec = codec_of(class_)
        if "queue" not in options:
            queue = class_option(class_, "queue")
            if queue is None:
                raise QueueRequiredError(
                    f"job type {type_name(class_)!r} has no queue: give the class one "
                    f"(`queue: ClassVar[str]` in {class_.__qualname__}), or name it at the "
                    "enqueue (queue=...)"
                )
            options["queue"] = queue
        if "priority" not in options:
            options["priority"] = class_option(class_, "priority", 0)
        return cls(type=type_name(class_), arg=value, codec=codec, **options)

    def with_headers(self, headers: Mapping[str, Any]) -> Self:
        """Return a copy of the request with these headers too; they replace those of their names.

        Raises:
            TypeError, ValueError: as for a request's headers.

        """
        # Not dataclasses.replace, which would check and encode the whole request again.
        copy = object.__new__(type(self))
        for name in _FIELDS:
            object.__setattr__(copy, name, getattr(self, name))
        object.__setattr__(copy, "headers", checked({**self.headers, **headers}))
        return copy


_FIELDS = tuple(each.name for each in fields(EnqueueRequest))


class Job(NamedTuple):
    """A claimed job, as its handler sees it; immutable.

    A named tuple, because making a frozen dataclass takes four times as long.

    Attributes:
        id: unique among live jobs.
        queue: the queue it was enqueued to.
        type: the job type, which selects the handler.
        arg: the payload's bytes, or None.
        attempt: 1 on the first run. An attempt counts from the moment the job is
            claimed, so that one whose worker died counts too.
        last_error: why the last attempt failed, or None. Of an exception the first line is
            its class and message; then come its notes, the places that it went through,
            and the errors that led to it.
        priority: lower runs first.
        next_run_at: when it was due.
        created_at: when it was enqueued.
        updated_at: when its last attempt ended, or when it was enqueued.
        exclusive: the key that no other running job has, or None.
        expires: when it expires: started later it would not be run; None if it never does.
        headers: those of its request, a dict that cannot be changed; empty if it has none.

    """

    id: str
    queue: str
    type: str
    arg: bytes | None
    attempt: int
    last_error: str | None
    priority: int
    next_run_at: datetime
    created_at: datetime
    updated_at: datetime
    exclusive: str | None = None
    expires: datetime | None = None
    headers: Mapping[str, Any] = NO_HEADERS

    def json(self) -> Any:
        """Decode `arg` as JSON; None if there is no payload.

        Raises:
            ValueError: `arg` is not JSON (orjson.JSONDecodeError).

        """
        return None if self.arg is None else orjson.loads(self.arg)


class PastJob(NamedTuple):
    """A completed job of a type that is kept.

    Attributes:
        id: its id.
        queue: its queue.
        type: its type.
        attempt: the attempt that completed it.
        started_at: when a worker claimed it for that attempt; None if that cannot be told.
        ended_at: when it was completed.
        worker: the number of that worker's row, modulo 2**20; see Client.workers. None if
            it had none.

    """

    id: str
    queue: str
    type: str
    attempt: int
    started_at: datetime | None
    ended_at: datetime
    worker: int | None


class DeadJob(NamedTuple):
    """A job in the dead-letter table: the attributes of Job, and five more.

    Attributes:
        last_error: why it is there.
        moved_at: when it was moved there.
        number: its number in the table; a job that died later has a larger one.
        fingerprint: the same for jobs that died in the same way; see bgjob.triage.
        worker: the number of the worker that moved it, as in `client.workers()`, modulo
            1,048,576; None if it was not a worker, or one without a row.
        checkpoint: the bytes that its handler saved last, or None; see bgjob.checkpoint.

    """

    id: str
    queue: str
    type: str
    arg: bytes | None
    attempt: int
    last_error: str | None
    priority: int
    next_run_at: datetime
    created_at: datetime
    updated_at: datetime
    exclusive: str | None
    moved_at: datetime
    number: int
    fingerprint: str
    worker: int | None = None
    expires: datetime | None = None
    headers: Mapping[str, Any] = NO_HEADERS
    checkpoint: bytes | None = None

    def json(self) -> Any:
        """Decode `arg` as JSON; None if there is no payload.

        Raises:
            ValueError: `arg` is not JSON (orjson.JSONDecodeError).

        """
        return None if self.arg is None else orjson.loads(self.arg)


def check_priority(priority: int, name: str) -> None:
    """Raise ValueError that names it unless it is a smallint."""
    if type(priority) is not int or priority not in _SMALLINT:
        raise ValueError(f"{name} must be an integer from -32768 to 32767, not {priority!r}")


def check_name(what: str, name: str) -> None:
    """Raise TypeError or ValueError if PostgreSQL or an index cannot hold this name."""
    if not isinstance(name, str):
        raise TypeError(f"{what} must be a str, not {type(name).__name__}")
    if not 1 <= len(name) <= _LONGEST_NAME:
        raise ValueError(f"{what} must have 1 to {_LONGEST_NAME} characters, not {len(name)}")
    if "\0" in name:
        raise ValueError(f"{what} must not contain NUL: {name!r}")
    if not name.isascii():
        try:
            name.encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"{what} must be valid Unicode, without surrogates: {name!r}"
            ) from None


def check_key(what: str, key: str, queue: str, id_: str) -> None:
    """Raise TypeError or ValueError if the index of keys cannot hold this key of a job."""
    check_name(what, key)
    size = sum(len(name.encode()) for name in (key, queue, id_))
    if size > _LONGEST_KEY:
        raise ValueError(
            f"{what}, the queue and the id must have at most {_LONGEST_KEY} bytes together, not "
            f"{size}: use a shorter key, for example a hash of it"
        )


_last_id = 0
_tails: Iterator[int] = iter(())  # random numbers: to ask for one at a time takes longer
_unpacked = struct.Struct("512Q").unpack


def _renew_tails() -> int:
    global _tails  # noqa: PLW0603
    _tails = iter(_unpacked(os.urandom(4096)))
    return next(_tails)


if hasattr(os, "register_at_fork"):  # or a child would make the same ids
    os.register_at_fork(after_in_child=_renew_tails)


def new_id() -> str:
    """Make a time-ordered UUID (version 7).

    Ids that one thread makes later sort later, so that the jobs of a bulk enqueue
    keep their order and the pages of the primary key stay warm.
    """
    global _last_id  # noqa: PLW0603 (threads may race: order is promised within one only)
    # 48 bits of milliseconds and 12 bits of their fraction, as RFC 9562 allows.
    now = time.time_ns() * 4096 // 1_000_000
    if now <= _last_id:
        now = _last_id + 1
    _last_id = now
    tail = next(_tails, None)  # never the same for two threads
    if tail is None:
        tail = _renew_tails()
    return "%08x-%04x-7%03x-%04x-%012x" % (  # noqa: UP031 (quicker than an f-string)
        now >> 28,
        now >> 12 & 0xFFFF,
        now & 0xFFF,
        0x8000 | tail >> 50,
        tail & 0xFFFFFFFFFFFF,
    )


def _encoded(arg: object, type_: str, codec: Codec[Any]) -> bytes | None:
    check_codec(codec)
    if arg is None:
        return None
    data = codec.encode(arg)
    if not isinstance(data, bytes):
        raise TypeError(
            f"{codec!r} returned {type(data).__name__} for the arg of job type {type_!r}: encode() "
            "must return bytes"
        )
    return data
