"""Jobs in the transactions of a Django project; run with each kind of connection."""

import asyncio
import threading
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import ClassVar

import psycopg
from asgiref.sync import async_to_sync, sync_to_async
from django.core.exceptions import SynchronousOnlyOperation
from django.db import IntegrityError, connection, connections, transaction
from django.test import TestCase, TransactionTestCase, override_settings
from shop.models import Order

from bgjob import (
    Client,
    EnqueueConflictError,
    EnqueueRequest,
    JobAlreadyExistsError,
    Mux,
    PayloadError,
    QueueRequiredError,
    RequestsRequiredError,
    Worker,
)
from bgjob.ext.django import abulk_enqueue, aenqueue, bulk_enqueue, dsn, enqueue
from bgjob.ext.django.models import Job

HOSTILE = ["'; drop table bgjob_job; --", "%s %(id)s %%", 'say "x", {NULL}', "\\", "é \U0001f600"]


def request(id=None, arg=None, **options):
    return (
        EnqueueRequest("mail", "confirm", arg, id=id, **options)
        if id
        else EnqueueRequest("mail", "confirm", arg, **options)
    )


@dataclass(frozen=True)
class SendMail:
    queue: ClassVar[str] = "mail"

    to: str


class Committed(TransactionTestCase):
    """Tests of what other sessions see."""

    def setUp(self):
        self.other = psycopg.connect(dsn(), autocommit=True)
        self.addCleanup(self.other.close)
        self.other.execute("truncate bgjob_job, bgjob_dead_job")

    def seen(self):
        return [id for (id,) in self.other.execute("select id from bgjob_job order by id")]

    def test_a_job_is_the_first_statement_of_a_transaction_and_commits_with_it(self):
        with transaction.atomic():
            enqueue(request("first"))
            self.assertEqual(self.seen(), [])
            Order.objects.create(number="1")
        self.assertEqual(self.seen(), ["first"])

    def test_a_rollback_takes_the_job_with_it_also_that_of_a_savepoint(self):
        with self.assertRaises(ZeroDivisionError), transaction.atomic():
            Order.objects.create(number="1")
            enqueue(request("gone"))
            1 / 0  # noqa
        with transaction.atomic():
            enqueue(request("kept"))
            with self.assertRaises(ZeroDivisionError), transaction.atomic():
                enqueue(request("undone"))
                1 / 0  # noqa
        self.assertEqual(self.seen(), ["kept"])
        self.assertEqual(Order.objects.count(), 0)

    def test_outside_of_a_transaction_a_job_is_committed_and_many_are_all_or_none(self):
        enqueue(request("a"))
        with self.assertRaises(JobAlreadyExistsError) as caught:
            bulk_enqueue([request("b"), request("a"), request("b")])
        self.assertEqual(caught.exception.ids, ("a", "b"))
        self.assertEqual(self.seen(), ["a"])
        ids = bulk_enqueue((request(id) for id in "cab"), on_conflict="skip")
        self.assertEqual(ids, ["c", None, "b"])
        self.assertEqual(self.seen(), ["a", "b", "c"])

    def test_a_duplicate_leaves_the_transaction_usable(self):
        with transaction.atomic():
            enqueue(request("twice"))
            for enqueued in (enqueue, lambda again: bulk_enqueue([again])):
                with self.assertRaises(JobAlreadyExistsError):
                    enqueued(request("twice"))
            Order.objects.create(number="1")
            enqueue(request("after"))
        self.assertEqual(self.seen(), ["after", "twice"])
        self.assertEqual(Order.objects.count(), 1)

    def test_a_transaction_that_cannot_see_the_job_is_to_be_repeated(self):
        with self.assertRaises(EnqueueConflictError), transaction.atomic():
            with connection.cursor() as cursor:
                cursor.execute("set transaction isolation level repeatable read")
            Order.objects.count()
            self.other.execute("insert into bgjob_job (id, queue, type) values ('x', 'q', 't')")
            enqueue(request("x"))
        enqueue(request("y"))
        self.assertEqual(self.seen(), ["x", "y"])

    def test_a_sleeping_worker_starts_the_job_when_the_transaction_commits(self):
        ran = threading.Event()
        mux = Mux().register("confirm", lambda _: ran.set())
        with closing(Client(dsn())) as client, Worker(client, "mail", mux, poll_interval=3600):
            while not self.other.execute(
                "select from pg_locks where locktype = 'advisory' and mode = 'ExclusiveLock'"
            ).fetchall():
                pass
            with transaction.atomic():
                enqueue(request())
            self.assertTrue(ran.wait(30))

    def test_a_transaction_that_is_broken_takes_no_job(self):
        with self.assertRaises(transaction.TransactionManagementError), transaction.atomic():
            Order.objects.create(number="1")
            try:
                Order.objects.create(number="1")
            except IntegrityError:
                enqueue(request("late"))
        self.assertEqual(self.seen(), [])

    def test_a_coroutine_enqueues_on_the_connection_of_the_async_queries(self):
        async def view():
            with self.assertRaisesMessage(SynchronousOnlyOperation, "await aenqueue(...)"):
                enqueue(request("a"))
            with self.assertRaisesMessage(SynchronousOnlyOperation, "await abulk_enqueue(...)"):
                bulk_enqueue([request("a")])
            self.assertEqual(await aenqueue(request("b")), "b")
            self.assertEqual(await aenqueue(SendMail("ann"), id="c"), "c")
            with self.assertRaises(JobAlreadyExistsError):
                await aenqueue(request("b"))
            await abulk_enqueue([request("d")])
            await sync_to_async(connections.close_all)()

        asyncio.run(view())
        self.assertEqual(self.seen(), ["b", "c", "d"])

    def test_a_coroutine_is_in_the_transaction_around_async_to_sync_only(self):
        async def enqueues(id):
            await aenqueue(request(id))
            await abulk_enqueue([request(f"{id} too")])

        with transaction.atomic():
            async_to_sync(enqueues)("inside")
            self.assertEqual(self.seen(), [])
            for coroutine in (aenqueue(request("x")), abulk_enqueue([request("x")])):
                with self.assertRaisesMessage(SynchronousOnlyOperation, "outside of the transac"):
                    asyncio.run(coroutine)
            self.assertEqual(Job.objects.count(), 2)
            transaction.set_rollback(True)
        self.assertEqual(self.seen(), [])

    async def test_an_async_view_writes_both_in_one_transaction_by_a_plain_function(self):
        found = await self.async_client.get("/async/one?together")
        self.assertEqual(found.content, b"ordered")
        await self.async_client.get("/async/two?together&fail")
        await self.async_client.get("/async/three")
        self.assertEqual(await sync_to_async(self.seen)(), ["one", "three"])


