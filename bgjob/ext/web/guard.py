"""What every request has to pass, and what every answer gets, whatever it is.

In this order: the headers, the host, the size, who it is, and for a write where it comes from.
"""

import hmac
from collections.abc import Iterable, Mapping
from inspect import isawaitable
from ipaddress import ip_address
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Message, Scope, Send

from bgjob.ext.web.access import Access, Check
from bgjob.ext.web.schemes import Proxies

LARGEST = 64 * 1024
"""The most bytes of a request's body."""

SAFE = frozenset({"GET", "HEAD"})
METHODS = SAFE | {"POST"}

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types bgjob"
)

HEADERS: Mapping[str, str] = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "x-frame-options": "DENY",
}
"""On every answer, also on errors; and `cache-control: no-store`, unless a page says better."""


def guarded(scope: Scope, send: Send) -> Send:
    """Return a `send` that adds the headers, and leaves out the body of a HEAD."""
    is_head = scope["method"] == "HEAD"

    async def send_guarded(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(raw=list(message.get("headers", [])))
            headers.update(HEADERS)
            headers.setdefault("cache-control", "no-store")
            message = {**message, "headers": headers.raw}
        elif is_head and message["type"] == "http.response.body":
            message = {**message, "body": b""}
        await send(message)

    return send_guarded


def check_host(request: Request, hosts: frozenset[str] | None) -> None:
    """Raise 421 unless the request is for one of these hosts.

    A page of another site can have its own name resolve to this address, and would then be of the
    same origin for a browser. An address itself is not a name that another site can have.
    """
    if hosts is None:
        return
    name = host_name(request.headers.get("host", ""))
    if name not in hosts and not _is_address(name):
        raise HTTPException(421, f"This page is not served as {name!r}.")


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def host_name(host: str) -> str:
    """Return the name in a Host header, without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower().rstrip(".")


async def body_of(request: Request) -> bytes:
    """Read the body; raise 413 if it is too large."""
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > LARGEST:
        raise HTTPException(413, f"A request may have {LARGEST:,} bytes.")
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > LARGEST:
            raise HTTPException(413, f"A request may have {LARGEST:,} bytes.")
    return body


async def access_of(request: Request, check: Check) -> Access | None:
    """Return what the user of a request may do; None if the user is not known."""
    found: Any = check(request)
    if isawaitable(found):
        found = await found
    if found is not None and not isinstance(found, Access):
        raise TypeError(f"access must return an Access or None, not {type(found).__name__}")
    return found


def check_origin(request: Request) -> None:
    """Raise 403 unless a write comes from a page of ours, or from a program.

    A browser says where a request comes from, and a page cannot change that: in Sec-Fetch-Site,
    or over plain HTTP in Origin. SameSite cookies alone would not do: another port of the host is
    the same site. A program says neither, and sends a Bearer token, which no browser adds by
    itself.
    """
    headers = request.headers
    site = headers.get("sec-fetch-site")
    if site is not None:
        if site == "same-origin":
            return
        raise HTTPException(403, f"This request comes from another site ({site}).")
    origin, host = headers.get("origin"), headers.get("host", "")
    if origin is None:
        if headers.get("authorization", "").lower().startswith("bearer "):
            return
        raise HTTPException(403, "This request does not say from where it comes.")
    ours = [f"{scheme}://{host}" for scheme in {request.url.scheme, "https"}]
    if not any(hmac.compare_digest(origin.encode(), our.encode()) for our in ours):
        raise HTTPException(403, f"This request comes from another origin ({origin}).")


def with_scheme(scope: Scope, proxies: Proxies) -> Scope:
    """Return the scope with the scheme that a trusted proxy names: it ends the browser's TLS."""
    request = Request(scope)
    is_tls = request.headers.get("x-forwarded-proto", "").lower() == "https"
    return {**scope, "scheme": "https"} if is_tls and proxies.trusts(request) else scope


def with_root(scope: Scope, root: str) -> Scope:
    """Return the scope with the prefix under which a proxy shows the page.

    It may have removed the prefix from the path, or not.
    """
    if not root:
        return scope
    path: str = scope["path"]
    root_path = scope.get("root_path", "") + root
    if path != root_path and not path.startswith(root_path + "/"):
        path = root_path + path.removeprefix(scope.get("root_path", ""))
    return {**scope, "root_path": root_path, "path": path}


def hosts_of(names: Iterable[str]) -> frozenset[str]:
    """Return host names as they are compared."""
    return frozenset(host_name(name) for name in names)
