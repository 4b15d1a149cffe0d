"""The long run: all faults together, for as long as you like; `pytest -m soak`.

BGJOB_SOAK_SECONDS says how long (1,800 by default), BGJOB_SOAK_SEED what happens.
"""

import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bgjob.ext.embedded import EmbeddedServer
from faults.soak import PEACE, Soak
from faults.world import World

SECONDS = float(os.environ.get("BGJOB_SOAK_SECONDS", "1800"))


@pytest.fixture(scope="module")
def server(bin_dir: Path | None) -> Iterator[EmbeddedServer]:
    """A server with a connection for each of a crowd of handlers."""
    settings = {"fsync": "off", "max_connections": "800"}
    with EmbeddedServer(bin_dir=bin_dir, settings=settings) as server:
        yield server


@pytest.mark.soak
@pytest.mark.timeout(SECONDS + PEACE + 300)
def test_under_all_faults_nothing_is_lost_and_no_effect_doubled(
    hurt: World, server: EmbeddedServer, pytestconfig: pytest.Config
) -> None:
    seed = int(os.environ.get("BGJOB_SOAK_SEED") or secrets.randbelow(1_000_000))
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")

    def say(text: str) -> None:
        # Past pytest's capture, and on the one stream that pytest-xdist leaves alone.
        with capture.global_and_fixture_disabled():
            sys.stderr.write(f"\nsoak: {text}\n")
            sys.stderr.flush()

    version = hurt.value("show server_version")
    say(f"seed {seed}, {SECONDS:g} s, 4 worker processes, PostgreSQL {version}")
    soak = Soak(hurt, server, seed=seed, seconds=SECONDS, say=say)
    report = soak.run()
    say(f"seed {seed}, {SECONDS:g} s:\n{report.text()}")

    hurt.saw("workers told of the database's troubles", report.happened["errors told"])
    assert report.is_good, report.text()
