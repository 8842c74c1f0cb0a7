"""The logs of server and sites: a JSON object a line, and no more than the page says."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path

import pytest

from parablock.deploy import log_files
from parablock.deploy.log_files import LOG_BYTES, LOGS, PlainLines, log_to
from parablock.errors import ParaBlockError


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


def test_what_a_plain_log_says_is_a_line_and_a_traceback_keeps_its_own():
    written = io.StringIO()
    handler, logger = logging.StreamHandler(written), logging.Logger("a log")
    handler.setFormatter(PlainLines())
    logger.addHandler(handler)
    logger.info("%s is gone", Path("a\nforged line\x1b[A"))
    try:
        raise ValueError("wrong")
    except ValueError:
        logger.exception("it failed")
    first, second, *trace = written.getvalue().splitlines()
    assert first.endswith("a\\nforged line\\u001b[A is gone") and second.endswith("it failed")
    assert trace[0].startswith("Traceback") and trace[-1] == "ValueError: wrong"


def test_an_error_is_one_line_of_a_log():
    error = ParaBlockError(
        "2 rows are too few", cause="Its file is short.", remedy="Give more rows", lines=["  - a.jsonl"]
    )
    assert error.in_one_line == "2 rows are too few. - a.jsonl. Its file is short. Give more rows"
    assert "\n" not in error.in_one_line and "\n" in str(error)
