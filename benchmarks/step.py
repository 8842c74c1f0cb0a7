"""Step time and training memory of one block against full fine-tuning, in one process.

Both take the same batches, loss, clipping and AdamW (`BlockAdamW`, which for full fine-tuning holds the whole
model and is kept). The time of a block is that of a whole visit (load it, make the optimizer, K steps, read the
result) divided by K; it is averaged over all blocks. Visits and full steps take turns, so that a slow moment of
the machine hits both. The bytes are read off the tensors that a real optimizer step works on.

    .venv/bin/python benchmarks/step.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _record import SHARED, Bar, make_console, make_parser, record, table
from rich.console import Console
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from parablock.algorithm.adamw import BlockAdamW
from parablock.algorithm.local import LocalArguments, train_block
from parablock.data.batches import Batch
from parablock.model.blocks import Block, partition_blocks
from parablock.model.load import DTYPES, load_model
from parablock.model.loss import num_label_tokens, summed_loss
from parablock.model.params import Replica

BAR = 0.65
ARGUMENTS = LocalArguments(learning_rate=1e-4, total_steps=1_000_000)


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    console = make_console()
    rows = []
    for name, make in models(options):
        console.print(f"measuring {name} …")
        rows.append({"model": name} | measure(make, options))
    show(console, rows)
    bars = [Bar(f"step of a block / full step, {row['model']}", row["ratio"], BAR) for row in rows]
    record(options, rows, bars, config=None, console=console)


def parse_options() -> argparse.Namespace:
    parser = make_parser(
        "step",
        "Step time and training memory of one block against full fine-tuning.",
        "--model ../shared/models/tiny-base --repeats 5",
    )
    default = str(SHARED / "models" / "tiny-base")
    parser.add_argument("--model", default=default, help="a model folder; left out when absent")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32", help="precision")
    parser.add_argument("--batch-size", type=int, default=8, help="examples of a step")
    parser.add_argument("--length", type=int, default=48, help="tokens of an example")
    parser.add_argument("--steps", type=int, default=2, help="local steps of a visit, K")
    parser.add_argument("--repeats", type=int, default=3, help="visits of each block")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    options = parser.parse_args()
    if options.smoke:
        options.batch_size, options.length, options.steps, options.repeats = 1, 8, 1, 1
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
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    found.append(("llama-12x512", lambda: AutoModelForCausalLM.from_config(config, dtype=DTYPES[options.dtype])))
    return found


def measure(make: Callable[[], PreTrainedModel], options: argparse.Namespace) -> dict[str, Any]:
    model = make()
    batches = [make_batch(k, model.config.vocab_size, options) for k in range(options.steps)]
    replica = Replica(model, partition_blocks(model, layers_per_block=1))
    starts = [replica.read(block.index) for block in replica.blocks]

    def visit(block_index: int) -> None:
        step_batches = [[batch] for batch in batches]
        train_block(replica, block_index, starts[block_index], step_batches, ARGUMENTS, first_step=0, moments=None)

    whole = Replica(make(), [whole_model(model)])
    whole.activate(0)
    with full_optimizer(whole) as optimizer:

        def full_steps() -> None:
            for batch in batches:
                (label_loss(whole.model, batch) / num_label_tokens(batch.labels_BT)).backward()
                optimizer.step(ARGUMENTS.learning_rate)

        block_bytes = training_bytes(lambda: visit(0), replica)
        full_bytes = training_bytes(full_steps, whole)
        block_s, full_s = take_turns(visit, full_steps, len(replica.blocks), options)
    block_step_s = statistics.fmean(map(statistics.median, block_s))
    full_step_s = statistics.median(full_s)
    return {
        "num_blocks": len(replica.blocks),
        "parameters": model.num_parameters(),
        "block_parameters": replica.blocks[0].num_parameters,
        "full_step_s": full_step_s,
        "block_step_s": block_step_s,
        "ratio": block_step_s / full_step_s,
        "bar": BAR,
        "ratio_by_block": [statistics.median(samples) / full_step_s for samples in block_s],
        "full_bytes": full_bytes,
        "block_bytes": block_bytes,
        "full_step_s_samples": full_s,
        "block_step_s_samples": block_s,
    }


def take_turns(
    visit: Callable[[int], None], full_steps: Callable[[], None], num_blocks: int, options: argparse.Namespace
) -> tuple[list[list[float]], list[float]]:
    """Time every block `repeats` times, with full steps after every third visit; all in seconds per step."""
    block_s: list[list[float]] = [[] for _ in range(num_blocks)]
    full_s: list[float] = []
    for turn in range(options.repeats * num_blocks):
        block_index = turn % num_blocks
        block_s[block_index].append(timed(lambda: visit(block_index)) / options.steps)  # noqa: B023
        if turn % 3 == 0:
            full_s.append(timed(full_steps) / options.steps)
    return block_s, full_s


def timed(run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def training_bytes(run: Callable[[], None], replica: Replica) -> dict[str, int]:
    """Run, and read off the tensors of its first optimizer step what training needs besides the model."""
    seen: list[dict[str, int]] = []
    own = {parameter.untyped_storage().data_ptr() for parameter in replica.model.parameters()}

    def look(optimizer: torch.optim.Optimizer, *_: object) -> None:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        copies = [weight for weight in weights if weight.untyped_storage().data_ptr() not in own]
        state = [optimizer.state[weight][key] for weight in weights for key in ("exp_avg", "exp_avg_sq")]
        parts = {
            "gradients": storage_bytes([weight.grad for weight in weights]),
            "optimizer_state": storage_bytes(state),
            "fp32_copies": storage_bytes(copies),
        }
        seen.append(parts | {"total": sum(parts.values())})

    hook = register_optimizer_step_pre_hook(look)
    run()
    hook.remove()
    return seen[0]


def storage_bytes(tensors: list[Tensor]) -> int:
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def whole_model(model: PreTrainedModel) -> Block:
    names = tuple(name for name, _ in model.named_parameters())
    return Block(0, "all", tuple(range(model.config.num_hidden_layers)), names, model.num_parameters())


def full_optimizer(replica: Replica) -> BlockAdamW:
    return BlockAdamW(
        replica.parameters(0),
        replica.buffer(0),
        None,
        betas=(ARGUMENTS.adam_beta1, ARGUMENTS.adam_beta2),
        eps=ARGUMENTS.adam_epsilon,
        weight_decay=ARGUMENTS.weight_decay,
        max_grad_norm=ARGUMENTS.max_grad_norm,
    )


def label_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    return summed_loss(
        model,
        input_ids_BT=batch.input_ids_BT,
        attention_mask_BT=batch.attention_mask_BT,
        labels_BT=batch.labels_BT,
    )


def make_batch(seed: int, vocabulary: int, options: argparse.Namespace) -> Batch:
    """Random tokens without padding, the first half of each row a prompt without labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (options.batch_size, options.length), generator=generator)
    labels = ids.clone()
    labels[:, : options.length // 2] = -100
    return Batch(ids, torch.ones_like(ids), labels)


def show(console: Console, rows: list[dict[str, Any]]) -> None:
    columns = ("full step", "block step", "ratio", "full memory", "block memory")
    made = table("A step of one block against full fine-tuning", "model", *columns)
    for row in rows:
        full, block = row["full_bytes"]["total"], row["block_bytes"]["total"]
        made.add_row(
            row["model"],
            f"{1e3 * row['full_step_s']:.0f} ms",
            f"{1e3 * row['block_step_s']:.0f} ms",
            f"{row['ratio']:.3f}",
            f"{full / 2**20:.1f} MiB",
            f"{block / 2**20:.1f} MiB",
        )
    console.print(made)
    console.print("Memory: gradients, optimizer state and fp32 copies. Block steps are means over all blocks.")


if __name__ == "__main__":
    main()
