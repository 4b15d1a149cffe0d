"""The names, labels and meanings of all metrics; nothing else is exported."""

from collections.abc import Iterable
from typing import Literal, NamedTuple, TypeAlias

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)

Found: TypeAlias = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily
"""A metric with its samples."""

_FAMILIES: dict[str, type[Found]] = {
    "counter": CounterMetricFamily,
    "gauge": GaugeMetricFamily,
    "histogram": HistogramMetricFamily,
}


class Family(NamedTuple):
    """A metric, as it is declared."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()

    def empty(self) -> Found:
        """Return the metric without samples."""
        return _FAMILIES[self.kind](self.name, self.help, labels=self.labels)

    def of(self, samples: Iterable[tuple[Iterable[str], float]]) -> Found:
        """Return the counter or gauge with its samples: the values of its labels, and a number."""
        found = self.empty()
        for labels, value in samples:
            found.add_metric(list(labels), value)  # type: ignore[call-arg, arg-type]
        return found

    @property
    def series(self) -> set[str]:
        """The names under which a query finds it."""
        match self.kind:
            case "counter":
                return {f"{self.name}_total"}
            case "histogram":
                return {f"{self.name}_{part}" for part in ("bucket", "count", "sum")}
            case _:
                return {self.name}


# -- of a worker's process -------------------------------------------------------------------

JOBS = Family(
    "bgjob_jobs",
    "counter",
    "Attempts that ended, by outcome: completed, retried, rescheduled, dead (moved to the "
    "dead-letter table), lost (the lease had ended), cancelled.",
    ("queue", "type", "outcome"),
)
TIMEOUTS = Family(
    "bgjob_job_timeouts",
    "counter",
    "Handlers that exceeded their timeout; their attempts are retried or dead, too.",
    ("queue", "type"),
)
RUN = Family(
    "bgjob_job_run_seconds",
    "histogram",
    "How long handlers ran, observed at their end.",
    ("queue", "type"),
)
WAIT = Family(
    "bgjob_job_wait_seconds",
    "histogram",
    "How long jobs were due before their handlers were called, observed at the handlers' end.",
    ("queue", "type"),
)
SLOTS = Family(
    "bgjob_worker_slots", "gauge", "How many handlers may run at the same time.", ("queue",)
)
BUSY = Family("bgjob_worker_busy", "gauge", "How many handlers run.", ("queue",))
CONNECTED = Family(
    "bgjob_worker_connected",
    "gauge",
    "1 if the worker is connected to the database, else 0; of several processes the least.",
    ("queue",),
)
TURNED = Family(
    "bgjob_worker_turned_timestamp_seconds",
    "gauge",
    "When the control thread last turned, in seconds since 1970; of several processes the first.",
    ("queue",),
)
ERRORS = Family(
    "bgjob_worker_errors",
    "counter",
    "Errors of the worker itself, such as a lost connection, by the class.",
    ("error",),
)
INFO = Family(
    "bgjob_worker_info",
    "gauge",
    "1 for each worker; its number is that of `bgjob workers`.",
    ("version", "release", "program", "number"),
)

OF_WORKERS = (JOBS, TIMEOUTS, RUN, WAIT, SLOTS, BUSY, CONNECTED, TURNED, ERRORS, INFO)
"""What Metrics exports."""

# -- of a database ---------------------------------------------------------------------------

_CAPPED = "Counted up to 10,000 for each priority, unless the exporter counts exactly."

DUE = Family(
    "bgjob_queue_due", "gauge", f"Jobs that are due and that no worker has. {_CAPPED}", ("queue",)
)
DELAYED = Family(
    "bgjob_queue_delayed", "gauge", f"Jobs that wait for a later time. {_CAPPED}", ("queue",)
)
RUNNING = Family("bgjob_queue_running", "gauge", f"Jobs that workers have. {_CAPPED}", ("queue",))
WAITING = Family(
    "bgjob_queue_waiting_for_keys",
    "gauge",
    "Jobs that were put aside until their exclusive key is free, counted up to 10,000.",
    ("queue",),
)
OLDEST = Family(
    "bgjob_queue_oldest_due_seconds",
    "gauge",
    "For how long the oldest due job has been due, exactly; 0 if none is.",
    ("queue",),
)
PAUSED = Family("bgjob_queue_paused", "gauge", "1 if the queue is paused, else 0.", ("queue",))
QUEUE_WORKERS = Family(
    "bgjob_queue_workers", "gauge", "Registered workers that were seen within 30 s.", ("queue",)
)
QUEUE_SLOTS = Family("bgjob_queue_slots", "gauge", "The slots of these workers.", ("queue",))
WORKERS = Family(
    "bgjob_workers",
    "gauge",
    "Registered workers of the last day, by state: working, stopping, ended, failed, lost.",
    ("state",),
)
LOST = Family(
    "bgjob_workers_lost",
    "counter",
    "Workers that this exporter has seen vanish: they were killed, or are cut off.",
)
DEAD = Family(
    "bgjob_dead_jobs",
    "gauge",
    "Jobs that were moved to the dead-letter table within the last hour, among its last 10,000.",
    ("queue", "type"),
)
LATE = Family(
    "bgjob_schedule_late_seconds",
    "gauge",
    "For how long a job of the schedule should have been enqueued; only late schedules.",
    ("name",),
)
HORIZON_SECONDS = Family(
    "bgjob_horizon_age_seconds",
    "gauge",
    "The age of the oldest transaction that keeps dead rows from being removed, by its holder: "
    "session, prepared. It is hidden from a role without pg_read_all_stats.",
    ("holder",),
)
HORIZON_TRANSACTIONS = Family(
    "bgjob_horizon_age_transactions",
    "gauge",
    "Transactions since the oldest snapshot that keeps dead rows, by its holder: session, "
    "standby, slot, prepared.",
    ("holder",),
)
TABLE_ROWS = Family("bgjob_table_rows", "gauge", "Rows, by the server's statistics.", ("table",))
DEAD_ROWS = Family(
    "bgjob_table_dead_rows",
    "gauge",
    "Dead rows that no vacuum has removed, by the server's statistics.",
    ("table",),
)
TABLE_BYTES = Family("bgjob_table_bytes", "gauge", "The size without indexes.", ("table",))
INDEX_BYTES = Family("bgjob_table_index_bytes", "gauge", "The size of the indexes.", ("table",))
NOTIFY = Family(
    "bgjob_notify_queue_ratio",
    "gauge",
    "How full the server's queue of notifications is, from 0 to 1.",
)
SCRAPE_SECONDS = Family(
    "bgjob_scrape_seconds", "gauge", "How long the exporter asked the database."
)
SCRAPE_SUCCESS = Family(
    "bgjob_scrape_success",
    "gauge",
    "1 if the database answered, else 0, by the part of the answer; a part that lacks a grant "
    "fails alone.",
    ("part",),
)

OF_DATABASES = (
    DUE,
    DELAYED,
    RUNNING,
    WAITING,
    OLDEST,
    PAUSED,
    QUEUE_WORKERS,
    QUEUE_SLOTS,
    WORKERS,
    LOST,
    DEAD,
    LATE,
    HORIZON_SECONDS,
    HORIZON_TRANSACTIONS,
    TABLE_ROWS,
    DEAD_ROWS,
    TABLE_BYTES,
    INDEX_BYTES,
    NOTIFY,
    SCRAPE_SECONDS,
    SCRAPE_SUCCESS,
)
"""What DatabaseMetrics exports."""
