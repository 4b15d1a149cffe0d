"""Limits of a queue or a type over all workers, and the rations that workers take of them.

A worker takes a ration before it claims: places for its handlers, and tokens, one for each job
that it may start soon. So a limit costs one row for many jobs.

Places. A worker holds them for as long as it works, and says so every few seconds. The sum of
all live rations is at most the limit. A ration lives for two leases from the last time it was
renewed, and the worker renews it with each extension: so the lease of no job that it ran lasts
longer, and the places of a dead worker are given to others then. Where several want more places
than there are, each gets an equal share; a worker that has more keeps them until its handlers end.

Tokens. With a bucket of `capacity` tokens that fills at `refill` a second, at most
`capacity + refill * t` are taken in any time t. A job starts within `good_for` seconds after its
token was taken, or is given back: so those that start in a time t took their tokens in a time of
t + good_for. With capacity = burst - rate * good_for, at most burst + rate * t start in any
time t. If that capacity is less than one token, it is one, and the bucket fills more slowly: the
tokens of burst + 1 jobs take burst / refill seconds, of which good_for may be lost, and 1 / rate
must remain.

Tokens that were not used are given back, as if they had not been taken. But while they were
away the bucket may have filled where it would have been full with them. So they are worth less by
as many as a full bucket would have lost meanwhile.

The server's clock alone counts. If it is set back, the bucket does not fill until it has been
looked at once more, and goes on from there.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any, LiteralString, NamedTuple

from bgjob._sql.notices import NOTIFY, channel
from bgjob._sql.statement import Row, Statement, in_range, nothing, scalar
from bgjob.limit import Limit, LimitStatus, Scope, rate_text

LEASES = 2
"""Leases for which a ration lives."""

_GOOD_FOR = """
    least(0.5, greatest(0.04, (burst - 1) / (2 * rate), 0.04 / rate))
"""
"""Seconds from the taking of a token to the start of its job: half of the burst, if it has room.
With a burst of 1 it is a twenty-fifth of the time between two starts, but at least 40 ms, in
which a job starts also on a busy host."""

# Without a rate all of it is null, which least() and greatest() would pass over.

_LEVEL: LiteralString = f"""
    size as materialized (
        select f.*, good_for, case when rate is not null
                then greatest(1, burst - rate * good_for) end as capacity,
            case when rate is not null
                then least(rate, rate * burst / (1 + rate * good_for)) end as refill
        from force f, lateral (
            select case when rate is not null then {_GOOD_FOR} end as good_for
        ) as g
    ), level as materialized (
        select size.*, case when rate is not null then least(
            capacity,
            coalesce(tokens, capacity) + greatest(0, %(unused)s::integer - refill
                    * extract(epoch from clock.at - %(since)s::timestamptz)::float8)
                + refill * greatest(extract(epoch from clock.at - used_at)::float8, 0)
        ) end as level
        from size, clock
    )
"""


class Subject(NamedTuple):
    """What has a limit."""

    scope: Scope
    name: str


class Ask(NamedTuple):
    """What a worker asks for, and what it has."""

    holder: int
    held: int
    """Places that it has, and may be using."""
    wanted: int
    """Places that it can use; 0: it ends."""
    need: int
    """Tokens for the next claim."""
    wish: int
    """Tokens for the next claims, if there are plenty."""
    unused: int
    """Tokens to give back."""
    since: datetime | None
    """When the first of these were taken."""


class Take(NamedTuple):
    """A ration to take."""

    subject: Subject
    ask: Ask
    code: Limit | None
    """The limit in the program's code."""
    declares: bool
    """Whether to make the row of that limit."""

    def statements(self, lease: float) -> "list[Statement[Any]]":
        """Return the statements in their order; the last one answers."""
        of = self.subject
        first: list[Statement[Any]] = [declare(of)] if self.declares else []
        return [*first, lock(of), take(of, self.ask, code=self.code, lease=lease)]


