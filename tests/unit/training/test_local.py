"""Local training of one block against a plain loop, and every option taking effect."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedModel,
    get_scheduler,
)
from transformers.trainer_pt_utils import get_parameter_names

from parablock.data.batches import Batch
from parablock.errors import DataError, TrainingError
from parablock.model.blocks import partition_blocks
from parablock.model.loss import count_label_tokens, sum_loss
from parablock.model.params import Replica
from parablock.training.block_optimizer import Moments
from parablock.training.local import LocalArguments, LocalResult, learning_rate_at, train_block

NUM_LAYERS = 4
Make = Callable[..., PreTrainedModel]
PLAIN = LocalArguments(learning_rate=1e-2, max_grad_norm=0.0)


@pytest.fixture
def make_model(tiny_llama: Callable[..., LlamaForCausalLM]) -> Callable[..., PreTrainedModel]:
    def make(family: str = "llama", dtype: str = "float32", scale: float = 4.0) -> PreTrainedModel:
        if family == "llama":
            model: PreTrainedModel = tiny_llama(num_layers=NUM_LAYERS)
        else:
            config = GPT2Config(vocab_size=128, n_embd=32, n_layer=NUM_LAYERS, n_head=4, n_positions=64)
            config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
            config.bos_token_id = config.eos_token_id = 0
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = GPT2LMHeadModel(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(scale)  # away from zero, where all layers would look alike
        return model.to(getattr(torch, dtype))

    return make


def make_replica(model: PreTrainedModel, **options: bool) -> Replica:
    return Replica(model, partition_blocks(model, layers_per_block=1, **options))


def make_batch(seed: int, rows: int = 4, length: int = 12, vocabulary: int = 128) -> Batch:
    """Random tokens; the rows differ in padding, and the first third of each is a prompt without labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocabulary, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, length - row % 3 :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, : length // 3] = -100
    return Batch(ids, mask, labels)


def steps(*seeds: int) -> list[list[Batch]]:
    return [[make_batch(seed)] for seed in seeds]


def train(
    replica: Replica,
    block_index: int,
    batches: Sequence[Sequence[Batch]],
    arguments: LocalArguments = PLAIN,
    *,
    start: Tensor | None = None,
    first_step: int = 0,
    total_steps: int = 100,
    moments: Moments | None = None,
) -> LocalResult:
    start = replica.read(block_index) if start is None else start
    return train_block(
        replica,
        block_index,
        start,
        batches,
        arguments,
        first_step=first_step,
        total_steps=total_steps,
        moments=moments,
    )


