"""Operations, memory, bytes and times of a plan against torch's own counts, real runs, and arithmetic by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaForCausalLM, PreTrainedTokenizerFast

from parablock.config.keys import RunConfig
from parablock.config.load import load_config, parse_config
from parablock.data.batches import Batch
from parablock.model.blocks import Block, find_layers, partition_blocks, whole_model
from parablock.model.load import outline_model
from parablock.model.loss import summed_loss
from parablock.model.params import Replica
from parablock.plan.forecast import make_plan
from parablock.plan.itinerary import walk
from parablock.plan.memory import FP32, LORA_RANK, memory_per_client
from parablock.plan.timing import time_rounds
from parablock.plan.traffic import Sizes, total_bytes
from parablock.training.flops import FlopModel, Tokens
from parablock.wire.transport import Link
from tiny_runs import Workshop, make_workshop, summary_of

LAYER_MATRICES = 32 * (32 + 16 + 16 + 32 + 3 * 64)
"""Of `tiny_llama`: q, k, v, o, and three of the MLP, whose width is 64."""


def config_of(**sections: Any) -> RunConfig:
    return parse_config({"model": {"name_or_path": "m"}, "data": {"train": ["a.jsonl"]}} | sections)


def batch(num_examples: int = 3, length: int = 16) -> Batch:
    """The first half of each row is a prompt without labels."""
    ids = torch.randint(2, 100, (num_examples, length), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, : length // 2] = -100
    return Batch(ids, torch.ones_like(ids), labels)


def loss_of(model: Any, given: Batch) -> torch.Tensor:
    return summed_loss(
        model,
        input_ids_BT=given.input_ids_BT,
        attention_mask_BT=given.attention_mask_BT,
        labels_BT=given.labels_BT,
    )


# -- operations -----------------------------------------------------------------------------------------------


def counted_flops(model: Any, blocks: tuple[Block, ...], index: int, **options: bool) -> int:
    replica = Replica(model, blocks)
    replica.activate(index, **options)
    with FlopCounterMode(display=False) as counter:
        loss_of(model, batch()).backward()
    replica.deactivate()
    return counter.get_total_flops()


@pytest.mark.parametrize("architecture", ["llama, tied", "llama, untied", "gpt2"])
def test_operations_of_every_block_are_those_that_torch_counts(architecture: str, tiny_llama: Any) -> None:
    if architecture == "gpt2":
        config = GPT2Config(
            n_embd=32, n_layer=3, n_head=4, n_positions=64, vocab_size=128, bos_token_id=0, eos_token_id=0
        )
        config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    else:
        config = tiny_llama().config
        config.tie_word_embeddings = architecture == "llama, tied"
    # torch counts the products of eager attention only; that does not make its scores again in the backward
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    ends = architecture != "gpt2"
    blocks = partition_blocks(model, layers_per_block=1, include_embeddings=ends, include_head=ends)
    flops, tokens = FlopModel(model), Tokens.of(batch())
    scores = 2 * tokens.pairs * flops.attention_width
    predicted = [flops.step(block, tokens) - scores * (flops.num_layers - block.lowest_layer) for block in blocks]
    assert predicted == [counted_flops(model, blocks, block.index) for block in blocks]
    assert len(set(predicted)) == len(blocks)
    if architecture == "llama, tied":
        blocks = partition_blocks(model, layers_per_block=1, split="attention_mlp")
        reached = [flops.num_layers - block.lowest_layer - (block.half == "mlp") for block in blocks]
        of_halves = [flops.step(block, tokens) - scores * up for block, up in zip(blocks, reached, strict=True)]
        assert of_halves == [counted_flops(model, blocks, block.index) for block in blocks]
        assert not set(of_halves) & set(predicted)


def test_checkpointing_adds_another_forward_from_the_lowest_layer_up(tiny_llama: Any) -> None:
    model = AutoModelForCausalLM.from_config(tiny_llama().config, attn_implementation="eager")
    blocks = partition_blocks(model, layers_per_block=1)
    flops = FlopModel(model, gradient_checkpointing=True)
    for block in blocks:
        counted = counted_flops(model, blocks, block.index, gradient_checkpointing=True)
        # torch does not make the last product of a layer again, which nothing needs
        assert counted <= flops.step(block, Tokens.of(batch())) <= 1.12 * counted
        assert FlopModel(model).step(block, Tokens.of(batch())) < counted


def test_tokens_of_a_batch_count_padding_and_labels_and_add_up() -> None:
    # 3 examples of 16 positions; the last 8 of each are labels, predicted by positions 7 … 14
    tokens = Tokens.of(batch(3, 16))
    assert tokens == Tokens(positions=48, pairs=48 * 16, labels=24)
    assert tokens + Tokens.of(batch(1, 4)) == Tokens(52, 768 + 16, 26)
    assert Tokens.at_most(num_examples=3, max_length=16) == Tokens(48, 768, 48)


# -- memory ---------------------------------------------------------------------------------------------------


def memory_of(model: Any, **sections: Any) -> dict[str, Any]:
    blocks = partition_blocks(model, layers_per_block=1)
    return memory_per_client(model, blocks, config_of(**sections))


def test_memory_of_what_is_counted_follows_from_shapes(tiny_llama: Any) -> None:
    model = tiny_llama()  # fp32, 4 layers of 32, MLP of 64, vocabulary of 128, tied
    layer = LAYER_MATRICES + 2 * 32  # two norms
    all_parameters = 4 * layer + 128 * 32 + 32
    adapters = LORA_RANK * 4 * ((32 + 32) + 2 * (32 + 16) + (32 + 32) + 3 * (32 + 64))
    found = memory_of(model, federation={"delay": 1})
    for name, trained, exchanged in (
        ("block", layer, 4 * layer),
        ("lora", adapters, adapters),
        ("full", all_parameters, all_parameters),
    ):
        memory = found[name]
        assert (memory.gradients, memory.optimizer_state) == (4 * trained, 8 * trained)
        assert (memory.base_copy, memory.updates, memory.fp32_copies) == (4 * exchanged, 2 * 4 * trained, 0)
        assert memory.parameters == 4 * (all_parameters + (adapters if name == "lora" else 0))
        assert memory.total == sum(vars(memory).values())


def test_bfloat16_halves_the_model_and_adds_master_copies_of_what_is_trained(tiny_llama: Any) -> None:
    float32, bfloat16 = memory_of(tiny_llama()), memory_of(tiny_llama(dtype="bfloat16"))
    for name in ("block", "full"):
        assert 2 * bfloat16[name].parameters == float32[name].parameters
        assert bfloat16[name].fp32_copies == bfloat16[name].gradients == float32[name].gradients
    assert bfloat16["lora"].fp32_copies == 0  # adapters are fp32 in any case


def test_blocks_and_adapters_take_less_than_all_parameters(tiny_llama: Any) -> None:
    found = {name: memory.total for name, memory in memory_of(tiny_llama(num_layers=8)).items()}
    assert found["block"] < found["full"] and found["lora"] < found["full"]


def test_a_delay_keeps_another_update_and_checkpointing_saves_activations(tiny_llama: Any) -> None:
    base = memory_of(tiny_llama(), federation={"delay": 1})["block"]
    delayed = memory_of(tiny_llama(), federation={"delay": 3})["block"]
    assert delayed.updates == 2 * base.updates and delayed.activations == base.activations
    checkpointed = memory_of(tiny_llama(), train={"gradient_checkpointing": True})["block"]
    assert checkpointed.activations < base.activations and checkpointed.gradients == base.gradients


def kept_bytes(model: Any, given: Batch) -> int:
    """Add up what autograd keeps for the backward pass, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in own:
            kept[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss_of(model, given)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_estimated_activations_are_near_what_autograd_keeps(dtype: str, tiny_llama: Any) -> None:
    model = tiny_llama(num_layers=6, hidden_size=64, dtype=dtype)
    found = memory_of(model, data={"train": ["a"], "max_length": 64}, train={"per_device_train_batch_size": 4})
    given = batch(4, 64)
    replica = Replica(model, partition_blocks(model, layers_per_block=1))
    replica.activate(0)
    assert found["block"].activations == pytest.approx(kept_bytes(model, given), rel=0.3)
    replica = Replica(model, whole_model(model))
    replica.activate(0)
    assert found["full"].activations == pytest.approx(kept_bytes(model, given), rel=0.3)
    assert found["full"].activations > 1.2 * found["block"].activations


# -- bytes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wire_format", "payload"),
    [
        ("float32", 4 * 1000),
        ("bfloat16", 2 * 1000),
        ("int8", 1000 + 2 * 4),  # scales of ⌈1000/256⌉ groups
        ("int4", 500 + 2 * 16),  # scales of ⌈1000/64⌉ groups
    ],
)
def test_a_message_has_its_payload_and_a_header_of_a_few_hundred_bytes(wire_format: str, payload: int) -> None:
    sizes = Sizes([1000], dtype="float32", wire_format=wire_format, chunk_bytes=None)
    assert 100 < sizes.update(0).total_bytes - payload < 400
    assert 100 < sizes.round_start(((0, "fresh"),)) - payload < 400
    assert sizes.round_start(((0, "missed"),)) > 4000  # who missed a visit gets the value itself
    assert sizes.round_start(((0, "streamed"),)) < 400


