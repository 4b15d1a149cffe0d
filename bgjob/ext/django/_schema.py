"""The operation that applies init.sql, and its reverse."""

import re
from typing import Any, LiteralString, cast

from django.core.management.base import CommandError
from django.db import migrations, router

from bgjob._sql.session import drop_tables, schema_comment
from bgjob.schema import init_sql

_TABLE = re.compile(r"^create table (\w+) \($", re.MULTILINE)


class ApplySchema(migrations.RunSQL):
    """Applies init.sql to a PostgreSQL database; does nothing on another one."""

    def __init__(self, state_operations: Any = None) -> None:
        text = init_sql()
        tables = cast("list[LiteralString]", _TABLE.findall(text))
        super().__init__(text, drop_tables(tables), state_operations=state_operations)

    def deconstruct(self) -> tuple[str, list[Any], dict[str, Any]]:
        """Return how to write the operation in a squashed migration, without the text."""
        given = {"state_operations": self.state_operations} if self.state_operations else {}
        return type(self).__qualname__, [], given

    def database_forwards(
        self, app_label: str, schema_editor: Any, from_state: Any, to_state: Any
    ) -> None:
        """Make the tables; raise CommandError if they exist already."""
        connection = schema_editor.connection
        if connection.vendor != "postgresql":
            return
        if router.allow_migrate(connection.alias, app_label) and not schema_editor.collect_sql:
            with connection.cursor() as cursor:
                cursor.execute(schema_comment().text)
                if cursor.fetchone() is not None:
                    raise CommandError(_exists(connection.alias))
        super().database_forwards(app_label, schema_editor, from_state, to_state)

    def database_backwards(
        self, app_label: str, schema_editor: Any, from_state: Any, to_state: Any
    ) -> None:
        """Drop the tables, with all jobs."""
        if schema_editor.connection.vendor == "postgresql":
            super().database_backwards(app_label, schema_editor, from_state, to_state)

    def describe(self) -> Any:
        """Return what it does, for `migrate --plan`."""
        return "Apply init.sql of bgjob"


def _exists(alias: str) -> str:
    database = "" if alias == "default" else f" --database {alias}"
    return (
        "the tables of bgjob exist already, and this migration did not make them. If `manage.py "
        f"bgjob schema --check{database}` finds their version right, record them as migrated: "
        f"manage.py migrate bgjob 0001 --fake{database}"
    )
