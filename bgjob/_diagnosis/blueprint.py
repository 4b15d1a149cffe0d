"""What `migration/init.sql` defines, read from its text: tables, columns, options, indexes.

So a table or an index that is added there is checked without a second list. The text is bgjob's
own; a test compares what is read from it with a database that it made.
"""

import re
from typing import NamedTuple

_COMMENT = re.compile(r"--.*")
_TABLE = re.compile(
    r"create table (\w+) \((.*?)\n\)(?: partition by \w+ \(\w+\))?(?: with \((.*?)\))?;",
    re.DOTALL,
)
_PARTITION = re.compile(r"create table (\w+) partition of (\w+) ")
_COLUMN = re.compile(r"^    (\w+) ", re.MULTILINE)
_OPTION = re.compile(r"(\w+) = ([\w.]+)")
_PRIMARY_KEY = re.compile(r"constraint (\w+) primary key (\([^)]*\))")
_INDEX = re.compile(r"create (unique )?index (\w+) on (\w+) ([^;]*);")
_NOT_COLUMNS = {"constraint", "primary", "unique", "check", "foreign", "exclude"}


class TablePlan(NamedTuple):
    """A table as it is defined."""

    columns: frozenset[str]
    options: dict[str, str]


class IndexPlan(NamedTuple):
    """An index as it is defined."""

    table: str
    shape: str
    """Its definition in one form; see `shape`."""
    remedy: str
    """SQL that makes it, without blocking writers where that is possible."""
    is_primary: bool


class Blueprint(NamedTuple):
    """The tables and indexes, by their names, in the order of the file."""

    tables: dict[str, TablePlan]
    indexes: dict[str, IndexPlan]


def shape(definition: str) -> str:
    """Return the definition of an index in one form, whoever wrote it.

    The server's own text has the schema, more parentheses, and capitals.
    """
    text = re.sub(r" on (?:only )?.*? using btree ", " ", definition.lower(), flags=re.DOTALL)
    return " ".join(re.sub(r"[()]", " ", text).replace(",", " , ").split())


def read(init_sql: str) -> Blueprint:
    """Read the text of `migration/init.sql`."""
    text = _COMMENT.sub("", init_sql)
    tables, indexes = {}, {}
    for table, body, options in _TABLE.findall(text):
        tables[table] = TablePlan(
            frozenset(_COLUMN.findall(body)) - _NOT_COLUMNS, dict(_OPTION.findall(options))
        )
        for name, columns in _PRIMARY_KEY.findall(body):
            indexes[name] = IndexPlan(
                table,
                shape(f"create unique index {name} {columns}"),
                f"alter table {table} add constraint {name} primary key {columns}",
                is_primary=True,
            )
    partitioned = {table for _, table in _PARTITION.findall(text)}
    for partition, table in _PARTITION.findall(text):
        tables[partition] = TablePlan(tables[table].columns, {})
    for unique, name, table, rest in _INDEX.findall(text):
        on = " ".join(rest.split())
        how = "" if table in partitioned else "concurrently "  # a partitioned table cannot
        indexes[name] = IndexPlan(
            table,
            shape(f"create {unique}index {name} {on}"),
            f"create {unique}index {how}{name} on {table} {on}",
            is_primary=False,
        )
    return Blueprint(tables, indexes)