def test_a_streamed_block_travels_in_chunks_and_the_last_is_smaller() -> None:
    elements = 3 * 16384 + 5
    whole = Sizes([elements], dtype="float32", wire_format="float32", chunk_bytes=None).update(0)
    cut = Sizes([elements], dtype="float32", wire_format="float32", chunk_bytes=65536).update(0)
    assert (whole.num_chunks, cut.num_chunks) == (1, 4)
    assert 65536 < cut.chunk_bytes < 65536 + 400 and 20 < cut.last_bytes < 20 + 400
    headers = 4 * (cut.chunk_bytes - 65536)
    assert cut.total_bytes == pytest.approx(4 * elements + headers, abs=20)


def test_half_a_cohort_uploads_half_and_catches_up_on_the_way_down() -> None:
    def of(participation: float) -> Any:
        federation = {"num_clients": 4, "num_rounds": 12, "delay": 0, "participation": participation}
        itinerary = walk(config_of(federation=federation), 4, delay=0)
        sizes = Sizes([1000] * 4, dtype="float32", wire_format="float32", chunk_bytes=4_194_304)
        return total_bytes(itinerary, sizes)

    everybody, half = of(1.0), of(0.5)
    assert (everybody.num_visits, half.num_visits) == (48, 24)
    assert half.uplink_bytes == everybody.uplink_bytes / 2
    assert half.downlink_bytes > 0.6 * everybody.downlink_bytes


