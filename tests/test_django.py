"""A real Django project, in support/django_project, with its own tests, which `manage.py test` runs.

The suite runs them with the versions that are installed. With others, in an environment of its own:

    pip install -e '.[test]' 'django~=6.0' && python -m pytest tests/test_django.py
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from support.documents import ROOT

from bgjob.schema import init_sql

PROJECT = Path(__file__).parent / "support" / "django_project"


class Project:
    """Runs the project's manage.py on a database."""

    def __init__(self, dsn: str, **env: str) -> None:
        self.env = {**os.environ, "SHOP_DSN": dsn, "PYTHONWARNINGS": "error", **env}
        for name in ("BGJOB_DSN", "DATABASE_URL", "DJANGO_SETTINGS_MODULE"):
            self.env.pop(name, None)

    def manage(self, *arguments: str, status: int = 0) -> str:
        """Run a command; return what it printed, and what it said where it failed."""
        done = subprocess.run(
            [sys.executable, "manage.py", *arguments],
            cwd=PROJECT,
            env=self.env,
            text=True,
            capture_output=True,
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + (done.stderr if status else "")

    def run(self, code: str) -> str:
        """Run a program in the project."""
        program = "import django\ndjango.setup()\nfrom django.core.management import call_command\n"
        done = subprocess.run(
            [sys.executable, "-c", program + code],
            cwd=PROJECT,
            env=self.env | {"DJANGO_SETTINGS_MODULE": "mysite.settings"},
            text=True,
            capture_output=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def settings(**values: Any) -> str:
    return json.dumps(values)


@pytest.fixture
def project(empty_dsn: str) -> Iterator[Project]:
    yield Project(empty_dsn)


CONNECTIONS: dict[str, dict[str, str]] = {
    "psycopg": {},
    "server-side binding": {"SHOP_DATABASE": settings(OPTIONS={"server_side_binding": True})},
    "pool": {"SHOP_DATABASE": settings(OPTIONS={"pool": {"min_size": 1, "max_size": 3}})},
    "psycopg2": {"SHOP_PSYCOPG2": "yes"},
}


@pytest.mark.parametrize("kind", CONNECTIONS)
def test_jobs_are_a_part_of_djangos_transactions(project: Project, kind: str) -> None:
    project.env |= CONNECTIONS[kind]
    project.manage("test", "shop.tests.test_enqueue")


def test_the_migration_applies_init_sql_and_takes_it_back(project: Project, empty_dsn: str) -> None:
    printed = project.run(
        """
call_command("makemigrations", "--check")
call_command("sqlmigrate", "bgjob", "0001")
call_command("migrate", "bgjob", verbosity=0)
call_command("migrate", "bgjob", "zero", verbosity=0)
call_command("migrate", verbosity=0)
from django.contrib.auth.models import Permission
print(sorted(Permission.objects.filter(content_type__app_label="bgjob").values_list("codename")))
"""
    )
    assert init_sql().strip() in printed
    assert "requeue_deadjob" in printed and "add_job" not in printed


def test_tables_that_are_there_already_are_recorded_by_fake(project: Project, dsn: str) -> None:
    other = Project(dsn)
    assert "manage.py migrate bgjob 0001 --fake" in other.manage("migrate", "bgjob", status=1)
    other.manage("migrate", "bgjob", "0001", "--fake")
    other.manage("migrate")
    with psycopg.connect(dsn) as conn:
        conn.execute("drop table django_migrations")  # and so that the database is not kept


def test_another_database_gets_the_tables_if_it_is_postgresql(project: Project) -> None:
    project.env["SHOP_SQLITE"] = "yes"
    project.run(
        """
from bgjob import EnqueueRequest
from bgjob.ext.django import enqueue
call_command("migrate", "bgjob", verbosity=0)
try:
    enqueue(EnqueueRequest("q", "t"))
except Exception as error:
    assert "DATABASES['default'] is sqlite" in str(error)
call_command("migrate", "bgjob", database="other", verbosity=0)
enqueue(EnqueueRequest("q", "t"), using="other")
"""
    )
