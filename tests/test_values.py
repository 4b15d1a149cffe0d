"""Values check themselves when they are made, and their errors name the mistake."""

import asyncio
import copy
import functools
import importlib.metadata
import logging
import pickle
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable
from dataclasses import FrozenInstanceError, dataclass, replace
from datetime import timedelta
from enum import Enum
from importlib.util import find_spec
from typing import Any

import pytest
from support.documents import ROOT
from support.jobs import NOON, a_job

import bgjob
from bgjob import (
    Backoff,
    BgjobError,
    Complete,
    DeadJob,
    EnqueueRequest,
    Job,
    JobAlreadyExistsError,
    LoggingObserver,
    MoveToDlq,
    Mux,
    QueueRequiredError,
    Reschedule,
    Result,
    Retry,
    TypeRequiredError,
    UnknownTypeError,
)
from bgjob._handlers.route import Awaiting
from bgjob._sql.statement import text_array
from bgjob.job import new_id
from bgjob.mux import Route
from bgjob._failure import error_text

NAN, INF = float("nan"), float("inf")
BAD_DELAYS = [-1, -1e-9, NAN, INF, -INF, 1e12, 10**400, timedelta(seconds=-1), timedelta.max]


def a_request_with(name: str, value: Any) -> EnqueueRequest:
    return EnqueueRequest(**{"queue": "q", "type": "t"} | {name: value})


# -- requests -----------------------------------------------------------------------


def test_a_request_needs_a_queue_and_a_type() -> None:
    with pytest.raises(QueueRequiredError, match="queue is required"):
        EnqueueRequest(queue="", type="t")
    with pytest.raises(TypeRequiredError, match="type is required"):
        EnqueueRequest(queue="q", type="")


def test_an_error_of_bgjob_is_also_of_the_usual_python_class() -> None:
    assert issubclass(QueueRequiredError, BgjobError) and issubclass(QueueRequiredError, ValueError)
    assert issubclass(UnknownTypeError, BgjobError) and issubclass(UnknownTypeError, LookupError)


@pytest.mark.parametrize("name", ["queue", "type", "id"])
@pytest.mark.parametrize(
    "text", ["x" * 255, "\U0001f600" * 255, " ", "'\"\\{},%s", "\n", "\ufeff", "\uffff"]
)
def test_a_name_may_hold_every_character_that_postgresql_can_store(name: str, text: str) -> None:
    request = a_request_with(name, text)
    assert getattr(request, name) == text


@pytest.mark.parametrize("name", ["queue", "type", "id"])
@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("x" * 256, "must have 1 to 255 characters, not 256"),
        ("a\0b", "must not contain NUL"),
        ("a\ud800b", "must be valid Unicode, without surrogates"),
    ],
)
def test_a_name_that_postgresql_cannot_hold_is_refused_by_name(
    name: str, text: str, complaint: str
) -> None:
    with pytest.raises(ValueError, match=f"{name} {complaint}"):
        a_request_with(name, text)


@pytest.mark.parametrize("name", ["queue", "type", "id"])
@pytest.mark.parametrize("value", [5, b"bytes", ["q"]])
def test_a_name_that_is_not_a_string_is_refused_by_its_parameter(name: str, value: object) -> None:
    with pytest.raises(TypeError, match=f"{name} must be a str"):
        a_request_with(name, value)


def test_an_id_is_not_empty() -> None:
    with pytest.raises(ValueError, match="id must have 1 to 255 characters"):
        EnqueueRequest("q", "t", id="")


def test_an_id_that_is_none_is_refused_and_not_replaced_by_a_new_one() -> None:
    with pytest.raises(TypeError, match="id must be a str, not NoneType"):
        EnqueueRequest("q", "t", id=None)  # type: ignore[arg-type]


def test_a_request_stores_no_option_that_it_does_not_use() -> None:
    usual: dict[str, Any] = {
        "delay": 0,
        "run_at": None,
        "priority": 0,
        "exclusive": None,
        "headers": {},
    }
    request = EnqueueRequest("q", "t", {"n": 1}, **usual, expires=None)
    assert vars(EnqueueRequest("q", "t")).keys() == {"queue", "type", "arg", "id", "payload"}
    assert request.is_plain and EnqueueRequest("q", "t", priority=5).is_plain
    assert request == EnqueueRequest("q", "t", {"n": 1}, id=request.id)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("delay", 0.5),
        ("delay", timedelta(1)),
        ("run_at", NOON),
        ("exclusive", "key"),
        ("headers", {"a": 1}),
        ("expires", 5),
    ],
)
def test_a_request_with_an_option_is_not_plain_and_stays_so_in_copies(
    name: str, value: Any
) -> None:
    request = a_request_with(name, value)
    copies = [copy.copy(request), copy.deepcopy(request), pickle.loads(pickle.dumps(request))]
    for each in [request, *copies, replace(request, arg=1), request.with_headers({})]:
        assert getattr(each, name) == value and each.id == request.id and not each.is_plain
    assert copies == [request] * 3 and len({request, *copies}) == 1
    with pytest.raises(FrozenInstanceError):
        setattr(request, name, value)


