"""What the keys of `bgjob top` do to the view."""

import sys
from collections.abc import Sequence
from dataclasses import replace

from bgjob._cli.top.seen import SORTS, Pane, View

_BACK = ("\x1b", "\x7f", "\x08", "left")


def pressed(view: View, key: str, queues: Sequence[str], rows: int) -> View:
    """Return the view after a key.

    Args:
        view: the view before.
        key: a character, or the name of a key.
        queues: their names in the order of the screen.
        rows: how many of them the screen shows.

    """
    if key == "p":
        return replace(view, is_frozen=not view.is_frozen)
    if view.pane is not None:
        if key in _BACK:
            return replace(view, pane=None)
        return replace(view, pane=Pane(view.pane.queue)) if key == "enter" else view
    match key:
        case "s":
            following = SORTS[(SORTS.index(view.sort) + 1) % len(SORTS)]
            return replace(view, sort=following, first=0, chosen=None)
        case "enter" if queues:
            at = _place(view, queues)
            return replace(view, chosen=queues[at], pane=Pane(queues[at]))
        case "\x1b":
            return replace(view, chosen=None)
    by = {
        "up": -1,
        "down": 1,
        "page up": -rows,
        "page down": rows,
        "home": -sys.maxsize,
        "end": sys.maxsize,
    }.get(key)
    if by is None or not queues:
        return view
    if view.chosen is None and abs(by) == 1:
        by = 0  # the first key shows where the cursor is
    at = min(max(0, _place(view, queues) + by), len(queues) - 1)
    return followed(replace(view, chosen=queues[at]), queues, rows)


def followed(view: View, queues: Sequence[str], rows: int) -> View:
    """Return the view with the chosen queue on the screen, wherever it is sorted now."""
    first = view.first
    if view.chosen in queues:
        at = queues.index(view.chosen)
        first = min(max(first, at - rows + 1), at)
    return replace(view, first=min(max(0, first), max(0, len(queues) - rows)))


def _place(view: View, queues: Sequence[str]) -> int:
    """Return where the cursor is, or would be shown first."""
    if view.chosen in queues:
        return queues.index(view.chosen)
    return min(view.first, len(queues) - 1)
