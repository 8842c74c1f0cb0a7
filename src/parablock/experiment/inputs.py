"""The inputs of a run: rows, the base model and its blocks, tokens, and notes on them for the user."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from parablock import __version__
from parablock.config.data_section import DataSection
from parablock.config.keys import ModelSection, RunConfig, TrainSection
from parablock.config.load import flatten
from parablock.data.formats import check_rows, formats_by_source
from parablock.data.histogram import count_examples
from parablock.data.partition import partition_rows
from parablock.data.prompts import NothingToLearnError, Tokenized, tokenize_rows
from parablock.data.sources import Row, absolute, describe_ignored, load_files, rows_sha256
from parablock.errors import ConfigError, DataError
from parablock.evaluation.scoring import sample_examples
from parablock.experiment.data_notes import describe_data, describe_skipped, settle_template, warn_of_repeats
from parablock.experiment.fit_blocks import fit_blocks, never_visited
from parablock.methods.base import RunInputs
from parablock.methods.trained_blocks import check_adapters, trained_blocks
from parablock.model.blocks import Block
from parablock.model.positions import check_length
from parablock.model.pretrained import LoadedModel, load_model
from parablock.model.save import base_parts, base_sha256
from parablock.printable import counted
from parablock.seeding import generator_for


@dataclass(frozen=True)
class BaseModel:
    """The base model of a run, with hashes of its parts, and the number of its weights."""

    loaded: LoadedModel
    parts: Mapping[str, str]
    num_parameters: int

    @property
    def sha256(self) -> str:
        """The hash of all of it."""
        return base_sha256(self.parts)


def read_inputs(
    config: RunConfig,
    tell: Callable[[str], None] = lambda _: None,
    *,
    all_rows_of: int | None = None,
    check_base: Callable[[BaseModel], None] = lambda _: None,
) -> RunInputs:
    """Read and check the inputs of a run; the first missing or wrong one raises an InputError.

    Args:
        config: The run.
        tell: Called with a line of text before each step that can take long.
        all_rows_of: At a site with rows of its own, the client that has all of them; nothing is held out there.
        check_base: Called with the base model, before anything is made of it.
    """
    given, config = config, _resolve(config)
    torch.set_num_threads(config.engine.num_threads or 1)
    tell(f"reading {counted(len(config.data.train) + len(config.data.test), 'data source')}")
    parts, held_out, _ = read_rows(
        config.data,
        num_clients=config.federation.num_clients,
        seed=config.seed,
        pooled=config.federation.traits.pools_data,
        all_rows_of=all_rows_of,
    )
    tell(f"loading {config.model.name_or_path}")
    check_adapters(config)
    base = load_base(config.model, seed=config.seed)
    check_base(base)
    is_auto = config.blocks.layers_per_block == "auto"
    has_template = base.loaded.tokenizer.chat_template is not None
    day, template_notes = settle_template(
        base.loaded.tokenizer, [*_joined(parts), *held_out], config.data.format, config.data.date
    )
    config = config.model_copy(update={"data": config.data.model_copy(update={"date": day})})
    length_notes = check_length(base.loaded.model, config.data.max_length)
    config, blocks = cut_model(config, base.loaded.model)
    tell(f"tokenizing {counted(sum(map(len, parts)) + len(held_out), 'row')}")
    *train, test = _tokenize_parts((*parts, held_out), base.loaded.tokenizer, config)
    return RunInputs(
        config=config,
        loaded=base.loaded,
        blocks=blocks,
        train=tuple(part.examples for part in train),
        test=sample_examples(test.examples, config.evaluation.max_examples, config.seed),
        notes=(
            *describe_model(base, config.model, blocks),
            *_describe_experts(base.loaded.model, config),
            *([f"blocks.layers_per_block: auto is {config.blocks.layers_per_block} here"] if is_auto else []),
            *base.loaded.notes,
            *length_notes,
            *template_notes,
            *(line for source in config.data.train for line in describe_ignored(source, split="train")),
            *(line for source in config.data.test for line in describe_ignored(source, split="test")),
            *describe_data(parts, train, test, config.data),
            *warn_of_repeats(held_out, _joined(parts), config.data.format),
            *_warn_of_random_ends(base.loaded.model, config.model, blocks),
        ),
        left_out=tuple(describe_skipped(train)),
        manifest={
            "data_sha256": {"train": [rows_sha256(rows) for rows in parts], "test": rows_sha256(held_out)},
            "data_formats": _formats([*_joined(parts), *held_out], config.data.format),
            "base_has_chat_template": has_template,
            "base_sha256": base.sha256,
            "base_parts": base.parts,
            "blocks": [{"index": b.index, "name": b.name, "parameters": b.num_parameters} for b in blocks],
            "clients": count_examples([part.examples for part in train], field=config.data.partition.field),
            "seed": config.seed,
            "chosen_settings": _chosen(given, config),
            **_environment(),
        },
    )


def _resolve(config: RunConfig) -> RunConfig:
    """Write this machine's defaults into the configuration, so that a resumed run does not depend on its own."""
    cores = os.cpu_count() or 1
    share = config.engine.num_threads or max(1, cores // min(cores, config.federation.num_clients))
    data, model = config.data, config.model
    return config.model_copy(
        update={
            "engine": config.engine.model_copy(update={"num_threads": share}),
            "model": model.model_copy(update={"name_or_path": _absolute(model.name_or_path)}),
            "data": data.model_copy(
                update={"train": tuple(map(absolute, data.train)), "test": tuple(map(absolute, data.test))}
            ),
        }
    )


def _chosen(given: RunConfig, config: RunConfig) -> list[str]:
    """Return the keys that were left open, and that this run has filled in."""
    before = flatten(given.model_dump(mode="json"))
    after = flatten(config.model_dump(mode="json"))
    return [key for key, value in after.items() if before.get(key) in (None, "auto") and value != before.get(key)]


def _absolute(source: str) -> str:
    """Return the full path of a file or folder that is here, and any other name as it is."""
    return str(Path(source).resolve()) if Path(source).exists() else source


def read_rows(
    data: DataSection, *, num_clients: int, seed: int, pooled: bool = False, all_rows_of: int | None = None
) -> tuple[list[tuple[Row, ...]], list[Row], list[int]]:
    """Return the training rows of each client, the test rows, and whose each of these was.

    By default the test rows are a part of each client's rows; those of files of their own were nobody's.

    Args:
        data: The sources and their partition.
        num_clients: Number of clients.
        seed: The run's seed.
        pooled: Whether one client has all rows after the partition; the rows that are held out stay the same.
        all_rows_of: See `read_inputs`.
    """
    sources = [rows for source in data.train for rows in _checked(source, "train", data)]
    if all_rows_of is not None:
        return [_joined(sources) if i == all_rows_of else () for i in range(num_clients)], [], []
    held_out = [row for source in data.test for rows in _checked(source, "test", data) for row in rows]
    if not data.train:  # every site brings its own
        return [()] * num_clients, held_out, []
    partition = data.partition.model_dump()
    parts = list(partition_rows(sources, num_clients=num_clients, seed=seed, **partition))
    owners: list[int] = []
    if not held_out:
        parts, drawn = _hold_out(parts, data.test_fraction, seed)
        held_out = list(_joined(drawn))
        owners = [client_id for client_id, rows in enumerate(drawn) for _ in rows]
    return [_joined(parts)] if pooled else parts, held_out, owners


def _checked(source: str, split: str, data: DataSection) -> list[list[Row]]:
    """Return the rows of each file of a source; the first row that is wrong, in the file's order, is an error."""
    return load_files(source, split=split, columns=data.columns, check=partial(check_rows, data_format=data.format))


def _joined(parts: Sequence[Sequence[Row]]) -> tuple[Row, ...]:
    return tuple(row for part in parts for row in part)


def _hold_out(
    parts: Sequence[tuple[Row, ...]], fraction: float, seed: int
) -> tuple[list[tuple[Row, ...]], list[list[Row]]]:
    """Draw a part of each client's rows; return each client's rest, and its drawn rows."""
    kept, held_out = list[tuple[Row, ...]](), list[list[Row]]()
    for client_id, rows in enumerate(parts):
        order = generator_for(seed, "held-out", client_id).permutation(len(rows))
        size = max(1, round(fraction * len(rows)))
        if size >= len(rows):
            raise DataError(
                f"client {client_id} has {counted(len(rows), 'row')}: none would be left to train on",
                cause="data.test is empty, so a part of each client's rows is held out.",
                remedy="Give data.test, or more rows, or fewer clients.",
            )
        drawn = set(order[:size].tolist())
        held_out.append([row for k, row in enumerate(rows) if k in drawn])
        kept.append(tuple(row for k, row in enumerate(rows) if k not in drawn))
    return kept, held_out


def load_base(model: ModelSection, *, seed: int) -> BaseModel:
    """Load the base model, and hash it before a method puts adapters into it."""
    loaded = load_model(model.name_or_path, dtype=model.dtype, device=model.device, init=model.init, seed=seed)
    return BaseModel(loaded, base_parts(loaded.model, loaded.tokenizer), loaded.model.num_parameters())


def cut_model(config: RunConfig, model: PreTrainedModel) -> tuple[RunConfig, tuple[Block, ...]]:
    """Return the configuration with a number for `layers_per_block`, and the blocks that the method trains.

    Args:
        config: The whole run, since `layers_per_block: auto` weighs a block's exchange against its training.
        model: The model; methods of adapters put them into it.

    Raises:
        ConfigError: The rounds would never train some block, or every block is always in flight beside a server
            optimizer, whose moments no client foresees.
    """
    config = fit_blocks(config, model)
    blocks = trained_blocks(model, config)
    optimizer, delay = config.federation.server_optimizer.name, config.federation.delay
    if optimizer != "none" and config.federation.traits.trains == "blocks" and delay >= len(blocks):
        raise ConfigError(
            [
                f"federation.server_optimizer: {optimizer} would add its moments to blocks that are always in "
                f"flight, as there are {len(blocks)} of them and federation.delay is {delay}; leave it out, or "
                "make smaller blocks (blocks.layers_per_block)"
            ]
        )
    never = never_visited(config, len(blocks))
    if never and not config.blocks.allow_unvisited:
        names = ", ".join(f"block {b} ({blocks[b].name})" for b in never)
        or_else = ", or larger blocks (blocks.layers_per_block), or accept it with blocks.allow_unvisited: true"
        raise ConfigError(
            [
                f"federation.num_rounds: {config.federation.num_rounds} rounds of the {config.schedule} "
                f"schedule would never train {names} of {len(blocks)} blocks; give at least {len(blocks)} rounds"
                f"{or_else if config.federation.traits.trains == 'blocks' else ''}"
            ]
        )
    return config, blocks


def tokenize(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, data: DataSection, train: TrainSection
) -> Tokenized:
    """Tokenize rows; the rows of another site are empty here, and so are their tokens."""
    if not rows:
        return Tokenized((), (), data.format)
    return tokenize_rows(
        rows,
        tokenizer,
        data_format=data.format,
        max_length=data.max_length,
        completion_only_loss=train.completion_only_loss,
        date=data.date,
    )


def _formats(rows: Sequence[Row], data_format: str) -> list[str]:
    """Return the formats of all rows; of rows that are elsewhere, the configured one, if there is one."""
    return sorted(set(formats_by_source(rows, data_format).values()) or {data_format} - {"auto"})


def _tokenize_parts(
    parts: Sequence[Sequence[Row]], tokenizer: PreTrainedTokenizerBase, config: RunConfig
) -> list[Tokenized]:
    """Tokenize the rows of each client, and those of the test."""
    tokenized = []
    for index, rows in enumerate(parts):
        try:
            tokenized.append(tokenize(rows, tokenizer, config.data, config.train))
        except NothingToLearnError as error:
            whose = f"client {index}" if index < len(parts) - 1 else "the test rows"
            raise DataError(f"{whose}: {error.what}", remedy=error.remedy) from error
        except DataError:  # name the first wrong row of its file, whichever client has it
            in_order = sorted(_joined(parts), key=lambda row: (row.source, row.line))
            tokenize(in_order, tokenizer, config.data, config.train)
            raise
    return tokenized


def describe_model(base: BaseModel, model: ModelSection, blocks: Sequence[Block]) -> list[str]:
    """Describe the model in one line."""
    size = f"{base.num_parameters:,} parameters in {model.dtype}"
    trained = f", {len(blocks)} blocks" if len(blocks) > 1 else ""
    return [f"{base.loaded.name_or_path}: {size}{trained}"]


_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""What families call the number of their experts."""


def _describe_experts(model: PreTrainedModel, config: RunConfig) -> list[str]:
    """Say what is trained of a mixture of experts."""
    counts = [getattr(model.config, name, None) or 0 for name in _EXPERTS]
    if max(counts) < 2:
        return []
    if config.federation.traits.trains == "adapters":
        trained = (
            "adapters are on linear maps alone, so experts and routers that are no such modules stay as they are"
        )
    else:
        trained = "experts and routers are trained with the layers that they are in"
    return [f"a mixture of {max(counts)} experts: {trained}; no loss that balances the experts is added"]


def _warn_of_random_ends(model: PreTrainedModel, section: ModelSection, blocks: Sequence[Block]) -> list[str]:
    """Warn that no block trains embeddings or a head that were drawn at random."""
    if section.init != "random":
        return []
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
    """Return the commit of the running source tree; None if it is no repository."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() if found.returncode == 0 else None
