"""The values that cross the queue: a request to enqueue, a job to run, a dead job.

The module has over 400 lines because half of them say what the fields of these values mean.
"""

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, NamedTuple, Required, Self, TypedDict, Unpack, cast

import orjson

from bgjob._checks import Duration, seconds
from bgjob._headers import NO_HEADERS, checked
from bgjob.codec import (
    Codec,
    JsonCodec,
    TypedJob,
    check_codec,
    defaults_of,
    exact,
    json_payload,
)
from bgjob.errors import QueueRequiredError, TypeRequiredError

_LONGEST_KEY = 2600
"""Bytes of a key, queue and id together: an index row has at most 2,704 bytes."""

_LONGEST_NAME = 255
_SMALLINT = range(-32768, 32768)
_JSON = JsonCodec()
_NOW, _USUAL = 0.0, 0
_NEW = cast("str", object())  # None would hide an id that was forgotten


class EnqueueOptions(TypedDict, total=False):
    """The options of EnqueueRequest that the enqueue of a typed job accepts."""

    queue: str
    id: str
    delay: Duration
    run_at: datetime | None
    priority: int
    exclusive: str | None
    slots: int | None
    headers: Mapping[str, Any]
    expires: Duration | datetime | None
    keep: Duration | None


class DebounceOptions(TypedDict, total=False):
    """The options of EnqueueRequest that the debounce of a typed job accepts."""

    queue: str
    id: Required[str]
    priority: int
    exclusive: str | None
    slots: int | None
    headers: Mapping[str, Any]
    expires: Duration | datetime | None


