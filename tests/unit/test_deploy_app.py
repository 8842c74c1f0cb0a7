"""The Flower app that `parablock deploy` writes."""

from __future__ import annotations

import importlib.util
import tomllib
from pathlib import Path

from parablock import __version__
from parablock.deploy.processes import write_app


def test_the_app_is_one_that_flower_takes_and_names_what_is_there(tmp_path: Path):
    content = tomllib.loads((write_app(tmp_path / "app") / "pyproject.toml").read_text())
    assert content["project"]["version"] == __version__
    assert content["project"]["dependencies"] == [f"parablock[flower]=={__version__}"]
    for component in content["tool"]["flwr"]["app"]["components"].values():
        module, _, name = component.partition(":")
        assert name == "app"
        assert importlib.util.find_spec(module) is not None
        assert importlib.util.find_spec(f"{module}s") is None
