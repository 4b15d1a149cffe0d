"""How a job ended: it is settled already, or its result is yet to be stored."""

from dataclasses import dataclass
from typing import TypeAlias

from bgjob._engine.outcome import Committed, CommitUnknown, Fenced
from bgjob.result import Result


@dataclass(frozen=True, slots=True)
class NotBegun:
    """The handler was not entered: no transaction could be opened, or its caller has gone."""

    error: BaseException


Ending: TypeAlias = Result | Committed | CommitUnknown | Fenced | NotBegun
"""How a job ended: settled already, or a result to store."""