def test_ids_are_unique_uuids_that_sort_in_the_order_they_were_made() -> None:
    ids = [EnqueueRequest("q", "t").id for _ in range(20_000)]
    assert ids == sorted(ids)
    assert len(set(ids)) == len(ids)
    parsed = uuid.UUID(ids[0])
    assert (str(parsed), parsed.version, parsed.variant) == (ids[0], 7, uuid.RFC_4122)


def test_ids_made_by_several_threads_are_unique() -> None:
    made: list[list[str]] = [[] for _ in range(4)]
    threads = [
        threading.Thread(target=lambda ids=ids: ids.extend(new_id() for _ in range(5_000)))
        for ids in made
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id_ for ids in made for id_ in ids}) == 20_000


FORKS = """
import os
from bgjob.job import new_id
new_id()
there, here = os.pipe()
child = os.fork()
tails = [new_id()[20:] for _ in range(400)]
if child == 0:
    os.write(here, "".join(tails).encode())
    os._exit(0)
os.waitpid(child, 0)
os.close(here)
with os.fdopen(there) as pipe:
    theirs = pipe.read()
print(any(tail in theirs for tail in tails), len(theirs) // len(tails[0]))
"""


def test_a_forked_child_does_not_make_the_ids_of_its_parent() -> None:
    ran = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, check=True)
    assert ran.stdout == "False 400\n"


@pytest.mark.parametrize("delay", [0, 0.5, 3, timedelta(minutes=1)])
def test_a_delay_is_seconds_or_a_timedelta(delay: float | timedelta) -> None:
    assert EnqueueRequest("q", "t", delay=delay).delay == delay


@pytest.mark.parametrize("delay", BAD_DELAYS, ids=lambda delay: repr(delay)[:30])
def test_a_delay_out_of_range_is_refused(delay: Any) -> None:
    with pytest.raises(ValueError, match="delay must be from 0 seconds to 100 years"):
        EnqueueRequest("q", "t", delay=delay)


@pytest.mark.parametrize("delay", [True, "1", None, NOON])
def test_a_delay_of_another_type_is_refused(delay: Any) -> None:
    with pytest.raises(TypeError, match="delay must be seconds"):
        EnqueueRequest("q", "t", delay=delay)


def test_a_request_has_a_delay_or_a_run_at() -> None:
    assert EnqueueRequest("q", "t", run_at=NOON).run_at == NOON
    with pytest.raises(ValueError, match="delay or run_at, not both"):
        EnqueueRequest("q", "t", delay=1, run_at=NOON)


def test_a_naive_run_at_is_refused() -> None:
    with pytest.raises(ValueError, match="run_at must be an aware datetime"):
        EnqueueRequest("q", "t", run_at=NOON.replace(tzinfo=None))


@pytest.mark.parametrize("priority", [-32768, 0, 32767])
def test_a_priority_is_a_smallint(priority: int) -> None:
    assert EnqueueRequest("q", "t", priority=priority).priority == priority


@pytest.mark.parametrize("priority", [-32769, 32768, 2**70, True, 0.5, 1.0, "1", None])
def test_a_priority_outside_the_range_of_smallint_is_refused(priority: Any) -> None:
    with pytest.raises(ValueError, match="priority must be an integer from -32768 to 32767"):
        EnqueueRequest("q", "t", priority=priority)


# -- payloads ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arg", [b"", b"null", bytes(range(256)), bytearray(b"x"), memoryview(b"y")]
)
def test_bytes_are_stored_as_they_are(arg: bytes) -> None:
    assert EnqueueRequest("q", "t", arg).payload == bytes(arg)


def test_none_is_stored_as_null() -> None:
    assert EnqueueRequest("q", "t").payload is None


def test_a_payload_is_encoded_when_the_request_is_made() -> None:
    arg = {"n": 1}
    request = EnqueueRequest("q", "t", arg)
    arg["n"] = 2
    assert request.payload == b'{"n":1}'


