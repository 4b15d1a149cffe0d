"""One page over several databases: each under its name, with the access of its own."""

import logging
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import fastapi
import httpx
import pytest
from starlette.exceptions import HTTPException
from starlette.requests import Request
from support.clients import HOSTILE
from support.databases import Databases
from support.pages import OURS, Pages, all_but, may, pages_of

from bgjob import Client, EnqueueRequest, cli
from bgjob.ext.web import Access, TokenAccess, WebApps, create_app, routes
from bgjob.ext.web.frame import PERMISSIONS, path
from bgjob.ext.web.pages import databases as databases_page

NASTY = "a/b?c=<b>'\"&d"
NAMES = [NASTY, "..", "/a/", "%2F", "static/x", *HOSTILE]
EVERYTHING = may(*PERMISSIONS)


@pytest.fixture(scope="module")
def places(databases: Databases, template: str) -> Iterator[dict[str, str]]:
    """The DSNs of two databases that the tests of this module look at, and do not change."""
    with (
        databases.make(template=template, prefix="orders") as (_, orders),
        databases.make(template=template, prefix="mail") as (_, mail),
    ):
        for name, dsn in (("orders", orders), ("mail", mail)):
            with Client(dsn) as client:
                client.enqueue(EnqueueRequest(f"{name} queue", "t", id=name))
        yield {"orders": orders, "mail": mail}


