"""The named experiments in configs/: each is read as it stands, and takes a few short rounds on its real data."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import yaml
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from parablock import load_config, run
from parablock.config.keys import RunConfig
from parablock.errors import DataError
from parablock.experiment.inputs import read_inputs
from tiny_runs import make_workshop, sum_row, write_rows

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
ON_SHARED_DATA = ("t0", "t0_fl_bcd", "gsm8k", "paper_like")
NUM_ROWS = 200
SHORT = (
    "blocks.layers_per_block=4",
    "federation.num_rounds=2",
    "train.num_local_steps=1",
    "train.per_device_train_batch_size=2",
    "data.max_length=128",
    "evaluation.max_examples=4",
    "evaluation.num_answers=0",
    "engine.num_threads=1",
)


def config(name: str, *overrides: str) -> RunConfig:
    return load_config(ROOT / "configs" / f"{name}.yaml", overrides)


def files_named(config: RunConfig) -> list[str]:
    return [config.model.name_or_path, *config.data.train, *config.data.test]


def test_every_configuration_is_tried_here():
    assert {path.stem for path in CONFIGS} == {*ON_SHARED_DATA, "own_jsonl"}


@pytest.mark.shared
@pytest.mark.parametrize("name", ON_SHARED_DATA)
def test_its_files_exist_seen_from_the_folder_of_the_project(
    name: str, shared_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    named = files_named(config(name))
    assert all(file.startswith("../shared/") for file in named)
    monkeypatch.chdir(ROOT)
    assert [file for file in named if not Path(file).exists()] == []
    monkeypatch.chdir(tmp_path)
    assert not any(Path(file).exists() for file in named)


@pytest.mark.shared
def test_t0_makes_a_client_of_every_family(shared_dir: Path):
    here = {path.name for path in (shared_dir / "data" / "t0").glob("*.train.jsonl")}
    assert {Path(file).name for file in config("t0").data.train} == here
    assert config("t0").federation.num_clients == len(here)


def test_the_two_t0_experiments_differ_in_the_method_alone():
    overlapped, serial = config("t0").model_dump(), config("t0_fl_bcd").model_dump()
    assert (overlapped["federation"].pop("delay"), serial["federation"].pop("delay")) == (1, 0)
    assert (overlapped["federation"].pop("method"), serial["federation"].pop("method")) == ("parablock", "fl_bcd")
    assert overlapped == serial


def test_the_configuration_near_the_paper_is_marked_inferred_and_trains_as_we_read_it():
    text, chosen = (ROOT / "configs" / "paper_like.yaml").read_text(), config("paper_like")
    assert text.startswith("# Inferred: ")
    for unknown in ("num_clients", "num_rounds", "num_local_steps", "learning_rate", "partition", "link"):
        assert re.search(rf"^ *{unknown}:.*# ours", text, flags=re.MULTILINE), unknown
    assert (chosen.federation.method, chosen.federation.delay) == ("parablock", 1)
    assert (chosen.federation.in_flight, chosen.blocks.layers_per_block) == ("own", 1)
    assert isinstance(chosen.train.num_local_steps, int) and chosen.train.num_local_steps >= 8
    assert config("paper_like", "federation.in_flight=aligned").federation.in_flight == "aligned"


def first_rows(shared_dir: Path, file: str, folder: Path) -> None:
    """Put the first rows of a file at its place below `folder`."""
    real, place = shared_dir / Path(file).relative_to("../shared"), folder / file
    place.parent.mkdir(parents=True, exist_ok=True)
    with real.open(encoding="utf-8") as lines:
        place.write_text("".join(islice(lines, NUM_ROWS)), encoding="utf-8")


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.parametrize("name", ON_SHARED_DATA)
def test_it_runs_on_its_real_data(name: str, shared_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (project := tmp_path / "project").mkdir()
    monkeypatch.chdir(project)
    shortened = config(name, *SHORT)
    for file in (*shortened.data.train, *shortened.data.test):
        first_rows(shared_dir, file, project)
    model = Path(shortened.model.name_or_path)
    model.parent.mkdir(parents=True, exist_ok=True)
    model.symlink_to(shared_dir / model.relative_to("../shared"))
    summary = run(shortened, tmp_path / "run")
    assert (summary["status"], summary["rounds_done"]) == ("completed", 2)
    assert summary["delay"] == config(name).federation.delay
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_the_own_jsonl_configuration_is_the_readmes():
    (shown,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    text = (ROOT / "configs" / "own_jsonl.yaml").read_text()
    assert text.endswith(shown)
    assert yaml.safe_load(text) == yaml.safe_load(shown)


def test_the_own_jsonl_configuration_takes_two_files_beside_it(
    tiny_llama: Callable[..., LlamaForCausalLM],
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
):
    model = make_workshop(tmp_path, tiny_llama, tiny_tokenizer).model
    monkeypatch.chdir(tmp_path)
    own = config("own_jsonl", f"model.name_or_path={model}", "data.max_length=64", "engine.num_threads=1")
    with pytest.raises(DataError, match=r"site_a\.jsonl"):
        read_inputs(own)
    for site, path in enumerate(own.data.train):
        write_rows(tmp_path / path, (sum_row(site, k) for k in range(20)))
    assert [len(examples) for examples in read_inputs(own).train] == [18, 18]
