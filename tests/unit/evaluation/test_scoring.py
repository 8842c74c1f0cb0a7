from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from parablock.data.prompts import IGNORED_LABEL, Example, tokenize_rows
from parablock.data.sources import Row, load_rows
from parablock.errors import DataError
from parablock.evaluation.scoring import evaluate_loss, score_examples
from parablock.model.pretrained import load_model

PAD = 1


def example(input_ids: Sequence[int], num_masked: int) -> Example:
    labels = (IGNORED_LABEL,) * num_masked + tuple(input_ids[num_masked:])
    row = Row({}, "made here", 1)
    return Example(tuple(input_ids), labels, tuple(input_ids[:num_masked]), "", row, is_truncated=False)


EXAMPLES = [
    example([5, 9, 2, 77, 31, 8, 8, 120], 3),
    example([4, 4, 100], 2),
    example([9, 2, 77, 31, 8], 1),
    example([60, 61, 62, 63, 64, 65, 66, 67, 68, 69, 70], 0),
    example([3, 33, 99, 5], 1),
]


def loop_log_probs(model, one: Example, *, dtype: torch.dtype = torch.float64) -> list[float]:
    """The log-probability of every labelled token, one example alone and one position after the other."""
    with torch.no_grad():
        logits_TV = model.eval()(input_ids=torch.tensor([one.input_ids])).logits[0].to(dtype)
    return [
        logits_TV[position - 1].log_softmax(0)[label].item()
        for position, label in enumerate(one.labels)
        if label != IGNORED_LABEL and position > 0
    ]


def test_the_loss_is_the_mean_over_tokens_and_not_over_examples(tiny_llama):
    model = tiny_llama()
    per_example = [loop_log_probs(model, one) for one in EXAMPLES]
    assert [len(one) for one in per_example] == [5, 1, 4, 10, 3]
    every_token = [log_prob for one in per_example for log_prob in one]
    loss = evaluate_loss(model, EXAMPLES, pad_token_id=PAD)
    assert loss == pytest.approx(-sum(every_token) / 23, abs=1e-6)
    mean_of_means = -sum(sum(one) / len(one) for one in per_example) / len(per_example)
    assert loss != pytest.approx(mean_of_means, abs=1e-6)


def test_the_order_of_the_examples_changes_no_bit_and_a_missing_one_does(tiny_llama):
    model = tiny_llama()
    loss = evaluate_loss(model, EXAMPLES, pad_token_id=PAD, batch_size=2)
    assert evaluate_loss(model, EXAMPLES[::-1], pad_token_id=PAD, batch_size=2) == loss
    assert evaluate_loss(model, EXAMPLES[2:] + EXAMPLES[:2], pad_token_id=PAD, batch_size=2) == loss
    assert evaluate_loss(model, EXAMPLES[1:], pad_token_id=PAD, batch_size=2) != loss


def test_batch_size_and_padding_do_not_matter_but_the_weights_do(tiny_llama):
    model = tiny_llama()
    loss = evaluate_loss(model, EXAMPLES, pad_token_id=PAD, batch_size=1)
    for batch_size in (2, 3, 16):
        for pad in (PAD, 42):
            other = evaluate_loss(model, EXAMPLES, pad_token_id=pad, batch_size=batch_size)
            assert other == pytest.approx(loss, abs=1e-6)
    assert evaluate_loss(tiny_llama(seed=1), EXAMPLES, pad_token_id=PAD) != pytest.approx(loss, abs=1e-6)


def test_the_batch_size_is_how_many_examples_go_through_the_model_at_once(tiny_llama):
    model, shapes = tiny_llama(), []
    model.register_forward_pre_hook(
        lambda module, args, options: shapes.append(tuple(options["input_ids"].shape)), with_kwargs=True
    )
    evaluate_loss(model, EXAMPLES, pad_token_id=PAD, batch_size=2)
    assert shapes == [(2, 4), (2, 8), (1, 11)]  # sorted by length, so that little is padded


def test_the_likelihoods_come_in_the_order_of_the_examples(tiny_llama):
    model = tiny_llama()
    likelihoods = score_examples(model, EXAMPLES, pad_token_id=PAD, batch_size=2)
    for one, likelihood in zip(EXAMPLES, likelihoods, strict=True):
        expected = loop_log_probs(model, one)
        assert (likelihood.num_tokens, likelihood.log_prob) == (
            len(expected),
            pytest.approx(sum(expected), abs=1e-5),
        )


def test_the_loss_of_a_bfloat16_model_is_computed_in_float32(tiny_llama):
    model = tiny_llama(dtype="bfloat16")
    one = EXAMPLES[0]
    in_float32, in_bfloat16 = (loop_log_probs(model, one, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    loss = evaluate_loss(model, [one], pad_token_id=PAD)
    assert loss == pytest.approx(-sum(in_float32) / 5, abs=1e-6)
    assert loss != pytest.approx(-sum(in_bfloat16) / 5, abs=1e-4)


def test_every_module_has_its_mode_again_and_nothing_gets_a_gradient(tiny_llama):
    model = tiny_llama().train()
    model.model.layers[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    assert set(modes.values()) == {True, False}
    seen = []
    model.register_forward_pre_hook(lambda module, args: seen.append((module.training, torch.is_grad_enabled())))
    evaluate_loss(model, EXAMPLES, pad_token_id=PAD)
    assert set(seen) == {(False, False)}
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.is_grad_enabled()
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_the_modes_come_back_after_an_error_too(tiny_llama):
    model = tiny_llama(vocab_size=128).train()
    with pytest.raises(IndexError):
        evaluate_loss(model, [example([5, 500], 1)], pad_token_id=PAD)
    assert model.training and torch.is_grad_enabled()


def test_dropout_is_off_during_evaluation_though_the_model_trains(tiny_llama):
    model = tiny_llama().train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    ids = torch.tensor([EXAMPLES[0].input_ids])
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    loss = evaluate_loss(model, EXAMPLES, pad_token_id=PAD)
    assert (
        loss
        == evaluate_loss(model, EXAMPLES, pad_token_id=PAD)
        == evaluate_loss(tiny_llama(), EXAMPLES, pad_token_id=PAD)
    )


def test_examples_without_a_labelled_token_are_an_error(tiny_llama):
    for nothing in ([], [example([5, 6, 7], 3)], [example([5], 0)]):
        with pytest.raises(DataError, match=f"None of {len(nothing)} examples"):
            evaluate_loss(tiny_llama(), nothing, pad_token_id=PAD)


def test_the_loss_of_a_broken_model_is_not_finite(tiny_llama):
    model = tiny_llama()
    model.model.norm.weight.data[0] = math.nan
    assert math.isnan(evaluate_loss(model, EXAMPLES, pad_token_id=PAD))


@pytest.mark.shared
def test_the_pretrained_model_knows_more_of_real_text_than_a_random_one(shared_dir: Path):
    rows = load_rows(str(shared_dir / "data/t0/ag_news.test.jsonl"), split="test")[:32]
    losses = []
    for init in ("pretrained", "random"):
        loaded = load_model(str(shared_dir / "models/tiny-base"), dtype="bfloat16", device="cpu", init=init, seed=0)
        tokenized = tokenize_rows(
            rows, loaded.tokenizer, data_format="auto", max_length=512, completion_only_loss=False
        )
        pad_token_id = loaded.tokenizer.pad_token_id
        losses.append(evaluate_loss(loaded.model, tokenized.examples, pad_token_id=pad_token_id, batch_size=4))
    pretrained, random = losses
    assert pretrained < 6.0 < random  # the logarithm of the vocabulary is 8.3
