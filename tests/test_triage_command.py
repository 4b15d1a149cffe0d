"""`bgjob triage`: what it prints, and its exit status."""

import json
import re
from collections.abc import Callable, Iterator

import psycopg
import pytest
from support.database import count
from support.waiting import eventually

from bgjob import Client, EnqueueRequest, Job, Mux, Worker, cli

Run = Callable[..., tuple[int, str, str]]


class Mail:
    """A worker of queue mail."""

    is_away = True

    def confirm(self, job: Job) -> None:
        if self.is_away:
            raise ConnectionError(f"mail server 'mx-{job.id}' is away")


@pytest.fixture
def mail(dsn: str) -> Iterator[Mail]:
    mail = Mail()
    mux = Mux().register("confirm", mail.confirm, max_attempts=1)
    with Client(dsn) as client, Worker(client, "mail", mux):
        assert eventually(client.workers)
        yield mail


@pytest.fixture
def run(
    dsn: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Run]:
    """Run the command, and return its exit status and output."""
    monkeypatch.setenv("BGJOB_DSN", dsn)

    def run(*args: str) -> tuple[int, str, str]:
        status = cli.main(["triage", *args])
        return status, *capsys.readouterr()

    yield run


def enqueue(client: Client, *ids: str, type: str = "confirm") -> None:
    """Enqueue jobs, and wait until they are dead."""
    for id_ in ids:
        client.enqueue(EnqueueRequest("mail", type, {"to": "x", "order": 7}, id=id_))
    assert eventually(lambda: {dead.id for dead in client.dlq.list(type=type)} >= {*ids})


def test_groups_are_listed_and_one_is_shown(
    run: Run, mail: Mail, plain_client: Client, conn: psycopg.Connection
) -> None:
    assert run() == (0, "", "no dead jobs\n")
    enqueue(plain_client, *map(str, range(4)))
    enqueue(plain_client, "\x1b[31mred", type="unheard")
    first, second = plain_client.dlq.groups()
    status, out, err = run()
    assert (status, err) == (0, f"one of them: bgjob triage {first.fingerprint}\n")
    head, one, two = out.splitlines()
    assert head.split() == ["group", "jobs", "queue", "type", "first", "last", "error"]
    assert re.fullmatch(
        rf"{first.fingerprint}     4  mail   confirm  [\d:]{{8}}  [\d:]{{8}}  "
        "ConnectionError: mail server <> is away",
        one,
    )
    assert two.split()[:4] == [second.fingerprint, "1", "mail", "unheard"]
    assert run("--since", "1h", "--queue", "mail", "--type", "confirm")[1].count("\n") == 2
    assert run("--limit", "1")[2].endswith("these are the largest; for more add: --limit 10\n")
    conn.execute("update bgjob_dead_job set moved_at = now() - interval '400 days'")
    assert run("--since", "1h") == (0, "", "no dead jobs\n")
    assert re.search(r"\d{4}-\d\d-\d\d  ConnectionError", run()[1])

    [worker] = plain_client.workers()
    status, out, _ = run(first.fingerprint)
    text = re.sub(r"\d{4}-.*ago\)", "WHEN", out)
    latest = [dead.id for dead in plain_client.dlq.list(fingerprint=first.fingerprint)]
    assert text.splitlines() == [
        f"group     {first.fingerprint}: 4 dead jobs of type 'confirm'",
        "queue     mail",
        "first     WHEN",
        "last      WHEN",
        "attempts  1 (of the latest 4)",
        f"workers   {worker.number} ({worker.host}, pid {worker.pid}): 4 jobs",
        "payload   to, order (keys of the latest 4)",
        f"samples   {latest[0]}, WHEN",
        f"            ConnectionError: mail server 'mx-{latest[0]}' is away",
        next(line for line in text.splitlines() if " at test_triage_command.py:" in line),
        f"          {latest[1]}, WHEN",
        f"            ConnectionError: mail server 'mx-{latest[1]}' is away",
        f"          {latest[2]}, WHEN",
        f"            ConnectionError: mail server 'mx-{latest[2]}' is away",
        f"do        bgjob triage {first.fingerprint} --canary",
        f"then      bgjob triage {first.fingerprint} --rest --rate 100 --stop-after 5",
        f"or        bgjob triage {first.fingerprint} --purge --yes",
    ]
    assert "\\x1b[31mred" in run(second.fingerprint)[1]

    listed = json.loads(run("--json")[1])
    assert [group["fingerprint"] for group in listed] == [first.fingerprint, second.fingerprint]
    assert listed[0] | {"jobs": 4, "queues": ["mail"], "title": first.title} == listed[0]
    shown = json.loads(run(first.fingerprint, "--json")[1])
    assert (shown["attempts"], shown["payload_keys"]) == ({"1": 4}, ["to", "order"])
    assert shown["workers"] == [
        {
            "number": worker.number,
            "jobs": 4,
            "host": worker.host,
            "pid": worker.pid,
            "release": worker.release,
        }
    ]
    conn.execute("delete from bgjob_worker")
    assert f"workers   {worker.number}: 4 jobs\n" in run(first.fingerprint)[1]
    assert [sample["id"] for sample in shown["samples"]] == latest[:3]


