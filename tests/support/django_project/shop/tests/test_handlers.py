"""Jobs in a worker of a Django project: its connections, and what one job leaves to the next."""

import itertools
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from unittest.mock import patch

import psycopg
from django.db import (
    DEFAULT_DB_ALIAS,
    NotSupportedError,
    OperationalError,
    connection,
    connections,
    transaction,
)
from django.db.backends.signals import connection_created
from django.test import TransactionTestCase, override_settings
from django.utils import timezone, translation
from shop.jobs import CALLS
from shop.models import Order

from bgjob import Client, EnqueueRequest, JobCompleted, JobMovedToDlq, Worker
from bgjob.ext.django import autodiscover, dsn, enqueue, mux, orm_of
from bgjob.ext.django.models import Job
from bgjob.testing import RecordingObserver

COLOURS = ["call", "acall"]
ids = (f"job-{n}" for n in itertools.count())


def backend():
    with connection.cursor() as cursor:
        cursor.execute("select pg_backend_pid()")
        return cursor.fetchone()[0]


class Handlers(TransactionTestCase):
    def setUp(self):
        self.other = psycopg.connect(dsn(), autocommit=True)
        self.addCleanup(self.other.close)
        self.other.execute("truncate bgjob_job, bgjob_dead_job")
        autodiscover()

    @contextmanager
    def worker(self, **database):
        """Run a worker with one slot; yield what runs a function in a job, and its exception."""
        heard = RecordingObserver()

        def run(colour, function):
            id, returned = next(ids), []
            CALLS[id] = lambda *args: returned.append(function(*args))
            enqueue(EnqueueRequest("q", colour, id=id))
            while not (ended := heard.of(JobCompleted, id=id) + heard.of(JobMovedToDlq, id=id)):
                pass
            if isinstance(ended[0], JobMovedToDlq):
                raise ended[0].error
            return returned[0]

        settings = connections.settings[DEFAULT_DB_ALIAS]
        with (
            closing(Client(dsn())) as client,
            patch.dict(settings, database),  # threads make their connections of it
            Worker(client, "q", mux, observer=heard),
        ):
            try:
                yield run
            finally:
                run("call", connections.close_all)

    def is_there(self, pid):
        return bool(
            self.other.execute("select from pg_stat_activity where pid = %s", [pid]).fetchall()
        )

    def gone(self, pid):
        while self.is_there(pid):
            pass

    def test_a_connection_ends_with_its_job_or_is_kept_as_conn_max_age_says(self):
        with self.worker() as run:
            for colour in COLOURS:
                self.gone(run(colour, backend))
        with self.worker(CONN_MAX_AGE=600) as run:
            self.assertEqual(run("call", backend), run("call", backend))
            self.gone(run("acall", backend))

    def test_the_server_may_cut_the_connection_between_two_jobs(self):
        for checks in (True, False):
            with self.worker(CONN_MAX_AGE=600, CONN_HEALTH_CHECKS=checks) as run:
                for colour in COLOURS:
                    pid = run(colour, backend)
                    self.other.execute("select pg_terminate_backend(%s)", [pid])
                    self.gone(pid)
                    self.assertNotEqual(run(colour, backend), pid)

    def test_a_connection_that_is_cut_within_a_job_is_another_one_in_the_next(self):
        def cut():
            self.other.execute("select pg_terminate_backend(%s)", [backend()])
            Order.objects.count()

        with self.worker(CONN_MAX_AGE=600) as run:
            for colour in COLOURS:
                with self.assertRaises(OperationalError):
                    run(colour, cut)
                self.assertTrue(run(colour, backend))

    def test_nothing_of_a_job_is_left_for_the_next(self):
        def leaves():
            translation.activate("de")
            timezone.activate("Asia/Tokyo")
            with connection.cursor() as cursor:
                cursor.execute("set statement_timeout = 12345")
                cursor.execute("create temp table left_behind (id int)")
                cursor.execute("select pg_advisory_lock(5)")
                cursor.execute("set role pg_monitor")
                cursor.execute("listen something")

        def opens():
            leaves()
            with connection.cursor() as cursor:
                cursor.execute("reset role")
            transaction.atomic().__enter__()
            Order.objects.create(number="left")

        def stops_autocommit():
            transaction.set_autocommit(False)
            Order.objects.create(number="left")

        def fails():
            opens()
            Order.objects.create(number="left")

        def looks():
            with connection.cursor() as cursor:
                cursor.execute(
                    "select current_setting('statement_timeout'), to_regclass('left_behind'),"
                    " current_user = session_user, current_setting('TimeZone'),"
                    " (select count(*) from pg_locks where locktype = 'advisory' and objid = 5"
                    "  and database = (select oid from pg_database where datname = current_database())),"
                    " (select count(*) from pg_listening_channels()), current_setting('work_mem')"
                )
                state = cursor.fetchone()
            return (
                state,
                translation.get_language(),
                timezone.get_current_timezone_name(),
                connection.in_atomic_block,
                transaction.get_autocommit(),
                Order.objects.count(),
            )

        def prepares(connection, **_):
            with connection.cursor() as cursor:
                cursor.execute("set work_mem = '5MB'")

        connection_created.connect(prepares)
        self.addCleanup(connection_created.disconnect, prepares)
        wanted = (("0", None, True, "UTC", 0, 0, "5MB"), "en-us", "Europe/Vienna", False, True, 0)
        kinds = [{}, {"CONN_MAX_AGE": 600}, {"OPTIONS": {"pool": {"min_size": 1, "max_size": 1}}}]
        for changes, colour in itertools.product(kinds, COLOURS):
            with self.subTest(changes=changes, colour=colour), self.worker(**changes) as run:
                for function in (leaves, opens, stops_autocommit, fails):
                    try:
                        run(colour, function)
                    except Exception:
                        self.assertIs(function, fails)
                    self.assertEqual(run(colour, looks), wanted, function)
                if "OPTIONS" in changes:
                    run(colour, lambda: connection.close_pool())

    @override_settings(DEBUG=True)
    def test_the_list_of_queries_begins_anew_with_each_job(self):
        def queries():
            Order.objects.count()
            return len(connection.queries)

        with self.worker(CONN_MAX_AGE=600) as run:
            for colour in COLOURS:
                self.assertEqual([run(colour, queries) for _ in range(3)], [1, 1, 1])

    def test_the_orm_writes_in_the_transaction_of_a_transactional_handler(self):
        with self.worker() as run:
            self.orm_writes(run)

    def orm_writes(self, run):
        now = datetime(2030, 5, 1, 12, tzinfo=UTC)

        def writes(conn):
            [before] = conn.execute("select '{}'::jsonb").fetchone()
            with orm_of(conn):
                Order.objects.create(number="1")
                with self.assertRaises(ZeroDivisionError), transaction.atomic():
                    Order.objects.create(number="2")
                    1 / 0  # noqa
                enqueue(EnqueueRequest("other", "t", id="child", run_at=now))
                self.assertEqual(Job.objects.get(id="child").next_run_at, now)
                self.assertEqual([o.number for o in Order.objects.iterator()], ["1"])
                with self.assertRaisesMessage(NotSupportedError, "Enqueue a job"):
                    transaction.on_commit(print)
                with self.assertRaises(RuntimeError), transaction.atomic(durable=True):
                    pass
                with self.assertRaises(transaction.TransactionManagementError):
                    connection.commit()
            self.assertEqual(Order.objects.count(), 0)  # on a connection of its own
            [after] = conn.execute("select '{}'::jsonb").fetchone()
            self.assertEqual((before, after), ({}, {}))

        run("within", writes)
        self.assertEqual(Order.objects.get().number, "1")
        self.assertEqual(Job.objects.get().id, "child")

        def fails(conn):
            with orm_of(conn):
                Order.objects.create(number="3")
                enqueue(EnqueueRequest("other", "t"))
            1 / 0  # noqa

        with self.assertRaises(ZeroDivisionError):
            run("within", fails)
        self.assertEqual((Order.objects.count(), Job.objects.count()), (1, 1))

    def test_the_orm_takes_a_connection_in_a_transaction_only(self):
        with self.assertRaisesMessage(TypeError, "a plain function"), orm_of(object()):
            pass
        with self.assertRaisesMessage(ValueError, "no transaction"), orm_of(self.other):
            pass
