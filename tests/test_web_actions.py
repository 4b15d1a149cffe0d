"""What the buttons of the page change, and what they refuse to."""

import logging
import threading
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from support.clients import dead_letter
from support.database import count, row, rows
from support.pages import OURS, Pages, may, opened
from support.roles import Roles
from support.waiting import eventually

from bgjob import (
    Client,
    Complete,
    EnqueueRequest,
    Job,
    Limit,
    MoveToDlq,
    Mux,
    Result,
    Retry,
    Worker,
)
from bgjob.ext.web.frame import PERMISSIONS, path
from bgjob.triage import DeadGroup


@pytest.fixture
def page(dsn: str) -> Iterator[Pages]:
    with opened(dsn) as pages:
        yield pages


def said(pages: Pages, url: str = "/schedules") -> str:
    """The notice that the next page shows, once."""
    text = pages.get(url).text
    assert 'role="status">' in text
    assert 'class="notice' not in pages.get(url).text
    return text.partition('class="notice')[2].partition("</p>")[0].partition(">")[2]


def hidden(text: str) -> dict[str, str]:
    """The hidden fields of a confirmation."""
    import re
    from html import unescape

    fields = re.findall(r'<input type="hidden" name="([^"]*)" value="([^"]*)">', text)
    return {name: unescape(value) for name, value in fields}


def enqueue(client: Client, *ids: str, **options: Any) -> None:
    client.bulk_enqueue([EnqueueRequest("q", "t", id=id_, **options) for id_ in ids])


# -- jobs ------------------------------------------------------------------------------


def test_a_job_is_cancelled_for_a_reason_and_made_due_and_given_a_priority(
    page: Pages, plain_client: Client, conn: psycopg.Connection
) -> None:
    enqueue(plain_client, "a/b", "c", delay=3600)
    asked = page.post(path("jobs", "a/b", "cancel"), {"next": path("jobs", "a/b")})
    assert asked.status_code == 200 and "<h1>Cancel job a/b?</h1>" in asked.text
    assert 'name="reason"' in asked.text and count(conn, "bgjob_dead_job") == 0
    done = page.post(
        path("jobs", "a/b", "cancel"), hidden(asked.text) | {"reason": "a duplicate <b>"}
    )
    assert (done.status_code, done.headers["location"]) == (303, "/jobs/a%2Fb")
    assert said(page) == "Job a/b was cancelled before it ran."
    assert rows(conn, "select job_id, last_error from bgjob_dead_job") == [
        ("a/b", "cancelled by ann: a duplicate <b>")
    ]
    page.post("/jobs/c/priority", {"priority": "-3"})
    assert said(page) == "Job c has priority -3."
    page.post("/jobs/c/now")
    assert said(page) == "Job c is due now."
    assert row(conn, "select priority, next_run_at <= now() from bgjob_job") == (-3, True)
    page.post("/jobs/c/now")
    assert "due already" in said(page)
    page.post("/jobs/gone/now")
    assert "not there any more" in said(page)
    for wrong in ("", "x", "1.5", "99999"):
        assert page.post("/jobs/c/priority", {"priority": wrong}).status_code == 400, wrong


def test_a_running_job_is_abandoned_and_a_waiting_one_is_not(
    page: Pages, plain_client: Client, conn: psycopg.Connection
) -> None:
    enqueue(plain_client, "a", "b")
    conn.execute(
        "update bgjob_job set token = 1, attempt = 1, lease_until = now() + interval '1 h' "
        "where id = 'a'"
    )
    assert "Abandon job a?" in page.post("/jobs/a/abandon").text
    page.post("/jobs/a/abandon", {"reason": "it hangs"})
    assert said(page) == "Job a is abandoned."
    page.post("/jobs/b/abandon", {"reason": "it hangs"})
    assert "no worker has it" in said(page)
    assert rows(conn, "select job_id, last_error from bgjob_dead_job") == [
        ("a", "abandoned by ann: it hangs")
    ]


# -- queues and schedules --------------------------------------------------------------


def test_a_queue_is_paused_for_a_while_until_a_time_or_until_it_is_resumed(
    page: Pages, conn: psycopg.Connection
) -> None:
    page.post("/queues/q/pause")
    assert rows(conn, "select queue, until = 'infinity' from bgjob_pause") == [("q", True)]
    page.post("/queues/q/pause", {"for": "15m"})
    assert row(
        conn,
        "select until - now() between interval '14 min' and interval '15 min' from bgjob_pause",
    ) == (True,)
    page.post("/queues/q/pause", {"until": "2100-01-01T00:00+01:00"})
    assert row(conn, "select until = '2099-12-31 23:00Z' from bgjob_pause") == (True,)
    assert "paused until 2099" in said(page)
    for wrong in ({"for": "15"}, {"for": "x"}, {"until": "soon"}):
        assert page.post("/queues/q/pause", wrong).status_code == 400
    page.post("/queues/q/resume")
    assert count(conn, "bgjob_pause") == 0


