"""`bgjob demo --web`: the web page, over a world whose jobs keep flowing."""

import sysconfig
from contextlib import ExitStack
from pathlib import Path

from bgjob._cli import demo_world, page
from bgjob._cli.demo_place import interrupts, place
from bgjob._cli.progress import say
from bgjob.client import Client

_LISTEN = page.Listen("127.0.0.1", 8080)


def serve(dsn: str | None) -> None:
    """Keep the demo's world running, and serve its page until Ctrl-C or SIGTERM.

    For the main thread only. However it ends, it removes what it made on the server, or the
    server itself.

    Args:
        dsn: the database, in which it works in a schema of its own; None for a private server
            that lives as long as the demo.

    Raises:
        PageError: the packages of the page are not installed, or there is no free port.
        DemoError: the first jobs did not run, or the schema could not be dropped.
        EmbeddedServerError: the private server is not installed, or did not start.
        psycopg.Error: the server cannot be reached, or refuses.
        KeyboardInterrupt: Ctrl-C or SIGTERM; everything is removed already.

    """
    page.check_extra()
    from bgjob.ext.web import TokenAccess  # noqa: PLC0415 (an extra)

    with interrupts() as hold_off, ExitStack() as stack:
        try:
            inside = stack.enter_context(place(dsn))
            client = stack.enter_context(Client(inside))
            root = Path(sysconfig.get_path("stdlib"))
            stack.enter_context(demo_world.running(inside, client, root))
            say("open this address; Ctrl-C ends the demo and removes all of it")
            page.serve(
                inside,
                listen=_LISTEN,
                access=TokenAccess(),
                takes_next=True,
                name="demo",
                colour="blue",
            )
        finally:
            hold_off()  # the clean-up has a time limit, and must not be interrupted
