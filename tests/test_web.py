"""The page is closed by default, says what is true, and changes only what it is allowed to.

It is asked as an ASGI application, without a server and without a browser.
"""

import json
import re
import time
from collections.abc import Iterator
from html import unescape
from typing import Any
from urllib.parse import quote

import httpx
import psycopg
import pytest
from support.clients import HOSTILE
from support.database import count, rows
from support.databases import Databases
from support.pages import HOST, OURS, Pages, all_but, may, opened

from bgjob._words import printable
from bgjob import Client, EnqueueRequest
from bgjob.ext.web import (
    Access,
    Shown,
    TokenAccess,
    database,
    guard,
    routes,
)
from bgjob.ext.web.frame import PERMISSIONS, READING, original, path
from bgjob.ext.web.redaction import MASK

NASTY = "a/b?c=<b>'\"&d"
NAMES = [NASTY, "..", ".", "~", "~x~", "x/payload", "a/../b", "/a/", "%2F", *HOSTILE]
"""Names that a path, a browser or a proxy could take for something else."""

SECRET = {"user": {"Password": "hunter2", "name": "ann"}, "cards": [{"number": 4111}], "to": "bob"}

WORLD = """
    insert into bgjob_worker
        (host, pid, program, release, version, queues, slots, running, types, lease, every, note,
        longest, longest_since, seen_at)
    values
        ('web-1', 41, 'shop.jobs:mux', 'r7', '1', '{mail}', '{8}', '{8}', '{send}', 60, 10, null,
        '{"job 3"}', array[now() - interval '7 min'], now()),
        ('web-2', 42, 'shop.jobs:mux', 'r6', '1', '{mail}', '{8}', '{1}', '{send}', 60, 10,
        'OperationalError: password=hunter2', '{}', '{}', now() - interval '1 h');
    insert into bgjob_schedule
        (name, spec, queue, type, priority, next_run_at, last_job_id, last_run_at)
    values ('nightly', 'every day', 'mail', 'send', 0, now() - interval '1 h', 'gone', now());
"""


def fill(dsn: str) -> None:
    with Client(dsn) as client, psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute(WORLD.encode())
        client.bulk_enqueue(
            [
                EnqueueRequest("mail", "send", SECRET, id="job 1"),
                EnqueueRequest("mail", "send", b"\xff\x00", id="job 2", delay=3600),
                EnqueueRequest("mail", "send", id="job 3"),
                EnqueueRequest("mail", "send", id="job 4", exclusive="key"),
                EnqueueRequest(NASTY, NASTY, {"<b>": NASTY}, id=NASTY),
            ]
        )
        client.bulk_enqueue(EnqueueRequest("mail", "die", SECRET, id=f"d{n}") for n in range(3))
        conn.execute(
            """
            update bgjob_job set token = 1, lease_until = now() + interval '1 h', attempt = 1
            where id = 'job 3'
            """
        )
        conn.execute(
            "update bgjob_job set attempt = 2, last_error = %s where id = 'job 2'",
            ["ValueError: token='hunter2' <svg onload=alert(1)>\nline 2 \u202e"],
        )
        bury(conn, "die")


def bury(conn: psycopg.Connection, type_: str) -> None:
    conn.execute(
        """
        with gone as (delete from bgjob_job where type = %s returning *)
        insert into bgjob_dead_job (job_id, queue, type, arg, attempt, last_error, priority,
            next_run_at, job_created_at, job_updated_at, fingerprint)
        select id, queue, type, arg, 3, 'KeyError: password=hunter2 <b>', priority, next_run_at,
            created_at, updated_at, 77 from gone
        """,
        [type_],
    )


FINGERPRINT = f"{77:012x}"


@pytest.fixture(scope="module")
def world(databases: Databases, template: str) -> Iterator[str]:
    """The DSN of a database that the tests of this module look at, and do not change."""
    with databases.make(template=template, prefix="web") as (_, dsn):
        fill(dsn)
        yield dsn


