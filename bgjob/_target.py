"""Loads what `package.module:name` stands for: a worker, or what makes one."""

import importlib
import inspect
import os
import sys
from collections.abc import Awaitable
from typing import Any, TypeAlias

from bgjob.errors import BgjobError
from bgjob.worker import AsyncWorker, Worker

AnyWorker: TypeAlias = Worker | AsyncWorker

_WANTED = "a Worker, an AsyncWorker, or a callable without arguments that returns one, is wanted"


class TargetError(BgjobError):
    """The target cannot be loaded; where the program's own code failed, the cause says how."""


def load(target: str) -> AnyWorker | Awaitable[Any]:
    """Import the target's module, and call the target if it is a factory.

    The current directory is put on the module path first.

    Returns:
        The worker; or, of a coroutine function, what is to be awaited on the
        worker's event loop and then given to `check`.

    Raises:
        TargetError: there is no such module or name, it is no worker, or the
            program's own code failed.

    """
    module_name, _, name = target.partition(":")
    here = os.getcwd()  # noqa: PTH109 (a string is needed)
    if sys.path[:1] != [here]:
        sys.path.insert(0, here)
    found = _attribute(_module(module_name), module_name, name)
    if isinstance(found, AnyWorker):
        return found
    if not callable(found) or not _can_be_called(found):
        what = "takes arguments" if callable(found) else f"is {_kind(found)}"
        raise TargetError(f"{target} {what}; {_WANTED}")
    try:
        made = found()
    except Exception as error:
        raise TargetError(f"{target} failed") from error
    return made if inspect.isawaitable(made) else check(made, target)


def check(made: object, target: str) -> AnyWorker:
    """Check what the factory made."""
    if not isinstance(made, AnyWorker):
        raise TargetError(f"{target} returned {_kind(made)}; {_WANTED}")
    return made


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise TargetError(f"importing {name} failed") from error
        raise TargetError(
            f"there is no module {error.name!r} in the current directory or elsewhere on the "
            "module path"
        ) from None
    except Exception as error:
        raise TargetError(f"importing {name} failed") from error


def _attribute(module: Any, module_name: str, name: str) -> Any:
    found, path = module, module_name
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise TargetError(f"there is no {part!r} in {path}") from None
        path += f".{part}"
    return found


def _can_be_called(found: Any) -> bool:
    try:
        inspect.signature(found).bind()
    except TypeError:
        return False
    except ValueError:  # it has no signature: calling it will tell
        return True
    return True


def _kind(found: object) -> str:
    if found is None:
        return "None"
    kind = type(found).__name__
    return f"{'an' if kind[:1] in 'AEIOUaeiou' else 'a'} {kind}"
