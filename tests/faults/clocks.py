"""A worker process whose wall clock is off: `-m faults.clocks`, with SHIFT and PROGRAM.

It is a fork of a process that has imported everything, so the clock is replaced in every module
that has a name for it.
"""

import datetime
import importlib
import os
import sys
import time
from types import ModuleType
from typing import Any

from typing_extensions import override

_real_time, _real_time_ns = time.time, time.time_ns
_RealDatetime = datetime.datetime
_RealDate = datetime.date


class _AnyOfItsBase(type):
    """The type of a class whose instances are those of its base, as of the one it replaces."""

    @override
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, cls.__bases__[0])


def shift_clock(seconds: int) -> None:
    """Shift what this process learns of the wall clock through Python."""
    by = datetime.timedelta(seconds=seconds)

    class Shifted(_RealDatetime, metaclass=_AnyOfItsBase):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Any:
            return _RealDatetime.now(tz) + by

        @classmethod
        def utcnow(cls) -> Any:
            return _RealDatetime.utcnow() + by

        @classmethod
        def today(cls) -> Any:
            return cls.now()

    class ShiftedDate(_RealDate, metaclass=_AnyOfItsBase):
        @classmethod
        def today(cls) -> Any:
            return Shifted.now().date()

    replacements: dict[int, object] = {
        id(_real_time): lambda: _real_time() + seconds,
        id(_real_time_ns): lambda: _real_time_ns() + seconds * 10**9,
        id(_RealDatetime): Shifted,
        id(_RealDate): ShiftedDate,
    }
    for module in list(sys.modules.values()):
        if isinstance(module, ModuleType) and vars(module) is not globals():
            for name, value in list(vars(module).items()):
                if id(value) in replacements:
                    setattr(module, name, replacements[id(value)])


def main() -> None:
    """Run the `main` of the module that PROGRAM names, with a clock that is off by SHIFT seconds."""
    program = importlib.import_module(os.environ["PROGRAM"])
    shift_clock(int(os.environ["SHIFT"]))
    print("shifted by", round(time.time() - _real_time()), flush=True)
    program.main()


if __name__ == "__main__":
    main()
