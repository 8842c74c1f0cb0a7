from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, OPTConfig

from parablock.data.batches import collate
from parablock.data.prompts import Example, find_stop_token_ids
from parablock.data.sources import Row, load_rows
from parablock.errors import DataError
from parablock.evaluation.generation import answers_match, generate_completions, rouge_l, score_answers
from parablock.model.pretrained import LoadedModel
from tokens import stirred, tokenized

QUESTIONS = ["How many apples?", "Ann?", "How many apples does Ann have? Ann has 12 apples.", "12 and 12", "#"]
ANSWERS = ["Ann has 12.\n#### 12", "She has\n#### 1,200", "many apples", "#### 24", "Ann"]


@pytest.fixture(scope="module")
def examples(tiny_tokenizer) -> tuple[Example, ...]:
    rows = [
        Row({"prompt": question, "completion": answer}, "made here", line)
        for line, (question, answer) in enumerate(zip(QUESTIONS, ANSWERS, strict=True), start=1)
    ]
    return tokenized(rows, tiny_tokenizer).examples


@pytest.fixture
def random_model(tiny_llama, tiny_tokenizer):
    return stirred(tiny_llama(vocab_size=len(tiny_tokenizer)))


@pytest.fixture(scope="module")
def taught_model(tiny_llama, tiny_tokenizer, examples):
    """A model that learned the answers to the first four questions by heart."""
    model = tiny_llama(num_layers=2, hidden_size=64, vocab_size=len(tiny_tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    batch = collate(examples[:4], pad_token_id=tiny_tokenizer.pad_token_id)
    for _ in range(120):
        model(
            input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT, labels=batch.labels_BT
        ).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def loop_generate(model, tokenizer, prompt_ids, *, max_new_tokens: int) -> str:
    """Greedy generation of one prompt without padding, cache or `generate`."""
    ids = list(prompt_ids)
    with torch.no_grad():
        for _ in range(max_new_tokens):
            ids.append(int(model.eval()(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            if ids[-1] in find_stop_token_ids(tokenizer):
                break
    return tokenizer.decode(ids[len(prompt_ids) :], skip_special_tokens=True)


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_answers_are_the_likeliest_tokens_one_by_one_whatever_the_batch(
    batch_size, random_model, tiny_llama, tiny_tokenizer, examples
):
    expected = [loop_generate(random_model, tiny_tokenizer, one.prompt_ids, max_new_tokens=12) for one in examples]
    assert len(set(expected)) == len(QUESTIONS)
    options = {"max_new_tokens": 12, "batch_size": batch_size}
    assert generate_completions(random_model, tiny_tokenizer, examples, **options) == expected
    other_model = stirred(tiny_llama(vocab_size=len(tiny_tokenizer)), seed=1)
    assert generate_completions(other_model, tiny_tokenizer, examples, **options) != expected


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_padding_on_the_left_does_not_move_learned_positions(family, tiny_tokenizer, examples):
    size = {"vocab_size": len(tiny_tokenizer), "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 0}
    config = {
        "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=256, vocab_size=len(tiny_tokenizer)),
        "opt": OPTConfig(hidden_size=32, num_hidden_layers=2, ffn_dim=64, num_attention_heads=4, **size),
    }[family]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    stirred(model)
    alone = generate_completions(model, tiny_tokenizer, examples, max_new_tokens=12, batch_size=1)
    assert generate_completions(model, tiny_tokenizer, examples, max_new_tokens=12, batch_size=5) == alone
    assert len(set(alone)) > 1


def test_an_answer_ends_with_the_turn_and_shows_no_special_token(taught_model, tiny_tokenizer, examples):
    answers = generate_completions(taught_model, tiny_tokenizer, examples[:4], max_new_tokens=64)
    assert answers == ANSWERS[:4]
    where, told = list[int](), list[int]()
    tell = {"on_endless": where.append, "on_token": told.append}
    cut = generate_completions(taught_model, tiny_tokenizer, examples[:4], max_new_tokens=2, **tell)
    assert (sorted(where), told) == ([0, 1, 2, 3], [1, 2])
    told.clear()
    generate_completions(taught_model, tiny_tokenizer, examples[:4], max_new_tokens=2, batch_size=3, **tell)
    assert told == [1, 2, 3, 4]  # of two batches
    where.clear()
    assert generate_completions(taught_model, tiny_tokenizer, examples[:4], max_new_tokens=64, **tell) == answers
    assert where == []
    assert all(short != whole and whole.startswith(short) for short, whole in zip(cut, answers, strict=True))


def test_the_models_own_generation_settings_have_no_say_and_stay_as_they_were(
    random_model, tiny_tokenizer, examples
):
    expected = generate_completions(random_model, tiny_tokenizer, examples, max_new_tokens=12)
    kept = random_model.generation_config
    kept.do_sample, kept.temperature, kept.repetition_penalty, kept.max_length = True, 5.0, 3.0, 3
    assert generate_completions(random_model, tiny_tokenizer, examples, max_new_tokens=12) == expected
    assert random_model.generation_config is kept
    kept.do_sample, kept.temperature = False, None
    prompt = torch.tensor([examples[2].prompt_ids])
    own = random_model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12)
    assert tiny_tokenizer.decode(own[0, prompt.shape[1] :], skip_special_tokens=True) != expected[2]


def test_generation_leaves_a_model_that_trains_in_training_mode(random_model, tiny_tokenizer, examples):
    random_model.train()
    generate_completions(random_model, tiny_tokenizer, examples[:1], max_new_tokens=2)
    assert random_model.training


def test_of_a_prompt_too_long_for_the_context_the_end_is_kept(random_model, tiny_tokenizer):
    row = Row({"prompt": "apples Ann 12 " * 300, "completion": "12"}, "long.jsonl", 7)
    (example,) = tokenized([row], tiny_tokenizer, max_length=4096).examples
    assert len(example.prompt_ids) > 512 == random_model.config.max_position_embeddings
    answer = generate_completions(random_model, tiny_tokenizer, [example], max_new_tokens=12)
    assert answer == [loop_generate(random_model, tiny_tokenizer, example.prompt_ids[-500:], max_new_tokens=12)]
    assert answer != [loop_generate(random_model, tiny_tokenizer, example.prompt_ids[:500], max_new_tokens=12)]
    with pytest.raises(DataError, match="512 tokens leaves no room"):
        generate_completions(random_model, tiny_tokenizer, [example], max_new_tokens=512)


def test_an_example_without_a_prompt_is_an_error_that_names_its_place(random_model, tiny_tokenizer):
    row = Row({"text": "Ann has 12 apples."}, "plain.jsonl", 3)
    plain = tokenized([row], tiny_tokenizer, "text", max_length=64)
    with pytest.raises(DataError, match=r"plain\.jsonl, line 3 has no prompt"):
        score_answers(random_model, tiny_tokenizer, plain.examples)
    with pytest.raises(DataError, match="no examples"):
        score_answers(random_model, tiny_tokenizer, [])


@pytest.mark.parametrize(
    ("prediction", "reference", "value"),
    [
        ("the cat sat", "the cat sat", 1.0),
        ("The CAT, sat!", "the cat sat", 1.0),
        ("the dog", "the cat sat", 2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3)),  # of 2 words 1, of 3 words 1
        ("sat cat the", "the cat sat", 1 / 3),  # the order counts
        ("größer als drei", "größer als vier", 2 / 3),
        ("да", "нет", 0.0),
        ("да", "да", 1.0),
        ("", "a", 0.0),
    ],
)
def test_rouge_l_is_the_agreement_of_the_longest_common_subsequence(prediction: str, reference: str, value: float):
    assert rouge_l(prediction, reference) == pytest.approx(value)


def test_another_judge_gives_other_values(taught_model, tiny_tokenizer, examples):
    halved = score_answers(taught_model, tiny_tokenizer, examples, judge=lambda *_: 0.5, max_new_tokens=24)
    assert halved.score == 0.5 and set(halved.values) == {0.5}
    overlaps = score_answers(taught_model, tiny_tokenizer, examples, judge=rouge_l, max_new_tokens=24)
    assert overlaps.values == tuple(map(rouge_l, overlaps.predictions, (e.completion for e in examples)))


def test_exact_match_is_the_share_of_right_answers(taught_model, random_model, tiny_tokenizer, examples):
    result = score_answers(taught_model, tiny_tokenizer, examples, max_new_tokens=24, num_samples=2)
    assert (result.score, result.count, len(result.samples)) == (4 / 5, 5, 2)  # the fifth was never taught
    assert result.samples[1].prompt == "<|im_start|>user\nAnn?<|im_end|>\n<|im_start|>assistant\n"
    assert (result.samples[1].reference, result.samples[1].prediction) == (ANSWERS[1], ANSWERS[1])
    untaught = score_answers(random_model, tiny_tokenizer, examples, max_new_tokens=24, num_samples=5, batch_size=2)
    assert (untaught.score, untaught.count, len(untaught.samples)) == (0.0, 5, 5)


@pytest.mark.parametrize(
    ("prediction", "reference"),
    [
        ("She has 40 + 2.\n#### 42", "#### 42"),
        ("a\n#### 7\nno:\n#### 42", "b\n#### 42"),
        ("#### $1,000.", "#### 1000"),
        ("#### 1000", "#### $1,000."),
        ("####42.00 apples\nand more", "#### 42"),
        ("#### -5", "#### -$5"),
        ("#### .5", "#### 0.50"),
        ("so\n#### River  Stone.", "#### river stone"),
        (" Not\n at  ALL ", "not at all"),
        ("1/2\n#### 1/2", "#### 1/2"),
    ],
)
def test_answers_that_say_the_same_match(prediction: str, reference: str):
    assert answers_match(prediction, reference)


@pytest.mark.parametrize(
    ("prediction", "reference"),
    [
        ("#### 43", "#### 42"),
        ("#### 42\nno:\n#### 7", "#### 42"),
        ("42", "#### 42"),
        ("####", "#### 42"),
        ("#### forty-two", "#### 42"),
        ("#### 421", "#### 42"),
        ("#### 5", "#### -5"),
        ("#### river", "#### river stone"),
        ("#### 1/3", "#### 1/2"),
        ("yes.", "yes"),
        ("", "yes"),
        ("#### yes", "yes"),
    ],
)
def test_answers_that_differ_do_not_match(prediction: str, reference: str):
    assert not answers_match(prediction, reference)


@pytest.mark.shared
def test_the_pretrained_model_answers_real_questions(shared_dir: Path, tiny_base: LoadedModel):
    rows = load_rows(str(shared_dir / "data/gsm8k/test.jsonl"), split="test")[:6]
    examples = tokenized(rows, tiny_base.tokenizer).examples
    result = score_answers(tiny_base.model, tiny_base.tokenizer, examples, max_new_tokens=24, batch_size=3)
    assert result.count == 6 and all(sample.prediction for sample in result.samples)
