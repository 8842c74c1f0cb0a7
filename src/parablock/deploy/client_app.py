"""The ClientApp of a site, as Flower loads it; torch stays out of this process."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from parablock.deploy.site import load_site, site_file
from parablock.engine.flower.courier import client_app


def _site_of(context: Any) -> tuple[int, Path, list[str]]:
    path = site_file(dict(context.node_config), dict(context.run_config))
    site = load_site(path)
    return site.client_id, site.state_dir, [sys.executable, "-m", "parablock.deploy.site_trainer", str(path)]


app = client_app(_site_of)
