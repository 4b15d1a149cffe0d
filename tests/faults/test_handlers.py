"""Faults 8 to 12: whatever a handler, its transaction or an observer does, it harms its own job."""

import asyncio
import re
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Literal

import psycopg
import pytest
from psycopg.rows import dict_row
from support.waiting import NEVER, PATIENCE, eventually
from support.workers import session_of

from bgjob import (
    AsyncClient,
    Client,
    Complete,
    EnqueueRequest,
    Job,
    MoveToDlq,
    Mux,
    NoopObserver,
    Reschedule,
    Result,
    Retry,
)
from bgjob._engine.protocol import Exchange, Sweep
from bgjob._sql.settlements import Claimed, Postponed
from faults.world import Local, World

LEDGER_ROW = "insert into ledger (job_id, attempt, kind, pid) values (%s, %s, %s, %s)"


CLOCK = "select extract(epoch from clock_timestamp())::float8"

HOST = pytest.mark.parametrize("is_async", [False, True], ids=["Worker", "AsyncWorker"])


LEASE = 10.0
"""Seconds, of each world here: no busy host takes it away, and this is not about leases."""


@dataclass(frozen=True)
class Kind:
    """How a handler is written."""

    style: Literal["plain", "coroutine"]
    transactional: bool

    def __str__(self) -> str:
        return f"{self.type} {self.style}" if self.transactional else self.style

    @property
    def type(self) -> str:
        """The job type, which is also the kind of the ledger row: the oracle knows them."""
        return "transactional" if self.transactional else "plain"

    def register(
        self,
        mux: Mux,
        act: Callable[[Job], Any],
        *,
        dsn: str | None = None,
        type: str | None = None,
        **policy: Any,
    ) -> Mux:
        """Register a handler that writes the ledger, where it has a DSN, and then acts."""

        def plain(job: Job, conn: psycopg.Connection[Any] | None = None) -> Any:
            row = [job.id, job.attempt, job.type, 0]
            if conn is not None:
                conn.execute(LEDGER_ROW, row)
            elif dsn is not None:
                with psycopg.connect(dsn, autocommit=True) as own:
                    own.execute(LEDGER_ROW, row)
            return act(job)

        async def coroutine(job: Job, conn: psycopg.AsyncConnection[Any] | None = None) -> Any:
            row = [job.id, job.attempt, job.type, 0]
            if conn is not None:
                await conn.execute(LEDGER_ROW, row)
            elif dsn is not None:
                async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as own:
                    await own.execute(LEDGER_ROW, row)
            return act(job)

        register: Any = mux.register
        policy.setdefault("backoff", lambda _: 0.05)
        register(
            type or self.type,
            plain if self.style == "plain" else coroutine,
            transactional=self.transactional,
            **policy,
        )
        return mux


KINDS = [
    Kind("plain", transactional=False),
    Kind("coroutine", transactional=False),
    Kind("plain", transactional=True),
    Kind("coroutine", transactional=True),
]

each_kind = pytest.mark.parametrize("kind", KINDS, ids=str)


def errors_of(world: World) -> dict[str, str]:
    """The stored errors of the jobs that are live or dead."""
    return dict(
        world.query(
            "select id, last_error from bgjob_job where last_error is not null "
            "union all select job_id, last_error from bgjob_dead_job"
        )
    )


# -- 8: what only an interpreter should raise ----------------------------------------------------


@HOST
@each_kind
def test_8_an_exception_that_ends_programs_ends_only_the_attempt(
    world: World, is_async: bool, kind: Kind
) -> None:
    errors: dict[str, BaseException] = {
        "SystemExit": SystemExit("leaving"),
        "SystemExit without a code": SystemExit(),
        "KeyboardInterrupt": KeyboardInterrupt(),
        "GeneratorExit": GeneratorExit(),
        "CancelledError": asyncio.CancelledError(),
        "StopIteration": StopIteration(1),
        "StopAsyncIteration": StopAsyncIteration(),
        "BaseException": BaseException("base"),
        "BaseExceptionGroup": BaseExceptionGroup("group", [KeyboardInterrupt()]),
    }

    def act(job: Job) -> None:
        name, _, mood = job.id.partition(":")
        if name in errors and (mood == "always" or job.attempt == 1):
            raise errors[name]

    once = [f"{name}:once" for name in errors]
    always = [f"{name}:always" for name in errors]
    neighbours = [f"neighbour {n}" for n in range(10)]
    for ids in zip(once, always, neighbours, strict=False):
        world.enqueue(kind.type, *ids)
    mux = kind.register(Mux(), act, dsn=world.dsn, max_attempts=3)
    worker = world.worker(mux, is_async=is_async, concurrency=2)
    world.done()
    for id in once:
        assert worker.heard("retried", id)
        assert worker.heard("completed", id)
    for id in always:
        assert len([event for event in worker.of("started") if event[1] == id]) == 3
        world.witness(worker, "dead", id)
    stored = errors_of(world)
    assert {id: re.split(r"[:\n]", stored[id])[0] for id in always} == {
        # A coroutine cannot raise StopIteration: Python turns it into a RuntimeError.
        f"{name}:always": "RuntimeError"
        if name == "StopIteration" and kind.style == "coroutine"
        else type(error).__name__
        for name, error in errors.items()
    }
    world.enqueue(kind.type, "afterwards")
    world.witness(worker, "completed", "afterwards")
    assert worker.of("error") == []
    assert worker.shutdown()


