"""Metrics of a server for Prometheus, from the status that it writes; on the loopback alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from parablock.deploy.status import read_status
from parablock.errors import InputError

GAUGES = {
    "last_round": "newest round that the site has sent something of, from 0",
    "up_bytes": "bytes received of the site",
    "down_bytes": "bytes that the site has confirmed",
    "waiting_bytes": "bytes on their way to the site",
    "sent_again_bytes": "bytes sent to the site a second time, after a cut",
}


def serve_metrics(output_dir: Path, port: int) -> None:
    """Answer Prometheus at a port of this machine, until the process ends.

    Raises:
        InputError: The library is not installed, or the port is taken.
    """
    try:
        from prometheus_client import start_http_server
        from prometheus_client.core import GaugeMetricFamily
        from prometheus_client.registry import Collector, CollectorRegistry
    except ImportError:
        raise InputError(
            "metrics need prometheus-client, which is not installed",
            remedy='Install it: pip install "parablock[deploy]"',
        ) from None

    class Sites(Collector):
        def collect(self) -> Iterator[GaugeMetricFamily]:
            try:
                status = read_status(output_dir)
            except InputError:  # nothing is there yet
                return
            running = GaugeMetricFamily("parablock_server_running", "1 while the server runs")
            running.add_metric([], float(status["running"]))
            connected = GaugeMetricFamily("parablock_site_connected", "1 while connected", labels=["client"])
            for site in status["sites"]:
                connected.add_metric([str(site["client_id"])], float(site["state"] == "connected"))
            yield from (running, connected)
            for name, words in GAUGES.items():
                gauge = GaugeMetricFamily(f"parablock_site_{name}", words, labels=["client"])
                for site in status["sites"]:
                    gauge.add_metric([str(site["client_id"])], float(site[name]))
                yield gauge

    registry = CollectorRegistry()
    registry.register(Sites())
    try:
        start_http_server(port, addr="127.0.0.1", registry=registry)
    except OSError as error:
        raise InputError(
            f"metrics cannot be served at port {port} of 127.0.0.1: {error.strerror}",
            remedy="Choose another --metrics-port.",
        ) from None