# -- times ----------------------------------------------------------------------------------------------------


def timing_of(delay: int, *, num_rounds: int, compute_s: float, link: Link, chunk_bytes: int | None = None) -> Any:
    federation = {"num_clients": 2, "num_rounds": num_rounds, "delay": delay}
    config = config_of(
        federation=federation,
        blocks={"schedule": "cyclic"},
        wire={"streaming": chunk_bytes is not None},
        checkpoint={"every_rounds": 0},
    )
    itinerary = walk(config, 8, delay=delay)
    sizes = Sizes([250_000] * 8, dtype="float32", wire_format="float32", chunk_bytes=chunk_bytes)
    return time_rounds(itinerary, sizes, lambda *_: compute_s, link, delay=delay)


def test_one_after_the_other_a_round_is_the_sum_and_overlapped_the_longer_one() -> None:
    # 250,000 elements are 8·10^6 bit: 1 s up and 2 s down; headers add below 0.1 %
    link = Link(8.0, 4.0)
    serial = timing_of(0, num_rounds=50, compute_s=4.0, link=link)
    overlapped = timing_of(1, num_rounds=50, compute_s=4.0, link=link)
    for timing in (serial, overlapped):
        assert timing.compute_s == 4.0
        assert timing.exchange_s == pytest.approx(3.0, rel=0.03)
        assert timing.communication_s == pytest.approx(3.0, rel=0.03)
        assert timing.sequential_s == pytest.approx(7.0, rel=0.03)
    assert serial.round_s == pytest.approx(7.0, rel=0.01)
    assert overlapped.round_s == pytest.approx(4.0 + 3.0 / 50, rel=0.01)  # the drain, once
    assert overlapped.cover_s == overlapped.exchange_s < overlapped.compute_s


