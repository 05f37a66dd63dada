"""Metrics: what is counted is what is shown, in a form that Prometheus' own parser reads."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from cache.store import StoreStatistics
from node.telemetry.metrics import Metrics
from node.telemetry.sources import Source


def samples(metrics: Metrics) -> dict[tuple[str, tuple[str, ...]], float]:
    families = text_string_to_metric_families(metrics.render().decode())
    return {(s.name, tuple(sorted(s.labels.values()))): s.value for family in families for s in family.samples}


def test_every_source_is_there_from_the_start() -> None:
    metrics = Metrics()
    metrics.watch_served(lambda: {Source.PEER: 7}, lambda: {Source.PEER: 2, Source.ORIGIN: 1})
    shown = samples(metrics)
    for source in Source:
        assert shown["p2pd_bytes_served_total", (source.value,)] == (7 if source is Source.PEER else 0)
    assert shown["p2pd_requests_total", ("peer",)] == 2
    assert shown["p2pd_requests_total", ("origin",)] == 1


def test_counters() -> None:
    metrics = Metrics()
    metrics.origin("docker.io", 10)
    metrics.origin("ghcr.io", 5)
    metrics.watch_members_traffic(lambda: {"sent": 3, "received": 4})
    metrics.retried(Source.PEER)
    metrics.read(Source.MEMORY, 0.0001)
    metrics.read(Source.ORIGIN, 60.0)
    metrics.tag_served(90000.0)
    assert metrics.origin_bytes() == 15
    shown = samples(metrics)
    assert shown["p2pd_origin_bytes_total", ("docker.io",)] == 10
    assert shown["p2pd_peer_bytes_total", ("sent",)] == 3
    assert shown["p2pd_retries_total", ("peer",)] == 1
    assert shown["p2pd_block_read_seconds_bucket", ("0.0005", "memory")] == 1
    assert shown["p2pd_block_read_seconds_bucket", ("30.0", "origin")] == 0
    assert shown["p2pd_block_read_seconds_count", ("origin",)] == 1
    assert shown["p2pd_tag_age_seconds_bucket", ("86400.0",)] == 0
    assert shown["p2pd_tag_age_seconds_bucket", ("604800.0",)] == 1
    assert shown["process_resident_memory_bytes", ()] > 1 << 20


def test_gauges_are_asked_when_shown() -> None:
    metrics = Metrics()
    tiers = {"memory": StoreStatistics(1, 2, 3)}
    alive = [4]
    metrics.watch_cache(lambda: tiers)
    metrics.watch_members(lambda: alive[0], lambda: 1)
    metrics.watch_wear(lambda: 77)
    metrics.watch_tasks(lambda: 8)
    assert samples(metrics)["p2pd_tasks", ()] == 8
    assert samples(metrics)["p2pd_disk_written_bytes_total", ()] == 77
    assert samples(metrics)["p2pd_cache_bytes", ("memory",)] == 1
    assert samples(metrics)["p2pd_peers_alive", ()] == 4
    tiers["disk"] = StoreStatistics(10, 20, 30)
    alive[0] = 0
    shown = samples(metrics)
    assert shown["p2pd_cache_budget_bytes", ("disk",)] == 20
    assert shown["p2pd_cache_entries", ("disk",)] == 30
    assert shown["p2pd_peers_alive", ()] == 0
    assert shown["p2pd_peers_quarantined", ()] == 1


def test_two_nodes_in_one_process_count_apart() -> None:
    one, other = Metrics(), Metrics()
    one.origin("ghcr.io", 1)
    assert other.origin_bytes() == 0
