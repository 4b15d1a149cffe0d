"""README's example, run as it is printed."""

import os
import re
import subprocess
import sys
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text("utf-8")


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