def test_a_link_that_takes_longer_than_the_computation_sets_the_pace_again() -> None:
    wide = timing_of(1, num_rounds=40, compute_s=4.0, link=Link(8.0, 4.0))
    narrow = timing_of(1, num_rounds=40, compute_s=4.0, link=Link(1.6, 1.6))  # 5 s up, 5 s down
    assert narrow.cover_s > narrow.compute_s and narrow.round_s > 1.4 * wide.round_s
    patient = timing_of(3, num_rounds=40, compute_s=4.0, link=Link(1.6, 1.6))
    assert patient.cover_s == pytest.approx(5.0, rel=0.05)  # one direction of the link
    assert patient.round_s < narrow.round_s


def test_streaming_runs_both_directions_at_once() -> None:
    whole = timing_of(0, num_rounds=10, compute_s=1.0, link=Link(8.0, 8.0))
    streamed = timing_of(0, num_rounds=10, compute_s=1.0, link=Link(8.0, 8.0), chunk_bytes=65536)
    # 16 chunks: all of them up, and the last one down
    assert whole.exchange_s == pytest.approx(2.0, rel=0.1)
    assert streamed.exchange_s == pytest.approx(1 + 1 / 16, rel=0.05)
    assert streamed.communication_s == pytest.approx(whole.communication_s, rel=0.05)


# -- a run ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workshop(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_llama: Callable[..., LlamaForCausalLM],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Workshop:
    def wide(**options: Any) -> LlamaForCausalLM:
        return tiny_llama(hidden_size=64, **options)

    return make_workshop(tmp_path_factory.mktemp("plan"), wide, tiny_tokenizer)


