"""Loading of Hugging Face causal language models and their tokenizers.

Every fault of a model folder is an error that names the folder and the remedy. Messages of Transformers are hidden
from the user: the important ones (missing tensors, wrong shapes) are errors here. Tensors of the checkpoint that a
causal language model does not use are ignored.

Transformers may raise any class of exception for a damaged file. So every exception of its readers becomes a
ModelError with the reason.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from parablock.errors import ModelError
from parablock.hub import use_cache_when_offline
from parablock.seeding import seed_for

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for block training, in evaluation mode with every dropout at zero, and its tokenizer.

    A missing pad token is replaced by the end-of-text token. `name_or_path` is as the user wrote it.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name_or_path: str


def load_model(name_or_path: str, *, dtype: str, device: str, init: str, seed: int) -> LoadedModel:
    """Read a causal language model and its tokenizer.

    A run is a deterministic function of its seed. So every dropout, layer drop and router jitter is set to zero, in
    the configuration (and a saved config.json) and in the modules: training and evaluation mode compute the same.

    Args:
        name_or_path: A folder, or a Hugging Face id.
        dtype: Precision of the parameters, `float32` or `bfloat16`.
        device: `cpu`, `cuda`, or `auto` (cuda if available).
        init: `pretrained` reads the weights; `random` draws them from `seed`, always on the CPU, and needs only a
            configuration and a tokenizer in the folder.
        seed: The run's seed; it has no effect on pretrained weights.

    Raises:
        ModelError: The folder or id cannot be read, the weights do not fit the configuration, the architecture is
            not a causal language model, the tokenizer is missing, has no pad or end token or has more tokens than
            the model, or the device is missing.
    """
    _check_option("dtype", dtype, tuple(DTYPES))
    _check_option("init", init, ("pretrained", "random"))
    torch_device = _choose_device(device)
    source = _find_source(name_or_path)
    with _quiet_source(source):
        config = _read_config(source)
        tokenizer = _read_tokenizer(source)
        if init == "random":
            model = _make_random_model(source, config, DTYPES[dtype], seed)
        else:
            model = _read_pretrained_model(source, config, DTYPES[dtype])
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    _check_vocabulary(source, model, tokenizer)
    return LoadedModel(model.to(torch_device).eval(), tokenizer, name_or_path)


def outline_model(name_or_path: str, *, dtype: str) -> PreTrainedModel:
    """Return a model on the `meta` device: its parameters have names, shapes and ties, but no memory.

    Raises:
        ModelError: The configuration cannot be read, or is not that of a causal language model.
    """
    source = _find_source(name_or_path)
    with _quiet_source(source):
        config = _read_config(source)
        try:
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])
        except Exception as error:
            raise _unreadable(source, "architecture", error) from error


@contextmanager
def _quiet_source(source: str) -> Iterator[None]:
    """Hide messages while a model is read and, unless it is a folder, use the cache if the hub is out of reach."""
    with quiet_transformers(), nullcontext() if Path(source).is_dir() else use_cache_when_offline():
        yield


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide warnings and progress bars of Transformers while it reads or writes a model."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _check_option(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ModelError(f"model.{option} is {value!r}", remedy=f"Choose one of {', '.join(known)}.")


def _choose_device(device: str) -> torch.device:
    _check_option("device", device, ("auto", "cpu", "cuda"))
    present = torch.cuda.is_available()
    if device == "cuda" and not present:
        raise ModelError(
            "model.device is cuda, and torch finds no CUDA device",
            cause="This machine has none, its driver is not loaded, or torch was installed without CUDA.",
            remedy="Use model.device: auto or cpu, or install a torch build for CUDA.",
        )
    return torch.device("cuda" if device != "cpu" and present else "cpu")


def _find_source(name_or_path: str) -> str:
    """Return the source of a model: the path of a folder, or an id on the hub."""
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return str(path)
    is_path = path.is_absolute() or name_or_path[:1] in ".~" or name_or_path.count("/") > 1
    beside_others = "/" in name_or_path and path.parent.is_dir()
    if not (is_path or beside_others or path.exists()):
        return name_or_path
    raise ModelError(
        f"There is no model folder {name_or_path}",
        cause="That path is a file." if path.exists() else "That path does not exist.",
        remedy="Give a folder that holds config.json, or a Hugging Face id, as model.name_or_path.",
    )


def _unreadable(source: str, part: str, error: Exception) -> ModelError:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    if Path(source).is_dir():
        cause = f"A file in the folder is missing or damaged: {reason}"
        remedy = "Copy or download the model again, or give another model.name_or_path."
    else:
        cause = f"There is no folder {source} here, and the Hugging Face hub did not serve that id: {reason}"
        remedy = "Check the spelling, the network, and for a gated model the login; or give a local folder."
    return ModelError(f"The {part} of {source} cannot be read", cause=cause, remedy=remedy)


def _read_config(source: str) -> PreTrainedConfig:
    try:
        config = AutoConfig.from_pretrained(source)
    except Exception as error:
        raise _unreadable(source, "configuration", error) from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or getattr(config, "is_decoder", True) is False:
        raise ModelError(
            f"{source} is of type {config.model_type}, which is not a causal language model",
            cause="It is an encoder, an encoder-decoder, or no text model.",
            remedy="Choose a decoder-only model, such as Llama, Qwen, Mistral, Gemma, Phi, OLMo, GPT-2 or OPT.",
        )
    _zero_dropout(config)
    return config


def _zero_dropout(config: PreTrainedConfig) -> None:
    for key, value in list(vars(config).items()):
        random_when_training = "drop" in key or "jitter" in key
        if random_when_training and isinstance(value, int | float) and not isinstance(value, bool):
            setattr(config, key, 0.0)
        elif isinstance(value, PreTrainedConfig):
            _zero_dropout(value)


def _read_tokenizer(source: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:
        raise _unreadable(source, "tokenizer", error) from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ModelError(
                f"The tokenizer of {source} has neither a pad token nor an end-of-text token",
                remedy="Set pad_token or eos_token in its tokenizer_config.json.",
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _make_random_model(source: str, config: PreTrainedConfig, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_for(seed, "model weights"))
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:
        raise _unreadable(source, "architecture", error) from error


def _read_pretrained_model(source: str, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True
        )
    except Exception as error:
        raise _unreadable(source, "weights", error) from error
    missing = sorted(report["missing_keys"])
    mismatched = sorted(str(entry[0]) for entry in report["mismatched_keys"])
    if missing or mismatched:
        raise ModelError(
            f"The weights of {source} do not fit its config.json: {len(missing)} tensors are missing"
            f" and {len(mismatched)} have another shape, such as {(missing + mismatched)[0]}",
            cause="The checkpoint is incomplete, has no language-model head, or config.json is another model's.",
            remedy="Get the whole checkpoint again; for new weights of this shape use model.init: random.",
        )
    return model


def _check_vocabulary(source: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    highest = max(tokenizer.get_vocab().values())
    if highest >= rows:
        raise ModelError(
            f"The tokenizer of {source} has token ids up to {highest}, and its model has {rows} embeddings",
            cause="The tokenizer is another model's, or tokens were added without resizing the model.",
            remedy="Use the tokenizer of this model, or resize the embeddings and save the model again.",
        )
