"""The setting BGJOB: what `manage.py bgjob worker` runs."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.utils.module_loading import import_string

from bgjob._checks import seconds
from bgjob.job import check_name

_KEYS = (
    "QUEUES",
    "CONCURRENCY",
    "PROCESSES",
    "GRACE",
    "UNKNOWN_FOR",
    "MIDDLEWARE",
    "ON_ENQUEUE",
    "WORKER",
)

_OF_WORKER = (
    "init_timeout",
    "lease",
    "notify",
    "observer",
    "poll_interval",
    "registry",
    "release",
    "services",
    "state",
)
"""The options of Worker that are left to WORKER."""


class Options(NamedTuple):
    """The setting, with its defaults."""

    queues: dict[str, int | None]
    concurrency: int
    processes: int
    grace: float
    unknown_for: float | None
    middleware: tuple[str, ...]
    worker: Mapping[str, Any]


def options() -> Options:
    """Return the setting; raise ImproperlyConfigured if it is wrong."""
    if found := problems():
        raise ImproperlyConfigured("; ".join(text for _, text in found))
    given = getattr(settings, "BGJOB", {})
    return Options(
        _queues(given.get("QUEUES", ())),
        given.get("CONCURRENCY", 1),
        given.get("PROCESSES", 1),
        seconds(given.get("GRACE", 30.0), "BGJOB['GRACE']"),
        seconds(given["UNKNOWN_FOR"], "UNKNOWN_FOR") if "UNKNOWN_FOR" in given else None,
        tuple(given.get("MIDDLEWARE", ())),
        given.get("WORKER", {}),
    )


def on_enqueue() -> tuple[Any, ...]:
    """Return what wraps each enqueue, the outermost first."""
    paths = getattr(settings, "BGJOB", {}).get("ON_ENQUEUE", ())
    return tuple(map(import_string, paths)) if paths else ()


def problems() -> list[tuple[str, str]]:
    """List what is wrong with the setting, each with the number of its kind."""
    given = getattr(settings, "BGJOB", {})
    if not isinstance(given, Mapping):
        return [("E001", f"BGJOB must be a dict, not {type(given).__name__}")]
    found = [("E002", text) for text in _unknown("BGJOB", given, _KEYS)]
    checks = {
        "QUEUES": _queues,
        "CONCURRENCY": _count,
        "PROCESSES": _count,
        "GRACE": lambda value: seconds(value, "it"),
        "UNKNOWN_FOR": lambda value: seconds(value, "it"),
        "MIDDLEWARE": _paths,
        "ON_ENQUEUE": _paths,
    }
    for key, check in checks.items():
        if key in given:
            try:
                check(given[key])
            except (TypeError, ValueError) as error:
                found.append(("E003", f"BGJOB[{key!r}]: {error}"))
    worker = given.get("WORKER", {})
    if not isinstance(worker, Mapping):
        return [*found, ("E003", "BGJOB['WORKER'] must be a dict of options of bgjob.Worker")]
    found += [("E002", text) for text in _unknown("BGJOB['WORKER']", worker, _OF_WORKER)]
    return found


def imported(value: Any) -> Any:
    """Return a value of WORKER: what a dotted path names, each of a list, or the value."""
    if isinstance(value, str):
        return import_string(value)
    return [imported(each) for each in value] if isinstance(value, list | tuple) else value


def _unknown(name: str, given: Mapping[Any, Any], known: Iterable[str]) -> list[str]:
    texts = []
    for key in given:
        if key not in known:
            close = get_close_matches(str(key), known, n=1, cutoff=0.6)
            remedy = f"did you mean {close[0]!r}?" if close else f"the keys are {', '.join(known)}"
            texts.append(f"{name} has no key {key!r}: {remedy}")
    return texts


def _queues(value: Any) -> dict[str, int | None]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError("a list of queues, or a dict from queues to slots, is needed")
    slots = dict(value) if isinstance(value, Mapping) else dict.fromkeys(value)
    for queue, number in slots.items():
        check_name("queue", queue)
        if number is not None:
            _count(number)
    return slots


def _count(value: Any) -> None:
    if type(value) is not int or value < 1:
        raise ValueError(f"a whole number from 1 is needed, not {value!r}")


def _paths(value: Any) -> None:
    if isinstance(value, str) or not all(isinstance(path, str) for path in value):
        raise TypeError("a list of dotted paths is needed")
    for path in value:
        try:
            import_string(path)
        except ImportError as error:
            raise ValueError(str(error)) from None
