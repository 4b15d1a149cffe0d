"""Tests of a project's jobs, as its programmers write them."""

from asgiref.sync import sync_to_async
from django.db import IntegrityError, transaction
from django.test import TestCase, TransactionTestCase
from shop.jobs import CALLS
from shop.models import Order

from bgjob import Complete, EnqueueRequest, Job, MoveToDlq, Mux, Retry, testing
from bgjob.ext.django import bulk_enqueue, dsn, enqueue, models, mux, orm_of
from bgjob.ext.django.testing import adrain, assert_enqueued, assert_not_enqueued, clear, drain
from bgjob.testing import Ran


def call(function, colour="call", **options):
    """Enqueue a job that calls a function."""
    id = enqueue(EnqueueRequest("q", colour, **options))

    def run(*args):
        function(*args)

    CALLS[id] = run
    return id


class BothKinds:
    """Tests in a transaction, and where each step is committed."""

    def test_a_batch_handler_is_given_each_job_alone(self):
        def breaks():
            Order.objects.create(number="1")
            Order.objects.create(number="1")

        calls = {
            "writes": lambda: Order.objects.update_or_create(number="2") and None,
            "gives up": lambda: MoveToDlq("enough"),
            "breaks": breaks,
        }
        CALLS.update(calls)
        for colour in ("batch", "abatch"):
            bulk_enqueue([EnqueueRequest("q", colour, id=id) for id in calls])
            ran = {job.id: type(result) for job, result in drain("q", on_error="store")}
            self.assertEqual(
                ran, {"writes": Complete, "gives up": MoveToDlq, "breaks": MoveToDlq}, colour
            )
            self.assertTrue(Order.objects.filter(number="2").exists())
            Order.objects.all().delete()

    def test_the_next_attempt_goes_on_from_the_checkpoint(self):
        found = []

        def plain(checkpoint):
            found.append(checkpoint.value)
            number = checkpoint.value or 0
            Order.objects.create(number=str(number))
            checkpoint.save(number + 1)
            if number < 2:
                raise ValueError(number)

        async def coroutine(checkpoint):
            found.append(checkpoint.value)
            number = checkpoint.value or 0
            await Order.objects.acreate(number=str(number))
            await checkpoint.save(number + 1)
            if number < 2:
                raise ValueError(number)

        for colour, function in {"long": plain, "along": coroutine}.items():
            CALLS[enqueue(EnqueueRequest("q", colour, id=colour))] = function
            with self.assertRaisesMessage(ValueError, "0"):
                drain("q")
            self.assertEqual(bytes(models.Job.objects.get().checkpoint), b"1")
            ran = drain("q", on_error="store")
            self.assertEqual([type(each.result) for each in ran], [Retry, Complete])
            self.assertEqual((found, Order.objects.count()), ([None, 1, 2], 3))
            found.clear()
            Order.objects.all().delete()

    def test_a_part_and_its_checkpoint_are_undone_together(self):
        def parts(checkpoint):
            for number in range(checkpoint.value or 0, 2):
                with checkpoint.transaction() as conn, orm_of(conn):
                    Order.objects.create(number=str(number))
                    enqueue(EnqueueRequest("other", "t"))
                    checkpoint.save(number + 1)
                    if number and job_fails:
                        raise ValueError("undone")

        CALLS[enqueue(EnqueueRequest("q", "long"))] = parts
        job_fails = True
        with self.assertRaisesMessage(ValueError, "undone"):
            drain("q")
        self.assertEqual(Order.objects.get().number, "0")
        job_fails = False
        drain("q")
        self.assertEqual(Order.objects.count(), 2)
        assert_enqueued(queue="other", count=2)

    def test_a_coroutine_that_opens_a_transaction_of_its_checkpoint_is_told_the_remedy(self):
        async def parts(checkpoint):
            async with checkpoint.transaction():
                self.fail("it is open")

        CALLS[enqueue(EnqueueRequest("q", "along"))] = parts
        with self.assertRaisesMessage(TypeError, "with bgjob.testing.drain(dsn(), queue, mux)"):
            drain("q")


