"""Exports of a finished run: its model as a folder or in GGUF, an adapter, or what was changed."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from parablock.config.load import load_config
from parablock.errors import ModelError, StorageError
from parablock.evaluation.side_by_side import changed_weights, models_of
from parablock.model.gguf_file import GgufDtype, write_gguf
from parablock.model.portable import follow_umask
from parablock.model.pretrained import load_model, load_tokenizer, outline_model, quiet_transformers
from parablock.model.source import LICENCES
from parablock.storage.files import NEW_FOLDER, check_absent, write_folder_beside
from parablock.storage.run_directory import RunDirectory

GGUF_NAME = "model.gguf"
DEFAULT_RANK = 16
"""Rank of an adapter that is fitted to a run without adapters."""
_EXTRA_DIRECTIONS = 8  # of the search for the largest ones, as in Halko et al., 2011


@dataclass(frozen=True)
class Pair:
    """The base model and the tuned one of a run, in float32 on the CPU."""

    base: PreTrainedModel
    tuned: PreTrainedModel
    base_name: str

    def changes(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the name of each parameter that the run has changed, and its difference."""
        before = dict(self.base.named_parameters())
        for name, parameter in self.tuned.named_parameters():
            difference = (parameter - before[name]).detach()
            if difference.any():
                yield name, difference


def export_run(
    run_dir: str,
    output_dir: Path,
    *,
    export_format: str,
    rank: int | None = None,
    dtype: GgufDtype | None = None,
    tell: Callable[[str], None],
) -> list[str]:
    """Write a finished run's model in another form, and read back what was written.

    Args:
        run_dir: The run.
        output_dir: A folder that is not there yet.
        export_format: hf | gguf | adapter | delta.
        rank: Of the adapter; None: that of the run's own adapters, or `DEFAULT_RANK`.
        dtype: Of the matrices of a GGUF file; None: that of the model's folder.
        tell: Called with messages about the progress.

    Returns:
        Notes for the user.

    Raises:
        InputError: The run is not finished, the folder is there, or the model does not fit the format.
    """
    directory = RunDirectory(run_dir)
    directory.check_holds_run()
    models = {label: name for label, name, _ in models_of(run_dir)}
    check_absent(output_dir, NEW_FOLDER)
    tell("reading the tuned model")
    is_as_written = _check_weights(str(run_dir))
    with write_folder_beside(output_dir, replaces=False) as folder:
        if export_format == "hf":
            if not is_as_written:  # nothing says what the weights were: they can be read at least
                load_model(str(directory.model), dtype="float32", device="cpu", init="pretrained", seed=0)
            outline_model(str(directory.model), dtype="float32")
            load_tokenizer(str(directory.model))
            _copy_model(directory.model, folder)
            return []
        if export_format == "gguf":
            return _write_gguf(models["tuned"], folder, directory.path.resolve().name, dtype, tell)
        if "base" not in models:
            raise ModelError(
                f"the run in {run_dir} has no base model to compare with",
                cause="Its weights were drawn at random (model.init: random).",
                remedy="Export the whole model: --format hf",
            )
        tell("reading the base model and the tuned one")
        base, tuned = (
            load_model(models[label], dtype="float32", device="cpu", init="pretrained", seed=0).model
            for label in ("base", "tuned")
        )
        pair = Pair(base, tuned, models["base"])
        if export_format == "delta":
            return _write_delta(pair, folder)
        config = load_config(directory.config)
        own = config.lora.rank if config.federation.traits.trains == "adapters" else DEFAULT_RANK
        notes = _write_adapter(pair, folder, _rank_of(pair.base, rank, own), tell)
        if all(torch.equal(value, value.bfloat16().float()) for value in tuned.parameters()):
            note = "the model is written in bfloat16, and its rounding is a part of the change that no rank holds"
            is_new = config.model.dtype == "float32" and config.federation.traits.trains == "adapters"
            notes.append(note + "; the adapters that were trained had it neither" * is_new)
        return notes


def _check_weights(run_dir: str) -> bool:
    """Refuse a model that is not the one that the run has written; return whether it is known to be."""
    if said := changed_weights(run_dir):
        raise ModelError(
            said,
            cause="A file was changed or damaged since.",
            remedy="Put the files back from a copy, or run it again.",
        )
    return said is not None


def _copy_model(model: Path, folder: Path) -> None:
    """Copy the files of a model, and compare them with the copies."""
    for path in _files_of(model):
        copy = folder / path.relative_to(model)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
        if not filecmp.cmp(path, copy, shallow=False):
            raise StorageError(
                f"the copy of {path} is another file",
                cause="The disk has not kept what was written to it.",
                remedy="Give an --output-dir on another disk.",
            )


