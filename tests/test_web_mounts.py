"""The page in programs of other kinds, behind proxies, with users, and by itself: `bgjob web`."""

import asyncio
import base64
import io
import re
import signal
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import fastapi
import httpx
import psycopg
import pytest
from psycopg_pool import ConnectionPool
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route
from support.pages import OURS, may, opened, pages_of

from bgjob import AsyncClient, Client, EnqueueRequest, cli
from bgjob._sql.server import bounds
from bgjob._sql.statement import Statement
from bgjob.ext.web import (
    Access,
    ProxyAccess,
    TokenAccess,
    UsersAccess,
    UsersError,
    create_app,
    database,
)
from bgjob.ext.web.frame import PERMISSIONS
from bgjob.ext.web.kept import Kept
from bgjob.ext.web.users import hashed


@pytest.fixture(autouse=True)
def a_job(plain_client: Client) -> None:
    plain_client.enqueue(EnqueueRequest("a/b", "t", id="x/y"))


def links_of(text: str) -> set[str]:
    found = {*re.findall(r'(?:href|action|src)="([^"#]+)', text)}
    return found - {"data:,"}


def in_fastapi(app: Any) -> Any:
    host = fastapi.FastAPI()
    host.add_api_route("/hello", lambda: "hello")
    host.mount("/jobs/page", app)
    return host


def in_starlette(app: Any) -> Any:
    @asynccontextmanager
    async def lifespan(_: Any) -> Any:
        yield
        await app.close()

    hello = Route("/hello", lambda _: PlainTextResponse("hello"))
    return Starlette(routes=[hello, Mount("/jobs/page", app)], lifespan=lifespan)


def in_django(app: Any) -> Any:
    import django
    from django.conf import settings
    from django.core.asgi import get_asgi_application
    from django.http import HttpResponse
    from django.urls import path

    if not settings.configured:
        settings.configure(
            ROOT_URLCONF=type(
                "urls", (), {"urlpatterns": [path("hello", lambda _: HttpResponse("hello"))]}
            ),
            ALLOWED_HOSTS=["*"],
            SECRET_KEY="x",
        )
        django.setup(set_prefix=False)
    return Starlette(routes=[Mount("/jobs/page", app), Mount("/", get_asgi_application())])


@pytest.mark.parametrize("mount", [in_fastapi, in_starlette, in_django])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_page_is_mounted_in_another_program(dsn: str, mount: Any) -> None:
    """No lifespan runs there: the connections are opened by the first request."""
    app = create_app(dsn, access=may(*PERMISSIONS))
    with pages_of(mount(app)) as pages:
        assert "hello" in pages.get("/hello").text
        found = pages.get("/jobs/page/")
        assert found.status_code == 200
        links = links_of(found.text)
        assert links and all(link.startswith("/jobs/page/") for link in links), links
        for link in links:
            assert pages.get(link).status_code in {200, 405}, link
        here = "/jobs/page/queues/a%2Fb"
        assert 'href="/jobs/page/queues/a%2Fb"' in found.text
        done = pages.post(f"{here}/pause", {"next": here})
        assert (done.status_code, done.headers["location"]) == (303, here)
        assert "Path=/jobs/page" in done.headers["set-cookie"]
        assert "is paused" in pages.get(here).text
        outside = pages.post(f"{here}/resume", {"next": "/hello"})
        assert outside.headers["location"] == "/jobs/page/"
        assert pages.json("/jobs/page/api/jobs/x%2Fy")["job"]["id"] == "x/y"
        asyncio.run(app.close())


def test_several_event_loops_use_one_page(dsn: str) -> None:
    app = create_app(dsn, access=may("look"))
    for _ in range(2):
        with pages_of(app) as pages:
            assert pages.get("/queues/a%2Fb").status_code == 200


