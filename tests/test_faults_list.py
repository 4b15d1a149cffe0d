"""tests/faults/README.md lists the faults, with their numbers and existing tests."""

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

TESTS = Path(__file__).parent
ROOT = TESTS.parent
FAULTS = TESTS / "faults"
CLUSTER = TESTS / "cluster"


def rows() -> list[tuple[int, list[str]]]:
    """The numbers of the table, and the tests that are named for each."""
    lines = (FAULTS / "README.md").read_text("utf-8").splitlines()
    cells = [line.strip("|").split(" | ") for line in lines if re.match(r"\| \d+ \|", line)]
    return [(int(cell[0]), re.findall(r"`([\w./*]+::[\w*]+)`", cell[-1])) for cell in cells]


def named_in_guarantees() -> set[int]:
    text = (ROOT / "bgjob" / "docs" / "guarantees.md").read_text("utf-8")
    tables = text.partition("## What it survives")[2]
    last = re.findall(r"^\| .* \| ([\d, ]+) \|$", tables, re.MULTILINE)
    return {int(number) for cell in last for number in cell.split(", ")}


def there_in(folder: Path, prefix: str = "") -> Iterator[str]:
    for path in sorted(folder.glob("test_*.py")):
        for name in re.findall(
            r"^(?:async )?def (test_\w+)", path.read_text("utf-8"), re.MULTILINE
        ):
            yield f"{prefix}{path.stem}::{name}"


def test_the_faults_are_numbered_from_1_on_and_each_has_a_test_that_exists() -> None:
    assert [number for number, _ in rows()] == [*range(1, len(rows()) + 1)]
    there = [*there_in(FAULTS), *there_in(TESTS, "../"), *there_in(CLUSTER, "../cluster/")]
    for number, names in rows():
        assert names, f"fault {number} has no test"
        for name in names:
            assert any(fnmatchcase(test, name) for test in there), f"fault {number}: no {name}"


def test_each_test_that_carries_a_number_is_listed_with_its_fault() -> None:
    listed = dict(rows())
    for test in there_in(FAULTS):
        if found := re.search(r"::test_(\d+)_", test):
            names = listed.get(int(found[1]), [])
            assert any(fnmatchcase(test, name) for name in names), f"{test} is not listed"


def test_the_guarantees_describe_the_outcome_of_each_fault() -> None:
    assert named_in_guarantees() == {number for number, _ in rows()}