SETTINGS = {
    "as it is": (),
    "delay 0, whole": ("federation.delay=0", "wire.streaming=false"),
    "delay 2": ("federation.delay=2", "federation.num_rounds=9"),
    "half a cohort": ("federation.participation=0.5", "federation.num_rounds=12"),
    "half a cohort, int8, whole": (
        *("federation.participation=0.5", "federation.num_rounds=12"),
        *("wire.format=int8", "wire.streaming=false"),
    ),
    "chunks, slow up": ("wire.chunk_bytes=65536", "link.upload_mbps=2"),
    "chunks, slow down, int4": ("wire.chunk_bytes=16384", "link.download_mbps=1", "wire.format=int4"),
    "few large blocks": ("blocks.layers_per_block=4", "federation.delay=2", "wire.format=int8"),
    "ends, random": (
        *("blocks.include_embeddings=true", "blocks.include_head=true"),
        *("blocks.schedule=random", "blocks.allow_unvisited=true", "seed=3"),
    ),
    "all parameters": ("federation.method=fedavg", "federation.delay=0"),
    "adapters": ("federation.method=fedit", "federation.delay=0", "lora.rank=4"),
    "adapters, half a cohort, int8, whole": (
        *("federation.method=fedit", "federation.delay=0", "federation.participation=0.5"),
        *("wire.format=int8", "wire.streaming=false", "federation.num_rounds=12"),
    ),
    "adapters of some matrices, bfloat16 model": (
        *("federation.method=fedit", "federation.delay=0", "model.dtype=bfloat16"),
        "lora.target_modules=[q_proj,down_proj]",
    ),
    "half of the adapters": ("federation.method=ffa_lora", "federation.delay=0", "lora.rank=4"),
    "stacked adapters": ("federation.method=flora", "federation.delay=0", "lora.rank=4"),
    "stacked adapters, half a cohort": (
        *("federation.method=flora", "federation.delay=0", "lora.rank=4"),
        *("federation.participation=0.5", "federation.num_rounds=12"),
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_bytes_and_times_are_those_of_the_run(name: str, workshop: Workshop, tmp_path: Path) -> None:
    config = load_config(workshop.config, SETTINGS[name])
    outcome = workshop.run(tmp_path / "run", *SETTINGS[name])
    assert outcome.code == 0, outcome.stderr
    summary, plan = summary_of(tmp_path / "run"), make_plan(config)
    rounds = summary["num_rounds"]
    traffic = plan.traffic[config.wire.format]
    messages = 40 * summary["num_clients"] * rounds * (20 if "chunks" in name else 1)  # digits not known before
    assert abs(traffic["uplink_bytes"] - summary["uplink_bytes"]) < messages
    assert abs(traffic["downlink_bytes"] - summary["downlink_bytes"]) < messages
    assert plan.total_bytes == traffic["uplink_bytes"] + traffic["downlink_bytes"]
    per_round = plan.bytes_per_client_round
    assert per_round[config.wire.format] == pytest.approx(summary["bytes_per_client_round"], rel=2e-3)
    others = set(per_round) - {config.wire.format}
    assert all(abs(per_round[other] / summary["bytes_per_client_round"] - 1) > 0.05 for other in others)
    assert plan.compute_s * rounds == pytest.approx(summary["compute_s"])
    assert plan.communication_s * rounds == pytest.approx(summary["communication_s"], rel=2e-3)
    assert plan.hours * 3600 == pytest.approx(summary["wall_time_s"], rel=2e-3)
    assert plan.round_s * rounds == pytest.approx(plan.hours * 3600)


def test_lora_methods_send_adapters_half_of_them_or_stacks_of_them(workshop: Workshop) -> None:
    plans = {
        method: make_plan(
            load_config(workshop.config, [f"federation.method={method}", "federation.delay=0", "lora.rank=4"])
        )
        for method in ("fedit", "ffa_lora", "flora")
    }
    _, layers = find_layers(outline_model(str(workshop.model), dtype="float32"), None)
    matrices = [module.weight.shape for module in layers.modules() if isinstance(module, torch.nn.Linear)]
    both = 4 * sum(outputs + inputs for outputs, inputs in matrices)
    parameters = {method: plan.blocks[0]["parameters"] for method, plan in plans.items()}
    b_alone = 4 * sum(outputs for outputs, _ in matrices)
    assert parameters == {"fedit": both, "ffa_lora": b_alone, "flora": both}
    for method, plan in plans.items():  # six rounds of four clients; a new value goes down after each
        traffic, header = plan.traffic["float32"], 24 * 500
        payload = 24 * 4 * parameters[method]
        assert 0 < traffic["uplink_bytes"] - payload < header
        down = payload * 4 if method == "flora" else payload  # the stack of four
        assert 0 < traffic["downlink_bytes"] - down < 3 * header
    with_blocks = make_plan(load_config(workshop.config, ["federation.delay=0"]))
    assert with_blocks.blocks[0]["parameters"] not in parameters.values()
    assert list(plans["flora"].traffic) == ["float32"], "adapters that are stacked have no other format"


def test_another_delay_is_another_time(workshop: Workshop) -> None:
    hours = {d: make_plan(load_config(workshop.config, [f"federation.delay={d}"])).hours for d in (0, 1)}
    assert hours[1] < 0.9 * hours[0]


def test_an_outline_has_the_shapes_of_the_model_and_no_memory(workshop: Workshop) -> None:
    outline = outline_model(str(workshop.model), dtype="bfloat16")
    assert all(parameter.is_meta for parameter in outline.parameters())
    assert outline.dtype == torch.bfloat16
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(workshop.model))
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert {name: parameter.shape for name, parameter in outline.named_parameters()} == shapes
    assert (
        FP32 * outline.num_parameters()
        == memory_per_client(model, partition_blocks(outline, layers_per_block=1), config_of())["full"].parameters
    )
