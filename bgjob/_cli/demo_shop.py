"""What the jobs of `bgjob demo --web` do: the shop's own code, some of which fails."""

import asyncio
from pathlib import Path
from random import Random
from time import monotonic

from bgjob._cli.demo_jobs import count_file
from bgjob.job import Job
from bgjob.mux import Mux
from bgjob.result import Backoff

_AWAY = 10.0
"""Seconds for which the tax office is away: the first invoices die within them."""

_FAILING = 0.08
"""The part of the confirmations whose first attempt fails."""

_random = Random()  # noqa: S311 (no secret)


class DecodeError(ValueError):
    """An image cannot be read."""


class _TaxOffice:
    """A service of others, which is away at first."""

    def __init__(self) -> None:
        self._back_at = monotonic() + _AWAY

    async def register(self, number: int) -> None:
        await self._connect()
        await asyncio.sleep(0.3 + number / 1000)

    async def _connect(self) -> None:
        if monotonic() < self._back_at:
            raise ConnectionError("the tax office is away")


async def _send(address: str) -> None:
    await asyncio.sleep(_random.uniform(0.02, 0.5))
    if _random.random() < _FAILING:
        raise ConnectionError(f"mail server 'smtp-3' does not take a letter to {address!r}")


def _decode(image: str) -> None:
    if image.endswith(".tiff"):
        raise DecodeError(f"there is no decoder for {image!r}")


async def _scale(image: str, width: int) -> None:
    _decode(image)
    await asyncio.sleep(width / 500)


def make_mux(root: Path) -> Mux:
    """Return the shop's handlers; `root` is the folder whose files are counted."""
    mux = Mux()
    office = _TaxOffice()

    @mux.handler("confirmation", backoff=Backoff(base=2.0))
    async def confirm(job: Job) -> None:
        await _send(job.json()["to"])

    @mux.handler("newsletter")
    @mux.handler("clean_up")
    @mux.handler("charge")
    async def work(_: Job) -> None:
        await asyncio.sleep(_random.uniform(0.2, 2.0))

    @mux.handler("count_file")
    def count_one(job: Job) -> None:
        count_file(root / job.json()["file"])

    @mux.handler("report")
    async def report(_: Job) -> None:
        await asyncio.sleep(_random.uniform(20.0, 90.0))

    @mux.handler("invoice", max_attempts=1)
    async def invoice(job: Job) -> None:
        await office.register(job.json()["number"])

    @mux.handler("thumbnail", max_attempts=1)
    async def thumbnail(job: Job) -> None:
        await _scale(job.json()["image"], 100)

    return mux
