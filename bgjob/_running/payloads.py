"""Payloads that a claim did not return, because they are large: fetched before the handler runs."""

from bgjob._postgres.cursor import AsyncCursor, Cursor
from bgjob._running.ending import NotBegun
from bgjob._running.sessions import AsyncHandlerConnection, HandlerConnection, Sessions
from bgjob._sql.execute import read, read_async, send, send_async
from bgjob._sql.settlements import Claimed
from bgjob._sql.transactions import payload
from bgjob.errors import LeaseLostError

_FETCH = (b"begin isolation level read committed", b"set local statement_timeout = 0")


# -- async -----------------------------------------------------------------------------


async def with_payload_async(sessions: Sessions, claimed: Claimed) -> Claimed | NotBegun:
    """Return the job with its payload.

    It may take long, over a slow network, as long as it goes on.
    """
    statement = payload(claimed)

    async def fetch(connection: AsyncHandlerConnection) -> list[bytes | None]:
        async with connection.pipeline():
            for text in _FETCH:
                await AsyncCursor(connection).execute(text, prepare=False)
            cursor = await send_async(AsyncCursor(connection), statement)
            await AsyncCursor(connection).execute(b"commit", prepare=False)
        return await read_async(cursor, statement)

    try:
        connection, found = await sessions.open_async(fetch)
        sessions.keep(connection)
        return _with_payload(claimed, found)
    except BaseException as error:
        return NotBegun(error)


# -- sync: made from the async text by .ci/colours.py; do not edit ---------------------


def with_payload(sessions: Sessions, claimed: Claimed) -> Claimed | NotBegun:
    """Return the job with its payload.

    It may take long, over a slow network, as long as it goes on.
    """
    statement = payload(claimed)

    def fetch(connection: HandlerConnection) -> list[bytes | None]:
        with connection.pipeline():
            for text in _FETCH:
                Cursor(connection).execute(text, prepare=False)
            cursor = send(Cursor(connection), statement)
            Cursor(connection).execute(b"commit", prepare=False)
        return read(cursor, statement)

    try:
        connection, found = sessions.open(fetch)
        sessions.keep(connection)
        return _with_payload(claimed, found)
    except BaseException as error:
        return NotBegun(error)


# -- both colours ----------------------------------------------------------------------


def _with_payload(claimed: Claimed, found: list[bytes | None]) -> Claimed | NotBegun:
    if not found:
        return NotBegun(LeaseLostError(f"job {claimed.job.id!r} was lost before it started"))
    [arg] = found
    return claimed._replace(job=claimed.job._replace(arg=arg))