@pytest.fixture
def silent() -> Iterator[str]:
    """The DSN of a server that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"postgresql://u@127.0.0.1:{server.getsockname()[1]}/silent"


@pytest.fixture(scope="module")
def page(places: dict[str, str]) -> Iterator[Pages]:
    apps = {name: create_app(dsn, access=EVERYTHING, name="shop") for name, dsn in places.items()}
    with pages_of(WebApps(apps)) as pages:
        yield pages


def links_of(text: str) -> set[str]:
    return {*re.findall(r'(?:href|action|src)="([^"#]+)', text)} - {"data:,"}


def test_the_first_page_shows_each_database_and_leads_to_its_pages(page: Pages) -> None:
    found = page.get("/")
    assert (found.status_code, found.headers["content-type"]) == (200, "text/html; charset=utf-8")
    for name in ("orders", "mail"):
        assert f'href="/{name}/"' in found.text
        assert f"Oldest due: {name} queue" in found.text
    for link in links_of(found.text):
        assert page.get(link).status_code == 200, link
    said = page.json("/")["databases"]
    assert [(each["name"], each["due"]["number"]) for each in said] == [("orders", 1), ("mail", 1)]
    assert page.get("/api/").json()["databases"] == page.json("/api")["databases"]
    part = page.get("/?part=databases")
    assert part.text.startswith('<section id="databases"') and "<title>" not in part.text


def test_a_database_has_all_pages_under_its_name_and_none_of_another(page: Pages) -> None:
    for name, other in (("orders", "mail"), ("mail", "orders")):
        found = page.get(f"/{name}/")
        links = links_of(found.text)
        assert links - {"/"} and all(link.startswith(f"/{name}/") for link in links - {"/"})
        assert f">{name}</a>" in found.text and 'href="/">shop</a>' in found.text
        for link in links:
            assert page.get(link).status_code in {200, 405}, link
        assert page.json(f"/{name}/jobs/{name}")["job"]["id"] == name
        assert page.json(f"/{name}/api/jobs/{name}")["job"]["id"] == name
        assert page.json(f"/{name}/jobs/{other}")["job"] is None
        assert page.get(f"/{name}/readyz").text == "ok\n"
    assert page.get("/orders").headers["location"] == "/orders/"


@pytest.mark.parametrize(
    ("method", "url", "status"),
    [
        ("GET", "/none", 404),
        ("GET", "/none/", 404),
        ("GET", "/jobs", 404),
        ("GET", "/ORDERS/", 404),
        ("GET", "/orders%2F..%2Fmail/", 404),
        ("GET", "/?part=none", 404),
        ("GET", "/static/x/none.js", 404),
        ("POST", "/", 405),
        ("POST", "/orders", 307),
        ("DELETE", "/", 405),
        ("GET", "/livez", 200),
        ("HEAD", "/", 200),
    ],
)
def test_other_addresses_answer_as_they_should_and_have_the_headers(
    page: Pages, method: str, url: str, status: int
) -> None:
    found = page.ask(method, url, headers=OURS)
    assert found.status_code == status, found.text
    assert "default-src 'none'" in found.headers["content-security-policy"]
    assert "no-" in found.headers["cache-control"] or status == 404


@pytest.mark.parametrize("name", NAMES)
def test_a_queue_of_any_name_is_paused_in_its_own_database_only(
    places: dict[str, str], page: Pages, name: str
) -> None:
    here = "/orders" + path("queues", name)
    done = page.post(f"{here}/pause", {"next": here})
    assert (done.status_code, done.headers["location"]) == (303, here)
    with Client(places["orders"]) as orders, Client(places["mail"]) as mail:
        assert [*orders.paused()] == [name]
        assert mail.paused() == {}
        orders.resume(name)
    outside = page.post(f"{here}/resume", {"next": "/mail/"})
    assert outside.headers["location"] == "/orders/"


def urls_of(routes_: object) -> list[str]:
    """Return an address for each route."""
    patterns = [pattern.pattern for pattern, _ in routes_]  # type: ignore[attr-defined]
    return [re.sub(r"\(\?P<\w+>.*?\)", "1", pattern).replace("\\", "") for pattern in patterns]


def test_each_database_has_permissions_of_its_own_on_every_route(places: dict[str, str]) -> None:
    apps = {
        "orders": create_app(places["orders"], access=EVERYTHING),
        "mail": create_app(places["mail"], access=all_but("look")),
        "logs": create_app(places["mail"], access=lambda _: None),
    }
    looks = [*urls_of(routes.PAGES), *urls_of(routes.DOWNLOADS), "/api/jobs", "/none", "/?part=x"]
    with pages_of(WebApps(apps)) as pages:
        said = pages.json("/")["databases"]
        assert [each["name"] for each in said] == ["orders"]
        shown = pages.get("/").text
        assert "mail" not in shown and "logs" not in shown
        for name, status in (("mail", 403), ("logs", 401)):
            for url in looks:
                assert pages.get(f"/{name}{url}").status_code == status, url
            for url in urls_of(routes.ACTIONS):
                assert pages.post(f"/{name}{url}").status_code == status, url
    apps["orders"] = create_app(places["orders"], access=may("look"))
    with pages_of(WebApps(apps)) as pages:
        for url in urls_of(routes.ACTIONS):
            assert pages.post(f"/orders{url}").status_code == 403, url


@pytest.mark.parametrize(
    ("checks", "status"),
    [
        ([lambda _: None, lambda _: None], 401),
        ([lambda _: None, all_but("look")], 403),
        ([lambda _: None, may("look")], 200),
    ],
    ids=["unknown", "not allowed", "one is seen"],
)
def test_who_may_see_no_database_does_not_see_the_page(
    places: dict[str, str], checks: list[object], status: int
) -> None:
    apps = {
        name: create_app(dsn, access=check)  # type: ignore[arg-type]
        for (name, dsn), check in zip(places.items(), checks, strict=True)
    }
    with pages_of(WebApps(apps)) as pages:
        for url in ("/", "/?part=databases", "/api/"):
            found = pages.get(url)
            assert found.status_code == status, url
            assert "orders" not in found.text


def test_a_log_in_of_the_programs_own_and_its_host_names_count_for_the_first_page(
    places: dict[str, str],
) -> None:
    def sign_in(_: Request) -> Access:
        raise HTTPException(303, headers={"location": "/login"})

    apps = {name: create_app(dsn, access=sign_in) for name, dsn in places.items()}
    with pages_of(WebApps(apps)) as pages:
        assert pages.get("/").headers["location"] == "/login"
    apps = {
        name: create_app(dsn, access=EVERYTHING, hosts=["only.example"])
        for name, dsn in places.items()
    }
    with pages_of(WebApps(apps)) as pages:
        assert pages.get("/").status_code == pages.get("/orders/").status_code == 421
        assert pages.get("/", host="only.example").status_code == 200


def test_one_token_opens_all_databases_under_a_prefix(places: dict[str, str]) -> None:
    access = TokenAccess()
    apps = {name: create_app(dsn, access=access) for name, dsn in places.items()}
    with pages_of(WebApps(apps, root_path="/bgjob/")) as pages:
        assert pages.get("/bgjob/").status_code == 401
        first = pages.get(f"/bgjob/?token={access.token}")
        assert (first.status_code, first.headers["location"]) == (303, "/bgjob/")
        for prefix in ("", "/bgjob"):  # a proxy may remove it
            found = pages.get(f"{prefix}/")
            assert 'href="/bgjob/orders/"' in found.text
            assert 'href="/bgjob/">' in pages.get(f"{prefix}/mail/jobs").text
            assert pages.get(f"{prefix}/mail").headers["location"] == "/bgjob/mail/"
    host = fastapi.FastAPI()
    host.mount("/ops/jobs", WebApps(apps))
    with pages_of(host) as pages:
        pages.get(f"/ops/jobs/?token={access.token}")
        links = links_of(pages.get("/ops/jobs/mail/").text)
        assert links and all(link.startswith("/ops/jobs/") for link in links)


def test_a_database_that_does_not_answer_is_shown_as_such_and_holds_up_no_other(
    places: dict[str, str],
    empty_dsn: str,
    silent: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(databases_page, "_WITHIN", 1.0)
    sources = {
        **places,
        "silent": silent,
        "away": "postgresql://somebody:s3cret@127.0.0.1:1/db",
        "empty": empty_dsn,
    }
    apps = {name: create_app(dsn, access=EVERYTHING) for name, dsn in sources.items()}
    with caplog.at_level(logging.WARNING), pages_of(WebApps(apps)) as pages:
        rows = {each["name"]: each for each in pages.json("/")["databases"]}
        assert rows["orders"]["due"]["number"] == rows["mail"]["due"]["number"] == 1
        assert rows["silent"]["summary"]["text"] == "It does not answer within 1 s."
        assert rows["away"]["due"] is None and "does not answer" in rows["away"]["summary"]["text"]
        assert "migration/init.sql" in rows["empty"]["summary"]["text"]
        found = pages.get("/").text
        assert found.count('<p class="bad">') == 3
        assert "s3cret" not in found
        assert pages.get("/away/").status_code == 503
        assert pages.get("/orders/").status_code == 200


def test_the_log_of_an_action_names_the_database(
    places: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    apps = {"orders": create_app(places["orders"], access=EVERYTHING)}
    with caplog.at_level(logging.INFO, "bgjob.web"), pages_of(WebApps(apps)) as pages:
        pages.post("/orders/queues/x/pause", {})
        pages.post("/orders/queues/x/resume", {})
    assert "ann in orders: Queue x is paused" in caplog.text


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "api", "static", "livez", "ä", "-a", "a b"])
def test_a_name_that_no_address_can_have_is_refused(name: str) -> None:
    app = create_app("dbname=x", access=EVERYTHING)
    with pytest.raises(ValueError, match="is not a name for a database here"):
        WebApps({name: app})


def test_no_database_and_a_prefix_of_one_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        WebApps({})
    app = create_app("dbname=x", access=EVERYTHING, root_path="/x")
    with pytest.raises(ValueError, match="pass it here"):
        WebApps({"a": app})


# -- the command -------------------------------------------------------------------------


def test_the_command_serves_several_databases(places: dict[str, str]) -> None:
    command = [sys.executable, "-m", "bgjob", "web", "--listen", "127.0.0.1:0"]
    command += [f"--database={name}={dsn}" for name, dsn in places.items()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        try:
            address = run.stdout.readline().strip()
            with httpx.Client(follow_redirects=True) as browser:
                assert 'href="/mail/"' in browser.get(address).text
                root = address.partition("?")[0]
                assert "mail queue" in browser.get(f"{root}mail/").text
        finally:
            run.send_signal(signal.SIGTERM)
            run.wait(20)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--database", "mail"], "NAME=DSN is needed"),
        (["--database", "=service=mail"], "NAME=DSN is needed"),
        (["--database", "mail=nonsense"], "not a connection string"),
        (["--database", "a=dbname=x", "--database", "a=dbname=y"], "has a name twice"),
        (["--database", "a=dbname=x", "--dsn", "dbname=y"], "leave it out"),
        (["--database", "api=dbname=x"], "is not a name for a database"),
    ],
)
def test_the_command_refuses_databases_that_it_cannot_show(
    arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = cli.main(["web", *arguments])
    except SystemExit as error:
        status = int(str(error.code))
    assert status == 2
    assert problem in capsys.readouterr().err
