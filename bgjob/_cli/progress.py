"""Tells on stderr how far a long work is."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def say(text: str) -> None:
    """Tell something on stderr, at once."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


@contextmanager
def progress(total: int, what: str) -> Iterator[Callable[[int], None]]:
    """Show progress: give what to tell how many are done.

    A bar on a terminal, where `rich` is installed; otherwise a line for each quarter.
    """
    if sys.stderr.isatty():
        try:
            from rich import progress  # noqa: PLC0415 (an extra)
            from rich.console import Console  # noqa: PLC0415
        except ImportError:
            pass
        else:
            with progress.Progress(
                *progress.Progress.get_default_columns(),
                progress.MofNCompleteColumn(),
                console=Console(stderr=True),
            ) as bar:
                task = bar.add_task(what, total=total)
                yield lambda done: bar.update(task, completed=done)
            return

    told = 0

    def tell(done: int) -> None:
        nonlocal told
        quarters = 4 * done // total
        if quarters > told:
            told = quarters
            say(f"{done:,} of {total:,} {what}")

    yield tell
