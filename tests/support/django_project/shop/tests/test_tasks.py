"""Django's tasks, run by bgjob: first with the examples of Django's own documentation."""

import asyncio
from datetime import timedelta
from functools import partial

import django
from asgiref.sync import sync_to_async
from django.core import mail
from django.core.checks import run_checks
from django.core.exceptions import SynchronousOnlyOperation
from django.db import connections, transaction
from django.test import TransactionTestCase, override_settings
from django.utils import timezone
from shop import tasks
from shop.models import Order
from shop.tasks import CALLS

from bgjob import Client, EmptyQueueError, EnqueueRequest
from bgjob.ext.django import autodiscover, dsn, mux
from bgjob.ext.django.models import DeadJob, Job
from bgjob.ext.django.worker import worker

if django.VERSION >= (6,):
    from django.tasks import TaskResultStatus, default_task_backend, task, task_backends
    from django.tasks.exceptions import InvalidTask, TaskResultDoesNotExist, TaskResultMismatch
    from django.tasks.signals import task_enqueued, task_finished, task_started
else:
    from django_tasks import TaskResultStatus, default_task_backend, task, task_backends
    from django_tasks.exceptions import InvalidTaskError as InvalidTask
    from django_tasks.exceptions import TaskResultDoesNotExist, TaskResultMismatch
    from django_tasks.signals import task_enqueued, task_finished, task_started


def local():
    pass


