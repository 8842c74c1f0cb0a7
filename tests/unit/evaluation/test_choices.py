from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from parablock.data.prompts import Tokenized
from parablock.data.sources import Row, load_rows
from parablock.errors import DataError, TrainingError
from parablock.evaluation.choices import MAX_GROUP_CHOICES, find_choices, multiple_choice
from parablock.model.pretrained import LoadedModel
from tokens import stirred, tokenized

CHOICES = ["Ann", "apples", "12", "How many apples does Ann have?"]


def tokenized_of(tokenizer, rows: Sequence[dict[str, Any]], **options: Any) -> Tokenized:
    return tokenized([Row(fields, "made_here", line) for line, fields in enumerate(rows, 1)], tokenizer, **options)


def question_rows(count: int = 12, **fields: Any) -> list[dict[str, Any]]:
    return [{"prompt": f"Ann has {i}?", "completion": CHOICES[i % 4], **fields} for i in range(count)]


@pytest.fixture(scope="module")
def model(tiny_llama, tiny_tokenizer):
    """A random model with some noise on its weights, so that it prefers different choices to different prompts."""
    return stirred(tiny_llama(vocab_size=len(tiny_tokenizer)))


def loop_log_probs(model, tokenizer, prompt: str, choice: str) -> list[float]:
    """Log-probabilities of the tokens of a choice and of the end of its turn, one after the other."""
    before = tokenizer(f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    after = tokenizer(f"{choice}<|im_end|>\n")["input_ids"]
    ids = (before + after)[-model.config.max_position_embeddings :]
    with torch.no_grad():
        log_probs_TV = model.eval()(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return [log_probs_TV[at - 1, ids[at]].item() for at in range(len(ids) - len(after), len(ids))]


def loop_predictions(model, tokenizer, prompts: Sequence[str], *, normalised: bool = True) -> list[str]:
    predictions = []
    for prompt in prompts:
        scores = {}
        for choice in sorted(CHOICES):
            log_probs = loop_log_probs(model, tokenizer, prompt, choice)
            scores[choice] = sum(log_probs) / (len(log_probs) if normalised else 1)
        predictions.append(max(scores, key=lambda choice: scores[choice]))
    return predictions


def test_the_prediction_is_the_choice_with_the_highest_mean_log_probability_and_not_sum(model, tiny_tokenizer):
    rows = question_rows()
    prompts = [row["prompt"] for row in rows]
    expected = loop_predictions(model, tiny_tokenizer, prompts)
    assert loop_predictions(model, tiny_tokenizer, prompts, normalised=False) != expected
    assert len(set(expected)) > 1
    result = multiple_choice(model, tiny_tokenizer, tokenized_of(tiny_tokenizer, rows), num_samples=12)
    assert [sample.prediction for sample in result.samples] == expected
    num_right = sum(one == row["completion"] for one, row in zip(expected, rows, strict=True))
    assert (result.score, result.count) == (num_right / 12, 12) and 0 < num_right < 12
    wrong = [row | {"completion": CHOICES[CHOICES.index(one) - 1]} for one, row in zip(expected, rows, strict=True)]
    wrong += [{"prompt": "?", "completion": choice} for choice in CHOICES]  # so that all choices stay choices
    some_right = multiple_choice(model, tiny_tokenizer, tokenized_of(tiny_tokenizer, wrong)).score
    assert some_right <= 4 / 16


def test_the_batch_size_does_not_matter_and_the_samples_are_the_first(model, tiny_tokenizer):
    tokenized = tokenized_of(tiny_tokenizer, question_rows())
    whole = multiple_choice(model, tiny_tokenizer, tokenized, num_samples=12)
    for batch_size in (1, 5):
        assert multiple_choice(model, tiny_tokenizer, tokenized, num_samples=12, batch_size=batch_size) == whole
    few = multiple_choice(model, tiny_tokenizer, tokenized, num_samples=2)
    assert few.samples == whole.samples[:2] and few.score == whole.score
    assert few.samples[1].reference == "apples"
    assert few.samples[1].prompt == "<|im_start|>user\nAnn has 1?<|im_end|>\n<|im_start|>assistant\n"


def test_a_tie_goes_to_the_choice_that_stands_first(tiny_llama, tiny_tokenizer):
    indifferent = tiny_llama(vocab_size=len(tiny_tokenizer))
    torch.nn.init.zeros_(indifferent.model.norm.weight)  # every token has the same probability
    result = multiple_choice(indifferent, tiny_tokenizer, tokenized_of(tiny_tokenizer, question_rows()))
    assert {sample.prediction for sample in result.samples} == {"12"}  # the first in alphabetical order
    assert result.score == 3 / 12
    given = tokenized_of(tiny_tokenizer, question_rows(choices=CHOICES))
    assert {one.prediction for one in multiple_choice(indifferent, tiny_tokenizer, given).samples} == {"Ann"}


def test_the_choices_of_a_row_are_the_only_ones_for_it(model, tiny_tokenizer):
    rows = [row | {"choices": [row["completion"], "zzz"]} for row in question_rows()]
    tokenized = tokenized_of(tiny_tokenizer, rows)
    assert find_choices(tokenized.examples) == [(row["completion"], "zzz") for row in rows]
    result = multiple_choice(model, tiny_tokenizer, tokenized, num_samples=12)
    for sample, row in zip(result.samples, rows, strict=True):
        assert sample.prediction in row["choices"]


def test_without_choices_the_completions_of_the_same_template_serve(tiny_tokenizer):
    rows = [
        {"prompt": "1", "completion": "yes ", "template": "a"},
        {"prompt": "2", "completion": "no", "template": "a"},
        {"prompt": "3", "completion": "yes", "template": "a"},
        {"prompt": "4", "completion": "up", "template": "b"},
        {"prompt": "5", "completion": "down", "template": "b"},
        {"prompt": "6", "completion": "up", "template": "b", "choices": ["up", "left"]},
        {"prompt": "7", "completion": "one"},
        {"prompt": "8", "completion": "two"},
    ]
    assert find_choices(tokenized_of(tiny_tokenizer, rows).examples) == [
        *[("no", "yes")] * 3,
        *[("down", "up")] * 2,
        ("up", "left"),
        *[("one", "two")] * 2,
    ]


@pytest.mark.parametrize("count", [1, MAX_GROUP_CHOICES + 1])
def test_too_few_or_too_many_completions_are_an_error_that_says_how_to_give_choices(count: int, tiny_tokenizer):
    rows = [{"prompt": "?", "completion": str(i), "template": "digits"} for i in range(count)]
    with pytest.raises(DataError) as caught:
        find_choices(tokenized_of(tiny_tokenizer, rows).examples)
    assert f"template 'digits' have {count} distinct completions" in caught.value.what
    assert "field choices" in caught.value.remedy
    enough = [{"prompt": "?", "completion": str(i), "template": "digits"} for i in range(MAX_GROUP_CHOICES)]
    assert {len(choices) for choices in find_choices(tokenized_of(tiny_tokenizer, enough).examples)} == {16}


@pytest.mark.parametrize(
    ("choices", "complaint"),
    [
        ("yes", "not a list of texts"),
        ([1, 2], "not a list of texts"),
        (["yes", " "], "not a list of texts"),
        ([], "fewer than two distinct"),
        (["yes", " yes"], "fewer than two distinct"),
        (["no", "maybe"], "'yes' is not among its choices"),
    ],
)
def test_wrong_choices_are_an_error_that_names_the_row(choices: object, complaint: str, tiny_tokenizer):
    rows = [{"prompt": "?", "completion": "yes", "choices": ["yes", "no"]}] * 2
    rows += [{"prompt": "?", "completion": "yes", "choices": choices}]
    with pytest.raises(DataError, match=f"made_here, line 3.*{complaint}"):
        find_choices(tokenized_of(tiny_tokenizer, rows).examples)
    assert len(find_choices(tokenized_of(tiny_tokenizer, rows[:2]).examples)) == 2


def test_of_a_conversation_only_the_last_answer_is_scored(model, tiny_tokenizer):
    long = "How many apples? " * 8  # if it counted, it would weigh down the mean, and the sum would decide
    earlier = [{"role": "user", "content": "Ann?"}, {"role": "assistant", "content": long}]
    rows = [
        {
            "messages": [
                *earlier,
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"]},
            ]
        }
        for row in question_rows()
    ]
    turns = f"Ann?<|im_end|>\n<|im_start|>assistant\n{long}<|im_end|>\n<|im_start|>user\n"
    expected = loop_predictions(model, tiny_tokenizer, [f"{turns}{row['prompt']}" for row in question_rows()])
    result = multiple_choice(model, tiny_tokenizer, tokenized_of(tiny_tokenizer, rows), num_samples=12)
    assert [sample.prediction for sample in result.samples] == expected


def test_a_prompt_too_long_for_the_context_loses_its_beginning(model, tiny_tokenizer):
    prompts = [f"Ann has {i} apples " * 100 + "?" for i in range(4)]
    rows = [{"prompt": prompt, "completion": choice} for prompt, choice in zip(prompts, CHOICES, strict=True)]
    tokenized = tokenized_of(tiny_tokenizer, rows, max_length=4096)
    assert min(len(example.prompt_ids) for example in tokenized.examples) > 512
    result = multiple_choice(model, tiny_tokenizer, tokenized, num_samples=4)
    assert [one.prediction for one in result.samples] == loop_predictions(model, tiny_tokenizer, prompts)


def test_a_choice_too_long_for_the_context_is_an_error(model, tiny_tokenizer):
    rows = [{"prompt": "?", "completion": "Ann", "choices": ["Ann", "zq" * 300]}]
    with pytest.raises(DataError, match=r"made_here, line 1: a choice of .* leaves no room"):
        multiple_choice(model, tiny_tokenizer, tokenized_of(tiny_tokenizer, rows))


def test_an_empty_completion_cannot_be_chosen_and_is_an_error(model, tiny_tokenizer):
    rows = [{"prompt": "?", "completion": "Ann"}, {"prompt": "?", "completion": ""}]
    tokenized = tokenized_of(tiny_tokenizer, rows, completion_only_loss=False)
    assert len(tokenized.examples) == 2
    with pytest.raises(DataError, match="completion is empty"):
        multiple_choice(model, tiny_tokenizer, tokenized)


def test_a_broken_model_is_an_error_and_not_an_accuracy(tiny_llama, tiny_tokenizer):
    broken = tiny_llama(vocab_size=len(tiny_tokenizer))
    broken.model.norm.weight.data[0] = math.nan
    with pytest.raises(TrainingError, match="not finite"):
        multiple_choice(broken, tiny_tokenizer, tokenized_of(tiny_tokenizer, question_rows()))


@pytest.mark.shared
def test_real_questions_have_the_choices_of_their_template(shared_dir: Path, tiny_base: LoadedModel):
    rows = load_rows(str(shared_dir / "data/t0/glue_qqp.test.jsonl"), split="test")[:32]
    questions = tokenized(rows, tiny_base.tokenizer)
    assert {len(choices) for choices in find_choices(questions.examples)} == {2}
    result = multiple_choice(tiny_base.model, tiny_base.tokenizer, questions)
    assert result.count == 32 and 0 < result.score < 1
