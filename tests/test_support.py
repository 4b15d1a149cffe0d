"""Tests import helpers from tests/support/, and not from one another."""

import ast
from collections import defaultdict
from pathlib import Path

TESTS = Path(__file__).parent
MODULES = [*TESTS.glob("*.py"), *TESTS.glob("support/*.py"), *TESTS.glob("faults/*.py")]


def imported(module: Path) -> set[str]:
    """The last parts of the names of all modules that may be imported."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(module.read_text("utf-8"))):
        match node:
            case ast.Import(found):
                names |= {alias.name.rpartition(".")[2] for alias in found}
            case ast.ImportFrom(name, found):
                names |= {str(name).rpartition(".")[2], *(alias.name for alias in found)}
    return names


def test_no_test_module_imports_another() -> None:
    tests = {path.stem for path in MODULES if path.stem.startswith("test_")}
    assert len(tests) > 40
    found = {str(path.relative_to(TESTS)): imported(path) & tests for path in MODULES}
    assert {path: names for path, names in found.items() if names} == {}


def test_no_helper_is_defined_twice() -> None:
    places: dict[str, dict[str, str]] = defaultdict(dict)
    for path in MODULES:
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not (
                node.name.startswith("test_")
            ):
                body = node.body[ast.get_docstring(node) is not None :]
                if len(body) > 1 or any(isinstance(part, ast.Call) for part in ast.walk(body[0])):
                    text = "\n".join(map(ast.unparse, body))
                    places[text][str(path.relative_to(TESTS))] = node.name
    assert [found for found in places.values() if len(found) > 1] == []
