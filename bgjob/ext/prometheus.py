"""Metrics for Prometheus: of the workers of a process, and of a database.

Rates and durations are known where handlers run, and depths and ages in the database. So each
worker's process exports the former (Metrics), and one program for a database the latter
(DatabaseMetrics, or `bgjob metrics`): if each worker asked the database, a hundred would ask it a
hundred times.

Needs the extra `prometheus`:

    from bgjob.ext.prometheus import Metrics

    Worker(client, "mail", mux, observer=[LoggingObserver(), Metrics()])
    prometheus_client.start_http_server(8321)

`bgjob worker --health HOST:PORT` does both on its own.
"""

from bgjob._prometheus.database import DatabaseMetrics
from bgjob._prometheus.metrics import Metrics

__all__ = ["DatabaseMetrics", "Metrics"]
