"""The token of a claim: a number that tells when the claim was made, and by which worker.

    bits 62 to 21                    bit 20              bits 19 to 0
    milliseconds since 2020, UTC     0: a worker's row   its number, modulo 2**20
                                     1: no row           random

So neither needs a column of bgjob_job, or a byte of WAL. The time is that of the database, as
well as the maker knows it. It decides nothing: due times and the ends of leases are
decided by the database's clock alone.

A fence needs tokens that differ from one another. Those of one maker increase, also when the
clock is set back. Those of two workers differ in their number; without one, they are the same
for two of a million claims in the same millisecond.
"""

import threading
from datetime import UTC, datetime, timedelta
from secrets import randbits
from typing import LiteralString, NamedTuple

EPOCH = datetime(2020, 1, 1, tzinfo=UTC)
"""The time of a token's first millisecond."""

_SHIFT = 21
NUMBERS = 1 << 20
"""A token has the number of its worker modulo this."""
_NO_NUMBER = NUMBERS
_EPOCH = EPOCH.timestamp()
_END = 1 << 41
"""Milliseconds until September 2089; a clock that is later is wrong."""

MADE_AT: LiteralString = "to_timestamp(({0} >> 21) / 1000.0 + 1577836800)"
"""The time of a token (0)."""

NUMBER: LiteralString = "case when {0} & 1048576 = 0 then ({0} & 1048575)::integer end"
"""The number in a token (0), as in Origin."""

# The divisor is a prime, so that claims at equal intervals, by a worker with an even number,
# do not make the same choice each time.
CHOICE: LiteralString = "mod({0}::bigint, 999983)"
"""A number that is as good as random, made from a token (0)."""


class Origin(NamedTuple):
    """When a claim was made, and by whom."""

    at: datetime
    """The time, to the millisecond."""
    number: int | None
    """The number of the worker's row, modulo 2**20; None if the maker had no row."""


class Tokens:
    """Makes the tokens of one maker, which may be several threads."""

    def __init__(self) -> None:
        self.number: int | None = None
        """The number of the worker's row, once it has one."""
        self._last = -1  # the milliseconds of the last token
        self.renew()

    def renew(self) -> None:
        """Forget who was making a token, after a fork."""
        self._lock = threading.Lock()

    def make(self, at: float) -> int:
        """Return a token that is larger than the last one.

        Args:
            at: the time, in seconds since 1970. If it is before the last token's, by a clock
                that was set back, the token's time is a millisecond after that one's. So a
                maker of over 1,000 tokens a second would run ahead; a worker whose eight
                queues got single jobs as fast as a client wrote them made 790.

        """
        number = self.number
        low = _NO_NUMBER | randbits(20) if number is None else number % NUMBERS
        now = (at - _EPOCH) * 1000
        with self._lock:
            self._last = last = max(self._last + 1, int(now) if 0 <= now < _END else 0)
        return last << _SHIFT | low


def origin(token: int) -> Origin | None:
    """Return when and by whom a token was made; None if it cannot have been made here."""
    milliseconds, low = token >> _SHIFT, token & (1 << _SHIFT) - 1
    if not 0 <= milliseconds < _END:
        return None
    at = EPOCH + timedelta(milliseconds=milliseconds)
    return Origin(at, None if low & _NO_NUMBER else low)
