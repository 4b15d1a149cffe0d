"""Metrics count what workers did, and export how they are, under bounded labels."""

import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import psycopg
import pytest
from faults.proxy import Proxy
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample
from support.jobs import a_job
from support.waiting import NEVER, eventually
from support.workers import Gate, Launcher

import bgjob.workers
from bgjob import Job, LoggingObserver, MoveToDlq, Mux, Reschedule, Result, Retry, only
from bgjob._worker.observers import combined, watchers
from bgjob.ext.prometheus import Metrics
from bgjob._prometheus.counts import BUCKETS
from bgjob._prometheus.families import OF_WORKERS
from bgjob.workers import WorkerHealth

Samples = dict[str, list[Sample]]


def scraped(metrics: Any) -> Samples:
    """Collect as Prometheus does: rendered as text, and parsed; the samples by their names."""
    registry = CollectorRegistry()
    registry.register(metrics)
    samples: Samples = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            samples.setdefault(sample.name, []).append(sample)
    return samples


def value(samples: Iterable[Sample], **labels: str) -> float:
    """Return the value of the only sample with these labels."""
    [found] = [s.value for s in samples if labels.items() <= s.labels.items()]
    return found


# -- a worker is measured ---------------------------------------------------------------------


def test_each_attempt_is_counted_once_under_its_outcome_with_its_times(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    def act(job: Job) -> Result | None:
        match job.id, job.attempt:
            case "retry", 1:
                return Retry(0.0, "once")
            case "dead", _:
                return MoveToDlq("why")
            case "later", _:
                return Reschedule(NEVER)
        return None

    released = threading.Event()

    def hang(_: Job) -> None:
        released.wait(NEVER)

    metrics = Metrics(registry=None)
    mux = Mux().register("t", act).register("hang", hang, timeout=0.02, max_attempts=1)
    launcher.enqueue("done", "retry", "dead", "later", queue="mail")
    launcher.enqueue("hang", type="hang", queue="mail")
    launcher.enqueue("unknown", type="nobody's", queue="mail")
    conn.execute("update bgjob_job set next_run_at = next_run_at - interval '1 hour'")
    worker = launcher.start(
        mux, "mail", observer=[only(metrics, queue="mail"), LoggingObserver()], concurrency=2
    )

    def counted(type_: str = "t") -> dict[str, float]:
        all_ = scraped(metrics).get("bgjob_jobs_total", [])
        return {s.labels["outcome"]: s.value for s in all_ if s.labels["type"] == type_}

    expected = {
        "completed": 2,
        "retried": 1,
        "rescheduled": 1,
        "dead": 1,
        "lost": 0,
        "cancelled": 0,
    }
    assert eventually(lambda: counted() == expected), counted()
    assert eventually(lambda: counted("hang").get("dead") == counted("nobody's").get("dead") == 1)
    released.set()
    samples = scraped(metrics)
    assert value(samples["bgjob_job_timeouts_total"], type="hang") == 1
    for name in ("bgjob_job_run_seconds", "bgjob_job_wait_seconds"):
        assert value(samples[f"{name}_count"], type="t", queue="mail") == 5
        assert value(samples[f"{name}_count"], type="hang") == 1
        assert value(samples[f"{name}_count"], type="nobody's") == 0  # it did not run
        assert value(samples[f"{name}_bucket"], type="t", le="+Inf") == 5
    # The retry was due immediately, the others an hour before.
    waits = samples["bgjob_job_wait_seconds_bucket"]
    assert value(waits, type="t", le="1800.0") == 1
    assert value(samples["bgjob_job_wait_seconds_sum"], type="t") >= 4 * 3600
    assert value(samples["bgjob_job_run_seconds_sum"], type="hang") >= 0.02
    assert launcher.shutdown(worker)


def test_slots_and_connection_of_each_worker_are_exported_while_it_lives(
    launcher: Launcher, dsn: str
) -> None:
    metrics, gate = Metrics(registry=None), Gate()
    launcher.enqueue("a")
    with Proxy(dsn) as proxy:
        mux = Mux().register("t", gate)
        queues = {"q": 3, "mail": 2}
        options: Any = {"observer": metrics, "release": "v7", "poll_interval": 0.05}
        worker = launcher.make(mux, queues, dsn=proxy.dsn(dsn), **options)
        assert value(scraped(metrics)["bgjob_worker_connected"], queue="q") == 0
        launcher.run(worker.run())
        other = launcher.start(Mux(), "mail", observer=metrics)
        gate.wait()
        samples = scraped(metrics)
        assert value(samples["bgjob_worker_slots"], queue="q") == 3
        assert value(samples["bgjob_worker_slots"], queue="mail") == 3
        assert value(samples["bgjob_worker_busy"], queue="q") == 1
        assert value(samples["bgjob_worker_connected"], queue="q") == 1
        turned = value(samples["bgjob_worker_turned_timestamp_seconds"], queue="q")
        assert time.time() - 30 < turned <= time.time()
        numbers = [s.labels["number"] for s in samples["bgjob_worker_info"]]
        assert {int(n) for n in numbers} == {worker.health().number, other.health().number}
        assert value(samples["bgjob_worker_info"], release="v7", version=bgjob.__version__) == 1
        proxy.cut()

        def connected() -> float:
            return value(scraped(metrics)["bgjob_worker_connected"], queue="mail")

        assert eventually(lambda: connected() == 0)
        assert eventually(lambda: any(scraped(metrics).get("bgjob_worker_errors_total", [])))
        proxy.forward()
        assert eventually(lambda: connected() == 1)
        gate.released.set()
        assert launcher.shutdown(worker)
        assert launcher.shutdown(other)
    assert scraped(metrics)["bgjob_worker_info"]  # a last time
    assert "bgjob_worker_info" not in scraped(metrics)


def test_a_worker_is_live_whatever_its_handlers_and_its_database_do(
    launcher: Launcher, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bgjob.workers, "LATE", 0.5)
    gate, stuck, released = Gate(), threading.Event(), threading.Event()

    class Sticks:
        def run(self, _: Any) -> float:
            if stuck.is_set():
                released.wait(NEVER)
            return 0.02

    launcher.enqueue("a")
    with Proxy(dsn) as proxy:
        mux = Mux().register("t", gate)
        options: Any = {"services": [Sticks()], "poll_interval": NEVER}
        worker = launcher.make(mux, dsn=proxy.dsn(dsn), **options)

        def health() -> WorkerHealth:
            found = worker.health()
            assert isinstance(found, WorkerHealth)
            return found

        assert (health().is_live, health().is_ready) == (True, False)
        launcher.run(worker.run())
        assert (health().is_live, health().is_ready) == (True, True)
        gate.wait()
        assert health().queues["q"].busy == 1
        claimed = health().queues["q"].claimed
        assert claimed is not None
        proxy.cut()
        assert eventually(lambda: not health().is_ready)
        assert health().is_live
        proxy.forward()
        assert eventually(lambda: health().is_ready)
        stuck.set()
        assert eventually(lambda: not health().is_live)
        assert health().queues["q"].turned >= 0.5
        released.set()
        stuck.clear()
        assert eventually(lambda: health().is_live)
        gate.released.set()
        assert launcher.shutdown(worker)
    ended = health()
    assert (ended.is_live, ended.is_ready, ended.is_stopping, ended.has_ended) == (
        *(True, False, True, True),
    )


# -- without a worker -------------------------------------------------------------------------


def test_types_beyond_the_first_pairs_are_counted_together() -> None:
    metrics = Metrics(registry=None, most=2)
    for type_ in ("a", "b", "c", "d", "a"):
        metrics.job_completed(a_job(type_))
    counted = scraped(metrics)["bgjob_jobs_total"]
    found = {s.labels["type"]: s.value for s in counted if s.labels["outcome"] == "completed"}
    assert found == {"a": 2, "b": 1, "_other": 2}
    for name in ("One", "Two", "Three", "Four", "One"):
        metrics.worker_error(type(name, (Exception,), {})())
    errors = scraped(metrics)["bgjob_worker_errors_total"]
    assert {s.labels["error"]: s.value for s in errors} == {"One": 2, "Two": 1, "_other": 2}


@pytest.mark.parametrize("seconds", [0.0, 0.005, 0.0051, 1.0, 1800.0, 1e9])
def test_a_bucket_contains_what_is_at_most_its_bound(seconds: float) -> None:
    class Times:
        ran = waited = seconds

    metrics = Metrics(registry=None)
    completed: Callable[..., None] = metrics.job_completed
    completed(a_job(), Times())
    samples = scraped(metrics)
    for name in ("bgjob_job_run_seconds", "bgjob_job_wait_seconds"):
        bounds = {float(s.labels["le"]): s.value for s in samples[f"{name}_bucket"]}
        assert bounds == {bound: seconds <= bound for bound in (*BUCKETS, float("inf"))}
        assert samples[f"{name}_sum"][0].value == seconds


def test_only_declared_metrics_are_exported() -> None:
    metrics = Metrics(registry=None)
    declared = {(f.name, f.kind) for f in OF_WORKERS}
    assert {(f.name, f.type) for f in metrics.describe()} == declared
    assert {(f.name, f.type) for f in metrics.collect()} == declared


def test_it_is_registered_where_prometheus_client_serves_by_default() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry=registry)
    metrics.job_completed(a_job())
    assert b"bgjob_jobs_total{" in generate_latest(registry)
    assert watchers(combined([LoggingObserver(), only(metrics, type="t")])) == [metrics]
