"""Reading a model folder and writing one: what is kept, what is refused, and in which words."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers import PreTrainedTokenizerFast as Tokenizer
from transformers.utils import logging as transformers_logging

from parablock.errors import ModelError, StorageError, did_you_mean
from parablock.model.blocks import partition_blocks
from parablock.model.params import Replica
from parablock.model.pretrained import LoadedModel, load_model, outline_model, quiet_transformers
from parablock.model.save import model_sha256, save_model
from parablock.training.memory import FP32, memory_per_client
from planning import config_of
from tiny_runs import Workshop, longest_file

VOCABULARY = 300


def load(source: Path | str, **changes: object) -> LoadedModel:
    options = {"dtype": "float32", "device": "cpu", "init": "pretrained", "seed": 0} | changes
    return load_model(str(source), **options)  # type: ignore[arg-type]


@pytest.fixture
def model(tiny_llama: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    return tiny_llama(num_layers=2, vocab_size=VOCABULARY)


@pytest.fixture
def folder(tmp_path: Path, model: LlamaForCausalLM, tiny_tokenizer: Tokenizer) -> Path:
    save_model(model, tiny_tokenizer, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def gpt2_folder(tmp_path: Path, tiny_tokenizer: Tokenizer) -> Path:
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    save_model(GPT2LMHeadModel(config), tiny_tokenizer, tmp_path / "gpt2")
    return tmp_path / "gpt2"


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# ── reading ─────────────────────────────────────────────────────────────────────────────────────────


def test_pretrained_weights_come_back_bitwise_whatever_the_seed(folder: Path, model: LlamaForCausalLM):
    assert same_weights(load(folder, seed=0).model, model)
    assert same_weights(load(folder, seed=1).model, model)


@pytest.mark.parametrize(("dtype", "expected"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_dtype_is_that_of_every_parameter(folder: Path, dtype: str, expected: torch.dtype):
    assert {parameter.dtype for parameter in load(folder, dtype=dtype).model.parameters()} == {expected}


def test_random_weights_follow_from_the_seed_alone(folder: Path, model: LlamaForCausalLM):
    (folder / "model.safetensors").unlink()  # a configuration and a tokenizer are enough
    before = torch.random.get_rng_state()
    first = load(folder, init="random", seed=3).model
    torch.rand(5)
    again = load(folder, init="random", seed=3).model
    other = load(folder, init="random", seed=4).model
    assert same_weights(first, again)
    assert not same_weights(first, other)
    assert not same_weights(first, model)
    torch.random.set_rng_state(before)
    load(folder, init="random", seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_dropout_is_zero_so_training_mode_gives_the_numbers_of_evaluation_mode(gpt2_folder: Path):
    ids = torch.arange(24).view(2, 12)
    plain = AutoModelForCausalLM.from_pretrained(gpt2_folder)
    expected = plain.eval()(ids).logits
    assert not torch.equal(plain.train()(ids).logits, expected)  # GPT-2's configuration asks for dropout
    model = load(gpt2_folder).model
    assert not model.training
    assert torch.equal(model.train()(ids).logits, expected)
    assert (model.config.resid_pdrop, model.config.attn_pdrop, model.config.embd_pdrop) == (0.0, 0.0, 0.0)


def test_a_dropout_that_no_configuration_names_is_zero_too(folder: Path, monkeypatch: pytest.MonkeyPatch):
    class NoisyConfig(LlamaConfig):
        model_type = "noisy_llama"

    class NoisyLlama(LlamaForCausalLM):
        config_class = NoisyConfig

        def __init__(self, config: NoisyConfig) -> None:
            super().__init__(config)
            self.model.norm = nn.Sequential(self.model.norm, nn.Dropout(0.5))

    monkeypatch.setitem(CONFIG_MAPPING._extra_content, "noisy_llama", NoisyConfig)
    monkeypatch.setitem(MODEL_FOR_CAUSAL_LM_MAPPING._extra_content, NoisyConfig, NoisyLlama)
    edit(folder / "config.json", model_type="noisy_llama")
    model, ids = load(folder, init="random").model, torch.arange(24).view(2, 12)
    expected = model(ids).logits
    assert torch.equal(model.train()(ids).logits, expected)
    model.model.norm[1].p = 0.5
    assert not torch.equal(model(ids).logits, expected)


def test_auto_is_the_cpu_where_there_is_no_cuda_and_cuda_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert load(folder, device="auto").model.device.type == "cpu"
    with pytest.raises(ModelError, match=r"model\.device is cuda.*no CUDA device"):
        load(folder, device="cuda")


def test_pad_token_falls_back_to_the_end_token(folder: Path):
    assert load(folder).tokenizer.pad_token == "<|pad|>"
    edit(folder / "tokenizer_config.json", pad_token=None)
    assert load(folder).tokenizer.pad_token == "<|endoftext|>"
    edit(folder / "tokenizer_config.json", eos_token=None)
    with pytest.raises(ModelError, match=r"neither a pad token nor an end-of-text token"):
        load(folder)


def test_nothing_is_printed_and_the_settings_of_transformers_stay(
    folder: Path,
    model: LlamaForCausalLM,
    tiny_tokenizer: Tokenizer,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
):
    edit(folder / "config.json", bos_token_id=5000)  # Transformers talks about this one
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    load(folder)
    load(folder, init="random")
    save_model(model, tiny_tokenizer, folder.parent / "other")
    with quiet_transformers():
        warnings.warn("about to change", FutureWarning, stacklevel=1)
    assert capfd.readouterr() == ("", "")
    assert caplog.text == ""
    assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == before
    edit(folder / "config.json", bos_token_id=5001)  # it says each thing once
    AutoModelForCausalLM.from_pretrained(folder)
    assert "Loading weights" in capfd.readouterr().err  # what a plain load shows
    assert "bos_token_id" in caplog.text


# ── what is refused ─────────────────────────────────────────────────────────────────────────────────


def truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def drop_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def reshape_the_model(folder: Path) -> None:
    edit(folder / "config.json", intermediate_size=80)


def become(config: BertConfig) -> Callable[[Path], None]:
    return lambda folder: config.save_pretrained(folder)


def shrink_the_embeddings(folder: Path) -> None:
    edit(folder / "config.json", vocab_size=100)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:100].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "config of no type": (lambda f: (f / "config.json").write_text("{}"), "configuration of .*model_type"),
    "unknown type": (lambda f: edit(f / "config.json", model_type="zebra"), "configuration of .*zebra"),
    "wrong value": (lambda f: edit(f / "config.json", hidden_size="x"), "configuration of .*hidden_size"),
    "no such pad token": (lambda f: edit(f / "config.json", pad_token_id=999), "weights of .*padding_idx"),
    "BERT": (become(BertConfig()), "of type bert, which is not a causal language model"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "weights of .* cannot be read"),
    "truncated weights": (truncate, "weights of .* cannot be read"),
    "missing tensor": (drop_a_tensor, r"1 tensors are missing .* model\.layers\.1\.mlp\.up_proj\.weight"),
    "another shape": (reshape_the_model, r"6 have another shape, such as model\.layers\.0\.mlp\.down_proj"),
    "tokenizer not JSON": (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer of .* cannot be read"),
    "small embedding": (shrink_the_embeddings, r"token ids up to \d+, and its model has 100 embeddings"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_refused_with_its_name_and_the_reason(folder: Path, case: str):
    load(folder)
    damage, words = BROKEN[case]
    damage(folder)
    with pytest.raises(ModelError, match=f"(?si){words}") as caught:
        load(folder)
    assert str(folder) in str(caught.value)
    assert caught.value.remedy


@pytest.mark.parametrize("name", ["/no/such/folder", "./no-such-folder", "runs/of/mine", "~/no-such-folder"])
def test_a_folder_that_is_not_there_is_refused_without_asking_the_hub(name: str):
    with pytest.raises(ModelError, match=f"There is no model folder {name}"):
        load(name)


def test_a_misspelt_folder_beside_others_is_not_taken_for_an_id(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder.parents[1])
    parent = folder.parent.name
    assert load(f"{parent}/model")
    with pytest.raises(ModelError, match="That path does not exist"):
        load(f"{parent}/modle")


def test_a_file_is_no_model_folder(folder: Path):
    with pytest.raises(ModelError, match="That path is a file"):
        load(folder / "config.json")


def test_an_id_that_the_hub_does_not_serve_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # the hub's own offline mode
    with pytest.raises(ModelError, match=r"(?s)nobody/no-such-model cannot be read.*hub did not serve"):
        load("nobody/no-such-model")


def test_a_near_name_is_that_of_a_model_and_a_folder_that_cannot_be_read_hides_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def said() -> str:
        with pytest.raises(ModelError, match="tiny-lama cannot be read") as caught:
            load("tiny-lama")
        return caught.value.remedy

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny-lama.yaml").touch()
    (tmp_path / "tiny-lamb").mkdir()
    assert "Did you mean" not in said()
    (tmp_path / "tiny-llama").mkdir()
    (tmp_path / "tiny-llama" / "config.json").touch()
    assert "Did you mean tiny-llama?" in said()
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert did_you_mean(Path("tiny-lama")) == did_you_mean(Path("tiny-lama"), among="*/config.json") == ""


# ── writing ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_replica_is_saved_and_loaded_again_bitwise(
    tmp_path: Path, tiny_tokenizer: Tokenizer, folder: Path, *, tied: bool, dtype: str
):
    edit(folder / "config.json", tie_word_embeddings=tied)
    loaded = load(folder, init="random", dtype=dtype)
    blocks = partition_blocks(loaded.model, layers_per_block=1, include_embeddings=True, include_head=True)
    replica = Replica(loaded.model, blocks)
    save_model(loaded.model, loaded.tokenizer, tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.dtype == loaded.model.dtype
    assert again.config.tie_word_embeddings is tied
    assert same_weights(again, loaded.model)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "saved")) == len(tiny_tokenizer)
    sha = model_sha256(tmp_path / "saved")
    replica.buffer(1)[7] += 1
    assert not same_weights(again, loaded.model)
    save_model(loaded.model, loaded.tokenizer, tmp_path / "saved")  # replaces the earlier folder
    assert same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), loaded.model)
    assert model_sha256(tmp_path / "saved") != sha


def test_an_invalid_generation_config_does_not_stop_the_saving(
    tmp_path: Path, model: LlamaForCausalLM, tiny_tokenizer: Tokenizer
):
    model.generation_config.do_sample = False
    model.generation_config.temperature = 0.5
    with pytest.raises(ValueError, match="temperature"):
        model.save_pretrained(tmp_path / "plain")
    save_model(model, tiny_tokenizer, tmp_path / "saved")
    assert model.generation_config.temperature == 0.5  # the model itself is not changed
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").generation_config
    reloaded.validate(strict=True)
    assert reloaded.eos_token_id == model.generation_config.eos_token_id


def test_a_failed_save_leaves_the_earlier_folder_and_nothing_half_written(
    folder: Path, model: LlamaForCausalLM, tiny_tokenizer: Tokenizer
):
    before = model_sha256(folder)
    with torch.no_grad():
        model.model.norm.weight += 1
    with longest_file(10_000), pytest.raises(StorageError, match=f"cannot be written to {folder}"):
        save_model(model, tiny_tokenizer, folder)
    assert model_sha256(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    save_model(model, tiny_tokenizer, folder)
    assert model_sha256(folder) != before
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_name_taken_by_a_file_is_refused_and_the_file_stays(
    tmp_path: Path, model: LlamaForCausalLM, tiny_tokenizer: Tokenizer
):
    (tmp_path / "model").write_text("mine")
    with pytest.raises(StorageError, match="is a file"):
        save_model(model, tiny_tokenizer, tmp_path / "model")
    assert (tmp_path / "model").read_text() == "mine"
    with pytest.raises(StorageError):
        save_model(model, tiny_tokenizer, tmp_path / "model" / "below")


# ── model_sha256 ────────────────────────────────────────────────────────────────────────────────────


def test_sha_sees_names_dtypes_shapes_and_bytes_but_not_files(tmp_path: Path):
    def sha(*files: dict[str, torch.Tensor]) -> str:
        shutil.rmtree(tmp_path / "m", ignore_errors=True)
        (tmp_path / "m").mkdir()
        for number, tensors in enumerate(files):
            save_file(tensors, tmp_path / "m" / f"model-{number}.safetensors")
        return model_sha256(tmp_path / "m")

    a, b = torch.arange(6.0), torch.ones(2, 2)
    whole = sha({"a": a, "b": b})
    assert sha({"b": b}, {"a": a}) == whole
    different = [
        sha({"a": a, "c": b}),
        sha({"a": b, "b": a}),
        sha({"a": a.view(2, 3), "b": b}),
        sha({"a": a.view(torch.int32), "b": b}),
        sha({"a": torch.nextafter(a, a + 1), "b": b}),
        sha({"a": a}),
    ]
    assert len({whole, *different}) == 7


def test_sha_of_a_folder_without_readable_weights_is_refused(tmp_path: Path, folder: Path):
    with pytest.raises(ModelError, match=r"no \*\.safetensors"):
        model_sha256(tmp_path)
    truncate(folder)
    with pytest.raises(ModelError, match="cannot be read"):
        model_sha256(folder)


@pytest.mark.shared
def test_the_small_pretrained_model_is_read_and_written_with_the_same_sha(tmp_path: Path, shared_dir: Path):
    source = shared_dir / "models" / "tiny-base"
    loaded = load(source, dtype="bfloat16")
    save_model(loaded.model, loaded.tokenizer, tmp_path / "copy")
    assert model_sha256(tmp_path / "copy") == model_sha256(source)
    loaded = load(source, dtype="float32")
    save_model(loaded.model, loaded.tokenizer, tmp_path / "copy")
    assert model_sha256(tmp_path / "copy") != model_sha256(source)


def test_an_outline_has_the_shapes_of_the_model_and_no_memory(workshop: Workshop):
    outline = outline_model(str(workshop.model), dtype="bfloat16")
    assert all(parameter.is_meta for parameter in outline.parameters())
    assert outline.dtype == torch.bfloat16
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(workshop.model))
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert {name: parameter.shape for name, parameter in outline.named_parameters()} == shapes
    assert (
        FP32 * outline.num_parameters()
        == memory_per_client(model, partition_blocks(outline, layers_per_block=1), config_of())["full"].parameters
    )
