"""The live screen: a thread asks for overviews, the main thread draws and reads keys."""

import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import monotonic
from typing import Protocol

import psycopg

from bgjob._cli.top.frame import frame, ordered, rows
from bgjob._cli.top.history import History
from bgjob._cli.top.keys import followed, pressed
from bgjob._cli.top.seen import Pane, Seen, Server, Sort, View
from bgjob._cli.top.text import Line, render
from bgjob.errors import BgjobError

_DUTY = 40
"""An overview that takes long is asked for more rarely, to keep the server busy for a fortieth
of the time at most."""

_TICK = 1.0
_LATE = 3.0
"""Seconds after which an answer is late."""

_SIGNS = "▲▼…↑↓▸·▁▂▃▄▅▆▇█"
_ASCII = str.maketrans(_SIGNS, "^v~^v>|_.,-=+*#")

Explained = Sequence[tuple[str, str]]
"""Labels and texts of the reasons why a job does not run."""


class Asks(Protocol):
    """The database, as the screen asks it; from one thread at a time."""

    def ask(self) -> Seen:
        """Return what is to be shown."""
        ...

    def explain(self, queue: str) -> Explained:
        """Return why the first due job of a queue does not run, as labels and texts."""
        ...


@dataclass(frozen=True, slots=True)
class _Answer:
    seen: Seen
    asked_at: float | None = None
    """When the next one was asked for; None if it was not."""
    error: str | None = None
    """Why there is no newer one."""


class _Asker:
    """Asks for overviews on a thread of its own, and keeps the last answer."""

    def __init__(self, source: Asks, first: Seen, every: float, wake: Callable[[], None]) -> None:
        self.answer = _Answer(first)
        self.explained: tuple[Pane, Explained] | None = None
        """The last pane that was asked for, and what it shows."""
        self.may_ask = threading.Event()
        self.may_ask.set()
        self._source, self._every, self._wake = source, every, wake
        self._called = threading.Event()
        self._pane: Pane | None = None

    def start(self) -> None:
        """Start the thread. It ends with the process, since an answer may never come."""
        threading.Thread(target=self._run, name="bgjob top", daemon=True).start()

    def explain(self, pane: Pane) -> None:
        """Ask, as the next, why a queue's first job does not run."""
        self._pane = pane
        self._called.set()

    def _run(self) -> None:
        pause = self._every
        while True:
            if self._called.wait(pause):
                self._called.clear()
                self._explain()
                pause = self._every
                continue
            if not self.may_ask.is_set():
                continue
            began = monotonic()
            self.answer = replace(self.answer, asked_at=began)
            try:
                self.answer = _Answer(self._source.ask())
                pause = max(self._every, _DUTY * (monotonic() - began))
            except (BgjobError, psycopg.Error) as error:
                self.answer = replace(self.answer, asked_at=None, error=str(error))
                pause = self._every
            self._wake()

    def _explain(self) -> None:
        pane = self._pane
        if pane is not None:
            try:
                lines = self._source.explain(pane.queue)
            except (BgjobError, psycopg.Error) as error:
                lines = [("failed", str(error))]
            self.explained = (pane, lines)
            self._wake()


def show(source: Asks, server: Server, *, every: float, sort: Sort) -> None:
    """Show the screen until the user ends it.

    Args:
        source: is asked on another thread, after the first time.
        server: the database's name and version.
        every: seconds between two overviews, at least.
        sort: the order of the queues at first.

    """
    from bgjob._cli.top.terminal import Terminal  # noqa: PLC0415 (not on every system)

    first, history, view = source.ask(), History(), View(sort=sort)
    history.add(first.overview, first.workers)
    with Terminal() as terminal:
        asker = _Asker(source, first, every, terminal.wake)
        asker.start()
        shown = asker.answer.seen
        while True:
            answer = asker.answer
            if answer.seen is not shown:
                shown = answer.seen
                history.add(shown.overview, shown.workers)
            width, height = terminal.size()
            queues = [queue.queue for queue in ordered(shown, history, view.sort)]
            view = followed(view, queues, rows(height))
            if view.pane is not None and view.pane.lines is None and asker.explained is not None:
                asked, lines = asker.explained
                if asked is view.pane:
                    view = replace(view, pane=replace(asked, lines=lines))
            trouble = None if view.is_frozen else _trouble(answer)
            view = replace(view, width=width, height=height, trouble=trouble)
            terminal.draw(texts(frame(shown, server, history, view)))
            for key in terminal.wait(_TICK):
                if key in ("q", "Q"):
                    return
                before, view = view, pressed(view, key, queues, rows(height))
                if view.pane is not None and view.pane is not before.pane:
                    asker.explain(view.pane)
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
        _SIGNS.encode(encoding)
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
    has_terminals = importlib.util.find_spec("termios") is not None  # Windows has none of these
    return has_terminals and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def _trouble(answer: _Answer) -> str | None:
    if answer.error is not None:
        first, *_ = answer.error.splitlines() or ["the database does not answer"]
        return f"not renewed: {first}"
    waited = 0.0 if answer.asked_at is None else monotonic() - answer.asked_at
    if waited > _LATE:
        return f"not renewed: the database has not answered for {waited:.0f} s"
    return None
