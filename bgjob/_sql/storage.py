"""The state of the tables and indexes: size, dead rows, vacuum, definitions."""

from typing import NamedTuple

from bgjob._sql.statement import Statement


class Table(NamedTuple):
    """A table, by the server's statistics; an estimate."""

    name: str
    bytes: int
    index_bytes: int
    rows: int
    dead: int
    """Dead rows that no vacuum has removed yet."""
    vacuumed_ago: float | None
    """Seconds since the last vacuum; None if there was none since the statistics began."""
    is_vacuuming: bool
    is_autovacuum_off: bool
    frozen_age: int
    """Transactions since the oldest row that is not frozen; the server stops at 2,000,000,000."""
    updates: int
    heap_only_updates: int
    is_part: bool
    """Whether it is partitioned, or a partition."""
    options: dict[str, str]
    """Its storage parameters."""


def tables(names: list[str]) -> Statement[list[Table]]:
    """Describe these tables; those that do not exist are left out."""
    return Statement(
        """
        select c.relname::text, pg_table_size(c.oid), pg_indexes_size(c.oid),
            coalesce(s.n_live_tup, 0), coalesce(s.n_dead_tup, 0),
            extract(epoch from
                clock_timestamp() - greatest(s.last_vacuum, s.last_autovacuum))::float8,
            exists (select from pg_stat_progress_vacuum p where p.relid = c.oid),
            exists (
                select from pg_options_to_table(c.reloptions)
                where option_name = 'autovacuum_enabled' and not option_value::bool
            ),
            case when c.relkind = 'p' then 0
                else greatest(age(c.relfrozenxid), age(t.relfrozenxid)) end,
            coalesce(s.n_tup_upd, 0), coalesce(s.n_tup_hot_upd, 0),
            c.relkind = 'p' or c.relispartition,
            array(
                select option_name || '=' || option_value from pg_options_to_table(c.reloptions)
            )
        from unnest(%(names)s::text[]) with ordinality as n (name, position)
        join pg_class c on c.oid = to_regclass(n.name)
        left join pg_class t on t.oid = c.reltoastrelid
        left join pg_stat_all_tables s on s.relid = c.oid
        order by n.position
        """,
        {"names": names},
        lambda rows: [
            Table._make([*row, dict(option.split("=", 1) for option in options)])
            for *row, options in rows
        ],
    )


class Index(NamedTuple):
    """An index of one of the tables."""

    name: str
    table: str
    bytes: int
    entries: int | None
    """By the last vacuum or analyze, or rows of the table if it has more; None if not known."""
    is_valid: bool
    definition: str


def indexes(tables: list[str]) -> Statement[list[Index]]:
    """List the indexes of these tables."""
    return Statement(
        """
        select x.relname::text, c.relname::text, pg_relation_size(x.oid),
            case when x.reltuples >= 0 then x.reltuples::bigint end,
            i.indisvalid and i.indisready, pg_get_indexdef(x.oid)
        from unnest(%(tables)s::text[]) with ordinality as n (name, position)
        join pg_class c on c.oid = to_regclass(n.name)
        join pg_index i on i.indrelid = c.oid
        join pg_class x on x.oid = i.indexrelid
        order by n.position, x.relname
        limit 1000
        """,
        {"tables": tables},
        lambda rows: [Index(*row) for row in rows],
    )


class Columns(NamedTuple):
    """The columns of a table."""

    table: str
    names: set[str]


def columns(tables: list[str]) -> Statement[list[Columns]]:
    """List the columns of these tables; those that do not exist are left out."""
    return Statement(
        """
        select n.name, array(
            select a.attname::text from pg_attribute a
            where a.attrelid = to_regclass(n.name) and a.attnum > 0 and not a.attisdropped
        )
        from unnest(%(tables)s::text[]) as n (name) where to_regclass(n.name) is not null
        """,
        {"tables": tables},
        lambda rows: [Columns(name, set(names)) for name, names in rows],
    )