@pytest.mark.parametrize("strips", [True, False], ids=["prefix removed", "prefix kept"])
def test_a_proxy_shows_the_page_under_a_prefix(dsn: str, strips: bool) -> None:
    access = TokenAccess()
    with opened(dsn, access=access, root_path="/bgjob/") as pages:
        prefix = "" if strips else "/bgjob"
        first = pages.get(f"{prefix}/jobs?token={access.token}")
        assert first.headers["location"] == "/bgjob/jobs"
        found = pages.get(f"{prefix}/jobs/x%2Fy")
        assert found.status_code == 200
        assert 'href="/bgjob/queues/a%2Fb"' in found.text
        links = links_of(found.text)
        assert all(link.startswith("/bgjob/") for link in links), links
        assert pages.get(f"{prefix}/readyz").status_code == 200


def test_a_client_of_any_kind_names_the_database(dsn: str) -> None:
    with ConnectionPool(dsn, open=False) as pool:
        for source in (Client(dsn), AsyncClient(dsn), Client(pool)):
            with opened(source) as pages:  # type: ignore[arg-type]
                assert pages.get("/jobs").status_code == 200
    for wrong in (None, pool, 5):
        with pytest.raises(TypeError, match="a connection string"):
            create_app(wrong, access=may())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="access"):
        create_app(dsn)  # type: ignore[call-arg]
    wrongs: list[tuple[dict[str, Any], type[Exception]]] = [
        ({"access": None}, TypeError),
        ({"colour": "pink"}, ValueError),
        ({"payloads": "some"}, ValueError),
        ({"root_path": "x"}, ValueError),
        ({"trust": ["x"]}, ValueError),
    ]
    for options, error in wrongs:
        with pytest.raises(error):
            create_app(dsn, **{"access": may()} | options)
    with pytest.raises(ValueError, match="'fly' is not a permission"):
        Access("ann", {"fly"})  # type: ignore[arg-type]


def test_the_program_decides_who_may_and_may_lead_to_its_own_log_in(dsn: str) -> None:
    async def access(request: Request) -> Access | None:
        match request.headers.get("x-user"):
            case "ann":
                return Access("ann", {"look"})
            case "bob":
                return None
        raise HTTPException(303, headers={"location": "/login"})

    with opened(dsn, access=access) as pages:
        assert ">ann<" in pages.get("/", **{"x-user": "ann"}).text
        assert pages.get("/", **{"x-user": "bob"}).status_code == 401
        found = pages.get("/")
        assert (found.status_code, found.headers["location"]) == (303, "/login")
        assert "content-security-policy" in found.headers
    with opened(dsn, access=lambda _: "ann") as pages:
        assert pages.get("/").status_code == 500


# -- users and proxies -----------------------------------------------------------------


def test_a_file_of_users_has_their_passwords_and_permissions(dsn: str, tmp_path: Path) -> None:
    file = tmp_path / "users"
    file.write_text(f"# ours\n\nann:{hashed('é:x')}:look,pause\nbob:{hashed('b')}:look\n", "utf-8")
    with opened(dsn, access=UsersAccess(file)) as pages:

        def status(name: str, password: str, url: str | None = None) -> int:
            given = base64.b64encode(f"{name}:{password}".encode()).decode()
            headers = {"authorization": f"Basic {given}"}
            if url is None:
                return pages.get("/", **headers).status_code
            return pages.post(url, headers=OURS | headers).status_code

        unknown = pages.get("/")
        assert unknown.status_code == 401
        assert unknown.headers["www-authenticate"].startswith("Basic ")
        assert [status("ann", "é:x"), status("ann", "é:x"), status("bob", "b")] == [200] * 3
        for name, password in [("ann", "b"), ("ann", ""), ("zoe", "x"), ("", ""), ("bob", "é:x")]:
            assert status(name, password) == 401, name
        for header in ("Basic %%%", "Basic", "Bearer x", "Basic /w=="):
            assert pages.get("/", authorization=header).status_code == 401
        assert status("ann", "é:x", "/queues/q/pause") == 303
        assert status("bob", "b", "/queues/q/pause") == 403
        file.write_text(f"ann:{hashed('new one')}:look\n", "utf-8")
        assert [status("ann", "é:x"), status("ann", "new one"), status("bob", "b")] == [
            401,
            200,
            401,
        ]
    for line in ("ann", "ann:x:look", f":{hashed('x')}:look", f"ann:{hashed('x')}:fly", "a:b:c:d"):
        file.write_text(f"# a comment\n{line}\n")
        with pytest.raises(UsersError, match="line 2"):
            UsersAccess(file)


