"""`parablock init`: a configuration with comments, from a model and files of text."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import Literal

import torch
import yaml
from transformers import PreTrainedModel

from parablock.config.keys import RunConfig
from parablock.config.load import parse_config, read_yaml
from parablock.config.methods import RATES
from parablock.data.formats import check_rows
from parablock.data.prompts import tokenize_rows
from parablock.data.sources import absolute, load_rows
from parablock.errors import ConfigError, ModelError, StorageError
from parablock.experiment.data_notes import describe_unused
from parablock.experiment.fit_blocks import MIN_BLOCKS, VISITS
from parablock.methods.trained_blocks import trained_blocks
from parablock.model.blocks import find_layers
from parablock.model.pretrained import load_tokenizer, outline_model
from parablock.printable import as_argument, counted
from parablock.storage.files import NEW_NAME, check_absent, new_folders, storage, write_atomically

Trained = Literal["adapters", "blocks"]

SMALL_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""A model that a CPU can tune; its licence is Apache-2.0."""

MAX_LENGTH, LENGTH_STEP = 512, 32
SIZES = {"cpu": {"rounds": 20, "steps": 2, "batch": 2}, "cuda": {"rounds": 64, "steps": 8, "batch": 8}}
"""A first run is to end soon, with a small model within minutes on a CPU, and shows whether more is worth it."""
BITS_HELD, BITS_OF_A_TOKEN = 1, 1
"""What a parameter of an adapter holds, and what a token teaches, about.

Adapters that were full held 1.0 to 1.5 bits of random facts a parameter (`benchmarks/quality.py facts`); with far
more repetitions a model reaches 2 (Allen-Zhu, Li 2024, arXiv 2404.05405).
"""

FIRST_CONFIG = Template("""\
# Made by `parablock init`. docs/configuration.md has every key and its default; these are the ones to look at.
#
#   parablock plan $path
#   parablock run $path --output-dir runs/mine
#   parablock chat runs/mine
model:
  name_or_path: $model  # a folder, or an id of Hugging Face
  device: auto  # cuda where there is one, else cpu
data:
  train: $files
  test_fraction: 0.1  # this part of each client's rows is held out, and scored
  max_length: $max_length  # $length_note$columns
  partition:
    scheme: $scheme  # $scheme_note
federation:
  num_clients: $clients
  num_rounds: $rounds  # more rounds learn more
$method
train:
  num_local_steps: $steps  # optimizer steps of a client in a round
  per_device_train_batch_size: $batch
  optimizer_state: auto  # AdamW's moments are kept where every round trains all, and reset at each visit of a block
  # learning_rate: $learning_rate  # what the method has by itself; several times higher or lower is worth a try
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
  every_rounds: $every  # `parablock resume runs/mine` goes on from the newest one
seed: 0
""")
ADAPTERS = """\
  method: fedit  # adapters (LoRA): every round trains all layers, and sends little
  # for much data, or long further pre-training: `parablock init --trains blocks` has parablock, which trains all
  # parameters, a block of layers a round
  delay: 1  # 1: updates travel while the next round is computed; 0: without overlap
lora:
  rank: 8  # 16 or 64 hold more, and send as many times more"""
BLOCKS = Template("""\
  method: parablock  # all parameters, a block of layers a round; fedit: adapters, which send less and hold less
  delay: 1  # 1: ParaBlock, updates travel while the next block is trained; 0: FL-BCD, without overlap
blocks:
  layers_per_block: $layers_per_block  # of the model's $layers layers; each block is trained in $visits rounds""")


