"""The folder or hub id of a model: what is in it, what cannot be trained, and what an export has to keep.

What keeps a model from being trained has its own sentence here: weights that are quantised, code of its own, an
adapter without its model, GGUF, pointers of Git LFS, an architecture that is newer than the library.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from transformers import CONFIG_MAPPING
from transformers.modeling_utils import load_state_dict

from parablock.errors import ModelError, reading
from parablock.hub import use_cache_when_offline
from parablock.model.place import gguf_refused
from parablock.printable import as_argument

LICENCES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt")
KEPT_FILES = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model"),
    *("spiece.model", "sentencepiece.bpe.model", "tiktoken.model", "chat_template.jinja", "chat_template.json"),
    *LICENCES,
)
"""Files of a model that its export keeps, beside the weights."""

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_POINTER = b"version https://git-lfs.github.com/spec/"
_QUANTISED = ("quantization_config", "compression_config", "quantization")
"""Keys of config.json that say how weights were quantised; the last is that of MLX."""


def check_source(source: str, *, weights: bool) -> None:
    """Refuse what cannot be trained, in words of its own; what is merely damaged is left to the readers.

    Args:
        source: A folder, or an id on the hub.
        weights: Whether its weights are to be read.

    Raises:
        ModelError: It is an adapter, quantised, of an unknown architecture, or has no weights that can be read.
    """
    folder = Path(source)
    if folder.is_dir():
        _check_files(source, folder, weights=weights)
    config = read_json(source, "config.json")
    for section in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in _QUANTISED:
            if isinstance(found := section.get(key), dict):
                raise _quantised(source, found.get("quant_method", "by an unnamed method"))
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type not in CONFIG_MAPPING:
        if config.get("auto_map"):
            raise code_refused(source, f"Its type {model_type}")
        written = config.get("transformers_version")
        raise ModelError(
            f"The configuration of {source} is of the type {model_type}, which Transformers "
            f"{transformers.__version__} does not know",
            cause=f"It was written by version {written}." if written else "The type is misspelt, or newer.",
            remedy="Install a newer one (pip install -U transformers), or give another model.name_or_path.",
        )


def check_tensors(source: str, parameters: Collection[str]) -> None:
    """Refuse weights of integers or of 8 bits and less, which Transformers would read as if they were the numbers.

    Args:
        source: A folder, or an id on the hub that was fetched.
        parameters: Names of the model's parameters; other tensors of integers are masks and positions.

    Raises:
        ModelError: Some parameter is kept in such numbers.
    """
    for name, number in _number_types(source):
        last = name.rpartition(".")[2]
        is_named = (last.startswith("weight") or last.endswith("weight")) and number != torch.bool
        is_weight = is_named or name in parameters
        is_narrow = number.is_floating_point and number.itemsize < 2
        if is_narrow or (is_weight and not number.is_floating_point):
            raise _quantised(source, f"{name} is of type {str(number).removeprefix('torch.')}")


def code_refused(source: str, what: str) -> ModelError:
    """Return the error of a model that needs code of its own; `what` is what Transformers does not know."""
    maps = [read_json(source, name).get("auto_map") for name in ("config.json", "tokenizer_config.json")]
    named = [value for each in maps if isinstance(each, dict) for value in each.values()]
    classes = [name for value in named for name in (value if isinstance(value, list) else [value]) if name]
    files = sorted({f"{str(name).rpartition('--')[2].partition('.')[0]}.py" for name in classes})
    return ModelError(
        f"{source} brings code of its own ({', '.join(files) or 'not named'}), which is not run here",
        cause=f"{what} is unknown to Transformers {transformers.__version__}, and such code "
        "could do anything on this machine and on every site.",
        remedy="Take a model whose architecture is part of Transformers, and its tokenizer too.",
    )


def read_json(source: str, name: str) -> dict[str, Any]:
    """Return the content of a JSON file of a source; empty if it is missing or damaged."""
    found = _find_file(source, name)
    with suppress(OSError, ValueError, RecursionError):
        content = json.loads(found.read_bytes()) if found else {}
        return content if isinstance(content, dict) else {}
    return {}


def read_kept_files(source: str) -> dict[str, bytes]:
    """Return the files that an export keeps, by name."""
    found = {name: _find_file(source, name) for name in KEPT_FILES}
    return {name: path.read_bytes() for name, path in found.items() if path is not None}


@contextmanager
def open_source(source: str) -> Iterator[str]:
    """Yield what Transformers is to read: the source, but without an adapter that was left in a model folder.

    Transformers would put such an adapter into the model without a word. A source of the hub is read from the cache
    while the hub is out of reach.
    """
    folder = Path(source)
    if not folder.is_dir():
        with use_cache_when_offline():
            yield source
        return
    if not has_adapter(source):
        with nullcontext():
            yield source
        return
    with tempfile.TemporaryDirectory() as name:
        for path in folder.iterdir():
            if not path.name.startswith("adapter_"):
                (Path(name) / path.name).symlink_to(path.resolve())
        yield name


def has_adapter(source: str) -> bool:
    """Return whether an adapter lies in a folder."""
    return (Path(source) / "adapter_config.json").exists()


def _check_files(source: str, folder: Path, *, weights: bool) -> None:
    files = [path for pattern in _WEIGHTS for path in folder.glob(pattern) if not path.name.startswith("adapter_")]
    if has_adapter(source) and not ((folder / "config.json").exists() and files):
        base = read_json(source, "adapter_config.json").get("base_model_name_or_path") or "its base model"
        raise ModelError(
            f"{source} holds an adapter, and not the model that it belongs to",
            cause=f"Its adapter_config.json names {base}.",
            remedy="Merge them with peft: PeftModel.from_pretrained(base, adapter).merge_and_unload(), and save.",
        )
    gguf = sorted(folder.glob("*.gguf"))
    if gguf and not files:
        raise gguf_refused(source, gguf[0].name)
    for path in (*map(folder.joinpath, KEPT_FILES), *folder.glob("*.index.json"), *(files if weights else ())):
        if path.is_file() and _is_pointer(path):
            raise ModelError(
                f"{path} is a pointer of Git LFS, and not the file itself",
                cause="The repository was cloned without its large files.",
                remedy=f"Fetch them: git -C {as_argument(source)} lfs pull",
            )


def _is_pointer(path: Path) -> bool:
    with reading(path, ModelError), path.open("rb") as file:
        return file.read(len(_POINTER)) == _POINTER


def _quantised(source: str, how: str) -> ModelError:
    return ModelError(
        f"The weights of {source} are quantised ({how})",
        cause="Numbers of few bits have no gradients: blocks of them cannot be trained, averaged or sent.",
        remedy="Take the model that it was made from, in bfloat16 or float32.",
    )


def _number_types(source: str) -> Iterator[tuple[str, torch.dtype]]:
    """Yield the name and the type of number of each tensor of the weights that Transformers reads."""
    for whole in ("model.safetensors", "pytorch_model.bin"):
        parts = read_json(source, f"{whole}.index.json").get("weight_map", {}).values()
        names = [whole] if _find_file(source, whole) else sorted(set(parts))
        for name in names:
            if path := _find_file(source, name):
                try:
                    tensors = load_state_dict(path, map_location="meta")
                except ValueError as error:  # a type of number that Transformers does not know
                    raise _quantised(source, str(error)) from error
                yield from ((key, each.dtype) for key, each in tensors.items() if isinstance(each, torch.Tensor))
        if names:
            return


def _find_file(source: str, name: str) -> Path | None:
    """Return a file of a folder, or of a model in the hub's cache."""
    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.is_file() else None
    with suppress(ValueError):  # a name that cannot be one of the hub
        cached = try_to_load_from_cache(source, name)
        return Path(cached) if isinstance(cached, str) else None
    return None
