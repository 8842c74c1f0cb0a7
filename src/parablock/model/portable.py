"""What an export says of itself: the base's own files, in words that Transformers 4 and 5 both know.

The two releases differ in the names of a few fields. An export has both, so that neither falls back to a default
without a word: Transformers 4 takes a rotary base of 10,000 where it finds no `rope_theta`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DTYPE_NAMES = ("float32", "float16", "bfloat16")

_OWN_FIELDS = ("architectures", "model_type", "vocab_size")
"""Fields of config.json in which the exported model knows better than the base."""
_DROPPED_FIELDS = ("auto_map", "_name_or_path")
"""Code and places of the base, which an export does not have."""
_NEW_CLASSES = ("TokenizersBackend",)
"""Classes of tokenizers that Transformers 4 does not have; it reads the same file with the class below."""
_KNOWN_CLASS = "PreTrainedTokenizerFast"
_NEOX_NAMES = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}


def base_dtype(kept_files: Mapping[str, bytes]) -> str | None:
    """Return the precision that a base names in its config.json; None if it names none."""
    config = _json(kept_files.get("config.json", b"{}"))
    named = config.get("dtype") or config.get("torch_dtype")
    return named if named in DTYPE_NAMES else None


def make_portable(folder: Path, kept_files: Mapping[str, bytes], *, dtype: str) -> None:
    """Complete the files of a saved model: those of the base, and fields for either release of Transformers.

    Args:
        folder: The saved model.
        kept_files: Files of the base, by name; empty without a base.
        dtype: The precision of the saved weights.
    """
    config = _json((folder / "config.json").read_bytes())
    for name, content in kept_files.items():
        if name not in ("config.json", "generation_config.json"):
            (folder / name).write_bytes(content)
    config = _with_fields_of(config, _json(kept_files.get("config.json", b"{}")))
    config |= {"dtype": dtype, "torch_dtype": dtype}
    config.setdefault("tie_word_embeddings", False)
    for name, value in _rope_fields(config).items():
        config.setdefault(name, value)
    _write(folder / "config.json", config)
    if (folder / "tokenizer_config.json").exists():
        _write(folder / "tokenizer_config.json", _tokenizer_fields(folder / "tokenizer_config.json"))
    follow_umask(folder)


def follow_umask(folder: Path) -> None:
    """Give the files of a new folder the mode of this umask, where some libraries write for one user alone."""
    mode = folder.stat().st_mode & 0o666  # as `mkdir` has made it, under this umask
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def _with_fields_of(config: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """Add the fields of the base's config.json; its values stay, except where the export knows better."""
    if base.get("model_type") != config.get("model_type"):
        return config  # such as the text model of one that also sees
    merged = config | base | {name: config[name] for name in _OWN_FIELDS if name in config}
    return {name: value for name, value in merged.items() if name not in _DROPPED_FIELDS}


def _rope_fields(config: dict[str, Any]) -> dict[str, Any]:
    """Return what Transformers 4 reads in place of `rope_parameters`."""
    given = config.get("rope_parameters")
    if not isinstance(given, dict):
        return {}
    nested = "rope_theta" not in given and "rope_type" not in given
    whole = given.get("full_attention") if nested else given
    if not isinstance(whole, dict):
        return {}
    fields = {name: whole[name] for name in ("rope_theta", "partial_rotary_factor") if name in whole}
    if config.get("model_type") == "gpt_neox":
        fields |= {_NEOX_NAMES[name]: value for name, value in fields.items()}
    scaling = {name: value for name, value in whole.items() if name not in ("rope_theta", "partial_rotary_factor")}
    if scaling.get("rope_type", "default") != "default":
        fields["rope_scaling"] = scaling
    sliding = given.get("sliding_attention") if nested else None
    if isinstance(sliding, dict) and "rope_theta" in sliding:
        fields["rope_local_base_freq"] = sliding["rope_theta"]
    return fields


def _tokenizer_fields(path: Path) -> dict[str, Any]:
    fields = _json(path.read_bytes())
    if fields.get("tokenizer_class", _NEW_CLASSES[0]) in _NEW_CLASSES and (path.parent / "tokenizer.json").exists():
        fields["tokenizer_class"] = _KNOWN_CLASS
    if isinstance(fields.get("extra_special_tokens"), list):  # Transformers 4 has a list under the other name only
        fields.setdefault("additional_special_tokens", fields.pop("extra_special_tokens"))
    return fields


def _json(content: bytes) -> dict[str, Any]:
    found = json.loads(content)
    return found if isinstance(found, dict) else {}


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
