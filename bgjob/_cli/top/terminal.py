"""The terminal of `bgjob top`: another screen, keys without Enter, changes of the size."""

import os
import select
import signal
import socket
import sys
import termios
import tty
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType
from typing import Self

_ENTER = "\x1b[?1049h\x1b[?25l\x1b[?7l"
"""Another screen, no cursor, and a line that is too long is cut, not wrapped."""

_LEAVE = "\x1b[?7h\x1b[?25h\x1b[?1049l"

_HOME, _END_OF_LINE, _END_OF_SCREEN = "\x1b[H", "\x1b[K", "\x1b[J"

_KEYS = {
    "\x1b[A": "up",
    "\x1bOA": "up",
    "k": "up",
    "\x1b[B": "down",
    "\x1bOB": "down",
    "j": "down",
    "\x1b[5~": "page up",
    "\x1b[6~": "page down",
    " ": "page down",
    "\x1b[H": "home",
    "\x1bOH": "home",
    "\x1b[1~": "home",
    "\x1b[F": "end",
    "\x1bOF": "end",
    "\x1b[4~": "end",
    "\x1b[D": "left",
    "\x1bOD": "left",
    "\r": "enter",
    "\n": "enter",
}


class Terminal:
    """The terminal while it shows the screen; a context manager.

    All is for the main thread but `wake`, which is for any thread.
    """

    def __init__(self) -> None:
        self._has_keys = sys.stdin.isatty()
        # Unlike a file descriptor, a closed socket is never one that was opened later.
        self._reader, self._writer = socket.socketpair()
        self._stack = ExitStack()
        self._is_to_stop = False

    def __enter__(self) -> Self:
        """Take over the terminal."""
        for end in (self._reader, self._writer):
            end.setblocking(False)
        self._take_over()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the terminal as it was."""
        self._stack.close()
        self._writer.close()
        self._reader.close()

    def size(self) -> tuple[int, int]:
        """Return the number of columns and of lines."""
        size = os.get_terminal_size(sys.stdout.fileno())
        return size.columns or 80, size.lines or 24

    def draw(self, lines: Sequence[str]) -> None:
        """Show these lines and nothing else."""
        text = f"{_END_OF_LINE}\r\n".join(lines)
        _write(f"{_HOME}{text}{_END_OF_LINE}{_END_OF_SCREEN}")

    def wait(self, seconds: float) -> list[str]:
        """Wait for keys, a signal, `wake` or the end of the time; return the keys."""
        keyboard = sys.stdin.fileno()
        sources = [self._reader, keyboard] if self._has_keys else [self._reader]
        ready, _, _ = select.select(sources, [], [], seconds)
        with suppress(BlockingIOError):
            self._reader.recv(4096)
        if self._is_to_stop:
            self._stop()
        if keyboard not in ready:
            return []
        read = os.read(keyboard, 1024)
        self._has_keys = bool(read)  # otherwise the terminal is gone
        return list(split_keys(read.decode("utf-8", "ignore")))

    def wake(self) -> None:
        """End the wait."""
        with suppress(OSError):  # it is full, or closed
            self._writer.send(b"\0")

    def _take_over(self) -> None:
        with ExitStack() as stack:
            # A signal ends `wait` by a byte in the socket, but only if it has a handler.
            stack.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(self._writer.fileno()))
            stack.enter_context(_handled([signal.SIGWINCH], lambda *_: None))
            stack.enter_context(_handled([signal.SIGTSTP], self._ask_to_stop))
            stack.enter_context(_handled([signal.SIGTERM, signal.SIGHUP], _end))
            stack.enter_context(self._screen())
            self._stack = stack.pop_all()

    @contextmanager
    def _screen(self) -> Iterator[None]:
        before = termios.tcgetattr(sys.stdin) if self._has_keys else None
        try:
            if before is not None:
                tty.setcbreak(sys.stdin)  # Ctrl-C and Ctrl-Z remain signals
            _write(_ENTER)
            yield
        finally:
            _write(_LEAVE)
            if before is not None:
                termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)

    def _ask_to_stop(self, _number: int, _frame: FrameType | None) -> None:
        self._is_to_stop = True  # a frame may be half written

    def _stop(self) -> None:
        """Stop, as Ctrl-Z asks for, on the terminal as it was; go on when continued."""
        self._is_to_stop = False
        self._stack.close()
        os.kill(os.getpid(), signal.SIGSTOP)
        self._take_over()


def split_keys(text: str) -> Iterator[str]:
    """Split what a terminal sent into keys: characters, and names of others."""
    while text:
        sent = max((k for k in _KEYS if text.startswith(k)), key=len, default=text[0])
        yield _KEYS.get(sent, sent)
        text = text[len(sent) :]


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _end(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


@contextmanager
def _handled(
    numbers: Iterable[signal.Signals], handler: Callable[[int, FrameType | None], None]
) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
