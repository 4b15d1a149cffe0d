"""Lists of live jobs, page by page.

A page costs the same whatever the tables hold. Each way to walk over the jobs has an order, and a
place in it at which the next page begins:

    Ids      by id, the last first: the primary key
    Line     the jobs of a queue that do not wait for a key, in the order of claims
    Waiting  the jobs of a queue that wait for a key, key by key
    Keyed    the jobs of one key, in the order in which they get it
    Blocks   as the rows lie in the table: for filters without an index

A filter that a way has no index for is applied to the rows that it walks over, and a page ends
after so many of them. Blocks reads five times as many rows a millisecond as an index walk, at a
cost that the data cannot change; but a row that moves meanwhile may be met twice, or not at all.
What the ways share, a look and the text of a place, is as long as they are, so the module has over
400 lines.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from datetime import datetime
from functools import partial
from typing import ClassVar, LiteralString, NamedTuple, TypeAlias

from bgjob._sql.jobs import LISTED, JobFilter, Live, live
from bgjob._sql.statement import Row, Statement

MOST_ROWS = 50_000
"""The most rows that an index walk looks at for one page: 80 to 230 ms of a million jobs."""

FIRST_ROWS = 1000
"""The rows that the first look of an index walk reads; each later one reads eight times as many.

As a rule a filter such as a state leaves out few rows: a look at MOST_ROWS for the first due jobs
of a large queue took 230 to 500 ms.
"""

MOST_BLOCKS = 20_000
"""The most pages of the table that one page of a list looks at: 60 to 210 ms, 258,064 jobs."""

FIRST_BLOCKS = 256
"""The pages of the table that the first look reads; each later one reads twice as many."""

_LARGEST = 2**31 - 1
"""The largest number of a place."""

_MOST_KEYS: LiteralString = "10000"
"""The most keys at which one page looks for jobs that wait."""


class Looked(NamedTuple):
    """What one look has found."""

    jobs: list[Live]
    at: "Way | None"
    """Where to continue; None at the end of the way."""
    rows: int
    """The number of rows looked at; of blocks an estimate."""
    about: int | None = None
    """About how many there are, as far as the statistics know."""


@dataclass(frozen=True, slots=True)
class Ids:
    """By id, the last first, below one."""

    before: str | None = None
    name: ClassVar = "ids"

    def look(self, where: JobFilter, limit: int, rows: int | None = None) -> Statement[Looked]:
        """Return the statement that looks from here on; see _walked."""
        end = _end(where.prefix)
        bounds: LiteralString = "true"
        if where.prefix is not None:
            bounds += " and j.id >= %(prefix)s"
        if end is not None:
            bounds += " and j.id < %(end)s"
        if self.before is not None:
            bounds += " and j.id < %(before)s"
        walk: LiteralString = f"""
            select j.ctid, j.id, {where.condition} as fits from bgjob_job j
            where {bounds} order by j.id desc limit %(most)s
        """
        rest = where if end is None else where._replace(prefix=None)
        return _walked(Ids, walk, "w.id", where, rest, limit, rows, before=self.before, end=end)


def _end(prefix: str | None) -> str | None:
    """Return the first id after those of a prefix; None if that takes more than ASCII."""
    if not prefix or prefix[-1] > "}":
        return None
    return prefix[:-1] + chr(ord(prefix[-1]) + 1)


_PAST: LiteralString = "and j.next_run_at <= statement_timestamp()"
_FUTURE: LiteralString = "and j.next_run_at > statement_timestamp()"
_TIMES: Mapping[str | None, LiteralString] = {
    "due": _PAST,
    "running": _PAST,
    "suspect": _PAST,
    "delayed": _FUTURE,
    "retry": _FUTURE,
}


@dataclass(frozen=True, slots=True)
class Line:
    """In the order of claims, from a priority and a due time on.

    The index has no id, so a place counts the jobs of its very time that were listed: a page
    among a million jobs of one time takes as long as there are before it, and is exact as long
    as they do not change.
    """

    priority: int = -32768
    since: str = "-infinity"
    ties: int = 0
    name: ClassVar = "line"

    def look(self, where: JobFilter, limit: int, rows: int | None = None) -> Statement[Looked]:
        """Return the statement that looks from here on; see _walked."""
        # Priority by priority: a comparison of (priority, next_run_at) would walk over all the
        # jobs of a lower priority number that are not due.
        walk: LiteralString = f"""
            with recursive line (priority) as (
                (
                    select priority from bgjob_job
                    where queue = %(queue)s and priority >= %(priority)s and not waits
                    order by priority limit 1
                )
                union all
                select (
                    select n.priority from bgjob_job n
                    where n.queue = %(queue)s and n.priority > line.priority and not n.waits
                    order by n.priority limit 1
                ) from line where line.priority is not null
            )
            select j.*, row_number() over (partition by j.priority, j.next_run_at)
                + case when j.priority = %(priority)s
                    and j.next_run_at = %(since)s::timestamptz then %(ties)s else 0 end as ties
            from (
                select j.* from line cross join lateral (
                    select j.ctid, j.priority, j.next_run_at, {where.condition} as fits
                    from bgjob_job j
                    where j.queue = %(queue)s and j.priority = line.priority and not j.waits
                        and j.next_run_at >= case when line.priority = %(priority)s
                            then %(since)s::timestamptz else '-infinity' end
                        {_TIMES.get(where.state, "")}
                    order by j.next_run_at
                    offset case when line.priority = %(priority)s then %(ties)s else 0 end
                    limit %(most)s
                ) as j
                where line.priority is not null
                limit %(most)s
            ) as j
            order by j.priority, j.next_run_at, ties
        """
        return _walked(
            Line,
            walk,
            "w.priority, w.next_run_at, w.ties",
            where,
            where._replace(queue=None),
            limit,
            rows,
            priority=self.priority,
            since=self.since,
            ties=self.ties,
        )


@dataclass(frozen=True, slots=True)
class Waiting:
    """The jobs of a queue that wait for a key, key by key, after one of them."""

    key: str = ""
    since: str = "-infinity"
    id: str = ""
    name: ClassVar = "waiting"

    def look(self, where: JobFilter, limit: int, rows: int | None = None) -> Statement[Looked]:
        """Return the statement that looks from here on; see _walked."""
        walk: LiteralString = f"""
            select j.* from (
                select key from bgjob_exclusive where key >= %(key)s and place = 0
                order by key limit {_MOST_KEYS}
            ) as e
            cross join lateral (
                select j.ctid, e.key, j.next_run_at, j.id, {where.condition} as fits
                from bgjob_job j
                where j.exclusive = e.key and j.waits and j.queue = %(queue)s
                    and (j.next_run_at, j.id) > (
                        case when e.key = %(key)s then %(since)s::timestamptz
                            else '-infinity' end,
                        case when e.key = %(key)s then %(id)s else '' end
                    )
                order by j.next_run_at, j.id
                limit %(most)s
            ) as j
            limit %(most)s
        """
        return _walked(
            Waiting,
            walk,
            "w.key, w.next_run_at, w.id",
            where,
            where._replace(queue=None, state=None if where.state == "key" else where.state),
            limit,
            rows,
            key=self.key,
            since=self.since,
            id=self.id,
        )


@dataclass(frozen=True, slots=True)
class Limited:
    """The jobs of a queue that wait for the limit of their type, type by type, from one on.

    As in `Line`, a place counts the jobs of its very time that were listed.
    """

    type: str = ""
    priority: int = -32768
    since: str = "-infinity"
    ties: int = 0
    name: ClassVar = "limited"

    def look(self, where: JobFilter, limit: int, rows: int | None = None) -> Statement[Looked]:
        """Return the statement that looks from here on; see _walked."""
        walk: LiteralString = f"""
            select j.*, row_number() over (partition by j.type, j.priority, j.next_run_at)
                + case when (j.type, j.priority, j.next_run_at)
                    = (%(after_type)s, %(priority)s, %(since)s::timestamptz)
                    then %(ties)s else 0 end as ties
            from (
                select j.ctid, j.type, j.priority, j.next_run_at, {where.condition} as fits
                from bgjob_job j
                where j.queue = %(queue)s and j.limited and j.waits
                    and (j.type, j.priority, j.next_run_at)
                        >= (%(after_type)s, %(priority)s, %(since)s::timestamptz)
                order by j.type, j.priority, j.next_run_at
                offset %(ties)s limit %(most)s
            ) as j
            order by j.type, j.priority, j.next_run_at, ties
        """
        return _walked(
            Limited,
            walk,
            "w.type, w.priority, w.next_run_at, w.ties",
            where,
            where._replace(queue=None, state=None if where.state == "limited" else where.state),
            limit,
            rows,
            after_type=self.type,
            priority=self.priority,
            since=self.since,
            ties=self.ties,
        )


@dataclass(frozen=True, slots=True)
class Keyed:
    """The jobs of one key, first those that do not wait for it, after one of them."""

    waits: bool = False
    queue: str = ""
    since: str = "-infinity"
    id: str = ""
    name: ClassVar = "keyed"

    def look(self, where: JobFilter, limit: int, rows: int | None = None) -> Statement[Looked]:
        """Return the statement that looks from here on; see _walked."""
        walk: LiteralString = f"""
            select j.ctid, j.waits, j.queue, j.next_run_at, j.id, {where.condition} as fits
            from bgjob_job j
            where j.exclusive = %(exclusive)s
                and (j.waits, j.queue, j.next_run_at, j.id)
                    > (%(waits)s, %(after_queue)s, %(since)s::timestamptz, %(id)s)
            order by j.waits, j.queue, j.next_run_at, j.id
            limit %(most)s
        """
        return _walked(
            Keyed,
            walk,
            "w.waits, w.queue, w.next_run_at, w.id",
            where,
            where._replace(exclusive=None),
            limit,
            rows,
            waits=self.waits,
            after_queue=self.queue,
            since=self.since,
            id=self.id,
        )


@dataclass(frozen=True, slots=True)
class Blocks:
    """As the rows lie in the table, from a row of a page on."""

    block: int = 0
    row: int = 0
    name: ClassVar = "blocks"

    def look(self, where: JobFilter, limit: int, blocks: int = FIRST_BLOCKS) -> Statement[Looked]:
        """Return the statement that looks from here on.

        Args:
            where: the filter.
            limit: the most jobs to return.
            blocks: the most pages to look at.

        """
        return Statement(
            f"""
            with size as materialized (
                select pg_relation_size(c.oid) / current_setting('block_size')::int as blocks,
                    case when c.relpages > 0 and c.reltuples >= 0
                        then c.reltuples / c.relpages end as density
                from pg_class c where c.oid = to_regclass('bgjob_job')
            )
            select size.blocks, size.density, (found.place::text::point)[0]::bigint,
                (found.place::text::point)[1]::int, found.*
            from size left join (
                select j.ctid as place, {LISTED} from bgjob_job j
                where j.ctid >= %(start)s::tid and j.ctid < %(stop)s::tid
                    and ({where.condition})
                -- A scan of a large table may begin in its middle.
                order by j.ctid limit %(limit)s
            ) as found on true
            """,
            {
                **where.params,
                "start": f"({self.block},{self.row})",
                "stop": f"({self.block + blocks},0)",
                "limit": limit,
            },
            partial(self._looked, limit, blocks),
        )

    def _looked(self, limit: int, blocks: int, rows: Sequence[Row]) -> Looked:
        size, density = rows[0][:2]
        found = [row for row in rows if row[2] is not None]
        if len(found) == limit:
            at = Blocks(found[-1][2], found[-1][3] + 1)
        else:
            at = Blocks(self.block + blocks)
        end = min(at.block, size)
        about = None if density is None else round(size * density)
        looked_at = round((end - self.block) * (density or 0))
        jobs = [live(row[5:]) for row in found]
        return Looked(jobs, at if at.block < size else None, max(looked_at, len(jobs)), about)


Way: TypeAlias = Ids | Line | Waiting | Limited | Keyed | Blocks

_WAYS: Mapping[str, type[Way]] = {
    way.name: way for way in (Ids, Line, Waiting, Limited, Keyed, Blocks)
}


def _walked(
    kind: type[Way],
    walk: LiteralString,
    place: LiteralString,
    where: JobFilter,
    rest: JobFilter,
    limit: int,
    rows: int | None,
    **params: object,
) -> Statement[Looked]:
    """Return the statement that reads the rows which a walk finds.

    Args:
        kind: the way.
        walk: its rows in their order: `ctid`, `fits`, and the columns of a place.
        place: these columns, of the alias `w`.
        where: the filter.
        rest: what of the filter the walk does not find by its index.
        limit: the most jobs to return.
        rows: the most rows to look at where there is such a rest; MOST_ROWS by default.
        params: the parameters of the walk.

    """
    most = limit if rest == JobFilter() else max(limit, MOST_ROWS if rows is None else rows)
    return Statement(
        f"""
        with looked as materialized (
            select row_number() over () as n, w.* from ({walk}) as w
        ), found as materialized (
            select * from looked where fits order by n limit %(limit)s
        ), ended as materialized (
            select seen.rows, (
                select json_build_array({place})::text from looked w where w.n = seen.rows
            ) as place
            from (select count(*) as rows from looked) as seen
        )
        select ended.rows, ended.place, json_build_array({place})::text, job.*
        from ended
        left join found w on true
        left join lateral (
            select {LISTED} from bgjob_job j where j.ctid = w.ctid offset 0
        ) as job on true
        order by w.n
        """,
        {**where.params, **params, "limit": limit, "most": most},
        partial(_looked, kind, limit, most),
    )


def _looked(kind: type[Way], limit: int, most: int, rows: Sequence[Row]) -> Looked:
    count, last = rows[0][:2]
    found = [row for row in rows if row[3] is not None]
    end = last if count == most else None
    place = found[-1][2] if len(found) == limit else end
    at = None if place is None else kind(*json.loads(place))
    return Looked([live(row[3:]) for row in found], at, count)


def first_way(where: JobFilter) -> Way:
    """Return the beginning of the way that suits a filter."""
    if where.exclusive is not None:
        return Keyed()
    if where.prefix is not None:
        return Ids()
    if where.queue is not None:
        ways: dict[str | None, Way] = {"key": Waiting(), "limited": Limited()}
        return ways.get(where.state, Line())
    return Ids() if where == JobFilter() else Blocks()


def next_way(way: Way, where: JobFilter) -> Way | None:
    """Return the way that follows one at its end; None if there is no more."""
    if where.state is not None:
        return None
    if isinstance(way, Line):
        return Waiting()
    return Limited() if isinstance(way, Waiting) else None


def written(way: Way) -> str:
    """Return a place as text."""
    return f"{way.name}{json.dumps(astuple(way), separators=(',', ':'))}"


def parsed(text: str, where: JobFilter) -> Way:
    """Return a place from its text.

    Raises:
        ValueError: it is none, or not one of these filters.

    """
    name, bracket, values = text.partition("[")
    try:
        way = _checked(_WAYS[name](*json.loads(bracket + values)))
    except (KeyError, ValueError, TypeError):
        raise ValueError(f"after must be the `next` of a page, not {text!r}") from None
    ways: list[Way | None] = [first_way(where)]
    while ways[-1] is not None:
        ways.append(next_way(ways[-1], where))
    if type(way) not in [type(each) for each in ways[:-1]]:
        raise ValueError(
            f"after must be the `next` of a page with the same filters: {text!r} is of others"
        )
    return way


_INFINITE = ("-infinity", "infinity")


def _checked(way: Way) -> Way:
    """Return a place whose values the server can read; raise ValueError for others."""
    for each in fields(way):
        value: object = getattr(way, each.name)
        if type(value) is not (str if each.default is None else type(each.default)):
            raise ValueError(each.name)
        if isinstance(value, int) and abs(value) > _LARGEST:
            raise ValueError(each.name)
        if isinstance(value, str):
            if "\0" in value:
                raise ValueError(each.name)
            if each.name == "since" and value not in _INFINITE:
                datetime.fromisoformat(value)
    return way
