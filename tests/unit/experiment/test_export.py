"""Exports of finished runs: others read them as the same model."""

from __future__ import annotations

import json
import os
import shutil
import stat
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from parablock.experiment import export
from parablock.model.save import model_sha256
from tiny_runs import Runs, Workshop, assert_refused, command, done, summary_of

IDS = torch.arange(2, 50)[None]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def test_an_adapter_of_a_run_with_adapters_is_its_model(workshop: Workshop, runs: Runs, tmp_path: Path):
    run_dir = runs("federation.method=fedit", "federation.delay=0", "lora.rank=4")
    said = done("export", str(run_dir), "--format", "adapter", "--output-dir", str(tmp_path / "adapter"))
    assert "rank 4 holds 100.0% of the squared change of" in said.stdout
    assert "bfloat16" not in said.stdout
    base = AutoModelForCausalLM.from_pretrained(workshop.model)
    tuned = logits(AutoModelForCausalLM.from_pretrained(run_dir / "model"))
    assert not torch.allclose(logits(base), tuned, atol=1e-3)
    with warnings.catch_warnings(action="ignore"):
        adapted = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    assert torch.allclose(logits(adapted), tuned, atol=1e-5)


def test_an_adapter_of_a_rounded_model_says_that_it_is_rounded(runs: Runs, tmp_path: Path):
    run_dir = runs("federation.method=fedit", "federation.delay=0", "lora.rank=4", "model.dtype=bfloat16")
    said = done("export", str(run_dir), "--format", "adapter", "--output-dir", str(tmp_path / "adapter"))
    assert "the model is written in bfloat16, and its rounding is a part of the change" in said.stdout


def test_an_adapter_of_a_run_of_blocks_says_what_it_leaves_out(runs: Runs, tmp_path: Path):
    target = ("--format", "adapter", "--rank", "1", "--output-dir", str(tmp_path / "adapter"))
    said = done("export", str(runs()), *target).stdout
    assert "rank 1 holds 100.0%" not in said
    assert "other tensors changed, which an adapter does not hold, such as model.layers." in said


def test_a_difference_and_the_base_are_the_model(workshop: Workshop, runs: Runs, tmp_path: Path):
    done("export", str(runs()), "--format", "delta", "--output-dir", str(tmp_path / "delta"))
    model = AutoModelForCausalLM.from_pretrained(workshop.model)
    tuned = logits(AutoModelForCausalLM.from_pretrained(runs() / "model"))
    for name, change in load_file(tmp_path / "delta" / "delta.safetensors").items():
        model.get_parameter(name).data += change
    assert torch.allclose(logits(model), tuned, atol=1e-5)
    assert not torch.allclose(logits(AutoModelForCausalLM.from_pretrained(workshop.model)), tuned, atol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_gguf_file_is_the_model(runs: Runs, tmp_path: Path, dtype: str):
    target = ("--output-dir", str(tmp_path / "gguf"))
    outcome = done("export", str(runs()), "--format", "gguf", "--dtype", dtype, *target)
    assert f"matrices in {dtype}" in outcome.stdout
    assert "it/s" not in outcome.stderr and "onverting" not in outcome.stderr  # the bar of Transformers
    tuned = AutoModelForCausalLM.from_pretrained(runs() / "model")
    for parameter in tuned.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype) if parameter.ndim > 1 else torch.float32).float()
    with warnings.catch_warnings(action="ignore"):
        read = AutoModelForCausalLM.from_pretrained(tmp_path / "gguf", gguf_file="model.gguf", dtype=torch.float32)
    assert torch.allclose(logits(read), logits(tuned), atol=1e-5)
    exact = logits(AutoModelForCausalLM.from_pretrained(runs() / "model"))
    assert torch.allclose(logits(read), exact, atol=1e-6) == (dtype == "float32")
    assert {path.name for path in (tmp_path / "gguf").iterdir()} == {"model.gguf"}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--format", "gguf", "--rank", "4"), "--rank is for --format adapter, and this is gguf"),
        (("--format", "hf", "--dtype", "float16"), "--dtype is for --format gguf, and this is hf"),
        (("--public",), "--public is for --push-to-hub"),
    ],
)
def test_options_of_another_form_are_refused(runs: Runs, tmp_path: Path, options: tuple[str, ...], says: str):
    outcome = command("export", str(runs()), *options, "--output-dir", str(tmp_path / "new"))
    assert outcome.code == 2 and says in " ".join(outcome.stderr.replace("│", "").split())
    assert not (tmp_path / "new").exists()


def test_a_folder_is_the_model_itself(runs: Runs, tmp_path: Path):
    done("export", str(runs()), "--output-dir", str(tmp_path / "model"))
    assert model_sha256(tmp_path / "model") == model_sha256(runs() / "model")


