"""The logs of server and sites: a JSON object a line, and no more than the page says."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from parablock.deploy import log_files
from parablock.deploy.log_files import LOG_BYTES, LOGS, log_to


def test_a_log_is_begun_anew_before_it_takes_more_than_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    page = (Path(__file__).parents[3] / "docs" / "data-protection.md").read_text()
    assert "60 MB at most" in page
    assert LOG_BYTES * (LOGS + 1) == 60_000_000
    monkeypatch.setattr(log_files, "LOG_BYTES", 1000)
    handler = log_to(tmp_path / "log" / "site.log")
    logger = logging.Logger("a log")
    logger.addHandler(handler)
    for number in range(200):
        logger.info("round %d", number)
    handler.close()
    files = list((tmp_path / "log").iterdir())
    assert len(files) == 1 + LOGS
    assert sum(file.stat().st_size for file in files) <= 1000 * (1 + LOGS)
    assert json.loads((tmp_path / "log" / "site.log").read_text().splitlines()[-1])["message"] == "round 199"
