"""Headers beside the payload, and the function that wraps an enqueue."""

import copy
import json
import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from html import escape
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import orjson
import psycopg
import pytest
from support.clients import Colour
from support.database import count, row, rows
from support.jobs import a_job
from support.pages import opened
from support.workers import Launcher, Recorder

from bgjob import (
    Client,
    EnqueueRequest,
    Job,
    JobAlreadyExistsError,
    MoveToDlq,
    Mux,
    Reschedule,
    Result,
    Retry,
    cli,
    sql,
)
from bgjob._sql import enqueues
from bgjob._sql.notices import LOCK_CLASS, bucket
from bgjob.client import OnEnqueue
from bgjob.errors import RequestsRequiredError
from bgjob.ext.web import create_app
from bgjob.ext.web.redaction import MASK, Shown
from bgjob.ext.web.traces import trace_of
from bgjob.schedule import Schedule
from bgjob.testing import assert_enqueued, drain

HEADERS = {
    "tenant": "é✓😀 \\u0000 \"'",
    "n": 1,
    "x": 1e300,
    "big": 1e22,
    "deep": {"list": [None, True, {}]},
    "": "",
}
HOSTILE = [b"[1]", b'"x"', b"1", b"null", b"1e999", b'{"a": 1, "a": 2}', b"[" * 3000 + b"]" * 3000]


def request(id: str = "a", queue: str = "q", **options: Any) -> EnqueueRequest:
    return EnqueueRequest(queue, "t", id=id, **{"headers": HEADERS} | options)


