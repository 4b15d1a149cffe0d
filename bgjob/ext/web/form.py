"""The fields of a form, or of a JSON object that a program sends."""

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from urllib.parse import parse_qsl

import orjson
from starlette.exceptions import HTTPException

_MOST = 1100
"""Fields of a form."""

MOST_NUMBERS = 1000
"""Jobs that one action may name."""

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION = re.compile(r"(\d{1,6})([smhd])", re.ASCII)
_LONGEST = 500
_LONGEST_ADDRESS = 8000


@dataclass(frozen=True, slots=True)
class Form:
    """Fields by name, each with its values; a method raises 400 if a value is not what it says."""

    fields: dict[str, list[str]]

    def text(self, name: str, *, most: int = _LONGEST) -> str:
        """Return a field; empty if it is missing."""
        value = self.fields.get(name, [""])[-1].strip()
        if len(value) > most or "\0" in value:
            raise HTTPException(400, f"{name} must have at most {most} characters, and no NUL.")
        return value

    @property
    def back(self) -> str:
        """The address to go back to (`next`); empty without one."""
        return self.text("next", most=_LONGEST_ADDRESS)

    def needed(self, name: str) -> str:
        """Return a field that must not be empty."""
        value = self.text(name)
        if not value:
            raise HTTPException(400, f"{name} is required.")
        return value

    def integer(self, name: str, default: int | None = None) -> int:
        """Return a whole number."""
        value = self.text(name)
        if not value and default is not None:
            return default
        if not re.fullmatch(r"-?\d{1,18}", value, re.ASCII):
            raise HTTPException(400, f"{name} must be a whole number, not {value!r}.")
        return int(value)

    def number(self, name: str, default: float) -> float:
        """Return a number from 0."""
        value = self.text(name)
        if not value:
            return default
        if not re.fullmatch(r"\d{1,9}(\.\d{1,9})?", value, re.ASCII):
            raise HTTPException(400, f"{name} must be a number from 0, not {value!r}.")
        return float(value)

    def numbers(self, name: str) -> list[int]:
        """Return the numbers of jobs; none if the field is missing."""
        found = []
        for value in self.fields.get(name, []):
            if not re.fullmatch(r"\d{1,18}", value, re.ASCII):
                raise HTTPException(400, f"{name} must be numbers, not {value!r}.")
            found.append(int(value))
        if len(found) > MOST_NUMBERS:
            raise HTTPException(400, f"{name} may be at most {MOST_NUMBERS:,}.")
        return found

    def until(self) -> datetime | None:
        """Return the end of a pause: `until` (a time with offset), `for` (such as 15m), or None."""
        until, span = self.text("until"), self.text("for")
        if until:
            try:
                value = datetime.fromisoformat(until)
            except ValueError:
                raise HTTPException(400, f"until must be a time, not {until!r}.") from None
            return value if value.utcoffset() is not None else value.replace(tzinfo=UTC)
        if span:
            found = _DURATION.fullmatch(span)
            if found is None:
                raise HTTPException(400, f"for must be such as 15m, 2h or 1d, not {span!r}.")
            return datetime.now(UTC) + timedelta(seconds=int(found[1]) * _UNITS[found[2]])
        return None


def parsed(body: bytes, content_type: str) -> Form:
    """Return the fields of a body; raise 400 or 415 if it has none."""
    media = content_type.partition(";")[0].strip().lower()
    if not body:
        return Form({})
    if media == "application/x-www-form-urlencoded":
        try:
            pairs = parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=_MOST)
        except ValueError as error:
            raise HTTPException(400, f"The form cannot be read: {error}.") from None
        fields: dict[str, list[str]] = {}
        for name, value in pairs:
            fields.setdefault(name, []).append(value)
        return Form(fields)
    if media == "application/json":
        try:
            given = orjson.loads(body)
        except ValueError as error:
            raise HTTPException(400, f"The JSON cannot be read: {error}.") from None
        if not isinstance(given, dict):
            raise HTTPException(400, "The JSON must be an object, with a field for each value.")
        return Form({name: _values(value) for name, value in given.items() if value is not None})
    raise HTTPException(415, "Send a form (application/x-www-form-urlencoded) or JSON.")


def _values(value: object) -> list[str]:
    return [str(each) for each in value] if isinstance(value, list) else [str(value)]
