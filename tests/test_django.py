"""A real Django project, in support/django_project, with its own tests, which `manage.py test` runs.

The suite runs them with the versions that are installed. With others, in an environment of its own:

    pip install -e '.[test]' 'django~=6.0' && python -m pytest tests/test_django.py
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from support import nursery
from support.database import count, row
from support.waiting import PATIENCE, eventually

from bgjob import Client, EnqueueRequest
from bgjob.schema import init_sql

PROJECT = Path(__file__).parent / "support" / "django_project"


IMPORTS = (
    "bgjob.ext.django.task_backend",
    "bgjob.ext.django.testing",
    "django.core.management.commands.makemigrations",
    "django.core.management.commands.migrate",
    "django.core.management.commands.test",
    "uvicorn",
)
"""What may be imported before the settings are known, and is nearly all."""


class Project:
    """Runs the project's manage.py on a database."""

    def __init__(self, dsn: str, folder: Path, **env: str) -> None:
        self.env = {**os.environ, "SHOP_DSN": dsn, "PYTHONWARNINGS": "error", **env}
        self.env["PYTHONPATH"] = str(PROJECT)
        for name in ("BGJOB_DSN", "DATABASE_URL", "DJANGO_SETTINGS_MODULE"):
            self.env.pop(name, None)
        self._program = folder / "program.py"

    def manage(self, *arguments: str, status: int = 0) -> str:
        """Run a command; return what it printed, and what it said where it failed."""
        done = nursery.run(
            "manage.py",
            *arguments,
            cwd=PROJECT,
            env=self.env,
            # Django takes psycopg 2 only where it is imported after the settings.
            imports=() if "SHOP_PSYCOPG2" in self.env else IMPORTS,
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + (done.stderr if status else "")

    def run(self, code: str) -> str:
        """Run a program in the project."""
        program = "import django\ndjango.setup()\nfrom django.core.management import call_command\n"
        self._program.write_text(program + code)
        env = self.env | {"DJANGO_SETTINGS_MODULE": "mysite.settings"}
        done = nursery.run(str(self._program), cwd=PROJECT, env=env, imports=IMPORTS)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def settings(**values: Any) -> str:
    return json.dumps(values)


@pytest.fixture
def project(empty_dsn: str, tmp_path: Path) -> Project:
    return Project(empty_dsn, tmp_path)


def test_jobs_tasks_the_admin_and_tests_work_in_a_project(project: Project) -> None:
    project.manage("test", "shop")


CONNECTIONS: dict[str, dict[str, str]] = {
    "server-side binding": {"SHOP_DATABASE": settings(OPTIONS={"server_side_binding": True})},
    "pool": {"SHOP_DATABASE": settings(OPTIONS={"pool": {"min_size": 1, "max_size": 3}})},
    "psycopg2": {"SHOP_PSYCOPG2": "yes"},
}


@pytest.mark.parametrize("kind", CONNECTIONS)
def test_jobs_are_a_part_of_djangos_transactions(project: Project, kind: str) -> None:
    project.env |= CONNECTIONS[kind]
    project.manage("test", "shop.tests.test_enqueue")


@pytest.mark.parametrize("processes", [1, 2])
def test_manage_py_runs_workers_of_the_setting_with_the_jobs_of_all_apps(
    project: Project, empty_dsn: str, tmp_path: Path, processes: int
) -> None:
    project.manage("migrate", "--verbosity=0")
    project.env["SHOP_SETTINGS"] = settings(
        BGJOB={"QUEUES": {"mail": 2}, "PROCESSES": processes, "GRACE": 5, "WORKER": {"lease": 9}}
    )
    with psycopg.connect(empty_dsn, autocommit=True) as conn, Client(empty_dsn) as client:
        conn.execute("insert into shop_order (number, note) values ('1', '')")
        client.enqueue(EnqueueRequest("mail", "confirm", {"order": "1"}))
        with subprocess.Popen(
            [sys.executable, PROJECT / "manage.py", "bgjob", "worker"],
            cwd=tmp_path,
            env={name: text for name, text in project.env.items() if name != "PYTHONPATH"},
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                assert eventually(lambda: count(conn) == 0)
                assert eventually(lambda: len(client.workers()) == processes)
                [worker, *_] = client.workers()
                assert (worker.queues, worker.lease) == ({"mail": 2}, 9)
                process.send_signal(signal.SIGTERM)
                assert process.wait(PATIENCE) == 0
            finally:
                process.kill()
        assert row(conn, "select note from shop_order") == ("confirmed",)
        assert json.loads(project.manage("bgjob", "stats", "--json")) == []


def test_manage_py_starts_the_worker_again_when_a_file_of_the_project_changes(
    project: Project, empty_dsn: str, tmp_path: Path
) -> None:
    project.manage("migrate", "--verbosity=0")
    folder, log = tmp_path / "project", tmp_path / "log"
    shutil.copytree(PROJECT, folder)
    jobs = folder / "shop" / "jobs.py"
    # The setting's processes are those of production.
    project.env["SHOP_SETTINGS"] = settings(BGJOB={"QUEUES": ["mail"], "PROCESSES": 2})
    with (
        psycopg.connect(empty_dsn, autocommit=True) as conn,
        Client(empty_dsn) as client,
        log.open("w") as err,
        subprocess.Popen(
            [sys.executable, "manage.py", "bgjob", "worker", "--reload"],
            cwd=folder,
            env=project.env,
            stderr=err,
        ) as process,
    ):
        try:
            conn.execute("insert into shop_order (number, note) values ('1', '')")

            def notes(note: str) -> Callable[[], bool]:
                def does() -> bool:
                    client.enqueue(EnqueueRequest("mail", "confirm", {"order": "1"}))
                    assert eventually(lambda: count(conn) == 0), log.read_text()
                    return row(conn, "select note from shop_order") == (note,)

                return does

            for note in ("confirmed", "sent at once"):
                # The one that is to end may still take the first job.
                assert eventually(notes(note)), log.read_text()
                jobs.write_text(jobs.read_text().replace("confirmed", "sent at once"))
                assert eventually(lambda: "shop/jobs.py has changed" in log.read_text())
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE) == 0, log.read_text()
        finally:
            process.kill()


def test_manage_py_has_every_command_and_the_database_that_is_named(
    project: Project, dsn: str
) -> None:
    project.env["SHOP_OTHER_DSN"] = dsn
    with Client(dsn) as client:
        client.enqueue(EnqueueRequest("q", "t", id="one"))
    assert "one" in project.manage("bgjob", "job", "list", "--database", "other")
    assert "migration/init.sql" in project.manage("bgjob", "stats", status=1)
    assert "'third' doesn't exist" in project.manage("bgjob", "--database=third", "top", status=1)
    usage = project.manage("bgjob", "worker", "--help")
    assert "usage: manage.py bgjob worker" in usage and "[MODULE:NAME]" in usage
    project.env["SHOP_SETTINGS"] = settings(BGJOB={"QUEUE": []})
    assert "did you mean 'QUEUES'?" in project.manage("bgjob", "stats", status=1)


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


def test_tables_that_are_there_already_are_recorded_by_fake(dsn: str, tmp_path: Path) -> None:
    other = Project(dsn, tmp_path)
    assert "manage.py migrate bgjob 0001 --fake" in other.manage("migrate", "bgjob", status=1)
    other.run(
        'call_command("migrate", "bgjob", "0001", fake=True); call_command("migrate", verbosity=0)'
    )
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


def test_async_views_enqueue_under_uvicorn(
    project: Project, empty_dsn: str, tmp_path: Path
) -> None:
    project.manage("migrate", "--verbosity=0")
    path = tmp_path / "socket"
    log = tmp_path / "log"
    with log.open("wb") as output:
        server = nursery.fork(
            "uvicorn",
            *("mysite.asgi:application", "--uds", str(path)),
            cwd=PROJECT,
            env=project.env,
            output=output,
            imports=IMPORTS,
        )
        assert server.stdin is not None
        server.stdin.close()
        try:
            assert eventually(path.exists)
            with (
                httpx.Client(
                    transport=httpx.HTTPTransport(uds=str(path), retries=20), timeout=PATIENCE
                ) as client,
                ThreadPoolExecutor(4) as pool,
            ):
                urls = [f"http://shop/async/{n}{'?together' if n % 2 else ''}" for n in range(20)]
                urls += ["http://shop/async/undone?together&fail"]
                assert {found.status_code for found in pool.map(client.get, urls)} == {200}
            server.send_signal(signal.SIGTERM)
            server.wait(PATIENCE)
            assert "Traceback" not in log.read_text()
        finally:
            server.kill()
    with psycopg.connect(empty_dsn) as conn:
        assert count(conn) == 20
        assert row(conn, "select count(*) from shop_order") == (10,)