@dataclass(frozen=True, init=False)
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
        slots: how many jobs of the key run at once, 1 to 32,767; needs `exclusive`. Where
            live jobs of a key have different numbers, the smallest counts: of those that run
            and of the one that is to start. None (the default) is 1.
        headers: a small JSON object beside the payload, for what accompanies the job and is not
            its argument (a tenant, a request id, the context of a trace): `job.headers`.
            Names are str, values what orjson encodes, without NUL; at most 4,096 bytes as
            JSON in ASCII, because each claim and retry writes them again. A copy that cannot
            be changed is kept. Empty by default.
        expires: an aware datetime, or seconds or a timedelta from the moment the job is
            written, by the database's clock. A job that a worker would start later is not
            run: it goes to the dead-letter table with a JobExpiredError. This holds for
            its retries as well. None (the default): it never expires.
        keep: seconds or a timedelta, more than 0, for which the job's result is kept after its
            end: what the handler gave as `Complete(value)`, or why the job failed; see
            Client.result and Client.wait. Until then its id stays taken: another request with
            this id and a `keep` of its own is refused, so that one whose answer was lost can be
            repeated, also after the job has run. A request without `keep` does not look at
            results. None (the default): nothing is kept.
        codec: encodes `arg` if that is not None; an argument of the constructor
            only. JSON by default. Register the handler with the same codec.

    Raises:
        QueueRequiredError, TypeRequiredError: the queue or type is empty.
        ValueError: a text too long or with a character that PostgreSQL cannot hold,
            a delay, a priority or slots out of range, slots without a key, both a delay and a
            run_at, a naive run_at or expires, a job that expires before it is due, a `keep` of
            0, NaN or infinity in `arg` or `headers`, or too large headers.
        TypeError: an `arg` or `headers` that JSON cannot express, or a value of a wrong type.

    """

    queue: str
    type: str
    arg: Any = None
    id: str = field(kw_only=True)
    # The class has the usual values of these, and a request only the others: an option that is
    # not used costs a request nothing, and with slots each would cost 50 ns (bulk.py).
    delay: Duration = field(default=_NOW, kw_only=True)
    run_at: datetime | None = field(default=None, kw_only=True)
    priority: int = field(default=_USUAL, kw_only=True)
    exclusive: str | None = field(default=None, kw_only=True)
    headers: Mapping[str, Any] = field(default=NO_HEADERS, kw_only=True)
    expires: Duration | datetime | None = field(default=None, kw_only=True)
    keep: Duration | None = field(default=None, kw_only=True)
    slots: int | None = field(default=None, kw_only=True)
    payload: bytes | None = field(init=False, repr=False, compare=False)
    """The stored bytes of `arg`; None for NULL."""
    is_plain: bool = field(default=True, init=False, repr=False, compare=False)
    """Whether it has the usual value of each option but the id and the priority."""

    has_own_id: bool = field(default=False, init=False, repr=False, compare=False)
    """Whether the id was given, and not generated."""

    def __init__(
        self,
        queue: str,
        type: str,  # noqa: A002
        arg: Any = None,
        *,
        id: str = _NEW,  # noqa: A002
        delay: Duration = _NOW,
        run_at: datetime | None = None,
        priority: int = _USUAL,
        exclusive: str | None = None,
        headers: Mapping[str, Any] = NO_HEADERS,
        expires: Duration | datetime | None = None,
        keep: Duration | None = None,
        slots: int | None = None,
        codec: Codec[Any] = _JSON,
    ) -> None:
        # isprintable() is false for NUL and surrogates, and quicker than to look for them.
        if not (queue.__class__ is str and 0 < len(queue) <= _LONGEST_NAME and queue.isprintable()):
            if not queue:
                raise QueueRequiredError(
                    "queue is required: name the queue whose workers run the job"
                )
            check_name("queue", queue)
        if not (type.__class__ is str and 0 < len(type) <= _LONGEST_NAME and type.isprintable()):
            if not type:
                raise TypeRequiredError("type is required: name the handler that runs the job")
            check_name("type", type)
        if id is _NEW:
            id = new_id()  # noqa: A001
        else:
            check_name("id", id)
            object.__setattr__(self, "has_own_id", True)
        if codec is not _JSON and codec.__class__ is not JsonCodec:
            # The request keeps the encoded bytes and not the codec, so that a copy of it is equal.
            arg = _encoded(arg, type, codec)
        write = object.__setattr__
        write(self, "queue", queue)
        write(self, "type", type)
        write(self, "arg", arg)
        write(self, "id", id)
        write(self, "payload", json_payload(arg, type))
        if priority is not _USUAL:
            check_priority(priority, "priority")
            write(self, "priority", priority)
        if (
            delay is not _NOW
            or run_at is not None
            or exclusive is not None
            or headers is not NO_HEADERS
            or expires is not None
            or keep is not None
        ):
            self._set_options(delay, run_at, exclusive, headers, expires, keep)
        if slots is not None:
            self._set_slots(slots)

    def _set_slots(self, slots: int) -> None:
        check_slots(slots, "slots")
        if self.exclusive is None:
            raise ValueError(
                "slots is the number of jobs of a key that run at once: name the key too, "
                f"EnqueueRequest(exclusive=..., slots={slots})"
            )
        object.__setattr__(self, "slots", slots)

    def _set_options(
        self,
        delay: Duration,
        run_at: datetime | None,
        exclusive: str | None,
        headers: Mapping[str, Any],
        expires: Duration | datetime | None,
        keep: Duration | None,
    ) -> None:
        if exclusive is not None:
            check_key("exclusive", exclusive, self.queue, self.id)
        seconds(delay, "delay")
        if run_at is not None:
            if delay:
                raise ValueError("give delay or run_at, not both")
            if run_at.utcoffset() is None:
                raise ValueError(
                    "run_at must be an aware datetime, such as datetime.now(UTC): "
                    f"{run_at!r} has no time zone"
                )
        if keep is not None and not seconds(keep, "keep"):
            raise ValueError(
                "keep must be more than 0: give the time for which the result is needed, or None"
            )
        if headers is not NO_HEADERS:
            headers = checked(headers)
        self.__dict__.update(
            delay=delay,
            run_at=run_at,
            exclusive=exclusive,
            headers=headers,
            expires=expires,
            keep=keep,
            is_plain=keep is None
            and not (delay or run_at or exclusive or headers or expires is not None),
        )
        if expires is not None:
            self._check_expires(expires)

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

    @property
    def keep_for(self) -> float | None:
        """For how many seconds the result is kept."""
        return None if self.keep is None else seconds(self.keep, "keep")

    @classmethod
    def of(cls, value: TypedJob, /, **options: Unpack[EnqueueOptions]) -> Self:
        """Make the request of a typed job: its class names the type, its value is the arg.

        Args:
            value: an instance of a dataclass, a pydantic model, a msgspec Struct, or
                any class with a `codec: ClassVar[Codec]`. The class may set
                `job_type: ClassVar[str]` (its name by default),
                `queue: ClassVar[str]` and `priority: ClassVar[int]`.
            options: queue, id, delay, run_at, priority, exclusive, slots, headers, expires and
                keep, as for a request; they take precedence over the class.

        Raises:
            QueueRequiredError: neither the class nor the options name a queue.
            PayloadError: a field of the value does not match its annotation.
            TypeError: the class is not a job type, or a value has a wrong type.
            ValueError: as for a request.

        """
        if isinstance(value, (type, EnqueueRequest)):  # a union takes 0.2 µs
            raise TypeError(f"a typed job is a value of a class of yours, not {value!r}")
        class_ = type(value)
        codec, name, queue, priority = defaults_of(class_)
        if "queue" not in options:
            if queue is None:
                raise QueueRequiredError(
                    f"job type {name!r} has no queue: give the class one "
                    f"(`queue: ClassVar[str]` in {class_.__qualname__}), or name it at the "
                    "enqueue (queue=...)"
                )
            options["queue"] = queue
        if "priority" not in options:
            options["priority"] = priority
        return cls(type=name, arg=value, codec=codec, **options)

    def with_headers(self, headers: Mapping[str, Any]) -> Self:
        """Return a copy of the request with these headers too; they replace those of their names.

        Raises:
            TypeError, ValueError: as for a request's headers.

        """
        # Not dataclasses.replace, which would check and encode the whole request again.
        copy = object.__new__(type(self))
        both = checked({**self.headers, **headers})
        copy.__dict__.update(self.__dict__, headers=both, is_plain=self.is_plain and not both)
        return copy


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
        group: the id of its group of `client.group`, which is the id of the job that runs when no
            job of the group is live any more. That job has its own id here. None without one.
        group_dead: of that job: how many jobs of its group were in the dead-letter table when
            none was live any more, because they failed, expired or were cancelled. None for
            any other job, and if it was made to run before.
        keep: for how many seconds after its end its result is kept, or None.

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
    group: str | None = None
    group_dead: int | None = None
    keep: float | None = None

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


class JobResult(NamedTuple):
    """What is known of a job that was enqueued with `keep`.

    Attributes:
        id: its id.
        state: "pending" while the job is live: it waits, runs, or waits to be retried.
            "completed" once its handler has succeeded, "failed" once it is in the dead-letter
            table, for any reason: out of attempts, expired, cancelled, of an unknown type.
        value: what the handler gave as `Complete(value)`, decoded from JSON; None if that was
            nothing, and in another state.
        error: why it failed, as in the dead-letter table; None in another state.
        attempt: the last attempt; 0 while it is pending.
        ended_at: when it ended; None while it is pending.
        until: when this is forgotten, and the id free again; None while it is pending.

    """

    id: str
    state: Literal["pending", "completed", "failed"]
    value: Any = None
    error: str | None = None
    attempt: int = 0
    ended_at: datetime | None = None
    until: datetime | None = None


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
        group: the id of its group, or None; see Job.
        group_dead: see Job.
        slots: how many jobs of its key may run at once; None for one.

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
    group: str | None = None
    group_dead: int | None = None
    slots: int | None = None

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


def check_slots(slots: int, name: str) -> None:
    """Raise ValueError that names it unless it is a positive smallint."""
    if type(slots) is not int or slots < 1 or slots not in _SMALLINT:
        raise ValueError(f"{name} must be an integer from 1 to 32767, not {slots!r}")


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
_tails: Iterator[str] = iter(())  # random digits: to ask for those of one id takes longer
_variant = ""


def _renew_tails() -> str:
    """Make the random digits of the next ids: they have the first three in common."""
    global _tails, _variant  # noqa: PLW0603
    _variant = f"-8{os.urandom(2).hex()[1:]}-"
    _tails = iter(os.urandom(4096).hex(" ", 6).split())
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
    head = hex(now | 1 << 60)  # 15 digits, after the first three characters
    tail = next(_tails, None) or _renew_tails()  # never the same for two threads
    return f"{head[3:11]}-{head[11:15]}-7{head[15:]}{_variant}{tail}"


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
    return exact(data)