class InATransaction(BothKinds, TestCase):
    def test_a_job_of_a_view_is_asserted_and_run(self):
        self.client.get("/orders/one")
        assert_enqueued("confirm", queue="mail", arg={"order": "one"}, count=1)
        [ran] = drain("mail")
        self.assertEqual((ran.job.id, ran.result), ("one", Complete()))
        self.assertEqual(Order.objects.get().note, "confirmed")
        assert_not_enqueued()

    def test_1_jobs_and_rows_of_a_test_are_gone_after_it(self):
        for colour in ("call", "acall"):
            call(lambda: Order.objects.create(number=str(Order.objects.count())), colour)
        self.assertEqual(len(drain("q")), 2)
        self.assertEqual(Order.objects.count(), 2)
        call(lambda: None)

    def test_2_jobs_and_rows_of_a_test_are_gone_after_it(self):
        self.assertEqual((Order.objects.count(), models.Job.objects.count()), (0, 0))

    def test_what_a_handler_raises_is_raised_and_a_failed_query_breaks_nothing(self):
        def fails():
            Order.objects.create(number="1")
            Order.objects.create(number="1")

        def catches():
            Order.objects.create(number="2")
            try:
                Order.objects.create(number="2")
            except IntegrityError:
                pass

        def raises():
            Order.objects.create(number="3")
            1 / 0  # noqa

        for colour in ("call", "acall"):
            call(fails, colour)
            with self.assertRaises(IntegrityError):
                drain("q")
            call(catches, colour)
            call(raises, colour)
            ran = drain("q", on_error="store")
            self.assertEqual([type(each.result) for each in ran], [Complete, MoveToDlq])
            self.assertEqual(Order.objects.get().number, "3")  # as in autocommit
            Order.objects.all().delete()

    def test_what_waits_for_the_commit_is_called_and_rolled_back_with_its_block(self):
        called = []

        def hooks():
            with transaction.atomic():
                transaction.on_commit(lambda: called.append(1))
                transaction.on_commit(lambda: transaction.on_commit(lambda: called.append(2)))
            with self.assertRaises(ZeroDivisionError), transaction.atomic():
                transaction.on_commit(lambda: called.append(3))
                1 / 0  # noqa

        with self.captureOnCommitCallbacks() as outside:
            transaction.on_commit(lambda: called.append(4))
            call(hooks)
            call(hooks, "acall")
            drain("q")
        self.assertEqual((called, len(outside)), ([1, 2, 1, 2], 1))

    def test_a_transactional_handler_is_in_the_tests_transaction(self):
        def writes(conn):
            with orm_of(conn):
                Order.objects.create(number="1")
            enqueue(EnqueueRequest("other", "t"))

        def fails(conn):
            writes(conn)

        call(writes, "within")
        drain("q")
        call(fails, "within")
        with self.assertRaises(IntegrityError):
            drain("q")
        self.assertEqual(Order.objects.count(), 1)
        assert_enqueued(queue="other", count=1)

    async def test_a_coroutine_drains(self):
        await self.async_client.get("/async/one?together")
        [ran] = await adrain("mail")
        self.assertIsInstance(ran, Ran)
        self.assertEqual((await Order.objects.aget()).note, "confirmed")

    def test_retries_run_within_the_time_that_is_skipped(self):
        attempts = []

        def fails(job: Job):
            attempts.append(job.attempt)
            return Retry(delay=60) if job.attempt < 3 else None

        enqueue(EnqueueRequest("q", "t"))
        drain("q", Mux().register("t", fails), within=200)
        self.assertEqual(attempts, [1, 2, 3])


class Committed(BothKinds, TransactionTestCase):
    def setUp(self):
        self.addCleanup(clear)

    def test_1_jobs_are_committed_and_cleared(self):
        for colour in ("call", "acall"):
            call(lambda: Order.objects.create(number=str(Order.objects.count())), colour)
        call(lambda conn: conn.execute("update shop_order set note = 'within'"), "within")
        self.assertEqual(len(drain("q")), 3)
        self.assertEqual([order.note for order in Order.objects.all()], ["within"] * 2)
        call(lambda: None)

    def test_the_drain_of_bgjob_gives_a_coroutine_transactions_of_its_checkpoint(self):
        async def parts(checkpoint):
            async with checkpoint.transaction() as conn:
                await conn.execute("insert into shop_order (number, note) values ('1', '')")
                await checkpoint.save(1)

        CALLS[enqueue(EnqueueRequest("q", "along"))] = parts
        testing.drain(dsn(), "q", mux)
        self.assertEqual(Order.objects.count(), 1)

    def test_2_jobs_are_committed_and_cleared(self):
        assert_not_enqueued()

    async def test_a_coroutine_drains(self):
        await sync_to_async(call)(lambda: Order.objects.create(number="5"), "acall")
        await adrain("q")
        self.assertEqual(await Order.objects.acount(), 1)
