"""What was done, told on the next page: a signed cookie that is shown once."""

import base64
import binascii
import hmac

import orjson
from starlette.requests import Request
from starlette.responses import Response

_COOKIE = "bgjob-notice"
_LASTS = 30
_LONGEST = 300
"""Characters: a browser drops a cookie of over 4,096 bytes."""


def give(response: Response, request: Request, key: bytes, text: str, *, is_wrong: bool) -> None:
    """Have the next page show a text."""
    content = orjson.dumps([text[:_LONGEST], is_wrong])
    value = base64.urlsafe_b64encode(_proof(key, content) + content).decode()
    response.set_cookie(
        _COOKIE,
        value,
        max_age=_LASTS,
        path=_path(request),
        secure=request.url.scheme == "https",
        httponly=True,
        samesite="strict",
    )


def take(request: Request, key: bytes) -> tuple[str, bool] | None:
    """Return the text to show, and whether it tells that something was not done."""
    value = request.cookies.get(_COOKIE)
    if not value:
        return None
    try:
        raw = base64.urlsafe_b64decode(value)
    except (binascii.Error, ValueError):
        return None
    proof, content = raw[:32], raw[32:]
    if not hmac.compare_digest(proof, _proof(key, content)):
        return None
    text, is_wrong = orjson.loads(content)
    return text, is_wrong


def clear(response: Response, request: Request) -> None:
    """Show it no more."""
    response.delete_cookie(_COOKIE, path=_path(request), httponly=True, samesite="strict")


def _path(request: Request) -> str:
    root: str = request.scope.get("root_path", "")
    return root or "/"


def _proof(key: bytes, content: bytes) -> bytes:
    return hmac.digest(key, content, "sha256")