@HOST
@pytest.mark.parametrize("kind", [k for k in KINDS if k.style == "coroutine"], ids=str)
def test_8_a_coroutine_that_is_cancelled_ends_only_its_attempt(
    world: World, is_async: bool, kind: Kind
) -> None:
    async def cancel_itself() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(NEVER)

    async def cancel_child() -> None:
        child = asyncio.create_task(asyncio.sleep(NEVER))
        asyncio.get_running_loop().call_soon(child.cancel)
        await child

    async def cancel_afterwards() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()  # felt at the next await, which is not the handler's any more

    faults = {
        "itself": cancel_itself,
        "a child": cancel_child,
        "afterwards": cancel_afterwards,
    }

    async def handler(job: Job, conn: psycopg.AsyncConnection[Any] | None = None) -> None:
        if job.attempt == 1 and job.id in faults:
            await faults[job.id]()
        if conn is not None:
            await conn.execute(LEDGER_ROW, [job.id, job.attempt, job.type, 0])

    mux = Mux()
    register: Any = mux.register
    register(kind.type, handler, transactional=kind.transactional, backoff=lambda _: 0.05)
    for n, id in enumerate(faults):
        world.enqueue(kind.type, id, f"neighbour {n}", ledger=kind.transactional)
    worker = world.worker(mux, is_async=is_async)
    world.done()
    for id in ("itself", "a child"):
        world.witness(worker, "retried", id)
    for id in world.jobs:
        world.witness(worker, "completed", id)
    assert worker.shutdown()


@pytest.mark.parametrize("kind", [k for k in KINDS if k.style == "coroutine"], ids=str)
def test_8_an_exception_that_ends_programs_in_a_task_of_the_handler_ends_only_the_attempt(
    world: World, kind: Kind
) -> None:
    async def leave(error: BaseException) -> None:
        await asyncio.sleep(0)
        raise error

    async def wait_for(error: BaseException) -> None:
        child = asyncio.create_task(leave(error))
        await asyncio.wait([child])
        child.result()

    async def call(error: BaseException) -> None:
        def raise_it() -> None:
            raise error

        asyncio.get_running_loop().call_soon(raise_it)
        await asyncio.sleep(0)
        raise error

    async def stop(_: BaseException) -> None:
        asyncio.get_running_loop().stop()
        await asyncio.sleep(0.01)
        raise ValueError("after the stop")

    faults: dict[str, Callable[[BaseException], Any]] = {
        "gather": lambda error: asyncio.gather(leave(error)),
        "wait": wait_for,
        "callback": call,
        "stop": stop,
    }
    errors = {"exit": SystemExit, "interrupt": KeyboardInterrupt}

    async def handler(job: Job, conn: psycopg.AsyncConnection[Any] | None = None) -> None:
        if conn is not None:
            await conn.execute(LEDGER_ROW, [job.id, job.attempt, job.type, 0])
        fault, _, error = job.id.partition(":")
        if job.attempt == 1 and fault in faults:
            await faults[fault](errors[error]("in a task"))

    mux = Mux()
    register: Any = mux.register
    register(kind.type, handler, transactional=kind.transactional, backoff=lambda _: 0.05)
    leaving = [f"{fault}:{error}" for fault in faults for error in errors]
    for n, id in enumerate(leaving):
        world.enqueue(kind.type, id, f"neighbour {n}", ledger=kind.transactional)
    worker = world.worker(mux, is_async=False, concurrency=4)
    world.done()
    for id in leaving:
        world.witness(worker, "retried", id)
        world.witness(worker, "completed", id)
    assert worker.heard("error", "in a task")
    assert worker.worker.failure is None
    assert worker.shutdown()


# -- 9: a blocked event loop ----------------------------------------------------------------------


@HOST
@pytest.mark.parametrize("kind", [k for k in KINDS if k.style == "coroutine"], ids=str)
def test_9_a_coroutine_that_blocks_its_loop_for_three_leases_keeps_its_job(
    world: World, is_async: bool, kind: Kind
) -> None:
    world.lease = 1.0
    released = threading.Event()

    def block(job: Job) -> None:
        assert released.wait(PATIENCE)

    world.enqueue(kind.type, "blocking")
    mux = kind.register(Mux(), block, dsn=world.dsn)
    worker = world.worker(mux, is_async=is_async)
    try:
        worker.wait_for("started", "blocking")
        began = world.value(CLOCK)
        beside = world.start()
        running = world.value(CLOCK)
        # By the database's clock: without an extension the other worker had the job by now.
        until = max(began + 3 * world.lease, running + 1.5 * world.lease)
        assert eventually(lambda: world.value(CLOCK) >= until)
        world.enqueue("plain", "beside")
        beside.wait_for("completed", "beside")
        world.witness(worker, "error", "LoopBlockedError")
        [text] = {event[1] for event in worker.of("error")}
        assert "'blocking'" in text
        assert kind.type in text
        assert beside.of("started") == [("started", "beside", 1)]
    finally:
        released.set()
    world.witness(worker, "completed", "blocking")
    assert world.rows("blocking") == 1
    assert worker.of("lost", "retried") == []
    assert not beside.heard("started", "blocking")


def test_9_plain_handlers_that_block_are_not_reported(world: World) -> None:
    world.lease = 1.0
    released = threading.Event()

    def block(job: Job) -> None:
        assert released.wait(PATIENCE)

    async def coroutine(_: Job) -> None:
        await asyncio.sleep(0)

    world.enqueue("plain", "blocking", ledger=False)
    mux = Mux().register("plain", block).register("coroutine", coroutine)
    worker = world.worker(mux, concurrency=2)
    try:
        worker.wait_for("started", "blocking")
        held = "select lease_until from bgjob_job where id = 'blocking'"
        first = world.value(held)
        # Two extensions: more than the third of a lease after which a loop counts as blocked.
        assert eventually(lambda: (world.value(held) - first).total_seconds() > world.lease)
        world.enqueue("coroutine", "neighbour", ledger=False)
        world.witness(worker, "completed", "neighbour")
        assert worker.of("error") == []
    finally:
        released.set()
    world.witness(worker, "completed", "blocking")


# -- 10: error texts ---------------------------------------------------------------------------------


