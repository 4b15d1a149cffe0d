"""Rows to findings: the schema, dead rows and vacuum, the size of indexes."""

from collections.abc import Iterator, Sequence

from bgjob._diagnosis.blueprint import Blueprint, shape
from bgjob._sql.session import Hidden, Lack
from bgjob._sql.storage import Columns, Index, Table
from bgjob._words import identifier, lasting, size
from bgjob.doctor import Finding, Limits, Severity
from bgjob.errors import SchemaError
from bgjob.schema import VERSION, check_lacks, check_version, hidden_text, versions

_HOT = 0.9
"""The part of updates that should be heap-only, once there are enough of them."""

_ENOUGH_UPDATES = 100_000
_OLDEST_FROZEN = 1_000_000_000

_ENTRY = {
    "bgjob_job_pkey": 104,
    "bgjob_job_due": 67,
    "bgjob_job_exclusive": 299,
}
"""Bytes of an index entry, measured after a million enqueues, with ids of 36 characters."""

_OTHER_ENTRY = 120

_BLOATED = 4
"""How many times its expected size makes an index bloated."""

_DISPENSABLE = {
    "bgjob_worker",
    "bgjob_minute",
    "bgjob_history",
    *(f"bgjob_history_{day}" for day in range(8)),
}
"""The tables without which workers run jobs."""

_APPLY = "apply migration/init.sql, as `bgjob schema` prints it, with your migration tool"


def version(comment: str | None) -> list[Finding]:
    """Report missing tables, and tables of another version."""
    try:
        check_version(comment)
    except SchemaError as error:
        found = versions(comment)
        if found is None:
            remedy = _APPLY
        elif found[0] < VERSION:
            remedy = "apply the steps of CHANGELOG.md from that version on"
        else:
            remedy = "pip install --upgrade bgjob, in every program that uses these tables"
        return [Finding("schema", "bad", str(error), remedy, {"comment": comment})]
    return []


def columns(rows: Sequence[Columns], plan: Blueprint) -> list[Finding]:
    """Report tables and columns that are missing."""
    found = []
    there = {row.table: row.names for row in rows}
    for name, table in plan.tables.items():
        if name not in there:
            text = f"table {name} is not in the search_path"
            remedy = f"{_APPLY}: its statement `create table {name}`, and grant it"
            severity: Severity = "bad"
            if name in _DISPENSABLE:
                severity, text = "warn", f"{text}; workers work without it"
            found.append(Finding("schema", severity, text, remedy, {"table": name}))
            continue
        for column in sorted(table.columns - there[name]):
            text = f"table {name} has no column {column}"
            remedy = f"alter table {name} add column {column}, as migration/init.sql has it"
            facts = {"table": name, "column": column}
            found.append(Finding("schema", "bad", text, remedy, facts))
    return found


def definitions(
    tables: Sequence[Table], indexes: Sequence[Index], plan: Blueprint
) -> Iterator[Finding]:
    """Report indexes that are missing or different, and other storage parameters."""
    there = {index.name: index for index in indexes}
    names = {table.name for table in tables}
    for name, expected in plan.indexes.items():
        if expected.table not in names:
            continue
        facts = {"table": expected.table, "index": name}
        if name not in there:
            yield Finding(
                "schema",
                "bad" if expected.is_primary else "warn",
                f"index {name} of table {expected.table} is missing",
                expected.remedy,
                facts,
            )
        elif shape(there[name].definition) != expected.shape:
            yield Finding(
                "schema",
                "warn",
                f"index {name} is not the one of migration/init.sql: {there[name].definition}",
                f"drop index{' concurrently' if ' concurrently ' in expected.remedy else ''} "
                f"{name}; {expected.remedy}",
                facts,
            )
    for table in tables:
        for option, value in plan.tables[table.name].options.items():
            if _plain(table.options.get(option, "")) != _plain(value):
                yield Finding(
                    "schema",
                    "note",
                    f"table {table.name} has {option} = {table.options.get(option, 'default')}, "
                    f"not {value} as in migration/init.sql",
                    f"alter table {table.name} set ({option} = {value})",
                    {"table": table.name, "option": option},
                )


def _plain(value: str) -> str:
    return "off" if value.lower() in {"false", "no", "0", "f", "off"} else value.lower()