class Enqueued(TestCase):
    """Tests of what is written."""

    def test_a_job_arrives_as_it_was_given(self):
        later = timedelta(hours=1)
        for n, text in enumerate(HOSTILE):
            one = enqueue(request(text, {"text": text}, priority=n, exclusive=text, delay=later))
            many = bulk_enqueue([request(f"{text}2", text.encode(), exclusive=text), request()])
            self.assertEqual((one, many[0]), (text, f"{text}2"))
            job = Job.objects.get(id=text)
            self.assertEqual((job.priority, job.exclusive, job.queue), (n, text, "mail"))
            self.assertGreater(job.next_run_at, job.created_at + later / 2)
            self.assertEqual(bytes(Job.objects.get(id=f"{text}2").arg), text.encode())
        every_byte = bytes(range(256)) * 100
        enqueue(request("bytes", every_byte))
        self.assertEqual(bytes(Job.objects.get(id="bytes").arg), every_byte)

    def test_a_typed_job_is_checked_as_by_a_client(self):
        id = enqueue(SendMail("ann"), priority=3)
        job = Job.objects.get(id=id)
        self.assertEqual(
            (job.type, job.queue, bytes(job.arg)), ("SendMail", "mail", b'{"to":"ann"}')
        )
        with self.assertRaises(PayloadError):
            enqueue(SendMail(5))
        with self.assertRaises(TypeError):
            enqueue(request(), priority=3)
        with self.assertRaises(QueueRequiredError):
            enqueue(EnqueueRequest("", "t"))
        with self.assertRaises(RequestsRequiredError):
            bulk_enqueue([])

    @override_settings(BGJOB={"ON_ENQUEUE": ["shop.jobs.of_tenant"]})
    async def test_each_enqueue_is_wrapped_by_what_the_setting_names(self):
        await sync_to_async(enqueue)(request())
        await sync_to_async(bulk_enqueue)([request()])
        await aenqueue(SendMail("ann"))
        await abulk_enqueue([request()])
        found = [headers async for headers in Job.objects.values_list("headers", flat=True)]
        self.assertEqual(found, [{"tenant": "é"}] * 4)

    async def test_a_job_whose_id_is_taken_is_left_out_or_takes_the_place_of_the_live_one(self):
        enqueued, many = sync_to_async(enqueue), sync_to_async(bulk_enqueue)
        await enqueued(request("a", {"v": 0}), on_conflict="replace")
        for version, (one, all_) in enumerate([(enqueued, many), (aenqueue, abulk_enqueue)]):
            again = request("a", {"v": "skipped"})
            self.assertIsNone(await one(again, on_conflict="skip"))
            ids = await all_([again, request(f"new {version}")], on_conflict="skip")
            self.assertEqual(ids, [None, f"new {version}"])
            self.assertIsNone(await one(SendMail("ann"), id="a", on_conflict="skip"))
            job = await Job.objects.aget(id="a")
            self.assertEqual(bytes(job.arg), b'{"v":%d}' % (2 * version))
            newer = request("a", {"v": 2 * version + 1}, priority=version + 1)
            self.assertEqual(await one(newer, on_conflict="replace"), "a")
            job = await Job.objects.aget(id="a")
            self.assertEqual(
                (bytes(job.arg), job.priority), (b'{"v":%d}' % (2 * version + 1), version + 1)
            )
            newest = request("a", {"v": 2 * version + 2})
            self.assertEqual(await all_([newest], on_conflict="replace"), ["a"])
            with self.assertRaisesMessage(ValueError, "'raise', 'skip' or 'replace'"):
                await one(newest, on_conflict="ignore")
        job = await Job.objects.aget(id="a")
        self.assertEqual((bytes(job.arg), job.priority), (b'{"v":4}', 0))

    def test_a_view_enqueues_in_its_transaction(self):
        self.client.get("/orders/one")
        self.client.get("/orders/two?fail")
        self.assertEqual([job.id for job in Job.objects.all()], ["one"])
