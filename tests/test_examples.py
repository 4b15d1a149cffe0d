"""The programs of tests/examples/ print their .txt files, and the guide shows both unchanged."""

import os
import re
from pathlib import Path

import pytest
from support.databases import url_of
from support.documents import ROOT
from support.nursery import fork
from support.waiting import PATIENCE

EXAMPLES = sorted((ROOT / "tests" / "examples").glob("*.py"))
SERVED = sorted((ROOT / "tests" / "examples" / "web").glob("*.py"))
"""Those for web frameworks, which test_web_frameworks.py runs."""
GUIDE = (ROOT / "bgjob" / "docs" / "guide.md").read_text("utf-8")
README = (ROOT / "README.md").read_text("utf-8")


def output(example: Path) -> str:
    return example.with_suffix(".txt").read_text("utf-8")


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_prints_its_expected_output(example: Path, dsn: str, tmp_path: Path) -> None:
    out, err = tmp_path / "out", tmp_path / "err"
    # BGJOB_DSN would have precedence.
    env = {**os.environ, "DATABASE_URL": url_of(dsn), "BGJOB_DSN": "", "PYTHONWARNINGS": "error"}
    with out.open("wb") as output_, err.open("wb") as errors:
        process = fork(str(example), env=env, output=output_, errors=errors)
    assert process.stdin is not None
    process.stdin.close()
    assert (process.wait(PATIENCE), err.read_text("utf-8")) == (0, "")
    assert out.read_text("utf-8") == output(example)


def test_the_guide_or_readme_shows_each_example_with_its_output() -> None:
    shown = re.findall(
        r"^```python\n(.*?)^```\n+(?:It prints.*\n\n)?```text\n(.*?)^```$",
        GUIDE + README,
        re.MULTILINE | re.DOTALL,
    )
    programs = EXAMPLES + SERVED
    assert sorted(shown) == sorted((path.read_text("utf-8"), output(path)) for path in programs)
    assert GUIDE.count("```python\n") == GUIDE.count("```text\n") == len(programs) - 1


def test_the_guides_test_of_a_job_is_one_that_runs() -> None:
    [block] = re.findall(r"^```py\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)
    assert f"\n{block}\n" in (ROOT / "tests" / "test_pytest_plugin.py").read_text("utf-8")
