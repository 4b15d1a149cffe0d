"""Groups of dead jobs on a terminal: a list of them, and one with its latest jobs."""

import argparse
import sys
from collections import Counter
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson

from bgjob._cli import table
from bgjob._cli.progress import say
from bgjob._triage.died_on import DiedOn, died_on
from bgjob._words import count, lasting
from bgjob.client import Client
from bgjob.job import DeadJob
from bgjob.triage import DeadGroup

_LATEST = 20
"""The latest jobs of a group that are looked at."""

_SAMPLES = 3
_MOST_KEYS = 20


def show_list(client: Client, args: argparse.Namespace) -> int:
    """Print the largest groups."""
    since = None if args.since is None else datetime.now(UTC) - timedelta(seconds=args.since)
    limit = args.limit or 100
    groups = client.dlq.groups(limit=limit + 1, queue=args.queue, type=args.type, moved_after=since)
    there_are_more = len(groups) > limit
    groups = groups[:limit]
    if args.json:
        table.write_json([_group_as_json(group) for group in groups])
    elif groups:
        now = datetime.now().astimezone()
        table.write_table(
            ("group", "jobs", "queue", "type", "first", "last", "error"),
            [
                (
                    group.fingerprint,
                    group.jobs,
                    ", ".join(group.queues),
                    group.type,
                    _when(group.first, now),
                    _when(group.last, now),
                    group.title,
                )
                for group in groups
            ],
        )
        say(f"one of them: bgjob triage {groups[0].fingerprint}")
    else:
        say("no dead jobs")
    if there_are_more:
        say(f"these are the largest; for more add: --limit {10 * limit}")
    return 0


def _when(at: datetime, now: datetime) -> str:
    local = at.astimezone(now.tzinfo)
    if local.date() == now.date():
        return f"{local:%H:%M:%S}"
    return f"{local:%b %d %H:%M}" if local.year == now.year else f"{local:%Y-%m-%d}"


def _group_as_json(group: DeadGroup) -> dict[str, Any]:
    return asdict(group) | {"title": group.title}


def show_one(client: Client, group: DeadGroup, args: argparse.Namespace) -> int:
    """Print a group: what happened, to which jobs, and what to type next."""
    latest = client.dlq.list(fingerprint=group.fingerprint, limit=_LATEST)
    attempts = Counter(job.attempt for job in latest)
    keys = _payload_keys(latest)
    workers = _died_on(client, latest)
    if args.json:
        table.write_json(
            _group_as_json(group)
            | {
                "attempts": {str(attempt): times for attempt, times in sorted(attempts.items())},
                "payload_keys": keys,
                "workers": [worker._asdict() for worker in workers],
                "samples": [
                    {"id": job.id, "number": job.number, "error": job.last_error}
                    for job in latest[:_SAMPLES]
                ],
            }
        )
        return 0
    counted = "1 dead job" if group.jobs == 1 else f"{group.jobs:,} dead jobs"
    shown = "the latest" if len(latest) == 1 else f"the latest {len(latest)}"
    lines = [
        ("group", f"{group.fingerprint}: {counted} of type {group.type!r}"),
        ("queue", ", ".join(group.queues)),
        ("first", _ago(group.first)),
        ("last", _ago(group.last)),
        ("attempts", f"{', '.join(_times(attempts))} (of {shown})"),
        *(("workers" if n == 0 else "", _worker(worker)) for n, worker in enumerate(workers)),
        ("payload", f"{', '.join(keys) or 'no JSON object'} (keys of {shown})"),
    ]
    for n, job in enumerate(latest[:_SAMPLES]):
        lines.append(("" if n else "samples", f"{job.id}, {_ago(job.moved_at)}"))
        error = (job.last_error or "no error").splitlines()
        # The whole text once, then what differs.
        lines += [("", f"  {line}") for line in (error[:1] if n else error)]
    command = f"bgjob triage {group.fingerprint}"
    lines += [
        ("do", f"{command} --canary"),
        ("then", f"{command} --rest --rate 100 --stop-after 5"),
        ("or", f"{command} --purge --yes"),
    ]
    for label, text in lines:
        sys.stdout.write(f"{label:<8}  {table.printable(text)}".rstrip() + "\n")
    return 0


def _times(attempts: Counter[int]) -> list[str]:
    return [
        f"{attempt}" if times == attempts.total() else f"{attempt} ({count(times, 'job')})"
        for attempt, times in sorted(attempts.items())
    ]


def _died_on(client: Client, jobs: list[DeadJob]) -> list[DiedOn]:
    numbers = [job.worker for job in jobs if job.worker is not None]
    return died_on(numbers, client.workers()) if numbers else []


def _worker(worker: DiedOn) -> str:
    text = f"{worker.number}"
    if worker.host is not None:
        release = f", release {worker.release}" if worker.release else ""
        text += f" ({worker.host}, pid {worker.pid}{release})"
    return f"{text}: {count(worker.jobs, 'job')}"


def _ago(at: datetime) -> str:
    ago = lasting((datetime.now(UTC) - at).total_seconds())
    return f"{at.astimezone():%Y-%m-%d %H:%M:%S%z} ({ago} ago)"


def _payload_keys(jobs: list[DeadJob]) -> list[str]:
    keys: Counter[str] = Counter()
    for job in jobs:
        try:
            value = job.json()
        except orjson.JSONDecodeError:
            continue
        if isinstance(value, dict):
            keys.update(map(str, value))
    return [key for key, _ in keys.most_common(_MOST_KEYS)]
