"""Loads `package.module:name`: workers, or a callable or Mux that makes them; or its parts."""

import importlib
import inspect
import os
import sys
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from typing_extensions import TypeIs

from bgjob._cli import database
from bgjob.client import Client
from bgjob.errors import BgjobError
from bgjob.minutes import Minutes
from bgjob.mux import Mux
from bgjob.schedule import Schedule
from bgjob.worker import AsyncWorker, Worker

AnyWorker: TypeAlias = Worker | AsyncWorker

_WANTED = (
    "name a Mux, a Worker, an AsyncWorker, a list of workers, or a callable that returns a worker "
    "or a list"
)


class TargetError(BgjobError):
    """The target cannot be loaded; the cause is the error of the program's own code."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The worker options of the command line; None if not given.

    Attributes:
        dsn: the database.
        queues: the queues, each with its number of slots or None.
        concurrency: the slots of queues without a number of their own.
        minutes: the service of a worker that has none such.

    """

    dsn: str | None = None
    queues: dict[str, int | None] | None = None
    concurrency: int | None = None
    minutes: Minutes | None = None

    def arguments(self) -> dict[str, object]:
        """Return the given options as arguments of a factory."""
        chosen = {"dsn": self.dsn, "queues": self.numbers(), "concurrency": self.concurrency}
        return {name: value for name, value in chosen.items() if value is not None}

    def numbers(self) -> dict[str, int] | None:
        """Return the slots of each queue: 1 if not given, as for a Worker."""
        if self.queues is None:
            return None
        return {queue: n or self.concurrency or 1 for queue, n in self.queues.items()}


_IMPORTING = (
    __file__,
    importlib.__file__,
    "<frozen importlib._bootstrap>",
    "<frozen importlib._bootstrap_external>",
)
"""The files of the frames between `load` and the program."""

_OPTIONS = {"dsn": "--dsn", "queues": "--queue", "concurrency": "--concurrency"}


def load(target: str, choice: Choice) -> Sequence[AnyWorker] | Awaitable[Any]:
    """Import the target's module, and make workers of the target.

    The current directory is put on the module path first. A Mux gets a Worker,
    on the queues and the database of the command line. A factory receives the
    options of the command line in parameters named `dsn`, `queues`, `concurrency`.

    Returns:
        The workers, mostly one; or, for a coroutine function, an awaitable for the
        event loop of the workers, whose value goes to `check`.

    Raises:
        TargetError: there is no such module or name, it is not a worker or a way to
            make one, it does not accept an option of the command line, or the
            program's own code failed.
        DatabaseError: no database is given.

    """
    found = _find(target)
    if isinstance(found, Mux):
        return [_of_mux(found, target, choice)]
    if isinstance(found, AnyWorker) or _is_several(found):
        if given := choice.arguments():
            options = " and ".join(_OPTIONS[name] for name in given)
            raise TargetError(
                f"{target} is {_kind(found)}, which {options} cannot change; name a Mux, or a "
                f"callable that takes {' and '.join(given)} and returns a worker"
            )
        return check(found, target, "is")
    if not callable(found):
        raise TargetError(f"{target} is {_kind(found)}; {_WANTED}")
    arguments = _arguments(found, target, choice)
    try:
        made = found(**arguments)
    except Exception as error:
        raise TargetError(f"{target} failed") from error
    return made if inspect.isawaitable(made) else check(made, target)


def _of_mux(mux: Mux, target: str, choice: Choice) -> Worker:
    queues = choice.numbers()
    if queues is None:
        raise TargetError(f"{target} is a Mux: name the queues to work on with --queue NAME[=N]")
    return Worker(Client(database.find(choice.dsn)), queues, mux)


