"""An observer receives the events that it handles, and an event without an observer is free."""

import asyncio
import logging
import threading
import weakref
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from support.jobs import a_job
from support.waiting import NEVER, eventually
from support.workers import Launcher, Style, both_styles
from support.workers import handler as of_style

from bgjob import (
    Client,
    Complete,
    EnqueueRequest,
    Event,
    Job,
    JobCompleted,
    JobLeaseLost,
    JobMovedToDlq,
    JobRescheduled,
    JobStarted,
    JobTimedOut,
    JobWillBeRetried,
    LoggingObserver,
    MoveToDlq,
    Mux,
    NoopObserver,
    Observer,
    QueueIsEmpty,
    Reschedule,
    Result,
    Retry,
    Worker,
    WorkerError,
    only,
)
from bgjob._engine.outcome import Outcome
from bgjob._sql.settlements import Claimed
from bgjob._worker.clock import ServerClock
from bgjob._worker.events import Events
from bgjob._worker.observers import combined
from bgjob.observer import takes_times
from bgjob.testing import RecordingObserver

METHODS = {
    "job_started": JobStarted,
    "job_completed": JobCompleted,
    "job_rescheduled": JobRescheduled,
    "job_will_be_retried": JobWillBeRetried,
    "job_moved_to_dlq": JobMovedToDlq,
    "job_lease_lost": JobLeaseLost,
    "job_timed_out": JobTimedOut,
    "queue_is_empty": QueueIsEmpty,
    "worker_error": WorkerError,
}

JOB = a_job()
OF_A_JOB: list[Event] = [
    JobStarted(JOB),
    JobCompleted(JOB),
    JobRescheduled(JOB, 1.0),
    JobWillBeRetried(JOB, 2.0, "why"),
    JobMovedToDlq(JOB, "why"),
    JobLeaseLost(JOB),
    JobTimedOut(JOB, 3.0),
]
ALL: list[Event] = [*OF_A_JOB, QueueIsEmpty("q"), WorkerError(OSError("gone"))]


def tell(observer: Observer, events: list[Event]) -> None:
    """Call an observer's method for each event, as a worker does."""
    names = {event: name for name, event in METHODS.items()}
    for event in events:
        arguments = [
            getattr(event, name) for name in event.__slots__ if name not in ("ran", "waited")
        ]
        method = getattr(observer, names[type(event)])
        method(*arguments, *((event,) if takes_times(method) else ()))


class Before(Observer):
    """An observer that has some of the protocol's methods, and inherits the rest."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def job_completed(self, job: Job, /) -> None:
        self.heard.append(f"completed {job.id}")


def make_before() -> Any:
    kind: Any = Before  # for a type checker it lacks what it inherits
    return kind()


class Old:
    """An observer that was written before there were timeouts, and has no base."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def job_completed(self, job: Job, /) -> None:
        self.heard.append(f"completed {job.id}")

    def job_lease_lost(self, job: Job, /) -> None:
        self.heard.append(f"lost {job.id}")


# -- a worker tells -------------------------------------------------------------------------


def test_a_function_receives_each_event_as_a_value(launcher: Launcher) -> None:
    def act(job: Job) -> Result | None:
        match job.type, job.attempt:
            case "retry", 1:
                return Retry(0.01, "once")
            case "dlq", _:
                return MoveToDlq("why")
            case "reschedule", _ if job.id not in rescheduled:
                rescheduled.add(job.id)
                return Reschedule(0.02)
        return None

    rescheduled: set[str] = set()
    recording = RecordingObserver()
    told: list[Event] = []
    mux = Mux()
    for type_ in ("done", "retry", "dlq", "reschedule"):
        mux.register(type_, act)
        launcher.enqueue(type_, type=type_)
    launcher.start(mux, observer=[recording, told.append], poll_interval=NEVER)
    recording.wait_for(JobCompleted, count=3)
    recording.wait_for(QueueIsEmpty)
    assert [e.job.attempt for e in recording.of(JobStarted, id="retry")] == [1, 2]
    [retried] = recording.of(JobWillBeRetried)
    assert (retried.job.id, retried.delay, retried.error) == ("retry", 0.01, "once")
    [moved] = recording.of(JobMovedToDlq)
    assert (moved.job.id, moved.error) == ("dlq", "why")
    [again] = recording.of(JobRescheduled)
    assert (again.job.id, again.delay) == ("reschedule", 0.02)
    assert {e.job.id for e in recording.of(JobCompleted)} == {"done", "retry", "reschedule"}
    assert recording.of(QueueIsEmpty)[0] == QueueIsEmpty("q")
    assert eventually(lambda: len(told) == len(recording.events))
    assert sorted(map(repr, told)) == sorted(map(repr, recording.events))


