"""The values of a triage: groups of dead jobs."""

from dataclasses import dataclass
from datetime import datetime

from bgjob._failure import normalised


@dataclass(frozen=True, slots=True)
class DeadGroup:
    """Dead jobs that died in the same way.

    The worker that moves a job to the dead-letter table makes its fingerprint: of an exception
    from the job's type, the error's class, the module and function of the last frame of your own
    code, and the first line without quoted text, hashes and numbers; of another error from the
    type and that line.

    Attributes:
        fingerprint: 12 hexadecimal digits, for the filter `fingerprint`; 000000000000 for jobs
            that something else than bgjob has moved.
        jobs: how many they are; exact.
        queues: the queues of its latest 100 jobs, sorted.
        type: the job type of the latest.
        first: when the first died, by the database's clock.
        last: when the latest died.
        number: the number of the latest; for the filter `upto`.
        id: the id of the latest.
        error: the error of the latest: its first 2,000 characters.

    """

    fingerprint: str
    jobs: int
    queues: tuple[str, ...]
    type: str
    first: datetime
    last: datetime
    number: int
    id: str
    error: str

    @property
    def title(self) -> str:
        """The error's first line, with `<>` for quoted text and hashes, and `0` for numbers."""
        return normalised(self.error)