def test_one_is_tried_then_the_rest_or_they_are_purged(
    run: Run, mail: Mail, plain_client: Client, conn: psycopg.Connection
) -> None:
    enqueue(plain_client, *map(str, range(25)))
    [group] = plain_client.dlq.groups()
    one = group.fingerprint

    status, out, err = run(one, "--canary")
    assert (status, err) == (3, "")
    assert re.match(r"canary \d+ went back to 'mail' … .*died again after \d+\.\d s\n", out)
    assert "  ConnectionError: mail server 'mx-" in out
    assert " at test_triage_command.py:" in out
    assert eventually(lambda: len(plain_client.dlq.list()) == 25)
    [group] = plain_client.dlq.groups()
    status, out, err = run(one, "--rest", "--rate", "10", "--stop-after", "0")
    assert status == 3
    assert re.match(r"\d+ of 25 back; \d+ failed again\n", out)
    assert err.endswith(f"bgjob triage {one} --rest --upto {group.number}\n")

    assert eventually(lambda: len(plain_client.dlq.list()) == 25)
    mail.is_away = False
    status, out, err = run(one, "--canary", "--json")
    assert (status, err, json.loads(out)["verdict"]) == (0, "", "completed")
    status, out, err = run(one, "--canary")
    assert (status, err) == (0, f"the others: bgjob triage {one} --rest\n")
    assert re.search(r"… completed after \d+\.\d s\n$", out)
    plain_client.enqueue(
        EnqueueRequest("mail", "confirm", id=plain_client.dlq.list()[-1].id, delay=3600)
    )
    status, out, _ = run(one, "--rest", "--rate", "1000")
    assert (status, out) == (
        0,
        "22 of 23 back; 0 failed again\n1 stay dead: live jobs have their ids\n",
    )
    assert eventually(lambda: count(conn) == 1)
    status, _, err = run(one, "--canary")
    assert (status, "or all of them are in their queues again" in err) == (1, True)
    status, _, err = run(one, "--purge")
    assert (status, "--purge deletes its dead job permanently: add --yes" in err) == (2, True)
    assert run(one, "--purge", "--yes")[:2] == (0, "purged 1 dead job\n")
    for action in ("", "--rest", "--purge"):
        status, out, err = run(one, *action.split())
        assert (status, out, err) == (1, "", f"bgjob: no dead job has the fingerprint {one}\n")


def test_an_undecided_canary_says_how_to_follow_it(
    run: Run, plain_client: Client, conn: psycopg.Connection
) -> None:
    plain_client.enqueue(EnqueueRequest("mail", "confirm", id="-1"))
    plain_client.do("mail", Mux())
    one = plain_client.dlq.list()[0].fingerprint
    status, out, err = run(one, "--canary")
    assert (status, out, count(conn)) == (1, "", 0)
    assert "no live worker is known that claims from queue 'mail'" in err
    status, out, err = run(one, "--canary", "--force", "--wait", "0")
    assert (status, err) == (4, "how it goes on: bgjob explain -- -1\n")
    assert out == "canary -1 went back to 'mail' … still undecided after 0.0 s\n"


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ("--canary", "--canary needs a GROUP"),
        ("4f1c9a0e2b77 --queue q", "--queue is for the list"),
        ("4f1c9a0e2b77 --rest --wait 3", "--wait needs --canary"),
        ("4f1c9a0e2b77 --canary --stop-after 0", "--stop-after needs --rest"),
        ("4f1c9a0e2b77 --yes", "--yes needs --purge"),
        ("4f1c", "12 hexadecimal digits"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(run: Run, args: str, told: str) -> None:
    status, out, err = run(*args.split())
    assert (status, out, told in err) == (2, "", True), err


@pytest.mark.parametrize(
    "args",
    ["--canary --rest", "--rest --rate 0", "--rest --rate x", "--rest --stop-after -1"],
)
def test_arguments_that_cannot_be_parsed_are_refused(
    args: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["triage", "4f1c9a0e2b77", *args.split()])
    assert ended.value.code == 2
    assert "usage: bgjob triage" in capsys.readouterr().err
