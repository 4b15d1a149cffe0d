"""The programs of tests/examples/ print what lies beside them, and the guide shows them as they are."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "tests" / "examples").glob("*.py"))
GUIDE = (ROOT / "bgjob" / "docs" / "guide.md").read_text("utf-8")


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_prints_what_lies_beside_it(example: Path, dsn: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-W", "error", example],
        # BGJOB_DSN would go before.
        env={**os.environ, "DATABASE_URL": dsn, "BGJOB_DSN": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == example.with_suffix(".txt").read_text("utf-8")


def test_the_guide_shows_each_example_with_its_output() -> None:
    shown = re.findall(
        r"^```python\n(.*?)^```\n\n```text\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL
    )
    assert len(shown) == GUIDE.count("```python\n")
    there = [
        (path.read_text("utf-8"), path.with_suffix(".txt").read_text("utf-8")) for path in EXAMPLES
    ]
    assert sorted(shown) == sorted(there)
