"""What an export says of itself, and what other releases of Transformers read in it."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    OlmoConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    StableLmConfig,
)
from transformers import PreTrainedTokenizerFast as Tokenizer

from parablock.errors import ModelError
from parablock.model import save
from parablock.model.pretrained import LoadedModel, load_model
from parablock.model.save import save_model

OTHER = Path(__file__).resolve().parents[3] / ".venv" / "other-transformers"
"""A folder with Transformers 4, and what it needs beside torch; an environment variable may name another one."""

ENDS = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
SIZE = {
    **ENDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GROUPED = {**SIZE, "num_key_value_heads": 2}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
PARTIAL = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**GROUPED, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}),
    "llama3": LlamaConfig(**GROUPED, rope_parameters=LLAMA3),
    "qwen2": Qwen2Config(**GROUPED, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "qwen3": Qwen3Config(**GROUPED, head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "mistral": MistralConfig(
        **GROUPED, sliding_window=8, rope_parameters={"rope_type": "default", "rope_theta": 1e5}
    ),
    "gemma3": Gemma3TextConfig(
        **GROUPED, head_dim=16, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    ),
    "phi": PhiConfig(**SIZE, rope_parameters=PARTIAL),
    "stablelm": StableLmConfig(**GROUPED, rope_parameters=PARTIAL),
    "olmo": OlmoConfig(**SIZE, rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
    "gpt_neox": GPTNeoXConfig(**SIZE, rope_parameters=PARTIAL),
    "gpt2": GPT2Config(**ENDS, n_embd=32, n_layer=2, n_head=4, n_positions=128),
    "opt": OPTConfig(**SIZE | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
}
IDS = torch.arange(2, 66)[None]


def load(source: Path, **changes: str) -> LoadedModel:
    return load_model(str(source), dtype=changes.get("dtype", "float32"), device="cpu", init="pretrained", seed=0)


def read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def export(loaded: LoadedModel, folder: Path) -> Path:
    save_model(loaded.model, loaded.tokenizer, folder, kept_files=loaded.kept_files)
    return folder


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> dict[str, Path]:
    """An export of each family, from a base that the library itself has saved."""
    folders = {}
    for name, config in FAMILIES.items():
        base = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(base / "base")
        tiny_tokenizer.save_pretrained(base / "base")
        folders[name] = export(load(base / "base"), base / "model")
    return folders


@pytest.mark.parametrize("name", FAMILIES)
def test_an_export_of_each_family_reads_back_with_the_same_logits(exports: dict[str, Path], name: str):
    exported, base = exports[name], exports[name].parent / "base"
    wanted = AutoModelForCausalLM.from_pretrained(base).eval()(IDS).logits
    assert torch.equal(AutoModelForCausalLM.from_pretrained(exported).eval()(IDS).logits, wanted)
    kept, written = read_json(base / "config.json"), read_json(exported / "config.json")
    assert {key: written[key] for key in kept} == kept | {"dtype": "float32"}
    if name not in ("gpt2", "opt"):
        AutoConfig.from_pretrained(exported)
        assert {"rope_theta", "rope_parameters"} <= set(written)
        for names in ("rope_theta", "rotary_emb_base"):  # the other spelling has an effect where it is the only one
            if names in written:
                assert written[names] != 10000.0


READ_BY_ANOTHER = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
found = {"version": transformers.__version__}
for name, folder in json.loads(sys.argv[1]).items():
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    logits = model(torch.arange(2, 66)[None]).logits[0, -1].double().tolist()
    found[name] = [logits, tokenizer("Ann has 12 apples")["input_ids"], chat]
print(json.dumps(found))
"""


def read_by(packages: str, folders: dict[str, Path]) -> dict[str, Any]:
    import sys

    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            READ_BY_ANOTHER,
            json.dumps({n: str(f) for n, f in folders.items()}),
        ],
        env={**os.environ, "PYTHONPATH": packages, "TRANSFORMERS_VERBOSITY": "error"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    content: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return content


def test_transformers_4_reads_the_same_models(exports: dict[str, Path], tiny_tokenizer: Tokenizer):
    packages = os.environ.get("PARABLOCK_OTHER_TRANSFORMERS", str(OTHER))
    if not Path(packages).is_dir():
        pytest.skip(f"Transformers 4 is not in {packages}: make other-transformers")
    found = read_by(packages, exports)
    assert found.pop("version").startswith("4.")
    for name, (logits, ids, chat) in found.items():
        model = AutoModelForCausalLM.from_pretrained(exports[name]).eval()
        assert torch.allclose(
            torch.tensor(logits, dtype=torch.float64), model(IDS).logits[0, -1].double(), atol=1e-5
        ), name
        assert ids == tiny_tokenizer("Ann has 12 apples")["input_ids"], name
        assert chat == tiny_tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    # what the library itself writes is another model there, or none
    base = read_by_or_error(packages, exports["llama"].parent / "base")
    assert base is None or not torch.allclose(torch.tensor(base), torch.tensor(found["llama"][0]), atol=1e-3)


def read_by_or_error(packages: str, folder: Path) -> list[float] | None:
    try:
        logits: list[float] = read_by(packages, {"base": folder})["base"][0]
    except AssertionError:
        return None
    return logits


@pytest.fixture
def base(tmp_path: Path, tiny_llama: Callable[..., LlamaForCausalLM], tiny_tokenizer: Tokenizer) -> Path:
    tiny_llama(num_layers=2, vocab_size=300, dtype="bfloat16").save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(read_json(path) | changes))


