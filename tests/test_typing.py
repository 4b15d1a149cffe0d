"""mypy --strict and pyright agree with typed_uses.py on which uses are wrong."""

import importlib.util
import re
import subprocess
import sys

import pytest
from support.documents import ROOT

USES = "tests/typed_uses.py"
SOURCE = (ROOT / USES).read_text("utf-8").splitlines()

COMMANDS = {
    "mypy": ["--strict", "--no-pretty", "--no-color-output", "--no-error-summary"],
    "pyright": ["--pythonpath", sys.executable],
}


@pytest.mark.timeout(300)  # cold, and on a busy machine
@pytest.mark.parametrize("checker", COMMANDS)
def test_a_checker_reports_the_wrong_uses_and_no_right_one(checker: str) -> None:
    if importlib.util.find_spec(checker) is None:
        pytest.skip(f"{checker} is in the extra `lint`, which is not installed")
    command = [sys.executable, "-m", checker, *COMMANDS[checker], USES]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    errors = [line for line in run.stdout.splitlines() if re.search(r"(:|-) error: ", line)]
    places = [re.search(rf"{USES}:(\d+):", line) for line in errors]
    reported = {int(place[1]) for place in places if place}
    wrong = {at for at, line in enumerate(SOURCE, 1) if line.endswith("# error")}

    assert len(wrong) > 50
    assert [e for e, place in zip(errors, places, strict=True) if not place] == [], run.stderr
    assert [SOURCE[at - 1] for at in sorted(wrong - reported)] == [], "not reported as wrong"
    assert [SOURCE[at - 1] for at in sorted(reported - wrong)] == [], run.stdout
