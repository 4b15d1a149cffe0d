"""The schema's text and version."""

import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from bgjob._sql.session import Hidden, Lack
from bgjob.errors import SchemaError

VERSION = 1
"""The schema version this library needs; `migration/init.sql` carries it as a comment."""

_COMMENT = re.compile(r"bgjob schema ([0-9]{1,9})(?:, works with ([0-9]{1,9}))?")


def init_sql() -> str:
    """Return the text of `migration/init.sql`, to apply with any migration tool."""
    path = files("bgjob") / "migration" / "init.sql"
    if not path.is_file():  # a source checkout: only a built wheel carries it inside
        path = Path(__file__).parent.parent / "migration" / "init.sql"
    return path.read_text("utf-8")


def versions(comment: str | None) -> tuple[int, int] | None:
    """Return the schema's version and the oldest version that works with it.

    None if the comment is not one of bgjob's. 'bgjob schema 2, works with 1' is version 2,
    and a library that needs version 1 works with it: the schema only has more, such as a
    nullable column. Without "works with" only its own version works.
    """
    match = _COMMENT.fullmatch(comment or "")
    return match and (int(match[1]), int(match[2] or match[1]))


def check_tables(comment: str | None) -> None:
    """Raise SchemaError unless the tables exist."""
    if comment is None:
        raise SchemaError(
            "the tables bgjob_job, bgjob_dead_job, bgjob_exclusive, bgjob_pause and bgjob_limit "
            "are not in the search_path; "
            "apply migration/init.sql (bgjob.schema.init_sql()) to this database, "
            "or set the search_path to the schema that has them, and grant its usage to this role"
        )


def check_version(comment: str | None) -> None:
    """Raise SchemaError unless the comment on bgjob_job names a version that works."""
    check_tables(comment)
    found = versions(comment)
    if found is None:
        raise SchemaError(
            f"the comment on table bgjob_job is {comment!r}, not 'bgjob schema {VERSION}'; "
            "apply migration/init.sql completely, with its last statement"
        )
    version, oldest = found
    if not oldest <= VERSION <= version:
        remedy = "upgrade the schema" if version < VERSION else "upgrade the bgjob package"
        raise SchemaError(
            f"table bgjob_job has schema version {version}, this bgjob needs {VERSION}: {remedy}"
        )


def hidden_text(hidden: Sequence[Hidden]) -> str | None:
    """Return a warning about rows that a worker may not see; None if it sees all."""
    if not hidden:
        return None
    relation, role = hidden[0]
    return (
        f"row-level security hides rows of table {', '.join(h.relation for h in hidden)} from role "
        f"{role!r}, unless a policy shows them: their jobs do not run, without another warning; "
        f"as its owner: create policy bgjob_worker on {relation} to {role} using (true), or: "
        f"alter table {relation} disable row level security"
    )


def check_lacks(lacks: Sequence[Lack]) -> None:
    """Raise SchemaError if a column or privilege that a worker needs is missing."""
    absent = [lack for lack in lacks if lack.is_absent]
    if absent:
        raise SchemaError(
            f"table {absent[0].relation} has no column {absent[0].column}; "
            "apply migration/init.sql (bgjob.schema.init_sql()) to this database completely"
        )
    if lacks:
        relation, column, privilege, role, _ = lacks[0]
        columns = [
            lack.column
            for lack in lacks
            if column and lack.column and (lack.relation, lack.privilege) == (relation, privilege)
        ]
        grant = f"{privilege} ({', '.join(columns)})" if columns else privilege
        raise SchemaError(
            f"role {role!r} may not {grant} on table {relation}; "
            f"as its owner: grant {grant} on {relation} to {role}"
        )
