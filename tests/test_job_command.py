"""`bgjob job`: what it prints and changes, and its exit status."""

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from support.clients import HOSTILE
from support.database import count, rows
from support.documents import ROOT
from support.jobs import requests
from support.waiting import PATIENCE

from bgjob import Client, EnqueueRequest, cli
from bgjob._cli.commands import job

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(dsn: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command, and return its exit status and output."""
    monkeypatch.setenv("BGJOB_DSN", dsn)

    def run(*args: str) -> tuple[int, str, str]:
        status = cli.main(["job", *args])
        return status, *capsys.readouterr()

    return run


def running(conn: psycopg.Connection, *ids: str) -> None:
    conn.execute(
        "update bgjob_job set token = 1, lease_until = now() + interval '1 h', attempt = 1 "
        "where id = any (%s)",
        [list(ids)],
    )


def test_jobs_are_listed_page_by_page(
    run: Run, plain_client: Client, conn: psycopg.Connection
) -> None:
    plain_client.bulk_enqueue(requests(*"abcde"))
    running(conn, "c")
    status, out, err = run("list", "--limit", "2")
    assert (status, [line.split()[0] for line in out.splitlines()]) == (0, ["id", "e", "d"])
    [after] = re.findall(r"^for the next page add: --after '(.*)'$", err, re.MULTILINE)
    status, out, err = run("list", "--limit", "2", "--after", after, "--json")
    page = json.loads(out)
    assert ([found["id"] for found in page["jobs"]], page["next"] is None) == (["c", "b"], False)
    assert page["jobs"][0]["state"] == "running"
    # A search looks on until a page is full, or at the end.
    for args in (["--state", "running"], ["--queue", "q", "--state", "running"], ["--id", "c"]):
        found = json.loads(run("list", "--json", *args)[1])
        assert ([each["id"] for each in found["jobs"]], found["next"]) == (["c"], None)
    assert run("list", "--after", after, "--queue", "q")[0] == 2
    assert run("list", "--error", "none") == (0, f"{'  '.join(job._SHOWN)}\n", "")


def test_a_job_is_shown_with_its_payload_and_worker(
    run: Run, plain_client: Client, conn: psycopg.Connection
) -> None:
    plain_client.enqueue(EnqueueRequest("q", "t", {"n": 1}, id="a", exclusive="k"))
    plain_client.enqueue(EnqueueRequest("q", "t", b"\xff", id="b"))
    conn.execute(
        "insert into bgjob_worker (host, pid, program, version, queues, slots, types, lease, every)"
        " values ('web-1', 7, 'shop', '1', '{q}', '{1}', '{t}', 30, 10)"
    )
    conn.execute(
        "update bgjob_job set lease_until = now(), last_error = E'first\nsecond', token = "
        "(extract(epoch from now() - '2020-01-01 00:00+00') * 1000)::bigint << 21 | 1 "
        "where id = 'a'"
    )
    status, out, _ = run("show", "a")
    assert status == 0
    assert re.search(r'^arg +{"n":1}$', out, re.MULTILINE)
    assert re.search(r"^worker +1 \(web-1, pid 7, shop\)$", out, re.MULTILINE)
    assert re.search(r"^last_error +first\n    second$", out, re.MULTILINE)
    assert json.loads(run("show", "a", "--json")[1])["worker"]["host"] == "web-1"
    assert json.loads(run("show", "b", "--json")[1])["arg"] == {"base64": "/w=="}
    status, out, err = run("show", "none")
    assert (status, out) == (1, "")
    assert "no live job has the id 'none'" in err


def test_jobs_are_cancelled_by_id_and_the_rest_is_told(
    run: Run, plain_client: Client, conn: psycopg.Connection
) -> None:
    plain_client.bulk_enqueue(requests("a", "b", "c"))
    running(conn, "b")
    assert run("cancel", "a", "b", "--by", "ann", "--reason", "why") == (
        0,
        "cancelled 2 jobs, 1 of which was running\n",
        "",
    )
    assert rows(conn, "select distinct last_error from bgjob_dead_job") == [
        ("cancelled by ann: why",)
    ]
    assert run("cancel", "c", "a", "x") == (
        3,
        "cancelled 1 job\nleft 1 job, in the dead-letter table: 'a'\n"
        "left 1 job, not there: completed, purged or never written: 'x'\n",
        "",
    )
    assert json.loads(run("cancel", "c", "--json")[1]) == {
        "waiting": [],
        "running": [],
        "unchanged": {"c": "dead"},
    }


def test_the_other_actions_do_what_they_say(
    run: Run, plain_client: Client, conn: psycopg.Connection
) -> None:
    plain_client.bulk_enqueue(requests("a", "b", delay=60))
    running(conn, "b")
    assert run("now", "a", "b") == (3, "made due 1 job\nleft 1 job, running: 'b'\n", "")
    assert run("priority", "-5", "a") == (0, "reordered 1 job\n", "")
    assert run("abandon", "a", "b", "--by", "me")[:2] == (
        3,
        "abandoned 1 job\nleft 1 job, not running: 'a'\n",
    )
    assert rows(conn, "select id, priority from bgjob_job") == [("a", -5)]
    assert rows(conn, "select last_error from bgjob_dead_job") == [("abandoned by me",)]


def test_what_a_filter_finds_is_changed_after_a_confirmation_only(
    run: Run, plain_client: Client, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain_client.bulk_enqueue(requests(*"abcdefg"))
    assert run("cancel") == (2, "", "bgjob: which jobs? give ids, or a filter such as --queue\n")
    status, out, err = run("cancel", "--queue", "q")
    assert (status, out) == (2, "")
    assert "cancel 7 jobs? pass --yes" in err
    monkeypatch.setattr(job, "_BATCH", 3)
    status, out, err = run("cancel", "--queue", "q", "--yes")
    assert (status, out) == (0, "cancelled 7 jobs\n")
    assert "3 of 7 jobs" in err
    assert count(conn) == 0
    assert run("cancel", "--queue", "q") == (0, "cancelled 0 jobs\n", "")


@pytest.mark.parametrize(("answer", "left"), [("y", 0), ("", 2)])
def test_a_terminal_is_asked_with_the_number(
    dsn: str, plain_client: Client, conn: psycopg.Connection, answer: str, left: int
) -> None:
    plain_client.bulk_enqueue(requests("a", "b"))
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "bgjob", "job", "cancel", "--queue", "q"],
        stdin=theirs,
        stderr=theirs,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT), "BGJOB_DSN": dsn},
    ) as process:
        os.close(theirs)
        told = b""
        while b"[y/N]" not in told:
            told += os.read(ours, 4096)
        assert b"cancel 2 jobs?" in told
        os.write(ours, f"{answer}\n".encode())
        assert process.wait(PATIENCE) == bool(left)
    os.close(ours)
    assert count(conn) == left


def test_hostile_ids_are_listed_and_changed(
    run: Run, plain_client: Client, conn: psycopg.Connection
) -> None:
    for text in HOSTILE:
        plain_client.enqueue(EnqueueRequest(text, text, id=text))
    out = run("list")[1]
    assert out.isprintable() or all(c.isprintable() or c == "\n" for c in out)
    found = json.loads(run("list", "--json")[1])["jobs"]
    assert {each["id"] for each in found} == set(HOSTILE)
    status, _, _ = run("cancel", *[f"--prefix={text}" for text in HOSTILE[:1]], "--yes")
    assert status == 0
    assert run("cancel", "--", *HOSTILE[1:])[0] == 0
    assert count(conn) == 0


def test_an_error_of_the_database_is_one_line(run: Run, conn: psycopg.Connection) -> None:
    conn.execute("drop table bgjob_job")
    for args in (["list"], ["show", "a"], ["cancel", "a"]):
        status, out, err = run(*args)
        assert (status, out) == (1, "")
        assert err.count("\n") == 1
        assert "bgjob_job" in err
