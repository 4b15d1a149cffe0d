"""Handlers that run what a test gives them, by the job's id."""

from contextlib import contextmanager

from asgiref.sync import sync_to_async

from bgjob.checkpoint import AsyncCheckpoint, Checkpoint
from bgjob.ext.django import mux

CALLS = {}


@contextmanager
def of_tenant(requests):
    yield [request.with_headers({"tenant": "é"}) for request in requests]


@mux.handler("call", max_attempts=1)
def call(job):
    return CALLS[job.id]()


@mux.handler("acall", max_attempts=1)
async def acall(job):
    return await sync_to_async(CALLS[job.id])()


@mux.handler("within", max_attempts=1, transactional=True)
def within(job, conn):
    return CALLS[job.id](conn)


@mux.handler("batch", max_attempts=1, batch=10)
def batch(jobs):
    return {job.id: CALLS[job.id]() for job in jobs}


@mux.handler("abatch", max_attempts=1, batch=10)
async def abatch(jobs):
    return {job.id: await sync_to_async(CALLS[job.id])() for job in jobs}


@mux.handler("long", max_attempts=3, backoff=lambda _: 0)
def long(job, checkpoint: Checkpoint[int]):
    return CALLS[job.id](checkpoint)


@mux.handler("along", max_attempts=3, backoff=lambda _: 0)
async def along(job, checkpoint: AsyncCheckpoint[int]):
    return await CALLS[job.id](checkpoint)


@mux.handler("confirm")
def confirm(job):
    from shop.models import Order

    Order.objects.filter(number=job.json()["order"]).update(note="confirmed")
