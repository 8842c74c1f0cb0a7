"""Read a causal language model with its tokenizer.

Every way in which a model folder can be wrong is an error that names the folder and the remedy. Nothing
that Transformers prints on the way reaches the user: what matters of it (missing tensors, wrong shapes)
is an error here. Tensors of the checkpoint that a causal language model has no use for are left out.

What Transformers raises about a damaged file may be of any class, so any exception of one of its readers is
taken as the folder's fault and told with its reason.
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
from parablock.hub import cache_alone_without_network
from parablock.seeding import seed_for

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for block training.

    Attributes:
        model: A causal language model in evaluation mode, every dropout at zero.
        tokenizer: Its tokenizer; it has a pad token.
        name_or_path: Where they came from, as the user wrote it.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name_or_path: str


def load_model(name_or_path: str, *, dtype: str, device: str, init: str, seed: int) -> LoadedModel:
    """Read a causal language model and its tokenizer.

    A run is a deterministic function of its seed, so every dropout (and layer drop, and router jitter) is
    set to zero, in the configuration and in the modules: training mode and evaluation mode give the same
    numbers, and a saved model says so in its config.json.

    Args:
        name_or_path: A folder, or a Hugging Face id.
        dtype: Precision of the parameters, `float32` or `bfloat16`.
        device: `cpu`, `cuda`, or `auto` (cuda where there is one).
        init: `pretrained` reads the weights; `random` draws them on the CPU from `seed`, whatever the
            device, so that the folder needs a configuration and a tokenizer only.
        seed: The run's seed; it has no effect on pretrained weights.

    Returns:
        The model on its device, and its tokenizer, whose pad token is the end-of-text token where it
        had none.

    Raises:
        ModelError: For a folder or id that cannot be read, weights that do not fit the configuration, an
            architecture that is not a causal language model, a tokenizer that is missing, has no pad or
            end token or has more tokens than the model, or a device that is not there.
    """
    _one_of("dtype", dtype, tuple(DTYPES))
    _one_of("init", init, ("pretrained", "random"))
    torch_device = _device(device)
    source = find_source(name_or_path)
    with reading(source):
        config = read_config(source)
        tokenizer = _load_tokenizer(source)
        if init == "random":
            model = _random_model(source, config, DTYPES[dtype], seed)
        else:
            model = _pretrained_model(source, config, DTYPES[dtype])
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    _check_vocabulary(source, model, tokenizer)
    return LoadedModel(model.to(torch_device).eval(), tokenizer, name_or_path)


@contextmanager
def reading(source: str) -> Iterator[None]:
    """Be quiet while a model is read and, where it is no folder, do not wait for a hub out of reach."""
    with quiet_transformers(), nullcontext() if Path(source).is_dir() else cache_alone_without_network():
        yield


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep warnings and progress bars of Transformers away from the user while it reads or writes a model."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _one_of(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ModelError(f"model.{option} is {value!r}", remedy=f"Choose one of {', '.join(known)}.")


def _device(device: str) -> torch.device:
    _one_of("device", device, ("auto", "cpu", "cuda"))
    present = torch.cuda.is_available()
    if device == "cuda" and not present:
        raise ModelError(
            "model.device is cuda, and torch finds no CUDA device",
            cause="This machine has none, its driver is not loaded, or torch was installed without CUDA.",
            remedy="Use model.device: auto or cpu, or install a torch build for CUDA.",
        )
    return torch.device("cuda" if device != "cpu" and present else "cpu")


def find_source(name_or_path: str) -> str:
    """Tell where a model is: the folder itself, or a name to ask the hub for."""
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


def unreadable(source: str, part: str, error: Exception) -> ModelError:
    """Make the error for a part of a model that cannot be read."""
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    if Path(source).is_dir():
        cause = f"A file in the folder is missing or damaged: {reason}"
        remedy = "Copy or download the model again, or give another model.name_or_path."
    else:
        cause = f"There is no folder {source} here, and the Hugging Face hub did not serve that id: {reason}"
        remedy = "Check the spelling, the network, and for a gated model the login; or give a local folder."
    return ModelError(f"The {part} of {source} cannot be read", cause=cause, remedy=remedy)


def read_config(source: str) -> PreTrainedConfig:
    """Read the configuration of a causal language model."""
    try:
        config = AutoConfig.from_pretrained(source)
    except Exception as error:
        raise unreadable(source, "configuration", error) from error
    causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    if not causal or getattr(config, "is_decoder", True) is False:
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


def _load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:
        raise unreadable(source, "tokenizer", error) from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ModelError(
                f"The tokenizer of {source} has neither a pad token nor an end-of-text token",
                remedy="Set pad_token or eos_token in its tokenizer_config.json.",
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _random_model(source: str, config: PreTrainedConfig, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_for(seed, "model weights"))
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:
        raise unreadable(source, "architecture", error) from error


def _pretrained_model(source: str, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True
        )
    except Exception as error:
        raise unreadable(source, "weights", error) from error
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
            remedy="Use the tokenizer the model was trained with, or resize the embeddings and save it again.",
        )


def outline_model(name_or_path: str, *, dtype: str) -> PreTrainedModel:
    """Make a causal language model without values.

    Args:
        name_or_path: A folder that holds config.json, or a Hugging Face id.
        dtype: Precision of the parameters, `float32` or `bfloat16`.

    Returns:
        The model on the `meta` device: its parameters have names, shapes and ties, and no memory.

    Raises:
        ModelError: For a folder or id whose configuration cannot be read, or is not that of a causal
            language model.
    """
    source = find_source(name_or_path)
    with reading(source):
        config = read_config(source)
        try:
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])
        except Exception as error:
            raise unreadable(source, "architecture", error) from error