class Unprintable(Exception):
    """Its text raises."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def __str__(self) -> str:
        raise self.error

    __repr__ = __str__


class NoText(Exception):
    """Its text is none."""

    def __str__(self) -> Any:
        return 42


def odd_errors() -> dict[str, str | BaseException]:
    return {
        "NUL": "before\0after",
        "only NULs": "\0" * 100,
        "lone surrogate": "before\ud800after",
        "surrogate pair": "\ud83d\ude00",
        "empty": "",
        "NUL raised": ValueError("before\0after"),
        "surrogate raised": ValueError("before\udfffafter"),
        "array": '{"a",NULL}\\',
        "text raises": Unprintable(ValueError("no text")),
        "text exits": Unprintable(SystemExit("no text")),
        "text recurses": Unprintable(RecursionError()),
        "text is a number": NoText(),
        "20 kB": "é" * 20_000,
        "chained": ExceptionGroup("group\0", [ValueError("\ud800")]),
    }


def clean(stored: str | None) -> bool:
    return stored is not None and "\0" not in stored and len(stored) < 10_100


@HOST
@each_kind
def test_10_error_texts_that_the_database_cannot_store_are_cleaned_and_capped(
    world: World, is_async: bool, kind: Kind
) -> None:
    errors = odd_errors()

    def act(job: Job) -> Result | None:
        how, _, name = job.id.partition(": ")
        match how, errors.get(name):
            case "retry", error:
                return Retry(NEVER, error=error)
            case "dlq", str() | BaseException() as error:
                return MoveToDlq(error)
            case "raise", BaseException() as error:
                raise error
            case "raise", error:
                raise ValueError(error)
        return None

    bad = [f"{how}: {name}" for how in ("retry", "dlq", "raise") for name in errors]
    neighbours = [f"neighbour: {n}" for n in range(len(bad))]
    for id, neighbour in zip(bad, neighbours, strict=True):
        extra: dict[str, Any] = {"then": "dlq"} if id.startswith("dlq") else {}
        world.enqueue(kind.type, id, **extra)
        world.enqueue(kind.type, neighbour)
    mux = kind.register(Mux(), act, dsn=world.dsn, backoff=lambda _: NEVER)
    observer = Counting()
    worker = world.worker(mux, is_async=is_async, concurrency=4, observer=observer)
    world.done(*neighbours)
    assert eventually(lambda: sorted(observer.failed) == sorted(bad))
    world.saw("each attempt failed", observer.failed)
    assert worker.shutdown()
    assert observer.errors == 0
    stored = errors_of(world)
    assert [id for id in bad if not clean(stored.get(id))] == []
    for how in ("retry", "dlq"):
        assert stored[f"{how}: NUL"] == "before\ufffdafter"
        assert stored[f"{how}: lone surrogate"] == "before?after"
        assert stored[f"{how}: array"] == '{"a",NULL}\\'
        assert stored[f"{how}: 20 kB"].endswith("(20000 characters)")
        assert "Unprintable" in stored[f"{how}: text raises"]
    assert stored["raise: NUL raised"].startswith("ValueError: before\ufffdafter\n  at ")
    assert sorted(observer.started) == sorted([*bad, *neighbours])


@HOST
@each_kind
def test_10_an_error_text_of_50_mb_is_capped(world: World, is_async: bool, kind: Kind) -> None:
    error = ValueError("x\0" * 25_000_000)

    def act(job: Job) -> Result | None:
        match job.id:
            case "retry":
                return Retry(NEVER, error=error)
            case "dlq":
                return MoveToDlq(error)
            case "raise" | "last attempt":
                raise error
        return None

    world.enqueue(kind.type, "n1", "retry", "raise", "n2")
    world.enqueue(kind.type, "dlq", then="dlq")
    world.query("update bgjob_job set attempt = 24 where id = 'n2'")
    world.enqueue(kind.type, "last attempt", "n3")
    world.query("update bgjob_job set attempt = 24 where id = 'last attempt'")
    mux = kind.register(Mux(), act, dsn=world.dsn, backoff=lambda _: NEVER)
    observer = Counting()
    worker = world.worker(mux, is_async=is_async, concurrency=2, observer=observer)
    world.done("n1", "n2", "n3", "dlq", "last attempt")
    assert eventually(lambda: sorted(observer.failed) == ["dlq", "last attempt", "raise", "retry"])
    world.saw("each attempt failed", observer.failed)
    stored = errors_of(world)
    assert set(stored) == set(observer.failed)
    assert all(map(clean, stored.values()))
    assert all(text.startswith("ValueError: x\ufffdx") for text in stored.values())
    assert worker.shutdown()


class Counting(NoopObserver):
    """Counts attempts that failed, and keeps no error."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.failed: list[str] = []
        self.errors = 0

    def job_started(self, job: Job, /) -> None:
        self.started.append(job.id)

    def job_will_be_retried(self, job: Job, delay: float, error: Any, /) -> None:
        self.failed.append(job.id)

    def job_moved_to_dlq(self, job: Job, error: Any, /) -> None:
        self.failed.append(job.id)

    def worker_error(self, error: BaseException, /) -> None:
        self.errors += 1


# -- 11: no result; observers ------------------------------------------------------------------------


class Hostile:
    """A value that answers no question."""

    def _refuse(self, *_: object) -> Any:
        raise RuntimeError("not me")

    __bool__ = __eq__ = __hash__ = __repr__ = __str__ = __iter__ = __len__ = _refuse


@HOST
@each_kind
def test_11_a_return_value_that_is_not_a_result_fails_the_attempt_and_names_the_handler(
    world: World, is_async: bool, kind: Kind
) -> None:
    values: dict[str, Callable[[], object]] = {
        "a number": lambda: 42,
        "False": lambda: False,
        "a class": lambda: Complete,
        "a list": lambda: [Complete()],
        "a text": lambda: "complete\0",
        "an exception": lambda: ValueError("returned"),
        "a generator": lambda: (x for x in "abc"),
        "hostile": Hostile,
    }

    def act(job: Job) -> Any:
        return values[job.id]() if job.id in values else None

    for n, id in enumerate(values):
        world.enqueue(kind.type, id, f"neighbour {n}")
    mux = kind.register(Mux(), act, dsn=world.dsn, max_attempts=2)
    worker = world.worker(mux, is_async=is_async, concurrency=2)
    world.done()
    stored = errors_of(world)
    for id in values:
        world.witness(worker, "retried", id)
        world.witness(worker, "dead", id)
        assert "TypeError: handler " in stored[id]
        assert kind.style in stored[id]
        assert kind.type in stored[id]
    assert set(stored) == set(values)