def nested(depth: int) -> Any:
    lists: Any = 1
    for _ in range(depth):
        lists = [lists]
    return lists


@pytest.mark.parametrize(
    "arg",
    [
        {"n": [1, 2.5, True, None, "é"]},
        [],
        "",
        "null",
        0,
        False,
        2**64 - 1,
        -(2**63),
        "nul \0 and é \U0001f600",
        nested(200),
    ],
)
def test_json_comes_back_as_it_went(arg: Any) -> None:
    payload = EnqueueRequest("q", "t", arg).payload
    assert Job("id", "q", "t", payload, 1, None, 0, NOON, NOON, NOON).json() == arg


@pytest.mark.parametrize(
    "arg",
    [
        2**64,
        -(2**63) - 1,
        "\ud800",
        {"key": ["\udfff"]},
        {1: "key"},
        {1, 2},
        object(),
        {"bytes": b"x"},
        nested(2_000),
    ],
)
def test_a_value_that_json_cannot_express_is_refused_with_the_job_type(arg: Any) -> None:
    with pytest.raises(TypeError, match="arg of job type 'resize' cannot be encoded as JSON"):
        EnqueueRequest("q", "resize", arg)


@dataclass
class Measured:
    value: float


class Limit(Enum):
    NONE = INF


@pytest.mark.parametrize(
    "arg",
    [NAN, INF, -INF, {"a": [None, NAN]}, (1.0, {"b": INF}), Measured(NAN), [Measured(INF)]]
    + [Limit.NONE],
    ids=repr,
)
def test_nan_and_infinity_are_refused_with_the_job_type(arg: Any) -> None:
    with pytest.raises(ValueError, match="arg of job type 'resize' holds NaN or infinity"):
        EnqueueRequest("q", "resize", arg)


def test_a_job_decodes_its_payload() -> None:
    def job(arg: bytes | None) -> Job:
        return Job("id", "q", "t", arg, 1, None, 0, NOON, NOON, NOON)

    assert job(b'{"n": [1, null]}').json() == {"n": [1, None]}
    assert job(None).json() is None
    with pytest.raises(ValueError, match="invalid literal"):
        job(b"no json").json()


def test_a_dead_job_decodes_its_payload_and_knows_when_it_was_moved() -> None:
    dead = DeadJob(
        "id", "q", "t", b"1", 3, "why", 0, NOON, NOON, NOON, None, NOON, 7, "00000000002a"
    )
    assert (dead.json(), dead.last_error, dead.moved_at, dead.number) == (1, "why", NOON, 7)


def test_the_error_about_taken_ids_has_all_of_them_and_shows_a_few() -> None:
    error = JobAlreadyExistsError([f"job {n}" for n in range(9)])
    assert len(error.ids) == 9
    assert "'job 4' and 4 more" in str(error)


# -- results ----------------------------------------------------------------------------


@pytest.mark.parametrize("delay", BAD_DELAYS, ids=lambda delay: repr(delay)[:30])
@pytest.mark.parametrize("result", [Retry, Reschedule])
def test_results_refuse_a_bad_delay_where_it_is_written(
    result: Callable[[Any], Result], delay: Any
) -> None:
    with pytest.raises(ValueError, match=r"\(delay\) must be from 0 seconds to 100 years"):
        result(delay)


@pytest.mark.parametrize("priority", [-32769, 32768, True, 0.5, "1"])
def test_a_retry_refuses_a_priority_outside_the_range_of_smallint(priority: Any) -> None:
    with pytest.raises(ValueError, match=r"Retry\(priority\) must be an integer from -32768"):
        Retry(priority=priority)


def test_a_retry_keeps_the_priority_by_default() -> None:
    assert Retry().priority is None
    assert Retry(5, "e", priority=-32768).priority == -32768


def test_results_take_seconds_or_a_timedelta() -> None:
    assert Retry().delay is None
    assert Retry(timedelta(seconds=1)).delay == timedelta(seconds=1)
    assert Reschedule(0).delay == 0


def test_backoff_grows_up_to_its_maximum() -> None:
    backoff = Backoff(base=1, factor=3, maximum=50, jitter=0)
    assert [backoff(attempt) for attempt in range(1, 7)] == [1, 3, 9, 27, 50, 50]


def test_backoff_can_be_constant() -> None:
    backoff = Backoff.constant(7, jitter=0)
    assert backoff(1) == backoff(1_000) == 7
    assert Backoff.constant(7200, jitter=0)(1) == 7200
    assert 6.3 <= Backoff.constant(7)(1) <= 7


