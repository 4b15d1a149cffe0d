"""What is kept of a failure: a text that says what happened, and a fingerprint."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from bgjob import Mux
from bgjob._failure import error_text, fingerprint, normalised
from bgjob.result import MoveToDlq, Retry
from support.jobs import a_job


def raised(call: Callable[[], object]) -> BaseException:
    try:
        call()
    except BaseException as error:
        return error
    raise AssertionError(call)


def text(call: Callable[[], object]) -> list[str]:
    """Return the text of what a call raises, without line numbers and the frames of these tests."""
    told = error_text(raised(call)) or ""
    return [
        re.sub(r":\d+ in", " in", line)
        for line in told.splitlines()
        if not re.search(r"in (raised|<lambda>|test_\w+)$", line)
    ]


def parse(data: str) -> None:
    try:
        json.loads(data)
    except ValueError as error:
        error.add_note("the body of order 7")
        raise ConnectionError("the shop's answer is broken") from error


def clean_up() -> None:
    try:
        parse("{")
    finally:
        raise LookupError("nothing to clean")


def fail(error: BaseException) -> None:
    raise error


def test_a_text_has_the_place_the_notes_and_the_errors_that_led_to_it() -> None:
    assert text(clean_up) == [
        "LookupError: nothing to clean",
        "  at test_failure.py in clean_up",
        "while handling ConnectionError: the shop's answer is broken",
        "  at test_failure.py in parse",
        "  at test_failure.py in clean_up",
        "caused by JSONDecodeError: Expecting property name enclosed in double quotes: line 1 "
        "column 2 (char 1)",
        "note: the body of order 7",
        "  at json/decoder.py in JSONDecoder.raw_decode",
        "  at test_failure.py in parse",
    ]


def test_a_suppressed_context_is_not_told() -> None:
    def suppress() -> None:
        try:
            parse("{")
        except ConnectionError:
            raise KeyError("to") from None

    assert text(suppress) == ["KeyError: 'to'", "  at test_failure.py in suppress"]


def test_all_leaves_of_a_group_are_told_equal_ones_once() -> None:
    def leaf(error: Exception) -> Exception:
        return raised(lambda: fail(error))  # type: ignore[return-value]

    inner = ExceptionGroup("inner", [leaf(OSError("gone")), leaf(KeyError("to"))])
    group = ExceptionGroup("three tasks", [leaf(OSError("gone")), inner])
    group.add_note("of the nightly run")
    assert text(lambda: fail(group)) == [
        "ExceptionGroup: three tasks (2 sub-exceptions)",
        "note: of the nightly run",
        "  at test_failure.py in fail",
        "- 2 times OSError: gone",
        "    at test_failure.py in fail",
        "- KeyError: 'to'",
        "    at test_failure.py in fail",
    ]


def test_of_many_leaves_as_many_are_told_as_fit_and_the_others_counted() -> None:
    leaves = [ValueError(f"{n} {'x' * 500}") for n in range(3000)]
    told = error_text(ExceptionGroup("many", leaves)) or ""
    lines = told.splitlines()
    assert len(told) < 10_100
    assert [line.split(" x")[0] for line in lines[1:3]] == ["- ValueError: 0", "- ValueError: 1"]
    assert lines[-1] == f"- and {3000 - len(lines[1:-1])} more"


def test_of_a_long_message_the_frames_and_the_cause_are_kept() -> None:
    def long() -> None:
        try:
            fail(OSError("y" * 5_000_000))
        except OSError as error:
            raise ValueError("x" * 5_000_000) from error

    told = text(long)
    assert sum(map(len, told)) < 10_500
    assert told[0].endswith("… (5000012 characters)")
    assert told[1] == "  at test_failure.py in long"
    assert told[2].startswith("caused by OSError: yyy")
    assert told[3:] == ["  at test_failure.py in fail", "  at test_failure.py in long"]


def test_of_a_deep_stack_both_ends_are_kept() -> None:
    def recur() -> None:
        recur()

    told = error_text(raised(recur)) or ""
    assert len(told.splitlines()) == 1 + 6 + 1 + 2
    assert told.splitlines()[-1].endswith("in raised")


def test_causes_in_a_circle_end() -> None:
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    assert error_text(first) == "ValueError: first\ncaused by ValueError: second"


def test_what_raises_when_it_is_looked_at_breaks_nothing() -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise SystemExit

    class Note:
        def __repr__(self) -> str:
            raise KeyboardInterrupt

    error = ValueError("why")
    error.__cause__ = Mute()
    assert error_text(error) == "ValueError: why\ncaused by Mute (its text raised SystemExit)"
    error.__notes__ = [Note()]  # type: ignore[list-item]
    assert error_text(error) == "ValueError (its text raised KeyboardInterrupt)"
    assert fingerprint("t", Mute()) != fingerprint("t", error)


# -- frames of a handler ----------------------------------------------------------------


def module(name: str, path: str, source: str) -> dict[str, Any]:
    found: dict[str, Any] = {"__name__": name}
    exec(compile(source, path, "exec"), found)
    return found


SITE = "/venv/lib/python3.12/site-packages"
DRIVER = module("driver.wire", f"{SITE}/driver/wire.py", "def ask():\n raise OSError('gone')")
DRIVER_CLIENT = module("driver", f"{SITE}/driver/__init__.py", "def call(ask):\n ask()")


@pytest.mark.parametrize("folder", ["/srv/release-7", SITE], ids=["a program", "installed"])
def test_the_programs_last_frame_is_found_below_bgjobs_and_above_a_librarys(folder: str) -> None:
    source = "def send(call, ask):\n call(ask)\ndef handle(_):\n send(CALL, ASK)"
    shop = module("shop.jobs", f"{folder}/shop/jobs.py", source)
    shop |= {"CALL": DRIVER_CLIENT["call"], "ASK": DRIVER["ask"]}
    route: Any = Mux().register("t", shop["handle"]).route(a_job())
    ended = route.run(a_job())
    assert isinstance(ended, Retry)
    told = (error_text(ended.error) or "").splitlines()
    assert told == [
        "OSError: gone",
        "  at driver/wire.py:2 in ask",
        "  at shop/jobs.py:2 in send",
        "  at shop/jobs.py:4 in handle",
    ]


# -- fingerprints -----------------------------------------------------------------------


def died(call: Callable[[], object], type: str = "t") -> int:
    return fingerprint(type, raised(call))


def test_jobs_that_died_in_the_same_way_have_the_same_fingerprint() -> None:
    def refuse(what: str) -> None:
        raise ValueError(f"order {what} is refused")

    def refuse_elsewhere() -> None:
        raise ValueError("order '1' is refused")

    first = died(lambda: refuse("'abc'"))
    assert 0 < first < 1 << 48
    assert first == died(lambda: refuse('"x y"')) == died(lambda: refuse("'abc'"))
    others = [
        died(lambda: refuse("'abc'"), "another type"),
        died(lambda: refuse("'abc' or 'd'")),
        died(refuse_elsewhere),
        died(lambda: fail(ValueError("order 'abc' is refused"))),
        died(lambda: fail(KeyError("order 'abc' is refused"))),
        fingerprint("t", "ValueError: order 'abc' is refused"),
    ]
    assert len({first, *others}) == 7


def test_a_group_of_exceptions_has_the_fingerprint_of_a_leaf_however_many_there_are() -> None:
    def group(*errors: Exception) -> None:
        raise ExceptionGroup(f"{len(errors)} tasks", errors)

    found = {
        died(lambda: group(OSError("1"), KeyError("a"))),
        died(lambda: group(KeyError("b"), OSError("22"), OSError("3"))),
        died(lambda: group(ExceptionGroup("", [KeyError("c")]))),
    }
    assert len(found) == 1
    assert found != {died(lambda: group(OSError("1")))}


@pytest.mark.parametrize(
    ("one", "normal"),
    [
        ("mail server 'mx-1' is away", "mail server <> is away"),
        ("can't open 'a b' or \"c\" after 3.5 s", "can't open <> or <> after 0.0 s"),
        ("job 0199a2b4-7c1e-7def-8000-0123456789ab", "job <>"),
        ("job 01990000-7000-7000-8000-012345678901", "job <>"),
        ("at 0x7f12ab34cdef, commit 3f2a9c1b", "at <>, commit <>"),
        ("order 123456789", "order 0"),
        ("\n first\nsecond", "first"),
        ("x" * 900, "x" * 200),
    ],
)
def test_a_line_is_normalised(one: str, normal: str) -> None:
    assert normalised(one) == normal


def test_only_dead_lettering_makes_a_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    from bgjob._sql import settlements
    from bgjob._sql.settlements import Claimed, Settlements

    made: list[str] = []

    def make(type: str, error: object) -> int:
        made.append(type)
        return 1

    monkeypatch.setattr(settlements, "fingerprint", make)
    store, job = Settlements().store, Claimed(a_job("dead"), 1)
    store(job, Retry(1.0, error="why"))
    assert made == []
    store(job, MoveToDlq("why"))
    assert made == ["dead"]