def test_limits_of_queues_and_types_are_shown_set_changed_and_removed(
    page: Pages, plain_client: Client, conn: psycopg.Connection
) -> None:
    assert "No queue and no type has a limit." in page.get("/limits").text
    page.post("/limits/set", {"scope": "queue", "name": "q", "concurrency": "3"})
    assert said(page) == "Queue q is limited: 3 at once."
    page.post("/limits/set", {"scope": "queue", "name": "q", "rate": "14/s", "burst": "28"})
    page.post("/limits/set", {"scope": "type", "name": "<b>", "concurrency": "2"})
    assert said(page) == "Type &lt;b&gt; is limited: 2 at once."
    assert [(s.scope, s.name, str(s.limit)) for s in plain_client.limits.list()] == [
        ("queue", "q", "14/s, burst 28"),
        ("type", "<b>", "2 at once"),
    ]
    text = page.get("/limits").text
    assert "14/s, burst 28" in text and "&lt;b&gt;" in text and "<b>" not in text
    assert [each["name"] for each in page.json("/limits")["limits"]] == ["q", "<b>"]
    page.post("/limits/remove", {"scope": "type", "name": "<b>"})
    assert said(page) == "The limit of type &lt;b&gt; is removed."
    page.post("/limits/remove", {"scope": "type", "name": "<b>"})
    assert "had no limit that was set" in said(page)
    for wrong in (
        {"scope": "queue", "name": "q", "rate": "14"},
        {"scope": "queue", "name": "q", "burst": "3"},
        {"scope": "queue", "name": "q", "concurrency": "0"},
        {"scope": "host", "name": "q", "concurrency": "1"},
        {"scope": "queue", "concurrency": "1"},
    ):
        assert page.post("/limits/set", wrong).status_code == 400, wrong
    assert page.post("/limits/remove", {"scope": "x", "name": "q"}).status_code == 400
    assert row(conn, "select count(*) from bgjob_limit where is_set") == (1,)


def test_who_may_not_change_limits_sees_them_without_a_form(
    dsn: str, plain_client: Client, conn: psycopg.Connection
) -> None:
    plain_client.limits.set("queue", "q", Limit(3))
    others = PERMISSIONS - {"limits"}
    with opened(dsn, access=may(*others, user="zoe")) as pages:
        text = pages.get("/limits").text
        assert "3 at once" in text and "limits/set" not in text and "limits/remove" not in text
        for action in ("set", "remove"):
            fields = {"scope": "queue", "name": "q", "concurrency": "9"}
            assert pages.post(f"/limits/{action}", fields).status_code == 403
    assert row(conn, "select concurrency from bgjob_limit where is_set") == (3,)


def test_a_schedule_is_run_paused_resumed_and_removed_once_that_is_confirmed(
    page: Pages, conn: psycopg.Connection
) -> None:
    conn.execute(
        "insert into bgjob_schedule (name, spec, queue, type, priority) "
        "values ('a/b', 'daily', 'q', 't', 0)"
    )
    page.post(path("schedules", "a/b", "run"))
    assert row(conn, "select id like 'schedule:a/b:%%' from bgjob_job") == (True,)
    page.post(path("schedules", "a/b", "pause"))
    assert row(conn, "select paused from bgjob_schedule") == (True,)
    page.post(path("schedules", "a/b", "resume"))
    assert row(conn, "select paused from bgjob_schedule") == (False,)
    asked = page.post(path("schedules", "a/b", "remove"))
    assert "Remove schedule a/b?" in asked.text and count(conn, "bgjob_schedule") == 1
    page.post(path("schedules", "a/b", "remove"), hidden(asked.text))
    assert count(conn, "bgjob_schedule") == 0
    for action in ("run", "pause", "resume", "remove"):
        assert page.post(f"/schedules/none/{action}", {"sure": "yes"}).status_code == 404


# -- dead jobs -------------------------------------------------------------------------


def died(client: Client, *ids: str, error: str = "KeyError: 'x'") -> DeadGroup:
    dead_letter(client, *(EnqueueRequest("q", "t", id=id_) for id_ in ids), error=error)
    return client.dlq.groups()[0]