def _arguments(factory: Any, target: str, choice: Choice) -> dict[str, object]:
    """Return a factory's arguments: all options of the command line, which it must accept."""
    given = choice.arguments()
    try:
        signature = inspect.signature(factory)
    except ValueError:  # a builtin without a signature: the call will show
        return given
    needed = {
        name
        for name, parameter in signature.parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind in {parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY}
    }
    if "dsn" in needed - given.keys():
        given["dsn"] = database.find(None)
    if lacking := sorted(needed & _OPTIONS.keys() - given.keys()):
        raise TargetError(f"{target} needs {' and '.join(_OPTIONS[name] for name in lacking)}")
    try:
        signature.bind(**given)
    except TypeError as error:
        if refused := given.keys() - signature.parameters.keys():
            options = " and ".join(_OPTIONS[name] for name in sorted(refused))
            raise TargetError(
                f"{target} does not accept {options}: it has no parameter "
                f"{' and '.join(sorted(refused))}"
            ) from None
        raise TargetError(
            f"{target} cannot be called: {error}; the command line can pass {', '.join(_OPTIONS)}"
        ) from None
    return given


def load_mux(target: str) -> Mux:
    """Import the target's module, and return its Mux; nothing is called.

    Raises:
        TargetError: there is no such module or name, it is not a Mux, or importing it failed.

    """
    found = _find(target)
    if isinstance(found, Mux):
        return found
    raise TargetError(
        f"{target} is {_kind(found)}; name the Mux itself, which no worker has to run"
    )


def load_schedules(target: str) -> list[Schedule]:
    """Import the target's module, and return its schedules; nothing is called.

    Raises:
        TargetError: there is no such module or name, or it does not hold schedules.

    """
    found = _find(target)
    schedules: list[Any] = [*found] if isinstance(found, Iterable) else [None]
    if all(isinstance(schedule, Schedule) for schedule in schedules):
        return schedules
    raise TargetError(f"{target} is {_kind(found)}; name a Schedules, or a list of Schedule values")


def _find(target: str) -> Any:
    """Import the target's module, with the current directory first on the module path."""
    module_name, _, name = target.partition(":")
    here = os.getcwd()  # noqa: PTH109 (a string is needed)
    if sys.path[:1] != [here]:
        sys.path.insert(0, here)
    return _attribute(_module(module_name), module_name, name)


def check(made: object, target: str, how: str = "returned") -> Sequence[AnyWorker]:
    """Return the workers that a target is or made; raise TargetError unless they are workers."""
    if isinstance(made, AnyWorker):
        return [made]
    if not _is_several(made):
        raise TargetError(f"{target} {how} {_kind(made)}; {_WANTED}")
    workers: list[Any] = [*made]
    if not workers:
        raise TargetError(f"{target} {how} {_kind(made)} without a worker; {_WANTED}")
    for number, worker in enumerate(workers, 1):
        if not isinstance(worker, AnyWorker):
            raise TargetError(
                f"{target} {how} {_kind(made)} whose item {number} is {_kind(worker)}: it must be "
                "a Worker or an AsyncWorker"
            )
        if any(worker is other for other in workers[: number - 1]):
            raise TargetError(f"{target} {how} {_kind(made)} that has item {number} twice")
    return workers


def _is_several(found: object) -> TypeIs[Iterable[Any]]:
    return isinstance(found, Iterable) and not isinstance(found, str | bytes | Mapping)


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise TargetError(f"importing {name} failed") from _own_part(error)
        raise TargetError(
            f"there is no module {error.name!r} in the current directory or elsewhere on the "
            "module path"
        ) from None
    except Exception as error:
        raise TargetError(f"importing {name} failed") from _own_part(error)


def _own_part(error: Exception) -> Exception:
    """Leave out of a traceback how the program was imported."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_frame.f_code.co_filename in _IMPORTING:
        traceback = traceback.tb_next
    return error.with_traceback(traceback)


def _attribute(module: Any, module_name: str, name: str) -> Any:
    found, path = module, module_name
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise TargetError(f"there is no {part!r} in {path}") from None
        path += f".{part}"
    return found


def _kind(found: object) -> str:
    if found is None:
        return "None"
    kind = type(found).__name__
    return f"{'an' if kind[:1] in 'AEIOUaeiou' else 'a'} {kind}"
