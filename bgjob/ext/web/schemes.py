"""Ways to know the user: a token, a proxy's header, or no one asks; and `users` has another one.

A host program with users of its own passes a function instead.
"""

import hashlib
import hmac
import secrets
import time
from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import ClassVar

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from bgjob.ext.web.access import Access, check_permissions
from bgjob.ext.web.frame import PERMISSIONS, Permission

_BYTES = 24
_SHORTEST = 16
"""Characters of a fixed token."""

_SESSION = 12 * 3600
"""Seconds after which a browser has to show its token again."""


class Proxies:
    """The addresses of reverse proxies, whose headers count.

    Args:
        networks: such as "127.0.0.1/32".

    Raises:
        ValueError: an invalid network.

    """

    def __init__(self, networks: Iterable[str]) -> None:
        self._networks: list[IPv4Network | IPv6Network] = [ip_network(text) for text in networks]

    def __bool__(self) -> bool:
        return bool(self._networks)

    def trusts(self, request: Request) -> bool:
        """Whether a request came from one of them."""
        try:
            peer = ip_address(request.client.host if request.client else "")
        except ValueError:
            return False
        return any(peer in network for network in self._networks)


class Anyone:
    """Everybody may do everything, or what the permissions say; for a loopback address only."""

    challenge: ClassVar[dict[str, str]] = {}

    def __init__(self, permissions: AbstractSet[Permission] = PERMISSIONS) -> None:
        check_permissions(permissions)
        self._access = Access("", permissions)

    def __call__(self, request: Request) -> Access | None:  # noqa: ARG002 (nothing is asked)
        """Return the permissions."""
        return self._access


class TokenAccess:
    """A secret token, once in the address or in each `Authorization: Bearer`.

    The first visit with `?token=` sets a cookie for 12 hours, and leads to the same address
    without it. Browsers send the cookie with no request that another site makes.

    Attributes:
        token: the token; by default a new one of 24 random bytes.

    """

    challenge: ClassVar[dict[str, str]] = {"www-authenticate": "Bearer"}
    advice = "Open the address with its token again: a browser keeps it for 12 hours."

    def __init__(
        self, token: str | None = None, *, permissions: AbstractSet[Permission] = PERMISSIONS
    ) -> None:
        if token is not None and len(token) < _SHORTEST:
            raise ValueError(f"a token must have at least {_SHORTEST} characters: it is a password")
        check_permissions(permissions)
        self.token = token or secrets.token_urlsafe(_BYTES)
        self._access = Access("", permissions)
        # Cookies ignore ports: two pages of one host must not take each other's.
        self._name = f"bgjob-{hashlib.sha256(self.token.encode()).hexdigest()[:8]}"

    def __call__(self, request: Request) -> Access | None:
        """Return the permissions if the request has the token, or its cookie."""
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            return self._access if self._is_token(given.strip()) else None
        value = request.cookies.get(self._cookie(request))
        return self._access if value is not None and self._is_session(value) else None

    def arrive(self, request: Request) -> Response | None:
        """Exchange the token in the address for a cookie; None if there is none."""
        given = request.query_params.get("token")
        if given is None or request.method != "GET" or not self._is_token(given):
            return None
        url = request.url.remove_query_params("token")
        target = url.path + (f"?{url.query}" if url.query else "")
        response = RedirectResponse("/" + target.lstrip("/"), status_code=303)
        response.set_cookie(
            self._cookie(request),
            self._session(int(time.time()) + _SESSION),
            max_age=_SESSION,
            path="/",
            secure=request.url.scheme == "https",
            httponly=True,
            samesite="strict",
        )
        return response

    def _cookie(self, request: Request) -> str:
        return f"__Host-{self._name}" if request.url.scheme == "https" else self._name

    def _session(self, until: int) -> str:
        proof = hmac.new(self.token.encode(), str(until).encode(), "sha256").hexdigest()
        return f"{until}.{proof}"

    def _is_session(self, value: str) -> bool:
        until, _, _ = value.partition(".")
        if not (until.isascii() and until.isdecimal() and len(until) <= 12):  # noqa: PLR2004
            return False
        is_ours = hmac.compare_digest(value.encode(), self._session(int(until)).encode())
        return is_ours and int(until) > time.time()

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self.token.encode())


class ProxyAccess:
    """A reverse proxy has signed the user in, and names it in a header.

    Args:
        header: the header's name, such as "X-Forwarded-User". The proxy must remove it from
            what browsers send.
        trust: the addresses of the proxy, such as "127.0.0.1/32"; from others the header
            counts for nothing.
        permissions: what each user may do; all by default.

    Raises:
        ValueError: an invalid network, or none.

    """

    challenge: ClassVar[dict[str, str]] = {}

    def __init__(
        self,
        header: str,
        trust: Iterable[str],
        *,
        permissions: AbstractSet[Permission] = PERMISSIONS,
    ) -> None:
        check_permissions(permissions)
        self._header = header
        self._proxies = Proxies(trust)
        if not self._proxies:
            raise ValueError("trust is required: the addresses of the proxy, such as 127.0.0.1/32")
        self._permissions = permissions

    def __call__(self, request: Request) -> Access | None:
        """Return the permissions of the user that a trusted proxy names."""
        user = request.headers.get(self._header, "")
        is_trusted = self._proxies.trusts(request)
        return Access(user, self._permissions) if user and is_trusted else None