def test_dead_jobs_are_requeued_by_number_and_purged_once_that_is_confirmed(
    page: Pages, plain_client: Client, conn: psycopg.Connection
) -> None:
    died(plain_client, "a", "b", "c")
    selected = page.get("/dead").text
    assert selected.count('type="checkbox" name="numbers"') == 3
    assert 'formaction="/dead/purge"' in selected
    numbers = {id_: number for number, id_ in rows(conn, "select id, job_id from bgjob_dead_job")}
    page.post("/dead/requeue", {"numbers": [str(numbers["a"]), "999"]})
    assert said(page).startswith("1 job went back to its queue. 1 job stayed dead")
    assert rows(conn, "select id from bgjob_job") == [("a",)]
    asked = page.post("/dead/purge", {"numbers": str(numbers["b"])})
    assert "Purge 1 dead job?" in asked.text and count(conn, "bgjob_dead_job") == 2
    page.post("/dead/purge", hidden(asked.text))
    assert rows(conn, "select job_id from bgjob_dead_job") == [("c",)]
    assert page.post("/dead/purge").status_code == 400
    assert page.post("/dead/purge", {"numbers": "x"}).status_code == 400
    assert page.post("/dead/purge", {"fingerprint": "x"}).status_code == 400
    assert page.post("/dead/purge", {"numbers": ["1"] * 1001}).status_code == 400


def test_a_number_that_was_confirmed_must_still_be_right(
    page: Pages, plain_client: Client, conn: psycopg.Connection
) -> None:
    died(plain_client, "a", "b")
    asked = page.post("/dead/purge", {"queue": "q", "next": "/dead"})
    assert "Purge 2 dead jobs?" in asked.text
    fields = hidden(asked.text)
    assert (fields["queue"], fields["expect"], fields["next"]) == ("q", "2", "/dead")
    died(plain_client, "later")  # it is not what was asked about
    plain_client.dlq.purge("a")
    asked = page.post("/dead/purge", fields)
    assert asked.status_code == 200 and "Purge 1 dead job?" in asked.text
    assert "It was 2 jobs" in asked.text and count(conn, "bgjob_dead_job") == 2
    page.post("/dead/purge", hidden(asked.text))
    assert rows(conn, "select job_id from bgjob_dead_job") == [("later",)]
    asked = page.post("/dead/requeue", {"error": "Key"})
    page.post("/dead/requeue", hidden(asked.text))
    assert rows(conn, "select id from bgjob_job") == [("later",)]


