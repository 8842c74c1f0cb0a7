"""Model folders that cannot be trained: each says what it is; and an adapter that was left in one has no effect."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaForCausalLM, MptConfig, PreTrainedConfig
from transformers import PreTrainedTokenizerFast as Tokenizer

from parablock.errors import ModelError
from parablock.model.blocks import partition_blocks
from parablock.model.pretrained import LoadedModel, load_model, outline_model
from parablock.model.save import base_parts, save_model

VOCABULARY = 300


def load(source: Path | str, **changes: object) -> LoadedModel:
    options = {"dtype": "float32", "device": "cpu", "init": "pretrained", "seed": 0} | changes
    return load_model(str(source), **options)  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path, tiny_llama: Callable[..., LlamaForCausalLM], tiny_tokenizer: Tokenizer) -> Path:
    save_model(tiny_llama(num_layers=2, vocab_size=VOCABULARY), tiny_tokenizer, tmp_path / "model")
    return tmp_path / "model"


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def quantise(method: str) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "config.json", quantization_config={"quant_method": method})


def bring_code(folder: Path) -> None:
    mapped = {"AutoConfig": "configuration_my.MyConfig", "AutoModelForCausalLM": "modeling_my.MyModel"}
    edit(folder / "config.json", model_type="mymodel", auto_map=mapped)
    (folder / "modeling_my.py").write_text(f"open({str(folder / 'was here')!r}, 'w')")


def be_newer(folder: Path) -> None:
    edit(folder / "config.json", model_type="llama9000", transformers_version="9.1.0")


def be_an_adapter(folder: Path) -> None:
    add_adapter(folder)
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink()


def add_adapter(folder: Path) -> None:
    import peft

    base = AutoModelForCausalLM.from_pretrained(folder)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    with warnings.catch_warnings(action="ignore"):
        peft.get_peft_model(base, config).save_pretrained(folder / "adapter")
    for path in (folder / "adapter").glob("adapter_*"):
        shutil.move(path, folder / path.name)
    edit(folder / "adapter_config.json", base_model_name_or_path="ann/base")


def be_gguf(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "model-Q4_K_M.gguf").write_bytes(b"GGUF\x03" + bytes(64))


def point_at_weights(folder: Path) -> None:
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 13709952\n"
    (folder / "model.safetensors").write_text(text)


def poison(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def break_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}")


WRONG: dict[str, tuple[Callable[[Path], None], str, str]] = {
    **{
        f"quantised by {method}": (quantise(method), f"The weights of .* are quantised \\({method}\\)", "made from")
        for method in ("bitsandbytes", "gptq", "awq", "fp8", "compressed-tensors", "mxfp4")
    },
    "code of its own": (
        bring_code,
        r"brings code of its own \(configuration_my.py, modeling_my.py\)",
        "architecture",
    ),
    "newer type": (
        be_newer,
        f"llama9000, which Transformers {transformers.__version__} does not know",
        "newer one",
    ),
    "adapter": (be_an_adapter, r"holds an adapter.*(?s:.*)names ann/base", "merge_and_unload"),
    "GGUF": (be_gguf, r"holds a model for inference \(model-Q4_K_M.gguf\)", "made from"),
    "pointer": (point_at_weights, r"model.safetensors is a pointer of Git LFS", "lfs pull"),
    "NaN": (poison, r"not finite, the first in model.layers.1.mlp.down_proj.weight", "another checkpoint"),
    "template": (break_template, r"is no template of Jinja: Unexpected end of template.*in line 1", "Correct"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_trained_says_what_it_is_and_what_to_take(folder: Path, case: str):
    load(folder)
    change, words, cure = WRONG[case]
    change(folder)
    with pytest.raises(ModelError, match=words) as caught:
        load(folder)
    assert str(folder) in str(caught.value)
    assert cure in caught.value.remedy
    assert not (folder / "was here").exists()


def test_an_outline_refuses_the_same_and_needs_no_weights(folder: Path):
    point_at_weights(folder)
    assert outline_model(str(folder), dtype="float32").num_parameters() > 0
    quantise("gptq")(folder)
    with pytest.raises(ModelError, match="quantised"):
        outline_model(str(folder), dtype="float32")


def test_a_file_of_gguf_says_so(folder: Path):
    be_gguf(folder)
    with pytest.raises(ModelError, match="in GGUF"):
        load(folder / "model-Q4_K_M.gguf")


def test_an_adapter_that_was_left_in_a_model_folder_changes_nothing(folder: Path):
    before = load(folder)
    add_adapter(folder)
    after = load(folder)
    assert base_parts(after.model, after.tokenizer) == base_parts(before.model, before.tokenizer)
    assert (before.notes, len(after.notes)) == ((), 1)
    assert "adapter_config.json" in after.notes[0]
    assert not any("lora" in name for name, _ in after.model.named_parameters())
    with warnings.catch_warnings(action="ignore"):
        plain = AutoModelForCausalLM.from_pretrained(folder)  # what Transformers makes of the folder
    assert any("lora" in name for name, _ in plain.named_parameters())


@pytest.mark.parametrize(
    "config",
    [
        GPTNeoXConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, vocab_size=VOCABULARY
        ),
        MptConfig(d_model=16, n_heads=2, n_layers=2, vocab_size=VOCABULARY),
    ],
    ids=lambda config: config.model_type,
)
def test_decoders_that_say_nothing_of_being_one_are_loaded(
    tmp_path: Path, tiny_tokenizer: Tokenizer, config: PreTrainedConfig
):
    save_model(AutoModelForCausalLM.from_config(config), tiny_tokenizer, tmp_path / "model")
    model = load(tmp_path / "model").model
    assert len(partition_blocks(model, layers_per_block=1)) == 2
    assert torch.isfinite(model(torch.arange(8)[None]).logits).all()
