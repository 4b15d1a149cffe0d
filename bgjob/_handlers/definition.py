"""Whether two functions, or two classes, come from one definition that was executed twice.

A definition is executed again when a cell of a notebook or a module is run again, or when a
module is imported under two names: `python -m app.jobs` runs it as `__main__`, and a module that
needs it imports it as `app.jobs`.
"""

import os
import sys
from typing import NamedTuple


class Definition(NamedTuple):
    """Where a function or a class was defined."""

    module: str
    name: str
    """The qualified name."""
    code: object
    """Of a lambda, whose name says nothing; None for others."""

    def is_again(self, other: "Definition") -> bool:
        """Whether this is the same definition, executed again."""
        if (self.name, self.code) != (other.name, other.code):
            return False
        if self.module == other.module:
            return True
        file = _file_of(self.module)
        return file is not None and file == _file_of(other.module)

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


def definition_of(defined: object) -> Definition | None:
    """Return where a function or a class was defined; None for what has no name of its own.

    That is an object with a method `__call__`, a partial, and a function that was made by a call
    of another one: two of them may differ in what they hold.
    """
    module = getattr(defined, "__module__", None)
    name = getattr(defined, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(name, str) or "<locals>" in name:
        return None
    is_lambda = name.endswith("<lambda>")
    return Definition(module, name, getattr(defined, "__code__", None) if is_lambda else None)


def is_again(defined: object, before: object) -> bool:
    """Whether a function or a class is the same as one before, or its definition run again."""
    new, old = definition_of(defined), definition_of(before)
    return new is not None and old is not None and new.is_again(old)


def told_again(job_type: str, handler: object, before: object) -> str:
    """Return the text of the warning that a handler takes the place of the one before."""
    new, old = definition_of(handler), definition_of(before)
    assert new is not None and old is not None  # noqa: S101, PT018 (`is_again`)
    if new.module == old.module:
        how = f"{new} was registered again, and takes the place of the one before"
    else:
        how = (
            f"the module {new.module} was imported under a second name, {old.module}: its "
            f"{new.name} takes the place of {old}"
        )
    return f"job type {job_type!r}: {how}; a worker that runs keeps the one that it began with"


def _file_of(module: str) -> str | None:
    file = getattr(sys.modules.get(module), "__file__", None)
    return os.path.realpath(file) if isinstance(file, str) else None
