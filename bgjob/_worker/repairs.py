"""Repairs by the control thread: jobs that cannot be claimed or read, and a clock that was set.

Each makes its statements through the session and yields what to report.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import psycopg

from bgjob._sql.claims import next_due, try_claim
from bgjob._sql.execute import run
from bgjob._sql.repairs import catch_up, dead_letter_refused, dead_letter_unread
from bgjob._worker.session import Session
from bgjob.errors import BgjobError

_MOST_TRIED = 1000
"""The jobs among which unclaimable ones are searched: as many as one claim may take."""

_SAMPLE = 20
"""Sample of jobs: if none of them can be claimed, the cause is not a single job."""

_MOST_REFUSED = 20
"""The most unclaimable jobs moved to the dead-letter table in one go."""

_CAUGHT_UP = 1000
"""Jobs that one statement corrects after the clock was set back."""


def dead_letter_unclaimable(session: Session, queue: str) -> Iterator[BgjobError]:
    """Move the jobs whose claim the server refuses to the dead-letter table.

    A user's constraint or trigger may refuse claims. Of the next jobs, the refused ones
    are found by halving. If the server refuses all of them, the cause is not a single
    job, and all stay.
    """
    connection = session.connection
    refused: list[tuple[str, str, psycopg.Error]] = []
    with connection.transaction():
        due = run(connection, next_due(queue, limit=_MOST_TRIED))
        sample = due[:: max(len(due) // _SAMPLE, 1)]
        is_claimable = any(_refusal(connection, [place]) is None for place, _ in sample)
        halves = [due] if is_claimable else []
        while halves and len(refused) < _MOST_REFUSED:
            half = halves.pop()
            error = _refusal(connection, [place for place, _ in half])
            if error is not None and len(half) == 1:
                refused.append((*half[0], error))
            elif error is not None:
                middle = len(half) // 2
                halves += [half[middle:], half[:middle]]
        for place, _, error in refused:
            run(connection, dead_letter_refused(place, f"the job could not be claimed: {error}"))
    for _, id_, error in refused:
        yield BgjobError(
            f"job {id_} of queue {queue!r} could not be claimed, and was moved to the "
            f"dead-letter table: {error}"
        )


def _refusal(connection: psycopg.Connection[Any], places: Sequence[str]) -> psycopg.Error | None:
    """Try to claim jobs, and undo it; return the error with which the server refuses."""
    try:
        with connection.transaction(force_rollback=True):
            run(connection, try_claim(places))
    except psycopg.Error as error:
        if connection.closed:
            raise
        return error
    return None


def dead_letter_unreadable(session: Session, queue: str) -> Iterator[BgjobError]:
    """Move the jobs that could not be read to the dead-letter table, or leave them their leases."""
    unread, session.unread = session.unread, []
    for each in unread:
        yield BgjobError(
            f"job {each.id} of queue {queue!r} could not be read, and was moved to the "
            f"dead-letter table: {each.error}"
        )
    text = f"the job could not be read: {unread[0].error}"
    places, tokens = [each.place for each in unread], [each.token for each in unread]
    run(session.connection, dead_letter_unread(places, tokens, text))


def clock_was_set(session: Session, queue: str) -> Iterator[BgjobError]:
    """Correct the due times that lie in the future because the clock was set back."""
    step, session.step = session.step, 0.0
    how = "back" if step < 0 else "forward"
    then = (
        "jobs whose due times were left in the future are corrected, except for those of a "
        "dead worker and those that were enqueued for a certain time"
        if step < 0
        else "jobs are due early, and leases have ended: a running job may run twice"
    )
    yield BgjobError(
        f"the database's clock was set {how} by {abs(step):.0f} s, or another server answers; "
        f"{then}"
    )
    if step < 0:
        while run(session.connection, catch_up(queue, limit=_CAUGHT_UP)) == _CAUGHT_UP:
            pass
