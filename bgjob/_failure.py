"""What is kept of a failure: a text that says what happened, and a fingerprint to group it by.

The text begins with the class and the message of the error. After it come its notes, the frames
that it went through, the leaves of an exception group, and the errors that led to it. Frames are
listed from where it was raised outwards, without those of bgjob, and of each stretch of library
code only the innermost. So the last frame of the program's own code is the first or the second.

The fingerprint does not depend on values: dead jobs with equal ones died in the same way.
For an exception with a few frames the text takes 5 to 15 µs, and the fingerprint as long: only
dead-lettering makes one.
Nothing that an exception does when it is looked at, such as raising in `__str__`, gets out.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from hashlib import blake2b
from itertools import islice
from types import TracebackType
from typing import NamedTuple, TypeAlias

Error: TypeAlias = str | BaseException

_LONGEST = 10_000
"""Characters of a text."""
_LONGEST_REST = 6_000
"""Characters of what comes after the message, which may be cut to leave room for it."""
_LONGEST_PART = 1_000
"""Characters of a note, or of the message of a leaf or a cause."""
_SHORT = 200

_FIRST_FRAMES, _LAST_FRAMES = 6, 2
_MOST_NOTES = 10
_MOST_CAUSES = 10
_MOST_LEAVES = 1000
"""Leaves that are read; the others are only counted."""
_MOST_COMPARED = 100

_OWN, _LIBRARY, _INSTALLED, _PROGRAM = range(4)

_DEMO = {"bgjob._cli.demo_jobs", "bgjob._cli.demo_shop"}
"""Modules whose frames are a program's: the jobs of the demo."""

_HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep  # noqa: PTH100, PTH120 (for prefixes)
_STANDARD = os.path.dirname(os.path.abspath(os.__file__)) + os.sep  # noqa: PTH100, PTH120
_SITES = ("site-packages", "dist-packages")

_QUOTED = re.compile(r"""(?<!\w)(?:'[^']*'|"[^"]*"|`[^`]*`)(?!\w)""")
_HEX = re.compile(r"\b(?:0x)?(?=[0-9]*[a-f])[0-9a-f]{8,}(?:-[0-9a-f]+)*\b", re.IGNORECASE)
_UUID = re.compile(r"\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b", re.IGNORECASE)
_DIGITS = re.compile(r"\d+")


# -- text ------------------------------------------------------------------------------


def error_text(error: Error | None) -> str | None:
    """Return text that PostgreSQL can store: no NUL, no surrogates, 10,000 characters."""
    if error is None:
        return None
    try:
        return _storable(_cut(error, _LONGEST) if isinstance(error, str) else _told(error))
    except BaseException as broken:
        return _mute(error, broken)


def message_of(error: BaseException) -> str:
    """Return the first part of its text: the class and the message."""
    return _storable(_cut(_message(error), _LONGEST))


def _storable(text: str) -> str:
    return text.replace("\0", "\ufffd").encode("utf-8", "replace").decode()


def _told(error: BaseException) -> str:
    seen = {id(error)}
    message = _message(error)
    rest = "".join(f"\n{line}" for line in _bounded(_about(error, message, seen)))
    return _cut(message, _LONGEST - len(rest)) + rest


def _message(error: BaseException) -> str:
    name = type(error).__name__
    try:
        text = str(error)
    except BaseException as broken:
        return _mute(error, broken)
    return f"{name}: {text}" if text else name


def _mute(error: object, broken: BaseException) -> str:
    return f"{type(error).__name__} (its text raised {type(broken).__name__})"


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[:longest]}… ({len(text)} characters)"


def _bounded(lines: Iterator[str]) -> Iterator[str]:
    left = _LONGEST_REST
    for line in lines:
        left -= len(line) + 1
        if left < 0:
            yield "…"
            return
        yield line


def _about(error: BaseException, message: str, seen: set[int]) -> Iterator[str]:
    """Yield the lines that follow the message of an error."""
    yield from _own_lines(error)
    for _ in range(_MOST_CAUSES):
        led = _led_to(error)
        if led is None or id(led[1]) in seen:
            return
        how, error = led
        seen.add(id(error))
        said, message = message, _message(error)
        lines = _own_lines(error)
        first = next(lines, None)
        if first is None and message in said:
            continue
        yield f"{how} {_cut(message, _LONGEST_PART)}"
        if first is not None:
            yield first
        yield from lines


def _led_to(error: BaseException) -> tuple[str, BaseException] | None:
    if error.__cause__ is not None:
        return "caused by", error.__cause__
    if error.__context__ is not None and not error.__suppress_context__:
        return "while handling", error.__context__
    return None


def _own_lines(error: BaseException) -> Iterator[str]:
    notes = getattr(error, "__notes__", None)
    if isinstance(notes, list | tuple):
        for note in islice(notes, _MOST_NOTES):
            yield f"note: {_cut(note if isinstance(note, str) else repr(note), _LONGEST_PART)}"
    yield from _frame_lines(error.__traceback__)
    if isinstance(error, BaseExceptionGroup):
        yield from _leaf_lines(error)


def _frame_lines(traceback: TracebackType | None) -> Iterator[str]:
    frames = _Frames(traceback)
    shown: list[_Frame] = []
    is_library = False
    for frame in reversed(frames.all):
        was_library, is_library = is_library, not frames.is_programs(frame)
        if not (is_library and was_library):
            shown.append(frame)
    more = len(shown) - _FIRST_FRAMES - _LAST_FRAMES
    if more > 0:
        del shown[_FIRST_FRAMES:-_LAST_FRAMES]
    for n, frame in enumerate(shown):
        if n == _FIRST_FRAMES and more > 0:
            yield f"  … {more} more"
        yield f"  at {frame.file.shown}:{frame.traceback.tb_lineno} in {frame.function}"


