"""The live screen: a thread asks for overviews, the main thread draws and reads keys."""

import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from time import monotonic, sleep

import psycopg

from bgjob._cli.top.frame import SORTS, Line, Seen, Server, Sort, View, frame, render, rows
from bgjob._cli.top.history import History
from bgjob._cli.top.terminal import Terminal
from bgjob.errors import BgjobError

_DUTY = 40
"""An overview that takes long is asked for more rarely, to keep the server busy for a fortieth
of the time at most."""

_TICK = 1.0
_LATE = 3.0
"""Seconds after which an answer is late."""

_ASCII = str.maketrans({"▲": "^", "▼": "v", "…": "~", "↑": "^", "↓": "v"})

Ask = Callable[[], Seen]


@dataclass(frozen=True, slots=True)
class _Answer:
    seen: Seen
    asked_at: float | None = None
    """When the next one was asked for; None if it was not."""
    error: str | None = None
    """Why there is no newer one."""


class _Asker:
    """Asks for overviews on a thread of its own, and keeps the last answer."""

    def __init__(self, ask: Ask, first: Seen, every: float, wake: Callable[[], None]) -> None:
        self.answer = _Answer(first)
        self.may_ask = threading.Event()
        self.may_ask.set()
        self._ask, self._every, self._wake = ask, every, wake

    def start(self) -> None:
        """Start the thread. It ends with the process, since an answer may never come."""
        threading.Thread(target=self._run, name="bgjob top", daemon=True).start()

    def _run(self) -> None:
        pause = self._every
        while True:
            sleep(pause)
            self.may_ask.wait()
            began = monotonic()
            self.answer = replace(self.answer, asked_at=began)
            try:
                self.answer = _Answer(self._ask())
                pause = max(self._every, _DUTY * (monotonic() - began))
            except (BgjobError, psycopg.Error) as error:
                self.answer = replace(self.answer, asked_at=None, error=str(error))
                pause = self._every
            self._wake()


def show(ask: Ask, server: Server, *, every: float, sort: Sort) -> None:
    """Show the screen until the user ends it.

    Args:
        ask: returns what is to be shown. It is called on another thread, after the first time.
        server: the database's name and version.
        every: seconds between two overviews, at least.
        sort: the order of the queues at first.

    """
    first, history, view = ask(), History(), View(sort=sort)
    history.add(first.overview, first.workers)
    with Terminal() as terminal:
        asker = _Asker(ask, first, every, terminal.wake)
        asker.start()
        shown = asker.answer.seen
        while True:
            answer = asker.answer
            if answer.seen is not shown:
                shown = answer.seen
                history.add(shown.overview, shown.workers)
            width, height = terminal.size()
            least = max(0, len(shown.overview.queues) - rows(height))
            view = replace(
                view,
                width=width,
                height=height,
                first=min(max(0, view.first), least),
                trouble=None if view.is_frozen else _trouble(answer),
            )
            terminal.draw(texts(frame(shown, server, history, view)))
            for key in terminal.wait(_TICK):
                if key in ("q", "Q"):
                    return
                view = _pressed(view, key)
            if view.is_frozen:
                asker.may_ask.clear()
            else:
                asker.may_ask.set()


def texts(lines: list[Line]) -> list[str]:
    """Return lines as the standard output can take them."""
    is_coloured = can_draw() and not os.environ.get("NO_COLOR")
    encoding = sys.stdout.encoding
    rendered = [render(line, is_coloured=is_coloured) for line in lines]
    try:
        "▲▼…↑↓".encode(encoding)
    except UnicodeEncodeError:
        rendered = [line.translate(_ASCII) for line in rendered]
    return [line.encode(encoding, "replace").decode(encoding) for line in rendered]


def width() -> int | None:
    """Return the columns of the standard output; None if it is not a terminal."""
    return (
        (os.get_terminal_size(sys.stdout.fileno()).columns or 80) if sys.stdout.isatty() else None
    )


def can_draw() -> bool:
    """Whether the standard output is a terminal that can be drawn on."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def _trouble(answer: _Answer) -> str | None:
    if answer.error is not None:
        first, *_ = answer.error.splitlines() or ["the database does not answer"]
        return f"not renewed: {first}"
    waited = 0.0 if answer.asked_at is None else monotonic() - answer.asked_at
    if waited > _LATE:
        return f"not renewed: the database has not answered for {waited:.0f} s"
    return None


def _pressed(view: View, key: str) -> View:
    page = rows(view.height or 0)
    match key:
        case "p":
            return replace(view, is_frozen=not view.is_frozen)
        case "s":
            following = SORTS[(SORTS.index(view.sort) + 1) % len(SORTS)]
            return replace(view, sort=following, first=0)
        case "up":
            return replace(view, first=view.first - 1)
        case "down":
            return replace(view, first=view.first + 1)
        case "page up":
            return replace(view, first=view.first - page)
        case "page down":
            return replace(view, first=view.first + page)
        case "home":
            return replace(view, first=0)
        case "end":
            return replace(view, first=sys.maxsize)
    return view
