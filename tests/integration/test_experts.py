"""Mixtures of experts: what is trained of them is said, and is so."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedConfig, Qwen3MoeConfig

from tiny_runs import NUM_LAYERS, VOCABULARY, Workshop, metrics_of

SIZE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
FAMILIES: dict[str, PreTrainedConfig] = {
    "mixtral": MixtralConfig(**SIZE, num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "qwen3_moe": Qwen3MoeConfig(
        **SIZE, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, decoder_sparse_step=1
    ),
}
NOTE = "a mixture of 4 experts"


def with_experts(folder: Path, workshop: Workshop, name: str) -> Path:
    shutil.copytree(workshop.model, folder)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(FAMILIES[name]).save_pretrained(folder)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_experts_and_routers_are_trained_with_their_layers(name: str, workshop: Workshop, tmp_path: Path):
    model = with_experts(tmp_path / name, workshop, name)
    outcome = workshop.run(tmp_path / "run", f"model.name_or_path={model}", "train.learning_rate=0.02")
    assert outcome.code == 0, outcome.stderr
    assert f"{NOTE}: experts and routers are trained with the layers" in outcome.stdout
    before, after = weights(model), weights(tmp_path / "run" / "model")
    assert before.keys() == after.keys()
    trained = {row["block_index"] for row in metrics_of(tmp_path / "run")}
    for layer in trained:
        parts = [
            key for key in before if f"layers.{layer}." in key and (".experts." in key or "gate.weight" in key)
        ]
        assert len(parts) >= 2
        assert not any(torch.equal(before[key], after[key]) for key in parts), "each has tokens of its own"
    rest = [key for key in before if "layers." not in key]
    assert all(torch.equal(before[key], after[key]) for key in rest)


def test_adapters_leave_experts_that_are_one_tensor_as_they_are(workshop: Workshop, tmp_path: Path):
    model = with_experts(tmp_path / "mixtral", workshop, "mixtral")
    changes = ("federation.method=fedit", "federation.delay=0", "train.learning_rate=0.02")
    outcome = workshop.run(tmp_path / "run", f"model.name_or_path={model}", *changes)
    assert outcome.code == 0, outcome.stderr
    assert f"{NOTE}: adapters are on linear maps alone" in outcome.stdout
    before, after = weights(model), weights(tmp_path / "run" / "model")
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert any("q_proj" in key for key in changed)
    assert not any(".experts." in key for key in changed)


def test_a_model_without_experts_is_none(workshop: Workshop, tmp_path: Path):
    assert "mixture" not in workshop.run(tmp_path / "run", "federation.num_rounds=4").stdout
