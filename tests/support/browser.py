"""A real browser, the page as it is served in production, and axe-core."""

import shutil
import socket
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from support.waiting import PATIENCE, eventually

AXE = "4.14.1"
PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "chrome")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]


def need_browser() -> str:
    """Return the path of chromium, or skip."""
    pytest.importorskip("playwright", reason="the extra `browser` is not installed")
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.skip(f"there is no {PROGRAMS[0]} on this host (Debian: apt-get install chromium)")
    return program


@contextmanager
def browser() -> Iterator[Any]:
    """Yield a browser of playwright."""
    program = need_browser()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=ARGUMENTS)
        try:
            yield chromium
        finally:
            chromium.close()


@contextmanager
def serving(app: Any) -> Iterator[str]:
    """Serve an application on a free port of this host; yield its address."""
    uvicorn = pytest.importorskip("uvicorn", reason="the extra `web` is not installed")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(
            uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2)
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            assert eventually(lambda: server.started or not thread.is_alive())
            assert thread.is_alive(), "the page did not start"
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(PATIENCE)


@cache
def axe() -> str:
    """Return the script of axe-core, or skip where it cannot be had."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("axe-core comes by npm, which is not on this host")
    with TemporaryDirectory() as folder:
        command = [npm, "pack", "--silent", f"axe-core@{AXE}"]
        try:
            subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=PATIENCE)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            pytest.skip(f"axe-core {AXE} cannot be had: {error}")
        with tarfile.open(Path(folder, f"axe-core-{AXE}.tgz")) as package:
            member = package.extractfile("package/axe.min.js")
            assert member is not None
            return member.read().decode()


FINDINGS = """(rules) => axe.run(rules.length ? {runOnly: rules} : {}).then(
    ({violations}) => violations.map(
        (it) => `${it.id}: ${it.nodes.map((node) => node.html.slice(0, 200)).join(" | ")}`))"""


def findings(page: Any, *rules: str) -> list[str]:
    """What axe-core finds on a page, by these rules or by all."""
    if not page.evaluate("'axe' in window"):
        page.evaluate(axe())
    found: list[str] = page.evaluate(FINDINGS, list(rules))
    return found