def test_a_template_that_the_run_gave_writes_what_it_trained_on(workshop: Workshop, runs: Runs, tmp_path: Path):
    bare = shutil.copytree(workshop.model, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    run_dir = runs(f"model.name_or_path={bare}")
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "model")
    turns = [{"role": "user", "content": "1 plus 1?"}, {"role": "assistant", "content": "#### 2"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == "1 plus 1? #### 2<|endoftext|>"
    assert "no chat template" in run_dir.with_suffix(".log").read_text()
    assert "no chat template" not in runs().with_suffix(".log").read_text()
    scores = done("eval", str(run_dir), "--data", str(workshop.test_file)).stdout
    assert f"{summary_of(run_dir)['final_eval_loss']:.4f}" in scores


FORMATS = ["hf", "gguf", "adapter", "delta"]


@pytest.mark.parametrize("export_format", FORMATS)
def test_weights_that_the_run_has_not_written_are_not_exported(runs: Runs, tmp_path: Path, export_format: str):
    run_dir, new = shutil.copytree(runs(), tmp_path / "run"), tmp_path / "new"
    words = ("export", str(run_dir), "--format", export_format, "--output-dir", str(new))
    weights = run_dir / "model" / "model.safetensors"
    whole = weights.read_bytes()
    for damaged, says in ((whole[:-100], "cannot be read"), (whole[:-1] + b"\x01", "their hash is another one")):
        assert damaged != whole
        weights.write_bytes(damaged)
        assert_refused(command(*words), says, str(run_dir / "model"))
        if export_format == "hf" and "hash" in says:
            for reading in (("eval",), ("generate", "2 plus 2?", "--max-new-tokens", "1"), ("chat",)):
                told = command(reading[0], str(run_dir), *reading[1:])
                assert "warning: the weights in" in told.stdout + told.stderr
            assert json.loads((run_dir / "evaluation" / "loss.json").read_text())["weights_changed"]
        assert [path.name for path in tmp_path.iterdir()] == ["run"]
    weights.write_bytes(whole)
    if export_format == "hf":
        assert "warning: the weights" not in done("eval", str(run_dir)).stdout
        assert not json.loads((run_dir / "evaluation" / "loss.json").read_text())["weights_changed"]
    assert command(*words).code == 0 and new.is_dir()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_folder_that_cannot_be_read_is_not_exported(runs: Runs, tmp_path: Path, name: str):
    run_dir = shutil.copytree(runs(), tmp_path / "run")
    (run_dir / "model" / name).write_text("{")
    assert_refused(command("export", str(run_dir), "--output-dir", str(tmp_path / "new")), "cannot be read")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_a_disk_has_not_kept_is_not_exported(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target = ("--output-dir", str(tmp_path / "new"))

    def copy_a_part(source: Path, copy: Path) -> None:
        copy.write_bytes(source.read_bytes()[:-1])

    def save_others(tensors: dict[str, torch.Tensor], path: Path) -> None:
        save_file({name: tensor + 1 for name, tensor in tensors.items()}, path)

    monkeypatch.setattr(export.shutil, "copyfile", copy_a_part)
    assert_refused(command("export", str(runs()), *target), "The disk has not kept")
    monkeypatch.setattr(export, "save_file", save_others)
    assert_refused(command("export", str(runs()), "--format", "delta", *target), "The disk has not kept")
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_no_matrix_has_is_refused(runs: Runs, tmp_path: Path):
    words = ("export", str(runs()), "--format", "adapter", "--output-dir", str(tmp_path / "new"), "--rank")
    outcome = command(*words, "100000")
    assert_refused(outcome, "an adapter of rank 100000 is asked for", "Give a --rank of at most")
    assert list(tmp_path.iterdir()) == []
    most = int(outcome.stderr.partition("at most ")[2].partition(";")[0])
    assert_refused(command(*words, str(most + 1)), f"rank above {most}")
    assert command(*words, str(most)).code == 0


def test_a_model_that_is_the_one_written_is_copied_without_being_loaded(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    loaded = []
    monkeypatch.setattr(export, "load_model", lambda *arguments, **_: loaded.append(arguments))
    run_dir = shutil.copytree(runs(), tmp_path / "run")
    done("export", str(run_dir), "--output-dir", str(tmp_path / "new"))
    assert not loaded
    summary = json.loads((run_dir / "summary.json").read_text())
    del summary["model_sha256"]
    (run_dir / "summary.json").write_text(json.dumps(summary))
    done("export", str(run_dir), "--output-dir", str(tmp_path / "unsure"))
    assert loaded


def test_a_model_with_a_folder_in_it_is_exported_whole(runs: Runs, tmp_path: Path):
    run_dir = shutil.copytree(runs(), tmp_path / "run")
    inside = Path("additional_chat_templates", "tool_use.jinja")
    (run_dir / "model" / inside).parent.mkdir()
    (run_dir / "model" / inside).write_text("{{ messages }}")
    (run_dir / "model" / "linked").symlink_to(run_dir / "model" / inside.parent)
    (run_dir / "model" / inside.parent / "back").symlink_to(run_dir / "model")
    done("export", str(run_dir), "--output-dir", str(tmp_path / "new"))
    for place in (inside, Path("linked", inside.name)):
        assert (tmp_path / "new" / place).read_text() == "{{ messages }}"


@pytest.mark.parametrize(("mask", "modes"), [(0o077, (0o700, {0o600})), (0o022, (0o755, {0o644}))])
@pytest.mark.parametrize("export_format", FORMATS)
def test_who_may_read_an_export_follows_from_the_umask(
    runs: Runs, tmp_path: Path, export_format: str, mask: int, modes: tuple[int, set[int]]
):
    new, run_dir, before = tmp_path / "new", str(runs()), os.umask(mask)
    try:
        done("export", run_dir, "--format", export_format, "--output-dir", str(new))
    finally:
        os.umask(before)
    files = {stat.S_IMODE(path.stat().st_mode) for path in new.iterdir()}
    assert (stat.S_IMODE(new.stat().st_mode), files) == modes


@pytest.mark.parametrize("export_format", FORMATS)
def test_what_cannot_be_exported_is_refused_and_nothing_is_left(
    workshop: Workshop, runs: Runs, tmp_path: Path, export_format: str
):
    (tmp_path / "mine").mkdir()
    form = ("--format", export_format)
    assert_refused(
        command("export", str(runs()), *form, "--output-dir", str(tmp_path / "mine")), "is there already"
    )
    new = ("--output-dir", str(tmp_path / "new"))
    assert_refused(command("export", str(workshop.model), *form, *new), "holds no run")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
