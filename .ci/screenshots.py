"""Take the guide's pictures of the web page: the demo's world in chromium, light and dark.

    PYTHONPATH=tests python .ci/screenshots.py

It writes bgjob/docs/page-light.png and page-dark.png. The world is that of `bgjob demo --web`. Look
at the pictures before you commit them.
"""

import sysconfig
from pathlib import Path

from support.browser import browser, serving

from bgjob._cli import demo_world
from bgjob._cli.demo_place import place
from bgjob.client import Client
from bgjob.ext.web import TokenAccess, create_app

DOCS = Path(__file__).parents[1] / "bgjob" / "docs"
SIZE = {"width": 1280, "height": 760}


def main() -> None:
    """Take both pictures, of one world."""
    root = Path(sysconfig.get_path("stdlib"))
    access = TokenAccess()
    with place(None) as dsn, Client(dsn) as client, demo_world.running(dsn, client, root):
        app = create_app(dsn, access=access, name="demo", colour="blue")
        with serving(app) as address, browser() as chromium:
            page = chromium.new_context(viewport=SIZE).new_page()
            page.goto(f"{address}/?token={access.token}")
            page.wait_for_timeout(62_000)  # until the workers have counted a minute of their own
            page.emulate_media(color_scheme="light")
            page.goto(address)
            page.wait_for_timeout(1_500)
            page.screenshot(path=DOCS / "page-light.png")

            page.emulate_media(color_scheme="dark")
            page.get_by_role("link", name="the tax office is away").click()
            page.get_by_role("button", name="Try one").click()
            page.get_by_text("the rest may follow").wait_for(timeout=30_000)
            page.screenshot(path=DOCS / "page-dark.png")


if __name__ == "__main__":
    main()
