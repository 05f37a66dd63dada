"""This node's metrics, in one table, and their Prometheus form.

Each row of `TABLE` is one metric. The methods of `Metrics` count some of them. The others are counted elsewhere:
`watch` accepts a function for each, which is called whenever metrics are read. The Prometheus registry is the node's
own, so that several nodes can run in one process. Meanings: docs/OPERATIONS.md, "Metrics".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily as Total
from prometheus_client.core import GaugeMetricFamily as Gauge
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import Metric

from cache.store import StoreStatistics
from node.api.documents import UpstreamRow
from node.telemetry.sources import Source

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

_ByLabels = Mapping[tuple[str, str], float] | Mapping[tuple[str, str, str], float]
Watched = Callable[[], float | Mapping[str, float] | Mapping[Source, float] | _ByLabels]
"""Returns a metric's number, or its numbers by label, or by several labels."""


class _Row(NamedTuple):
    """`kind`: a Counter or Histogram is counted here, a Total or Gauge is watched."""

    kind: type[Counter | Histogram | Total | Gauge]
    name: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


_READ_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""From a block in memory to a block over a slow uplink."""
_TAG_AGE_SECONDS = (1.0, 10.0, 60.0, 300.0, 3600.0, 21600.0, 86400.0, 604800.0)

PREFIX = "p2pd_"
TABLE = (
    _Row(Total, "bytes_served", "Bytes sent to clients, by the source of the bytes", ("source",)),
    _Row(Total, "requests", "Blocks read for clients, by the source of the blocks", ("source",)),
    _Row(Counter, "origin_bytes", "Bytes read from registries", ("upstream",)),
    _Row(Counter, "retries", "Requests repeated after a failure", ("source",)),
    _Row(Histogram, "block_read_seconds", "Time to get one block", ("source",), buckets=_READ_SECONDS),
    _Row(Histogram, "tag_age_seconds", "Age of the registry's answer when a tag was served", buckets=_TAG_AGE_SECONDS),
    _Row(Gauge, "registry_up", "Whether a registry answered the last request to it", ("upstream", "url")),
    _Row(Gauge, "uplink_used_today_bytes", "Bytes that count as used today", ("upstream",)),
    _Row(Gauge, "uplink_daily_bytes", "Bytes that this node may use in a day", ("upstream",)),
    _Row(Gauge, "uplink_rate_bytes", "Bytes that this node may use in a second", ("upstream",)),
    _Row(Gauge, "way_bytes_per_second", "Bytes per second that a way to blocks gave lately", ("upstream", "way")),
    _Row(Total, "way_chosen", "Reads for clients, by the way they took and why", ("upstream", "way", "reason")),
    _Row(Total, "peer_bytes", "Bytes exchanged with members", ("direction",)),
    _Row(Gauge, "cache_bytes", "Bytes held", ("tier",)),
    _Row(Gauge, "cache_budget_bytes", "Bytes allowed", ("tier",)),
    _Row(Gauge, "cache_entries", "Pieces held", ("tier",)),
    _Row(Total, "disk_written_bytes", "Bytes written to disks"),
    _Row(Gauge, "peers_alive", "Other members of the site that are alive"),
    _Row(Gauge, "peers_quarantined", "Members in quarantine"),
    _Row(Gauge, "tasks", "Tasks in the daemon's event loop"),
)


class Metrics:
    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._counters, self._histograms = dict[str, Counter](), dict[str, Histogram]()
        for kind, name, text, labels, buckets in TABLE:
            if kind is Counter:
                self._counters[name] = Counter(PREFIX + name, text, labels, registry=registry)
            elif kind is Histogram:
                self._histograms[name] = Histogram(PREFIX + name, text, labels, buckets=buckets, registry=registry)
        self._watched: dict[str, Watched] = {}
        registry.register(self)
        ProcessCollector(registry=registry)

    def read(self, source: Source, seconds: float) -> None:
        self._histograms["block_read_seconds"].labels(source.value).observe(seconds)

    def origin(self, upstream: str, count: int) -> None:
        self._counters["origin_bytes"].labels(upstream).inc(count)

    def retried(self, source: Source) -> None:
        self._counters["retries"].labels(source.value).inc()

    def tag_served(self, age_s: float) -> None:
        self._histograms["tag_age_seconds"].observe(age_s)

    def origin_bytes(self) -> int:
        samples = (sample for metric in self._counters["origin_bytes"].collect() for sample in metric.samples)
        return int(sum(sample.value for sample in samples if sample.name.endswith("_total")))

    def watch(self, **watched: Watched) -> None:
        """Show the numbers that these functions return; each keyword is a name in `TABLE`."""
        assert watched.keys() <= {row.name for row in TABLE if row.kind in (Total, Gauge)}
        self._watched.update(watched)

    def collect(self) -> Iterator[Metric]:
        """Called by the registry: the watched metrics."""
        for kind, name, text, labels, _ in TABLE:
            if name not in self._watched:
                continue
            family = (Total if kind is Total else Gauge)(PREFIX + name, text, labels=labels)
            numbers = self._watched[name]()
            for values, number in numbers.items() if isinstance(numbers, Mapping) else [((), numbers)]:
                family.add_metric([values] if isinstance(values, str) else values, number)
            yield family

    def render(self) -> bytes:
        """Prometheus' text format 0.0.4."""
        return generate_latest(self.registry)


def cache_metrics(statistics: Callable[[], Mapping[str, StoreStatistics]]) -> dict[str, Watched]:
    """For `Metrics.watch`: the contents of the tiers; `statistics` is by tier."""
    return {
        "cache_bytes": lambda: {tier: held.bytes for tier, held in statistics().items()},
        "cache_budget_bytes": lambda: {tier: held.budget_bytes for tier, held in statistics().items()},
        "cache_entries": lambda: {tier: held.entries for tier, held in statistics().items()},
    }


def upstream_metrics(rows: Callable[[], Iterable[UpstreamRow]]) -> dict[str, Watched]:
    """For `Metrics.watch`: the registries that answer, and the use of the uplinks that have limits."""
    return {
        "registry_up": lambda: {(row.name, at.url): float(not at.problem) for row in rows() for at in row.endpoints},
        "uplink_used_today_bytes": lambda: {row.name: row.uplink.used_today_bytes for row in rows() if row.uplink},
        "uplink_daily_bytes": lambda: {row.name: row.uplink.daily_bytes for row in rows() if row.uplink},
        "uplink_rate_bytes": lambda: {row.name: row.uplink.rate for row in rows() if row.uplink},
        "way_bytes_per_second": lambda: {(row.name, way): of.rate for row in rows() for way, of in row.ways.items()},
        "way_chosen": lambda: {
            (row.name, way, reason): float(count)
            for row in rows()
            for way, of in row.ways.items()
            for reason, count in of.chosen.items()
        },
    }