def test_backoff_can_be_linear() -> None:
    backoff = Backoff.linear(5, maximum=12, jitter=0)
    assert [backoff(attempt) for attempt in range(1, 5)] == [5, 10, 12, 12]
    assert 3240 <= Backoff.linear(5)(2**31 - 1) <= 3600


def test_backoffs_take_seconds_or_a_timedelta() -> None:
    second = timedelta(seconds=1)
    assert Backoff(base=second, maximum=2 * second, jitter=0)(3) == 2
    assert Backoff.linear(second, jitter=0)(3) == 3
    assert Backoff.constant(second, jitter=0)(3) == 1


@pytest.mark.parametrize("factor", [1.0, 2, 2.0, 1000, 1000.0])
def test_backoff_never_overflows(factor: float) -> None:
    assert 0 <= Backoff(base=86400, factor=factor)(2**31 - 1) <= 3600


def test_backoff_is_spread_by_its_jitter_and_never_over_its_maximum() -> None:
    delays = {Backoff(base=10, jitter=0.5)(1) for _ in range(200)}
    assert len(delays) > 100
    assert 5 <= min(delays) < 7 < 8 < max(delays) <= 10


@pytest.mark.parametrize(
    "values",
    [{"base": -1}, {"maximum": NAN}, {"factor": 0.5}, {"factor": 1001}, {"factor": NAN}]
    + [{"step": -1}, {"step": INF}]
    + [{"jitter": -0.1}, {"jitter": 1.1}, {"jitter": NAN}],
    ids=str,
)
def test_backoff_refuses_a_bad_value_by_name(values: dict[str, float]) -> None:
    [name] = values
    with pytest.raises(ValueError, match=rf"Backoff\({name}\)"):
        Backoff(**values)


# -- error texts ---------------------------------------------------------------------------


class Mute(Exception):
    def __str__(self) -> str:
        raise SystemExit("no text")