@both_styles
def test_a_function_learns_how_long_a_job_waited_and_ran(
    launcher: Launcher, conn: psycopg.Connection, caplog: pytest.LogCaptureFixture, style: Style
) -> None:
    caplog.set_level(logging.DEBUG, logger="bgjob")
    ran, hour = 0.02, 3600.0
    released = threading.Event()

    def act(job: Job) -> Result | None:
        released.wait(ran)
        match job.id:
            case "dlq":
                return MoveToDlq("why")
            case "reschedule" if job.attempt == 1 and not any(recording.of(JobRescheduled)):
                return Reschedule(NEVER)
            case "retry":
                return Retry(NEVER, "why")
        return None

    def hang(_: Job) -> None:
        released.wait(NEVER)

    async def hang_too(_: Job) -> None:
        await asyncio.Event().wait()

    def transact(job: Job, _: psycopg.Connection) -> Result | None:
        return act(job)

    recording = RecordingObserver()
    mux = Mux().register("t", of_style(style, act))
    mux.register("transact", transact, transactional=True)
    hangs = hang if style == "plain" else hang_too
    mux.register("hang", hangs, timeout=ran, max_attempts=1)
    launcher.enqueue("done", "dlq", "reschedule", "retry")
    for type_ in ("unknown", "hang", "transact"):
        launcher.enqueue(type_, type=type_)
    conn.execute("update bgjob_job set next_run_at = next_run_at - interval '1 hour'")
    launcher.start(mux, observer=[LoggingObserver(), recording], concurrency=3)
    recording.wait_for(JobCompleted, count=2)
    recording.wait_for(JobMovedToDlq, count=3)
    recording.wait_for(JobWillBeRetried)
    recording.wait_for(JobRescheduled)
    released.set()
    ends = (JobCompleted, JobRescheduled, JobWillBeRetried, JobMovedToDlq)
    told = [event for event in recording.events if isinstance(event, ends)]
    assert {(e.job.id, e.ran is None or e.ran >= ran) for e in told} == {
        (id_, True) for id_ in ("done", "dlq", "reschedule", "retry", "unknown", "hang", "transact")
    }
    for event in told:
        not_run = event.job.id == "unknown"
        assert (event.ran is None) is (event.waited is None) is not_run
    waits = {e.job.id: e.waited for e in (*told, *recording.of(JobStarted)) if e.waited is not None}
    assert len(waits) == 6
    assert all(hour <= waited < 2 * hour for waited in waits.values())
    fields = [
        (getattr(r, "job_id"), getattr(r, "job_seconds", None), getattr(r, "job_waited", None))
        for r in caplog.records
        if getattr(r, "job_event", None) not in (None, "started", "timed_out")
    ]
    assert sorted(fields, key=str) == sorted(((e.job.id, e.ran, e.waited) for e in told), key=str)


