"""Event loops on which psycopg can work: on Windows not asyncio's default one.

That one, the ProactorEventLoop, cannot wait for a socket which libpq reads and writes.
"""

import asyncio

import psycopg

_PROACTOR: type[asyncio.AbstractEventLoop] | None = getattr(asyncio, "ProactorEventLoop", None)


def new_event_loop() -> asyncio.AbstractEventLoop:
    """Return a new loop, as asyncio makes it, on which psycopg can work."""
    loop = asyncio.new_event_loop()
    if _PROACTOR is not None and isinstance(loop, _PROACTOR):
        loop.close()
        return asyncio.SelectorEventLoop()
    return loop


def check_event_loop() -> None:
    """Raise psycopg.InterfaceError if psycopg cannot work on the loop that runs."""
    if _PROACTOR is not None and isinstance(asyncio.get_running_loop(), _PROACTOR):
        raise psycopg.InterfaceError(
            "psycopg cannot work on asyncio's ProactorEventLoop, the default on Windows: run the "
            "program with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop), or uvicorn with "
            "--loop asyncio:SelectorEventLoop"
        )
