"""The end of a process that serves a worker: by signals, in time, whatever hangs."""

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

_SIGNALS = (signal.SIGTERM, signal.SIGINT)

# Seconds after the grace period: in which the worker must have ended (it takes
# one itself to settle what has finished), and in which the process must.
_LAST_WORDS = 1.2
_LAST_BREATH = 1.5

_LOOK = 0.5
"""Seconds between two looks of the main thread for a signal that has not woken it: the kernel
hands those that came while the process was stopped to any of its threads."""


class Interruption(BaseException):
    """A signal came while the program was being loaded."""


class Notice(Enum):
    """What the main thread is told."""

    ASKED_TO_END = auto()
    RUNNING = auto()
    ENDED = auto()


class _Forks:
    """Lets a child that a handler forks, for multiprocessing say, end as it would without us.

    A signal that comes while Python prepares the child is noted by the handler that the child has
    inherited, and then forgotten. So signals wait in the thread that forks until the child has the
    dispositions of before.
    """

    def __init__(self, before: Sequence[tuple[signal.Signals, _Disposition]]) -> None:
        self._before = before
        self._pid = 0
        self._forking = threading.local()

    def guard(self) -> None:
        """Begin, in this process."""
        if self._pid != os.getpid():
            self._pid = os.getpid()
            os.register_at_fork(
                before=self._block, after_in_parent=self._unblock, after_in_child=self._restore
            )

    def _block(self) -> None:
        if self._pid == os.getpid():  # what a child forks is the child's own affair
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
        self._unblock()  # what has come ends the child here: nobody hears what a hook raises
        for signum, disposition in self._before:
            signal.signal(signum, disposition)


class Ending:
    """Answers signals, and ends the process when its time is over."""

    def __init__(self, grace: float) -> None:
        self.signum = 0
        self.status = 0
        self.has_served = False
        self.reason = ""
        """Why it is to end."""
        self._grace = grace
        self._may_hear_more = False
        self._began_at = inf
        self._interrupts = False
        # Simple queues, because a signal may come while one is being used.
        self._notices: SimpleQueue[Notice] = SimpleQueue()
        self._begun: SimpleQueue[None] = SimpleQueue()
        # Started now, because what answers a signal must not start a thread.
        threading.Thread(target=self._watch, name="bgjob-ending", daemon=True).start()
        self._before = [(signum, signal.getsignal(signum) or signal.SIG_DFL) for signum in _SIGNALS]
        self._forks = _Forks(self._before)

    def obey_signals(self) -> None:
        """Take over the signals that ask a process to end."""
        self._forks.guard()
        for signum in _SIGNALS:
            signal.signal(signum, self._answer)

    def follow(self, lifeline: int) -> None:
        """End with the parent process, or when it wishes: when its end of this pipe is closed."""
        os.set_inheritable(lifeline, False)
        threading.Thread(
            target=self._follow, args=(lifeline,), name="bgjob-lifeline", daemon=True
        ).start()

    def _follow(self, lifeline: int) -> None:
        while os.read(lifeline, 1):
            pass
        if not self.signum:
            # Whoever tells all processes at once (a terminal, systemd) tells this one, too,
            # now or soon: together that is one wish.
            self._may_hear_more = True
            self.reason = "the parent process ends"
            # A signal interrupts whatever the main thread does.
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    @contextmanager
    def interruptions(self) -> Iterator[None]:
        """Let a signal interrupt what the main thread does meanwhile."""
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
        """Begin to end: from now on the time runs."""
        if self._began_at == inf:
            self._began_at = monotonic()
            self._begun.put(None)

    def tell(self, notice: Notice) -> None:
        """Tell the main thread something."""
        self._notices.put(notice)

    def next(self) -> Notice | None:
        """Wait for what the main thread is told; None when the worker should have ended."""
        while True:
            left = min(self._deadline(_LAST_WORDS) - monotonic(), _LOOK)
            with suppress(Empty):
                return self._notices.get(timeout=max(left, 0))
            if self._deadline(_LAST_WORDS) <= monotonic():
                return None

    @property
    def grace_left(self) -> float:
        """What is left of the grace period."""
        return max(self._deadline(0) - monotonic(), 0)

    def _deadline(self, more: float) -> float:
        # What has not begun to work has nothing to finish.
        return self._began_at + (self._grace if self.has_served else 0) + more

    def end_now(self) -> None:
        """End the process, whatever runs in it."""
        self.begin()
        logging.shutdown()  # this may hang: then _watch ends the process
        flush()
        os._exit(self.status)

    def _watch(self) -> None:
        self._begun.get()
        while monotonic() < self._deadline(_LAST_BREATH):  # it may still begin to work
            sleep(0.05)
        os._exit(self.status)


def flush() -> None:
    """Write out what the streams hold back."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):  # closed, or nobody reads it any more
            stream.flush()
