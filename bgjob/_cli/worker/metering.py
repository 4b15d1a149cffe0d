"""Attaches Metrics to workers, and renders metrics; needs prometheus-client."""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from http import HTTPStatus
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.exposition import choose_encoder
from typing_extensions import TypeIs

from bgjob._cli.listener import Answer
from bgjob._prometheus.metrics import Health, Metrics
from bgjob._prometheus.totals import Sender, Totals
from bgjob._worker.group import WorkerGroup
from bgjob.errors import BgjobError


class Metering:
    """The metrics of this process."""

    def __init__(self) -> None:
        self._metrics: Metrics | None = None
        self._sender: Sender | None = None
        self._registry = REGISTRY

    def attach(self, groups: Sequence[WorkerGroup]) -> None:
        """Count the events of workers, before they run, unless the program itself does.

        Raises:
            BgjobError: the program has Metrics that observe some of its workers, or others.

        """
        own = [next(filter(_is_metrics, group.watchers), None) for group in groups]
        if any(other is not own[0] for other in own):
            raise BgjobError(
                "the workers of this program have different Metrics: pass the same one to all of "
                "them, as Worker(..., observer=[..., metrics])"
            )
        metrics = own[0]
        if metrics is None:
            metrics = _registered()
            for group in groups:
                group.observe_too(metrics)
        if metrics.registry is None:
            self._registry = CollectorRegistry()
            self._registry.register(metrics)
        else:
            self._registry = metrics.registry
        self._metrics, self._sender = metrics, Sender(metrics)

    def render(self, accept: str) -> Answer:
        """Return all metrics of this process, also those that the program defines itself.

        Args:
            accept: the media types that the client takes.

        """
        return rendered(self._registry, accept)

    def take(self) -> Mapping[str, Any] | None:
        """Return what has changed since the last call, for the parent's sum."""
        return None if self._sender is None else self._sender.take()

    @staticmethod
    def summed(healths: Callable[[], Iterable[Health]]) -> "Sum":
        """Return what adds up the metrics of several processes."""
        return Sum(healths)


def _is_metrics(watcher: object) -> TypeIs[Metrics]:
    return isinstance(watcher, Metrics)


def _registered() -> Metrics:
    try:
        return Metrics()
    except ValueError as error:
        raise BgjobError(
            "the program has registered Metrics that do not observe its worker: pass them to it, "
            "as Worker(..., observer=[..., metrics])"
        ) from error


class Sum:
    """The metrics of several processes together.

    Args:
        healths: returns how their workers are.

    """

    def __init__(self, healths: Callable[[], Iterable[Health]]) -> None:
        self._totals = Totals(healths)
        self._registry = CollectorRegistry()
        self._registry.register(self._totals)

    def take_over(self, process: Hashable, sent: Mapping[str, Any]) -> None:
        """Take what a process has sent."""
        self._totals.take_over(process, sent)

    def ended(self, process: Hashable) -> None:
        """Record that a process has ended."""
        self._totals.ended(process)

    def render(self, accept: str) -> Answer:
        """Return the metrics."""
        return rendered(self._registry, accept)


def rendered(registry: CollectorRegistry, accept: str) -> Answer:
    """Return what a registry collects, in the format that the client prefers."""
    encoder, media_type = choose_encoder(accept)
    return Answer(HTTPStatus.OK, encoder(registry), media_type)
