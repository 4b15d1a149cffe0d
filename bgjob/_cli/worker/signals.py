"""The end of a process that serves a worker: by signals, in time, whatever hangs."""

import _thread
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from enum import Enum, auto
from math import inf
from queue import Empty, SimpleQueue
from time import monotonic, sleep
from types import FrameType
from typing import Any, TypeAlias

_Disposition: TypeAlias = Callable[[int, FrameType | None], Any] | int | signal.Handlers

_SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGTERM", "SIGINT", "SIGBREAK")  # the last is Windows' Ctrl-Break
    if hasattr(signal, name)
)

# Seconds after the grace period: within which the worker must have ended (it takes
# one itself to settle the finished jobs), and within which the process must.
_LAST_WORDS = 1.2
_LAST_BREATH = 1.5

_LOOK = 0.5
"""Seconds between two checks of the main thread for signals that did not wake it: the kernel
delivers signals that came while the process was stopped to any of its threads."""


class Interruption(BaseException):
    """A signal came while the program was being loaded."""


class Notice(Enum):
    """A message to the main thread."""

    ASKED_TO_END = auto()
    RUNNING = auto()
    ENDED = auto()


class _Forks:
    """Restores the signal handling in a child that a handler forks, for example multiprocessing.

    A signal that arrives while Python prepares the child is recorded by the inherited handler and
    then forgotten. So signals are blocked in the thread that forks until the child has its original
    dispositions.
    """

    def __init__(self, before: Sequence[tuple[signal.Signals, _Disposition]]) -> None:
        self._before = before
        self._pid = 0
        self._forking = threading.local()

    def guard(self) -> None:
        """Start guarding the forks of this process."""
        if self._pid != os.getpid() and hasattr(os, "register_at_fork"):
            self._pid = os.getpid()
            os.register_at_fork(
                before=self._block, after_in_parent=self._unblock, after_in_child=self._restore
            )

    def _block(self) -> None:
        if self._pid == os.getpid():  # a child's own forks are not guarded
            self._forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)

    def _unblock(self) -> None:
        mask = self._forking.__dict__.pop("mask", None)
        if mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _restore(self) -> None:
        if "mask" not in self._forking.__dict__:
            return
        for signum, disposition in self._before:
            ignored = disposition == signal.SIG_IGN
            signal.signal(signum, signal.SIG_IGN if ignored else signal.SIG_DFL)
        # A pending signal ends the child here: an exception from a hook would be lost.
        self._unblock()
        for signum, disposition in self._before:
            signal.signal(signum, disposition)


class Ending:
    """Answers signals, and ends the process when its time is over."""

    def __init__(self, grace: float) -> None:
        self.signum = 0
        self.status = 0
        self.has_served = False
        self.reason = ""
        """Why the process ends."""
        self._grace = grace
        self._may_hear_more = False
        self._began_at = inf
        self._interrupts = False
        # Simple queues, because a signal may arrive while one is in use.
        self._notices: SimpleQueue[Notice] = SimpleQueue()
        self._begun: SimpleQueue[None] = SimpleQueue()
        # Started now, because a signal handler must not start a thread.
        threading.Thread(target=self._watch, name="bgjob-ending", daemon=True).start()
        self._before = [(signum, signal.getsignal(signum) or signal.SIG_DFL) for signum in _SIGNALS]
        self._forks = _Forks(self._before)

    def obey_signals(self) -> None:
        """Handle the signals that end a process."""
        self._forks.guard()
        for signum in _SIGNALS:
            signal.signal(signum, self._answer)

    def follow(self, lifeline: int) -> None:
        """End when the parent closes its end of this pipe, or dies; see `child`."""
        os.set_inheritable(lifeline, False)
        threading.Thread(
            target=self._follow, args=(lifeline,), name="bgjob-lifeline", daemon=True
        ).start()

    def _follow(self, lifeline: int) -> None:
        said = b""
        while piece := os.read(lifeline, 1024):
            said += piece
        if not self.signum:
            # A terminal or systemd signals all processes, so this one gets its signal too, now or
            # soon: both count as one request.
            self._may_hear_more = True
            self.reason = said.decode(errors="replace") or "the parent process ends"
            if hasattr(signal, "pthread_kill"):  # a signal interrupts the main thread
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
            else:
                _thread.interrupt_main(signal.SIGTERM)

    @contextmanager
    def interruptions(self) -> Iterator[None]:
        """Make a signal raise Interruption in the main thread meanwhile."""
        self._interrupts = True
        try:
            yield
        finally:
            self._interrupts = False

    def _answer(self, signum: int, _: FrameType | None) -> None:
        if self.signum:
            if not self._may_hear_more:
                os._exit(128 + signum)
            self._may_hear_more = False
            return
        self.signum = signum
        self.reason = self.reason or signal.Signals(signum).name
        self.begin()
        self.tell(Notice.ASKED_TO_END)
        if self._interrupts:
            raise Interruption

    def begin(self) -> None:
        """Begin to end: the time limits start now."""
        if self._began_at == inf:
            self._began_at = monotonic()
            self._begun.put(None)

    def tell(self, notice: Notice) -> None:
        """Send the main thread a message."""
        self._notices.put(notice)

    def next(self) -> Notice | None:
        """Wait for the next message; None when the worker should have ended."""
        while True:
            left = min(self._deadline(_LAST_WORDS) - monotonic(), _LOOK)
            with suppress(Empty):
                return self._notices.get(timeout=max(left, 0))
            if self._deadline(_LAST_WORDS) <= monotonic():
                return None

    @property
    def grace_left(self) -> float:
        """The seconds left of the grace period."""
        return max(self._deadline(0) - monotonic(), 0)

    def _deadline(self, more: float) -> float:
        # A worker that has not started has nothing to finish.
        return self._began_at + (self._grace if self.has_served else 0) + more

    def end_now(self) -> None:
        """End the process, whatever runs in it."""
        self.begin()
        logging.shutdown()  # this may hang: then _watch ends the process
        flush()
        os._exit(self.status)

    def _watch(self) -> None:
        self._begun.get()
        while monotonic() < self._deadline(_LAST_BREATH):  # the worker may still start
            sleep(0.05)
        os._exit(self.status)


def flush() -> None:
    """Flush the standard streams."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):  # closed, or its reader is gone
            stream.flush()