class Ration(NamedTuple):
    """What a worker got."""

    places: int | None
    """The places that it should have, which may be fewer than it has; None: as many as it likes."""
    tokens: int | None
    """None: as many as it likes."""
    good_for: float
    """Seconds within which jobs with these tokens have to start."""
    wait: float
    """Seconds until there will be tokens; 0.0 if it got all that it needs."""
    at: datetime
    """When it was taken."""


def declare(of: Subject) -> Statement[None]:
    """Make the row of a limit that is in a program's code."""
    return Statement(
        """
        insert into bgjob_limit (scope, name, is_set) values (%(scope)s, %(name)s, false)
        on conflict (scope, name) do nothing
        returning true
        """,
        of._asdict(),
        nothing,
    )


def lock(of: Subject) -> Statement[None]:
    """Lock a limit, so that the next statement sees all rations that were taken before."""
    return Statement(
        "select true from bgjob_limit where scope = %(scope)s and name = %(name)s for update",
        of._asdict(),
        nothing,
    )


def take(of: Subject, ask: Ask, *, code: Limit | None, lease: float) -> Statement[Ration | None]:
    """Take a ration, or renew it; None if there is no limit.

    Reads and updates the row of the limit, which must be locked, and the rations of its holders.

    Args:
        of: what has the limit.
        ask: what the worker asks for.
        code: the limit in the program's code, which holds unless an operator has set one.
        lease: seconds of a lease.

    """
    return Statement(
        f"""
        with clock as materialized (
            select clock_timestamp() as at
        ), force as materialized (
            select l.tokens, l.used_at,
                case when l.is_set then l.concurrency else %(concurrency)s::integer end
                    as concurrency,
                case when l.is_set then l.rate else %(rate)s::float8 end as rate,
                case when l.is_set then l.burst else %(burst)s::integer end as burst
            from bgjob_limit l
            where l.scope = %(scope)s and l.name = %(name)s and (l.is_set or %(is_in_code)s)
        ), {_LEVEL}, given as materialized (
            select level.*, case
                when rate is null then null
                when %(wish)s::integer <= level - capacity / 2 then %(wish)s::integer
                else least(%(need)s::integer, floor(level))::integer
            end as granted
            from level
        ), others as materialized (
            select coalesce(sum(r.places), 0) as places, coalesce(sum(r.wanted), 0) as wanted,
                count(*) as workers
            from bgjob_ration r, clock
            where r.scope = %(scope)s and r.name = %(name)s and r.holder <> %(holder)s::bigint
                and r.until > clock.at
        ), share as materialized (
            select greatest(least(
                %(wanted)s::integer,
                force.concurrency - others.places,
                greatest(
                    ceil(force.concurrency::float8 / (others.workers + 1)),
                    force.concurrency - others.wanted
                )
            ), 0)::integer as places
            from force, others where force.concurrency is not null
        ), spent as (
            update bgjob_limit l
            set tokens = coalesce(given.level - given.granted, l.tokens), used_at = clock.at,
                concurrency = given.concurrency, rate = given.rate, burst = given.burst
            from given, clock
            where l.scope = %(scope)s and l.name = %(name)s
        ), gone as (
            delete from bgjob_ration r using clock
            where r.scope = %(scope)s and r.name = %(name)s
                and case
                    when r.holder = %(holder)s::bigint
                        then %(wanted)s::integer = 0 or not exists (select from share)
                    else r.until <= clock.at
                end
        ), kept as (
            insert into bgjob_ration (scope, name, holder, places, wanted, until)
            select %(scope)s, %(name)s, %(holder)s::bigint,
                greatest(share.places, %(held)s::integer), %(wanted)s::integer,
                clock.at + %(lives)s::float8 * interval '1 second'
            from share, clock where %(wanted)s::integer > 0
            on conflict (scope, name, holder) do update
            set places = excluded.places, wanted = excluded.wanted, until = excluded.until
        )
        select (select places from share), given.granted, given.good_for,
            case when given.granted < %(need)s::integer then greatest(
                (greatest(1, least(capacity / 2, refill / 20, %(need)s::integer))
                    - given.level + given.granted) / refill,
                0
            ) else 0 end, {in_range("clock.at")}
        from given, clock
        """,
        {
            **of._asdict(),
            **ask._asdict(),
            "is_in_code": code is not None,
            "concurrency": code and code.concurrency,
            "rate": code.per_second if code and code.rate else None,
            "burst": code and code.burst_size,
            "lives": LEASES * lease,
        },
        _ration,
    )