# -- values ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "error", "text"),
    [
        (None, TypeError, "headers must be a mapping from str, not NoneType"),
        ([("a", 1)], TypeError, "headers must be a mapping from str, not list"),
        ({1: "x"}, TypeError, "names of type str, not 1"),
        ({"x": object()}, TypeError, "cannot be encoded as JSON"),
        ({"x": "\ud800"}, TypeError, "cannot be encoded as JSON"),
        ({"x": 2**64}, TypeError, "cannot be encoded as JSON"),
        ({"x": [float("nan")]}, ValueError, "NaN or infinity"),
        ({"x": "\0"}, ValueError, "NUL"),
        ({"\0": "x"}, ValueError, "NUL"),
        ({"x": "\\\0"}, ValueError, "NUL"),
        ({"x": "a" * 4096}, ValueError, "at most 4,096 bytes as JSON in ASCII, not 4,104"),
        ({"x": "é" * 700}, ValueError, "not 4,208"),
    ],
)
def test_a_request_refuses_headers_that_could_not_be_stored(
    headers: Any, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        EnqueueRequest("q", "t", headers=headers)
    with pytest.raises(error):
        EnqueueRequest("q", "t").with_headers(headers)


def test_the_headers_of_a_request_and_of_a_job_are_a_value() -> None:
    given = {"x": [1]}
    made = EnqueueRequest("q", "t", {"n": 1}, headers=given)
    given["x"] = [2]
    assert made.headers == {"x": [1]} == json.loads(json.dumps(made.headers))
    assert orjson.dumps(made.headers) == b'{"x":[1]}'
    changes: list[Callable[[Any], object]] = [
        lambda h: h.update(x=2),
        lambda h: h.__setitem__("x", 2),
        lambda h: h.__ior__({"x": 2}),
        lambda h: h.pop("x"),
        lambda h: h.setdefault("y", 2),
        lambda h: h.clear(),
    ]
    for change in changes:
        with pytest.raises(TypeError, match="headers cannot be changed"):
            change(made.headers)
    job = a_job()._replace(headers=made.headers)
    for same in (pickle.loads(pickle.dumps(job)), copy.deepcopy(job)):
        assert (same, hash(same)) == (job, hash(job))
    assert pickle.loads(pickle.dumps(made)) == made == copy.deepcopy(made) == replace(made)
    assert asdict(made)["headers"] == {"x": [1]}
    assert a_job().headers == {} == EnqueueRequest("q", "t").headers


def test_a_request_with_more_headers_is_otherwise_the_same() -> None:
    made = EnqueueRequest("q", "t", {"n": 1}, delay=3, priority=4, headers={"a": 1, "b": 1})
    more = made.with_headers({"b": 2, "c": 3})
    assert more == replace(made, headers={"a": 1, "b": 2, "c": 3})
    assert (more.payload, made.headers) == (made.payload, {"a": 1, "b": 1})


# -- kept ------------------------------------------------------------------------------


def test_headers_reach_every_place_that_shows_a_job(
    client: Any, conn: psycopg.Connection, dsn: str
) -> None:
    seen: list[Job] = []
    answers = iter([Retry(0, error="x"), Reschedule(0), MoveToDlq("why"), None])

    def handle(job: Job) -> Result | None:
        seen.append(job)
        return next(answers)

    mux = Mux().register("t", handle)
    client.enqueue(request())
    assert row(conn, "select headers->>'n', octet_length(headers::text) = length(headers::text) "
                     "from bgjob_job") == ("1", True)  # fmt: skip
    assert client.jobs.get("a").headers == HEADERS
    [listed] = client.jobs.list("a").jobs
    assert listed.headers == {}
    assert assert_enqueued(dsn)[0].headers == HEADERS
    for _ in range(3):
        client.do("q", mux)
    [dead] = client.dlq.list()
    assert dead.headers == HEADERS == client.dlq.get("a").headers
    client.dlq.requeue("a")
    client.do("q", mux)
    assert [job.headers for job in seen] == [HEADERS] * 4
    assert type(seen[0].headers["n"]) is int and type(seen[0].headers["big"]) is float


def test_headers_outlive_a_cancel_and_its_undoing_and_a_drain(
    client: Any, conn: psycopg.Connection, dsn: str
) -> None:
    client.enqueue(request())
    client.jobs.cancel("a")
    assert client.dlq.get("a").headers == HEADERS
    client.dlq.requeue("a")
    seen: list[Any] = []
    drain(dsn, "q", Mux().register("t", lambda job: seen.append(job.headers)))
    assert seen == [HEADERS]


@pytest.mark.parametrize("size", [3, 700], ids=["insert", "copy"])
def test_a_bulk_enqueue_writes_the_headers_of_those_that_have_some(
    client: Any, conn: psycopg.Connection, size: int
) -> None:
    ids = [f"{n:04}" for n in range(size)]
    client.bulk_enqueue(
        request(id_, headers={"n": n, "é": "✓"} if n % 2 else {}) for n, id_ in enumerate(ids)
    )
    found = rows(conn, "select id, headers from bgjob_job order by id")
    assert found == [(id_, {"n": n, "é": "✓"} if n % 2 else None) for n, id_ in enumerate(ids)]


def test_a_worker_hands_out_headers_and_an_exclusive_key_may_be_made_of_them(
    launcher: Launcher,
) -> None:
    seen: list[Any] = []

    def key(job: Job) -> str:
        return f"tenant:{job.headers.get('tenant')}"

    mux = Mux().register("t", lambda job: seen.append((job.headers, job.exclusive)), exclusive=key)
    with_key = mux.request("t", None, queue="q", headers={"tenant": 7})
    assert with_key.exclusive == "tenant:7"
    launcher.client.bulk_enqueue(
        [with_key, request("b", headers={"tenant": 8}), request("c", headers={})]
    )
    launcher.start(mux, observer=(recorder := Recorder()))
    recorder.wait_for("completed", times=3)
    assert sorted(seen, key=str) == [
        ({"tenant": 7}, "tenant:7"),
        ({"tenant": 8}, "tenant:8"),
        ({}, "tenant:None"),
    ]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_headers_that_were_written_by_hand_and_are_no_object_are_none(
    plain_client: Client, conn: psycopg.Connection, text: bytes
) -> None:
    for id_ in "ab":
        conn.execute(
            "insert into bgjob_job (id, queue, type, headers) values (%s, 'q', 't', %s)",
            (id_, text.decode()),
        )
    seen: list[Any] = []
    expected = {"a": 2} if text.startswith(b"{") else {}
    assert plain_client.jobs.get("a").headers == expected  # type: ignore[union-attr]
    mux = Mux().register("t", lambda job: seen.append(job.headers))
    plain_client.do("q", mux)
    assert seen == [expected]
    plain_client.jobs.cancel("b")
    assert [dead.headers for dead in plain_client.dlq.list()] == [expected]


@dataclass
class Mail:
    queue: ClassVar[str] = "q"
    to: str


def test_a_typed_job_has_headers_too(client: Any) -> None:
    assert EnqueueRequest.of(Mail("ann"), headers={"a": 1}).headers == {"a": 1}
    id_ = client.enqueue(Mail("ann"), headers={"a": 1})
    assert client.jobs.get(id_).headers == {"a": 1}


def test_a_schedule_refuses_headers() -> None:
    with pytest.raises(ValueError, match="schedule 's': its request must have no headers"):
        Schedule("s", every=60, request=request())


def test_commands_write_and_show_headers(
    dsn: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*args: str, status: int = 0) -> str:
        assert cli.main([*args]) == status
        out, err = capsys.readouterr()
        return out if status == 0 else err

    monkeypatch.setenv("BGJOB_DSN", dsn)
    run("enqueue", "q", "t", "--id", "a", "--headers", '{"tenant": "é\\u202e"}')
    assert run("job", "show", "a").splitlines()[-1] == r'headers       {"tenant":"\u00e9\u202e"}'
    assert json.loads(run("job", "show", "a", "--json"))["headers"] == {"tenant": "é\u202e"}
    run("job", "cancel", "a")
    assert r'headers       {"tenant":"\u00e9\u202e"}' in run("dlq", "show", "a")
    assert json.loads(run("dlq", "show", "a", "--json"))["headers"] == {"tenant": "é\u202e"}
    run("enqueue", "q", "t", "--id", "b")
    assert "headers" not in run("job", "show", "b")
    run("job", "cancel", "b")
    assert "headers" not in run("dlq", "show", "b")
    for bad, text in (("{", "is not JSON"), ("[]", "must be a mapping")):
        assert text in run("enqueue", "q", "t", "--headers", bad, status=2)


def test_the_page_shows_headers_as_it_shows_payloads(plain_client: Client, dsn: str) -> None:
    plain_client.bulk_enqueue(
        [request(id_, headers={"to": "</pre><b>", "api_token": "hunter2"}) for id_ in "ab"]
    )
    plain_client.jobs.cancel("b")

    def redact(shown: Shown) -> Shown | None:
        return replace(shown, headers={"is": "REDACTED"}) if shown.headers else shown

    for url in ("/jobs/a", "/dead/1"):
        with opened(dsn) as pages:
            masked = pages.json(url)["headers"]
            assert json.loads(masked["text"]) == {"to": "</pre><b>", "api_token": MASK}
            assert "hunter2" in pages.json(f"{url}?payload=show")["headers"]["text"]
            text = pages.get(url).text
            assert "<h2>Headers</h2>" in text and "&lt;/pre&gt;" in text and "<b>" not in text
        with opened(dsn, payloads="hide") as pages:
            assert pages.json(url)["headers"]["state"] == "hidden"
        with opened(dsn, redact=redact) as pages:
            assert json.loads(pages.json(url)["headers"]["text"]) == {"is": "REDACTED"}
    plain_client.enqueue(request("c", headers={}))
    with opened(dsn) as pages:
        assert "<h2>Headers</h2>" not in pages.get("/jobs/c").text


TRACE = "0af7651916cd43dd8448eb211c80319c"
TEMPLATE = "https://traces.example.com/{trace_id}?x={y}&<b>#'"


def test_the_page_of_a_job_links_to_its_trace(plain_client: Client, dsn: str) -> None:
    context = f"00-{TRACE}-b7ad6b7169203331-01"
    headers = {"traceparent": context, "tracestate": "x=1"}
    plain_client.bulk_enqueue([request(id_, headers=headers) for id_ in "ab"])
    plain_client.jobs.cancel("b")
    url = TEMPLATE.replace("{trace_id}", TRACE)
    link = f'<a href="{escape(url, quote=True).replace("&#x27;", "&#39;")}" rel="noreferrer">{TRACE}</a>'
    for page in ("/jobs/a", "/dead/1"):
        with opened(dsn, trace_url=TEMPLATE, payloads="hide") as pages:
            assert pages.json(page)["trace"] == {"id": TRACE, "url": url}
            assert link in pages.get(page).text
        with opened(dsn) as pages:
            assert pages.json(page)["trace"] is None and "noreferrer" not in pages.get(page).text
        for redact in (lambda shown: None, lambda shown: replace(shown, headers={})):
            with opened(dsn, trace_url=TEMPLATE, redact=redact) as pages:
                assert TRACE not in pages.get(page).text


@pytest.mark.parametrize(
    "context",
    [
        7,
        [f"00-{TRACE}-b7ad6b7169203331-01"],
        "javascript:alert(1)",
        f"00-{TRACE.upper()}-b7ad6b7169203331-01",
        f"00-{'0' * 32}-b7ad6b7169203331-01",
        f"ff-{TRACE}-b7ad6b7169203331-01",
        f"00-{TRACE}-b7ad6b7169203331-01\n",
        f"00-{TRACE}/../x-b7ad6b7169203331-01",
        f"00-{TRACE}-b7ad6b7169203331-01-" + "x" * 3000,
        "00-" + "١" * 32 + "-b7ad6b7169203331-01",
    ],
    ids=range(10),
)
def test_a_header_that_is_no_context_of_a_trace_is_no_link(context: Any) -> None:
    assert trace_of({"traceparent": context}, TEMPLATE) is None


def test_a_context_of_a_later_version_is_one() -> None:
    assert trace_of({"traceparent": f"01-{TRACE}-b7ad6b7169203331-01-more"}, TEMPLATE)


@pytest.mark.parametrize(
    "address",
    [
        "javascript:alert('{trace_id}')",
        "//traces.example.com/{trace_id}",
        "https://traces.example.com/",
        "https:///{trace_id}",
        "https://{trace_id}.example.com/",
        "https://traces.example.com/ {trace_id}",
        "https://traces.example.com/\n{trace_id}",
        "http://[::1/{trace_id}",
        "{trace_id}",
    ],
)
def test_a_template_that_is_no_address_of_a_trace_is_refused_at_the_start(
    dsn: str, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="trace_url must be an address"):
        create_app(dsn, access=lambda request: None, trace_url=address)
    assert cli.main(["web", "--dsn", dsn, "--listen", "127.0.0.1:0", "--trace-url", address]) == 2
    assert "trace_url must be an address" in capsys.readouterr().err


# -- what nobody uses costs nothing ------------------------------------------------------


def test_requests_without_headers_have_the_statements_and_parameters_of_before() -> None:
    plain, others = request(headers={}), request(headers={}, exclusive="k")
    assert enqueues.enqueue(plain, notify=True).params == {
        **{"id": "a", "queue": "q", "type": "t", "arg": None, "priority": 0},
        **{"class": LOCK_CLASS, "bucket": bucket("q")},
    }
    assert "headers" not in str(enqueues.enqueue(plain, notify=True).text)
    for has_literals in (True, False):
        many = enqueues.enqueue_many([plain, others], notify=True, has_literals=has_literals)
        assert "headers" not in str(many.text) and "headers" not in (many.params or {})
    copied = enqueues.copy_many([plain])
    assert copied is not None and "headers" not in copied.text
    assert list(copied.rows) == [("a", "q", "t", None, 0)]


@pytest.mark.parametrize("style", ["pyformat", "dollar"])
def test_the_public_statements_write_headers(
    plain_client: Client, conn: psycopg.Connection, style: Any
) -> None:
    text, params = sql.enqueue(request(), style)
    assert json.dumps(HEADERS, separators=(",", ":")) in list(
        params.values() if isinstance(params, dict) else params
    )
    if style == "pyformat":
        conn.execute(text, params)
        conn.execute(*sql.enqueue_many([request("b"), request("c", headers={})]))
        found = [plain_client.jobs.get(id_) for id_ in "abc"]
        assert [job and job.headers for job in found] == [HEADERS, HEADERS, {}]


# -- on_enqueue ------------------------------------------------------------------------


class Log:
    """A wrapper that adds a header, and records what it sees."""

    def __init__(self, name: str = "log", events: list[Any] | None = None) -> None:
        self.name = name
        self.events: list[Any] = [] if events is None else events

    @contextmanager
    def __call__(self, requests: Iterable[EnqueueRequest]) -> Iterator[Iterable[EnqueueRequest]]:
        self.events.append(f"{self.name} in")
        try:
            yield (r.with_headers({self.name: len(r.headers)}) for r in requests)
        except Exception as error:
            self.events.append(f"{self.name} {type(error).__name__}")
            raise
        self.events.append(f"{self.name} out")


def test_wrappers_see_each_enqueue_as_a_whole_the_first_outermost(
    colour: Colour, conn: psycopg.Connection
) -> None:
    events: list[Any] = []
    client = colour.client(on_enqueue=[Log("a", events), Log("b", events)])
    id_ = client.enqueue(Mail("ann"))
    assert client.jobs.get(id_).headers == {"a": 0, "b": 1}
    assert events == ["a in", "b in", "b out", "a out"]
    events.clear()
    for batch in ([request("x"), request("y")], iter([request("z")])):
        client.bulk_enqueue(batch)
    assert events == ["a in", "b in", "b out", "a out"] * 2
    assert client.jobs.get("y").headers == HEADERS | {"a": len(HEADERS), "b": len(HEADERS) + 1}
    events.clear()
    with pytest.raises(JobAlreadyExistsError):
        client.enqueue(request("x"))
    with pytest.raises(RequestsRequiredError):
        client.bulk_enqueue([])
    assert events[2:4] == ["b JobAlreadyExistsError", "a JobAlreadyExistsError"]
    assert events[-1] == "a RequestsRequiredError"
    assert client.bulk_enqueue([request("x"), request("new")], on_conflict="skip") == [None, "new"]
    assert client.bulk_enqueue(request(f"{n:05}", headers={}) for n in range(600))[-1] == "00599"
    assert row(conn, "select count(*) from bgjob_job where headers->>'b' = '1'") == (601,)


def test_a_wrapper_applies_in_the_callers_transaction_and_to_the_children_of_a_job(
    colour: Colour, dsn: str, conn: psycopg.Connection
) -> None:
    client = colour.client(on_enqueue=Log())
    caller = colour.connect()
    client.enqueue(request("a", headers={}), conn=caller)
    client.bulk_enqueue([request("b", headers={})], conn=caller)
    caller.commit()
    assert rows(conn, "select headers from bgjob_job") == [({"log": 0},)] * 2
    conn.execute("delete from bgjob_job")
    with Client(dsn, on_enqueue=Log()) as plain:

        def parent(job: Job, conn: psycopg.Connection) -> None:
            plain.enqueue(EnqueueRequest("child", "t"), conn=conn)

        plain.enqueue(request("parent", headers={}))
        client.do("q", Mux().register("t", parent, transactional=True))
    assert rows(conn, "select queue, headers from bgjob_job") == [("child", {"log": 0})]


@contextmanager
def raising(requests: Iterable[EnqueueRequest]) -> Iterator[Iterable[EnqueueRequest]]:
    raise KeyError("mine")
    yield requests


@contextmanager
def suppressing(requests: Iterable[EnqueueRequest]) -> Iterator[Iterable[EnqueueRequest]]:
    try:
        yield requests
    except JobAlreadyExistsError:
        pass


@contextmanager
def yielding(value: Any) -> Iterator[Any]:
    yield value


def undecorated(requests: Iterable[EnqueueRequest]) -> Iterator[Iterable[EnqueueRequest]]:
    yield requests


@pytest.mark.parametrize(
    ("wrapper", "error", "text"),
    [
        (raising, KeyError, "mine"),
        (suppressing, RuntimeError, "suppressed the error of an enqueue"),
        (undecorated, TypeError, "undecorated returned generator, not a context manager"),
        (list, TypeError, "list returned list, not a context manager"),
        (lambda _: yielding(None), TypeError, "must yield the requests to write, not NoneType"),
        (lambda _: yielding([1]), TypeError, "yielded int: it must yield requests"),
        (lambda _: yielding([]), TypeError, "0 requests for one"),
        (lambda r: yielding([*r, *r]), TypeError, "2 requests for one"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_wrapper_that_fails_is_an_error_of_the_enqueue_and_nothing_is_written(
    colour: Colour,
    conn: psycopg.Connection,
    wrapper: OnEnqueue,
    error: type[Exception],
    text: str,
) -> None:
    colour.client().enqueue(request("taken"))
    client = colour.client(on_enqueue=wrapper)
    with pytest.raises(error, match=text):
        client.enqueue(request("taken"))
    assert count(conn) == 1


@pytest.mark.parametrize("wrong", [1, [None], "ab"])
def test_a_client_refuses_what_is_no_wrapper(dsn: str, wrong: Any) -> None:
    with pytest.raises(TypeError, match="on_enqueue must be"):
        Client(dsn, on_enqueue=wrong)