def test_an_observer_that_raises_does_not_keep_events_from_other_observers(
    launcher: Launcher, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(NoopObserver):
        def job_started(self, job: Job, /) -> None:
            raise SystemExit("broken at the start")

        def job_completed(self, job: Job, /) -> None:
            raise ValueError("broken at the end")

    first, last = RecordingObserver(), RecordingObserver()
    launcher.enqueue("a", "b")
    launcher.start(Mux().register("t", lambda _: None), observer=(first, Broken(), last))
    for recording in (first, last):
        recording.wait_for(JobCompleted, count=2)
        assert len(recording.of(JobStarted)) == 2
    logged = [r for r in caplog.records if "observer failed" in r.getMessage()]
    assert sorted(str(r.exc_info[1]) for r in logged if r.exc_info) == [
        *["broken at the end"] * 2,
        *["broken at the start"] * 2,
    ]


def test_each_filter_passes_only_its_queues_types_and_schedules(launcher: Launcher) -> None:
    everything, mail, other, nightly = (RecordingObserver() for _ in range(4))
    dead: list[Event] = []
    mux = Mux().register("t", lambda _: None).register("bad", lambda _: MoveToDlq("why"))
    observers = [
        everything,
        only(mail, queue="mail"),
        only(other, queue={"other", "third"}),
        only(nightly, schedule="nightly"),
        only(dead.append, JobMovedToDlq, type="bad"),
    ]
    for queue in ("mail", "other"):
        launcher.start(mux, queue, observer=observers)
        launcher.enqueue(f"schedule:nightly:{queue}", f"schedule:nightly-2:{queue}", queue=queue)
        launcher.enqueue(f"{queue}-bad", queue=queue, type="bad")
    everything.wait_for(JobCompleted, count=4)
    everything.wait_for(JobMovedToDlq, count=2)
    everything.wait_for(QueueIsEmpty, count=2)
    nightly.wait_for(JobCompleted, count=2)
    mail.wait_for(QueueIsEmpty)
    other.wait_for(QueueIsEmpty)
    assert eventually(lambda: len(dead) == 2)
    for recording, queue in ((mail, "mail"), (other, "other")):
        assert {e.queue for e in recording.of(QueueIsEmpty)} == {queue}
        assert {e.job.queue for e in recording.of(JobStarted)} == {queue}
        assert len(recording.of(JobCompleted)) == 2
        assert [e.job.id for e in recording.of(JobMovedToDlq)] == [f"{queue}-bad"]
    assert {type(e) for e in nightly.events} == {JobStarted, JobCompleted}
    assert {e.job.id for e in nightly.of(JobCompleted)} == {
        "schedule:nightly:mail",
        "schedule:nightly:other",
    }
    assert sorted(e.job.id for e in dead if isinstance(e, JobMovedToDlq)) == [
        "mail-bad",
        "other-bad",
    ]


def test_a_list_without_an_observer_that_logs_logs_nothing(
    dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    recording = RecordingObserver()
    with Client(dsn) as client:
        client.enqueue(EnqueueRequest("q", "unknown"))
        with (
            caplog.at_level(logging.DEBUG, logger="bgjob"),
            Worker(client, "q", Mux(), observer=[recording]),
        ):
            recording.wait_for(JobMovedToDlq)
        with Worker(client, "q", Mux(), observer=[]):
            client.enqueue(EnqueueRequest("q", "unknown"))
            assert eventually(lambda: len(client.dlq.list()) == 2)
    assert [r for r in caplog.records if r.name == "bgjob"] == []


def test_an_observer_without_items_is_one_all_the_same(dsn: str) -> None:
    class Counting(RecordingObserver):
        def __len__(self) -> int:
            return len(self.events)

    recording = Counting()
    with Client(dsn) as client, Worker(client, "q", Mux(), observer=recording):
        client.enqueue(EnqueueRequest("q", "unknown"))
        recording.wait_for(JobMovedToDlq)


# -- who listens ----------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [lambda o: o, lambda o: [o], lambda o: [o, NoopObserver()]])
def test_every_event_reaches_a_function_and_an_observer_alike(
    wrap: Callable[[Any], Any],
) -> None:
    recording = RecordingObserver()
    tell(combined(wrap(recording)), ALL)
    assert recording.events == ALL


def test_an_observer_is_called_with_the_arguments_of_its_methods() -> None:
    heard: list[tuple[Any, ...]] = []

    class Watching(NoopObserver):
        def job_timed_out(self, job: Job, seconds: float, /) -> None:
            heard.append(("timed out", job.id, seconds))

        def job_will_be_retried(self, job: Job, delay: float, error: Any, /) -> None:
            heard.append(("retried", job.id, delay, error))

    tell(combined([Watching(), NoopObserver()]), ALL)
    assert heard == [("retried", "id", 2.0, "why"), ("timed out", "id", 3.0)]


@pytest.mark.parametrize("make", [make_before, Old])
def test_an_observer_that_lacks_a_method_receives_the_other_events(
    make: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> None:
    old, recording = make(), RecordingObserver()
    alone = make()
    for observer in ([old, recording], alone):
        events = Events(combined(observer), "q")
        events.open()
        events.tell([JobTimedOut(JOB, 3.0), JobLeaseLost(JOB)])
        events.close(5)
        tell(combined(observer), ALL)
    expected = ["lost id", "completed id", "lost id"] if make is Old else ["completed id"]
    assert old.heard == alone.heard == expected
    assert recording.events == [JobTimedOut(JOB, 3.0), JobLeaseLost(JOB), *ALL]
    assert caplog.records == []


@pytest.mark.parametrize(
    "deaf",
    [
        NoopObserver(),
        make_before(),
        [],
        [NoopObserver(), NoopObserver()],
        only(NoopObserver(), queue="q"),
        only(RecordingObserver(), JobMovedToDlq, type="t"),
        [NoopObserver(), only(RecordingObserver(), JobTimedOut, QueueIsEmpty)],
    ],
)
def test_events_without_an_observer_are_known_before_the_first_job(deaf: Any) -> None:
    assert Events(combined(deaf), "q").started(ServerClock()) is None
    whole = combined(deaf)
    if not isinstance(deaf, Before):
        for method in ("job_started", "job_completed"):
            assert getattr(whole, method).__func__ is getattr(NoopObserver, method)


def test_the_only_observer_of_an_event_among_many_is_called_directly() -> None:
    class Watching(NoopObserver):
        def job_completed(self, job: Job, /) -> None:
            raise AssertionError

    watching = Watching()
    crowd = combined([NoopObserver(), watching, only(RecordingObserver(), JobTimedOut)])
    assert crowd.job_completed == watching.job_completed
    assert combined(watching) is watching


@pytest.mark.parametrize(
    ("options", "heard"),
    [
        ({}, ALL),
        ({"queue": "q"}, [*OF_A_JOB, QueueIsEmpty("q")]),
        ({"queue": ["other", "q"]}, [*OF_A_JOB, QueueIsEmpty("q")]),
        ({"queue": "other"}, []),
        ({"type": "t"}, OF_A_JOB),
        ({"type": {"t", "u"}, "queue": "q"}, OF_A_JOB),
        ({"type": "u"}, []),
        ({"schedule": "id"}, []),
    ],
)
def test_filters_must_all_match_and_forward_the_matching_events(
    options: dict[str, Any], heard: list[Event]
) -> None:
    recording = RecordingObserver()
    tell(only(recording, **options), ALL)
    assert recording.events == heard


@pytest.mark.parametrize(
    ("id_", "fits"),
    [
        ("schedule:nightly:2026-01-01T00:00:00Z", True),
        ("schedule:nightly", True),
        ("schedule:nightly-2:1", False),
        ("nightly:1", False),
        ("my schedule:nightly:1", False),
    ],
)
def test_a_schedule_is_known_by_the_ids_of_its_jobs(id_: str, fits: bool) -> None:
    recording = RecordingObserver()
    job = JOB._replace(id=id_)
    tell(only(recording, schedule=["other", "nightly"]), [JobCompleted(job)])
    assert recording.events == ([JobCompleted(job)] if fits else [])


def test_filters_nest() -> None:
    recording = RecordingObserver()
    inner = only(recording, JobCompleted, JobTimedOut)
    tell(only(only(inner, queue="q"), JobTimedOut, JobStarted), ALL)
    assert recording.events == [JobTimedOut(JOB, 3.0)]


async def a_coroutine(_: Event) -> None: ...


class AsyncCallable:
    async def __call__(self, _: Event) -> None: ...


@pytest.mark.parametrize(
    ("observer", "text"),
    [
        (NoopObserver, r"not a class: pass NoopObserver\(\)"),
        (a_coroutine, "pass a plain function"),
        (AsyncCallable(), "pass a plain function"),
        (7, "7 is not an observer: pass an Observer, a function of an event, or a list"),
        ([NoopObserver(), 7], "7 is not an observer"),
        ("q", "'q' is not an observer"),
        ([[NoopObserver()]], "is not an observer"),
    ],
)
def test_an_object_that_is_not_an_observer_is_refused_by_the_constructor(
    dsn: str, observer: Any, text: str
) -> None:
    with Client(dsn) as client, pytest.raises(TypeError, match=text):
        Worker(client, "q", Mux(), observer=observer)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda only: only(print, "mail"), TypeError, "'mail' is not an event: pass classes"),
        (lambda only: only(print, JobStarted(JOB)), TypeError, "is not an event"),
        (lambda only: only(print, queue=""), ValueError, "queue must have 1 to 255 characters"),
        (lambda only: only(print, queue=[]), ValueError, "queue names nothing"),
        (lambda only: only(print, type=7), TypeError, "type must be a str, not int"),
        (lambda only: only(print, schedule=["a\0b"]), ValueError, "schedule must not contain NUL"),
        (lambda only: only(7), TypeError, "7 is not an observer"),
    ],
)
def test_a_filter_that_can_match_nothing_is_refused(
    make: Callable[[Any], Any], error: type[Exception], text: str
) -> None:
    untyped: Any = only
    with pytest.raises(error, match=text):
        make(untyped)