def plain_loop(
    model: PreTrainedModel, names: Sequence[str], batches: Sequence[Batch], arguments: LocalArguments
) -> tuple[Tensor, list[float]]:
    """What anybody would write: gradients of the whole model, HF's own loss, AdamW on some parameters."""
    chosen = [parameter for name, parameter in model.named_parameters() if name in names]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in chosen if p.ndim > 1], "weight_decay": arguments.weight_decay},
            {"params": [p for p in chosen if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=arguments.learning_rate,
        betas=(arguments.adam_beta1, arguments.adam_beta2),
        eps=arguments.adam_epsilon,
    )
    losses = []
    for batch in batches:
        model.zero_grad()
        loss = model(
            input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT, labels=batch.labels_BT
        ).loss
        loss.backward()
        if arguments.max_grad_norm:
            nn.utils.clip_grad_norm_(chosen, arguments.max_grad_norm)
        optimizer.step()
        losses.append(loss.item())
    return torch.cat([parameter.detach().reshape(-1) for parameter in chosen]), losses


def difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


# ── the loss ────────────────────────────────────────────────────────────────────────────────────────


def final_softcapping() -> PreTrainedModel:
    from transformers import Gemma2Config

    config = Gemma2Config(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        final_logit_softcapping=2.0,
    )
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2, softcapped logits"])
def test_the_loss_is_that_of_hugging_face(make_model: Make, family: str):
    model = make_model(family) if family in ("llama", "gpt2") else final_softcapping()
    batch = make_batch(0)
    inputs = {"input_ids": batch.input_ids_BT, "attention_mask": batch.attention_mask_BT}
    expected = model(**inputs, labels=batch.labels_BT).loss
    count = count_label_tokens(batch.labels_BT)
    assert count == int((batch.labels_BT[:, 1:] != -100).sum())
    loss = sum_loss(model, **named(batch)) / count
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    unshifted = nn.functional.cross_entropy(model(**inputs).logits.flatten(0, 1), batch.labels_BT.flatten())
    assert abs(unshifted - loss) > 0.01


def named(batch: Batch) -> dict[str, Tensor]:
    return {field.name: getattr(batch, field.name) for field in fields(batch)}


def test_logits_are_made_only_where_a_label_is_predicted(make_model: Make):
    model, batch = make_model(), make_batch(0)
    sizes: list[int] = []
    model.lm_head.register_forward_hook(lambda _m, _i, logits: sizes.append(logits.numel() // 128))
    sum_loss(model, **named(batch))
    model(batch.input_ids_BT)  # and no hook stays behind
    assert sizes == [count_label_tokens(batch.labels_BT), batch.input_ids_BT.numel()]


def test_a_model_without_a_known_head_has_the_same_loss(make_model: Make):
    model, batch = make_model(), make_batch(0)
    expected = sum_loss(model, **named(batch))
    model.get_output_embeddings = lambda: None
    torch.testing.assert_close(sum_loss(model, **named(batch)), expected, rtol=1e-6, atol=1e-6)


# ── K steps on one block ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("block_index", [0, 2, 3, 5])
def test_a_block_is_trained_as_by_a_plain_loop(make_model: Make, family: str, block_index: int):
    """Block 0: embeddings, 1 … 4: layers, 5: final norm (the tied head belongs to block 0)."""
    # An epsilon above the rounding noise of gradients that are zero by symmetry (GPT-2's key bias).
    arguments = replace(
        PLAIN, weight_decay=0.1, max_grad_norm=1.0, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-4
    )
    batches = [make_batch(seed) for seed in (1, 2, 3)]
    replica = make_replica(make_model(family), include_embeddings=True, include_head=True)
    others = {b.index: replica.read(b.index) for b in replica.blocks if b.index != block_index}
    start = replica.read(block_index)
    names = replica.blocks[block_index].parameter_names
    expected, losses = plain_loop(make_model(family), names, batches, arguments)
    result = train(replica, block_index, [[batch] for batch in batches], arguments)
    assert result.trained.dtype == torch.float32
    assert difference(result.trained, expected) < 1e-6
    assert result.train_loss == pytest.approx(sum(losses) / 3, abs=1e-6)
    assert difference(result.trained, start) > 1e-2
    assert difference(plain_loop(make_model(family), names, batches[:2], arguments)[0], expected) > 1e-4
    assert torch.equal(replica.read(block_index), result.trained)
    assert all(torch.equal(replica.read(index), value) for index, value in others.items())


def test_training_starts_from_start_and_not_from_what_the_replica_holds(make_model: Make):
    start = make_replica(make_model()).read(1)
    kept = start.clone()
    replica = make_replica(make_model())
    first = train(replica, 1, steps(1, 2), start=start)
    again = train(replica, 1, steps(1, 2), start=start)  # the block was trained in between: loaded anew
    assert torch.equal(first.trained, again.trained)
    assert torch.equal(start, kept)
    other = train(replica, 1, steps(1, 2), start=start + 0.1)
    assert difference(other.trained, first.trained) > 1e-2


def test_the_global_random_state_has_no_effect(make_model: Make):
    results = []
    for seed in (0, 1):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            state = torch.random.get_rng_state()
            results.append(train(make_replica(make_model("gpt2")), 1, steps(1, 2)).trained)
            assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(*results)
    assert not torch.equal(results[0], train(make_replica(make_model("gpt2")), 1, steps(1, 3)).trained)


# ── precision ───────────────────────────────────────────────────────────────────────────────────────


def test_bf16_is_stepped_in_an_fp32_master_so_small_steps_add_up(make_model: Make):
    # On the same batch AdamW moves a weight by about the learning rate at every step: 8 · 1e-5 = 8e-5. A bf16
    # weight above 0.1 has its neighbour 5e-4 away or more, so that each single step rounds away.
    arguments = replace(PLAIN, learning_rate=1e-5)
    replica = make_replica(make_model(dtype="bfloat16"))
    start = replica.read(1)
    large = start.abs() > 0.1
    naive, _ = plain_loop(
        make_model(dtype="bfloat16"), replica.blocks[1].parameter_names, [make_batch(1)] * 8, arguments
    )
    assert torch.equal(naive[large], start[large])
    result = train(replica, 1, steps(*[1] * 8), arguments)
    delta = (result.trained - start.float()).abs()
    assert 7e-5 < delta[large].median() < 9e-5
    assert torch.equal(replica.read(1), result.trained.bfloat16())


# ── gradient accumulation, clipping, weight decay, schedule ─────────────────────────────────────────


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_micro_batches_of_four_make_the_step_of_one_of_eight(make_model: Make, dtype: str):
    whole = make_batch(1, rows=8)
    whole.labels_BT[:4, :10] = -100  # the halves differ in label tokens, so a mean of means would differ
    halves = [Batch(*(t[part] for t in named(whole).values())) for part in (slice(0, 4), slice(4, 8))]
    counts = [count_label_tokens(half.labels_BT) for half in halves]
    assert counts[0] * 3 < counts[1]
    arguments = replace(PLAIN, adam_epsilon=1e-2)  # a step that depends on the gradient's size, not only its sign
    one = train(make_replica(make_model(dtype=dtype)), 1, [[whole]], arguments)
    two = train(make_replica(make_model(dtype=dtype)), 1, [halves], arguments)
    bound = 1e-6 if dtype == "float32" else 1e-3
    assert difference(one.trained, two.trained) < bound
    assert one.train_loss == pytest.approx(two.train_loss, rel=1e-6 if dtype == "float32" else 1e-2)
    second = train(make_replica(make_model(dtype=dtype)), 1, [halves[1:]], arguments)
    assert difference(one.trained, second.trained) > bound


def test_a_micro_batch_without_labels_adds_nothing(make_model: Make):
    masked = make_batch(2)
    masked.labels_BT.fill_(-100)
    alone = train(make_replica(make_model()), 1, [[make_batch(1)]])
    with_masked = train(make_replica(make_model()), 1, [[make_batch(1), masked]])
    assert torch.equal(alone.trained, with_masked.trained)
    with pytest.raises(DataError, match=r"no label token .*block 1, local step 7"):
        train(make_replica(make_model()), 1, [[masked]], first_step=7)


def test_weight_decay_shrinks_matrices_and_spares_norms_and_biases(make_model: Make):
    for family in ("llama", "gpt2"):
        replica = make_replica(make_model(family))
        block = replica.blocks[1]
        sizes = [parameter.numel() for parameter in replica.parameters(1)]
        start = replica.read(1)
        plain = train(replica, 1, steps(1)).trained
        decayed = train(replica, 1, steps(1), replace(PLAIN, weight_decay=0.5), start=start).trained
        # One step of decoupled decay takes learning_rate · weight_decay = 0.005 of each weight.
        shrunk = {
            name: difference(after, before - 0.005 * value) < 1e-6 and difference(after, before) > 1e-4
            for name, before, after, value in zip(
                block.parameter_names, plain.split(sizes), decayed.split(sizes), start.split(sizes), strict=True
            )
        }
        assert {name for name, yes in shrunk.items() if yes} == trainer_decays(replica.model) & set(shrunk)
        spared = torch.cat([torch.full((n,), not yes) for n, yes in zip(sizes, shrunk.values(), strict=True)])
        assert spared.any()
        assert torch.equal(plain[spared], decayed[spared])


def trainer_decays(model: PreTrainedModel) -> set[str]:
    """Which parameters decay by the rule of Hugging Face's Trainer."""
    patterns = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
    return set(get_parameter_names(model, [nn.LayerNorm], patterns))


@pytest.mark.parametrize("warmup_ratio", [0.0, 0.25])
@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_the_learning_rate_is_that_of_a_scheduler_of_transformers(name: str, warmup_ratio: float):
    arguments = replace(PLAIN, lr_scheduler_type=name, warmup_ratio=warmup_ratio)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=arguments.learning_rate)
    hf_name = "constant_with_warmup" if name == "constant" else name
    scheduler = get_scheduler(hf_name, optimizer, int(12 * warmup_ratio), 12)
    expected = []
    for _ in range(12):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert [learning_rate_at(arguments, step, 12) for step in range(12)] == expected
    assert (len(set(expected)) == 1) == (name == "constant" and not warmup_ratio)
    # steps beyond the planned end keep the last value, also where a cosine would rise again
    assert learning_rate_at(arguments, 20, 12) == learning_rate_at(arguments, 12, 12)


def test_a_step_uses_the_learning_rate_of_its_place_in_the_run(make_model: Make):
    linear = replace(PLAIN, lr_scheduler_type="linear")

    def trained(arguments: LocalArguments, first_step: int) -> Tensor:
        return train(
            make_replica(make_model()), 1, steps(1), arguments, first_step=first_step, total_steps=10
        ).trained

    # 1 − 4/10 of the way down is left at step 4
    assert torch.equal(trained(linear, 4), trained(replace(PLAIN, learning_rate=PLAIN.learning_rate * 0.6), 0))
    assert difference(trained(linear, 4), trained(linear, 5)) > 1e-4
    assert torch.equal(trained(PLAIN, 4), trained(PLAIN, 5))


# ── gradient checkpointing ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_checkpointing_recomputes_from_the_block_upwards_and_changes_no_number(make_model: Make, family: str):
    def run(*, gradient_checkpointing: bool) -> tuple[Tensor, list[int], int]:
        replica = make_replica(make_model(family))
        layers = replica.model.model.layers if family == "llama" else replica.model.transformer.h
        calls = [0] * NUM_LAYERS
        for index, layer in enumerate(layers):
            norm = layer.input_layernorm if family == "llama" else layer.ln_1

            def count(*_: object, index: int = index) -> None:
                calls[index] += 1

            norm.register_forward_hook(count)
        arguments = replace(PLAIN, gradient_checkpointing=gradient_checkpointing)
        with saved_bytes() as saved:
            trained = train(replica, 1, steps(1), arguments).trained
        return trained, calls, saved[0]

    plain, calls, plain_bytes = run(gradient_checkpointing=False)
    assert calls == [1, 1, 1, 1]
    checkpointed, calls, checkpointed_bytes = run(gradient_checkpointing=True)
    assert calls == [1, 2, 2, 2]
    assert torch.equal(plain, checkpointed)
    assert checkpointed_bytes < plain_bytes


# ── what exists while a block is trained ────────────────────────────────────────────────────────────


@contextmanager
def saved_bytes() -> Iterator[list[int]]:
    """Count what autograd keeps for the backward pass, without the parameters that live anyway."""
    total = [0]

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            total[0] += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total


def trained_leaves(loss: Tensor) -> set[int]:
    """Collect the parameters that a backward pass would give gradients to."""
    found: set[object] = set()
    leaves: set[int] = set()
    stack = [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in found:
            continue
        found.add(node)
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        stack += [parent for parent, _ in node.next_functions]
    return leaves


@pytest.mark.parametrize("block_index", range(NUM_LAYERS))
def test_backpropagation_ends_at_the_block_and_makes_no_gradient_of_frozen_weights(
    make_model: Make, block_index: int
):
    replica = make_replica(make_model())
    entering: dict[int, bool] = {}
    for index, layer in enumerate(replica.model.model.layers):
        layer.register_forward_pre_hook(
            lambda _m, inputs, index=index: entering.update({index: inputs[0].grad_fn is not None})
        )
    replica.activate(block_index)
    loss = sum_loss(replica.model, **named(make_batch(1)))
    # no graph below the block or into it; one above it
    assert entering == {index: index > block_index for index in range(NUM_LAYERS)}
    assert trained_leaves(loss) == {id(parameter) for parameter in replica.parameters(block_index)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_and_optimizer_state_are_those_of_the_block_alone_and_gone_afterwards(
    make_model: Make, monkeypatch: pytest.MonkeyPatch, dtype: str
):
    replica = make_replica(make_model(dtype=dtype))
    block = replica.blocks[1]
    step_of_adamw = torch.optim.AdamW.step
    optimizers: list[weakref.ref[torch.optim.AdamW]] = []

    def observe(optimizer: torch.optim.AdamW) -> None:
        """Look at what there is in the middle of the visit, just before a real step."""
        optimizers.append(weakref.ref(optimizer))
        stepped = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in stepped]
        moments = [optimizer.state[p][key] for p in stepped for key in ("exp_avg", "exp_avg_sq")]
        assert all(tensor.dtype == torch.float32 for tensor in (*stepped, *gradients, *moments))
        # fp32: 4 bytes each of gradient and of two moments; no more than that in any storage
        assert storage_bytes(gradients) == 4 * block.num_parameters
        assert storage_bytes(moments) == 8 * block.num_parameters
        in_place = storage_bytes([*stepped, replica.buffer(1)]) == storage_bytes([replica.buffer(1)])
        assert in_place == (dtype == "float32")  # a master copy where the block is not fp32, and only there
        assert storage_bytes(stepped) == 4 * block.num_parameters
        assert all(parameter.grad is None for parameter in replica.model.parameters())
        step_of_adamw(optimizer)

    monkeypatch.setattr(torch.optim.AdamW, "step", observe)
    gc.collect()
    gc.freeze()  # only what is made from here on is looked at, which is quick
    before = float_bytes()
    result = train(replica, 1, steps(1, 2), start=replica.read(1))
    assert len(optimizers) == 2
    gc.collect()
    assert optimizers[0]() is None
    assert all(parameter.grad is None for parameter in replica.model.parameters())
    assert not any(parameter.requires_grad for parameter in replica.model.parameters())
    # what is left is the result: the trained vector and two moments, fp32
    assert float_bytes() - before == 12 * block.num_parameters
    del result
    assert float_bytes() == before
    gc.unfreeze()


def storage_bytes(tensors: Sequence[Tensor]) -> int:
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def float_bytes() -> int:
    gc.collect()
    alive = [
        item
        for item in gc.get_objects()
        if issubclass(type(item), Tensor) and item.is_floating_point() and item.numel() > 1000
    ]
    return storage_bytes(alive)


# ── moments ─────────────────────────────────────────────────────────────────────────────────────────


def test_kept_moments_go_on_where_the_last_visit_ended(make_model: Make):
    arguments = replace(PLAIN, weight_decay=0.1, lr_scheduler_type="cosine")
    together = train(make_replica(make_model()), 1, steps(1, 2, 3, 4), arguments, total_steps=6)
    replica = make_replica(make_model())
    first = train(replica, 1, steps(1, 2), arguments, total_steps=6)
    kept = first.moments.exp_avg.clone(), first.moments.exp_avg_sq.clone()
    second = train(
        replica, 1, steps(3, 4), arguments, start=first.trained, first_step=2, total_steps=6, moments=first.moments
    )
    assert torch.equal(second.trained, together.trained)
    assert torch.equal(second.moments.exp_avg, together.moments.exp_avg)
    assert torch.equal(second.moments.exp_avg_sq, together.moments.exp_avg_sq)
    assert (first.moments.step, second.moments.step, together.moments.step) == (2, 4, 4)
    assert torch.equal(first.moments.exp_avg, kept[0])  # what was given is not changed
    assert torch.equal(first.moments.exp_avg_sq, kept[1])
    reset = train(replica, 1, steps(3, 4), arguments, start=first.trained, first_step=2, total_steps=6)
    assert difference(reset.trained, together.trained) > 1e-4
    assert reset.moments.step == 2


# ── what goes wrong ─────────────────────────────────────────────────────────────────────────────────


def test_a_loss_that_is_not_finite_names_block_step_and_learning_rate(make_model: Make):
    replica = make_replica(make_model())
    start = replica.read(1)
    broken = start.clone()
    broken[0] = float("nan")
    linear = replace(PLAIN, lr_scheduler_type="linear")
    with pytest.raises(TrainingError, match=r"loss is not finite \(block 1, local step 5, learning rate 0\.005"):
        train(replica, 1, steps(1), linear, start=broken, first_step=5, total_steps=10)
    # and the replica is as after any other visit
    assert not any(parameter.requires_grad for parameter in replica.model.parameters())
    assert not replica.model.training
    fresh = train(make_replica(make_model()), 1, steps(1), start=start).trained
    assert torch.equal(train(replica, 1, steps(1), start=start).trained, fresh)


def test_a_last_step_that_leaves_no_finite_block_is_refused(make_model: Make):
    with pytest.raises(TrainingError, match=r"trained block is not finite \(block 1, 1 steps from 3"):
        train(make_replica(make_model()), 1, steps(1), replace(PLAIN, learning_rate=float("inf")), first_step=3)