def _leaf_lines(group: BaseExceptionGroup) -> Iterator[str]:
    leaves = _leaves(group)
    blocks = Counter(_leaf(leaf) for leaf in islice(leaves, _MOST_LEAVES))
    if sum(map(len, blocks)) > _LONGEST_REST:  # the leaves without what is said of them
        short: Counter[str] = Counter()
        for block, count in blocks.items():
            short[block.partition("\n")[0][:_SHORT]] += count
        blocks = short
    left = _LONGEST_REST
    unsaid = blocks.total() + sum(1 for _ in leaves)
    for block, count in blocks.items():
        left -= len(block) + _SHORT
        if left < 0:
            break
        unsaid -= count
        yield f"- {count} times {block}" if count > 1 else f"- {block}"
    if unsaid:
        yield f"- and {unsaid} more"


def _leaf(leaf: BaseException) -> str:
    message = _message(leaf)
    lines = [_cut(message, _LONGEST_PART), *_about(leaf, message, {id(leaf)})]
    return "\n  ".join(lines)


def _leaves(group: BaseExceptionGroup) -> Iterator[BaseException]:
    rest: list[BaseException] = [group]
    while rest:
        error = rest.pop()
        if isinstance(error, BaseExceptionGroup):
            rest += reversed(error.exceptions)
        else:
            yield error


# -- frames ----------------------------------------------------------------------------


class _File(NamedTuple):
    kind: int
    package: str
    """The first part of the module's name."""
    shown: str
    """Its path from there on."""


class _Frame(NamedTuple):
    traceback: TracebackType
    file: _File
    module: str

    @property
    def function(self) -> str:
        name = self.traceback.tb_frame.f_code.co_qualname
        return name.rpartition("<locals>.")[2]


class _Frames:
    """The frames of a traceback, the outermost first, without bgjob's own.

    The program's are those that are neither in the standard library nor installed. A program may
    be installed too: then it is the package that bgjob called.
    """

    def __init__(self, traceback: TracebackType | None) -> None:
        self.all: list[_Frame] = []
        self._package: str | None = None
        while traceback is not None:
            frame = traceback.tb_frame
            module = frame.f_globals.get("__name__")
            module = module if isinstance(module, str) else ""
            file = _file(frame.f_code.co_filename, module)
            if file.kind != _OWN:
                self.all.append(_Frame(traceback, file, module))
                if self._package is None and file.kind != _LIBRARY:
                    self._package = file.package
            traceback = traceback.tb_next

    def is_programs(self, frame: _Frame) -> bool:
        kind = frame.file.kind
        return kind == _PROGRAM or (kind == _INSTALLED and frame.file.package == self._package)

    def programs_last(self) -> _Frame | None:
        """Return the innermost frame of the program; None without one."""
        return next((frame for frame in reversed(self.all) if self.is_programs(frame)), None)


@lru_cache(maxsize=4096)
def _file(path: str, module: str) -> _File:
    parts = path.replace("\\", "/").split("/")
    depth = module.count(".") + 1 + (parts[-1] == "__init__.py")
    if path.startswith(_HERE):
        kind = _PROGRAM if module in _DEMO else _OWN
    elif any(site in parts for site in _SITES):
        kind = _INSTALLED
    elif path.startswith((_STANDARD, "<frozen ")):
        kind = _LIBRARY
    else:
        kind = _PROGRAM
    return _File(kind, module.partition(".")[0], "/".join(parts[-depth:]))


# -- fingerprint -----------------------------------------------------------------------


def fingerprint(job_type: str, error: Error) -> int:
    """Return the number of the group to which a dead job belongs: 48 bits, never 0.

    Of an exception: its job type, class, the module and function of the program's last frame, and
    its first line without values. Of a text: the job type, and its first line. Of an exception
    group: those of one of its leaves.

    48 bits, so that it is written in 12 hexadecimal digits, and is exact where JSON is read with
    floats. Among 10,000 groups two have the same with a probability of 2 in 10 million.
    """
    try:
        parts = [normalised(error)] if isinstance(error, str) else _identity(error)
    except BaseException:
        parts = [type(error).__name__]
    data = "\0".join([job_type, *parts]).encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(data, digest_size=6).digest()) or 1


def _identity(error: BaseException) -> list[str]:
    if isinstance(error, BaseExceptionGroup):
        # Which of them come first, and how many, is chance.
        return min(_identity(leaf) for leaf in islice(_leaves(error), _MOST_COMPARED))
    try:
        line = normalised(str(error))
    except BaseException:
        line = ""
    return [type(error).__name__, *_place(error), line]


def _place(error: BaseException) -> tuple[str, str]:
    """Return the module and the function of the program's last frame.

    If a library or bgjob raised it, for example a timeout, that of the error which led to it.
    """
    frames = _Frames(error.__traceback__)
    fallback = frames.all[-1:]
    for _ in range(_MOST_CAUSES):
        if (frame := frames.programs_last()) is not None:
            return frame.module, frame.function
        led = _led_to(error)
        if led is None:
            break
        error = led[1]
        frames = _Frames(error.__traceback__)
    return (fallback[0].module, fallback[0].function) if fallback else ("", "")


def normalised(text: str) -> str:
    """Return the first line of a text with `<>` for quoted text and hashes, `0` for numbers."""
    line = text[:_LONGEST_PART].strip().partition("\n")[0].strip()
    line = _UUID.sub("<>", _QUOTED.sub("<>", line))
    return _DIGITS.sub("0", _HEX.sub("<>", line))[:_SHORT]