def _files_of(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder, those of linked folders too, but of none that leads back.

    Raises:
        OSError: A folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise error

    for place, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        above = Path(place).resolve()
        folders[:] = [name for name in folders if not above.is_relative_to(Path(place, name).resolve())]
        yield from (Path(place, name) for name in sorted(names))


def _rank_of(base: PreTrainedModel, asked: int | None, own: int) -> int:
    """Return the rank of an adapter: the one that is asked for, or the run's own as far as matrices have one."""
    most = max(min(module.get_parameter("weight").shape) for module in _matrices_of(base).values())
    if asked is not None and asked > most:
        raise ModelError(
            f"an adapter of rank {asked} is asked for, and no matrix of the model has a rank above {most}",
            remedy=f"Give a --rank of at most {most}; the whole model is --format hf.",
        )
    return asked or min(own, most)


def _matrices_of(base: PreTrainedModel) -> dict[str, nn.Linear | Conv1D]:
    """Return the matrices that an adapter can have, by the names of their modules."""
    head = base.get_output_embeddings()
    return {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }


def _write_gguf(
    model: str, folder: Path, name: str, dtype: GgufDtype | None, tell: Callable[[str], None]
) -> list[str]:
    tell("writing the file, and reading it back")
    loaded = load_model(model, dtype="float32", device="cpu", init="pretrained", seed=0)
    written = write_gguf(loaded, folder / GGUF_NAME, name=name, dtype=dtype)
    for licence in LICENCES:
        if licence in loaded.kept_files:
            (folder / licence).write_bytes(loaded.kept_files[licence])
    follow_umask(folder)
    return [f"matrices in {written}; Transformers reads it back as the same model"]


def _write_delta(pair: Pair, folder: Path) -> list[str]:
    """Write the difference of every parameter that changed, in float32."""
    changes = dict(pair.changes())
    path = folder / "delta.safetensors"
    save_file({name: change.contiguous() for name, change in changes.items()}, path)
    read = load_file(path)
    different = [
        name for name, change in changes.items() if name not in read or not torch.equal(read[name], change)
    ]
    if different:
        raise StorageError(
            f"{path.name} does not read back as it was written: {different[0]} differs",
            cause="The disk has not kept what was written to it.",
            remedy="Give an --output-dir on another disk.",
        )
    facts = {"base_model_name_or_path": pair.base_name, "meaning": "tuned - base, float32"}
    (folder / "delta.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    follow_umask(folder)
    return [f"{len(changes)} of {len(list(pair.base.parameters()))} tensors changed"]


def _write_adapter(pair: Pair, folder: Path, rank: int, tell: Callable[[str], None]) -> list[str]:
    """Write the nearest adapter of a rank, and read it back with peft."""
    try:
        from peft import LoraConfig
    except ImportError:
        raise ModelError(
            "an adapter needs the package peft, which is not installed",
            remedy="Install it: pip install 'parablock[lora]'",
        ) from None
    matrices = _matrices_of(pair.base)
    tensors, modules, others = dict[str, Tensor](), list[str](), list[str]()
    kept, total = 0.0, 0.0
    for name, change in pair.changes():
        module = name.removesuffix(".weight")
        if module not in matrices:
            others.append(name)
            continue
        tell(f"fitting an adapter of rank {rank} to {module}")
        wide = change.T if isinstance(matrices[module], Conv1D) else change  # out × in
        b, a = _nearest(wide, rank)
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
        modules.append(module)
        total += float(wide.square().sum())
        kept += float(wide.square().sum() - (wide - b @ a).square().sum())
    if not modules:
        raise ModelError(
            "the run changed no matrix that an adapter could hold", remedy="Export it with --format hf."
        )
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=modules,
        fan_in_fan_out=any(isinstance(matrices[module], Conv1D) for module in modules),
        task_type="CAUSAL_LM",
        base_model_name_or_path=pair.base_name,
        inference_mode=True,
    )
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(str(folder))
    follow_umask(folder)
    _read_adapter(pair.base, folder, tensors)
    notes = [f"rank {rank} holds {kept / total:.1%} of the squared change of {len(modules)} matrices"]
    if others:
        notes.append(f"{len(others)} other tensors changed, which an adapter does not hold, such as {others[0]}")
    return notes


def _nearest(change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return B (out × rank) and A (rank × in), whose product is the nearest to a matrix, up to the search."""
    directions = min(rank + _EXTRA_DIRECTIONS, *change.shape)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        u, s, v = torch.svd_lowrank(change, q=directions, niter=4)
    root = torch.zeros(rank)
    root[: min(rank, directions)] = s[:rank].sqrt()
    b, a = torch.zeros(change.shape[0], rank), torch.zeros(rank, change.shape[1])
    found = min(rank, directions)
    b[:, :found], a[:found] = u[:, :found] * root[:found], (v[:, :found] * root[:found]).T
    return b.contiguous(), a.contiguous()


def _read_adapter(base: PreTrainedModel, folder: Path, tensors: dict[str, Tensor]) -> None:
    """Read an adapter as peft does, and compare it; the base is changed."""
    from peft import PeftModel

    with quiet_transformers():
        state: dict[str, Any] = PeftModel.from_pretrained(base, str(folder)).state_dict()
    for name, tensor in tensors.items():
        read = state.get(name.replace(".weight", ".default.weight"))
        if read is None or not torch.equal(read, tensor):
            raise ModelError(
                f"peft does not read the adapter back as it was written: {name} differs",
                remedy="Export the whole model: --format hf",
            )
