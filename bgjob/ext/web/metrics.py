"""What the database holds, for Prometheus: `/metrics`, on request of the operator only."""

import asyncio
from typing import Any

from starlette.responses import Response

from bgjob.ext.web.site import Site
from bgjob.measurements import Measurements
from bgjob.stats import QueueStats


class Exporter:
    """Answers `/metrics`; needs the extra `prometheus`.

    Raises:
        ImportError: the extra is not installed.

    """

    def __init__(self, site: Site) -> None:
        from prometheus_client import CollectorRegistry  # noqa: PLC0415 (an extra)

        from bgjob.ext.prometheus import DatabaseMetrics  # noqa: PLC0415

        self._bridge = _Bridge(site)
        self._registry = CollectorRegistry()
        DatabaseMetrics(self._bridge, registry=self._registry)

    async def answer(self, accept: str) -> Response:
        """Return the metrics, in the format that is asked for."""
        from prometheus_client.exposition import choose_encoder  # noqa: PLC0415

        self._bridge.loop = asyncio.get_running_loop()
        encode, media = choose_encoder(accept)
        content = await asyncio.to_thread(encode, self._registry)
        return Response(content, headers={"content-type": media})


class _Bridge:
    """The page's connections, for a collector that runs in a thread."""

    loop: asyncio.AbstractEventLoop

    def __init__(self, site: Site) -> None:
        self._site = site

    def measure(self, *, cap: int) -> Measurements:
        """Measure the database; as Client.measure."""
        found: Measurements = self._run(self._site.reader.measure(cap=cap))
        return found

    def stats(self) -> list[QueueStats]:
        """Count exactly; as Client.stats."""
        found: list[QueueStats] = self._run(self._site.reader.stats())
        return found

    def _run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()
