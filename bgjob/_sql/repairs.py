"""Jobs that cannot be claimed or read, and due times that a clock has spoiled."""

from collections.abc import Sequence
from typing import LiteralString

from bgjob._failure import fingerprint
from bgjob._postgres.cursor import ErrorTexts
from bgjob._sql.results import ended
from bgjob._sql.statement import Statement, nothing, number_array, scalar, text_array
from bgjob._sql.successors import followed


# As bytes, non-ASCII ones in octal: text that no session can read must not prevent the
# dead-letter table from being listed.
def _bytes_of(column: LiteralString) -> LiteralString:
    return f"encode(convert_to({column}, getdatabaseencoding()), 'escape')"


# One with a successor is still to run.
_LAST: LiteralString = "(select * from gone where successor is null) as last"
_LAST_OF_UNREAD: LiteralString = f"""
    (
        select {_bytes_of("id")} as id, {_bytes_of("queue")} as queue, {_bytes_of("type")} as type,
            arg, attempt, token, created_at, keep
        from gone where successor is null
    ) as last
"""

_DEAD_LETTER_UNREAD = f"""
    with gone as (
        delete from bgjob_job
        where ctid = any (%(places)s::tid[]) and token = any (%(tokens)s::bigint[])
        returning *
    ), {followed("gone")}, {ended(_LAST_OF_UNREAD, error="%(error)s")}
    insert into bgjob_dead_job (
        job_id, queue, type, arg, attempt, last_error, fingerprint, priority, exclusive,
        next_run_at, job_created_at, job_updated_at, checkpoint, headers, expires, group_id,
        group_dead, keep, slots
    )
    select {_bytes_of("id")}, {_bytes_of("queue")}, {_bytes_of("type")}, arg, attempt,
        %(error)s, %(fingerprint)s, priority, {_bytes_of("exclusive")}, next_run_at, created_at,
        updated_at, checkpoint,
        case when headers::text !~ '[^\\x01-\\x7f]' then headers end, expires,
        {_bytes_of("group_id")}, group_dead, keep, slots
    from gone
    returning true
"""


def dead_letter_unread(places: Sequence[str], tokens: Sequence[int], error: str) -> Statement[None]:
    """Move claimed jobs that cannot be read to the dead-letter table, by their positions."""
    params = {"places": text_array(places), "tokens": number_array(tokens), "error": error}
    return Statement(_DEAD_LETTER_UNREAD, params | {"fingerprint": fingerprint("", error)}, nothing)


def dead_letter_refused(place: str, error: str) -> Statement[None]:
    """Move a job that cannot be claimed to the dead-letter table, by its position."""
    return Statement(
        f"""
        with gone as (
            delete from bgjob_job where ctid = %(place)s::tid returning *
        ), {followed("gone")}, {ended(_LAST, error="(%(errors)s::text[])[1]")}
        insert into bgjob_dead_job (
            job_id, queue, type, arg, attempt, last_error, fingerprint, priority, exclusive,
            next_run_at, job_created_at, job_updated_at, checkpoint, headers, expires, group_id,
            group_dead, keep, slots
        )
        select id, queue, type, arg, attempt, (%(errors)s::text[])[1], %(fingerprint)s, priority,
            exclusive, next_run_at, created_at, updated_at, checkpoint, headers, expires, group_id,
            group_dead, keep, slots
        from gone
        """,
        {
            "place": place,
            "errors": ErrorTexts([error]),
            "fingerprint": fingerprint("", error),
        },
        nothing,
        prepare=False,
    )


def catch_up(queue: str, *, limit: int) -> Statement[int]:
    """Restore the delays of jobs that were written before the server's clock was set back.

    Their rows say that they were written in the future. This restores jobs that were due when
    they were written, and jobs that were attempted and run again after a delay. A time that an
    enqueue named stays: it may be a calendar time. Returns how many jobs, at most `limit`.
    """
    return Statement(
        """
        with moved as (
            update bgjob_job
            set next_run_at = now() + greatest(next_run_at - updated_at, interval '0'),
                updated_at = now()
            where ctid = any (array(
                select j.ctid from bgjob_job j
                where j.queue = %(queue)s and j.next_run_at > now()
                    and j.next_run_at < 'infinity' and j.lease_until is null
                    and j.updated_at > now() + interval '30 s' and (
                        j.next_run_at <= j.updated_at
                        or j.attempt > 0
                        or j.updated_at > j.created_at + interval '10 ms'
                    )
                limit %(limit)s
                for update skip locked
            ))
            returning 1
        )
        select count(*) from moved
        """,
        {"queue": queue, "limit": limit},
        scalar,
    )
