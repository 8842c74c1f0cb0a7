"""Loading of Hugging Face causal language models and their tokenizers.

Every fault of a model folder is an error that names the folder and the remedy. Messages of Transformers are hidden
from the user: the important ones (missing tensors, wrong shapes) are errors here. Tensors of the checkpoint that a
causal language model does not use are ignored.

Transformers may raise any class of exception for a damaged file. So every exception of its readers becomes a
ModelError with the reason.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jinja2 import TemplateSyntaxError
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from parablock.data.template_limits import bounded_rendering, check_template
from parablock.errors import ModelError, did_you_mean
from parablock.model.place import find_source
from parablock.model.source import (
    check_source,
    check_tensors,
    code_refused,
    has_adapter,
    open_source,
    read_kept_files,
)
from parablock.seeding import seed_for

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for block training, in evaluation mode with every dropout at zero, and its tokenizer.

    A missing pad token is replaced by the end-of-text token. `name_or_path` is as the user wrote it. `kept_files`
    are the files of the source that an export keeps, by name, and `notes` what the user should know of it.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name_or_path: str
    kept_files: Mapping[str, bytes] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


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
    source = find_source(name_or_path)
    with _quiet_source(source) as opened:
        check_source(source, weights=init == "pretrained")
        config = _read_config(source, opened)
        tokenizer = _read_tokenizer(source, opened)
        if init == "random":
            model = _make_random_model(source, config, DTYPES[dtype], seed)
        else:
            model = _read_pretrained_model(source, opened, config, DTYPES[dtype])
        kept_files = read_kept_files(source)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    _check_vocabulary(source, model, tokenizer)
    notes = (
        (f"{source}: the adapter in the folder (adapter_config.json) is not used",) if has_adapter(source) else ()
    )
    return LoadedModel(model.to(torch_device).eval(), tokenizer, name_or_path, kept_files, notes)


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """Read the tokenizer of a model alone; what cannot be trained is refused, but for its weights."""
    source = find_source(name_or_path)
    with _quiet_source(source) as opened:
        check_source(source, weights=False)
        return _read_tokenizer(source, opened)


def outline_model(name_or_path: str, *, dtype: str) -> PreTrainedModel:
    """Return a model on the `meta` device: its parameters have names, shapes and ties, but no memory.

    Raises:
        ModelError: The configuration cannot be read, or is not that of a causal language model.
    """
    source = find_source(name_or_path)
    with _quiet_source(source) as opened:
        check_source(source, weights=False)
        config = _read_config(source, opened)
        try:
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype], trust_remote_code=False)
        except Exception as error:
            raise _unreadable(source, "architecture", error) from error


@contextmanager
def _quiet_source(source: str) -> Iterator[str]:
    """Open a source, and hide messages while a model is read; see `open_source`."""
    with quiet_transformers(), open_source(source) as opened:
        yield opened


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


def _unreadable(source: str, part: str, error: Exception) -> ModelError:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    if "trust_remote_code" in str(error):  # an argument of Transformers, which is always off here
        return code_refused(source, f"Its {part}")
    if Path(source).is_dir() and not (Path(source) / "config.json").exists():
        return ModelError(
            f"{source} has no config.json",
            cause="It is no folder of a model, or the file is lost.",
            remedy="Put it back, such as from the base model or a copy, or give the folder of a model.",
        )
    if Path(source).is_dir():
        cause = f"A file in the folder is missing or damaged: {reason}"
        remedy = "Copy or download the model again, or give another model.name_or_path."
    else:
        cause = f"There is no folder {source} here, and the Hugging Face hub did not serve that id: {reason}"
        remedy = "Check the spelling, the network, and for a gated model the login; or give a local folder."
        remedy = f"{did_you_mean(Path(source), among='*/config.json')} {remedy}".strip()
    return ModelError(f"The {part} of {source} cannot be read", cause=cause, remedy=remedy)


def _read_config(source: str, opened: str) -> PreTrainedConfig:
    try:
        config = AutoConfig.from_pretrained(opened, trust_remote_code=False)
    except Exception as error:
        raise _unreadable(source, "configuration", error) from error
    is_encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING and getattr(config, "is_decoder", True) is False
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or is_encoder:
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
            setattr(config, key, type(value)(0))
        elif isinstance(value, PreTrainedConfig):
            _zero_dropout(value)


def _read_tokenizer(source: str, opened: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(opened, trust_remote_code=False)
    except Exception as error:
        raise _unreadable(source, "tokenizer", error) from error
    _check_template(source, tokenizer)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ModelError(
                f"The tokenizer of {source} has neither a pad token nor an end-of-text token",
                remedy="Set pad_token or eos_token in its tokenizer_config.json.",
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _check_template(source: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a chat template that cannot be read at all; what it makes of a conversation shows later."""
    if tokenizer.chat_template is None:
        return
    try:
        check_template(tokenizer.get_chat_template())
        with bounded_rendering("a probe"):
            tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    except ModelError:
        raise
    except TemplateSyntaxError as error:
        raise ModelError(
            f"The chat template of {source} is no template of Jinja: {error}, in line {error.lineno}",
            remedy="Correct chat_template.jinja, or chat_template in tokenizer_config.json.",
        ) from error
    except Exception:  # it wants another conversation
        return


def _make_random_model(source: str, config: PreTrainedConfig, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_for(seed, "model weights"))
            return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except Exception as error:
        raise _unreadable(source, "architecture", error) from error


def _read_pretrained_model(
    source: str, opened: str, config: PreTrainedConfig, dtype: torch.dtype
) -> PreTrainedModel:
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            opened,
            config=config,
            dtype=dtype,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            trust_remote_code=False,
        )
    except Exception as error:
        raise _unreadable(source, "weights", error) from error
    names = {name for name, _ in model.named_parameters()}
    check_tensors(source, names | {name.removeprefix(f"{model.base_model_prefix}.") for name in names})
    missing = sorted(report["missing_keys"])
    mismatched = sorted(str(entry[0]) for entry in report["mismatched_keys"])
    if missing or mismatched:
        raise ModelError(
            f"The weights of {source} do not fit its config.json: {len(missing)} tensors are missing"
            f" and {len(mismatched)} have another shape, such as {(missing + mismatched)[0]}",
            cause="The checkpoint is incomplete, has no language-model head, or config.json is another model's.",
            remedy="Get the whole checkpoint again; for new weights of this shape use model.init: random.",
        )
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ModelError(
                f"The weights of {source} hold numbers that are not finite, the first in {name}",
                cause="The checkpoint is of a training that diverged, or was cut to a format that is too narrow.",
                remedy="Take another checkpoint of this model.",
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
