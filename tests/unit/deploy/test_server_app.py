"""The server of a deployment as a Flower app."""

from __future__ import annotations

from pathlib import Path

import pytest

from parablock.deploy.server_app import only_one
from parablock.errors import StorageError


def test_two_flower_runs_do_not_write_one_run_directory(tmp_path: Path):
    refused = pytest.raises(StorageError, match="another process is at work")
    with only_one(tmp_path / "run"), only_one(tmp_path / "other"), refused, only_one(tmp_path / "run"):
        pass
    with only_one(tmp_path / "run"):
        pass
