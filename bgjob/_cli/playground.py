"""A Python prompt with a client, a mux and a worker."""

import code
import contextlib
import sys
from contextlib import ExitStack
from textwrap import dedent

import bgjob
from bgjob import schema
from bgjob._cli import database
from bgjob._cli.progress import say
from bgjob.client import Client
from bgjob.mux import Mux
from bgjob.worker import Worker

QUEUE = "playground"

_GRACE = 2.0  # seconds for the handlers that run when the prompt ends

_BANNER = dedent("""\
    bgjob's playground, on {place}. There are a client, a mux, and a worker of the
    queue "playground" that does not run yet; and all that bgjob exports. Try:

      mux.register("shout", lambda job: print(job.json().upper()))
      client.enqueue(EnqueueRequest("playground", "shout", "hello"))
      worker.run()

    Ctrl-D leaves.""")


def play(dsn: str | None) -> None:
    """Run the prompt on the standard input until it ends, or `exit()` is called.

    Args:
        dsn: a database with the tables; None for a private server that lives as long as the
            prompt.

    Raises:
        EmbeddedServerError: the private server is not installed, or did not start.
        SchemaError: the database does not have the tables.
        psycopg.Error: the database cannot be reached.

    """
    with ExitStack() as stack:
        place = "your database"
        if dsn is None:
            from bgjob.ext.embedded import EmbeddedServer  # noqa: PLC0415 (an extra)

            say("starting a private PostgreSQL server")
            place, dsn = "a private PostgreSQL", stack.enter_context(EmbeddedServer()).dsn
            with database.connect(dsn) as conn:
                conn.execute(schema.init_sql().encode())
        client = stack.enter_context(database.opened(dsn))
        mux = Mux()
        worker = Worker(client, QUEUE, mux, concurrency=4)
        stack.callback(worker.shutdown, _GRACE)
        _interact(_BANNER.format(place=place), client, mux, worker)


def _interact(banner: str, client: Client, mux: Mux, worker: Worker) -> None:
    names: dict[str, object] = {name: getattr(bgjob, name) for name in bgjob.__all__}
    names |= {"client": client, "mux": mux, "worker": worker}
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):  # not every Python has it
            import readline  # noqa: PLC0415
            import rlcompleter  # noqa: PLC0415

            readline.set_completer(rlcompleter.Completer(names).complete)
            readline.parse_and_bind("tab: complete")
    with contextlib.suppress(SystemExit):  # exit() leaves, too
        code.interact(banner, local=names, exitmsg="")
