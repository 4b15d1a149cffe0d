"""The programs of tests/examples/ print their .txt files, and the guide shows both unchanged."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.documents import ROOT

EXAMPLES = sorted((ROOT / "tests" / "examples").glob("*.py"))
GUIDE = (ROOT / "bgjob" / "docs" / "guide.md").read_text("utf-8")
README = (ROOT / "README.md").read_text("utf-8")


def output(example: Path) -> str:
    return example.with_suffix(".txt").read_text("utf-8")


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_prints_its_expected_output(example: Path, dsn: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-W", "error", example],
        # BGJOB_DSN would have precedence.
        env={**os.environ, "DATABASE_URL": dsn, "BGJOB_DSN": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == output(example)


def test_the_guide_or_readme_shows_each_example_with_its_output() -> None:
    shown = re.findall(
        r"^```python\n(.*?)^```\n+(?:It prints.*\n\n)?```text\n(.*?)^```$",
        GUIDE + README,
        re.MULTILINE | re.DOTALL,
    )
    assert sorted(shown) == sorted((path.read_text("utf-8"), output(path)) for path in EXAMPLES)
    assert GUIDE.count("```python\n") == GUIDE.count("```text\n") == len(EXAMPLES) - 1


def test_the_guides_test_of_a_job_is_one_that_runs() -> None:
    [block] = re.findall(r"^```py\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)
    assert f"\n{block}\n" in (ROOT / "tests" / "test_testing.py").read_text("utf-8")