class Odd(Exception):
    def __str__(self) -> Any:
        return 5


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (None, None),
        ("as it is", "as it is"),
        ("", ""),
        (ValueError("a reason"), "ValueError: a reason"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        ("a\0b", "a\ufffdb"),
        (ValueError("a\0b"), "ValueError: a\ufffdb"),
        ("a\ud800b", "a?b"),
        (Mute(), "Mute (its text raised SystemExit)"),
        (Odd(), "Odd (its text raised TypeError)"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_becomes_text_that_postgresql_can_store(error: Any, text: str | None) -> None:
    assert error_text(error) == text


@pytest.mark.parametrize("wrap", [str, ValueError])
def test_a_huge_error_text_is_cut_and_marked_as_cut(wrap: Callable[[str], Any]) -> None:
    text = error_text(wrap("x" * 50_000_000))
    assert text is not None
    assert len(text) < 10_100
    assert "50000" in text and text.endswith("characters)")


# -- mux ------------------------------------------------------------------------------------


def complete(_: Job) -> Result:
    return Complete()


def the_route(handler: Any, **options: Any) -> Route:
    route = Mux().register("t", handler, **options).route(a_job())
    assert isinstance(route, Route)
    return route


def test_registration_is_chainable_and_the_decorator_leaves_the_function_alone() -> None:
    mux = Mux().register("a", complete).register("b", complete)

    @mux.handler("c", max_attempts=3)
    def handle(_: Job) -> Result:
        return Complete()

    assert handle(a_job()) == Complete()
    route = mux.route(a_job("c"))
    assert isinstance(route, Route)
    assert (route.handler, route.policy.max_attempts) == (handle, 3)


def test_a_type_has_one_handler() -> None:
    mux = Mux().register("t", complete)
    with pytest.raises(ValueError, match="'t' is registered already"):
        mux.register("t", lambda job: None)


def test_registration_refuses_a_handler_that_could_never_run() -> None:
    with pytest.raises(TypeRequiredError):
        Mux().register("", complete)
    with pytest.raises(ValueError, match="type must have 1 to 255 characters"):
        Mux().register("t" * 256, complete)
    with pytest.raises(TypeError, match="handler of job type 't' is not callable"):
        Mux().register("t", "complete")  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="max_attempts of job type .t. must be at least 1"):
        Mux().register("t", complete, max_attempts=0)


def test_a_job_of_an_unknown_type_is_moved_to_the_dlq_with_a_remedy() -> None:
    result = Mux().route(a_job("mystery"))
    assert isinstance(result, MoveToDlq)
    assert isinstance(result.error, UnknownTypeError)
    assert "'mystery'; register it, then requeue" in str(result.error)


def test_a_handler_that_returns_none_completes_its_job() -> None:
    assert the_route(lambda _: None).run(a_job()) == Complete()


@pytest.mark.parametrize("result", [Complete(), Reschedule(5), MoveToDlq("e"), Retry(5, "e")])
def test_a_result_is_taken_as_it_is(result: Result) -> None:
    assert the_route(lambda _: result).run(a_job()) == result


def test_a_retry_without_a_delay_asks_the_backoff() -> None:
    route = the_route(lambda _: Retry(error="e"), backoff=lambda attempt: attempt * 10.0)
    assert route.run(a_job(attempt=2)) == Retry(20.0, "e")


@pytest.mark.parametrize("backoff", [lambda _: -1.0, lambda _: NAN, lambda _: 1 / 0, lambda _: "1"])
def test_a_broken_backoff_is_logged_and_the_default_one_used(
    backoff: Any, caplog: pytest.LogCaptureFixture
) -> None:
    result = the_route(lambda _: Retry(), backoff=backoff).run(a_job())
    assert isinstance(result, Retry) and isinstance(result.delay, float)
    assert 0.9 <= result.delay <= 1
    assert "the backoff of job type 't' failed" in caplog.text


@pytest.mark.parametrize("returned", [True, 0, "done", Complete, object(), {"retry": 1}])
def test_a_return_value_that_is_not_a_result_is_an_error_that_names_handler_and_type(
    returned: Any,
) -> None:
    def misspelt(_: Job) -> Any:
        return returned

    result = the_route(misspelt).run(a_job())
    assert isinstance(result, Retry) and isinstance(result.error, TypeError)
    assert "misspelt of job type 't' returned" in str(result.error)


def test_a_coroutine_that_a_plain_handler_returns_is_to_be_awaited_on_a_loop() -> None:
    async def work() -> Result:
        return Reschedule(5)

    result = the_route(lambda _: work()).run(a_job())
    assert isinstance(result, Awaiting)
    assert result.route.is_coroutine
    assert asyncio.run(result.route.awaited(a_job())) == Reschedule(5)


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt, GeneratorExit])
def test_any_exception_of_a_handler_is_a_retry(error: type[BaseException]) -> None:
    raised = error("reason")

    def fail(_: Job) -> Result:
        raise raised

    result = the_route(fail, backoff=lambda _: 3.0).run(a_job())
    assert result == Retry(3.0, raised)


def test_the_last_attempt_that_fails_moves_the_job_to_the_dlq() -> None:
    error = ValueError("reason")

    def fail(_: Job) -> Result:
        raise error

    for handler, expected in (
        (fail, MoveToDlq(error)),
        (lambda _: Retry(5, "e"), MoveToDlq("e")),
        (lambda _: Retry(), MoveToDlq("out of attempts")),
        (lambda _: Reschedule(5), Reschedule(5)),
        (complete, Complete()),
    ):
        assert the_route(handler, max_attempts=3).run(a_job(attempt=3)) == expected
        assert not isinstance(the_route(handler, max_attempts=3).run(a_job(attempt=2)), MoveToDlq)


def test_max_attempts_none_is_endless() -> None:
    mux = Mux().register("t", lambda _: Retry(1), max_attempts=None)
    route = mux.route(a_job(attempt=2**31 - 1))
    assert isinstance(route, Route)
    assert route.run(a_job(attempt=2**31 - 1)) == Retry(1)


def test_a_job_whose_attempts_are_used_up_is_not_run_but_moved_to_the_dlq() -> None:
    mux = Mux().register("t", complete, max_attempts=2)
    # Two more are granted: one that was charged for a death may have had no part in it.
    for attempt in (2, 3, 4):
        assert isinstance(mux.route(a_job(attempt=attempt)), Route)
    result = mux.route(a_job(attempt=5, last_error="out of memory"))
    assert isinstance(result, MoveToDlq)
    assert "out of attempts: 2 of 2 were charged" in str(result.error)
    assert "its worker died or lost the lease; last error: out of memory" in str(result.error)


class Plain:
    def __call__(self, _: Job) -> Result:
        return Complete()

    def method(self, _: Job) -> Result:
        return Complete()


class Coroutine:
    async def __call__(self, _: Job) -> Result:
        return Complete()

    async def method(self, _: Job) -> Result:
        return Complete()