def _ration(rows: Sequence[Row]) -> Ration | None:
    if not rows:
        return None
    [(places, tokens, good_for, wait, at)] = rows
    return Ration(places, tokens, good_for or 0.0, float(wait or 0.0), at)


# -- operators ---------------------------------------------------------------------------

_NOTIFY_OF_CHANGED = NOTIFY.format(
    channel="%(channel)s",
    payload="concat_ws(' ', extract(epoch from now()), '-', %(name)s::text)",
)


def set_limit(of: Subject, limit: Limit, *, notify: bool = True) -> Statement[None]:
    """Set a limit for all workers, and notify those of the queue.

    Workers of any queue may have jobs of a type. They find its limit at their next claim.
    """
    notify = notify and of.scope == "queue"
    return Statement(
        f"""
        with written as (
            insert into bgjob_limit (scope, name, is_set, concurrency, rate, burst)
            values (%(scope)s, %(name)s, true, %(concurrency)s, %(rate)s, %(burst)s)
            on conflict (scope, name) do update
            set is_set = true, concurrency = excluded.concurrency, rate = excluded.rate,
                burst = excluded.burst
        )
        select {_NOTIFY_OF_CHANGED if notify else "null"}
        """,
        {
            **of._asdict(),
            "concurrency": limit.concurrency,
            "rate": limit.per_second if limit.rate else None,
            "burst": limit.burst_size,
            "channel": channel(of.name),
        },
        nothing,
    )


def remove_limit(of: Subject, *, notify: bool = True) -> Statement[bool]:
    """End an operator's limit, and notify the workers of the queue; True if there was one.

    The row stays, with what was used: a limit in the code of a program goes on from there.
    """
    notify = notify and of.scope == "queue"
    return Statement(
        f"""
        with ended as (
            update bgjob_limit
            set is_set = false, concurrency = null, rate = null, burst = null
            where scope = %(scope)s and name = %(name)s and is_set
            returning true
        )
        select exists (select from ended), {_NOTIFY_OF_CHANGED if notify else "null"}
        """,
        {**of._asdict(), "channel": channel(of.name)},
        scalar,
    )


IN_USE: LiteralString = """
    (is_set or concurrency is not null or rate is not null)
    and (is_set or used_at > clock_timestamp() - interval '1 minute' or exists (
        select from bgjob_ration r
        where r.scope = l.scope and r.name = l.name and r.until > clock_timestamp()
    ))
"""
"""Whether a limit was set, or a program that has it in its code was seen lately."""


def limits(of: Subject | None = None) -> Statement[list[LimitStatus]]:
    """List all limits, or the one of a queue or a type, with what is in use."""
    return Statement(
        f"""
        with clock as materialized (
            select clock_timestamp() as at
        ), force as materialized (
            select * from bgjob_limit l
            where (%(name)s::text is null or scope = %(scope)s and name = %(name)s)
                and {IN_USE}
        ), {_LEVEL}
        select scope, name, concurrency, rate, burst, is_set, {in_range("used_at")},
            (select count(*) from bgjob_ration r, clock
                where r.scope = level.scope and r.name = level.name and r.until > clock.at),
            (select coalesce(sum(places), 0)::integer from bgjob_ration r, clock
                where r.scope = level.scope and r.name = level.name and r.until > clock.at),
            case when rate is not null then floor(level)::integer end,
            coalesce(greatest(0, (1 - level) / refill), 0)::float8
        from level order by scope, name
        """,
        {
            "scope": of and of.scope,
            "name": of and of.name,
            "unused": 0,
            "since": None,
        },
        lambda rows: list(map(_status, rows)),
    )


def _status(row: Row) -> LimitStatus:
    scope, name, concurrency, rate, burst, *others = row
    limit = Limit(concurrency, None if rate is None else rate_text(rate), burst)
    return LimitStatus(scope, name, limit, *others)
