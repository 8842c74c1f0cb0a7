"""A job: a configuration with the model, the data and the partition that it names, read and checked."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from parablock import __version__
from parablock.config.keys import RunConfig
from parablock.data.histogram import count_examples, partition_histogram
from parablock.data.partition import partition_rows
from parablock.data.prompts import Example, Tokenized, tokenize_rows
from parablock.data.sources import Row, load_rows, rows_sha256
from parablock.errors import ConfigError, DataError
from parablock.experiment.fit_blocks import fitted, never_visited
from parablock.methods.base import RunInputs
from parablock.methods.blocks import trained_blocks
from parablock.model.blocks import Block
from parablock.model.load import LoadedModel, load_model
from parablock.model.save import base_sha256
from parablock.seeding import generator_for


def read_inputs(
    config: RunConfig, tell: Callable[[str], None] = lambda _: None, *, all_rows_of: int | None = None
) -> RunInputs:
    """Read and check all that a run needs.

    Args:
        config: The run.
        tell: Told what is being done, since a large model takes its time.
        all_rows_of: The client that all training rows belong to, at a site with rows of its own; nothing is
            held out there.

    Raises:
        InputError: For the first thing that is missing or wrong, before anything is written.
    """
    config = _resolved(config)
    torch.set_num_threads(config.engine.num_threads or 1)
    tell(f"reading {len(config.data.train) + len(config.data.test)} data sources")
    parts, held_out = _read_rows(config, all_rows_of)
    model = config.model
    tell(f"loading {model.name_or_path}")
    loaded = load_model(
        model.name_or_path, dtype=model.dtype, device=model.device, init=model.init, seed=config.seed
    )
    base_hash = base_sha256(loaded.model)  # before a method puts adapters into it
    num_parameters = loaded.model.num_parameters()
    asked, config = config.blocks.layers_per_block, fitted(config, loaded.model)
    blocks = _partition_model(config, loaded)
    tokenized = [_tokenize(config, loaded, rows) for rows in parts]
    scored = _tokenize(config, loaded, held_out)
    notes = [
        f"{loaded.name_or_path}: {num_parameters:,} parameters in {config.model.dtype}, "
        f"{len(blocks)} block{'s' * (len(blocks) != 1)}",
        *([f"blocks.layers_per_block: auto is {config.blocks.layers_per_block} here"] if asked == "auto" else []),
        *partition_histogram(parts, field=config.data.partition.field),
        *(
            f"client {i}: {part.summary()}"
            for i, part in enumerate(tokenized)
            if len(tokenized) <= 20 or part.skipped
        ),
        f"test: {scored.summary()}",
        *_skipped_rows(tokenized),
        *_frozen_noise(config, loaded, blocks),
    ]
    manifest = {
        "data_sha256": {"train": [rows_sha256(rows) for rows in parts], "test": rows_sha256(held_out)},
        "base_sha256": base_hash,
        "blocks": [{"index": b.index, "name": b.name, "parameters": b.num_parameters} for b in blocks],
        "clients": count_examples([part.examples for part in tokenized], field=config.data.partition.field),
        "seed": config.seed,
        **_environment(),
    }
    return RunInputs(
        config=config,
        loaded=loaded,
        blocks=blocks,
        train=tuple(part.examples for part in tokenized),
        test=_sample(scored.examples, config),
        notes=tuple(notes),
        manifest=manifest,
    )


def _resolved(config: RunConfig) -> RunConfig:
    """Write down what depends on the machine, so that a resumed run does not."""
    cores = os.cpu_count() or 1
    share = config.engine.num_threads or max(1, cores // min(cores, config.federation.num_clients))
    data, model = config.data, config.model
    return config.model_copy(
        update={
            "engine": config.engine.model_copy(update={"num_threads": share}),
            "model": model.model_copy(update={"name_or_path": _absolute(model.name_or_path)}),
            "data": data.model_copy(
                update={"train": tuple(map(_absolute, data.train)), "test": tuple(map(_absolute, data.test))}
            ),
        }
    )


def _absolute(source: str) -> str:
    """Give the full path of a file or folder that is here; leave the name of anything else alone."""
    return str(Path(source).resolve()) if Path(source).exists() else source


def _read_rows(config: RunConfig, all_rows_of: int | None) -> tuple[list[tuple[Row, ...]], list[Row]]:
    """Read and split the rows; without test files, hold a part of each client's rows out."""
    data, federation = config.data, config.federation
    sources = [load_rows(source, split="train") for source in data.train]
    if all_rows_of is not None:
        rows = tuple(row for source in sources for row in source)
        return [rows if i == all_rows_of else () for i in range(federation.num_clients)], []
    held_out = [row for source in data.test for row in load_rows(source, split="test")]
    if not data.train:  # every site brings its own
        return [()] * federation.num_clients, held_out
    parts: list[tuple[Row, ...]] = list(
        partition_rows(
            sources,
            scheme=data.partition.scheme,
            num_clients=federation.num_clients,
            alpha=data.partition.alpha,
            field=data.partition.field,
            seed=config.seed,
        )
    )
    if held_out:
        return _joined(parts, config), held_out
    for client_id, rows in enumerate(parts):
        order = generator_for(config.seed, "held-out", client_id).permutation(len(rows))
        size = max(1, round(data.test_fraction * len(rows)))
        if size >= len(rows):
            raise DataError(
                f"client {client_id} has {len(rows)} row{'s' * (len(rows) != 1)}: none would be left to train on",
                cause="data.test is empty, so a part of each client's rows is held out.",
                remedy="Give data.test, or more rows, or fewer clients.",
            )
        out = set(order[:size].tolist())
        held_out.extend(row for k, row in enumerate(rows) if k in out)
        parts[client_id] = tuple(row for k, row in enumerate(rows) if k not in out)
    return _joined(parts, config), held_out


