"""Offline use of the Hugging Face hub: test the connection once, and read only the cache without one.

The hub's libraries retry for half a minute when nothing answers. One test connection instead lets a misspelt folder
on a machine without network fail at once.
"""

from __future__ import annotations

import socket
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

PATIENCE_S = 5.0


def is_reachable(endpoint: str) -> bool:
    """Return whether a server, named by its URL, accepts connections; behind a proxy every server does."""
    parts = urlsplit(endpoint)
    host, port = parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443)
    if parts.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(host):
        return True
    try:
        with socket.create_connection((host, port), timeout=PATIENCE_S):
            return True
    except OSError:
        return False


@contextmanager
def use_cache_when_offline() -> Iterator[None]:
    """Let the hub's libraries read only their cache while the hub is out of reach."""
    from huggingface_hub import constants  # slow to import, and not needed for local files

    if constants.HF_HUB_OFFLINE or is_reachable(constants.ENDPOINT):
        yield
        return
    constants.HF_HUB_OFFLINE = True  # the libraries read it at every request
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = False
