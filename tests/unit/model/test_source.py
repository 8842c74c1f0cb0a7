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
from parablock.model.pretrained import LoadedModel, load_model, load_tokenizer, outline_model
from parablock.model.save import base_parts, save_model
from parablock.model.source import check_tensors, code_refused

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


def quantise(method: str, key: str = "quantization_config") -> Callable[[Path], None]:
    return lambda folder: edit(folder / "config.json", **{key: {"quant_method": method}})


def quantise_below(folder: Path) -> None:
    edit(folder / "config.json", text_config={"quantization_config": {"quant_method": "gptq"}})


def keep_as(dtype: torch.dtype, suffix: str = ".safetensors") -> Callable[[Path], None]:
    """Write the matrices in another type of number, and say nothing of it in config.json."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        kept = {name: (100 * each).to(dtype) if each.dim() == 2 else each for name, each in tensors.items()}
        if suffix == ".safetensors":
            return save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "model.safetensors").unlink()
        return torch.save(kept, folder / "pytorch_model.bin")

    return change


def keep_in_parts(folder: Path) -> None:
    keep_as(torch.int8)(folder)
    part = (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(part), part.name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def bring_a_tokenizer(folder: Path) -> None:
    mapped = {"AutoTokenizer": ["tokenization_my.MyTokenizer", None]}
    edit(folder / "tokenizer_config.json", auto_map=mapped, tokenizer_class="MyTokenizer")


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


def point_at(name: str) -> Callable[[Path], object]:
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 13709952\n"
    return lambda folder: (folder / name).write_text(text)


def poison(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def break_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}")


WRONG: dict[str, tuple[Callable[[Path], object], str, str]] = {
    **{
        f"quantised by {method}": (quantise(method), f"The weights of .* are quantised \\({method}\\)", "made from")
        for method in ("bitsandbytes", "gptq", "awq", "fp8", "compressed-tensors", "mxfp4")
    },
    "quantised by an older name": (
        quantise("compressed-tensors", "compression_config"),
        "compressed-tensors",
        "made from",
    ),
    "quantised below": (quantise_below, "quantised \\(gptq\\)", "made from"),
    **{
        f"{number} and no word of it": (
            keep_as(getattr(torch, number)),
            f"quantised \\(.*weight is of type {number}",
            "made from",
        )
        for number in ("int8", "uint8", "float8_e4m3fn")
    },
    "int8 in parts": (keep_in_parts, "weight is of type int8", "made from"),
    "int8 of torch": (keep_as(torch.int8, ".bin"), "weight is of type int8", "made from"),
    "a tokenizer of its own": (bring_a_tokenizer, r"code of its own \(tokenization_my.py\)", "tokenizer too"),
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
    **{
        f"pointer as {name}": (point_at(name), f"{name} is a pointer of Git LFS", "lfs pull")
        for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json")
    },
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


@pytest.mark.parametrize("number", [torch.float8_e8m0fnu, torch.complex64], ids=str)
def test_numbers_that_transformers_does_not_read_are_refused_as_such(folder: Path, number: torch.dtype):
    tensors = load_file(folder / "model.safetensors") | {"scales": torch.ones(2).to(number)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="quantised"):
        check_tensors(str(folder), ())


def test_what_is_no_weight_is_no_number_to_check(folder: Path):
    tensors = load_file(folder / "model.safetensors") | {"model.loss_weights_mask": torch.ones(2, dtype=torch.bool)}
    (folder / "model.safetensors").unlink()
    torch.save(tensors | {"epoch": 3}, folder / "pytorch_model.bin")
    check_tensors(str(folder), ())
    torch.save(tensors | {"model.qweight": torch.ones(2, dtype=torch.int32)}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"model.qweight is of type int32"):
        check_tensors(str(folder), ())


def test_code_without_a_map_is_named_without_empty_brackets(folder: Path):
    assert "brings code of its own (not named), which" in str(code_refused(str(folder), "Its type x"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_whole_numbers_of_any_width_are_read(folder: Path, dtype: torch.dtype):
    keep_as(dtype)(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.position_ids"] = torch.arange(8)[None]  # old checkpoints keep such tensors, which are no weights
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert load(folder).model.dtype == torch.float32


@pytest.mark.parametrize(
    "case", ["quantised by gptq", "adapter", "GGUF", "pointer as tokenizer.json", "a tokenizer of its own"]
)
def test_a_tokenizer_alone_refuses_the_same(folder: Path, case: str):
    load_tokenizer(str(folder))
    change, words, cure = WRONG[case]
    change(folder)
    with pytest.raises(ModelError, match=words) as caught:
        load_tokenizer(str(folder))
    assert cure in caught.value.remedy


def test_an_outline_refuses_the_same_and_needs_no_weights(folder: Path):
    point_at("model.safetensors")(folder)
    assert outline_model(str(folder), dtype="float32").num_parameters() > 0
    assert load_tokenizer(str(folder)).vocab_size > 0
    point_at("config.json")(shutil.copytree(folder, folder.parent / "pointing"))
    quantise("gptq")(folder)
    for refused, words in ((folder, "quantised"), (folder.parent / "pointing", "config.json is a pointer")):
        with pytest.raises(ModelError, match=words):
            outline_model(str(refused), dtype="float32")


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
