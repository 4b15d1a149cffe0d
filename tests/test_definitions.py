"""A handler that is defined again, by a reload, a cell of a notebook or a second import."""

import functools
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.jobs import a_job
from support.waiting import eventually
from support.workers import Launcher, Recorder

from bgjob import Client, EnqueueRequest, Job, Mux, Retry
from bgjob.mux import Route


MODULE = """
from dataclasses import dataclass
from bgjob import Mux, Retry

@dataclass(frozen=True)
class Mail:
    to: str

@mux.handler("plain", keep=True, priority=1, {more})
def plain(job, {conn}): return Retry(delay={number})

@mux.handler(Mail, max_attempts={number})
async def mail(mail): return Retry(delay={number})

mux.register("lambda", lambda job: None)
"""


def defined(mux: Mux, name: str, number: int, *, file: str | None = None, **more: str) -> Any:
    """Execute the module under a name, as an import of it does."""
    module = sys.modules.setdefault(name, ModuleType(name))
    vars(module).update(mux=mux, __file__=file)
    text = MODULE.format(number=number, **{"more": "", "conn": "**_", **more})
    exec(compile(text, file or "<cell>", "exec"), vars(module))
    return module


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "modules", {**sys.modules})


def route_of(mux: Mux, type: str) -> Route:
    route = mux.route_of(type)
    assert route is not None
    return route


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelname == "WARNING"]


def test_a_handler_of_a_reloaded_module_takes_the_place_of_the_old_one_with_its_options(
    modules: None, caplog: pytest.LogCaptureFixture
) -> None:
    mux = Mux()
    old = defined(mux, "jobs", 1, more="transactional=True", conn="conn")
    assert (mux.transactional, mux.kept, warned(caplog)) == ({"plain"}, {"plain"}, [])
    before = old.Mail
    new = defined(mux, "jobs", 2)
    assert (mux.transactional, mux.kept) == (set(), {"plain"})
    assert route_of(mux, "plain").run(a_job("plain")) == Retry(delay=2)
    assert route_of(mux, "Mail").policy.max_attempts == 2
    assert mux.request(new.Mail("a"), queue="q").arg == b'{"to":"a"}'
    with pytest.raises(TypeError, match=r"of jobs\.Mail as it was before .* make a new one"):
        mux.request(before("a"), queue="q")
    assert warned(caplog) == [
        f"job type {type!r}: jobs.{name} was registered again, and takes the place of the one "
        "before; a worker that runs keeps the one that it began with"
        for type, name in [("plain", "plain"), ("Mail", "mail"), ("lambda", "<lambda>")]
    ]


@pytest.mark.parametrize("main", ["__main__", "__mp_main__", "src.app.jobs"])
def test_a_module_that_is_imported_under_two_names_may_register_its_handlers_twice(
    main: str, modules: None, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    file = tmp_path / "jobs.py"
    (tmp_path / "link").symlink_to(tmp_path)
    sys.modules.pop(main, None)
    mux = Mux()
    program = defined(mux, main, 1, file=str(file))
    defined(mux, "app.jobs", 2, file=str(tmp_path / "link" / "jobs.py"))
    assert route_of(mux, "Mail").policy.max_attempts == 2
    assert warned(caplog)[0] == (
        f"job type 'plain': the module app.jobs was imported under a second name, {main}: its "
        f"plain takes the place of {main}.plain; a worker that runs keeps the one that it began "
        "with"
    )
    with pytest.raises(TypeError, match=rf"of {main}\.Mail as it was before app\.jobs\.Mail was"):
        mux.request(program.Mail("a"), queue="q")


def test_a_handler_that_is_another_one_is_refused_and_changes_nothing(
    modules: None, caplog: pytest.LogCaptureFixture
) -> None:
    mux = Mux()
    module = defined(mux, "jobs", 1)

    def local(job: Job) -> None: ...

    others = [
        module.mail,
        local,
        functools.partial(module.plain),
        lambda job: None,
        Namesake("jobs", "plain2"),
        Namesake("elsewhere", "plain"),
    ]
    for handler in others:
        with pytest.raises(ValueError, match="'plain' is registered already: a type has one"):
            mux.register("plain", handler)
    mux.register("local", local)
    with pytest.raises(ValueError, match="'local' is registered already"):  # it may hold others
        mux.register("local", local)
    with pytest.raises(TypeError, match="takes"):
        exec(compile("@mux.handler('plain')\ndef plain(): ...", "x", "exec"), vars(module))
    assert mux.kept == {"plain"} and route_of(mux, "plain").policy.priority == 1
    assert warned(caplog) == []


class Namesake:
    def __init__(self, module: str, name: str) -> None:
        self.__module__ = module
        self.__qualname__ = name

    def __call__(self, job: Job) -> None: ...


def test_a_running_worker_keeps_the_handlers_that_it_began_with(
    launcher: Launcher, dsn: str, modules: None
) -> None:
    mux = Mux()
    defined(mux, "jobs", 1)
    recorder = Recorder()
    launcher.start(mux, observer=recorder)
    defined(mux, "jobs", 2, more="transactional=True, exclusive=True", conn="conn")
    mux.register("new", lambda job: None)
    with Client(dsn) as client:
        client.bulk_enqueue([EnqueueRequest("q", type) for type in ("plain", "new")])
    assert eventually(lambda: len(recorder.of("retried", "dead")) == 2)
    assert recorder.of("retried")[0][3] == 1.0
    assert "no handler is registered" in recorder.of("dead")[0][3]
