"""Payloads in the output of commands."""

from base64 import b64encode

import orjson


def as_text(arg: bytes | None) -> str:
    """Return a payload for people: JSON as it is, other bytes in Python's notation."""
    if arg is None or _is_json(arg):
        return (arg or b"").decode()
    return repr(arg)


def as_json(arg: bytes | None) -> object:
    """Return a payload for orjson: JSON as it is, other bytes in base64."""
    if arg is None:
        return None
    if _is_json(arg):
        return orjson.Fragment(arg)
    return {"base64": b64encode(arg).decode()}


def _is_json(arg: bytes) -> bool:
    try:
        orjson.loads(arg)
    except ValueError:
        return False
    return True
