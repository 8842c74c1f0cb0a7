"""Exports of finished runs: others read them as the same model."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

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
    base = AutoModelForCausalLM.from_pretrained(workshop.model)
    tuned = logits(AutoModelForCausalLM.from_pretrained(run_dir / "model"))
    assert not torch.allclose(logits(base), tuned, atol=1e-3)
    with warnings.catch_warnings(action="ignore"):
        adapted = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    assert torch.allclose(logits(adapted), tuned, atol=1e-5)


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
    said = done("export", str(runs()), "--format", "gguf", "--dtype", dtype, *target).stdout
    assert f"matrices in {dtype}" in said
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


@pytest.mark.parametrize("export_format", ["hf", "gguf", "adapter", "delta"])
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
