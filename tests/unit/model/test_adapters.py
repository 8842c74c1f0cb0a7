"""A rank that no matrix can have is refused by name, before weights are read."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from parablock.errors import ModelError
from parablock.model.adapters import check_rank
from tiny_runs import Workshop, assert_refused, command

SAID = "lora.rank is 33, and no matrix that gets an adapter has a rank above 32"


def test_a_rank_is_at_most_the_largest_of_the_smaller_sides(tiny_llama: Callable[..., LlamaForCausalLM]):
    model = tiny_llama()  # q_proj is 32 × 32, k_proj 16 × 32, and those of the MLP 32 × 64
    assert check_rank(model, rank=32)  # above that of k_proj alone
    with pytest.raises(ModelError, match=SAID):
        check_rank(model, rank=33)
    with pytest.raises(ModelError, match="has a rank above 16"):
        check_rank(model, rank=17, target_modules=["k_proj"])
    assert len(check_rank(model, rank=16, target_modules=["k_proj"])) == 4


def test_every_command_refuses_it_before_weights_are_read(workshop: Workshop, tmp_path: Path):
    model = shutil.copytree(workshop.model, tmp_path / "model")
    (model / "model.safetensors").write_bytes(b"no weights")
    settings = ("--set", f"model.name_or_path={model}", "--set", "federation.method=fedit")
    config, out = str(workshop.config), str(tmp_path / "out")
    for line in (
        ("plan", config),
        ("run", config, "--output-dir", out),
        ("compare", config, "--output-dir", out, "--methods", "parablock,fedit"),
    ):
        assert_refused(command(*line, *settings, "--set", "lora.rank=33"), SAID, "Set lora.rank to at most 32")
    assert not Path(out).exists()
    assert_refused(
        command("run", config, "--output-dir", out, *settings, "--set", "lora.rank=32"), "The weights of"
    )
