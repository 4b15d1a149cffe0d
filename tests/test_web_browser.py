"""The page in chromium, over real workers: what an operator does with it, and what an attacker cannot."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import quote

import psycopg
import pytest
from support.browser import browser as start_browser, findings, need_browser, serving
from support.databases import Databases
from support.waiting import PATIENCE, eventually

from bgjob import Client, EnqueueRequest, Job, Mux, NoopObserver, Worker
from bgjob.schedule import Schedule
from bgjob.schedules import Schedules

pytestmark = pytest.mark.browser

HOSTILE = "a/../b?c=<img src=x onerror=document.title='hit'>'\"&d\u202e</pre><script>document.title='hit'</script>"
SHOWN = "<img src=x onerror=document.title='hit'>"
TOKEN = "a-token-for-the-browser-tests"

PAGES = (
    "/",
    "/queues/mail",
    "/queues/shop",
    f"/queues/{quote(HOSTILE, safe='')}",
    "/jobs",
    "/jobs?queue=mail&state=due",
    "/jobs/order-3",
    f"/jobs/{quote(HOSTILE, safe='')}",
    "/jobs/nothing",
    "/dead",
    "/dead/1",
    "/schedules",
    "/workers",
    "/workers/1",
    "/doctor?run=1",
    "/no/such/page",
)

DARK = {"/", "/queues/mail", "/jobs", "/jobs/order-3", "/dead", "/schedules", "/doctor?run=1"}
"""Pages with whatever has a colour."""

GROUND = "getComputedStyle(document.body).backgroundColor"


@dataclass
class World:
    """A database with workers, and the page over it."""

    client: Client
    address: str
    is_mended: threading.Event = field(default_factory=threading.Event)
    entered: threading.Event = field(default_factory=threading.Event)

    def mux(self) -> Mux:
        mux = Mux()

        @mux.handler("letter")
        def letter(_: Job) -> None: ...

        @mux.handler("confirm", max_attempts=1)
        def confirm(job: Job) -> None:
            if not self.is_mended.is_set():
                raise ConnectionError(f"mail server {job.id!r} is away")

        @mux.handler("long")
        async def long(_: Job) -> None:
            import asyncio

            self.entered.set()
            await asyncio.sleep(PATIENCE * 10)

        @mux.handler(HOSTILE[:200], max_attempts=1)
        def hostile(_: Job) -> None:
            raise ValueError(HOSTILE)

        return mux

    def is_gone(self, id_: str) -> bool:
        return self.client.explain(id_).state == "absent"


MILLION = 1_000_000

CROWD = """
    insert into bgjob_job (id, queue, type, attempt, last_error, next_run_at)
    select 'crowd ' || n, 'crowd ' || n %% 3, 'any', (n %% 50 = 0)::int,
        case when n %% 50 = 0 then 'not today' end,
        now() + case when n %% 5 = 0 then 1 else -1 end * n * interval '10 ms'
    from generate_series(1, %(jobs)s) as n;
    insert into bgjob_dead_job (
        job_id, queue, type, attempt, last_error, fingerprint, priority, next_run_at,
        job_created_at, job_updated_at, moved_at
    )
    select 'dead ' || n, 'crowd ' || n %% 3, 'any', 3, repeat('an error of some length ', 10),
        1 + n %% 40, 0, now(), now(), now(), now() - (%(jobs)s - n) * interval '400 ms'
    from generate_series(1, %(jobs)s) as n;