async def coroutine(_: Job) -> Result:
    return Complete()


@pytest.mark.parametrize(
    ("handler", "is_coroutine"),
    [
        (complete, False),
        (lambda _: Complete(), False),
        (functools.partial(complete), False),
        (Plain(), False),
        (Plain().method, False),
        (coroutine, True),
        (functools.partial(coroutine), True),
        (functools.partial(functools.partial(coroutine)), True),
        (Coroutine(), True),
        (Coroutine().method, True),
        (functools.partial(Coroutine().method), True),
        (functools.partial(Coroutine()), True),
    ],
)
def test_a_mux_knows_coroutine_handlers(handler: Any, is_coroutine: bool) -> None:
    mux = Mux().register("t", handler)
    assert mux.has_coroutines is is_coroutine
    assert the_route(handler).is_coroutine is is_coroutine


# -- the package ------------------------------------------------------------------------------


def test_the_package_has_a_version() -> None:
    assert bgjob.__version__ == importlib.metadata.version("bgjob")


# -- observers --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "level", "text"),
    [
        (lambda o: o.job_started(a_job()), logging.DEBUG, "t id (attempt 1) started"),
        (lambda o: o.job_completed(a_job()), logging.DEBUG, "completed"),
        (lambda o: o.job_rescheduled(a_job(), 2.0), logging.DEBUG, "runs again in 2 s"),
        (
            lambda o: o.job_will_be_retried(a_job(), 2.0, "why"),
            logging.WARNING,
            "failed and runs again in 2 s: why",
        ),
        (lambda o: o.job_lease_lost(a_job()), logging.WARNING, "outlived its lease"),
        (lambda o: o.job_moved_to_dlq(a_job(), "why"), logging.ERROR, "dead-letter table: why"),
    ],
)
def test_success_is_logged_quietly_and_failure_with_the_job(
    event: Callable[[LoggingObserver], None],
    level: int,
    text: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.DEBUG, logger="bgjob"):
        event(LoggingObserver())
    [record] = caplog.records
    assert (record.name, record.levelno) == ("bgjob", level)
    assert text in record.getMessage()
    extra = [getattr(record, f"job_{name}") for name in ("id", "queue", "type", "attempt")]
    assert extra == ["id", "q", "t", 1]


def test_an_empty_queue_is_logged_quietly_and_trouble_as_an_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    logger = logging.getLogger("mine")
    with caplog.at_level(logging.DEBUG, logger="mine"):
        LoggingObserver(logger).queue_is_empty("q")
        LoggingObserver(logger).worker_error(OSError("gone"))
    assert [(r.name, r.levelno, r.getMessage()) for r in caplog.records] == [
        ("mine", logging.DEBUG, "queue q is empty"),
        ("mine", logging.ERROR, "worker: gone"),
    ]


def test_the_librarys_logger_is_silenced_by_its_level_and_not_by_being_disabled(
    caplog: pytest.LogCaptureFixture,
) -> None:
    logger = logging.getLogger("bgjob")
    for observer in (LoggingObserver(), LoggingObserver(logger)):
        logger.disabled = True
        observer.job_moved_to_dlq(a_job(), "why")
        [record] = caplog.records
        assert (record.name, record.funcName, record.filename) == ("bgjob", "_log", "observer.py")
        caplog.clear()
    with caplog.at_level(logging.CRITICAL, logger="bgjob"):
        observer.job_moved_to_dlq(a_job(), "why")
    assert caplog.records == []
    mine = logging.getLogger("mine")
    mine.disabled = True
    LoggingObserver(mine).job_moved_to_dlq(a_job(), "why")
    assert caplog.records == []
    mine.disabled = False


def test_a_logged_exception_keeps_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    error = ValueError("why")
    LoggingObserver().job_moved_to_dlq(a_job(), error)
    [record] = caplog.records
    assert record.exc_info is not None and record.exc_info[1] is error


# -- arrays ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("items", "literal"),
    [
        (["a"], '{"a"}'),
        (["a", "b c"], '{"a","b c"}'),
        (["NULL", "{}", "a,b", " "], '{"NULL","{}","a,b"," "}'),
        (['say "x"', "b"], r'{"say \"x\"","b"}'),
        (["back\\slash", 'and"quote'], r'{"back\\slash","and\"quote"}'),
        (['","', "\\"], r'{"\",\"","\\"}'),
    ],
)
def test_an_array_literal_quotes_every_item(items: list[str], literal: str) -> None:
    assert text_array(items) == literal