def write_first_config(
    model: str,
    files: Sequence[str],
    path: Path,
    *,
    clients: int | None = None,
    trains: Trained | None = None,
    columns: Mapping[str, str] | None = None,
) -> list[str]:
    """Write a configuration for a first run, sized for this machine, and return what was found, in lines of text.

    Several files are a client each; the rows of one file are dealt out.

    Args:
        model: A Hugging Face folder or id.
        files: Files of rows, or `datasets` names.
        path: The file to write.
        clients: Number of clients; None: one for each file, or two.
        trains: adapters | blocks; None: adapters, if they hold what there is to learn.
        columns: Fields of a format → columns of the files, as `data.columns`.

    Raises:
        InputError: The model or a file cannot be read or is named twice, `path` exists, or adapters lack their
            package.
    """
    if trains == "adapters" and find_spec("peft") is None:
        raise ModelError(
            "adapters need the package peft, which is not installed",
            remedy="Install it: pip install 'parablock[lora]', or give --trains blocks.",
        )
    check_absent(path, NEW_NAME)
    _check_distinct(files)
    if not str(path).isprintable():
        raise StorageError(
            f"the path {str(path)!r} has a line break or another character that no line of the file can hold",
            remedy="Give another --output.",
        )
    by_file = len(files) > 1 and clients in (None, len(files))
    count = len(files) if by_file else clients or 2
    tokenizer, found, lengths, num_rows, to_learn = load_tokenizer(model), [], list[int](), 0, 0
    for file in files:
        rows = load_rows(file, split="train", columns=columns, check=partial(check_rows, data_format="auto"))
        tokenized = tokenize_rows(
            rows, tokenizer, data_format="auto", max_length=sys.maxsize, completion_only_loss=True
        )
        num_rows += len(rows)
        lengths += [len(example.input_ids) for example in tokenized.examples]
        to_learn += sum(example.num_target_tokens for example in tokenized.examples)
        found.append(f"{file}: {counted(len(rows), 'row')}, {tokenized.summary()}")
        found += describe_unused([tokenized])
        if by_file and len(rows) < 2:
            raise ConfigError(
                [f"{file} has one row; a client needs one to train on and one to score"], source="init"
            )
    if not by_file and num_rows < 2 * count:
        problem = (
            f"{counted(num_rows, 'row')} {'is' if num_rows == 1 else 'are'} too few for {count} clients, each of "
            "which needs one to train on and one to score; give fewer --clients, or more rows"
        )
        raise ConfigError([problem], source="init")
    outline = outline_model(model, dtype="float32")
    _, layers = find_layers(outline, None)
    found.append(f"{model}: {outline.num_parameters():,} parameters, {len(layers)} layers")
    sizes = SIZES["cuda" if torch.cuda.is_available() else "cpu"]
    rounds = sizes["rounds"]
    fitting = -(-max(lengths) // LENGTH_STEP) * LENGTH_STEP
    max_length = min(fitting, MAX_LENGTH, _positions(outline.config))
    cut = sum(length > max_length for length in lengths)

    def configure(trains: Trained) -> tuple[str, RunConfig]:
        size = -(-len(layers) // min(len(layers), max(MIN_BLOCKS, rounds // VISITS)))
        blocks = -(-len(layers) // size)
        visits = f"{'about ' * bool(rounds % blocks)}{rounds / blocks:.0f}"
        sections = {
            "adapters": ADAPTERS,
            "blocks": BLOCKS.substitute(layers_per_block=size, layers=len(layers), visits=visits),
        }
        text = FIRST_CONFIG.substitute(
            path=as_argument(path),
            model=_quoted(model),
            files=f"[{', '.join(map(_quoted, files))}]",
            max_length=max_length,
            columns=f"\n  columns: {_in_quotes(dict(columns))}" if columns else "",
            length_note=f"tokens; your longest row has {max(lengths):,}"
            + (f", and {cut} of {len(lengths)} rows are cut at the end" if cut else ""),
            scheme="by_file" if by_file else "iid",
            scheme_note="one client of each file"
            if by_file
            else "rows are dealt out; dirichlet and by_field differ",
            clients=count,
            **sizes,
            method=sections[trains],
            learning_rate=RATES["adamw"][trains],
            every=rounds // 4,
        )
        return text, parse_config(read_yaml(text), source=str(path))

    if trains is None:
        trains, why = _suited(outline, configure("adapters")[1], to_learn)
        found.append(why)
    text, _ = configure(trains)
    with storage(path), new_folders(path.parent):
        write_atomically(path, text)
    return found


def _check_distinct(files: Sequence[str]) -> None:
    """Refuse a file that is named twice: what one client holds out, the other would train on."""
    known: dict[str, str] = {}
    for file in files:
        place = absolute(file)
        if place in known:
            both = file if known[place] == file else f"{known[place]} and {file}"
            problem = (
                f"{both}: the same file twice, and a client of each; name it once (--clients deals its rows out)"
            )
            raise ConfigError([problem], source="init")
        known[place] = file


def _suited(outline: PreTrainedModel, config: RunConfig, to_learn: int) -> tuple[Trained, str]:
    """Choose adapters if they hold so many tokens, and return the reason; the outline gets them."""
    if find_spec("peft") is None:
        return "blocks", "adapters need the package peft (pip install 'parablock[lora]'): blocks are configured"
    (adapters,) = trained_blocks(outline, config)
    told = (
        f"{to_learn:,} tokens to learn, about {BITS_OF_A_TOKEN} bit each; adapters of rank {config.lora.rank} have "
        f"{adapters.num_parameters:,} parameters, which hold about {BITS_HELD} bit each"
    )
    if to_learn * BITS_OF_A_TOKEN <= adapters.num_parameters * BITS_HELD:
        return "adapters", f"{told}: adapters are configured"
    return "blocks", f"{told}: blocks of all parameters are configured"


def _quoted(name: str) -> str:
    """Return a name as YAML reads it, quoted where it has to be, or where some reader takes it for a value."""
    plain = name.replace("/", "").replace(".", "").replace("-", "").replace("_", "")
    is_text = plain.isascii() and plain.isalnum() and not name[0].isdigit() and yaml.safe_load(name) == name
    return name if is_text else _in_quotes(name)


def _in_quotes(value: object) -> str:
    written: str = yaml.safe_dump(
        value, default_style='"', default_flow_style=True, allow_unicode=True, width=sys.maxsize
    )
    return written.strip()


def _positions(config: object) -> int:
    return int(getattr(config, "max_position_embeddings", None) or MAX_LENGTH)