# -- logging ----------------------------------------------------------------------------------


def test_the_event_is_in_the_fields_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="bgjob"):
        tell(LoggingObserver(), OF_A_JOB)
    found = [
        (r.levelname, getattr(r, "job_event"), getattr(r, "job_delay", None))
        for r in caplog.records
    ]
    assert found == [
        ("DEBUG", "started", None),
        ("DEBUG", "completed", None),
        ("DEBUG", "rescheduled", 1.0),
        ("WARNING", "will_be_retried", 2.0),
        ("ERROR", "moved_to_dlq", None),
        ("WARNING", "lease_lost", None),
        ("WARNING", "timed_out", None),
    ]
    timed_out = caplog.records[-1]
    assert getattr(timed_out, "job_timeout") == 3.0
    assert timed_out.getMessage() == "t id (attempt 1) outlived its timeout of 3 s"
    assert {(getattr(r, "job_id"), getattr(r, "job_queue")) for r in caplog.records} == {
        ("id", "q")
    }


def test_an_empty_queue_is_named_in_the_fields_of_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.DEBUG, logger="bgjob"):
        LoggingObserver().queue_is_empty("mail")
    assert getattr(caplog.records[0], "job_queue") == "mail"


# -- the thread ---------------------------------------------------------------------------------


def test_a_start_is_told_where_the_handler_runs_and_the_rest_elsewhere(dsn: str) -> None:
    ran: list[int] = []
    heard: dict[type[Event], int] = {}

    def observe(event: Event) -> None:
        heard[type(event)] = threading.get_ident()

    mux = Mux().register("t", lambda _: ran.append(threading.get_ident()))
    with Client(dsn) as client, Worker(client, "q", mux, observer=observe):
        client.enqueue(EnqueueRequest("q", "t"))
        assert eventually(lambda: JobCompleted in heard)
    assert heard[JobStarted] == ran[0] != heard[JobCompleted]