@HOST
@each_kind
def test_11_delays_of_every_kind_are_settled_together(
    world: World, is_async: bool, kind: Kind
) -> None:
    results: list[Result] = [
        Retry(0),
        Retry(0.05),
        Retry(),
        Retry(timedelta(milliseconds=50)),
        Reschedule(0),
        Reschedule(0.05),
        Reschedule(timedelta(0)),
    ]
    seen: Counter[str] = Counter()

    def act(job: Job) -> Result | None:
        seen[job.id] += 1
        return results[int(job.id) % len(results)] if seen[job.id] == 1 else None

    ids = [str(n) for n in range(6 * len(results))]
    world.enqueue(kind.type, *ids, ledger=False)
    mux = kind.register(Mux(), act, dsn=world.dsn, backoff=lambda attempt: attempt - 1)
    worker = world.worker(mux, is_async=is_async, concurrency=8)
    world.done()
    world.witness(worker, "completed", times=len(ids))
    # No attempt was charged for anything but these failures.
    attempts = {int(event[1]): event[2] for event in worker.of("completed")}
    wrong = {
        n: attempt
        for n, attempt in attempts.items()
        if attempt != (2 if isinstance(results[n % len(results)], Retry) else 1)
    }
    assert wrong == {}
    assert worker.of("error", "lost") == []


def test_11_an_exchange_that_cannot_be_encoded_is_refused_and_claims_nothing(
    world: World,
) -> None:
    world.enqueue("plain", "a", "b", ledger=False)
    link = session_of(world.dsn, notify=False)
    link.open()
    try:
        held = Claimed(Job._make(["\ud800", "q", "plain", *[None] * (len(Job._fields) - 3)]), 1)
        # The driver refuses it before the server sees it, and after the claim was sent.
        unspeakable = Postponed(held, 0.0, None, refund=False)
        with pytest.raises(psycopg.DataError) as error:
            link.exchange(Exchange(claim=Sweep(9, 2), postpone=[unspeakable]))
        world.saw(str(error.value), "surrogates" in str(error.value))
        # Refused, not cut off: only then is the one outcome told from its neighbours.
        assert link.is_open
    finally:
        link.close()
    # A refusal means that no part of the exchange was done.
    assert world.query("select id from bgjob_job where token is not null or attempt > 0") == []


METHODS = [
    "job_started",
    "job_completed",
    "job_rescheduled",
    "job_will_be_retried",
    "job_moved_to_dlq",
    "job_lease_lost",
    "job_cancelled",
    "queue_is_empty",
    "worker_error",
]


class Deaf(NoopObserver):
    """Does something, most likely a wrong one, in each of some methods."""

    def __init__(self, methods: Sequence[str], act: Callable[[str], None]) -> None:
        self.heard: list[str] = []
        for method in methods:
            setattr(self, method, self._made(method, act))

    def _made(self, method: str, act: Callable[[str], None]) -> Callable[..., None]:
        def called(*_: object) -> None:
            self.heard.append(method)
            act(method)

        return called


def provoke(world: World, worker: Local, method: str, gate: threading.Event) -> None:
    """Bring about what a method of an observer is called for."""
    match method:
        case "job_rescheduled":
            world.enqueue("fault", "reschedule", ledger=False)
        case "job_will_be_retried":
            world.enqueue("fault", "retry", ledger=False)
        case "job_moved_to_dlq":
            world.enqueue("fault", "dlq", ledger=False)
        case "job_lease_lost":
            world.enqueue("fault", "lose", ledger=False)
            held = "select 1 from bgjob_job where id = 'lose' and token is not null"
            assert eventually(lambda: world.query(held))
            # As if another worker had it now, for a while.
            world.query(
                "update bgjob_job set token = -1, "
                "lease_until = clock_timestamp() + interval '1 second' where id = 'lose'"
            )
            gate.set()
        case "job_cancelled":
            gate.clear()
            world.enqueue("fault", "cancel", ledger=False)
            assert eventually(lambda: world.client.jobs.cancel("cancel", state="running").running)
            gate.set()
        case "worker_error":
            ended = (
                "select pg_terminate_backend(pid) from pg_stat_activity where "
                "datname = current_database() and application_name = 'bgjob'"
            )
            assert eventually(lambda: world.query(ended))
        case _:
            world.enqueue("fault", ledger=False)


def said(world: World, handler: Callable[[Job], Result | None]) -> Callable[[Job], Result | None]:
    """Report the completed jobs to the oracle, where no observer is left to do so."""

    def handle(job: Job) -> Result | None:
        result = handler(job)
        if result is None:
            world.end(job.id)
        return result

    return handle


def misbehave(gate: threading.Event) -> Callable[[Job], Result | None]:
    rescheduled: list[Job] = []

    def act(job: Job) -> Result | None:
        if job.attempt == 1:
            match job.id:
                case "reschedule" if not rescheduled:
                    rescheduled.append(job)
                    return Reschedule(0)
                case "retry":
                    return Retry(0, error="once")
                case "dlq":
                    return MoveToDlq("why")
                case "lose" | "cancel":
                    assert gate.wait(PATIENCE)
        return None

    return act