def _joined(parts: list[tuple[Row, ...]], config: RunConfig) -> list[tuple[Row, ...]]:
    """Put all rows into one client where the method pools data; what is held out stays the same."""
    if not config.federation.traits.pools_data:
        return parts
    return [tuple(row for part in parts for row in part)]


def _partition_model(config: RunConfig, loaded: LoadedModel) -> tuple[Block, ...]:
    section, federation = config.blocks, config.federation
    blocks = trained_blocks(loaded.model, config)
    never = never_visited(config, len(blocks))
    if never and not section.allow_unvisited:
        raise ConfigError(
            [
                f"federation.num_rounds: {federation.num_rounds} rounds of the {section.schedule} schedule would "
                f"never train {_names(blocks, never)} of {len(blocks)} blocks; give at least {len(blocks)} rounds, "
                "or larger blocks (blocks.layers_per_block), or accept it with blocks.allow_unvisited: true"
            ]
        )
    return blocks


def _names(blocks: Sequence[Block], indices: Sequence[int]) -> str:
    return ", ".join(f"block {b} ({blocks[b].name})" for b in indices)


def _tokenize(config: RunConfig, loaded: LoadedModel, rows: Sequence[Row]) -> Tokenized:
    if not rows:  # they are at another site
        return Tokenized((), (), config.data.format)
    return tokenize_rows(
        rows,
        loaded.tokenizer,
        data_format=config.data.format,
        max_length=config.data.max_length,
        completion_only_loss=config.train.completion_only_loss,
    )


def _skipped_rows(parts: Sequence[Tokenized]) -> list[str]:
    skipped = [entry for part in parts for entry in part.skipped]
    lines = [f"not trained on: {entry.row.place}: {entry.reason}" for entry in skipped[:5]]
    return lines + ([f"… and {len(skipped) - 5} more"] if len(skipped) > 5 else [])


def _frozen_noise(config: RunConfig, loaded: LoadedModel, blocks: Sequence[Block]) -> list[str]:
    """Warn of matrices that were drawn at random and that no block trains."""
    if config.model.init != "random":
        return []
    model = loaded.model
    trained = {id(model.get_parameter(name)) for block in blocks for name in block.parameter_names}
    ends = {"embeddings": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    frozen = {name: end.weight for name, end in ends.items() if end is not None and id(end.weight) not in trained}
    if not frozen:
        return []
    names = {id(weight): name for name, weight in reversed(frozen.items())}.values()  # tied ones are one
    return [
        f"warning: model.init is random, and the {' and the '.join(frozen)} are in no block, so they stay random; "
        f"set {' and '.join(f'blocks.include_{name}: true' for name in sorted(names))}"
    ]


def _sample(examples: tuple[Example, ...], config: RunConfig) -> tuple[Example, ...]:
    """Take the same `max_examples` test examples every time, from all of them alike."""
    most = config.evaluation.max_examples
    if len(examples) <= most:
        return examples
    drawn = generator_for(config.seed, "evaluation").choice(len(examples), size=most, replace=False)
    return tuple(examples[k] for k in sorted(drawn.tolist()))


def _environment() -> dict[str, Any]:
    packages = ("torch", "transformers", "datasets", "safetensors", "numpy")
    return {
        "parablock": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in packages},
        "machine": {
            "platform": platform.platform(),
            "cpu_count": os.cpu_count(),
            "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    }


def _commit() -> str | None:
    """Give the commit of the source tree that is running, where it is one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() if found.returncode == 0 else None
