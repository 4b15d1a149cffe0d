"""The address at which a worker's process answers probes."""

import os
from argparse import ArgumentTypeError

from bgjob._cli import arguments
from bgjob._cli.listener import Address

HEALTH = "BGJOB_HEALTH"
"""The environment variable with the address."""


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
