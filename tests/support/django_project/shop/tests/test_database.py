"""What bgjob takes from settings.DATABASES."""

from unittest.mock import patch

import psycopg
from django.core.exceptions import ImproperlyConfigured
from django.core.management import CommandError, call_command
from django.db import connection
from django.test import TestCase, override_settings
from psycopg.conninfo import conninfo_to_dict

from bgjob.ext.django import dsn, mux
from bgjob.ext.django.checks import check_setting
from bgjob.ext.django.worker import worker


def given(**changes):
    return patch.dict(connection.settings_dict, changes)


class Database(TestCase):
    def test_a_connection_string_has_what_libpq_knows_of_the_options(self):
        ours = {"pool": True, "isolation_level": 1, "server_side_binding": True}
        theirs = {"sslmode": "prefer", "passfile": "/p w", "service": "s", "connect_timeout": 3}
        with given(OPTIONS=ours | theirs, PASSWORD="it's \\ new"):
            found = conninfo_to_dict(dsn())
        with given(OPTIONS={}, PASSWORD=""):
            bare = conninfo_to_dict(dsn())
        strings = {name: str(value) for name, value in theirs.items()}
        self.assertEqual(found, bare | strings | {"password": "it's \\ new"})
        with given(OPTIONS={"assume_role": "pg_monitor", "options": "-c work_mem=5MB"}):
            with psycopg.connect(dsn()) as conn:
                row = conn.execute("select current_user, current_setting('work_mem')").fetchone()
        self.assertEqual(row, ("pg_monitor", "5MB"))

    def test_the_setting_is_checked_and_unknown_keys_are_named(self):
        wrong = {
            "QUEUE": [],
            "CONCURRENCY": 0,
            "QUEUES": {"q": "many"},
            "GRACE": -1,
            "MIDDLEWARE": ["shop.none"],
            "WORKER": {"leese": 3},
        }
        with override_settings(BGJOB=wrong):
            found = [str(error) for error in check_setting()]
            with self.assertRaisesMessage(ImproperlyConfigured, "did you mean 'QUEUES'?"):
                worker()
        self.assertEqual(len(found), 6, found)
        for part in (
            "BGJOB has no key 'QUEUE': did you mean 'QUEUES'?",
            "BGJOB['CONCURRENCY']: a whole number from 1 is needed, not 0",
            "BGJOB['QUEUES']: a whole number from 1 is needed, not 'many'",
            "BGJOB['GRACE']",
            "BGJOB['MIDDLEWARE']",
            "BGJOB['WORKER'] has no key 'leese': did you mean 'lease'?",
        ):
            self.assertTrue(any(part in text for text in found), (part, found))
        for value in (5, {"QUEUES": "mail"}, {"WORKER": []}):
            with override_settings(BGJOB=value):
                self.assertEqual(len(check_setting()), 1)
        with override_settings(BGJOB={}, TASKS={}):
            self.assertEqual(check_setting(), [])
            with self.assertRaisesMessage(ImproperlyConfigured, "pass --queue"):
                worker()

    @override_settings(BGJOB={"UNKNOWN_FOR": 60}, TASKS={})
    def test_a_worker_keeps_jobs_of_unknown_types_for_a_while_if_the_setting_says_so(self):
        self.assertEqual(worker(queues={"q": 1})._group._mux.unknown_for, 60)
        self.assertIsNone(mux.unknown_for)

    def test_a_command_that_fails_raises_for_its_caller(self):
        with self.assertRaises(CommandError):
            call_command("bgjob", "job", "show", "none")
