"""A file of users with passwords."""

import asyncio
import base64
import binascii
import hashlib
import hmac
import secrets
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

from starlette.requests import Request

from bgjob.errors import BgjobError
from bgjob.ext.web.access import Access, check_permissions

_N, _R, _P = 1 << 14, 8, 1
"""scrypt's cost: 16 MB, and 30 to 60 ms of a core."""

_AT_ONCE = 2
"""Passwords that are checked at the same time."""

_MOST_KNOWN = 1000
"""Passwords that need not be checked again."""


class UsersAccess:
    """A file of users: on each line `NAME:PASSWORD:PERMISSION,…`, as `bgjob web --hash` makes it.

    It is read again when it changes. Browsers ask for the password (HTTP Basic), so use TLS.

    Args:
        path: the file.

    Raises:
        UsersError: a line is invalid; the text names its number.
        OSError: the file cannot be read.

    """

    challenge: ClassVar[dict[str, str]] = {
        "www-authenticate": 'Basic realm="bgjob", charset="UTF-8"'
    }

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._key = secrets.token_bytes(32)
        self._known: dict[bytes, str] = {}
        self._threads = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="bgjob-web-password")
        self._stamp: tuple[int, int] | None = None
        self._users: dict[str, tuple[str, frozenset[str]]] = {}
        self._read()

    async def __call__(self, request: Request) -> Access | None:
        """Return the permissions of the user whose password the request has."""
        self._read()
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "basic":
            return None
        try:
            name, colon, password = base64.b64decode(given, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            return None
        # For an unknown user a password is checked all the same: it takes as long.
        stored, permissions = self._users.get(name, (_NO_PASSWORD, frozenset[str]()))
        proof = hmac.digest(self._key, f"{stored}\0{name}\0{password}".encode(), "sha256")
        if self._known.get(proof) != name:
            loop = asyncio.get_running_loop()
            is_right = await loop.run_in_executor(self._threads, _is_password, password, stored)
            if not (colon and is_right and name in self._users):
                return None
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            self._known[proof] = name
        return Access(name, permissions)  # type: ignore[arg-type]  # checked when it was read

    def _read(self) -> None:
        stat = self._path.stat()
        stamp = (stat.st_mtime_ns, stat.st_size)
        if stamp != self._stamp:
            self._users = _users(self._path.read_text(encoding="utf-8"))
            self._stamp = stamp
            self._known.clear()


class UsersError(BgjobError):
    """A line of the file of users is invalid."""


def _users(text: str) -> dict[str, tuple[str, frozenset[str]]]:
    users = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, *rest = line.split(":")
        permissions = frozenset(rest[1].replace(" ", "").split(",")) if len(rest) == 2 else None  # noqa: PLR2004
        if not name or permissions is None or not rest[0].startswith("scrypt$"):
            raise UsersError(
                f"line {number} of the file of users is not NAME:scrypt$…:PERMISSION,…: make one "
                "with bgjob web --hash"
            )
        try:
            check_permissions(permissions)
        except ValueError as error:
            raise UsersError(f"line {number} of the file of users: {error}") from None
        users[name] = (rest[0], permissions)
    return users


def hashed(password: str, *, salt: bytes | None = None) -> str:
    """Return what is stored of a password."""
    salt = secrets.token_bytes(16) if salt is None else salt
    return f"scrypt${_N}${_R}${_P}${salt.hex()}${_scrypt(password, salt, _N, _R, _P).hex()}"


def _scrypt(password: str, salt: bytes, n: int, r: int, p: int) -> bytes:
    return hashlib.scrypt(password.encode(), salt=salt, n=n, r=r, p=p, maxmem=1 << 27, dklen=32)


def _is_password(password: str, stored: str) -> bool:
    try:
        _, n, r, p, salt, digest = stored.split("$")
        found = _scrypt(password, bytes.fromhex(salt), int(n), int(r), int(p))
        return hmac.compare_digest(found, bytes.fromhex(digest))
    except ValueError:  # it was written by hand
        return False


_NO_PASSWORD = f"scrypt${_N}${_R}${_P}${'00' * 16}${'00' * 32}"
