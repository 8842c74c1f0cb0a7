"""Where a model is: a folder here, or an id on the hub. Nothing slow is imported for that."""

from __future__ import annotations

from pathlib import Path

from parablock.errors import ModelError, check_enterable, did_you_mean, reading


def find_source(name_or_path: str, *, given_as: str = "model.name_or_path") -> str:
    """Return the source of a model: the path of a folder, or an id on the hub.

    Args:
        name_or_path: What the user gave.
        given_as: The key or option that it was given as; "" for an argument, which may also be a run.

    Raises:
        ModelError: It is a path, and no folder is there that this user may read.
    """
    with reading(name_or_path, ModelError):
        return _find_source(name_or_path, given_as)


def _find_source(name_or_path: str, given_as: str) -> str:
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        check_enterable(name_or_path, path, ModelError)
        return str(path)
    is_path = path.is_absolute() or name_or_path[:1] in ".~" or name_or_path.count("/") > 1
    beside_others = "/" in name_or_path and path.parent.is_dir()
    if not (is_path or beside_others or path.exists()):
        return name_or_path
    if path.suffix == ".gguf" and path.exists():
        raise gguf_refused(name_or_path, path.name)
    form = "a folder that holds config.json, or a Hugging Face id"
    wanted = f"Give {form}, as {given_as}." if given_as else f"Give a run directory, {form}."
    missing = f"There is no model folder {name_or_path}"
    raise ModelError(
        missing if given_as else f"There is no run or model folder {name_or_path}",
        cause="That path is a file." if path.exists() else "That path does not exist.",
        remedy=wanted if path.exists() else f"{did_you_mean(path)} {wanted}".strip(),
    )


def gguf_refused(source: str, name: str) -> ModelError:
    """Return the error of a model in GGUF, of the file `name`."""
    return ModelError(
        f"{source} holds a model for inference ({name}), in GGUF",
        cause="GGUF is what llama.cpp reads; most such files are quantised, and none can be trained here.",
        remedy="Take the model that it was made from: a folder with config.json and *.safetensors.",
    )