"""


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(0, id="alone"),
        pytest.param(MILLION, id="in a crowd", marks=[pytest.mark.soak, pytest.mark.timeout(600)]),
    ],
)
def world(request: pytest.FixtureRequest, databases: Databases, template: str) -> Iterator[World]:
    """A world of a few jobs, alone or beside a million live and a million dead ones."""
    need_browser()
    from bgjob.ext.web import TokenAccess, create_app

    with ExitStack() as stack:
        dsn = stack.enter_context(databases.lend(template, may_keep=lambda: False))
        if request.param:
            with psycopg.connect(dsn, autocommit=True) as conn:
                psycopg.ClientCursor(conn).execute(CROWD, {"jobs": request.param})
                conn.execute("vacuum (analyze) bgjob_job, bgjob_dead_job")  # as autovacuum would
        client = stack.enter_context(Client(dsn))
        app = create_app(dsn, access=TokenAccess(TOKEN), name="test")
        world = World(client, stack.enter_context(serving(app)))
        client.pause("mail")
        client.bulk_enqueue(
            [
                EnqueueRequest("mail", "letter", id="order-1"),
                EnqueueRequest("mail", "letter", id="order-2"),
                EnqueueRequest("idle", "letter", {"to": "ada", "token": "secret-1"}, id="order-3"),
                *(EnqueueRequest("shop", "confirm", id=f"confirm-{n}") for n in range(4)),
                EnqueueRequest("shop", "long", id="long-1"),
                EnqueueRequest(HOSTILE, HOSTILE[:200], {HOSTILE: HOSTILE}, id=HOSTILE),
                EnqueueRequest(
                    HOSTILE, HOSTILE[:200], {HOSTILE: HOSTILE}, id=f"{HOSTILE} later", delay=9999
                ),
            ]
        )
        nightly = Schedule(
            "nightly", request=EnqueueRequest("shop", "letter"), every=timedelta(days=1)
        )
        worker = Worker(
            client,
            {"mail": 1, "shop": 4, HOSTILE: 1},
            world.mux(),
            services=[Schedules([nightly])],
            observer=NoopObserver(),
        )
        stack.callback(worker.shutdown, 0)
        worker.run()
        dying = [HOSTILE, *(f"confirm-{n}" for n in range(4))]
        assert eventually(lambda: len(client.dlq.list(ids=dying)) == len(dying))
        assert world.entered.wait(PATIENCE)
        yield world


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with start_browser() as browser:
        yield browser


@dataclass
class Visitor:
    """A context of the browser with one page, whose errors fail the test."""

    page: Any
    address: str
    said: list[str] = field(default_factory=list)

    def go(self, path: str = "/") -> Any:
        return self.page.goto(self.address + path)

    def sees(self, text: str) -> None:
        self.page.get_by_text(text).first.wait_for(timeout=PATIENCE * 1000)

    def will_see(self, text: str) -> None:
        """Look at the page as if it had been hidden, which renews its parts, until it says this."""

        def says() -> bool:
            self.page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
            return bool(self.page.get_by_text(text).count())

        assert eventually(says), text


@pytest.fixture
def visit(chromium: Any, world: World) -> Iterator[Any]:
    """Make visitors who have shown the token; none may have met an error of the page."""
    visitors: list[Visitor] = []

    with ExitStack() as stack:

        def make(**options: Any) -> Visitor:
            context = chromium.new_context(
                viewport={"width": 1280, "height": 900}, reduced_motion="reduce", **options
            )
            stack.callback(context.close)
            visitor = Visitor(context.new_page(), world.address)
            visitor.page.set_default_timeout(PATIENCE * 1000)
            visitor.page.on("console", lambda it: visitor.said.append(it.text))
            visitor.page.on("pageerror", lambda it: visitor.said.append(str(it)))
            visitor.go(f"/?token={TOKEN}")
            assert "token" not in visitor.page.url
            visitors.append(visitor)
            return visitor

        yield make
    assert [text for visitor in visitors for text in visitor.said] == []


def test_an_operator_finds_why_a_job_waits_and_resumes_its_queue(visit: Any, world: World) -> None:
    it = visit()
    it.page.keyboard.press("/")
    it.page.keyboard.type("order-2")
    it.page.keyboard.press("Enter")
    it.sees("Queue 'mail' is paused")
    it.page.get_by_role("button", name="Resume").click()

    assert eventually(lambda: world.is_gone("order-2"))
    it.page.reload()
    it.sees("Completed jobs are deleted")
    it.go("/queues/mail")
    it.page.get_by_role("button", name="Pause mail", exact=True).click()
    it.sees("paused")
    assert "mail" in world.client.paused()


def test_an_operator_tries_one_dead_job_and_then_the_rest(visit: Any, world: World) -> None:
    it = visit()
    it.page.get_by_role("link", name="mail server").click()
    it.page.get_by_role("button", name="Try one").click()
    it.will_see("leave the rest where it is")

    world.is_mended.set()
    it.page.get_by_role("button", name="Try another one").click()
    it.will_see("the rest may follow")
    it.page.get_by_role("button", name="Put back the rest").click()
    it.sees("3 jobs")  # the question
    it.page.get_by_role("main").get_by_role("button").click()
    it.will_see("3 of 3 are back")

    assert findings(it.page) == []
    assert eventually(lambda: all(world.is_gone(f"confirm-{n}") for n in range(4)))


def test_an_operator_cancels_a_running_job(visit: Any, world: World) -> None:
    it = visit()
    it.go("/queues/shop")
    it.page.get_by_role("link", name="Its jobs").click()
    it.page.get_by_role("link", name="long-1").click()
    it.sees("It runs since")
    it.page.get_by_role("button", name="Cancel").click()
    it.page.get_by_label("Reason").fill("too long")
    it.page.get_by_role("main").get_by_role("button").click()

    assert eventually(lambda: any(job.id == "long-1" for job in world.client.dlq.list()))
    [dead] = [job for job in world.client.dlq.list() if job.id == "long-1"]
    assert "too long" in (dead.last_error or "")


def test_a_schedule_is_run_with_the_keyboard_alone(visit: Any, world: World) -> None:
    it = visit()

    def reach(name: str) -> None:
        for _ in range(100):
            it.page.keyboard.press("Tab")
            focused = it.page.locator(":focus")
            if name in (focused.text_content() or ""):
                outline = focused.evaluate("it => getComputedStyle(it).outlineStyle")
                assert outline != "none", f"{name} has the focus, and nobody sees it"
                return
        raise AssertionError(f"{name} cannot be reached")

    reach("Skip to the content")
    it.page.keyboard.press("Enter")
    assert it.page.locator(":focus").get_attribute("id") == "main"
    it.go("/")
    reach("Schedules")
    it.page.keyboard.press("Enter")
    it.page.wait_for_url("**/schedules")
    reach("Run now nightly")
    it.page.keyboard.press("Enter")
    it.page.get_by_role("status").filter(has_text="nightly").wait_for()


def test_everything_works_without_javascript(visit: Any, world: World) -> None:
    it = visit(java_script_enabled=False)
    it.go("/queues/shop")
    it.page.get_by_role("button", name="Pause shop").click()
    it.sees("paused")
    assert "shop" in world.client.paused()
    it.page.get_by_role("button", name="Resume shop").click()
    it.sees("open")
    assert "shop" not in world.client.paused()
    it.page.get_by_label("Job id").fill("order-3")
    it.page.keyboard.press("Enter")
    it.sees("●")
    assert "secret-1" not in it.page.content()
    assert it.page.get_by_text("renewed").count() == 0


def test_every_page_is_accessible_and_fits_a_phone_and_runs_no_hostile_name(
    visit: Any, world: World
) -> None:
    it = visit(color_scheme="light")
    for path in PAGES:
        it.go(path)
        assert findings(it.page) == [], path
        assert it.page.locator("h1").count() == 1, path
        assert it.page.title() != "hit"
        assert it.page.locator("main img, main script").count() == 0, path
        assert "\u202e" not in it.page.content(), path
        it.page.set_viewport_size({"width": 390, "height": 800})
        assert it.page.evaluate("document.documentElement.scrollWidth") == 390, path
        it.page.set_viewport_size({"width": 1280, "height": 900})
        if path in DARK:
            light = it.page.evaluate(GROUND)
            it.page.emulate_media(color_scheme="dark")
            assert it.page.evaluate(GROUND) != light
            assert findings(it.page, "color-contrast") == [], f"{path}, dark"
            it.page.emulate_media(color_scheme="light")
    it.said[:] = [text for text in it.said if "404" not in text]


def test_one_page_over_several_databases_is_accessible_and_leads_to_each_and_back(
    visit: Any, world: World
) -> None:
    from bgjob.ext.web import TokenAccess, WebApps, create_app

    sources: dict[str, Client | str] = {
        "orders": world.client,
        "away": "postgresql://127.0.0.1:1/none",
    }
    access = TokenAccess(TOKEN)
    apps = {name: create_app(source, access=access) for name, source in sources.items()}
    it = visit(color_scheme="light")
    with serving(WebApps(apps)) as it.address:
        it.go(f"/?token={TOKEN}")
        for width in (1280, 390):
            it.page.set_viewport_size({"width": width, "height": 900})
            for path in ("/", "/orders/"):
                it.go(path)
                assert findings(it.page) == [], path
                assert it.page.evaluate("document.documentElement.scrollWidth") == width, path
                it.page.emulate_media(color_scheme="dark")
                assert findings(it.page, "color-contrast") == [], f"{path}, dark"
                it.page.emulate_media(color_scheme="light")
        it.go("/")
        it.sees("The database does not answer")
        world.client.pause("paused meanwhile")
        it.will_see("2 queues paused")  # by the script, which renews the part
        world.client.resume("paused meanwhile")
        it.page.get_by_role("link", name="orders", exact=True).click()
        it.page.get_by_role("link", name="Jobs", exact=True).click()
        assert it.page.url == f"{it.address}/orders/jobs"
        it.page.get_by_role("link", name="bgjob", exact=True).click()
        assert it.page.url == f"{it.address}/"


def test_links_of_hostile_names_lead_to_them(visit: Any, world: World) -> None:
    it = visit()
    it.sees(SHOWN)
    it.page.get_by_role("link", name=SHOWN).first.click()
    it.page.wait_for_url("**/queues/**")
    it.page.get_by_role("link", name="Its jobs", exact=True).click()
    it.page.locator("td").get_by_role("link", name=SHOWN).first.click()
    it.page.wait_for_url("**/jobs/**")
    assert HOSTILE[:20] in it.page.locator("h1").inner_text()
    it.sees("not due")
    it.go("/dead")
    it.page.get_by_role("link", name="ValueError").first.click()
    it.page.wait_for_url("**/dead/groups/**")
    it.sees(SHOWN)


def test_the_policy_of_the_page_stops_injected_code(visit: Any) -> None:
    it = visit()
    tried = it.page.evaluate(
        """() => {
          const refused = [];
          const attempt = (name, act) => { try { act(); } catch { refused.push(name); } };
          attempt("html", () => { document.body.innerHTML = "<b>hit</b>"; });
          attempt("policy", () => { trustedTypes.createPolicy("bgjob", {createHTML: (it) => it}); });
          attempt("eval", () => { setTimeout("document.title = 'hit'"); });
          const script = document.createElement("script");
          attempt("script", () => { script.textContent = "document.title = 'hit'"; });
          const image = document.createElement("img");
          image.setAttribute("src", "data:,x");
          attempt("handler", () => { image.setAttribute("onerror", "document.title = 'hit'"); });
          document.body.append(image);
          return refused;
        }"""
    )
    it.page.wait_for_timeout(100)
    assert {"html", "policy", "eval", "script"} <= set(tried)
    assert it.page.title() != "hit"
    assert it.said, "the browser reported nothing"
    it.said.clear()


def test_a_page_of_another_port_cannot_act_with_the_cookie(
    visit: Any, world: World, another_site: str
) -> None:
    """Another port of a host is the same site: the browser sends the cookie."""
    it = visit()
    it.page.goto(f"{another_site}?{world.address}/queues/shop/pause")
    it.page.get_by_role("button").click()
    it.page.wait_for_url(f"{world.address}/**")

    assert "403" in it.page.locator("h1").inner_text()
    assert "shop" not in world.client.paused()
    it.said.clear()


class Attack(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        target = self.path.partition("?")[2]
        content = f"<form method=post action='{target}'><button>Win</button></form>".encode()
        self.send_response(200)
        self.send_header("content-type", "text/html")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def another_site() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Attack) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


def test_parts_are_renewed_unless_somebody_is_using_them(visit: Any, world: World) -> None:
    it = visit()
    it.page.clock.install()
    it.go("/queues/shop")
    statuses: list[int] = []
    it.page.on("response", lambda answer: statuses.append(answer.status))

    def pass_by(seconds: int) -> None:
        it.page.clock.run_for(1000 * seconds)

    pass_by(6)
    assert eventually(lambda: it.page.evaluate("1") and 200 in statuses)
    pass_by(6)
    assert eventually(lambda: it.page.evaluate("1") and 304 in statuses)

    it.page.get_by_role("button", name="Pause shop").focus()
    world.client.pause("shop")
    before = len(statuses)
    pass_by(20)
    assert it.page.evaluate("document.activeElement.textContent").strip() == "Pause shop"
    it.page.evaluate("document.activeElement.blur()")

    def is_renewed() -> bool:
        pass_by(6)
        return bool(it.page.get_by_role("button", name="Resume shop").count())

    assert eventually(is_renewed)
    assert len(statuses) > before
    world.client.resume("shop")