def test_an_export_has_the_precision_of_its_base_and_a_model_without_one_its_own(base: Path, tmp_path: Path):
    loaded = load(base)
    assert loaded.model.dtype == torch.float32
    exported = export(loaded, tmp_path / "model")
    weights = load_file(exported / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert read_json(exported / "config.json")["torch_dtype"] == "bfloat16"
    save_model(loaded.model, loaded.tokenizer, tmp_path / "own")
    assert {tensor.dtype for tensor in load_file(tmp_path / "own" / "model.safetensors").values()} == {
        torch.float32
    }


def test_a_precision_that_cannot_hold_the_weights_is_not_taken(base: Path, tmp_path: Path):
    edit(base / "config.json", dtype="float16")
    loaded = load(base)
    exported = export(loaded, tmp_path / "model")
    assert read_json(exported / "config.json")["dtype"] == "float16"
    loaded.model.model.norm.weight.data[0] = 1e6  # beyond float16
    exported = export(loaded, tmp_path / "model")
    assert read_json(exported / "config.json")["dtype"] == "float32"


def test_files_and_fields_of_the_base_are_kept(base: Path, tmp_path: Path):
    edit(base / "config.json", rope_theta=500000.0, rope_parameters=None, torch_dtype="bfloat16", own_field=7)
    edit(base / "config.json", attention_dropout=0.1, auto_map={"AutoModelForCausalLM": "modeling.Llama"})
    edit(base / "tokenizer_config.json", clean_up_tokenization_spaces=False)
    (base / "LICENSE").write_text("of the base")
    exported = export(load(base), tmp_path / "model")
    written = read_json(exported / "config.json")
    assert (written["own_field"], written["attention_dropout"], written["rope_theta"]) == (7, 0.1, 500000.0)
    assert "auto_map" not in written
    assert (exported / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert (exported / "LICENSE").read_text() == "of the base"
    tokenizer = read_json(exported / "tokenizer_config.json")
    assert (tokenizer["clean_up_tokenization_spaces"], tokenizer["tokenizer_class"]) == (
        False,
        "PreTrainedTokenizerFast",
    )
    assert read_json(base / "tokenizer_config.json")["tokenizer_class"] == "TokenizersBackend"
    theta = AutoConfig.from_pretrained(exported).rope_parameters["rope_theta"]
    assert theta == AutoConfig.from_pretrained(base).rope_parameters["rope_theta"] == 500000.0


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_those_may_read_the_files_whom_the_umask_lets(base: Path, tmp_path: Path, mask: int, mode: int):
    model, before = load(base), os.umask(mask)
    try:
        exported = export(model, tmp_path / "model")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in exported.iterdir()} == {mode}


def test_a_template_that_a_run_gave_is_saved(base: Path, tmp_path: Path):
    (base / "chat_template.jinja").unlink()
    loaded = load(base)
    assert loaded.tokenizer.chat_template is None
    loaded.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    exported = export(loaded, tmp_path / "model")
    assert AutoTokenizer.from_pretrained(exported).chat_template == loaded.tokenizer.chat_template


@pytest.mark.parametrize("damage", ["config.json", "model.safetensors", "chat_template.jinja"])
def test_what_does_not_read_back_is_not_published(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
):
    loaded, make_portable = load(base), save.make_portable

    def damaged(folder: Path, *arguments: Any, **options: Any) -> None:
        make_portable(folder, *arguments, **options)
        if damage == "config.json":
            edit(folder / damage, rope_theta=7.0, rope_parameters=None)
        elif damage == "chat_template.jinja":
            (folder / damage).write_text("other")
        else:
            raw = bytearray((folder / damage).read_bytes())
            raw[-1] ^= 1
            (folder / damage).write_bytes(bytes(raw))

    export(loaded, tmp_path / "model")
    monkeypatch.setattr(save, "make_portable", damaged)
    with pytest.raises(ModelError, match="does not read back as the one that was trained"):
        export(loaded, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