@HOST
@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt, GeneratorExit])
def test_11_an_observer_that_raises_in_every_method_harms_nothing(
    world: World, is_async: bool, error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    def act(method: str) -> None:
        raise error(f"in {method}")

    observer = Deaf(METHODS, act)
    gate = threading.Event()
    mux = Mux().register("fault", said(world, misbehave(gate)))
    mux.register("plain", said(world, lambda _: None))
    worker = world.worker(mux, is_async=is_async, observer=observer, concurrency=2)
    for method in METHODS:
        provoke(world, worker, method, gate)
        assert eventually(partial(observer.heard.__contains__, method))
        world.saw(f"{error.__name__} in {method}", method in observer.heard)
    world.enqueue_many("plain", 20, ledger=False)
    world.done()
    assert worker.shutdown()
    logged = {
        str(record.exc_info[1])
        for record in caplog.records
        if record.name == "bgjob"
        and "observer failed" in record.getMessage()
        and record.exc_info is not None
        and isinstance(record.exc_info[1], error)
    }
    assert logged == {f"in {method}" for method in METHODS}


@HOST
@pytest.mark.parametrize("method", METHODS)
def test_11_an_observer_that_blocks_delays_neither_other_jobs_nor_the_shutdown(
    world: World, is_async: bool, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    blocked, released = threading.Event(), threading.Event()

    def act(_: str) -> None:
        if not blocked.is_set():
            blocked.set()
            assert released.wait(2 * PATIENCE)

    observer = Deaf([method], act)
    gate = threading.Event()
    mux = Mux().register("fault", said(world, misbehave(gate)))
    mux.register("plain", said(world, lambda _: None))
    worker = world.worker(mux, is_async=is_async, observer=observer, concurrency=2)
    try:
        provoke(world, worker, method, gate)
        assert blocked.wait(PATIENCE)
        world.saw(f"{method} blocked", blocked.is_set())
        many = world.enqueue_many("plain", 20, ledger=False)
        world.done(*many)
        if method == "job_started":
            # The one that is called where the handler runs: it holds up its own job.
            released.set()
            assert worker.shutdown()
        else:
            assert worker.shutdown()
            assert "observer of queue 'q' blocks" in caplog.text
    finally:
        released.set()
    if method not in {"job_started", "job_moved_to_dlq"}:
        world.enqueue_many("plain", 1, ledger=False)
        world.worker(Mux().register("fault", lambda _: None).register("plain", lambda _: None))
    world.done()


# -- 12: transactional handlers ------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """A method of the handler's connection to be called."""

    method: Literal["commit", "rollback", "close"]


@dataclass(frozen=True)
class Try:
    """A step whose error is swallowed."""

    step: "Step"


@dataclass(frozen=True)
class Nest:
    """Steps inside conn.transaction(); what they raise is swallowed outside of it."""

    steps: "tuple[Step, ...]"


class Child:
    """Enqueue the job's child, with the handler's connection."""


Step = str | Call | Try | Nest | type[Child] | BaseException | Result
"""SQL to run, something to do, or how to end."""

ROW = "ledger row"


class Script:
    """A transactional handler of either colour: it takes the steps of each job and attempt.

    Attributes:
        runs: (job id, attempt) of each run.
        raised: what the steps raised, by job id.

    """

    def __init__(self, world: World, jobs: Mapping[str, Sequence[Sequence[Step]]]) -> None:
        self._jobs = jobs
        self._client = world.client
        self._dsn = world.dsn
        self.runs: list[tuple[str, int]] = []
        self.raised: defaultdict[str, list[BaseException]] = defaultdict(list)

    def runs_of(self, id: str) -> list[int]:
        """The attempts of a job, as they ran."""
        return [attempt for ran, attempt in self.runs if ran == id]

    def _steps(self, job: Job) -> Sequence[Step]:
        self.runs.append((job.id, job.attempt))
        attempts = self._jobs[job.id]
        return attempts[min(len(self.runs_of(job.id)), len(attempts)) - 1]

    def plain(self, job: Job, conn: psycopg.Connection[Any]) -> Result | None:
        return self._take(self._steps(job), job, conn)

    def _take(
        self, steps: Sequence[Step], job: Job, conn: psycopg.Connection[Any]
    ) -> Result | None:
        for step in steps:
            try:
                match step:
                    case str():
                        conn.execute(*_sql(step, job))
                    case Call(method):
                        getattr(conn, method)()
                    case Try(inner):
                        with suppress(psycopg.Error):
                            self._take([inner], job, conn)
                    case Nest(inside):
                        with suppress(psycopg.Error), conn.transaction():
                            self._take(inside, job, conn)
                    case BaseException():
                        raise step
                    case type():
                        self._client.enqueue(_child(job), conn=conn)
                    case _:
                        return step
            except BaseException as error:
                self.raised[job.id].append(error)
                raise
        return None

    async def coroutine(self, job: Job, conn: psycopg.AsyncConnection[Any]) -> Result | None:
        async with AsyncClient(self._dsn) as client:
            return await self._take_async(self._steps(job), job, conn, client)

    async def _take_async(
        self,
        steps: Sequence[Step],
        job: Job,
        conn: psycopg.AsyncConnection[Any],
        client: AsyncClient,
    ) -> Result | None:
        for step in steps:
            try:
                match step:
                    case str():
                        await conn.execute(*_sql(step, job))
                    case Call(method):
                        await getattr(conn, method)()
                    case Try(inner):
                        with suppress(psycopg.Error):
                            await self._take_async([inner], job, conn, client)
                    case Nest(inside):
                        with suppress(psycopg.Error):
                            async with conn.transaction():
                                await self._take_async(inside, job, conn, client)
                    case BaseException():
                        raise step
                    case type():
                        await client.enqueue(_child(job), conn=conn)
                    case _:
                        return step
            except BaseException as error:
                self.raised[job.id].append(error)
                raise
        return None


def _child(job: Job) -> EnqueueRequest:
    return EnqueueRequest("q", "plain", id=f"{job.id}/0")


def _sql(step: str, job: Job) -> tuple[bytes, Sequence[object] | None]:
    if step == ROW:
        return LEDGER_ROW.encode(), [job.id, job.attempt, "transactional", 0]
    return step.encode(), None


class Stage:
    """A worker of one colour that runs transactional jobs and their neighbours."""

    def __init__(self, world: World, *, is_async: bool, style: Literal["plain", "coroutine"]):
        self.world = world
        self._is_async = is_async
        self._kind = Kind(style, transactional=True)

    def play(self, *attempts: Sequence[Step], max_attempts: int = 3, **arg: Any) -> Script:
        """Run the job "a", with these steps, and neighbours, until they are done."""
        return self.play_all({"a": attempts}, max_attempts=max_attempts, **arg)

    def play_all(
        self, jobs: Mapping[str, Sequence[Sequence[Step]]], *, max_attempts: int = 3, **arg: Any
    ) -> Script:
        """Run these jobs, each with the steps of its attempts, and neighbours."""
        world = self.world
        script = Script(world, jobs)
        mux = Mux().register("plain", self._run_child)
        register: Any = mux.register
        register(
            "transactional",
            script.plain if self._kind.style == "plain" else script.coroutine,
            transactional=True,
            max_attempts=max_attempts,
            backoff=lambda _: 0.05,
        )
        self._kind.register(mux, lambda _: None, type="neighbour")
        # Claimed together with them, and on their connections before and after.
        neighbours = []
        for n, id in enumerate(jobs):
            neighbours += world.enqueue("neighbour", f"before {n}", ledger=False)
            world.enqueue("transactional", id, **arg)
            neighbours += world.enqueue("neighbour", f"after {n}", f"later {n}", ledger=False)
        self.worker = world.worker(mux, is_async=self._is_async, concurrency=2)
        world.done()
        for neighbour in neighbours:
            self.worker.wait_for("completed", neighbour)
        failed = self.worker.of("retried", "dead", "lost")
        assert [event for event in failed if event[1] in neighbours] == []
        assert world.value("select count(*) from public.ledger where kind = 'neighbour'") == len(
            neighbours
        )
        return script

    def _run_child(self, job: Job) -> None:
        self.world.query(LEDGER_ROW, [job.id, job.attempt, job.type, 0])

    def children(self, id: str = "a") -> int:
        """How many children a job has or had."""
        return self.world.live(f"{id}/0") + self.world.rows(f"{id}/0")


@pytest.fixture(
    params=[(False, "plain"), (False, "coroutine"), (True, "coroutine")],
    ids=["Worker-plain", "Worker-coroutine", "AsyncWorker-coroutine"],
)
def stage(request: pytest.FixtureRequest, world: World) -> Stage:
    is_async, style = request.param
    return Stage(world, is_async=is_async, style=style)


def test_12_effect_children_and_settlement_come_together(stage: Stage, world: World) -> None:
    stage.play([ROW, Child, "select pg_sleep(0.2)"], children=1)
    world.witness(stage.worker, "completed", "a")
    world.witness(stage.worker, "completed", "a/0")
    assert (world.rows("a"), world.rows("a/0")) == (1, 1)
    # The child was not seen before the parent's commit.
    order = [event[1] for event in stage.worker.of("started", "completed") if "a" in event[1]]
    assert order.index("a/0") > order.index("a")
    [[parent, child]] = world.query(
        "select max(at) filter (where job_id = 'a') + interval '0.2 s', "
        "max(at) filter (where job_id = 'a/0') from ledger"
    )
    assert child >= parent


def test_12_a_job_that_moves_itself_to_the_dlq_keeps_its_effect_and_children(
    stage: Stage, world: World
) -> None:
    stage.play([ROW, Child, MoveToDlq("why")], then="dlq", children=1)
    world.witness(stage.worker, "dead", "a")
    world.witness(stage.worker, "completed", "a/0")
    assert errors_of(world) == {"a": "why"}
    assert (world.rows("a"), world.rows("a/0")) == (1, 1)


def test_12_a_job_that_reschedules_itself_keeps_the_effects_of_each_run(
    stage: Stage, world: World
) -> None:
    half = "insert into ledger (job_id, attempt, kind, pid) values ('a', 1, 'rescheduled', 0)"
    script = stage.play([half, Child, Reschedule(0)], [ROW], then="reschedule", children=1)
    world.witness(stage.worker, "rescheduled", "a")
    world.witness(stage.worker, "completed", "a")
    assert (world.rows("a", "rescheduled"), world.rows("a", "transactional")) == (1, 1)
    assert script.runs_of("a") == [1, 1]


FAILURES: dict[str, tuple[list[Step], str]] = {
    "sql fails": ([ROW, Child, "select 1 / 0"], "DivisionByZero"),
    "sql fails at the first": (["select 1 / 0", ROW], "DivisionByZero"),
    "sql fails and is swallowed": ([ROW, Child, Try("select 1 / 0")], "InFailedSqlTransaction"),
    "sql fails, swallowed, reschedules": (
        [ROW, Try("select 1 / 0"), Reschedule(0)],
        "InFailedSqlTransaction",
    ),
    "sql fails, swallowed, to the dlq": (
        [ROW, Try("select 1 / 0"), MoveToDlq("why")],
        "InFailedSqlTransaction",
    ),
    "raises": ([ROW, Child, ValueError("after the children")], "ValueError: after the children"),
    "exits": ([ROW, Child, SystemExit("after the children")], "SystemExit: after the children"),
    "retries": ([ROW, Child, Retry(0, error="after the children")], "after the children"),
    "retries by policy": ([ROW, Child, Retry(error="after the children")], "after the children"),
    "conn.commit()": ([ROW, Child, Call("commit")], "ProgrammingError"),
    "conn.rollback()": ([ROW, Child, Call("rollback")], "ProgrammingError"),
    "conn.close()": ([ROW, Child, Call("close")], "Error"),
    "conn.close(), then more": ([ROW, Call("close"), Child], "Error"),
    "a deferred constraint": (
        [ROW, Child, "insert into parent_of values ('nobody')"],
        "ForeignKeyViolation",
    ),
    "a deferred constraint, reschedules": (
        [ROW, "insert into parent_of values ('nobody')", Reschedule(0)],
        "ForeignKeyViolation",
    ),
    "a deferred constraint, to the dlq": (
        [ROW, "insert into parent_of values ('nobody')", MoveToDlq("why")],
        "ForeignKeyViolation",
    ),
    "the connection is killed": (
        [ROW, Child, "select pg_terminate_backend(pg_backend_pid())"],
        "AdminShutdown",
    ),
    "the tables are out of sight": (
        [ROW, "set search_path to pg_catalog"],
        "UndefinedTable",
    ),
}


def test_12_a_transaction_that_fails_leaves_nothing_and_the_failure_is_recorded(
    stage: Stage, world: World
) -> None:
    world.query("create table nobody (id text primary key)")
    world.query("create table parent_of (id text references nobody deferrable initially deferred)")
    jobs: dict[str, list[list[Step]]] = {}
    for case, (steps, _) in FAILURES.items():
        jobs[f"{case}: recovers"] = [steps, steps, [ROW]]
        jobs[f"{case}: dies"] = [steps]
    script = stage.play_all(jobs, max_attempts=3)
    assert stage.worker.of("lost", "error") == []
    stored = errors_of(world)
    told = {event[1]: event[-1] for event in stage.worker.of("retried")}
    for case, (_, error) in FAILURES.items():
        world.witness(stage.worker, "completed", f"{case}: recovers")
        world.witness(stage.worker, "dead", f"{case}: dies")
        for id in (f"{case}: recovers", f"{case}: dies"):
            world.witness(stage.worker, "retried", id, times=2)
            assert (id, error in told[id]) == (id, True), told[id]
            assert (id, script.runs_of(id)) == (id, [1, 2, 3])
            assert (id, stage.children(id)) == (id, 0)
        assert (case, error in stored[f"{case}: dies"]) == (case, True), stored[f"{case}: dies"]
    assert world.query("select 1 from parent_of") == []


@pytest.mark.parametrize("method", ["commit", "rollback"])
def test_12_the_connection_explains_why_it_does_not_end_the_transaction(
    stage: Stage, world: World, method: Literal["commit", "rollback"]
) -> None:
    script = stage.play([ROW, Try(Call(method)), Child], children=1)
    world.witness(stage.worker, "completed", "a")
    [error, *_] = script.raised["a"]
    assert isinstance(error, psycopg.ProgrammingError)
    assert "transaction" in str(error)
    world.witness(stage.worker, "completed", "a/0")
    assert (world.rows("a"), world.rows("a/0")) == (1, 1)


ENDINGS: dict[str, tuple[list[Step], int]] = {
    "commit": ([ROW, "commit"], 1),
    "COMMIT WORK": ([ROW, "/* done */ COMMIT WORK;"], 1),
    "end": ([ROW, "end"], 1),
    "commit, then more": ([ROW, "commit", "select 1"], 1),
    "commit, then begin": ([ROW, "commit", "begin", "select 1"], 1),
    "commit and chain": ([ROW, "commit and chain", "select 1"], 1),
    "commit, then fails": ([ROW, "commit", "begin", Try("select 1 / 0")], 1),
    "commit, then closes": ([ROW, "commit", Call("close")], 1),
    "commit, then raises": ([ROW, "commit", ValueError("after the commit")], 1),
    "commit, then retries": ([ROW, "commit", Retry(0, error="after the commit")], 1),
    "commit, then to the dlq": ([ROW, "commit", MoveToDlq("after the commit")], 1),
    "commit, then reschedules": ([ROW, "commit", Reschedule(0)], 1),
    "rollback": ([ROW, "rollback"], 0),
    "abort, then more": ([ROW, "abort", "select 1"], 0),
    "rollback, then begin": ([ROW, "rollback", "begin", "select 1"], 0),
    "rollback and chain": ([ROW, "rollback and chain", "select 1"], 0),
}


def test_12_raw_sql_that_ends_the_transaction_is_reported_and_not_repeated(
    stage: Stage, world: World
) -> None:
    script = stage.play_all({case: [steps] for case, (steps, _) in ENDINGS.items()}, ledger=False)
    stored = errors_of(world)
    for case, (_, effects) in ENDINGS.items():
        world.witness(stage.worker, "dead", case)
        assert (case, script.runs_of(case)) == (case, [1])
        assert (case, world.rows(case)) == (case, effects)
        assert "transaction" in stored[case]
        assert "commit" in stored[case]


def test_12_children_of_a_transaction_that_was_committed_by_hand_exist_once(
    stage: Stage, world: World
) -> None:
    script = stage.play([ROW, Child, "commit"], ledger=False, children=1)
    world.witness(stage.worker, "dead", "a")
    world.witness(stage.worker, "completed", "a/0")
    assert script.runs_of("a") == [1]
    assert (world.rows("a"), world.rows("a/0")) == (1, 1)


def test_12_a_part_of_the_transaction_may_fail_and_the_rest_be_kept(
    stage: Stage, world: World
) -> None:
    script = stage.play(
        [
            Nest((Child, "select 1 / 0")),
            "savepoint s",
            ROW,
            "rollback to s",
            Nest((ROW,)),
        ]
    )
    world.witness(stage.worker, "completed", "a")
    assert script.runs_of("a") == [1]
    assert (world.rows("a"), stage.children()) == (1, 0)


SETTINGS: dict[str, list[Step]] = {
    "statement_timeout": [ROW, "set statement_timeout = '1ms'", "select 1"],
    "role": [ROW, "set session authorization default", "set role nobody_at_all"],
    "read only": [ROW, "set session characteristics as transaction read only"],
    "isolation": [
        ROW,
        "set session characteristics as transaction isolation level serializable, read only",
    ],
    "search_path": [
        ROW,
        "set search_path to public, pg_temp; set search_path to elsewhere, public",
    ],
    "temporary table": [ROW, "create temporary table ledger (like public.ledger)"],
    "prepared statement": [ROW, "prepare p as select 1"],
    "lock": [ROW, "select pg_advisory_lock(7)"],
    "listen": [ROW, "listen bgjob_1"],
    "cursor": [ROW, "declare c cursor with hold for select 1"],
}


@pytest.mark.parametrize("case", SETTINGS)
def test_12_changes_of_a_transaction_to_its_session_do_not_reach_the_next_job(
    stage: Stage, world: World, case: str
) -> None:
    role = f"nobody_{world.value('select current_database()')}"
    world.query(f"create role {role}")
    try:
        world.query(f"grant all on all tables in schema public to {role}")
        world.query("create schema elsewhere create table ledger (like public.ledger)")
        steps = [
            step.replace("nobody_at_all", role) if isinstance(step, str) else step
            for step in SETTINGS[case]
        ]
        stage.play(steps)
        world.witness(stage.worker, "completed", "a")
        assert stage.worker.shutdown()
    finally:
        world.query(f"drop owned by {role}; drop role {role}")


@pytest.mark.both_colours
@HOST
def test_12_settings_that_a_handler_makes_on_its_connection_do_not_reach_the_next_job(
    world: World, is_async: bool
) -> None:
    rows: list[Any] = []

    def spoil(job: Job, conn: psycopg.Connection[Any]) -> None:
        rows.append(conn.execute("select 1 as n").fetchone())
        conn.execute("do $$ begin raise notice 'heard by whom?'; end $$")
        conn.row_factory = dict_row
        conn.prepare_threshold = None
        conn.add_notice_handler(lambda _: rows.append("notice"))
        conn.execute(LEDGER_ROW, [job.id, job.attempt, job.type, 0])

    async def spoil_async(job: Job, conn: psycopg.AsyncConnection[Any]) -> None:
        rows.append(await (await conn.execute("select 1 as n")).fetchone())
        await conn.execute("do $$ begin raise notice 'heard by whom?'; end $$")
        conn.row_factory = dict_row
        conn.prepare_threshold = None
        conn.add_notice_handler(lambda _: rows.append("notice"))
        await conn.execute(LEDGER_ROW, [job.id, job.attempt, job.type, 0])

    mux = Mux()
    if is_async:
        mux.register("transactional", spoil_async, transactional=True)
    else:
        mux.register("transactional", spoil, transactional=True)
    ids = world.enqueue_many("transactional", 10)
    worker = world.worker(mux, is_async=is_async)
    world.done()
    world.witness(worker, "completed", times=len(ids))
    assert rows == [(1,)] * len(ids)


@pytest.mark.both_colours
@HOST
def test_12_a_handler_that_leaves_its_connection_busy_fails_its_own_attempt(
    world: World, is_async: bool
) -> None:
    def copy(job: Job, conn: psycopg.Connection[Any]) -> None:
        conn.execute(LEDGER_ROW, [job.id, job.attempt, job.type, 0])
        if job.id == "busy" and job.attempt == 1:
            conn.pgconn.send_query(b"copy ledger from stdin")

    async def copy_async(job: Job, conn: psycopg.AsyncConnection[Any]) -> None:
        await conn.execute(LEDGER_ROW, [job.id, job.attempt, job.type, 0])
        if job.id == "busy" and job.attempt == 1:
            conn.pgconn.send_query(b"copy ledger from stdin")

    mux = Mux()
    register: Any = mux.register
    policy: dict[str, Any] = {"transactional": True, "backoff": lambda _: 0.05}
    register("transactional", copy_async if is_async else copy, **policy)
    world.enqueue("transactional", "busy", "a", "b", "c")
    worker = world.worker(mux, is_async=is_async)
    world.done()
    world.witness(worker, "retried", "busy")
    for id in ("busy", "a", "b", "c"):
        world.witness(worker, "completed", id)


def test_12_do_keeps_the_promise_of_transactional_handlers(world: World) -> None:
    def handler(job: Job, conn: psycopg.Connection[Any]) -> Result | None:
        conn.execute(LEDGER_ROW, [job.id, job.attempt, job.type, 0])
        world.client.enqueue(EnqueueRequest("q2", "plain", id=f"{job.id}/0"), conn=conn)
        if job.id == "fails":
            raise ValueError("no")
        if job.id == "commits":
            conn.execute("commit")
        return None

    mux = Mux().register("transactional", handler, transactional=True)
    results: dict[str, Any] = {}
    for id in ("succeeds", "fails", "commits"):
        world.enqueue("transactional", id, ledger=id != "commits")
        results[id] = world.client.do("q", mux)
    assert results["succeeds"] == Complete()
    assert isinstance(results["fails"], Retry)
    assert isinstance(results["commits"], MoveToDlq)
    world.saw("the failure is recorded", errors_of(world)["fails"].startswith("ValueError: no\n"))
    world.saw("the commit is recorded", "transaction" in errors_of(world)["commits"])
    assert [world.rows(id) for id in results] == [1, 0, 1]
    assert [world.live(f"{id}/0") for id in results] == [1, 0, 1]


def test_12_do_of_an_async_client_keeps_the_promise_of_transactional_handlers(
    world: World,
) -> None:
    async def handler(job: Job, conn: psycopg.AsyncConnection[Any]) -> Result | None:
        await conn.execute(LEDGER_ROW, [job.id, job.attempt, job.type, 0])
        if job.id == "fails":
            raise ValueError("no")
        if job.id == "commits":
            await conn.execute("commit")
        return None

    mux = Mux().register("transactional", handler, transactional=True)
    results: dict[str, Any] = {}

    async def do() -> Result:
        async with AsyncClient(world.dsn) as client:
            return await client.do("q", mux)

    for id in ("succeeds", "fails", "commits"):
        world.enqueue("transactional", id, ledger=id != "commits")
        results[id] = world.run(do())
    assert results["succeeds"] == Complete()
    assert isinstance(results["fails"], Retry)
    assert isinstance(results["commits"], MoveToDlq)
    world.saw("the failure is recorded", errors_of(world)["fails"].startswith("ValueError: no\n"))
    assert [world.rows(id) for id in results] == [1, 0, 1]
    with Client(world.dsn) as client:
        assert client.dlq.get("commits") is not None