@pytest.fixture(scope="module")
def page(world: str) -> Iterator[Pages]:
    with opened(world, name="shop", colour="red") as pages:
        yield pages


LOOKS = [
    "/",
    "/queues/mail",
    "/queues/none",
    "/jobs",
    "/jobs?queue=mail&state=due",
    "/jobs?error=hunter",
    "/jobs?key=key",
    "/jobs?id=jo",
    "/jobs/job%201",
    "/jobs/job%202",
    "/jobs/job%203",
    "/jobs/d0",
    "/jobs/none",
    "/dead",
    "/dead?queue=mail&error=Key",
    "/dead/1",
    f"/dead/groups/{FINGERPRINT}",
    "/dead/groups/aaaaaaaaaaaa",
    "/limits",
    "/schedules",
    "/workers",
    "/workers/1",
    "/doctor",
    "/doctor?run=1",
]


@pytest.mark.parametrize("url", LOOKS)
def test_each_page_answers_as_html_and_as_json_and_hides_secrets_in_both(
    page: Pages, url: str
) -> None:
    found = page.get(url)
    assert found.status_code == 200, found.text
    assert found.headers["content-type"] == "text/html; charset=utf-8"
    assert "hunter2" not in found.text and "4111" not in found.text
    assert "<svg onload" not in found.text and "\u202e" not in found.text
    assert "style=" not in found.text and "onclick" not in found.text
    head = page.ask("HEAD", url)
    assert (head.status_code, head.content) == (200, b"")
    api = page.get("/api" + url)
    assert api.headers["content-type"] == "application/json"
    assert api.json().keys() == page.json(url).keys()
    assert "hunter2" not in api.text and "4111" not in api.text


def parts() -> list[str]:
    names = {"queue": "mail", "id": "job 1", "fingerprint": FINGERPRINT, "number": "1"}
    return [
        path(*(names[s[1:-1]] if s[0] == "{" else s for s in found.segments), part=part)
        for _, found in routes.PAGES
        for part in found.parts
    ]


