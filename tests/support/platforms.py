"""Programs on a system that lacks what Windows and macOS lack.

A new interpreter takes the names away before it imports anything of bgjob: so an import, or a
call, of one of them fails there as it would on that system. Its own libraries, which know on
which system they are, have been imported before.
"""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from support.documents import ROOT
from support.waiting import PATIENCE

System = Literal["Windows", "macOS"]

_SHIM = """
import asyncio, concurrent.futures, ctypes, logging, multiprocessing, os, select, selectors
import signal, socket, subprocess, sys, tempfile, threading

IS_WINDOWS = {is_windows}

def take_away(module, *names):
    for name in names:
        vars(module).pop(name, None)

class KqueueSelector(selectors.SelectSelector):
    "Stands for that of macOS."

take_away(os, "sched_getaffinity", "eventfd", "pidfd_open", "posix_fadvise", "pipe2")
os.process_cpu_count = os.cpu_count  # Python 3.13's would call the first of them
take_away(select, "poll", "epoll")
take_away(selectors, "PollSelector", "EpollSelector")
selectors.DefaultSelector = KqueueSelector
take_away(socket, "SOCK_NONBLOCK", "SOCK_CLOEXEC", "SO_PEERCRED", "TCP_USER_TIMEOUT")
if IS_WINDOWS:
    selectors.DefaultSelector = selectors.SelectSelector
    take_away(os, *"register_at_fork fork forkpty killpg getpgid setpgid getpgrp setsid getsid "
        "getuid geteuid getgid getegid setuid setgid uname getloadavg getrusage wait wait3 wait4 "
        "waitid mkfifo sendfile chown lchown statvfs sysconf nice".split())
    take_away(signal, *"SIGHUP SIGQUIT SIGUSR1 SIGUSR2 SIGKILL SIGSTOP SIGTSTP SIGCONT SIGCHLD "
        "SIGWINCH SIGPIPE SIGALRM SIGTTIN SIGTTOU pthread_kill pthread_sigmask sigwait alarm "
        "setitimer siginterrupt SIG_BLOCK SIG_SETMASK".split())
    signal.SIGBREAK = signal.Signals(21)
    for name in "fcntl termios tty pty resource pwd grp syslog readline curses".split():
        sys.modules[name] = None

    def pair(create=socket.socket, **_):
        "A pair of connected sockets, as on Windows."
        with create() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            one = create()
            one.connect(listener.getsockname())
            return one, listener.accept()[0]

    socket.socketpair = pair
    take_away(socket, "AF_UNIX", "send_fds", "recv_fds")

    class Popen(subprocess.Popen):
        def __init__(self, *args, pass_fds=(), preexec_fn=None, start_new_session=False, **kwargs):
            if pass_fds or preexec_fn or start_new_session:
                raise ValueError("not supported on Windows platforms")
            super().__init__(*args, **kwargs)

    subprocess.Popen = Popen

    class ProactorEventLoop(asyncio.SelectorEventLoop):
        "Stands for asyncio's default loop on Windows."

    asyncio.ProactorEventLoop = ProactorEventLoop
    asyncio.new_event_loop = asyncio.events.new_event_loop = ProactorEventLoop
"""


def environment(system: System, folder: Path, **more: str) -> Mapping[str, str]:
    """Return the environment of such programs; the folder is for the file that it names."""
    shim = folder / "sitecustomize.py"
    shim.write_text(_SHIM.format(is_windows=system == "Windows"), "utf-8")
    path = [str(folder), str(ROOT), str(ROOT / "tests")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), **more}


def run_on(
    system: System,
    folder: Path,
    *arguments: str,
    env: Mapping[str, str] | None = None,
    input: str = "",
) -> "subprocess.CompletedProcess[str]":
    """Run Python with these arguments on such a system."""
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment(system, folder, **(env or {})),
        capture_output=True,
        encoding="utf-8",
        input=input,
        timeout=PATIENCE,
        check=False,
    )
