"""Counters of this node, and their Prometheus form.

The registry is the node's own, so that several nodes run in one process. What others count already is read through
callbacks when somebody asks. Names and meanings: docs/OPERATIONS.md, "Metrics".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import Metric

from cache.store import StoreStatistics
from node.api.documents import UpstreamRow
from node.telemetry.sources import Source

_V = TypeVar("_V", covariant=True)
ByName = Callable[[], Mapping[str, _V]]
"""Asked when metrics are: values by source or by tier (a StrEnum is a str)."""

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

_READ_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""From a block in memory to a block over a slow uplink."""

_TAG_AGE_SECONDS = (1.0, 10.0, 60.0, 300.0, 3600.0, 21600.0, 86400.0, 604800.0)


class Metrics:
    """One of it in a node. Methods take what happened; all of them are immediate."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._origin = self._counter("p2pd_origin_bytes", "Bytes read from registries", "upstream")
        self._retries = self._counter("p2pd_retries", "Requests made again after a failure", "source")
        self._reads = Histogram(
            "p2pd_block_read_seconds", "Time to get one block", ["source"],
            buckets=_READ_SECONDS, registry=self.registry,
        )  # fmt: skip
        self._tag_age = Histogram(
            "p2pd_tag_age_seconds", "Time since the registry confirmed a tag, when it was served",
            buckets=_TAG_AGE_SECONDS, registry=self.registry,
        )  # fmt: skip
        ProcessCollector(registry=self.registry)

    def _counter(self, name: str, text: str, label: str) -> Counter:
        return Counter(name, text, [label], registry=self.registry)

    def read(self, source: Source, seconds: float) -> None:
        self._reads.labels(source.value).observe(seconds)

    def origin(self, upstream: str, count: int) -> None:
        self._origin.labels(upstream).inc(count)

    def retried(self, source: Source) -> None:
        self._retries.labels(source.value).inc()

    def tag_served(self, age_s: float) -> None:
        self._tag_age.observe(age_s)

    def watch_served(self, bytes_served: ByName[int], requests: ByName[int]) -> None:
        """Show what clients were given, by source; both only ever grow."""
        self.registry.register(_ServedCounters(bytes_served, requests))

    def watch_members_traffic(self, traffic: ByName[int]) -> None:
        """Show what was exchanged with members: bytes by direction, `sent` and `received`."""
        self.registry.register(_TrafficCounters(traffic))

    def watch_cache(self, statistics: ByName[StoreStatistics]) -> None:
        """Show what the tiers hold; `statistics` gives it by tier."""
        self.registry.register(_CacheGauges(statistics))

    def watch_wear(self, written_bytes: Callable[[], int]) -> None:
        self.registry.register(_WearCounter(written_bytes))

    def watch_tasks(self, living: Callable[[], int]) -> None:
        self.registry.register(_TaskGauge(living))

    def watch_members(self, alive: Callable[[], int], quarantined: Callable[[], int]) -> None:
        self.registry.register(_MemberGauges(alive, quarantined))

    def watch_upstreams(self, rows: Callable[[], Iterable[UpstreamRow]]) -> None:
        """Show which registries answer, and what of the uplink's limits is used."""
        self.registry.register(_UpstreamGauges(rows))

    def origin_bytes(self) -> int:
        return sum(_totals(self._origin).values())

    def render(self) -> bytes:
        """Prometheus' text format 0.0.4."""
        return generate_latest(self.registry)


def _totals(counter: Counter) -> dict[str, int]:
    samples = (sample for metric in counter.collect() for sample in metric.samples)
    return {
        next(iter(sample.labels.values())): int(sample.value) for sample in samples if sample.name.endswith("_total")
    }


class _ServedCounters:
    def __init__(self, bytes_served: ByName[int], requests: ByName[int]) -> None:
        self._bytes_served = bytes_served
        self._requests = requests

    def collect(self) -> Iterator[Metric]:
        yield _by_source("p2pd_bytes_served", "Bytes sent to clients, by where they came from", self._bytes_served())
        yield _by_source("p2pd_requests", "Blocks read for clients, by who gave them", self._requests())


def _by_source(name: str, text: str, values: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(name, text, labels=["source"])
    for source in Source:
        family.add_metric([source.value], values.get(source.value, 0))
    return family


class _TrafficCounters:
    def __init__(self, traffic: ByName[int]) -> None:
        self._traffic = traffic

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily("p2pd_peer_bytes", "Bytes exchanged with members", labels=["direction"])
        for direction, count in self._traffic().items():
            family.add_metric([direction], count)
        yield family


class _CacheGauges:
    def __init__(self, statistics: ByName[StoreStatistics]) -> None:
        self._statistics = statistics

    def collect(self) -> Iterator[Metric]:
        held = GaugeMetricFamily("p2pd_cache_bytes", "Bytes held", labels=["tier"])
        budget = GaugeMetricFamily("p2pd_cache_budget_bytes", "Bytes allowed", labels=["tier"])
        entries = GaugeMetricFamily("p2pd_cache_entries", "Pieces held", labels=["tier"])
        for tier, statistics in self._statistics().items():
            held.add_metric([tier], statistics.bytes)
            budget.add_metric([tier], statistics.budget_bytes)
            entries.add_metric([tier], statistics.entries)
        yield from (held, budget, entries)


class _WearCounter:
    def __init__(self, written_bytes: Callable[[], int]) -> None:
        self._written_bytes = written_bytes

    def collect(self) -> Iterator[Metric]:
        yield CounterMetricFamily("p2pd_disk_written_bytes", "Bytes written to disks", self._written_bytes())


class _TaskGauge:
    def __init__(self, living: Callable[[], int]) -> None:
        self._living = living

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("p2pd_tasks", "Tasks of the daemon's loop", self._living())


class _MemberGauges:
    def __init__(self, alive: Callable[[], int], quarantined: Callable[[], int]) -> None:
        self._alive = alive
        self._quarantined = quarantined

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("p2pd_peers_alive", "Other members of the site that are alive", self._alive())
        yield GaugeMetricFamily("p2pd_peers_quarantined", "Members in quarantine", self._quarantined())


class _UpstreamGauges:
    def __init__(self, rows: Callable[[], Iterable[UpstreamRow]]) -> None:
        self._rows = rows

    def collect(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("p2pd_registry_up", "Whether a registry answered last", labels=["upstream", "url"])
        used, daily, rate = (
            GaugeMetricFamily(name, text, labels=["upstream"])
            for name, text in (
                ("p2pd_uplink_used_today_bytes", "Bytes that count as used today"),
                ("p2pd_uplink_daily_bytes", "Bytes that this node may use a day"),
                ("p2pd_uplink_rate_bytes", "Bytes that this node may use a second"),
            )
        )
        for row in self._rows():
            for one in row.endpoints:
                up.add_metric([row.name, one.url], 0 if one.problem else 1)
            if row.uplink is not None:
                used.add_metric([row.name], row.uplink.used_today_bytes)
                daily.add_metric([row.name], row.uplink.daily_bytes)
                rate.add_metric([row.name], row.uplink.rate)
        yield from (up, used, daily, rate)
