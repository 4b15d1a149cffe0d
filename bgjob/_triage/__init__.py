"""How are dead jobs tried again? One first, then the rest.

    canary   one of a group, and how it ends
    rest     the others, in batches, with a rate and a brake
    died_on  the workers on which they died

The first two are generators. A step is a statement, which they get the answer to, or a Pause;
each statement is a transaction of its own. They keep nothing but what the tables have: a program
that ends in between leaves each job either dead or in its queue.

How a canary ends is told by its rows alone, because a worker of any version may have it:

    no row, in either table            completed
    dead, with a greater number        it died again
    live, an attempt, no token         it failed, and will be retried
    live, no attempt, another time     it was rescheduled; one that a worker gave back unstarted
                                       keeps its time
"""

from collections.abc import Generator
from typing import Any, NamedTuple, TypeAlias, TypeVar

from bgjob._sql.statement import Statement

T = TypeVar("T")


class Pause(NamedTuple):
    """A step that waits."""

    seconds: float


Steps: TypeAlias = Generator[Statement[Any] | Pause, Any, T]
