"""README shows programs that run and figures that were measured."""

import re

from support.documents import ROOT

EXAMPLES = ROOT / "tests" / "examples"
README = (ROOT / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def three_digits(number: str) -> str:
    return f"{float(number.replace(',', '')):.3g}"


def test_the_first_fenced_blocks_are_the_demo_and_the_tests() -> None:
    demo, tests = blocks("sh")[:2]
    assert README.index(tests) < README.index("```python")
    for line, end in ((demo, "-m bgjob demo\n"), (tests, "-m pytest -q\n")):
        assert line.startswith("python3 -m venv .venv && .venv/bin/python -m pip install -q -e ")
        assert line.endswith(end)
        assert line.count("\n") == 1


def test_the_example_is_a_program_that_runs_with_its_output() -> None:
    example = (EXAMPLES / "first_steps.py").read_text("utf-8")
    assert blocks("python")[0] == example
    assert blocks("text") == [(EXAMPLES / "first_steps.txt").read_text("utf-8")]


def test_each_excerpt_is_of_a_program_that_runs() -> None:
    _, *excerpts, module = blocks("python")
    assert "bgjob worker" in README[README.index(module) :]  # test_cli runs this one
    programs = [path.read_text("utf-8") for path in EXAMPLES.glob("*.py")]
    for excerpt in excerpts:
        assert any(f"\n{excerpt}" in program for program in programs), excerpt


def test_each_figure_is_one_of_the_results() -> None:
    number = re.compile(r"\d[\d,]*(?:\.\d+)?")
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text("utf-8")
    there = {three_digits(found) for found in number.findall(results)}
    [table] = re.findall(r"^\| work \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", README, re.MULTILINE)
    rows = [line.strip("|\n").split(" | ") for line in table.splitlines()]
    assert len(rows) == 5
    for _, *figures in rows:
        shown = [three_digits(found) for found in number.findall(" ".join(figures))]
        assert len(shown) == 3
        assert there >= set(shown), figures
