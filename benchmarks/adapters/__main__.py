"""Run one command of one system: `python -m adapters NAME COMMAND URL [COUNT]`.

- `about` prints versions and settings.
- `setup` makes the tables.
- `enqueue COUNT` prints the seconds that it took to make the jobs, and to write them.
- `enqueue_keyed COUNT KEYS` writes jobs, in equal parts, of so many keys.
- `drain COUNT` starts a worker and prints the seconds from then to the last handler, and until
  the store has no unfinished job. It fails unless each job ran exactly once.
- `work` starts a worker, prints a line, and prints when each handler started, until stdin closes.
- `produce` enqueues one job for each line of stdin, and prints when that returned.
- `watch` starts a worker, prints a line, and prints for each line of stdin how many handlers
  started since the last one, and percentiles of their times since the call of the enqueue.
- `flow RATE` enqueues so many jobs a second, some at a time, until stdin closes, and prints how
  many these were, for each line of stdin and at the end.

`work` and `produce` run at the same time, and `watch` and `flow`; their times are of a clock that
all processes of a host share.
"""

import asyncio
import importlib
import json
import platform
import sys
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from importlib.metadata import version
from time import monotonic, perf_counter
from typing import Any

from adapters.peer import Peer

_PATIENCE = 600.0  # seconds after which a drain that does not end fails
_PAUSE = 0.005  # seconds in a flow between two looks for the jobs that are due by now
_MOST_AT_ONCE = 1_000  # jobs of one write of a flow that was held up
_SHARES = ("p50_ms", 0.5), ("p99_ms", 0.99)


def main() -> None:
    """Run the command on the event loop that the system uses in production."""
    name, command, url, *rest = sys.argv[1:]
    peer: Peer = importlib.import_module(f"adapters.{name}").System(url)
    work = _COMMANDS[command](peer, *map(int, rest))
    if "uvloop" in peer.packages:
        importlib.import_module("uvloop").run(work)
    else:
        asyncio.run(work)


def _print(answer: object) -> None:
    print(json.dumps(answer), flush=True)


async def _about(peer: Peer) -> None:
    _print(
        {
            "python": platform.python_version(),
            "versions": {package: version(package) for package in peer.packages},
            "settings": peer.settings,
            "has_keys": peer.has_keys,
        }
    )


async def _setup(peer: Peer) -> None:
    await peer.setup()
    _print(True)


async def _enqueue(peer: Peer, count: int) -> None:
    began = perf_counter()
    jobs = peer.make(range(count))
    made = perf_counter()
    async with peer.counter() as left, peer.writer() as write:
        before, asked = await left(), perf_counter()
        await write(jobs)
        ended = perf_counter()
        written = await left() - before
    _check_written(written, count)
    _print({"making": made - began, "writing": ended - asked})


async def _enqueue_keyed(peer: Peer, count: int, keys: int) -> None:
    async with peer.counter() as left:
        await peer.enqueue_keyed(count, keys)
        _check_written(await left(), count)
    _print(True)


def _check_written(written: int, count: int) -> None:
    if written != count:
        raise RuntimeError(f"{written} of {count} jobs were written")


async def _drain(peer: Peer, count: int) -> None:
    loop, all_ran = asyncio.get_running_loop(), asyncio.Event()
    numbers: list[int] = []
    ended = 0.0

    def ran(number: int) -> None:
        nonlocal ended
        numbers.append(number)
        if len(numbers) == count:
            ended = monotonic()
            loop.call_soon_threadsafe(all_ran.set)

    async with peer.counter() as left:
        if (before := await left()) != count:
            raise RuntimeError(f"{before} jobs are there, not {count}")
        began = monotonic()
        async with peer.worker(ran):
            try:
                async with asyncio.timeout(_PATIENCE):
                    await all_ran.wait()
                    while await left():
                        await asyncio.sleep(0.002)
            except TimeoutError:
                raise RuntimeError(
                    f"{len(numbers)} of {count} jobs ran in {_PATIENCE:g} s, {await left()} are left"
                ) from None
            done = monotonic()
    if sorted(numbers) != list(range(count)):
        raise RuntimeError(f"{len(numbers)} runs of {len(set(numbers))} of {count} jobs")
    _print({"seconds": done - began, "seconds_to_last_handler": ended - began})


async def _work(peer: Peer) -> None:
    async with peer.worker(lambda _: _print(monotonic())):
        _print("working")
        await _lines().get()


async def _produce(peer: Peer) -> None:
    lines = _lines()
    async with peer.producer() as enqueue:
        while await lines.get():
            await enqueue(0)
            _print(monotonic())


async def _watch(peer: Peer) -> None:
    waited: deque[float] = deque()  # handlers' threads append to it
    lines = _lines()
    async with peer.worker(lambda called: waited.append(monotonic() * 1000 - called / 1000)):
        _print("working")
        while await lines.get():
            seen = sorted(waited.popleft() for _ in range(len(waited)))
            _print(
                {"ran": len(seen)}
                | {n: round(seen[int(share * len(seen))], 3) for n, share in _SHARES if seen}
            )


async def _flow(peer: Peer, rate: int) -> None:
    lines, count = _lines(), 0
    async with peer.writer() as write:
        _print("flowing")
        began, line = monotonic(), asyncio.ensure_future(lines.get())
        while not line.done() or line.result():
            if line.done():
                _print(count)
                line = asyncio.ensure_future(lines.get())
            now = monotonic()
            if due := min(int((now - began) * rate) - count, _MOST_AT_ONCE):
                await write(peer.make([int(now * 1_000_000)] * due))
                count += due
            await asyncio.sleep(_PAUSE)
    _print(count)


def _lines() -> asyncio.Queue[str]:
    """Yield stdin's lines, and an empty one at its end, without blocking the event loop."""
    lines: asyncio.Queue[str] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def read() -> None:
        line = "the first"
        while line:
            line = sys.stdin.readline()
            loop.call_soon_threadsafe(lines.put_nowait, line)

    threading.Thread(target=read, daemon=True).start()
    return lines


_COMMANDS: Mapping[str, Callable[..., Coroutine[Any, Any, None]]] = {
    "about": _about,
    "setup": _setup,
    "enqueue": _enqueue,
    "enqueue_keyed": _enqueue_keyed,
    "drain": _drain,
    "work": _work,
    "produce": _produce,
    "watch": _watch,
    "flow": _flow,
}

if __name__ == "__main__":
    main()
