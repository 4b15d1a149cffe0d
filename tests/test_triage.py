"""The dead are grouped by how they died; one is tried, then the rest."""

from datetime import timedelta
from typing import Any

import psycopg
import pytest

from bgjob import EnqueueRequest, Job, MoveToDlq, Mux


def decline(job: Job) -> MoveToDlq:
    return MoveToDlq(f"card '{job.id}' was declined")


def confirm(job: Job) -> None:
    raise ConnectionError(f"mail server {job.id} is away\nsecond line")


MUX = Mux().register("pay", decline).register("confirm", confirm, max_attempts=1)


def kill(client: Any, type: str, *ids: str, queue: str = "q", mux: Mux = MUX) -> None:
    for id_ in ids:
        client.enqueue(EnqueueRequest(queue, type, id=id_, arg={"to": id_}))
        client.do(queue, mux)


def test_dead_jobs_are_grouped_by_how_they_died(client: Any, conn: psycopg.Connection) -> None:
    kill(client, "confirm", "1", "22")
    kill(client, "pay", "a")
    kill(client, "confirm", "333", queue="other")
    kill(client, "unheard-of", "b")
    groups = client.dlq.groups()
    assert [(g.jobs, g.queues, g.type, g.id, g.title) for g in groups] == [
        (3, ("other", "q"), "confirm", "333", "ConnectionError: mail server 0 is away"),
        (1, ("q",), "unheard-of", "b", groups[1].title),
        (1, ("q",), "pay", "a", "card <> was declined"),
    ]
    assert groups[1].title.startswith("UnknownTypeError: no handler is registered for job type <>")
    [three, *_] = groups
    dead = client.dlq.list(fingerprint=three.fingerprint)
    assert [job.id for job in dead] == ["333", "22", "1"]
    assert {job.fingerprint for job in dead} == {three.fingerprint}
    assert (three.first, three.last) == (dead[2].moved_at, dead[0].moved_at)
    assert (three.number, three.error) == (dead[0].number, dead[0].last_error)
    assert "second line\n  at test_triage.py:" in three.error
    assert client.dlq.groups(limit=1) == [three]
    assert [g.jobs for g in client.dlq.groups(queue="q", older_than=0)] == [2, 1, 1]
    assert client.dlq.groups(moved_after=three.last + timedelta(hours=1)) == []
    conn.execute("update bgjob_dead_job set fingerprint = 0 where job_id = 'a'")
    conn.execute("update bgjob_dead_job set fingerprint = -1 where job_id = 'b'")
    groups = client.dlq.groups()
    assert [g.fingerprint for g in groups[1:]] == ["ffffffffffffffff", "000000000000"]
    assert [client.dlq.purge(fingerprint=g.fingerprint) for g in groups] == [3, 1, 1]


def test_dead_jobs_are_chosen_by_group_by_number_and_up_to_a_number(client: Any) -> None:
    kill(client, "pay", *"abcdef")
    [group] = client.dlq.groups()
    numbers = {job.id: job.number for job in client.dlq.list()}
    up_to_c = client.dlq.list(upto=numbers["c"])
    assert [job.id for job in up_to_c] == ["c", "b", "a"]
    assert client.dlq.requeue(numbers=[numbers["b"], numbers["f"], 10**9]) == ["b", "f"]
    assert client.dlq.requeue(fingerprint=group.fingerprint, upto=numbers["c"]) == ["a", "c"]
    assert client.dlq.purge(fingerprint=group.fingerprint, numbers=[numbers["d"]]) == 1
    assert client.dlq.purge(fingerprint="0123456789ab") == 0
    assert client.dlq.list(numbers=[]) == []
    assert [job.id for job in client.dlq.list()] == ["e"]


@pytest.mark.parametrize("wrong", ["", "4f1c", "4F1C9A0E2B77", "0x4f1c9a0e2b", "a" * 17, 7])
def test_what_is_not_a_fingerprint_is_refused(client: Any, wrong: Any) -> None:
    with pytest.raises(ValueError, match="12 hexadecimal digits.*bgjob triage"):
        client.dlq.list(fingerprint=wrong)
