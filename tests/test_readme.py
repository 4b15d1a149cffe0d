"""README's examples, run as they are printed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text("utf-8")

[CAPABILITIES] = re.findall(r"^## Capabilities$(.*?)^## ", README, re.MULTILINE | re.DOTALL)
SECTIONS = dict(re.findall(r"^### (.*?)$(.*?)(?=^### |\Z)", CAPABILITIES, re.MULTILINE | re.DOTALL))

EXAMPLE = re.compile(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def run(program: str, dsn: str, directory: Path) -> str:
    """Run a program that must succeed without a word on stderr; give what it prints."""
    example = directory / "example.py"
    example.write_text(program, "utf-8")
    ended = subprocess.run(
        [sys.executable, "-W", "error", example],
        # BGJOB_DSN would go before.
        env={**os.environ, "DATABASE_URL": dsn, "BGJOB_DSN": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    return ended.stdout


def test_the_complete_example_runs_as_printed(dsn: str, tmp_path: Path) -> None:
    found = re.search(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert found
    assert sorted(run(found[1], dsn, tmp_path).splitlines()) == [
        "attempt 2 after: not yet",
        "completed complete_me",
        "completed retry_me",
        "dead move_to_dlq because nobody can handle this",
        "in the dead-letter table: move_to_dlq - nobody can handle this",
        "working on {'n': 1}",
    ]


@pytest.mark.parametrize("capability", SECTIONS)
def test_the_example_of_a_capability_prints_what_stands_below_it(
    capability: str, dsn: str, tmp_path: Path
) -> None:
    examples = EXAMPLE.findall(SECTIONS[capability])
    programs = len(re.findall(r"^```python$", SECTIONS[capability], re.MULTILINE))
    assert len(examples) == programs >= 1, "a capability has an example, and its output follows"
    for program, output in examples:
        assert run(program, dsn, tmp_path) == output


def test_every_heading_of_a_capability_is_one_of_its_own() -> None:
    headings = re.findall(r"^### (.*?)$", CAPABILITIES, re.MULTILINE)
    assert len(headings) > 1
    assert list(SECTIONS) == headings
