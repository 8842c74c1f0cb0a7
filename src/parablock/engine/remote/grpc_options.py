"""The settings of gRPC at both ends: lengths, keepalive, and proxies."""

from __future__ import annotations

import os

from parablock.engine.remote.frames import HEAD, MAX_WELCOME_BYTES, PART_BYTES

METHOD = "/parablock.Engine/Exchange"
"""The only method: a stream of frames each way."""

OPTIONS = [
    ("grpc.max_receive_message_length", max(HEAD.size + PART_BYTES, MAX_WELCOME_BYTES)),
    ("grpc.max_send_message_length", max(HEAD.size + PART_BYTES, MAX_WELCOME_BYTES)),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),  # on a full link of 4 Mbit/s an answer may take seconds
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
]

SERVER_OPTIONS = [
    *OPTIONS,
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.max_concurrent_streams", 4),  # of a connection; a site has one
    ("grpc.so_reuseport", 0),  # a second server on the port is an error
]

SITE_OPTIONS = [
    *OPTIONS,
    ("grpc.use_local_subchannel_pool", 1),  # a new connection is a new connection
    ("grpc.enable_retries", 0),  # of its own: a call at a server that shuts down would hang, past its deadline
    ("grpc.initial_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 5_000),
]


def settle_environment() -> None:
    """Let gRPC see proxies under either spelling, and none on the way to this machine.

    gRPC reads `https_proxy`, `http_proxy` and `no_proxy` in lower case only.
    """
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")
    for name in ("https_proxy", "http_proxy", "no_proxy"):
        if name.upper() in os.environ:
            os.environ.setdefault(name, os.environ[name.upper()])
    direct = [host for host in os.environ.get("no_proxy", "").split(",") if host]
    local = [host for host in ("localhost", "127.0.0.1", "::1") if host not in direct]
    os.environ["no_proxy"] = ",".join([*direct, *local])
