"""Step time and peak memory of one block: against a loop written by hand, full fine-tuning, and LoRA of rank 16.

All take the same batches, the same loss at the same positions, clipping and AdamW. The hand-written loop is what
one would write for one block without this package: everything else frozen, forward, backward, clip, step. It is
checked to end with the same parameters. The time of a block is that of a whole visit (load it, make the optimizer,
K steps, read the result) divided by K, averaged over blocks from the first to the last. The four take turns, so
that a slow moment of the machine hits all, and are timed in seconds of the processor, which other processes disturb
least. Peak memory is that of a process of its own, forked with the model, as the operating system counts it;
gradients and optimizer state are also read off the tensors of a real step.

    .venv/bin/python benchmarks/step.py
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from _record import SHARED, Bar, make_console, make_parser, record, table
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from parablock.data.batches import Batch
from parablock.model.adapters import adapter_block, add_adapters
from parablock.model.blocks import partition_blocks
from parablock.model.load import DTYPES, load_model
from parablock.model.params import Replica
from parablock.training.local import LocalArguments, train_block

ARGUMENTS = LocalArguments(learning_rate=1e-4)
LORA_RANK = 16
WAYS = ("block", "by hand", "full", "lora")


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    console = make_console()
    rows = []
    for name, make in models(options):
        console.print(f"measuring {name} …")
        rows.append({"model": name} | measure(make(), options))
    show(console, rows)
    bars = []
    for row in rows:
        bars.append(Bar(f"block / loop by hand, {row['model']}", row["ratios"]["by hand"], 1.05))
        bars.append(Bar(f"block / full step, {row['model']}", row["ratios"]["full"], 0.65))
    record(options, rows, bars, config=None, console=console)


def parse_options() -> argparse.Namespace:
    parser = make_parser(
        "step",
        "Step time and peak memory of one block against a loop by hand, full fine-tuning and LoRA.",
        "--model ../shared/models/tiny-base --repeats 5",
    )
    default = str(SHARED / "models" / "tiny-base")
    parser.add_argument("--model", default=default, help="a model folder; left out when absent")
    parser.add_argument("--only", nargs="+", help="names of models; all when left out")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32", help="precision")
    parser.add_argument("--batch-size", type=int, default=8, help="examples of a step")
    parser.add_argument("--length", type=int, default=48, help="tokens of an example")
    parser.add_argument("--steps", type=int, default=4, help="local steps of a visit, K")
    parser.add_argument("--blocks", type=int, default=4, help="blocks that are visited, from the first to the last")
    parser.add_argument("--repeats", type=int, default=5, help="visits of each block")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    options = parser.parse_args()
    if options.smoke:
        options.batch_size, options.length, options.steps, options.repeats, options.blocks = 1, 8, 1, 1, 2
    return options


def models(options: argparse.Namespace) -> list[tuple[str, Callable[[], PreTrainedModel]]]:
    found: list[tuple[str, Callable[[], PreTrainedModel]]] = []
    if Path(options.model).is_dir():
        arguments = {"dtype": options.dtype, "device": "cpu", "init": "pretrained", "seed": 0}
        found.append((Path(options.model).name, lambda: load_model(options.model, **arguments).model))
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=2 if options.smoke else 12,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    name = f"llama-{config.num_hidden_layers}x512"
    found.append((name, lambda: AutoModelForCausalLM.from_config(config, dtype=DTYPES[options.dtype])))
    return [(name, make) for name, make in found if name in (options.only or [name])]


def measure(model: PreTrainedModel, options: argparse.Namespace) -> dict[str, Any]:
    batches = [make_batch(k, model.config.vocab_size, options) for k in range(options.steps)]
    adapted = copy.deepcopy(model)
    add_adapters(adapted, rank=LORA_RANK, alpha=2 * LORA_RANK, seed=0)
    replica, plain = Replica(copy.deepcopy(model), partition_blocks(model, layers_per_block=1)), model
    last = len(replica.blocks) - 1
    chosen = sorted({round(last * k / max(1, options.blocks - 1)) for k in range(options.blocks)})
    starts = {b: replica.read(b) for b in chosen}
    adapters = adapter_block(adapted).parameter_names
    everything = [name for name, _ in plain.named_parameters()]

    def visit(b: int) -> Tensor:
        steps = [[batch] for batch in batches]
        return train_block(
            replica, b, starts[b], steps, ARGUMENTS, first_step=0, total_steps=1, moments=None
        ).trained[:]

    def by_hand(b: int) -> None:
        train_by_hand(plain, replica.blocks[b].parameter_names, batches)

    ways: dict[str, Callable[[int], object]] = {
        "block": visit,
        "by hand": by_hand,
        "full": lambda _: train_by_hand(plain, everything, batches),
        "lora": lambda _: train_by_hand(adapted, adapters, batches),
    }
    peaks = {name: peak_bytes(way, chosen[0]) for name, way in ways.items()}  # first: nothing is left over yet
    by_hand(chosen[-1])
    found = torch.cat([plain.get_parameter(name).data.view(-1) for name in replica.blocks[last].parameter_names])
    same = torch.allclose(visit(chosen[-1]), found.float(), rtol=1e-4, atol=1e-6)
    used = {name: training_bytes(way, chosen[0]) for name, way in ways.items()}
    seconds = take_turns(ways, chosen, options)
    step_s = {name: statistics.fmean(map(statistics.median, of_way.values())) for name, of_way in seconds.items()}
    return {
        "num_blocks": last + 1,
        "blocks": chosen,
        "parameters": model.num_parameters(),
        "block_parameters": replica.blocks[0].num_parameters,
        "by_hand_ends_with_the_same_block": same,
        "step_s": step_s,
        "ratios": {name: ratio_to(seconds, name, chosen) for name in WAYS[1:]},
        "training_bytes": used,
        "peak_bytes_beside_the_model": peaks,
        "model_bytes": model.num_parameters() * model.dtype.itemsize,
        "samples_s": seconds,
    }


def train_by_hand(model: PreTrainedModel, names: Sequence[str], batches: list[Batch]) -> None:
    """Train some parameters of a model as one would by hand: the same loss, clipping and AdamW."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    trained = [model.get_parameter(name).requires_grad_(True) for name in names]
    optimizer = torch.optim.AdamW(trained, lr=ARGUMENTS.learning_rate, weight_decay=0.0, fused=True)
    model.train()
    for batch in batches:
        label_loss(model, batch).backward()
        nn.utils.clip_grad_norm_(trained, ARGUMENTS.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()


def label_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Give the mean loss, with logits only where a label is predicted."""
    next_BT = batch.labels_BT[:, 1:]
    predicts_BT = next_BT != -100
    hidden_BTD = model.get_decoder()(
        input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT, use_cache=False
    ).last_hidden_state
    logits_NV = model.get_output_embeddings()(hidden_BTD[:, :-1][predicts_BT])
    return cross_entropy(logits_NV.float(), next_BT[predicts_BT])


def take_turns(
    ways: dict[str, Callable[[int], object]], chosen: list[int], options: argparse.Namespace
) -> dict[str, dict[int, list[float]]]:
    """Time every way on every block `repeats` times, one after the other; all in seconds per step."""
    seconds: dict[str, dict[int, list[float]]] = {name: {b: [] for b in chosen} for name in ways}
    for repeat in range(options.repeats + 1):
        for b in chosen:
            for name, way in ways.items():
                if b != chosen[0] and name in ("full", "lora"):
                    continue  # they know no blocks
                began = time.process_time()
                way(b)
                if repeat or options.smoke:  # the first turn warms up
                    seconds[name][b].append((time.process_time() - began) / options.steps)
    return {name: {b: samples for b, samples in of_way.items() if samples} for name, of_way in seconds.items()}


def ratio_to(seconds: dict[str, dict[int, list[float]]], name: str, chosen: list[int]) -> float:
    """Give the time of a block step over that of another way, both in the same turn where they share blocks."""
    other = seconds[name]
    if len(other) == 1 and len(chosen) > 1:
        mean = statistics.fmean(statistics.median(seconds["block"][b]) for b in chosen)
        return mean / statistics.median(other[chosen[0]])
    return statistics.fmean(
        statistics.median(own / theirs for own, theirs in zip(seconds["block"][b], other[b], strict=True))
        for b in chosen
    )


def peak_bytes(way: Callable[[int], object], block_index: int) -> int:
    """Run in a forked process; give how much its resident memory grew at the most."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def child() -> None:
        ctypes.CDLL(None).malloc_trim(0)
        before = resident("VmRSS")
        way(block_index)
        sender.send(resident("VmHWM") - before)

    process = context.Process(target=child)
    process.start()
    grown: int = receiver.recv()
    process.join()
    return grown


def resident(key: str) -> int:
    """Read a figure of this process from the operating system, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) * 1024


def training_bytes(way: Callable[[int], object], block_index: int) -> dict[str, int]:
    """Run, and read off the tensors of its first optimizer step what training needs besides the model."""
    seen: list[dict[str, int]] = []

    def look(optimizer: torch.optim.Optimizer, *_: object) -> None:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        gradients = storage_bytes([weight.grad for weight in weights])
        moments = 2 * 4 * sum(weight.numel() for weight in weights)  # AdamW's two, fp32
        seen.append({"gradients": gradients, "optimizer_state": moments, "total": gradients + moments})

    hook = register_optimizer_step_pre_hook(look)
    way(block_index)
    hook.remove()
    return seen[0]


def storage_bytes(tensors: list[Tensor]) -> int:
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def make_batch(seed: int, vocabulary: int, options: argparse.Namespace) -> Batch:
    """Random tokens without padding, the first half of each row a prompt without labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (options.batch_size, options.length), generator=generator)
    labels = ids.clone()
    labels[:, : options.length // 2] = -100
    return Batch(ids, torch.ones_like(ids), labels)


def show(console: Console, rows: list[dict[str, Any]]) -> None:
    made = table("A step", "model", "", "ms", "block / this", "gradients, AdamW", "peak beside the model")
    for row in rows:
        for name in WAYS:
            made.add_row(
                row["model"] if name == WAYS[0] else "",
                name,
                f"{1e3 * row['step_s'][name]:.1f}",
                f"{row['ratios'][name]:.3f}" if name in row["ratios"] else "",
                f"{row['training_bytes'][name]['total'] / 2**20:.1f} MiB",
                f"{row['peak_bytes_beside_the_model'][name] / 2**20:.1f} MiB",
            )
        made.add_section()
    console.print(made)
    console.print(
        "Times of a block are means over blocks; its memory is that of the first block, where it is largest."
    )


if __name__ == "__main__":
    main()