def test_a_proxys_header_counts_from_the_proxy_only(dsn: str) -> None:
    header = {"x-user": "ann"}
    with opened(dsn, access=ProxyAccess("X-User", ["127.0.0.0/8"])) as pages:
        assert ">ann<" in pages.get("/", **header).text  # the transport's peer is 127.0.0.1
        assert pages.get("/").status_code == 401
    with opened(dsn, access=ProxyAccess("X-User", ["10.0.0.0/8", "::1/128"])) as pages:
        assert pages.get("/", **header).status_code == 401
        forged = header | {"x-forwarded-for": "10.0.0.1"}
        assert pages.get("/", **forged).status_code == 401
    with pytest.raises(ValueError, match="trust"):
        ProxyAccess("X-User", [])


# -- what does not answer ----------------------------------------------------------------


def test_prometheus_reads_what_the_database_holds_if_that_is_wanted_and_it_has_the_token(
    dsn: str,
) -> None:
    access = TokenAccess()
    bearer = {"authorization": f"Bearer {access.token}"}
    with opened(dsn, access=access, metrics=True) as pages:
        assert pages.get("/metrics").status_code == 401
        found = pages.get("/metrics", **bearer)
        assert found.headers["content-type"].startswith("text/plain")
        assert 'bgjob_queue_due{queue="a/b"} 1.0' in found.text
        assert 'bgjob_scrape_success{part="tables"} 1.0' in found.text
    with opened(dsn, access=access) as pages:
        assert pages.get("/metrics", **bearer).status_code == 404


def test_without_the_tables_the_page_says_what_to_apply(empty_dsn: str) -> None:
    with opened(empty_dsn) as pages:
        found = pages.get("/")
        assert found.status_code == 503 and "bgjob schema" in found.text
        assert "migration/init.sql" in found.text
        assert pages.post("/queues/q/pause").status_code == 503
        assert pages.get("/readyz").status_code == 503
        assert pages.get("/livez").status_code == 200


def test_a_part_that_cannot_be_read_leaves_the_others(dsn: str, conn: psycopg.Connection) -> None:
    conn.execute("drop table bgjob_worker, bgjob_minute, bgjob_schedule")
    with opened(dsn) as pages:
        found = pages.get("/")
        assert found.status_code == 200 and "a%2Fb" in found.text
        assert "bgjob_worker" in pages.json("/")["longest"]["text"]
        assert pages.json("/queues/a%2Fb")["row"]["due"] == {"number": 1, "is_exact": True}
        assert "schema is older" in pages.get("/schedules").text
        assert "bgjob_worker" in pages.get("/workers").text


def test_what_takes_too_long_is_said_in_its_place(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "bounds", lambda name, seconds: short(bounds(name)))
    with opened(dsn) as pages, psycopg.connect(dsn) as other:
        other.execute("lock table bgjob_dead_job")
        found = pages.get("/dead")
        assert found.status_code == 200 and found.text.count("took too long") == 2
        assert pages.json("/")["groups"]["text"] == "This took too long."
        assert pages.json("/workers") == {"workers": []}


def short(statement: Statement[None]) -> Statement[None]:
    """The same limits, but 50 ms for a statement."""
    params = dict(statement.params or {})
    values = ["50ms" if value == "5s" else value for value in cast(list[str], params["values"])]
    return statement._replace(params=params | {"values": values})


def test_a_database_that_is_away_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "_PATIENCE", 0.1)
    with opened("postgresql://127.0.0.1:1/none") as pages:
        found = pages.get("/")
        assert found.status_code == 503 and "The database does not answer" in found.text
        assert "127.0.0.1" not in found.text
        assert pages.get("/livez").status_code == 200
        assert pages.get("/readyz").status_code == 503


