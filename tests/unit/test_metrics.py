"""Metrics have the right numbers, in a form that Prometheus' own parser reads."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from cache.store import StoreStatistics
from node.api.documents import EndpointRow, UplinkRow, UpstreamRow, WayRow
from node.telemetry.metrics import Metrics, cache_metrics, upstream_metrics
from node.telemetry.provenance import Provenance, Read
from node.telemetry.sources import Source
from protocol.ids import Digest


def samples(metrics: Metrics) -> dict[tuple[str, tuple[str, ...]], float]:
    families = text_string_to_metric_families(metrics.render().decode())
    return {(s.name, tuple(sorted(s.labels.values()))): s.value for family in families for s in family.samples}


def test_every_source_is_exported_from_the_start() -> None:
    metrics, provenance = Metrics(), Provenance()
    metrics.watch(bytes_served=lambda: provenance.bytes_served, requests=lambda: provenance.requests)
    for index, (source, served) in enumerate(((Source.PEER, 3), (Source.PEER, 4), (Source.ORIGIN, 0))):
        read = Read(source, seconds=0.1, retries=0, peers=(), at=0.0)
        provenance.note(Digest("sha256", "ab" * 32), index, read, served)
    shown = samples(metrics)
    for source in Source:
        assert shown["p2pd_bytes_served_total", (source.value,)] == (7 if source is Source.PEER else 0)
    assert shown["p2pd_requests_total", ("peer",)] == 2
    assert shown["p2pd_requests_total", ("origin",)] == 1


def test_counters() -> None:
    metrics = Metrics()
    metrics.origin("docker.io", 10)
    metrics.origin("ghcr.io", 5)
    metrics.watch(peer_bytes=lambda: {"sent": 3, "received": 4})
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
    metrics.watch(**cache_metrics(lambda: tiers))
    metrics.watch(peers_alive=lambda: alive[0], peers_quarantined=lambda: 1)
    metrics.watch(disk_written_bytes=lambda: 77, tasks=lambda: 8)
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


def test_upstreams_show_which_registries_answer_and_the_uplinks_with_limits() -> None:
    metrics = Metrics()
    uplink = UplinkRow(rate=5.0, daily_bytes=100.0, used_today_bytes=7, free=False, spent=False)
    endpoints = (EndpointRow(url="http://m", problem="refused"), EndpointRow(url="http://r"))
    rows = [
        UpstreamRow(name="docker.io", url="http://r", endpoints=endpoints, uplink=uplink),
        UpstreamRow(name="ghcr.io", url="http://g"),
    ]
    metrics.watch(**upstream_metrics(lambda: rows))
    assert (
        samples(metrics).items()
        >= {
            ("p2pd_registry_up", ("docker.io", "http://m")): 0.0,
            ("p2pd_registry_up", ("docker.io", "http://r")): 1.0,
            ("p2pd_uplink_used_today_bytes", ("docker.io",)): 7.0,
            ("p2pd_uplink_daily_bytes", ("docker.io",)): 100.0,
            ("p2pd_uplink_rate_bytes", ("docker.io",)): 5.0,
        }.items()
    )
    assert ("p2pd_uplink_rate_bytes", ("ghcr.io",)) not in samples(metrics)


def test_ways_show_what_they_gave_and_why_reads_took_them() -> None:
    metrics = Metrics()
    ways = {"site": WayRow(rate=0.0, first_s=0.0), "registry": WayRow(rate=9.0, first_s=0.1, chosen={"sooner": 3})}
    metrics.watch(**upstream_metrics(lambda: [UpstreamRow(name="ghcr.io", url="http://g", ways=ways)]))
    assert (
        samples(metrics).items()
        >= {
            ("p2pd_way_bytes_per_second", ("ghcr.io", "site")): 0.0,
            ("p2pd_way_bytes_per_second", ("ghcr.io", "registry")): 9.0,
            ("p2pd_way_chosen_total", ("ghcr.io", "registry", "sooner")): 3.0,
        }.items()
    )


def test_two_nodes_in_one_process_count_apart() -> None:
    first, other = Metrics(), Metrics()
    first.origin("ghcr.io", 1)
    assert other.origin_bytes() == 0
