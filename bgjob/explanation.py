"""The reasons of `client.explain()` and `bgjob explain`: why a job does not run."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, TypeAlias

JobState: TypeAlias = Literal["running", "due", "delayed", "dead", "completed", "absent", "empty"]
"""`running`: a worker holds it. `due`: its time has come; it may wait for a key. `delayed`: it has
not. `dead`: it is in the dead-letter table. `completed`: it was, and jobs of its type are kept.
`absent`: there is no such job. `empty`: a queue was asked about, and none of its jobs is due."""


@dataclass(frozen=True, slots=True)
class Reason:
    """One reason why a job does not run, or what it does instead.

    Attributes:
        code: which reason it is, such as `paused`. The operations guide lists them.
        blocks: whether the job waits for somebody to act; False if it only needs time.
        text: the reason in sentences, with times and names.
        remedy: what to do: a command, SQL, or a sentence. Empty only if nothing is to do.
        facts: the values behind the text, such as `until`, for programs. What is in it
            depends on the code.

    """

    code: str
    blocks: bool
    text: str
    remedy: str = ""
    facts: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.blocks and not self.remedy:
            raise ValueError(f"remedy of {self.code} is required: {self.text}")


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a job does not run: all reasons that hold, in the order in which they matter.

    The others say what the job waits for next, once the first one is lifted.

    Attributes:
        id: the job's id; None if a queue was asked about that has no due job.
        queue: its queue; None if there is no such job.
        state: `running`, `due`, `delayed`, `dead`, `completed`, `absent` or `empty`.
        now: when the job was looked at, by the database's clock.
        reasons: the reasons, at least one.

    """

    id: str | None
    queue: str | None
    state: JobState
    now: datetime
    reasons: tuple[Reason, ...]

    @property
    def status(self) -> int:
        """The exit status of `bgjob explain`.

        4 if there is no such job, 3 if a reason blocks it until somebody acts, 0 if it runs, is
        ready, or only needs time.
        """
        if self.state == "absent":
            return 4
        return 3 if any(reason.blocks for reason in self.reasons) else 0

    def as_json(self) -> dict[str, object]:
        """Return a dict for JSON; the facts of a reason are beside its text."""
        return {
            "id": self.id,
            "queue": self.queue,
            "state": self.state,
            "now": self.now,
            "reasons": [
                {
                    "code": reason.code,
                    "blocks": reason.blocks,
                    "text": reason.text,
                    "remedy": reason.remedy,
                    **reason.facts,
                }
                for reason in self.reasons
            ],
        }