def test_an_observer_that_blocks_keeps_only_a_few_payloads() -> None:
    blocked, released = threading.Event(), threading.Event()

    class Blocks(NoopObserver):
        def job_completed(self, job: Job, /) -> None:
            blocked.set()
            released.wait(20.0)

    events = Events(Blocks(), "q")
    events.open()
    job = a_job()._replace(arg=bytes(65536))
    outcome = Outcome(Claimed(job, 1), Complete(), 0.0)
    events.tell([outcome])
    assert blocked.wait(20.0)
    for _ in range(10):
        events.tell([outcome] * 500)
    assert 1000 <= len(events._waiting) <= 2100
    released.set()
    events.close(20.0)


@both_styles
def test_failures_that_wait_for_an_observer_keep_few_variables_and_tracebacks(
    dsn: str, style: Style
) -> None:
    class Large:
        pass

    kept: weakref.WeakSet[Large] = weakref.WeakSet()
    released, told = threading.Event(), list[bool]()

    def fail(job: Job) -> None:
        large = Large()
        kept.add(large)
        raise ValueError(job.id) from ExceptionGroup("both", [OSError("a"), OSError("b")])

    class Blocks(NoopObserver):
        def job_moved_to_dlq(self, job: Job, error: str | BaseException, /) -> None:
            assert isinstance(error, ValueError)
            released.wait(20.0)
            told.append(error.__traceback__ is not None)

    mux = Mux().register("t", of_style(style, fail), max_attempts=1)
    with Client(dsn) as client, Worker(client, "q", mux, observer=Blocks(), concurrency=4):
        client.bulk_enqueue(EnqueueRequest("q", "t") for _ in range(600))
        assert eventually(lambda: sum(q.dead for q in client.stats()) == 600)
        assert 1 <= len(kept) < 150
        texts = [dead.last_error or "" for dead in client.dlq.list(limit=1000)]
        released.set()
        assert eventually(lambda: len(told) == 600)
    assert told[0]
    assert told.count(True) < 500
    assert all("in fail" in text for text in texts)