class Tasks(TransactionTestCase):
    def setUp(self):
        autodiscover()
        CALLS.clear()
        self.client = Client(dsn())
        self.addCleanup(self.client.close)
        Job.objects.all().delete()
        DeadJob.objects.all().delete()
        self.heard = []
        for signal in (task_enqueued, task_started, task_finished):
            signal.connect(self.hear)
            self.addCleanup(signal.disconnect, self.hear)

    def hear(self, task_result, **_):
        self.heard.append(str(task_result.status))

    def do(self, queue="default"):
        try:
            while True:
                self.client.do(queue, mux)
        except EmptyQueueError:
            pass

    def test_the_examples_of_djangos_documentation_run(self):
        mails = dict(emails=["user@example.com"], subject="You have a message", message="Hello!")
        result = tasks.email_users.enqueue(**mails)
        self.assertEqual((result.status, result.is_finished), (TaskResultStatus.READY, False))
        self.assertEqual(result.kwargs, mails)
        tasks.email_users.using(priority=10).enqueue(**mails)
        tasks.email_emails.enqueue(**mails)
        context = tasks.email_with_context.enqueue(**mails)
        tasks.email_users.using(run_after=timezone.now() + timedelta(hours=3)).enqueue(**mails)
        waiting = Job.objects.order_by("priority", "next_run_at").values_list(
            "type", "priority", "queue"
        )
        self.assertEqual(
            list(waiting),
            [
                ("shop.tasks.email_users", -10, "default"),
                ("shop.tasks.email_emails", -2, "emails"),
                ("shop.tasks.email_users", 0, "default"),
                ("shop.tasks.email_with_context", 0, "default"),
                ("shop.tasks.email_users", 0, "default"),
            ],
        )
        self.do()
        self.do("emails")
        self.assertEqual(len(mail.outbox), 4)
        self.assertEqual(CALLS, [(1, context.id, [])])
        self.assertEqual(Job.objects.count(), 1)
        self.assertEqual(self.heard.count("SUCCESSFUL"), 4)
        self.assertEqual(default_task_backend.enqueue(tasks.my_task, ["a"], {}).args, ["a"])

    def test_a_task_commits_with_the_transaction_or_on_commit(self):
        with transaction.atomic():
            Order.objects.create(number="5")
            tasks.process_thing.enqueue(thing_num="5")
            with self.assertRaises(EmptyQueueError):
                self.client.do("default", mux)
        with transaction.atomic():
            transaction.on_commit(partial(tasks.process_thing.enqueue, thing_num="5"))
        with self.assertRaises(ZeroDivisionError), transaction.atomic():
            tasks.process_thing.enqueue(thing_num="6")
            1 / 0  # noqa
        self.do()
        self.assertEqual(CALLS, ["5", "5"])

    def test_coroutines_enqueue_and_are_tasks(self):
        async def view():
            with self.assertRaises(SynchronousOnlyOperation):
                tasks.async_task.enqueue("x")
            result = await tasks.async_task.aenqueue("7")
            await sync_to_async(connections.close_all)()
            return result

        self.assertEqual(asyncio.run(view()).args, ["7"])
        self.do()
        self.assertEqual(Order.objects.get().number, "7")
        with self.assertRaisesMessage(SynchronousOnlyOperation, "outside of the transaction"):
            with transaction.atomic():
                asyncio.run(tasks.async_task.aenqueue("8"))

    def test_a_task_that_fails_is_run_again_by_the_policy_and_ends_in_the_dead_letter_table(self):
        tasks.fails.enqueue()
        tasks.fails_once.enqueue()
        self.client.do("default", mux)
        self.client.do("default", mux)
        self.assertEqual(DeadJob.objects.get().type, "shop.tasks.fails_once")
        self.assertIn("ValueError: no", DeadJob.objects.get().last_error)
        self.assertEqual(self.heard, ["READY"] * 2 + ["RUNNING", "RUNNING", "FAILED"])
        self.client.jobs.run_now(Job.objects.get().id)
        self.client.do("default", mux)
        self.assertEqual(CALLS, [(1, []), (2, [ValueError])])

    def test_a_call_is_json_and_what_is_none_is_refused_or_buried(self):
        many = [1 << 70, "é\ud800\0", None, {"a": [1.5]}, True]
        tasks.my_task.enqueue(many, bar=(1, 2))
        self.do()
        self.assertEqual(CALLS, [(many, [1, 2])])
        for wrong in (object(), {1, 2}, timezone.now(), float("nan")):
            with self.assertRaises((TypeError, ValueError)):
                tasks.my_task.enqueue(wrong)
        for arg in (b"{", b"[]", b'{"args": {}}', None):
            self.client.enqueue(EnqueueRequest("default", "shop.tasks.my_task", arg))
        self.client.enqueue(EnqueueRequest("default", "shop.tasks.none"))
        self.client.enqueue(
            EnqueueRequest("default", "os.system", b'{"args": ["false"], "kwargs": {}}')
        )
        self.do()
        self.assertEqual(DeadJob.objects.count(), 6)
        self.assertEqual(
            DeadJob.objects.filter(last_error__startswith="UnknownTypeError").count(), 2
        )

    def test_results_are_those_of_djangos_own_api(self):
        result = tasks.adds.enqueue(1, second=2)
        self.assertTrue(result.task.get_backend().supports_get_result)
        found = tasks.adds.get_result(result.id)
        self.assertEqual((found.status, found.attempts), (TaskResultStatus.READY, 0))
        self.assertEqual((found.args, found.kwargs), ([1], {"second": 2}))
        with self.assertRaisesMessage(ValueError, "not finished yet"):
            found.return_value
        self.do()
        result.refresh()
        self.assertEqual((result.status, result.is_finished), (TaskResultStatus.SUCCESSFUL, True))
        self.assertEqual(result.return_value, {"sum": 3, "of": [1, 2]})
        self.assertEqual((result.errors, result.attempts), ([], 1))
        again = task_backends["kept"].get_result(result.id)
        self.assertEqual((again.args, again.kwargs), ([1], {"second": 2}))
        self.assertTrue(again.enqueued_at <= again.finished_at)
        self.assertTrue(again.started_at <= again.finished_at)
        self.assertEqual(self.heard, ["READY", "RUNNING", "SUCCESSFUL"])

    def test_results_of_coroutines_and_in_coroutines(self):
        async def view(id_):
            found = await tasks.adds_later.aget_result(id_)
            await found.arefresh()
            await sync_to_async(connections.close_all)()
            return found

        result = tasks.adds_later.enqueue(3, 4)
        self.do()
        self.assertEqual(asyncio.run(view(result.id)).return_value, 7)

    def test_the_result_of_a_task_that_fails_has_its_error(self):
        result = tasks.fails_twice.enqueue()
        no_json = tasks.returns_no_json.enqueue()
        for attempts, status in ((1, TaskResultStatus.READY), (2, TaskResultStatus.FAILED)):
            self.do()
            result.refresh()
            self.assertEqual((result.status, result.attempts), (status, attempts))
            [error] = result.errors
            self.assertEqual(error.exception_class, ValueError)
            self.assertIn(f"ValueError: no {attempts}", error.traceback)
            for job in Job.objects.all():
                self.client.jobs.run_now(job.id)
        with self.assertRaisesMessage(ValueError, "Task failed"):
            result.return_value
        no_json.refresh()
        self.assertEqual(no_json.errors[0].exception_class, TypeError)
        self.assertEqual(self.heard.count("FAILED"), 2)

    def test_what_has_no_result_does_not_exist(self):
        usual = tasks.my_task.enqueue(1)
        kept = tasks.adds.enqueue(1)
        other = self.client.enqueue(EnqueueRequest("default", "of nobody", keep=60))
        backend = task_backends["kept"]
        for id_ in ("none", usual.id, other):
            with self.assertRaises(TaskResultDoesNotExist):
                backend.get_result(id_)
        with self.assertRaises(TaskResultMismatch):
            tasks.adds_later.get_result(kept.id)

    def test_the_backend_says_what_it_can_do(self):
        backend = task_backends["default"]
        self.assertTrue(backend.supports_defer and backend.supports_async_task)
        self.assertTrue(backend.supports_priority and not backend.supports_get_result)
        with self.assertRaises(NotImplementedError):
            default_task_backend.get_result("x")
        for options in ({"priority": 101}, {"queue_name": "none"}):
            with self.assertRaises(InvalidTask):
                tasks.my_task.using(**options)
        with self.assertRaises(InvalidTask):
            tasks.my_task.using(run_after=timezone.now().replace(tzinfo=None))
        with self.assertRaises(InvalidTask):
            task(lambda: None)
        with override_settings(USE_TZ=False):
            tasks.my_task.using(run_after=timezone.now() + timedelta(hours=1)).enqueue(1)

    def test_its_options_are_checked(self):
        name = "bgjob.ext.django.task_backend.TaskBackend"
        wrong = {"default": {"BACKEND": name, "OPTIONS": {"tries": 3, "database": "none"}}}
        with override_settings(TASKS=wrong):
            found = [str(error) for error in run_checks()]
        self.assertIn("has no key 'tries': the keys are database, keep_results, backoff", found[0])
        self.assertIn("'none'", found[1])
        wrong = {"default": {"BACKEND": name, "OPTIONS": {"keep_results": 0}}}
        with override_settings(TASKS=wrong):
            self.assertIn("['keep_results']: keep must be more than 0", str(run_checks()[0]))

    def test_the_worker_works_on_the_queues_of_the_backends_by_default(self):
        self.assertEqual(worker()._group._queues, "default, emails")