@pytest.mark.parametrize("url", parts())
def test_a_part_is_one_element_and_is_not_sent_again_while_it_stays_the_same(
    page: Pages, url: str
) -> None:
    page.get(url)  # what is kept is at least as young now
    first = page.get(url)
    assert first.status_code == 200, first.text
    part = url.partition("part=")[2]
    assert re.match(rf"\s*<(\w+) [^>]*id=\"{part}\"", first.text), first.text[:200]
    again = page.get(url, **{"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == first.headers["etag"]
    assert page.get(url.replace(part, "nothing")).status_code == 404


def test_ten_viewers_cost_as_much_as_one(world: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    overview = database.Reader.overview

    async def count(reader: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(reader)
        return await overview(reader, *args, **kwargs)

    monkeypatch.setattr(database.Reader, "overview", count)
    with opened(world) as pages:
        found = pages.together(*["/", "/queues/mail", "/?part=queues", "/api/"] * 10)
        assert {each.status_code for each in found} == {200}
    assert len(asked) == 1


def test_the_first_page_says_what_hurts(page: Pages) -> None:
    found = page.json("/")
    texts = [phrase["text"] for phrase in found["summary"]]
    assert texts[:2] == ["1 worker", "1 lost"]
    assert any(text.startswith("Oldest due: ") for text in texts)
    assert "3 died in the last hour" in texts
    queues = {queue["queue"]: queue for queue in found["queues"]["rows"]}
    assert queues["mail"]["slots"] == 8 and queues["mail"]["state"] == "open"
    assert queues[NASTY]["state"] == "no worker"
    assert found["queues"]["rows"][0]["queue"] == NASTY  # it hurts most
    assert [group["fingerprint"] for group in found["groups"]] == [FINGERPRINT]
    assert [job["id"] for job in found["longest"]] == ["job 3"]
    assert page.json("/?queue=MA")["queues"]["rows"][0]["queue"] == "mail"


def test_lists_lead_to_the_next_page_and_a_whole_id_to_its_job(page: Pages) -> None:
    found = page.json("/jobs?queue=mail")
    assert {job["id"] for job in found["rows"]} == {"job 1", "job 2", "job 3", "job 4"}
    states = {job["id"]: job["state"] for job in found["rows"]}
    assert states == {"job 1": "due", "job 2": "retry", "job 3": "running", "job 4": "due"}
    assert [chip["without"] for chip in page.json("/jobs?queue=mail&type=x")["chips"]] == [
        "/jobs?type=x",
        "/jobs?queue=mail",
    ]
    assert page.get("/jobs?id=job+1").headers["location"] == "/jobs/job%201"
    assert page.get("/jobs?id=d1").headers["location"] == "/jobs/d1"
    assert page.get("/jobs?state=silly").status_code == 400
    assert page.get("/jobs?after=silly").status_code == 400


# -- names -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_any_name_returns_from_a_path_as_it_was(name: str) -> None:
    address = path("queues", name, "pause")
    url = httpx.URL(HOST + address)
    assert str(url) == HOST + address  # no client resolves or repairs it
    found = routes.found(routes.ACTIONS, url.path)
    assert found is not None and found[1] == {"queue": name}
    assert original(httpx.URL(HOST + path("jobs", name)).path.removeprefix("/jobs/")) == name
    assert routes.found(routes.DOWNLOADS, httpx.URL(HOST + path("jobs", name)).path) is None


def test_a_queue_of_any_name_is_shown_paused_and_resumed(
    dsn: str, conn: psycopg.Connection
) -> None:
    with opened(dsn) as pages:
        for name in NAMES:
            here = path("queues", name)
            done = pages.post(path("queues", name, "pause"), {"next": here})
            assert (done.status_code, done.headers["location"]) == (303, here)
            found = pages.get(here)
            assert found.status_code == 200
            heading = re.search(r"<h1[^>]*>(.*?)</h1>", found.text, re.DOTALL)
            assert heading is not None
            assert printable(name)[:150] in unescape(re.sub("<[^>]*>", "", heading[1]))
        assert {queue for (queue,) in rows(conn, "select queue from bgjob_pause")} == {*NAMES}
        for name in NAMES:
            pages.post(path("queues", name, "resume"))
    assert count(conn, "bgjob_pause") == 0


WEIRD = ["%00", "%ED%A0%80", "%0A", "a" * 256, "..%2F..", "9" * 30]


@pytest.mark.parametrize("value", WEIRD, ids=ascii)
def test_no_address_makes_the_page_fail(page: Pages, value: str) -> None:
    """What nothing can be named is refused, or not found; and never an error of the page's own."""
    for url in (
        f"/{value}",
        f"/queues/{value}",
        f"/jobs/{value}",
        f"/jobs/{value}/payload",
        f"/dead/{value}",
        f"/dead/{value}/payload",
        f"/dead/groups/{value}",
        f"/workers/{value}",
        f"/static/{value}",
        f"/static/{value}/{value}",
        f"/?part={value}",
        f"/?queue={value}",
        f"/queues/mail?span={value}",
        f"/doctor?run={value}",
        f"/dead?before={value}",
        *(
            f"/jobs?{name}={value}"
            for name in ("id", "queue", "type", "state", "key", "error", "after")
        ),
        *(f"/dead?{name}={value}" for name in ("queue", "type", "error")),
    ):
        for accept in ("text/html", "application/json"):
            found = page.get(url, accept=accept)
            assert found.status_code in {200, 303, 400, 404}, (url, found.text)
            assert_headers(found)
    for url in posts():
        changed = re.sub("(?<=/)(mail|job%20|nightly|0{10}4d)[^/]*", value, url)
        if changed != url:
            found = page.post(changed, {"reason": "why", "priority": "1", "until": "x"})
            assert found.status_code in {200, 303, 400, 404}, (changed, found.text)


def test_no_form_makes_the_page_fail(page: Pages) -> None:
    """Each field of each action with values that it cannot have, where nothing can be changed."""
    weird = [
        "\0",
        "\ud800".encode("utf-16", "surrogatepass"),
        "9" * 30,
        "-1",
        "x" * 9000,
        "1e9",
        "",
    ]
    for url in ("/queues/none/resume", "/dead/requeue", "/dead/purge", "/dead/groups/0/rest"):
        for name in ("next", "numbers", "queue", "error", "fingerprint", "upto", "expect", "rate"):
            for value in weird:
                found = page.post(url, {name: value})
                assert found.status_code in {200, 303, 400, 404}, (url, name, found.text)


# -- who may -------------------------------------------------------------------------------


def test_nobody_gets_in_without_the_token_wherever_they_knock(world: str) -> None:
    with opened(world, access=TokenAccess("t" * 24)) as pages:
        for url in [*LOOKS, *parts(), "/api/jobs", "/jobs/job%201/payload"]:
            assert pages.get(url).status_code == 401, url
        for url in posts():
            assert pages.post(url).status_code == 401, url
        for wrong in ("x" * 24, "", "é" * 24):
            assert pages.get(f"/?token={wrong}").status_code == 401
            headers = {"authorization": f"Bearer {wrong}".encode()}
            assert pages.ask("GET", "/", headers=headers).status_code == 401
        assert pages.get("/livez").text == "ok\n"
        assert pages.get("/readyz").text == "ok\n"
        assert "hunter2" not in pages.get("/").text and "mail" not in pages.get("/").text


def test_a_token_becomes_a_cookie_that_ends_and_leaves_the_address(
    world: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    access = TokenAccess()
    assert len(access.token) == 32 and TokenAccess().token != access.token
    with opened(world, access=access) as pages:
        first = pages.get(f"/jobs?queue=a%20b&token={access.token}")
        assert (first.status_code, first.headers["location"]) == (303, "/jobs?queue=a+b")
        [name] = pages.cookies
        cookie = first.headers["set-cookie"].lower()
        assert "httponly" in cookie and "samesite=strict" in cookie and "max-age=43200" in cookie
        assert access.token not in cookie
        assert pages.get("/").status_code == 200
        with opened(world, access=TokenAccess()) as other:
            other.cookies.update(pages.cookies)
            assert other.get("/").status_code == 401
        value = pages.cookies[name]
        until, _, proof = value.partition(".")
        for bad in (f"{int(until) + 1}.{proof}", "", "x", f"{until}.", f"²{value}"):
            pages.cookies.set(name, quote(bad), domain="jobs.example")
            assert pages.get("/").status_code == 401
        pages.cookies.set(name, value, domain="jobs.example")
        monkeypatch.setattr(time, "time", lambda: float(until) + 1)
        assert pages.get("/").status_code == 401
        monkeypatch.undo()
        pages.cookies.clear()
        assert pages.get("/", authorization=f"Bearer {access.token}").status_code == 200


def test_under_tls_the_cookie_belongs_to_the_host_alone(world: str) -> None:
    access = TokenAccess()
    with opened(world, access=access, trust=["127.0.0.1/32"]) as pages:
        tls = {"x-forwarded-proto": "https"}
        cookie = pages.get(f"/?token={access.token}", **tls).headers["set-cookie"]
        assert cookie.startswith("__Host-bgjob-") and "Secure" in cookie and "Path=/;" in cookie
    with opened(world, access=access) as pages:  # no proxy is trusted
        cookie = pages.get(f"/?token={access.token}", **tls).headers["set-cookie"]
        assert cookie.startswith("bgjob-") and "Secure" not in cookie


def test_a_link_on_another_site_is_asked_again_as_browsers_send_it_no_strict_cookie(
    world: str,
) -> None:
    with opened(world, access=TokenAccess()) as pages:
        link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
        found = pages.get("/jobs", **link)
        assert found.status_code == 200 and 'http-equiv="refresh"' in found.text
        assert "mail" not in found.text
        again = pages.get("/jobs", **link | {"sec-fetch-site": "same-origin"})
        assert again.status_code == 401


def posts() -> list[str]:
    """Every action there is, at something that exists."""
    names = {"queue": "mail", "id": "job 2", "name": "nightly", "fingerprint": FINGERPRINT}
    found = []
    for pattern, _ in routes.ACTIONS:
        plain = re.sub(r"\(\?P<(\w+)>[^)]*\)", lambda m: quote(names[m[1]]), pattern.pattern)
        found.append(plain.replace("\\", ""))
    return found


FIELDS = {
    "numbers": "1",
    "reason": "why",
    "priority": "3",
    "expect": "1",
    "sure": "yes",
    "rate": "1000",
    "stop_after": "5",
}


def state(conn: psycopg.Connection) -> list[Any]:
    tables = ("bgjob_job", "bgjob_dead_job", "bgjob_pause", "bgjob_schedule")
    return [rows(conn, f"select * from {table} order by 1") for table in tables]


def test_every_action_needs_its_permission_and_a_page_that_may_change_things(world: str) -> None:
    assert len(routes.ACTIONS) == len(posts()) > 10
    needed = [action.permission for _, action in routes.ACTIONS]
    assert {*needed} == PERMISSIONS - READING
    with psycopg.connect(world, autocommit=True) as conn:
        before = state(conn)
        for permission, url in zip(needed, posts(), strict=True):
            with opened(world, access=all_but(permission)) as pages:
                found = pages.post(url, FIELDS)
                assert found.status_code == 403, url
                assert permission in found.text
                assert pages.ask("POST", "/api" + url, json=FIELDS, headers=OURS).status_code == 403
        with opened(world, access=may("look")) as pages:
            assert all(pages.post(url, FIELDS).status_code == 403 for url in posts())
            assert '<form method="post"' not in pages.get("/queues/mail").text
        with opened(world, read_only=True) as pages:
            for url in posts():
                found = pages.post(url, FIELDS)
                assert found.status_code == 403 and "read-only" in found.text, url
            assert "read-only" in pages.get("/").text
            for url in LOOKS:
                assert 'method="post"' not in pages.get(url).text, url
        with opened(world, access=may("payloads", "jobs")) as pages:  # it may not look
            assert pages.get("/").status_code == 403
            assert all(pages.post(url, FIELDS).status_code == 403 for url in posts())
        assert state(conn) == before


SITES = {
    "from our page": (OURS, True),
    "from our page over plain http": ({"origin": HOST}, True),
    "from our page through tls": ({"origin": HOST.replace("http", "https")}, True),
    "from nowhere": ({}, False),
    "typed": ({"sec-fetch-site": "none"}, False),
    "from another site": ({"sec-fetch-site": "cross-site", "origin": HOST}, False),
    "from another port": ({"sec-fetch-site": "same-site", "origin": HOST + ":81"}, False),
    "from another port over plain http": ({"origin": HOST + ":81"}, False),
    "from a sandbox": ({"origin": "null"}, False),
    "from a program": ({"authorization": "Bearer x"}, True),
    "from a program that keeps cookies": ({"authorization": "Bearer x", "cookie": "a=b"}, True),
    "from another site with a token": (
        {"authorization": "Bearer x", "sec-fetch-site": "cross-site"},
        False,
    ),
    "from another origin with a token": (
        {"authorization": "Bearer x", "origin": "http://evil.example"},
        False,
    ),
    "with a password": ({"authorization": "Basic eDp4"}, False),
}


@pytest.mark.parametrize(("headers", "is_ours"), SITES.values(), ids=SITES)
def test_a_write_comes_from_a_page_of_ours_or_from_a_program(
    page: Pages, headers: dict[str, str], is_ours: bool
) -> None:
    found = page.post("/queues/none/resume", headers=headers)
    assert found.status_code == (303 if is_ours else 403), found.text


def test_the_page_answers_for_its_own_names_only(world: str) -> None:
    with opened(world, hosts=["jobs.example", "db1"]) as pages:
        for host, status in {
            "jobs.example": 200,
            "DB1:8080": 200,
            "jobs.example.": 200,
            "127.0.0.1:8080": 200,
            "[::1]:80": 200,
            "evil.example": 421,
            "jobs.example.evil.example": 421,
            "": 421,
        }.items():
            assert pages.get("/", host=host).status_code == status, host
        found = pages.get("/static/x/app.css", host="evil.example")
        assert found.status_code == 421
        assert pages.get("/livez", host="evil.example").status_code == 200


def test_every_answer_has_the_headers_whatever_it_is(
    page: Pages, monkeypatch: pytest.MonkeyPatch
) -> None:
    static = re.search(r"/static/\w+/app.css", page.get("/").text)
    assert static is not None
    etag = page.get("/schedules?part=schedules").headers["etag"]
    answers = {
        200: page.get("/"),
        303: page.post("/queues/none/resume"),
        304: page.get("/schedules?part=schedules", **{"if-none-match": etag}),
        400: page.get("/jobs?state=x"),
        403: page.post("/queues/none/resume", headers={}),
        404: page.get("/nothing"),
        405: page.ask("DELETE", "/"),
        413: page.ask("POST", "/dead/requeue", content=b"x" * (guard.LARGEST + 1), headers=OURS),
        415: page.ask("POST", "/dead/requeue", content=b"x", headers=OURS),
    }
    with opened("postgresql://nowhere", access=lambda _: None, hosts=["a"]) as closed:
        answers[421] = closed.get("/")
        answers[401] = closed.get("/", host="a")
    static_answer = page.get(static[0])
    assert "immutable" in static_answer.headers["cache-control"]
    assert "immutable" not in page.get("/static/0/app.css").headers["cache-control"]
    for other in (static_answer, page.get("/jobs/job%201/payload"), page.get("/livez")):
        assert_headers(other)
    for status, answer in answers.items():
        assert answer.status_code == status, answer.text
        assert_headers(answer)
    assert answers[200].headers["cache-control"] == "private, no-cache"
    assert answers[404].headers["cache-control"] == "no-store"


def assert_headers(answer: httpx.Response) -> None:
    policy = answer.headers["content-security-policy"]
    for part in (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types bgjob",
    ):
        assert part in policy
    assert "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "same-origin"
    assert answer.headers["cross-origin-opener-policy"] == "same-origin"
    assert "cache-control" in answer.headers
    assert "access-control-allow-origin" not in answer.headers


def test_a_page_that_fails_says_so_and_keeps_the_error_for_the_log(
    world: str, caplog: pytest.LogCaptureFixture
) -> None:
    def access(_: object) -> Access:
        raise RuntimeError("hunter2")

    with opened(world, access=access) as pages:
        found = pages.get("/")
        assert found.status_code == 500 and "hunter2" not in found.text
        assert_headers(found)
    assert "hunter2" in caplog.text


@pytest.mark.parametrize(
    ("to", "leads_to"),
    [
        ("/jobs?queue=a%2Fb", "/jobs?queue=a%2Fb"),
        ("//evil.example/", "/"),
        ("/\\evil.example", "/"),
        ("https://evil.example/", "/"),
        ("javascript:alert(1)", "/"),
        ("/jobs/../..//evil.example", "/"),
        ("/%2e%2e//evil.example", "/"),
        ("/jobs\r\nx: y", "/"),
        ("", "/"),
    ],
)
def test_an_action_leads_back_to_a_page_of_ours(page: Pages, to: str, leads_to: str) -> None:
    found = page.post("/queues/none/resume", {"next": to})
    assert found.headers["location"] == leads_to


# -- secrets ---------------------------------------------------------------------------


def payload(pages: Pages, url: str = "/jobs/job%201") -> Any:
    return pages.json(url)["payload"]


def test_a_payload_is_masked_at_any_depth_until_one_who_may_asks(world: str, page: Pages) -> None:
    masked = payload(page)
    assert masked["state"] == "masked"
    assert json.loads(masked["text"]) == {
        "user": {"Password": MASK, "name": "ann"},
        "cards": MASK,
        "to": "bob",
    }
    shown = payload(page, masked["reveal"])
    assert json.loads(shown["text"]) == SECRET
    assert page.get(masked["download"]).json() == SECRET
    assert page.get("/jobs/job%202/payload").content == b"\xff\x00"
    assert payload(page, "/jobs/job%202")["state"] == "hidden"  # who knows what it is
    assert "/jobs/job%202?payload=show" in page.get("/jobs/job%202").text
    assert payload(page, "/jobs/job%202?payload=show")["state"] == "binary"
    with opened(world, access=all_but("payloads")) as pages:
        assert payload(pages)["reveal"] == payload(pages)["download"] == ""
        assert "hunter2" not in pages.get("/jobs/job%201?payload=show").text
        assert pages.get("/jobs/job%201/payload").status_code == 403
        assert pages.get("/dead/1/payload").status_code == 403
    with opened(world, payloads="hide") as pages:
        assert payload(pages)["state"] == "hidden" and payload(pages)["text"] == ""
        assert "hunter2" not in pages.get("/jobs/job%201?payload=show").text
        assert pages.get("/jobs/job%201/payload").status_code == 403
    with opened(world, payloads="show", access=may("look")) as pages:
        assert json.loads(payload(pages)["text"]) == SECRET


@pytest.mark.parametrize("url", [each for each in LOOKS if "payload" not in each])
def test_a_function_decides_what_is_shown_wherever_it_is_shown(world: str, url: str) -> None:
    asked = []

    def redact(shown: Shown) -> Shown | None:
        asked.append(shown)
        if shown.id == "d0":
            return None
        error = None if shown.error is None else "REDACTED"
        arg = None if shown.arg is None else b'{"is": "REDACTED"}'
        return Shown(shown.id, shown.queue, shown.type, arg, error)

    with opened(world, redact=redact) as pages:
        for text in (pages.get(url).text, pages.get("/api" + url).text):
            for secret in ("hunter2", "KeyError", "ValueError", "4111", "bob"):
                assert secret not in text.replace("web-2", ""), secret
        if url == "/jobs/job%201":
            assert "REDACTED" in pages.get(url).text
            assert pages.get("/jobs/job%201/payload").json() == {"is": "REDACTED"}
        if url == "/dead/1":
            assert pages.get("/dead/1/payload").status_code == 404
    assert asked or url not in ("/", "/jobs", "/jobs/job%201", "/jobs/job%202", "/dead", "/dead/1")


@pytest.mark.parametrize(
    "error",
    [
        "KeyError: {'password': 'hunter2', 'x': 1}",
        'bad: {"api_token": "hunter2\\" more"}',
        "cookie=hunter2; path=/",
        "Authorization: Bearer hunter2",
        "card: {'number': hunter2, 'deep': {'x': 'hunter2'}}",
        "PASSWORD=hunter2",
    ],
)
def test_what_looks_like_a_secret_is_masked_in_errors(world: str, error: str) -> None:
    from bgjob.ext.web.redaction import Redaction

    shown = Redaction("mask", None).error(Shown("i", "q", "t", None, error))
    assert shown is not None and "hunter2" not in shown and MASK in shown
    assert Redaction("show", None).error(Shown("i", "q", "t", None, error)) == error


def test_a_payload_that_is_large_deep_or_no_json_is_not_parsed(page: Pages) -> None:
    from bgjob.ext.web.redaction import LARGEST, Redaction

    redaction = Redaction("mask", None)
    for arg in (b'{"password": 1, "x": "' + b"x" * LARGEST + b'"}', b"[" * 9999, b"password=x"):
        shown = redaction.payload(
            Shown("i", "q", "t", arg), may_reveal=False, is_revealed=False, at="/jobs/i"
        )
        assert (shown.state, shown.text) == ("hidden", "")
        shown = redaction.payload(
            Shown("i", "q", "t", arg), may_reveal=True, is_revealed=True, at="/jobs/i"
        )
        assert shown.state == "shown" and len(shown.text) <= LARGEST
        assert shown.is_cut == (len(arg) > LARGEST)
