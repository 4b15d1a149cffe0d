"""What is shown of payloads and errors: masked, hidden, or as a function of the user's says."""

import codecs
import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from bgjob.ext.web.parts import Text

MASK = "●●●"

Payloads: TypeAlias = Literal["show", "mask", "hide"]
"""`show`: as they are. `mask`: values of secret names are dots, unless the user may see payloads
and asks for it. `hide`: none for anybody."""

LARGEST = 20_000
"""Bytes of a payload or an error that a page shows; the rest is for the download."""

_WORDS = "pass|secret|token|auth|cookie|card|iban|ssn"
_IS_SECRET = re.compile(_WORDS, re.IGNORECASE)
# NAME=value, 'name': 'value', "name": "value" in an error's text. What follows a name in brackets
# is masked up to the end of its line, as it is unknown where it ends.
_IN_TEXT = re.compile(
    rf"""((?:[\w-]*(?:{_WORDS})[\w-]*)["']?\s*[:=]\s*)"""
    r"""("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|[\[{{(].*|(?:Bearer|Basic)\s+\S+|[^\s,;)}}\]]+)""",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Shown:
    """What a page would show of a job; what `redact` gets, and returns.

    Attributes:
        id: the job's id.
        queue: its queue.
        type: its type.
        arg: its payload, or its checkpoint, which is shown like one; None if it has none, or if
            only the error is shown.
        error: its last error; None if it has none, or if only the payload is shown.
        headers: its headers; empty if it has none, or if others are shown.

    """

    id: str
    queue: str
    type: str
    arg: bytes | None = None
    error: str | None = None
    headers: Mapping[str, Any] = field(default_factory=dict)


Redact: TypeAlias = Callable[[Shown], Shown | None]
"""Returns what may be shown: the same, or a copy with another `arg`, `error` or `headers` (see
dataclasses.replace). None hides all."""

_HIDDEN = Text("hidden")


class Redaction:
    """Prepares payloads and errors for the page; pure."""

    def __init__(self, payloads: Payloads, redact: Redact | None) -> None:
        self.payloads = payloads
        self._redact = redact

    def of(self, shown: Shown) -> Shown | None:
        """Return what `redact` leaves; None if it hides the job."""
        return shown if self._redact is None else self._redact(shown)

    def error(self, shown: Shown) -> str | None:
        """Return the error as any user may see it, in a list or in a reason."""
        if shown.error is None:
            return None
        left = self.of(replace(shown, arg=None))
        if left is None:
            return MASK
        return left.error if left.error is None else self.text(left.error)

    def text(self, text: str) -> str:
        """Return a text with dots in place of what looks like a secret."""
        return text if self.payloads == "show" else _IN_TEXT.sub(rf"\1{MASK}", text)

    def whole_error(self, shown: Shown) -> Text:
        """Return an error for the page of its job."""
        if shown.error is None:
            return Text("none")
        error = self.error(shown)
        if error is None or error == MASK:
            return _HIDDEN
        state: Literal["shown", "masked"] = "masked" if error != shown.error else "shown"
        size = len(error.encode(errors="replace"))
        cut = error[:LARGEST]
        return Text(state, cut, size, cut.count("\n") + 1, len(cut) < len(error))

    def payload(self, shown: Shown, *, may_reveal: bool, is_revealed: bool, at: str) -> Text:
        """Return a payload for the page of its job.

        Args:
            shown: the job.
            may_reveal: whether this user may see masked values and download it.
            is_revealed: whether the user asked for it.
            at: the path of the job's page.

        """
        if shown.arg is None:
            return Text("none")
        left = None if self.payloads == "hide" else self.of(replace(shown, error=None))
        if left is None or left.arg is None:
            return replace(_HIDDEN, size=len(shown.arg))
        download = f"{at}/payload" if may_reveal else ""
        reveal = f"{at}?payload=show" if may_reveal else ""
        if self.payloads == "show" or (may_reveal and is_revealed):
            return replace(_as_it_is(left.arg), download=download)
        return replace(_masked_text(left.arg, reveal), download=download)

    def headers(self, shown: Shown, *, may_reveal: bool, is_revealed: bool, at: str) -> Text:
        """Return the headers for the page of a job; the arguments are those of `payload`."""
        if not shown.headers:
            return Text("none")
        left = None if self.payloads == "hide" else self.of(replace(shown, arg=None, error=None))
        if left is None or not left.headers:
            return replace(_HIDDEN, size=len(_json(shown.headers)))
        if self.payloads == "show" or (may_reveal and is_revealed):
            return _as_it_is(_json(left.headers))
        return _masked_text(_json(left.headers), f"{at}?payload=show" if may_reveal else "")

    def checkpoint(
        self, shown: Shown, saved: bytes | None, *, may_reveal: bool, is_revealed: bool, at: str
    ) -> Text:
        """Return a checkpoint as a payload is shown, without a download; see `payload`."""
        text = self.payload(
            replace(shown, arg=saved), may_reveal=may_reveal, is_revealed=is_revealed, at=at
        )
        return replace(text, download="")


def _json(headers: Mapping[str, Any]) -> bytes:
    return json.dumps(headers, ensure_ascii=False).encode(errors="replace")


def _masked_text(data: bytes, reveal: str) -> Text:
    size = len(data)
    if size > LARGEST:  # the whole has to be read to be masked
        return Text("hidden", size=size, reveal=reveal)
    try:
        value = json.loads(data)
        masked, text = _masked(value), _indented(value)
        hidden = _indented(masked)
    except (ValueError, RecursionError):
        return Text("hidden", size=size, reveal=reveal)
    if hidden == text:
        return _text("shown", text, size)
    return _text("masked", hidden, size, reveal=reveal)


def _masked(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            name: MASK if _IS_SECRET.search(name) and item is not None else _masked(item)
            for name, item in value.items()
        }
    return [_masked(item) for item in value] if isinstance(value, list) else value


def _indented(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def _as_it_is(arg: bytes) -> Text:
    beginning, size = arg[:LARGEST], len(arg)
    is_cut = len(beginning) < size
    decoder = codecs.getincrementaldecoder("utf-8")()  # a character may be cut in two at the end
    try:
        text = decoder.decode(beginning, final=not is_cut)
    except ValueError:
        some = beginning[: LARGEST // 40]
        return Text("binary", some.hex(" "), size, 1, len(some) < size)
    if not is_cut:
        with suppress(ValueError, RecursionError):
            text = _indented(json.loads(text))
    return _text("shown", text, size, is_cut=is_cut)


def _text(state: Literal["shown", "masked"], text: str, size: int, **more: Any) -> Text:
    return Text(state, text, size, text.count("\n") + 1, **more)
