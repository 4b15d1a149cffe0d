"""A claim's token tells when the claim was made and by whom, and no two are the same."""

import asyncio
import multiprocessing
import threading
from datetime import UTC, datetime, timedelta
from random import Random
from time import time
from typing import Any, LiteralString

import psycopg
import pytest
from support.database import clock, row, rows
from support.jobs import requests
from support.workers import Gate, Launcher, Style, both_styles

from bgjob import Client, Mux
from bgjob._running.one_job import _TOKENS
from bgjob._sql.tokens import CHOICE, MADE_AT, Tokens, origin
from bgjob._worker.clock import ServerClock
from bgjob.testing import adrain, drain

NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)
HELD: LiteralString = "select token from bgjob_job where token is not null"


def registered(number: int) -> Tokens:
    tokens = Tokens()
    tokens.number = number
    return tokens


def test_a_token_tells_the_millisecond_and_the_workers_number() -> None:
    token = registered(4711).make(NOON.timestamp() + 0.0125)
    assert origin(token) == (NOON + timedelta(milliseconds=12), 4711)
    assert origin(registered(2**20 + 3).make(NOON.timestamp())) == (NOON, 3)


def test_a_token_without_a_number_tells_the_millisecond() -> None:
    found = {origin(Tokens().make(NOON.timestamp())) for _ in range(100)}
    assert found == {(NOON, None)}


@pytest.mark.parametrize("token", [-1, -(2**63), 2**62, 2**63 - 1])
def test_a_number_that_is_no_token_has_no_origin(token: int) -> None:
    assert origin(token) is None


def test_the_server_reads_a_token_as_the_library_does(conn: psycopg.Connection) -> None:
    token = registered(7).make(NOON.timestamp() + 0.987)
    sql = f"select {MADE_AT.format('%(token)s::bigint')}, %(token)s::bigint & 1048575"
    [(at, number)] = conn.execute(sql, {"token": token}).fetchall()
    assert origin(token) == (at, number)


@pytest.mark.parametrize("number", [None, 1])
def test_tokens_increase_however_the_clock_is_set(number: int | None) -> None:
    random, tokens = Random(1), Tokens()
    tokens.number = number
    at, made = NOON.timestamp(), []
    for _ in range(5000):
        at += random.choice([0, 0, 0.0001, 0.002, 1, -0.5, -3600, 3600, -1e9, 1e9, -1e10, 1e10])
        made.append(tokens.make(at))
    assert made == sorted(set(made))
    assert all(0 <= token < 2**63 for token in made)


def test_the_time_of_tokens_is_right_again_once_a_clock_that_was_set_back_has_caught_up() -> None:
    tokens, noon = registered(1), NOON.timestamp()
    times = [tokens.make(noon + seconds) for seconds in (0, -0.002, -0.001, 0.5)]
    ahead = [origin(token)[0] - NOON for token in times]  # type: ignore[index]
    assert [each / timedelta(milliseconds=1) for each in ahead] == [0, 1, 2, 500]


def test_threads_that_share_a_maker_get_different_tokens() -> None:
    tokens, made = registered(1), []

    def make() -> None:
        made.extend([tokens.make(NOON.timestamp()) for _ in range(2000)])

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 16000


def _made(_: int) -> list[int]:
    return [_TOKENS.make(time()) for _ in range(200)]


def test_processes_that_were_forked_together_make_different_tokens() -> None:
    with multiprocessing.get_context("fork").Pool(8) as pool:
        made = [token for tokens in pool.map(_made, range(40), chunksize=1) for token in tokens]
    assert len(set(made)) == len(made) == 8000


def test_a_fork_while_another_thread_makes_a_token_can_make_one() -> None:
    with _TOKENS._lock:
        child = multiprocessing.get_context("fork").Process(target=_made, args=(0,))
        child.start()
    child.join(20)
    assert child.exitcode == 0


def test_a_choice_by_token_is_even_for_claims_at_equal_intervals(
    conn: psycopg.Connection,
) -> None:
    for step in (1, 2, 500, 512, 1000):
        tokens = registered(4)
        made = [tokens.make(NOON.timestamp() + n * step / 1000) for n in range(1000)]
        sql = f"select sum(mod({CHOICE.format('t')}, 2)) from unnest(%s::bigint[]) as t"
        [(odd,)] = conn.execute(sql, [made]).fetchall()
        assert 450 < odd < 550


def test_the_servers_time_is_known_from_its_answers_however_this_hosts_clock_is_set() -> None:
    server = ServerClock()
    server.connected(NOON, 100.0, 100.2)
    noon_here = NOON.timestamp() - 100.1
    assert server.offset == pytest.approx(noon_here)
    server.observe(NOON + timedelta(seconds=10), 110.0, 110.2)  # tells nothing new
    assert server.offset == pytest.approx(noon_here)
    server.observe(NOON + timedelta(seconds=25), 120.0, 120.2)  # the host slept for 5 s
    assert server.offset == pytest.approx(noon_here + 4.9)
    server.observe(NOON - timedelta(hours=1), 130.0, 130.0)
    assert server.offset == pytest.approx(NOON.timestamp() - 3600 - 130)


def check(conn: psycopg.Connection, tokens: list[int], *, number: int | None) -> None:
    now = clock(conn)
    for token in tokens:
        made = origin(token)
        assert made is not None
        assert made.number == number
        assert abs(made.at - now) < timedelta(minutes=5)


def noting(conn: psycopg.Connection, found: list[int]) -> Mux:
    """A handler that notes the token of its claim."""
    return Mux().register("t", lambda _: found.append(row(conn, HELD)[0]))


def test_a_job_that_do_runs_has_a_token_without_a_number(
    client: Any, conn: psycopg.Connection
) -> None:
    found: list[int] = []
    for request in requests("a", "b", "c"):
        client.enqueue(request)
        client.do("q", noting(conn, found))
    assert found == sorted(set(found))
    assert len(found) == 3
    check(conn, found, number=None)


@pytest.mark.parametrize("is_async", [False, True], ids=["drain", "adrain"])
def test_a_job_that_a_drain_runs_has_a_token_without_a_number(
    is_async: bool, dsn: str, conn: psycopg.Connection
) -> None:
    found: list[int] = []
    mux = noting(conn, found)
    with Client(dsn) as client:
        client.bulk_enqueue(requests("a", "b", "c"))
    if is_async:
        asyncio.run(adrain(dsn, "q", mux))
    else:
        drain(dsn, "q", mux)
    assert found == sorted(set(found))
    assert len(found) == 3
    check(conn, found, number=None)


@both_styles
def test_the_queues_of_a_worker_never_make_the_same_token(
    style: Style, launcher: Launcher, conn: psycopg.Connection
) -> None:
    gate = Gate()
    for queue in "qrs":
        launcher.enqueue(queue, queue=queue)
    launcher.start(Mux().register("t", gate.of(style)), queue={"q": 1, "r": 1, "s": 1})
    for _ in range(3):
        gate.wait()
    tokens = [token for (token,) in rows(conn, HELD)]
    gate.released.set()
    assert len(set(tokens)) == 3
    check(conn, tokens, number=row(conn, "select number from bgjob_worker")[0])


def test_tokens_tell_the_databases_time_though_the_workers_clock_is_wrong(
    launcher: Launcher, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bgjob._worker.clock.time", lambda: 0.0)
    gate = Gate()
    launcher.enqueue("a")
    launcher.start(Mux().register("t", gate), registry=False)
    gate.wait()
    check(conn, [row(conn, HELD)[0]], number=None)
    gate.released.set()
