"""Every link in the documents has a target, and every file that a text names exists."""

import re
from functools import cache
from pathlib import Path

import pytest
from support.documents import ROOT

FOLDERS = (".github", "benchmarks", "bgjob", "migration", "tests")
NAMED = re.compile(r"(?<![\w./-])((?:\.ci|\.github|benchmarks|bgjob|migration|tests)/[\w./-]*\w/?)")


def files(pattern: str) -> list[Path]:
    """The project's files of this kind; not those of an environment or of a build."""
    found = [*ROOT.glob(pattern)]
    for folder in FOLDERS:
        found += (ROOT / folder).rglob(pattern)
    made = {".venvs", ".results", "__pycache__"}
    return sorted(path for path in found if not made & set(path.parts))


DOCUMENTS = files("*.md")


def prose(document: Path) -> str:
    """The text without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", document.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


@cache
def anchors(document: Path) -> set[str]:
    """The anchors of the headings, by the rule of GitHub."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", prose(document), re.MULTILINE):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        anchor = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        assert anchor not in found, f"{document.name} has two headings {heading!r}"
        found.add(anchor)
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_of_a_document_leads_to_a_file_and_a_section(document: Path) -> None:
    text = re.sub(r"`[^`\n]*`", "", prose(document))
    assert not re.search(r"^\[[^]]+\]: ", text, re.MULTILINE), "links are written where they stand"
    for target in re.findall(r"\]\(([^()\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        file = (document.parent / name).resolve() if name else document
        assert file.exists(), target
        assert file.is_relative_to(ROOT), target
        if anchor:
            assert anchor in anchors(file), target


def test_the_documents_are_found() -> None:
    names = {str(path.relative_to(ROOT)) for path in DOCUMENTS}
    assert names >= {"README.md", "bgjob/docs/guide.md", "tests/faults/README.md"}
    assert "what-it-guarantees" in anchors(ROOT / "bgjob" / "docs" / "guarantees.md")


@pytest.mark.parametrize(
    "document",
    # The changelog names files that there were.
    [document for document in DOCUMENTS if document.name != "CHANGELOG.md"],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_every_file_that_a_document_names_is_there(document: Path) -> None:
    for code in re.findall(r"`([^`\n]+)`", prose(document)):
        for name in NAMED.findall(code.partition("::")[0]):
            assert (ROOT / name).exists() or "/." in name, name


def test_every_document_that_the_code_names_is_there() -> None:
    for path in [*files("*.py"), *files("*.sql")]:
        if path.is_relative_to(ROOT / "tests"):
            continue
        named = re.findall(r"(?<![\w/.-])([\w/.-]+\.md)(?:#([\w-]+))?", path.read_text("utf-8"))
        for name, anchor in named:
            there = [file for file in (ROOT / name, path.parent / name) if file.exists()]
            assert there, f"{path.relative_to(ROOT)} names {name}"
            assert not anchor or anchor in anchors(there[0]), f"{path.name} names {name}#{anchor}"