def grants(lacks: Sequence[Lack], hidden: Sequence[Hidden]) -> list[Finding]:
    """Report privileges that a worker of this role lacks, and rows that are hidden from it.

    Only a worker's role may delete from bgjob_job. Of another role, such as an operator's,
    nothing is asked.
    """
    found = []
    needs = [lack for lack in lacks if not lack.is_absent]
    if not any((n.relation, n.column, n.privilege) == ("bgjob_job", None, "delete") for n in needs):
        while needs:
            relation, privilege = needs[0].relation, needs[0].privilege
            these = [n for n in needs if (n.relation, n.privilege) == (relation, privilege)]
            needs = [n for n in needs if n not in these]
            try:
                check_lacks(these)
            except SchemaError as error:
                text, _, remedy = str(error).partition("; ")
                facts = {"table": relation, "privilege": privilege, "role": these[0].role}
                found.append(Finding("schema", "bad", text, remedy, facts))
    if warning := hidden_text(hidden):
        text, _, remedy = warning.partition("; ")
        tables = [h.relation for h in hidden]
        found.append(
            Finding("schema", "warn", text, remedy, {"tables": tables, "role": hidden[0].role})
        )
    return found


def tables(rows: Sequence[Table], limits: Limits) -> list[Finding]:
    """Report dead rows that no vacuum removes, and what keeps vacuum from its work."""
    found = []
    for table in rows:
        ills = list(_ills(table, limits))
        if not ills and not (table.is_part and not table.rows and not table.dead):
            ills = [Finding("tables", "ok", _described(table), facts=table._asdict())]
        found += ills
    return found


def _ills(table: Table, limits: Limits) -> Iterator[Finding]:
    name, facts = table.name, table._asdict()
    if table.is_autovacuum_off:
        yield Finding(
            "tables",
            "bad",
            f"{name}: autovacuum is switched off for this table",
            f"alter table {name} reset (autovacuum_enabled)",
            facts,
        )
    if table.frozen_age > _OLDEST_FROZEN:
        yield Finding(
            "tables",
            "bad",
            f"{name}: its oldest row is {table.frozen_age:,} transactions old; at 2,000,000,000 "
            "the server accepts no writes any more",
            f"vacuum (freeze, verbose) {name}; first end what the check horizon names",
            facts,
        )
    if table.dead > max(limits.table_dead_rows, table.rows):
        yield Finding(
            "tables",
            "warn",
            f"{_described(table)}: more dead rows than live ones",
            f"vacuum (analyze) {name}; if they stay, see the check horizon",
            facts,
        )
    heap_only = table.heap_only_updates / max(table.updates, 1)
    if table.updates > _ENOUGH_UPDATES and heap_only < _HOT:
        yield Finding(
            "tables",
            "note",
            f"{name}: {heap_only:.0%} of {table.updates:,} updates were heap-only; retries and "
            "reschedules never are, claims should be",
            f"see the check schema for its fillfactor, and drop indexes of {name} that bgjob does "
            "not have",
            facts,
        )


def _described(table: Table) -> str:
    text = (
        f"{table.name}: {table.rows:,} rows, {table.dead:,} dead, {size(table.bytes)} + "
        f"{size(table.index_bytes)} of indexes"
    )
    if table.is_vacuuming:
        return f"{text}, being vacuumed now"
    if table.vacuumed_ago is None:
        return f"{text}, not vacuumed yet"
    return f"{text}, vacuumed {lasting(table.vacuumed_ago)} ago"


def indexes(rows: Sequence[Index], tables: Sequence[Table], limits: Limits) -> list[Finding]:
    """Report invalid and bloated indexes."""
    found = []
    live = {table.name: table.rows for table in tables}
    for index in rows:
        name, facts = identifier(index.name), index._asdict()
        if not index.is_valid:
            found.append(
                Finding(
                    "indexes",
                    "bad",
                    f"index {name} of table {index.table} is invalid: a concurrent build of it "
                    "did not finish",
                    f"reindex index concurrently {name}; or, if it is not bgjob's: "
                    f"drop index concurrently {name}",
                    facts,
                )
            )
            continue
        entries = None if index.entries is None else max(index.entries, 1)
        if entries is None or index.bytes <= limits.index_bytes:
            continue
        if " where " not in index.definition.lower():
            entries = max(entries, live.get(index.table, 0))
        each = index.bytes / entries
        if each > _BLOATED * _ENTRY.get(index.name, _OTHER_ENTRY):
            found.append(
                Finding(
                    "indexes",
                    "warn",
                    f"index {name} is bloated: {size(index.bytes)} for {entries:,} entries",
                    f"reindex index concurrently {name}",
                    facts,
                )
            )
    total = sum(index.bytes for index in rows)
    text = f"{len(rows)} indexes, {size(total)}, all valid"
    return found or [Finding("indexes", "ok", text)]
