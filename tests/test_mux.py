"""A job type's policy, and the call of its handler: arguments by name, inside middleware."""

import asyncio
import functools
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar

import psycopg
import pytest
from support.database import all_done, row, rows
from support.jobs import a_job
from support.waiting import NEVER
from support.workers import Launcher, Recorder

from bgjob import (
    Backoff,
    BgjobError,
    Client,
    Complete,
    EnqueueRequest,
    Job,
    MoveToDlq,
    Mux,
    QueueRequiredError,
    Reschedule,
    Result,
    Retry,
    StateRequiredError,
    TypeRequiredError,
    UnknownTypeError,
)
from bgjob._engine.outcome import CommitUnknown, Outcome
from bgjob._engine.protocol import Exchange
from bgjob._handlers.policy import TypePolicy
from bgjob._sql.settlements import Claimed
from bgjob.codec import RawCodec
from bgjob.errors import PayloadError
from bgjob.mux import Middleware, Policy, Route

both_colours = pytest.mark.parametrize("is_async", [False, True], ids=["plain", "coroutine"])


@dataclass(frozen=True)
class SendMail:
    to: str
    copies: int = 1


@dataclass(frozen=True)
class Report:
    queue: ClassVar[str] = "reports"
    max_attempts: ClassVar[int | None] = None
    backoff: ClassVar[Callable[[int], float]] = Backoff.constant(7)
    priority: ClassVar[int] = 3

    day: str


class Reversed:
    """A codec of the user's own."""

    def encode(self, value: str, /) -> bytes:
        return value[::-1].encode()

    def decode(self, data: bytes, /) -> str:
        return data.decode()[::-1]


def route_of(mux: Mux, type: str = "t") -> Route:
    route = mux.route(a_job(type)._replace(exclusive="a key"))
    assert isinstance(route, Route)
    return route


def policy_of(mux: Mux, type: str = "t") -> TypePolicy:
    return route_of(mux, type).policy


def run(mux: Mux, job: Job, *conn: object) -> Any:
    """Call a handler as the worker does, and return its result."""
    route = route_of(mux, job.type)
    returned = route.handler(job, *conn)
    return asyncio.run(returned) if route.is_coroutine else returned


def coloured(function: Callable[..., Any], *, is_async: bool) -> Callable[..., Any]:
    """Make a coroutine function of a plain one, with the same parameters."""
    if not is_async:
        return function

    @functools.wraps(function)
    async def coroutine(*args: object, **kwargs: object) -> Any:
        return function(*args, **kwargs)

    return coroutine


# -- the policy of a type ---------------------------------------------------------------


def test_a_type_without_options_has_the_defaults() -> None:
    policy = policy_of(Mux().register("t", lambda _: None))
    assert (policy.max_attempts, policy.backoff, policy.retry_priority) == (25, Backoff(), None)
    assert (policy.queue, policy.priority, policy.timeout, policy.exclusive) == (
        None,
        0,
        None,
        None,
    )


def test_a_type_keeps_its_options() -> None:
    options: Policy = {
        "queue": "mail",
        "max_attempts": None,
        "backoff": Backoff.linear(2),
        "timeout": timedelta(minutes=1),
        "priority": -1,
        "retry_priority": -5,
        "exclusive": lambda job: job.id,
    }
    mux = Mux().register("registered", lambda _: None, **options)
    mux.handler("decorated", **options)(lambda _: None)
    for name in ("registered", "decorated"):
        policy = policy_of(mux, name)
        assert (policy.queue, policy.max_attempts, policy.backoff) == (
            "mail",
            None,
            Backoff.linear(2),
        )
        assert (policy.timeout, policy.priority, policy.retry_priority) == (60.0, -1, -5)
        assert callable(policy.exclusive) and policy.exclusive(a_job()) == "id"


