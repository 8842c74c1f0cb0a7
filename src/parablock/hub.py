"""The Hugging Face hub, which may be out of reach.

Its libraries ask again and again, for half a minute, when nobody answers. Whether anybody does is a matter of
one connection, so that a misspelt folder on a machine without network is refused at once.
"""

from __future__ import annotations

import socket
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

PATIENCE_S = 5.0


def is_reachable(endpoint: str) -> bool:
    """Tell whether a server accepts connections.

    Args:
        endpoint: Its address, `https://huggingface.co`. Behind a proxy nothing is tried, and it counts as
            reachable: the proxy alone knows.
    """
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
def cache_alone_without_network() -> Iterator[None]:
    """While the hub is out of reach, let its libraries look into their cache and ask nobody."""
    from huggingface_hub import constants  # slow to import, and not needed where all is in local files

    if constants.HF_HUB_OFFLINE or is_reachable(constants.ENDPOINT):
        yield
        return
    constants.HF_HUB_OFFLINE = True  # all of them read it at every request
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = False
