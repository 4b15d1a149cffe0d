"""Progress of long work, on stderr."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def say(text: str) -> None:
    """Write a line to stderr, and flush it."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


@contextmanager
def progress(total: int, what: str) -> Iterator[Callable[[int], None]]:
    """Show progress: yield a function that takes the number done.

    A bar on a terminal if `rich` is installed; otherwise a line for each quarter.
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