def test_all_viewers_share_one_answer_and_one_who_leaves_does_not_end_it() -> None:
    asked: list[str] = []

    async def see() -> None:
        kept, may_end = Kept(), asyncio.Event()

        async def ask() -> int:
            asked.append("ask")
            await may_end.wait()
            return len(asked)

        viewers = [asyncio.create_task(kept.get("key", ask)) for _ in range(10)]
        await asyncio.sleep(0)
        viewers[0].cancel()
        may_end.set()
        found = await asyncio.gather(*viewers, return_exceptions=True)
        assert found[1:] == [1] * 9 and isinstance(found[0], asyncio.CancelledError)
        assert await kept.get("key", ask) == 1
        kept.forget()
        assert await kept.get("key", ask) == 2

        async def fail() -> int:
            asked.append("fail")
            raise ValueError("no")

        for _ in range(3):
            with pytest.raises(ValueError, match="no"):
                await kept.get("other", fail)
        assert asked.count("fail") == 1  # an error is kept as well
        for n in range(1000):
            await kept.get(n, ask)
        assert len(kept._answers) <= 500

    asyncio.run(see())


# -- the command -------------------------------------------------------------------------


def test_the_command_prints_an_address_that_opens_the_page_and_ends_when_told(dsn: str) -> None:
    command = [sys.executable, "-m", "bgjob", "web", "--listen", "127.0.0.1:0", "--name", "shop"]
    command += ["--dsn", dsn, "--colour", "red", "--host", "jobs.example"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None and run.stderr is not None
        try:
            address = run.stdout.readline().strip()
            assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\?token=[\w-]{32}", address), address
            root = address.partition("?")[0]
            with httpx.Client() as browser:
                assert browser.get(root).status_code == 401
                assert browser.get(address).headers["location"] == "/"
                found = browser.get(root)
                assert found.status_code == 200 and "shop" in found.text
                assert "server" not in found.headers
                evil = browser.get(root, headers={"host": "evil.example"})
                assert evil.status_code == 421
                assert browser.get(root, headers={"host": "jobs.example"}).status_code == 200
                asked = browser.post(root + "queues/q/pause", headers=OURS)
                assert asked.status_code == 303
        finally:
            run.send_signal(signal.SIGTERM)
            status = run.wait(20)
        log = run.stderr.read()
        assert status in {0, -signal.SIGTERM}, log
        assert "Queue q is paused" in log and "token" not in log


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--auth", "none", "--listen", "0.0.0.0:0"], "loopback"),
        (["--auth", "none", "--listen", ":0"], "loopback"),
        (["--auth", "users"], "--users"),
        (["--auth", "users", "--users", "/no/such/file"], "/no/such/file"),
        (["--auth", "proxy"], "trust"),
        (["--auth", "proxy", "--trust", "x"], "x"),
        (["--allow", "fly"], "fly"),
        (["--token-file", "/no/such/file"], "/no/such/file"),
        (["--hash", "a:b"], "colon"),
        (["--root-path", "x"], "slash"),
    ],
)
def test_the_command_refuses_what_would_leave_it_open(
    arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["web", "--dsn", "postgresql://127.0.0.1:1/none", *arguments]) in {1, 2}
    assert problem in capsys.readouterr().err


def test_the_command_makes_lines_for_the_file_of_users(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, dsn: str
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("a password\n"))
    assert cli.main(["web", "--hash", "ann", "--allow", "look,pause"]) == 0
    line = capsys.readouterr().out
    assert line.startswith("ann:scrypt$") and line.endswith(":look,pause\n")
    (tmp_path / "users").write_text(line)
    with opened(dsn, access=UsersAccess(tmp_path / "users")) as pages:
        given = base64.b64encode(b"ann:a password").decode()
        assert pages.get("/", authorization=f"Basic {given}").status_code == 200


def test_a_fixed_token_comes_from_a_file_or_a_variable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from bgjob._cli.page import fixed_token

    assert fixed_token(None) is None
    monkeypatch.setenv("BGJOB_WEB_TOKEN", "t" * 16)
    assert fixed_token(None) == "t" * 16
    (tmp_path / "token").write_text("f" * 16 + "\n")
    assert fixed_token(str(tmp_path / "token")) == "f" * 16
    with pytest.raises(ValueError, match="16 characters"):
        TokenAccess("short")
