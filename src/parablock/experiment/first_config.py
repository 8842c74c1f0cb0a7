"""`parablock init`: a configuration with comments, from a model and files of text."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from string import Template

import torch
import yaml

from parablock.config.load import parse_config
from parablock.data.prompts import tokenize_rows
from parablock.data.sources import load_rows
from parablock.errors import ConfigError, StorageError
from parablock.model.blocks import find_layers
from parablock.model.pretrained import load_tokenizer, outline_model
from parablock.storage.files import storage, write_atomically

SMALL_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""A model that a CPU can tune; its licence is Apache-2.0."""

MAX_LENGTH, LENGTH_STEP = 512, 32
VISITS = 2
"""Rounds of each block; a first run is to end soon, and shows whether more are worth it."""

FIRST_CONFIG = Template("""\
# Made by `parablock init`. docs/configuration.md has every key and its default; these are the ones to look at.
#
#   parablock plan $path
#   parablock run $path --output-dir runs/first
#   parablock chat runs/first
model:
  name_or_path: $model  # a folder, or an id of Hugging Face
  device: auto  # cuda where there is one, else cpu
data:
  train: $files
  test_fraction: 0.1  # this part of each client's rows is held out, and scored
  max_length: $max_length  # $length_note
  partition:
    scheme: $scheme  # $scheme_note
federation:
  num_clients: $clients
  num_rounds: $rounds  # $rounds_note
  delay: 1  # 1: ParaBlock, updates travel while the next block is trained; 0: FL-BCD, without overlap
blocks:
  layers_per_block: $layers_per_block  # of the model's $layers
train:
  num_local_steps: $steps  # optimizer steps of a client in a round
  per_device_train_batch_size: $batch
  learning_rate: $learning_rate  # several times higher or lower is worth a try
# How slow the links are, in 10^6 bit/s. Without this section they are unlimited, and there is nothing to hide.
# link:
#   upload_mbps: 50
#   download_mbps: 100
# A simulation of many machines on this one, in simulated time:
# engine:
#   clock: virtual
evaluation:
  every_rounds: $every  # rounds between scores on the held-out rows
checkpoint:
  every_rounds: $every  # `parablock resume runs/first` goes on from the newest one
seed: 0
""")


def write_first_config(model: str, files: Sequence[str], path: Path, *, clients: int | None = None) -> list[str]:
    """Write a configuration for a first run, sized for this machine, and return what was found, in lines of text.

    Several files are a client each; the rows of one file are dealt out.

    Args:
        model: A Hugging Face folder or id.
        files: Files of rows, or `datasets` names.
        path: The file to write.
        clients: Number of clients; None: one for each file, or two.

    Raises:
        InputError: The model or a file cannot be read, or `path` exists.
    """
    if path.exists():
        raise StorageError(f"{path} exists", remedy="Give another name with --output, or remove it.")
    by_file = len(files) > 1 and clients in (None, len(files))
    count = len(files) if by_file else clients or 2
    tokenizer, found, lengths = load_tokenizer(model), [], list[int]()
    for file in files:
        rows = load_rows(file, split="train")
        tokenized = tokenize_rows(
            rows, tokenizer, data_format="auto", max_length=sys.maxsize, completion_only_loss=True
        )
        lengths += [len(example.input_ids) for example in tokenized.examples]
        found.append(f"{file}: {len(rows)} rows, {tokenized.summary()}")
        if by_file and len(rows) < 2:
            raise ConfigError(
                [f"{file} has one row; a client needs one to train on and one to score"], source="init"
            )
    outline = outline_model(model, dtype="float32")
    _, layers = find_layers(outline, None)
    has_gpu = torch.cuda.is_available()
    size = 1 if has_gpu else -(-len(layers) // 10)  # a CPU gets ten blocks at most
    blocks = -(-len(layers) // size)
    fitting = -(-max(lengths) // LENGTH_STEP) * LENGTH_STEP
    max_length = min(fitting, MAX_LENGTH, _positions(outline.config))
    cut = sum(length > max_length for length in lengths)
    text = FIRST_CONFIG.substitute(
        path=path,
        model=_quoted(model),
        files=f"[{', '.join(map(_quoted, files))}]",
        max_length=max_length,
        length_note=f"tokens; your longest row has {max(lengths):,}"
        + (f", and {cut} of {len(lengths)} rows are cut at the end" if cut else ""),
        scheme="by_file" if by_file else "iid",
        scheme_note="one client of each file" if by_file else "rows are dealt out; dirichlet and by_field differ",
        clients=count,
        rounds=VISITS * blocks,
        rounds_note=f"each of the {blocks} blocks {VISITS} times; more rounds learn more",
        layers_per_block=size,
        layers=f"{len(layers)} layers" + ("" if has_gpu else "; few large blocks suit a CPU"),
        steps=8 if has_gpu else 4,
        batch=8 if has_gpu else 4,
        learning_rate="0.0003",
        every=max(1, blocks // 2),
    )
    parse_config(yaml.safe_load(text), source=str(path))
    with storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)
    return [*found, f"{model}: {outline.num_parameters():,} parameters, {len(layers)} layers"]


def _quoted(name: str) -> str:
    """Return a name as YAML reads it, quoted where it has to be."""
    plain = name.replace("/", "").replace(".", "").replace("-", "").replace("_", "")
    return (
        name
        if plain.isascii() and plain.isalnum() and not plain.isdigit()
        else json.dumps(name, ensure_ascii=False)
    )


def _positions(config: object) -> int:
    return int(getattr(config, "max_position_embeddings", None) or MAX_LENGTH)
