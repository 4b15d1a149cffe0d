"""The options of how a worker's process tells how it is."""

import os
from argparse import ArgumentTypeError
from pathlib import Path
from typing import NamedTuple

from bgjob._cli import arguments
from bgjob._cli.listener import Address

HEALTH = "BGJOB_HEALTH"
"""The environment variable with the address."""


class HealthOptions(NamedTuple):
    """The options of the command line; None if not given.

    Attributes:
        address: where to answer by HTTP.
        alive_file: what to touch while the process is live.
        live_within: seconds after which a queue with due jobs and free slots, of which
            nothing is claimed, is not live.

    """

    address: Address | None = None
    alive_file: Path | None = None
    live_within: float | None = None

    @property
    def is_wanted(self) -> bool:
        """Whether anything is to be told: here, or to systemd."""
        return self != HealthOptions() or bool(os.environ.get("NOTIFY_SOCKET"))


def from_environment() -> Address | None:
    """Return the address that the environment names; None if it names none.

    Raises:
        UsageError: it is not an address.

    """
    text = os.environ.get(HEALTH)
    if not text:
        return None
    try:
        return arguments.address(text)
    except ArgumentTypeError as error:
        raise arguments.UsageError(f"{HEALTH}: {error}") from None
