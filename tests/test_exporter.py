"""The exporter measures a database; alerts and dashboard name only what is exported."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import yaml
from faults.proxy import Proxy
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample
from support.clients import Colour
from support.documents import DOCS, ROOT
from support.nursery import fork
from support.roles import Roles
from support.waiting import PATIENCE, eventually

from bgjob import Client, EnqueueRequest, Mux, MoveToDlq, Worker, cli
from bgjob._cli.probing import ask
from bgjob._diagnosis.measuring import horizon
from bgjob._prometheus.families import OF_DATABASES, OF_WORKERS, Family
from bgjob._sql.server import Holder
from bgjob.ext.prometheus import DatabaseMetrics
from bgjob.measurements import PARTS, Horizon, Measurements

ALL = (*OF_WORKERS, *OF_DATABASES)


def samples_of(text: str) -> dict[str, list[Sample]]:
    found: dict[str, list[Sample]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample)
    return found


def printed(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, list[Sample]]:
    assert cli.main(["metrics", *args]) == 0
    return samples_of(capsys.readouterr().out)


def value(samples: dict[str, list[Sample]], name: str, /, **labels: str) -> float:
    [found] = [s.value for s in samples[name] if labels.items() <= s.labels.items()]
    return found


# -- what is measured -------------------------------------------------------------------------


def test_the_command_prints_what_the_database_holds(
    dsn: str, conn: psycopg.Connection, capsys: pytest.CaptureFixture[str]
) -> None:
    with Client(dsn) as client:
        client.bulk_enqueue([EnqueueRequest("mail", "t") for _ in range(3)])
        conn.execute("update bgjob_job set next_run_at = now() - interval '1 hour'")
        client.bulk_enqueue([EnqueueRequest("mail", "t", delay=3600.0) for _ in range(2)])
        client.enqueue(EnqueueRequest("paused", "t"))
        client.pause("paused")
        client.enqueue(EnqueueRequest("dead", "bad"))
        client.do("dead", Mux().register("bad", lambda _: MoveToDlq("why")))
        conn.execute(
            "insert into bgjob_schedule (name, spec, queue, type, priority, next_run_at)"
            " values ('late', 'every 0:05:00', 'mail', 't', 0, now() - interval '1 hour')"
        )
        conn.execute(
            "insert into bgjob_worker (host, pid, program, version, queues, slots, types, lease,"
            " every, seen_at) values ('h', 1, 'p', 'v', '{mail}', '{4}', '{t}', 30, 10,"
            " now() - interval '1 hour')"
        )
        with Worker(client, {"other": 3}, Mux()), psycopg.connect(dsn) as old:
            old.execute("select txid_current()")
            found = printed(capsys, "--dsn", dsn)
    assert value(found, "bgjob_queue_due", queue="mail") == 3
    assert value(found, "bgjob_queue_delayed", queue="mail") == 2
    assert value(found, "bgjob_queue_running", queue="mail") == 0
    assert 3600 <= value(found, "bgjob_queue_oldest_due_seconds", queue="mail") < 7200
    assert value(found, "bgjob_queue_oldest_due_seconds", queue="dead") == 0
    assert value(found, "bgjob_queue_paused", queue="paused") == 1
    assert value(found, "bgjob_queue_paused", queue="mail") == 0
    assert value(found, "bgjob_queue_workers", queue="mail") == 0  # a lost one
    assert value(found, "bgjob_queue_workers", queue="other") == 1
    assert value(found, "bgjob_queue_slots", queue="other") == 3
    assert value(found, "bgjob_workers", state="working") == 1
    assert value(found, "bgjob_workers", state="lost") == 1
    assert value(found, "bgjob_workers_lost_total") == 0
    assert value(found, "bgjob_dead_jobs", queue="dead", type="bad") == 1
    assert 3600 <= value(found, "bgjob_schedule_late_seconds", name="late") < 7200
    assert value(found, "bgjob_horizon_age_transactions", holder="session") >= 1
    assert value(found, "bgjob_horizon_age_transactions", holder="slot") == 0
    assert value(found, "bgjob_horizon_age_seconds", holder="session") > 0
    assert value(found, "bgjob_table_bytes", table="bgjob_job") > 0
    assert value(found, "bgjob_table_index_bytes", table="bgjob_job") > 0
    assert 0 <= value(found, "bgjob_notify_queue_ratio") <= 1
    assert {s.labels["part"]: s.value for s in found["bgjob_scrape_success"]} == dict.fromkeys(
        PARTS, 1.0
    )


def test_counts_stop_at_the_cap_unless_they_are_to_be_exact(
    dsn: str, conn: psycopg.Connection, capsys: pytest.CaptureFixture[str]
) -> None:
    conn.execute(
        "insert into bgjob_job (id, queue, type, next_run_at)"
        " select n::text, 'q', 't', now() from generate_series(1, 10050) as n"
    )
    assert value(printed(capsys, "--dsn", dsn), "bgjob_queue_due", queue="q") == 10_000
    exact = printed(capsys, "--dsn", dsn, "--exact")
    assert value(exact, "bgjob_queue_due", queue="q") == 10_050
    assert value(exact, "bgjob_queue_delayed", queue="q") == 0


def test_a_part_without_a_grant_fails_alone(roles: Roles, colour: Colour) -> None:
    assert colour.client(roles.login("operator")).measure().failures == {}
    client = colour.client(roles.login("producer"))
    found: Measurements = client.measure()
    assert set(found.failures) == {"queues", "workers", "dead", "schedules"}
    assert "permission denied" in found.failures["queues"]
    assert found.queues == ()
    assert {table.name for table in found.tables} >= {"bgjob_job", "bgjob_dead_job"}
    assert [held.holder for held in found.horizon] == ["session", "standby", "slot", "prepared"]
    with pytest.raises(ValueError, match="cap must be a number from 1, not 0"):
        client.measure(cap=0)


def test_the_oldest_of_each_kind_of_holder_is_measured() -> None:
    def holder(kind: str, transactions: int, seconds: float | None) -> Holder:
        return Holder(
            *(kind, "1", None, None, None, None, None, transactions, seconds, None, None, False)
        )

    holders = [
        holder("session", 10, None),
        holder("session", 5, 60.0),
        holder("slot", 7, None),
    ]
    assert horizon(holders) == (
        Horizon("session", 10, 60.0),
        Horizon("standby", 0, None),
        Horizon("slot", 7, None),
        Horizon("prepared", 0, None),
    )


def test_an_answer_is_given_again_for_a_while_and_a_worker_that_vanishes_counts_once(
    dsn: str, conn: psycopg.Connection
) -> None:
    def seen(*ago: int) -> None:
        conn.execute("delete from bgjob_worker where number > 0")
        for number, seconds in enumerate(ago, 1):
            conn.execute(
                "insert into bgjob_worker (number, host, pid, program, version, queues, slots,"
                " types, lease, every, seen_at) overriding system value"
                " values (%s, 'h', 1, 'p', 'v', '{q}', '{4}', '{t}', 30, 10,"
                " now() - %s * interval '1 s')",
                [number, seconds],
            )

    def lost(metrics: DatabaseMetrics) -> float:
        [found] = [f for f in metrics.collect() if f.name == "bgjob_workers_lost"]
        return found.samples[0].value

    with Client(dsn) as client:
        metrics = DatabaseMetrics(client, registry=None, keep=0)
        keeping = DatabaseMetrics(client, registry=None)
        seen(0, 100)
        assert lost(metrics) == 0  # it vanished before
        kept = keeping.collect()
        seen(100, 100)
        assert keeping.collect() is kept
        assert lost(metrics) == lost(metrics) == 1
        seen(0, 0)
        assert lost(metrics) == 1
        seen(100, 100)
        assert lost(metrics) == 3


def test_only_declared_metrics_are_exported(dsn: str) -> None:
    declared = {(family.name, family.kind) for family in OF_DATABASES}
    registry = CollectorRegistry()
    with Client(dsn) as client:
        metrics = DatabaseMetrics(client, registry=registry)
        assert {(f.name, f.type) for f in metrics.describe()} == declared
        assert {(f.name, f.type) for f in registry.collect()} == declared


def test_the_command_listens_until_a_signal_also_without_a_database(dsn: str) -> None:
    with tempfile.TemporaryDirectory() as folder, Proxy(dsn) as proxy:
        path = Path(folder) / "s"
        env = {**os.environ, "PYTHONPATH": str(ROOT), "BGJOB_DSN": proxy.dsn(dsn)}
        with (Path(folder) / "out").open("wb") as out:
            process = fork(
                *("bgjob", "metrics", "--listen", f"unix:{path}", "--keep=0"),
                env=env,
                output=out,
                cwd=Path(folder),
            )
        assert process.stdin is not None
        process.stdin.close()

        def get(target: str) -> tuple[int, str]:
            return ask(path, target, PATIENCE)

        try:
            assert eventually(path.exists)
            status, text = get("/metrics")
            assert status == 200
            assert value(samples_of(text), "bgjob_scrape_success", part="queues") == 1
            assert get("/")[0] == 404
            proxy.cut()
            assert eventually(
                lambda: (
                    value(samples_of(get("/metrics")[1]), "bgjob_scrape_success", part="queues")
                    == 0
                )
            )
            assert "bgjob_queue_due" not in samples_of(get("/metrics")[1])
        finally:
            os.kill(process.pid, signal.SIGTERM)
            assert process.wait(PATIENCE) == 0


# -- alerts and dashboard ---------------------------------------------------------------------


def dashboard(capsys: pytest.CaptureFixture[str], name: str) -> Any:
    assert cli.main(["dashboards", name]) == 0
    text = capsys.readouterr().out
    return yaml.safe_load(text) if name == "alerts" else json.loads(text)


NAME = re.compile(r"\bbgjob_\w+")
SELECTOR = re.compile(r"(bgjob_\w+)\{([^}]*)\}")
GROUPING = re.compile(r"\b(?:by|on) \(([^)]*)\)")
OURS = {"le", "instance"}
"""Labels that Prometheus and histograms add."""


def series() -> dict[str, Family]:
    return {name: family for family in ALL for name in family.series}


def check(expression: str, *, shown: str = "") -> set[str]:
    """Check the names and labels of an expression; return the names.

    Args:
        expression: PromQL.
        shown: a template of labels in {{braces}}.

    """
    known = series()
    names = set(NAME.findall(expression))
    assert names
    assert names <= known.keys(), expression
    for name, matchers in SELECTOR.findall(expression):
        assert set(re.findall(r"(\w+)=", matchers)) <= set(known[name].labels), expression
    labels = {label for name in names for label in known[name].labels} | OURS
    grouped = {
        label.strip() for found in GROUPING.findall(expression) for label in found.split(",")
    }
    assert grouped <= labels, expression
    assert expression.count("(") == expression.count(")")
    assert set(re.findall(r"\{\{\s*(\w+)\s*\}\}", shown)) <= grouped, (expression, shown)
    outcomes = re.findall(r'outcome=~?"([^"]*)"', expression)
    assert {o for found in outcomes for o in found.split("|")} <= {"retried", "dead", "lost"}
    return names


def test_alerts_name_only_what_is_exported_and_say_what_to_run_first(
    capsys: pytest.CaptureFixture[str],
) -> None:
    [group] = dashboard(capsys, "alerts")["groups"]
    rules = group["rules"]
    assert len({rule["alert"] for rule in rules}) == len(rules) >= 12
    for rule in rules:
        check(rule["expr"])
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
        assert re.fullmatch(r"\d+m", rule.get("for", "1m"))
        assert rule["labels"]["severity"] in {"page", "ticket"}
        annotations = rule["annotations"]
        assert set(annotations) == {"summary", "command", "page"}
        grouped = {x.strip() for g in GROUPING.findall(rule["expr"]) for x in g.split(",")}
        for text in annotations.values():
            assert set(re.findall(r"\$labels\.(\w+)", text)) <= grouped, rule["alert"]
        words = shlex.split(re.sub(r"\{\{[^}]*\}\}", "x", annotations["command"]))
        assert words[0] == "bgjob"
        cli._parser().parse_args(words[1:])  # it exits if there is no such command


def test_the_dashboard_shows_all_that_is_exported_and_nothing_else(
    capsys: pytest.CaptureFixture[str],
) -> None:
    board = dashboard(capsys, "grafana")
    assert board["schemaVersion"]
    variables = {each["name"]: each for each in board["templating"]["list"]}
    assert set(variables) == {"DS", "queue", "type"}
    for name in ("queue", "type"):
        [(query, label)] = re.findall(r"label_values\((.*), (\w+)\)", variables[name]["definition"])
        assert label == name
        [family] = [series()[each] for each in check(query)]
        assert label in family.labels
    shown: set[str] = set()
    places: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {
            (place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & places, panel["title"]
        places |= cells
        for target in panel.get("targets", ()):
            assert target["datasource"]["uid"] == "${DS}"
            shown |= check(target["expr"], shown=target.get("legendFormat", ""))
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    assert {series()[name].name for name in shown} == {family.name for family in ALL}


def test_the_guide_lists_all_that_is_exported_and_nothing_else() -> None:
    text = (DOCS / "operations.md").read_text("utf-8")
    section = text.partition("\n## Metrics\n")[2].partition("\n## ")[0]
    listed: set[str] = set()
    for cells in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE):
        names = re.findall(r"`(\w+)`", cells)
        prefix = "_".join(names[0].split("_")[:2])
        listed |= {name if name.startswith("bgjob") else prefix + name for name in names}
    histograms = {f.name for f in ALL if f.kind == "histogram"}
    assert listed == histograms | {n for f in ALL if f.kind != "histogram" for n in f.series}


@pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool, of Prometheus, is not installed"
)
def test_prometheus_fires_each_alert_where_it_should_and_none_where_all_is_well(
    tmp_path: Path,
) -> None:
    unit = yaml.safe_load((ROOT / "tests" / "support" / "alerts.yaml").read_text("utf-8"))
    rules = ROOT / "bgjob" / "ext" / "alerts.yaml"
    (tmp_path / "unit.yaml").write_text(yaml.safe_dump(unit | {"rule_files": [str(rules)]}))
    tested = subprocess.run(
        ["promtool", "test", "rules", str(tmp_path / "unit.yaml")], capture_output=True, text=True
    )
    assert tested.returncode == 0, tested.stdout + tested.stderr