def test_more_than_a_page_should_change_is_left_to_the_shell(
    page: Pages, plain_client: Client, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bgjob.ext.web.actions import dead, groups
    from bgjob.ext.web.pages import dead as pages

    group = died(plain_client, "a", "b", "c")
    for module in (dead, groups, pages):
        monkeypatch.setattr(module, "MOST_REPLAYED", 2)
    for url, command in {
        "/dead/purge": "bgjob dlq purge --queue q",
        "/dead/requeue": "bgjob dlq requeue --queue q",
        f"/dead/groups/{group.fingerprint}/rest": f"bgjob triage {group.fingerprint} --rest",
    }.items():
        found = page.post(url, {"queue": "q"})
        assert found.status_code == 409 and command in found.text
    assert (
        f"bgjob triage {group.fingerprint} --rest"
        in page.get(f"/dead/groups/{group.fingerprint}").text
    )
    assert count(conn, "bgjob_dead_job") == 3


# -- groups ----------------------------------------------------------------------------


def until(pages: Pages, url: str, *states: str) -> Any:
    """What a group's page shows once its canary or rest is in one of these states."""
    found: list[Any] = []

    def is_there() -> bool:
        view = pages.json(url)
        found[:] = [each for each in (view["rest"], view["canary"]) if each]
        return any(each["state"] in states for each in found)

    assert eventually(is_there), found
    return next(each for each in found if each["state"] in states)


def test_a_group_and_a_dead_job_say_on_which_worker_they_died(
    page: Pages, plain_client: Client, conn: psycopg.Connection
) -> None:
    for id_ in "ab":
        plain_client.enqueue(EnqueueRequest("q", "t", id=id_))
    mux = Mux().register("t", lambda _: MoveToDlq("no"))
    with Worker(plain_client, "q", mux, poll_interval=0.05, release="7.<b>"):
        assert eventually(lambda: count(conn, "bgjob_dead_job") == 2)
        [worker] = plain_client.workers()
    [group] = plain_client.dlq.groups()
    at = f"/dead/groups/{group.fingerprint}"
    number = plain_client.dlq.list()[0].number
    [told] = page.get(f"/api{at}").json()["died_on"]
    assert told == {
        "number": worker.number,
        "jobs": 2,
        "host": worker.host,
        "pid": worker.pid,
        "release": "7.<b>",
    }
    link = f'<a href="/workers/{worker.number}">{worker.number} on '
    assert link in page.get(at).text and link in page.get(f"/dead/{number}").text
    assert "7.&lt;b&gt;" in page.get(at).text
    conn.execute("delete from bgjob_worker")
    page.post("/queues/q/pause")  # what is kept is forgotten when something was changed here
    assert "not seen within a day" in page.get(at).text


def test_a_canary_is_tried_then_the_rest_follows(
    page: Pages, plain_client: Client, conn: psycopg.Connection
) -> None:
    group = died(plain_client, *"abcde")
    at = f"/dead/groups/{group.fingerprint}"
    refused = page.post(f"{at}/canary", {"next": at})
    assert "Put one back although nothing would run it?" in refused.text
    assert count(conn, "bgjob_dead_job") == 5
    is_mended = threading.Event()

    def handle(_: Job) -> Result:
        return Complete() if is_mended.is_set() else Retry(3600, error="still <b>broken</b>")

    with Worker(plain_client, "q", Mux().register("t", handle), poll_interval=0.05):
        assert eventually(lambda: plain_client.workers())
        page.post(f"{at}/canary", {"next": at})
        failed = until(page, at, "failed")
        assert (failed["is_good"], failed["error"], failed["by"]) == (
            False,
            "still <b>broken</b>",
            "ann",
        )
        assert "still &lt;b&gt;broken" in page.get(f"{at}?part=steps").text
        is_mended.set()
        page.post(f"{at}/canary", {"next": at})
        assert until(page, at, "completed")["is_good"] is True
        asked = page.post(f"{at}/rest", {"next": at, "rate": "1000", "stop_after": "3"})
        assert "Put 3 dead jobs back?" in asked.text and count(conn, "bgjob_dead_job") == 3
        page.post(f"{at}/rest", hidden(asked.text))
        done = until(page, at, "done")
        assert (done["total"], done["back"], done["left"], done["died"]) == (3, 3, 0, 0)
        assert done["ended_at"] and done["by"] == "ann"
        assert eventually(lambda: count(conn) == 1)  # the first canary waits for its retry
    page.post(f"{at}/rest")
    assert "Nothing of this group is dead" in said(page)
    assert page.post("/dead/groups/x/rest").status_code == 404


def test_the_rest_is_stopped_by_hand_and_what_is_left_stays_dead(
    page: Pages, plain_client: Client, conn: psycopg.Connection
) -> None:
    group = died(plain_client, *map(str, range(30)))
    at = f"/dead/groups/{group.fingerprint}"
    asked = page.post(f"{at}/rest", {"rate": "0.1"})
    assert "about 300 s" in asked.text
    page.post(f"{at}/rest", hidden(asked.text))
    assert eventually(lambda: page.json(at)["rest"]["back"] == 1)
    page.post(f"{at}/rest", hidden(asked.text) | {"expect": "29"})
    assert "on its way already" in said(page)
    assert "Stop" in page.get(f"{at}?part=steps").text
    page.post(f"{at}/stop")
    assert said(page) == "Stopped: 1 job went back."
    assert page.json(at)["rest"]["state"] == "stopped"
    assert (count(conn), count(conn, "bgjob_dead_job")) == (1, 29)
    page.post(f"{at}/stop")
    assert "Nothing of this group is on its way" in said(page)
    for wrong in ({"rate": "0"}, {"rate": "-1"}, {"rate": "nan"}, {"stop_after": "-1"}):
        assert page.post(f"{at}/rest", wrong).status_code == 400, wrong


# -- programs, records, roles ----------------------------------------------------------


def test_a_program_gets_json_and_is_asked_by_409(
    page: Pages, plain_client: Client, conn: psycopg.Connection
) -> None:
    died(plain_client, "a", "b")

    def send(url: str, **fields: object) -> Any:
        return page.ask("POST", "/api" + url, json=fields, headers={"authorization": "Bearer x"})

    assert send("/queues/q/pause", **{"for": "1h"}).json()["targets"] == ["q"]
    asked = send("/dead/purge", queue="q")
    assert asked.status_code == 409
    fields = dict(asked.json()["confirm"]["fields"])
    assert fields["expect"] == "2"
    done = send("/dead/purge", **fields)
    assert (done.status_code, done.json()["count"]) == (200, 2)
    assert count(conn, "bgjob_dead_job") == 0
    assert send("/jobs/none/priority").json()["error"]["text"] == (
        "priority must be a whole number, not ''."
    )
    assert page.ask("POST", "/api/queues/q/resume", content=b"[1", headers=OURS).status_code == 415
    headers = OURS | {"content-type": "application/json"}
    for body in (b"[1", b"[]", b'"x"'):
        assert (
            page.ask("POST", "/api/queues/q/resume", content=body, headers=headers).status_code
            == 400
        )


def test_every_action_is_recorded_also_if_the_hook_fails(
    dsn: str, plain_client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[Any] = []

    async def audit(*action: object) -> None:
        told.append(action)
        if len(told) > 1:
            raise RuntimeError("the audit is down")

    enqueue(plain_client, "a")
    plain_client.enqueue(EnqueueRequest("q", "t", {"token": 1}, id="b"))
    caplog.set_level(logging.INFO, "bgjob.web")
    with opened(dsn, on_action=audit, access=may(*PERMISSIONS, user="zoe")) as pages:
        pages.post("/queues/q/pause")
        pages.post("/jobs/a/priority", {"priority": "7"})
        pages.post("/limits/set", {"scope": "type", "name": "t", "rate": "5/m"})
        pages.post("/jobs/a/cancel")  # only a question
        assert pages.get("/jobs/none/payload").status_code == 404
        pages.get("/jobs/b?payload=show")
        pages.get("/jobs/b/payload")
    assert told == [
        ("zoe", "pause", ("q",), 1),
        ("zoe", "priority", ("a",), 1),
        ("zoe", "set limit", ("type", "t", "5/m, burst 1"), 1),
        ("zoe", "show payload", ("b",), 1),
        ("zoe", "download payload", ("b",), 1),
    ]
    records = [record for record in caplog.records if hasattr(record, "web_action")]
    assert [(r.web_user, r.web_action, r.web_targets) for r in records] == [  # type: ignore[attr-defined]
        (user, action, targets) for user, action, targets, _ in told
    ]
    assert "the audit is down" in caplog.text


def test_an_operators_role_sees_every_page_and_an_editors_changes_jobs(
    roles: Roles, plain_client: Client, conn: psycopg.Connection
) -> None:
    enqueue(plain_client, "a", delay=60)
    group = died(plain_client, "b", "c")
    looks = ["/", "/queues/q", "/jobs", "/jobs/a", "/dead", f"/dead/groups/{group.fingerprint}"]
    looks += ["/dead/1", "/limits", "/schedules", "/workers", "/doctor?run=1"]
    with opened(roles.login("operator")) as pages:
        for url in looks:
            found = pages.get(url)
            assert found.status_code == 200, url
            assert "may not read" not in found.text, url
        for url in ("/queues/q/pause", "/queues/q/resume"):
            assert pages.post(url).status_code == 303
        limit = {"scope": "type", "name": "t", "concurrency": "3"}
        for url in ("/limits/set", "/limits/remove"):
            assert pages.post(url, limit).status_code == 303
        pages.post("/dead/requeue", {"numbers": "1"})
        asked = pages.post("/dead/purge", {"queue": "q"})
        pages.post("/dead/purge", hidden(asked.text))
        assert count(conn, "bgjob_dead_job") == 0
        refused = pages.post("/jobs/a/now")
        assert refused.status_code == 403 and "bgjob_editor" in refused.text
    with opened(roles.login("operator", "editor")) as pages:
        pages.post("/jobs/a/now")
        assert said(pages) == "Job a is due now."
    with opened(roles.login("producer")) as pages:
        found = pages.get("/")
        assert found.status_code == 200 and "may not read" in found.text


def test_a_page_of_a_database_that_is_read_only_changes_nothing(
    dsn: str, conn: psycopg.Connection
) -> None:
    name = conn.info.dbname
    conn.execute(f'alter database "{name}" set default_transaction_read_only = on'.encode())
    try:
        with opened(dsn) as pages:
            assert "read-only" in pages.get("/").text
            assert 'method="post"' not in pages.get("/queues/q").text
            assert pages.post("/queues/q/pause").status_code == 403
    finally:
        conn.execute("set default_transaction_read_only = off")
        conn.execute(f'alter database "{name}" reset default_transaction_read_only'.encode())
