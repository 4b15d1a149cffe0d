"""Serves the web page from the command line."""

import asyncio
import errno
import os
import socket
import sys
from collections.abc import Iterable, Mapping
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, NamedTuple

from bgjob._postgres.event_loop import new_event_loop
from bgjob.errors import BgjobError

if TYPE_CHECKING:
    from bgjob.ext.web import WebApp

_LOCAL = ("localhost", "127.0.0.1", "::1")
_TRIED = 50
"""Ports that are tried after one that is taken."""


class Listen(NamedTuple):
    """Where the page is served."""

    host: str
    port: int
    """0 for any free one."""

    @property
    def is_local(self) -> bool:
        """Whether only this host can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return False


class PageError(BgjobError):
    """The page cannot be served."""


def check_extra() -> None:
    """Raise PageError unless the packages of the extra `web` are installed."""
    try:
        import jinja2  # noqa: F401, PLC0415 (an extra)
        import starlette  # noqa: F401, PLC0415
        import uvicorn  # noqa: F401, PLC0415
    except ImportError as error:
        raise PageError(
            f'the page needs the extra `web` ({error}): pip install "bgjob[web]"'
        ) from None


def serve(
    dsn: str | Mapping[str, str],
    *,
    listen: Listen,
    access: Any,
    hosts: Iterable[str] = (),
    takes_next: bool = False,
    **options: Any,
) -> None:
    """Serve the page until the process is told to end, and print its address.

    Args:
        dsn: the database; or several, by the names that they have on the page.
        listen: where to listen.
        access: who may do what; see create_app.
        hosts: more names under which the page is asked for.
        takes_next: whether another port may be taken if that one is in use.
        options: those of create_app.

    Raises:
        PageError: the address cannot be listened on.
        KeyboardInterrupt: Ctrl-C ended it.

    """
    import uvicorn  # noqa: PLC0415 (an extra)

    from bgjob.ext.web import TokenAccess, WebApps, create_app  # noqa: PLC0415

    names = {*_LOCAL, listen.host, socket.gethostname(), *hosts} - {""}
    root = options.pop("root_path", "")
    if isinstance(dsn, str):
        app: WebApp | WebApps = create_app(
            dsn, access=access, hosts=names, root_path=root, **options
        )
    else:
        apps = {
            name: create_app(each, access=access, hosts=names, **options)
            for name, each in dsn.items()
        }
        app = WebApps(apps, root_path=root)
    bound = _bound(listen, _TRIED if takes_next else 0)
    with bound:
        host, port = bound.getsockname()[:2]
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                lifespan="on",
                timeout_graceful_shutdown=5,
            )
        )
        shown = "127.0.0.1" if host in {"0.0.0.0", "::"} else host  # noqa: S104 (it is compared)
        shown = f"[{shown}]" if ":" in shown else shown
        query = f"?token={access.token}" if isinstance(access, TokenAccess) else ""
        sys.stdout.write(f"http://{shown}:{port}{root}/{query}\n")
        sys.stdout.flush()
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(server.serve(sockets=[bound]))


def _bound(listen: Listen, more: int) -> socket.socket:
    """Return a socket that listens, at one of the next ports if that one is taken."""
    for port in range(listen.port, listen.port + 1 + (more if listen.port else 0)):
        try:
            [info, *_] = socket.getaddrinfo(
                listen.host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
            family, kind, protocol, _, address = info
            bound = socket.socket(family, kind, protocol)
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                bound.bind(address)
                bound.listen(128)
            except BaseException:
                bound.close()
                raise
        except OSError as error:
            if error.errno == errno.EADDRINUSE and port < listen.port + more:
                continue
            raise PageError(
                f"cannot listen on {listen.host or 'all addresses'}, port {port}: "
                f"{error.strerror or error}"
            ) from None
        return bound
    raise AssertionError(listen)


def fixed_token(path: str | None) -> str | None:
    """Return the token of a file, or of BGJOB_WEB_TOKEN; None if neither is given."""
    if path is None:
        return os.environ.get("BGJOB_WEB_TOKEN") or None
    try:
        with open(path, encoding="utf-8") as file:  # noqa: PTH123
            return file.read().strip()
    except OSError as error:
        raise PageError(f"the file of the token, {path}: {error.strerror}") from None
