"""`bgjob schema`: print the schema, or check the database's."""

import argparse
import sys
from typing import TYPE_CHECKING

from bgjob import schema
from bgjob._cli import arguments, database, table
from bgjob._sql import execute
from bgjob._sql.session import schema_comment
from bgjob._sql.workers import registry_lacks
from bgjob.errors import SchemaError

if TYPE_CHECKING:
    from bgjob._cli.arguments import Commands


def add(commands: "Commands") -> None:
    """Add the command."""
    parser = arguments.add_command(
        commands,
        "schema",
        run,
        help="print the tables' SQL, or check the database's tables",
        description="Prints migration/init.sql, to apply with your own migration tool. The command "
        "changes no database.",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="compare the version of the database's tables with the one that this bgjob needs; "
        "if they differ, print the remedy and exit with 1",
    )
    arguments.add_dsn(parser)
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    if args.check:
        return _check(args)
    if args.json:
        table.write_json({"version": schema.VERSION, "sql": schema.init_sql()})
    else:
        sys.stdout.write(schema.init_sql())
    return 0


def _check(args: argparse.Namespace) -> int:
    with database.connect(database.find(args.dsn)) as conn:
        comment = execute.run(conn, schema_comment())
        lists_workers = not any(lack.is_absent for lack in execute.run(conn, registry_lacks()))
    version, _ = schema.versions(comment) or (None, None)
    found = {
        "version": version,
        "needed": schema.VERSION,
        "lists_workers": lists_workers,
    }
    try:
        schema.check_version(comment)
    except SchemaError as error:
        if args.json:
            table.write_json({"ok": False, **found, "error": str(error)})
        raise
    if args.json:
        table.write_json({"ok": True, **found, "error": None})
    else:
        works = "as needed" if version == schema.VERSION else f"which works with {schema.VERSION}"
        sys.stdout.write(f"the tables have schema version {version}, {works}\n")
        if not lists_workers:
            sys.stdout.write(
                "without table bgjob_worker, or a column of it, workers work, but are not listed: "
                "apply its statement in migration/init.sql\n"
            )
    return 0
