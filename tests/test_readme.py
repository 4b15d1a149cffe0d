"""README's complete example, run as it is printed."""

import os
import re
import subprocess
import sys
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text("utf-8")


def test_the_complete_example_runs_as_printed(dsn: str, tmp_path: Path) -> None:
    example = tmp_path / "example.py"
    found = re.search(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert found
    example.write_text(found[1], "utf-8")

    run = subprocess.run(
        [sys.executable, "-W", "error", example],
        env={**os.environ, "DATABASE_URL": dsn},
        capture_output=True,
        text=True,
        check=False,
    )

    assert (run.returncode, run.stderr) == (0, "")
    assert sorted(run.stdout.splitlines()) == [
        "attempt 2 after: not yet",
        "completed complete_me",
        "completed retry_me",
        "dead move_to_dlq because nobody can handle this",
        "in the dead-letter table: move_to_dlq - nobody can handle this",
        "working on {'n': 1}",
    ]