@pytest.mark.parametrize(
    ("options", "error", "complaint"),
    [
        ({"queue": ""}, ValueError, "queue of job type 't' must have 1 to 255"),
        ({"max_attempts": 0}, ValueError, "max_attempts of job type 't' must be at least 1"),
        ({"max_attempts": True}, ValueError, "max_attempts of job type 't' must be at least 1"),
        ({"backoff": 5}, TypeError, r"such as Backoff\.constant\(5\), not 5"),
        ({"backoff": lambda: 5}, TypeError, r"must be a Backoff\(\) or another callable"),
        ({"backoff": Backoff}, TypeError, r"must be a Backoff\(\) or another callable"),
        ({"timeout": 0}, ValueError, "timeout of job type 't' must be over 0 s"),
        ({"timeout": -1}, ValueError, "timeout of job type 't' must be from 0 seconds"),
        ({"timeout": "1"}, TypeError, "timeout of job type 't' must be seconds"),
        ({"priority": 40_000}, ValueError, "^priority of job type 't' must be an integer from"),
        ({"priority": True}, ValueError, "^priority of job type 't' must be an integer from"),
        ({"retry_priority": 0.5}, ValueError, "retry_priority of job type 't' must be an integer"),
        ({"exclusive": "user"}, TypeError, "exclusive of job type 't' must be True for one job"),
        ({"middleware": lambda call: call}, TypeError, "middleware must be a sequence"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_bad_option_is_refused_at_registration_by_name(
    options: dict[str, Any], error: type[Exception], complaint: str
) -> None:
    mux = Mux()
    with pytest.raises(error, match=complaint):
        mux.register("t", lambda _: None, **options)
    assert isinstance(mux.route(a_job()), MoveToDlq)


def test_a_class_names_its_type_and_gives_the_defaults_of_its_policy() -> None:
    mux = Mux().register(Report, lambda report: None)
    policy = policy_of(mux, "Report")
    assert (policy.queue, policy.priority, policy.max_attempts) == ("reports", 3, None)
    assert policy.backoff is Report.backoff


def test_options_of_the_registration_override_those_of_the_class() -> None:
    other = Backoff.constant(1)
    mux = Mux()
    mux.register(
        Report, lambda report: None, queue="other", max_attempts=2, backoff=other, priority=0
    )
    policy = policy_of(mux, "Report")
    assert (policy.queue, policy.priority, policy.max_attempts) == ("other", 0, 2)
    assert policy.backoff is other


def test_endless_attempts_can_be_registered_over_those_of_a_class() -> None:
    @dataclass(frozen=True)
    class Thrice:
        max_attempts: ClassVar[int] = 3

    assert policy_of(Mux().register(Thrice, lambda _: None), "Thrice").max_attempts == 3
    mux = Mux().register(Thrice, lambda _: None, max_attempts=None)
    assert policy_of(mux, "Thrice").max_attempts is None


def test_a_field_of_a_class_is_payload_and_not_policy() -> None:
    @dataclass(frozen=True)
    class Ticket:
        queue: str = "the one at the counter"
        priority: int = 70_000

    policy = policy_of(Mux().register(Ticket, lambda _: None), "Ticket")
    assert (policy.queue, policy.priority) == (None, 0)


def test_a_bad_option_of_a_class_is_refused_at_registration() -> None:
    @dataclass(frozen=True)
    class Hurried:
        priority: ClassVar[int] = -70_000

    with pytest.raises(ValueError, match="priority of job type 'Hurried' must be an integer"):
        Mux().register(Hurried, lambda _: None)


def test_two_classes_with_one_name_are_refused_with_their_modules() -> None:
    other: Any = dataclass(frozen=True)(type("SendMail", (), {"__module__": "shop.mail"}))
    mux = Mux().register(SendMail, lambda _: None)
    with pytest.raises(ValueError, match=r"'SendMail'.*test_mux\.SendMail; shop\.mail\.SendMail"):
        mux.register(other, lambda _: None)
    with pytest.raises(ValueError, match="'SendMail' is registered already: a type has one"):
        mux.register(SendMail, lambda _: None)
    with pytest.raises(ValueError, match="'SendMail' is registered already: a type has one"):
        mux.register("SendMail", lambda _: None)


def test_a_type_is_a_name_or_a_class() -> None:
    with pytest.raises(TypeError, match="type must be a str, not int"):
        Mux().register(5, lambda _: None)  # type: ignore[call-overload]
    with pytest.raises(TypeRequiredError):
        Mux().handler("")(lambda _: None)


# -- requests -------------------------------------------------------------------------------


def test_a_request_has_the_defaults_of_its_type_unless_it_names_its_own() -> None:
    mux = Mux().register("t", lambda _: None, queue="mail", priority=4)
    request = mux.request("t", {"n": 1})
    assert (request.queue, request.type, request.priority) == ("mail", "t", 4)
    assert request.payload == b'{"n":1}'
    request = mux.request("t", queue="other", priority=0, delay=5, id="x")
    assert (request.queue, request.priority, request.delay, request.id) == ("other", 0, 5, "x")
    assert request.payload is None


def test_a_request_of_a_class_is_made_of_its_value() -> None:
    mux = Mux().register(Report, lambda _: None)
    for request in (
        mux.request(Report("today")),
        mux.request(Report, Report("today")),
        mux.request("Report", Report("today")),
    ):
        assert (request.type, request.queue, request.priority) == ("Report", "reports", 3)
        assert run(Mux().register(Report, lambda report: report), a_job("Report", request.payload))
    with pytest.raises(TypeError, match="payload of job type 'Report' must be a Report, not None"):
        mux.request(Report)
    with pytest.raises(TypeError, match="must be a Report, not SendMail"):
        mux.request(Report, SendMail("a"))
    with pytest.raises(TypeError, match="pass a job type and its arg, or a value"):
        mux.request(Report("today"), Report("tomorrow"))


def test_a_request_is_encoded_with_the_codec_of_its_type() -> None:
    mux = Mux().register("t", lambda text: None, queue="q", codec=Reversed())
    assert mux.request("t", "abc").payload == b"cba"
    assert mux.request("t").payload is None


def test_a_codec_of_a_type_that_does_not_return_bytes_is_reported() -> None:
    class Text(Reversed):
        def encode(self, value: str, /) -> Any:
            return value

    mux = Mux().register("t", lambda text: None, queue="q", codec=Text())
    with pytest.raises(TypeError, match=r"Text.* of job type 't' to str; it must return bytes"):
        mux.request("t", "abc")


def test_a_request_of_an_unknown_type_or_without_a_queue_is_refused_with_a_remedy() -> None:
    mux = Mux().register("t", lambda _: None)
    with pytest.raises(UnknownTypeError, match="'mystery'; register it before you request"):
        mux.request("mystery")
    with pytest.raises(UnknownTypeError, match="'SendMail'; register it"):
        mux.request(SendMail("a"))
    with pytest.raises(
        QueueRequiredError, match=r"'t' has no queue: pass request\(queue=.*register\(queue="
    ):
        mux.request("t")
    with pytest.raises(ValueError, match="priority must be an integer"):
        mux.request("t", queue="q", priority=70_000)


# -- how a handler is called ----------------------------------------------------------------


def test_a_handler_that_asks_for_nothing_is_called_as_it_is() -> None:
    def handle(job: Job) -> None: ...

    assert route_of(Mux().register("t", handle)).handler is handle
    mux = Mux().register("t", handle, transactional=False).bound("state")
    assert route_of(mux).handler is handle


@both_colours
def test_a_handler_of_a_class_is_given_its_value(is_async: bool) -> None:
    handle = coloured(lambda mail: mail, is_async=is_async)
    mux = Mux().register(SendMail, handle)
    assert run(mux, a_job("SendMail", b'{"to":"a","copies":2}')) == SendMail("a", 2)
    assert route_of(mux, "SendMail").is_coroutine is is_async


@both_colours
def test_a_handler_of_a_codec_is_given_the_decoded_value(is_async: bool) -> None:
    handle = coloured(lambda text: [text], is_async=is_async)
    mux = Mux().register("t", handle, codec=Reversed())
    assert run(mux, a_job(arg=b"cba")) == ["abc"]
    assert run(mux, a_job(arg=None)) == [None]
    mux = Mux().register("t", coloured(lambda raw: raw, is_async=is_async), codec=RawCodec())
    assert run(mux, a_job(arg=b"\0\1")) == b"\0\1"


def test_a_codec_comes_before_that_of_the_class() -> None:
    @dataclass(frozen=True)
    class Word:
        text: str

    class Words:
        def encode(self, value: Word, /) -> bytes:
            return value.text.encode()

        def decode(self, data: bytes, /) -> Word:
            return Word(data.decode())

    mux = Mux().register(Word, lambda word: word, codec=Words(), queue="q")
    assert mux.request(Word("abc")).payload == b"abc"
    assert run(mux, a_job("Word", b"abc")) == Word("abc")


@both_colours
def test_a_handler_receives_the_arguments_that_it_names(is_async: bool) -> None:
    job, typed = a_job(arg=b"1"), a_job("SendMail", b'{"to":"a"}')
    mail = SendMail("a")

    def registered(type: Any, function: Callable[..., Any], **options: Any) -> Mux:
        handle = coloured(function, is_async=is_async)
        return Mux().register(type, handle, **options).bound("state")

    def plain(job: Job, state: str) -> Any:
        return job, state

    def keyword(job: Job, *, state: str) -> Any:
        return job, state

    def value(mail: SendMail, job: Job, *, state: str) -> Any:
        return mail, job, state

    def in_transaction(mail: SendMail, conn: Any, state: str, job: Job) -> Any:
        return mail, conn, state, job

    def only_connection(job: Job, conn: Any, *, state: str) -> Any:
        return job, conn, state

    def anything(*args: Any, **kwargs: Any) -> Any:
        return args, kwargs

    assert run(registered("t", plain), job) == (job, "state")
    assert run(registered("t", keyword), job) == (job, "state")
    assert run(registered(SendMail, value), typed) == (mail, typed, "state")
    mux = registered(SendMail, in_transaction, transactional=True)
    assert run(mux, typed, "conn") == (mail, "conn", "state", typed)
    mux = registered("t", only_connection, transactional=True)
    assert run(mux, job, "conn") == (job, "conn", "state")
    assert run(registered("t", anything), job) == ((job,), {})


def test_the_first_parameter_is_passed_by_position_regardless_of_its_name() -> None:
    mux = Mux().register(SendMail, lambda job: job)
    assert run(mux, a_job("SendMail", b'{"to":"a"}')) == SendMail("a")


def test_a_parameter_with_a_default_is_filled_where_there_is_a_state() -> None:
    def handle(job: Job, state: str | None = None) -> Any:
        return state

    mux = Mux().register("t", handle)
    mux.check_bound()
    assert run(mux, a_job()) is None
    assert run(mux.bound("given"), a_job()) == "given"


def test_arguments_that_a_partial_has_set_are_not_passed() -> None:
    def handle(job: Job, state: str) -> Any:
        return state

    mux = Mux().register("t", functools.partial(handle, state="set"))
    mux.check_bound()
    assert run(mux.bound("given"), a_job()) == "set"


def no_parameter() -> None: ...


def too_many(job: Job, conn: Any) -> None: ...


def two_more(job: Job, conn: Any, other: Any) -> None: ...


def keywords(*, job: Job) -> None: ...


def no_name(job: Job, state: Any, /) -> None: ...


def state_first(state: Any) -> None: ...


def state_second(job: Job, state: Any) -> None: ...


def job_second(mail: SendMail, job: Job) -> None: ...


@pytest.mark.parametrize(
    ("handler", "options", "expected"),
    [
        (no_parameter, {}, r"handler\(job\), with state and checkpoint by name"),
        (too_many, {}, r"handler\(job\), with state and checkpoint by name"),
        (two_more, {"transactional": True}, r"handler\(job, conn\), with state by name"),
        (lambda job: None, {"transactional": True}, r"handler\(job, conn\)"),
        (keywords, {}, r"handler\(job\)"),
        (no_name, {}, r"handler\(job\)"),
        (state_first, {}, r"handler\(job\)"),
        (state_second, {"transactional": True}, r"handler\(job, conn\)"),
        (
            job_second,
            {"transactional": True, "codec": RawCodec()},
            r"handler\(value, conn\), with job and state by name",
        ),
        (
            no_parameter,
            {"codec": RawCodec()},
            r"handler\(value\), with job, state and checkpoint by name",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_handler_that_cannot_be_called_is_refused_with_the_signature_that_is_expected(
    handler: Any, options: dict[str, Any], expected: str
) -> None:
    name = getattr(handler, "__qualname__")
    with pytest.raises(TypeError, match=f"{name} of job type 't' takes .* called as {expected}"):
        Mux().register("t", handler, **options)


# -- payloads that do not fit -------------------------------------------------------------------


@both_colours
@pytest.mark.parametrize("payload", [b'{"to":5}', b"no json", b"", None], ids=repr)
def test_a_payload_that_does_not_fit_goes_to_the_dlq_immediately(
    is_async: bool, payload: bytes | None
) -> None:
    ran: list[Any] = []
    mux = Mux().register(SendMail, coloured(ran.append, is_async=is_async))
    result = run(mux, a_job("SendMail", payload))
    assert isinstance(result, MoveToDlq) and isinstance(result.error, PayloadError)
    assert "payload of job type 'SendMail'" in str(result.error)
    assert ran == []


def test_an_exception_of_a_codec_becomes_an_error_that_names_the_type_and_keeps_its_cause() -> None:
    mux = Mux().register("t", lambda text: None, codec=Reversed())
    result = run(mux, a_job(arg=b"\xff"))
    assert isinstance(result, MoveToDlq) and isinstance(result.error, PayloadError)
    assert "payload of job type 't' cannot be decoded: UnicodeDecodeError" in str(result.error)
    assert isinstance(result.error.__cause__, UnicodeDecodeError)


@both_colours
def test_an_error_of_the_handler_is_not_an_error_of_the_payload(is_async: bool) -> None:
    def fail(mail: SendMail) -> None:
        raise PayloadError("of something else")

    mux = Mux().register(SendMail, coloured(fail, is_async=is_async))
    with pytest.raises(PayloadError, match="of something else"):
        run(mux, a_job("SendMail", b'{"to":"a"}'))


def test_a_payload_that_does_not_fit_rests_in_the_dlq_as_it_is(launcher: Launcher) -> None:
    observer = Recorder()
    ran: list[Any] = []
    launcher.enqueue("bad", type="SendMail", arg=b'{"to":5}')
    launcher.enqueue("good", type="SendMail", arg={"to": "a"})
    launcher.start(Mux().register(SendMail, ran.append), observer=observer)
    observer.wait_for("dead", "bad")
    observer.wait_for("completed", "good")
    [dead] = launcher.client.dlq.list()
    assert (dead.id, dead.arg, dead.attempt) == ("bad", b'{"to":5}', 1)
    assert dead.last_error is not None and "'to'" in dead.last_error
    assert ran == [SendMail("a")]


# -- middleware -----------------------------------------------------------------------------------


def telling(told: list[Any], name: str) -> Middleware:
    """Middleware of either colour that records when it is entered and left."""

    def middleware(handler: Callable[..., Any]) -> Callable[..., Any]:
        if asyncio.iscoroutinefunction(handler):

            async def coroutine(*args: Any) -> Any:
                told.append((name, "enters"))
                try:
                    return await handler(*args)
                finally:
                    told.append((name, "leaves"))

            return coroutine

        def plain(*args: Any) -> Any:
            told.append((name, "enters"))
            try:
                return handler(*args)
            finally:
                told.append((name, "leaves"))

        return plain

    return middleware


@both_colours
@pytest.mark.parametrize("transactional", [False, True])
def test_middleware_of_the_mux_is_outside_that_of_the_type_in_the_order_given(
    is_async: bool, transactional: bool
) -> None:
    told: list[Any] = []

    def handle(job: Job, *conn: str) -> Result:
        told.append(conn)
        return Reschedule(1)

    mux = Mux(middleware=[telling(told, "1"), telling(told, "2")])
    options: dict[str, Any] = {"transactional": transactional}
    options["middleware"] = [telling(told, "3"), telling(told, "4")]
    mux.register("t", coloured(handle, is_async=is_async), **options)
    mux.register("other", lambda job: told.append("other"))
    conn = ["conn"] if transactional else []
    assert run(mux, a_job(), *conn) == Reschedule(1)
    entered = [(name, "enters") for name in "1234"]
    left = [(name, "leaves") for name in "4321"]
    assert told == [*entered, tuple(conn), *left]
    told.clear()
    run(mux, a_job("other"))
    assert told == [*entered[:2], "other", *left[2:]]


def test_middleware_may_answer_itself_raise_or_change_the_result() -> None:
    def skip(handler: Callable[..., Any]) -> Callable[..., Any]:
        return lambda job: Complete() if job.attempt > 1 else handler(job)

    def as_dead(handler: Callable[..., Any]) -> Callable[..., Any]:
        def call(job: Job) -> Any:
            try:
                return handler(job)
            except KeyError as error:
                return MoveToDlq(error)

        return call

    def fail(job: Job) -> None:
        raise KeyError("why")

    route = route_of(Mux(middleware=[skip]).register("t", fail, middleware=[as_dead]))
    assert isinstance(route.run(a_job()), MoveToDlq)
    assert route.run(a_job(attempt=2)) == Complete()


def test_a_payload_is_decoded_inside_of_middleware_which_may_change_it() -> None:
    seen: list[Any] = []

    def decrypting(handler: Callable[..., Any]) -> Callable[..., Any]:
        def call(job: Job) -> Any:
            assert job.arg is not None
            seen.append(handler(job._replace(arg=job.arg[::-1])))
            return seen[-1]

        return call

    def handle(mail: SendMail, job: Job) -> Any:
        return mail, job.arg

    mux = Mux(middleware=[decrypting]).register(SendMail, handle)
    assert run(mux, a_job("SendMail", b'{"to":"a"}'[::-1])) == (SendMail("a"), b'{"to":"a"}')
    assert isinstance(run(mux, a_job("SendMail", b'{"to":"a"}')), MoveToDlq)
    assert isinstance(seen[-1], MoveToDlq)


@both_colours
def test_middleware_that_changes_the_colour_of_a_handler_is_refused_by_name(is_async: bool) -> None:
    def bleaching(handler: Callable[..., Any]) -> Callable[..., Any]:
        return coloured(lambda *args: None, is_async=not is_async)

    def handle(job: Job) -> None: ...

    has, gave = ("coroutine", "plain") if is_async else ("plain", "coroutine")
    complaint = (
        f"bleaching returned a {gave} function for .*handle of job type 't', which is a {has}"
    )
    with pytest.raises(TypeError, match=complaint):
        Mux(middleware=[bleaching]).register("t", coloured(handle, is_async=is_async))


def test_middleware_that_returns_none_is_refused_by_name() -> None:
    def forgetful(handler: Callable[..., Any]) -> Any:
        pass

    with pytest.raises(TypeError, match=r"forgetful returned None for handler .* of job type 't'"):
        Mux().register("t", lambda _: None, middleware=[forgetful])
    with pytest.raises(TypeError, match="middleware must be a sequence"):
        Mux(middleware=forgetful)  # type: ignore[arg-type]


def test_middleware_sees_the_name_of_the_handler() -> None:
    names: list[str] = []

    def naming(handler: Callable[..., Any]) -> Callable[..., Any]:
        names.append(handler.__name__)
        return handler

    def send(mail: SendMail, state: str) -> None: ...

    mux = Mux(middleware=[naming]).register(SendMail, send)
    mux.bound("state")
    assert names == ["send", "send"]


def test_a_message_names_the_users_handler_and_not_its_wrapper() -> None:
    def misspelt(mail: SendMail) -> Any:
        return "done"

    mux = Mux(middleware=[telling([], "outer")]).register(SendMail, misspelt)
    result = route_of(mux, "SendMail").run(a_job("SendMail", b'{"to":"a"}'))
    assert isinstance(result, Retry)
    assert "misspelt of job type 'SendMail' returned str" in str(result.error)


# -- the state of a bound mux ---------------------------------------------------------------------


def test_a_bound_mux_is_another_one_with_the_same_types() -> None:
    def handle(job: Job, state: str) -> Any:
        return state

    mux = Mux().register("t", handle).register("u", lambda job, conn: conn, transactional=True)
    one, two = mux.bound("one"), mux.bound("two")
    assert (run(one, a_job()), run(two, a_job()), run(one.bound(3), a_job())) == ("one", "two", 3)
    assert run(one, a_job("u"), "conn") == "conn"
    assert one.transactional == {"u"}
    assert run(one.register("late", handle), a_job("late")) == "one"
    assert isinstance(mux.route(a_job("late")), MoveToDlq)
    assert run(mux.bound(None), a_job()) is None


def test_a_mux_whose_handlers_need_a_state_refuses_to_run_until_it_is_bound() -> None:
    def send(job: Job, state: str) -> None: ...

    mux = Mux().register("t", send)
    with pytest.raises(
        StateRequiredError, match="send of job type 't' has a parameter state: make"
    ):
        mux.check_bound()
    mux.bound(None).check_bound()
    assert issubclass(StateRequiredError, BgjobError)


# -- the priority of a retry ----------------------------------------------------------------------


def test_a_retry_has_the_priority_of_its_type_unless_it_names_one() -> None:
    mux = Mux().register("t", lambda _: Retry(5), retry_priority=-5)
    assert route_of(mux).run(a_job()) == Retry(5, priority=-5)
    mux = Mux().register("t", lambda _: Retry(5, priority=0), retry_priority=-5)
    assert route_of(mux).run(a_job()) == Retry(5, priority=0)
    error = ValueError("why")
    route = route_of(Mux().register("t", lambda _: None, retry_priority=-5, backoff=lambda _: 2.0))
    assert route.failed(a_job(), error) == Retry(2.0, error, priority=-5)
    mux = Mux().register("t", lambda _: Retry(5))
    assert route_of(mux).run(a_job()) == Retry(5)


def test_the_retry_after_a_commit_in_doubt_has_its_priority() -> None:
    exchange = Exchange()
    commit_unknown = CommitUnknown(Complete(), Retry(1.0, "why", priority=-5))
    exchange.settle(Outcome(Claimed(a_job(), 1), commit_unknown, None))
    [postponed] = exchange.postpone
    assert (postponed.delay, postponed.error, postponed.priority) == (1.0, "why", -5)


@both_colours
@pytest.mark.parametrize("transactional", [False, True])
def test_a_failed_job_goes_back_with_the_priority_of_its_retry(
    dsn: str, conn: psycopg.Connection, is_async: bool, transactional: bool
) -> None:
    def fail(job: Job, *conn: Any) -> Result:
        match job.attempt:
            case 1:
                return Retry(0, priority=-5)
            case 2:
                raise ValueError("by policy")
            case 3:
                return Reschedule(0)
            case _:
                return Retry(0, priority=-32768)

    options: dict[str, Any] = {"retry_priority": 3, "backoff": lambda _: 0.0}
    options["transactional"] = transactional
    mux = Mux().register("t", coloured(fail, is_async=is_async), **options)
    priorities = []
    with Client(dsn) as client:
        client.enqueue(EnqueueRequest("q", "t", priority=10))
        for _ in range(3):
            client.do("q", mux)
            priorities.append(row(conn, "select priority, attempt from bgjob_job"))
        conn.execute("update bgjob_job set attempt = 3")
        client.do("q", mux)
        priorities.append(row(conn, "select priority, attempt from bgjob_job"))
    assert priorities == [(-5, 1), (3, 2), (3, 2), (-32768, 4)]


def test_a_retry_of_a_higher_priority_overtakes_a_backlog(launcher: Launcher) -> None:
    observer = Recorder()
    ran: list[str] = []

    def handle(job: Job) -> Result:
        ran.append(job.id)
        if job.id != "a" or job.attempt > 1:
            if (
                job.id != "before"
            ):  # on a busy machine they could all run before the retry is stored
                observer.wait_for("retried", "a")
            return Complete()
        launcher.enqueue(*(f"other {n}" for n in range(100)))
        return Retry(0, priority=-5)

    launcher.enqueue("a", priority=10)
    launcher.enqueue("before")  # so that the worker knows the priority of the others
    launcher.start(Mux().register("t", handle), observer=observer, poll_interval=NEVER)
    observer.wait_for("completed", times=102)
    # Few are claimed ahead so soon. With its own priority it would be the last.
    assert ran[:2] == ["before", "a"] and ran.index("a", 2) <= 12, ran
    assert len(ran) == 103


def test_a_retry_with_a_new_priority_is_found_when_it_is_due(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    observer = Recorder()

    def handle(job: Job) -> Result:
        return Retry(0.2, priority=-job.attempt) if job.attempt < 4 else Complete()

    launcher.enqueue("a")
    launcher.start(Mux().register("t", handle), observer=observer, poll_interval=NEVER)
    observer.wait_for("completed", "a")
    assert all_done(conn)
    assert len(observer.of("retried")) == 3


PROGRAM = """
import os, signal, threading
from bgjob import Client, Job, Mux, NoopObserver, Retry, Worker

ended = threading.Event()

class Observer(NoopObserver):
    def job_will_be_retried(self, job, delay, error, /):
        os.kill(os.getpid(), signal.SIGKILL)

    def queue_is_empty(self, queue, /):
        ended.set()

def handle(job: Job):
    print(job.id, job.attempt, flush=True)
    if job.id == "failed" and job.attempt == 1:
        return Retry(60, priority=-5)

client = Client(os.environ["DATABASE_URL"])
with Worker(client, "q", Mux().register("t", handle), observer=Observer()):
    assert ended.wait(20)
"""


def test_a_failed_job_keeps_its_place_at_the_front_when_its_process_is_killed_and_restarted(
    dsn: str, conn: psycopg.Connection
) -> None:
    def work() -> tuple[int, list[str]]:
        run = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env={**os.environ, "DATABASE_URL": dsn, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        return run.returncode, run.stdout.splitlines()

    with Client(dsn) as client:
        client.enqueue(EnqueueRequest("q", "t", id="failed", priority=10))
        assert work() == (-signal.SIGKILL, ["failed 1"])
        client.bulk_enqueue([EnqueueRequest("q", "t", id=f"other {n}") for n in range(5)])
        conn.execute("update bgjob_job set next_run_at = now() where id = 'failed'")
        assert work() == (0, ["failed 2", *(f"other {n} 1" for n in range(5))])
    assert rows(conn, "select id from bgjob_job") == []
