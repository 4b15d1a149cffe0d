"""The addresses: which function answers, with which template and which parts."""

import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

from starlette.responses import Response

from bgjob.ext.web.actions import dead as dead_actions
from bgjob.ext.web.actions import groups as group_actions
from bgjob.ext.web.actions import jobs as job_actions
from bgjob.ext.web.actions import limits as limit_actions
from bgjob.ext.web.actions import queues as queue_actions
from bgjob.ext.web.actions.action import Action
from bgjob.ext.web.frame import Section, original, path
from bgjob.ext.web.pages import dead, doctor, jobs, limits, overview, queue, schedules, workers
from bgjob.ext.web.pages.payload import payload, payload_of_dead
from bgjob.ext.web.visit import Visit

T = TypeVar("T")

Segments: TypeAlias = tuple[str, ...]
"""The segments of a path; one in braces is a name, which may contain anything, also slashes."""


@dataclass(frozen=True, slots=True)
class Page:
    """An address that is looked at.

    Attributes:
        segments: of its path.
        ask: returns what it shows.
        template: the template without `.html`; those of its parts begin with it.
        parts: what can be asked for on its own.
        nav: the entry of the navigation.
        title: the title; what is in braces is replaced by the name in the path.

    """

    segments: Segments
    ask: Callable[[Visit], Awaitable[object]]
    template: str
    parts: tuple[str, ...]
    nav: Section
    title: str

    def here(self, visit: Visit) -> str:
        """Return the address of this very page, with its query but without the part."""
        params = visit.request.path_params
        segments = [params[s[1:-1]] if s.startswith("{") else s for s in self.segments]
        fields = visit.request.query_params.items()
        query = {name: value for name, value in fields if name not in {"part", "payload"}}
        return visit.root + path(*segments, **query)


_ALL = (
    Page(
        (),
        overview.overview,
        "overview",
        ("summary", "queues", "groups", "longest"),
        "overview",
        "Overview",
    ),
    Page(
        ("queues", "{queue}"), queue.queue, "queue", ("now", "chart"), "overview", "Queue {queue}"
    ),
    Page(("jobs",), jobs.jobs, "jobs", (), "jobs", "Jobs"),
    Page(("jobs", "{id}"), jobs.job, "job", ("why",), "jobs", "Job {id}"),
    Page(("dead",), dead.dead, "dead", ("groups",), "dead", "Dead jobs"),
    Page(
        ("dead", "groups", "{fingerprint}"),
        dead.group,
        "group",
        ("steps",),
        "dead",
        "Group {fingerprint}",
    ),
    Page(("dead", "{number}"), dead.dead_job, "dead_job", (), "dead", "Dead job {number}"),
    Page(("limits",), limits.limits, "limits", ("limits",), "limits", "Limits"),
    Page(
        ("schedules",), schedules.schedules, "schedules", ("schedules",), "schedules", "Schedules"
    ),
    Page(("workers",), workers.workers, "workers", ("workers",), "workers", "Workers"),
    Page(
        ("workers", "{number}"), workers.worker, "worker", ("worker",), "workers", "Worker {number}"
    ),
    Page(("doctor",), doctor.doctor, "doctor", (), "doctor", "Doctor"),
)

Route: TypeAlias = tuple[re.Pattern[str], T]


def _route(segments: Segments, target: T) -> Route[T]:
    parts = [f"(?P<{s[1:-1]}>[\\s\\S]+)" if s.startswith("{") else re.escape(s) for s in segments]
    return re.compile("/" + "/".join(parts)), target


PAGES: Sequence[Route[Page]] = [_route(page.segments, page) for page in _ALL]
"""What GET answers; the first that matches."""

DOWNLOADS: Sequence[Route[Callable[[Visit], Awaitable[Response]]]] = [
    _route(("jobs", "{id}", "payload"), payload),
    _route(("dead", "{number}", "payload"), payload_of_dead),
]
"""What GET answers with a file."""

ACTIONS: Sequence[Route[Action]] = [
    _route(("queues", "{queue}", "pause"), queue_actions.pause),
    _route(("queues", "{queue}", "resume"), queue_actions.resume),
    _route(("jobs", "{id}", "cancel"), job_actions.cancel),
    _route(("jobs", "{id}", "now"), job_actions.now),
    _route(("jobs", "{id}", "priority"), job_actions.priority),
    _route(("jobs", "{id}", "abandon"), job_actions.abandon),
    _route(("dead", "requeue"), dead_actions.requeue),
    _route(("dead", "purge"), dead_actions.purge),
    _route(("dead", "groups", "{fingerprint}", "canary"), group_actions.canary),
    _route(("dead", "groups", "{fingerprint}", "rest"), group_actions.rest),
    _route(("dead", "groups", "{fingerprint}", "stop"), group_actions.stop),
    _route(("limits", "set"), limit_actions.set_limit),
    _route(("limits", "remove"), limit_actions.remove_limit),
    _route(("schedules", "{name}", "run"), queue_actions.run),
    _route(("schedules", "{name}", "pause"), queue_actions.pause_schedule),
    _route(("schedules", "{name}", "resume"), queue_actions.resume_schedule),
    _route(("schedules", "{name}", "remove"), queue_actions.remove),
]
"""What POST does: every action that there is."""


def found(routes: Sequence[Route[T]], path: str) -> tuple[T, dict[str, str]] | None:
    """Return what a path leads to, with the names in it; None if it leads nowhere."""
    for pattern, target in routes:
        if (match := pattern.fullmatch(path)) is not None:
            names = {name: original(value) for name, value in match.groupdict().items()}
            return target, names
    return None
