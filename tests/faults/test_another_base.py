"""A site whose base model is another one than the server's is refused, in words that say what differs."""

from __future__ import annotations

import ast
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from doors import Door
from parablock.config.load import parse_config
from parablock.deploy.site import load_site, shared_config
from parablock.errors import ModelError
from parablock.experiment.inputs import BaseModel, load_base
from parablock.model.save import base_parts, save_model
from tiny_runs import Workshop


def edited(folder: Path, name: str, change: Callable[[Any], None]) -> None:
    tree = json.loads((folder / name).read_text())
    change(tree)
    (folder / name).write_text(json.dumps(tree))


def another_chat_template(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text() + " ")


def another_rope_base(folder: Path) -> None:
    edited(folder, "config.json", lambda tree: tree.setdefault("rope_parameters", {}).update(rope_theta=7e4))


def another_tokenizer(folder: Path) -> None:
    def swap(tree: Any) -> None:
        vocabulary = tree["model"]["vocab"]
        one, two = list(vocabulary)[-2:]
        vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]

    edited(folder, "tokenizer.json", swap)


def other_weights(folder: Path) -> None:
    loaded = base(folder).loaded
    next(loaded.model.parameters()).data[0] += 1
    save_model(loaded.model, loaded.tokenizer, folder)


CHANGES = {
    "config": another_rope_base,
    "tokenizer": another_tokenizer,
    "chat template": another_chat_template,
    "weights": other_weights,
}


def section(folder: Path, dtype: str = "float32") -> Any:
    return parse_config(
        {"model": {"name_or_path": str(folder), "device": "cpu", "dtype": dtype}, "data": {"train": "x"}}
    )


def base(folder: Path, dtype: str = "float32") -> BaseModel:
    return load_base(section(folder, dtype).model, seed=0)


@pytest.fixture(scope="module")
def door() -> Iterator[Door]:
    made = Door()
    yield made
    made.listener.close()


@pytest.fixture
def folder(workshop: Workshop, tmp_path: Path) -> Path:
    return shutil.copytree(workshop.model, tmp_path / "model")


@pytest.mark.parametrize("part", CHANGES)
def test_a_site_with_another_base_model_is_refused_with_what_differs(
    workshop: Workshop, folder: Path, tmp_path: Path, door: Door, part: str
):
    servers, site = (
        base(workshop.model),
        {
            "client_id": 0,
            "state_dir": "state",
            "model": {"name_or_path": str(folder), "device": "cpu"},
            "data": {"train": [str(workshop.client_file(0))]},
        },
    )
    assert base(folder).sha256 == servers.sha256  # a copy is the same
    CHANGES[part](folder)
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(site))
    run = {"model": {"name_or_path": "m"}, "data": {"train": [], "test": "x"}, "engine": {"name": "remote"}}
    shared = shared_config(parse_config(run))
    error, leave = door.take_part(load_site(tmp_path / "site.yaml"), shared, servers.sha256, servers.parts)
    assert isinstance(error, ModelError)
    assert f"is not the server's base model: the {part} (" in error.what and error.what.endswith(") differs")
    assert leave.problem == "its model is not the one of the run"


def test_what_does_not_change_a_number_does_not_change_the_hash(folder: Path):
    before = base(folder)
    save_model(before.loaded.model, before.loaded.tokenizer, folder)  # written anew
    edited(
        folder, "config.json", lambda tree: tree.update(transformers_version="5.10.0", _name_or_path="elsewhere")
    )
    assert base(folder).parts == before.parts
    before.loaded.tokenizer("some words", truncation=True, max_length=2, padding="max_length")
    assert base_parts(before.loaded.model, before.loaded.tokenizer) == before.parts
    assert base(folder, "bfloat16").parts["weights"] != before.parts["weights"]


def test_the_model_is_on_the_disk_when_it_has_its_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    synced, fsync = [], os.fsync

    def spy(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink())
        fsync(descriptor)

    loaded = base(folder).loaded
    monkeypatch.setattr(os, "fsync", spy)
    save_model(loaded.model, loaded.tokenizer, tmp_path / "made")
    *before, last = [path for path in synced if path.is_relative_to(tmp_path.resolve())]
    assert last == tmp_path.resolve()  # the name, after everything that it stands for
    names = {path.name for path in before}
    assert {path.name for path in (tmp_path / "made").iterdir()} <= names


def test_no_call_leaves_it_open_whether_a_models_code_is_run():
    """Where `trust_remote_code` is not given, Transformers asks on a terminal, and a `y` runs the folder's code."""
    calls, open_ones = 0, []
    for path in (Path(__file__).resolve().parents[2] / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if node.func.attr in ("from_pretrained", "from_config") and ast.unparse(node.func.value).startswith(
                "Auto"
            ):
                calls += 1
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                if given.get("trust_remote_code") != "False":
                    open_ones.append(f"{path.name}:{node.lineno}")
    assert calls >= 7
    assert open_ones == []
