"""Claims about formats, templates, token ids and labels."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from transformers import PreTrainedTokenizerFast as Tokenizer

from parablock.data.prompts import (
    IGNORED_LABEL,
    Example,
    detect_format,
    find_stop_token_ids,
    replace_completion,
)
from parablock.data.sources import Row, load_rows
from parablock.errors import DataError, ModelError
from tokens import tokenized

TURN_END = "<|im_end|>"
FORMAT_ROWS: dict[str, dict[str, Any]] = {
    "messages": {
        "messages": [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Twelve."}]
    },
    "sharegpt": {"conversations": [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": "Twelve."}]},
    "prompt_completion": {"prompt": "How many?", "completion": "Twelve."},
    "alpaca": {"instruction": "Count.", "input": "1 2 3", "output": "Three."},
    "input_output": {"input": "How many?", "output": "Twelve."},
    "gsm8k": {"question": "How many?", "answer": "Ann has 12.\n#### 12"},
    "text": {"text": "Ann has 12 apples."},
}
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Yes, one."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "No, two."},
]


def a_row(fields: dict[str, Any], line: int = 1) -> Row:
    return Row(fields, "set.jsonl", line)


def one(fields: dict[str, Any], tokenizer: Tokenizer, **options: Any) -> Example:
    (example,) = tokenized([a_row(fields)], tokenizer, **options).examples
    return example


def texts_of(example: Example, tokenizer: Tokenizer) -> tuple[str, list[str]]:
    """The whole text, and each stretch of it that the loss counts."""
    stretches: list[list[int]] = []
    before = IGNORED_LABEL
    for label in example.labels:
        if label != IGNORED_LABEL:
            stretches += [[]] if before == IGNORED_LABEL else []
            stretches[-1].append(label)
        before = label
    return tokenizer.decode(example.input_ids), [tokenizer.decode(ids) for ids in stretches]


@pytest.fixture
def with_template(tiny_tokenizer: Tokenizer) -> Any:
    def make(template: str | None) -> Tokenizer:
        tokenizer = copy.deepcopy(tiny_tokenizer)
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.fixture
def plain_tokenizer(with_template: Any) -> Tokenizer:
    return with_template(None)


@pytest.fixture
def bos_tokenizer(plain_tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer that opens every text with a token of its own, as Llama's does."""
    from tokenizers.processors import TemplateProcessing

    plain_tokenizer.add_special_tokens({"bos_token": "<s>"})
    plain_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", plain_tokenizer.bos_token_id)]
    )
    assert plain_tokenizer("a")["input_ids"][0] == plain_tokenizer.bos_token_id
    return plain_tokenizer


# Formats


@pytest.mark.parametrize("data_format", FORMAT_ROWS)
def test_a_format_is_detected_by_its_fields(data_format: str):
    assert detect_format([a_row({**FORMAT_ROWS[data_format], "template": "extra"})]) == data_format


def test_a_text_field_beside_another_format_and_a_null_field_do_not_count():
    assert detect_format([a_row({**FORMAT_ROWS["alpaca"], "text": "rendered", "messages": None})]) == "alpaca"


def test_mixed_formats_name_both_rows_and_their_fields():
    with pytest.raises(DataError) as caught:
        detect_format([a_row(FORMAT_ROWS["gsm8k"], 1), a_row(FORMAT_ROWS["gsm8k"], 2), a_row({"text": "a"}, 3)])
    assert "set.jsonl, line 3 has the format text (fields text)" in str(caught.value)
    assert "set.jsonl, line 1 has gsm8k (fields question, answer)" in str(caught.value)


def test_sources_may_have_different_formats_and_each_is_read_in_its_own(tiny_tokenizer: Tokenizer):
    sites = [
        Row(FORMAT_ROWS[name], f"{name}.jsonl", 1) for name in ("gsm8k", "alpaca", "text", "messages", "gsm8k")
    ]
    together = tokenized(sites, tiny_tokenizer)
    apart = [one(site.fields, tiny_tokenizer) for site in sites]
    assert [example.input_ids for example in together.examples] == [example.input_ids for example in apart]
    assert [example.row.source for example in together.examples] == [site.source for site in sites]
    assert (together.data_format, tokenized(sites[:1], tiny_tokenizer).data_format) == ("auto", "gsm8k")
    assert "mixed formats: 5 examples" in together.summary()
    with pytest.raises(DataError, match="has the format text"):
        tokenized([sites[0], Row(FORMAT_ROWS["text"], sites[0].source, 2)], tiny_tokenizer)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"question": "q", "reply": "a"}, "fits no known format: it has the fields question, reply"),
        ({}, "fits no known format: it has the fields (none)"),
        ({**FORMAT_ROWS["gsm8k"], **FORMAT_ROWS["alpaca"]}, "fits more than one format (alpaca, gsm8k)"),
    ],
)
def test_an_unknown_or_ambiguous_row_names_place_fields_and_needs(fields: dict[str, Any], problem: str):
    with pytest.raises(DataError) as caught:
        detect_format([a_row(FORMAT_ROWS["gsm8k"]), a_row(fields, 2)])
    assert f"set.jsonl, line 2 {problem}" in str(caught.value)
    assert "prompt_completion: prompt, completion; alpaca: instruction, output" in str(caught.value)


def test_a_set_format_settles_what_auto_cannot(tiny_tokenizer: Tokenizer):
    both = {**FORMAT_ROWS["gsm8k"], **FORMAT_ROWS["prompt_completion"]}
    assert one(both, tiny_tokenizer, data_format="gsm8k").completion == "Ann has 12.\n#### 12"
    assert one(both, tiny_tokenizer, data_format="prompt_completion").completion == "Twelve."


@pytest.mark.parametrize(
    ("data_format", "fields", "problem"),
    [
        ("gsm8k", {"question": "q"}, "has no value in field answer, which the format gsm8k needs"),
        ("alpaca", {"instruction": "i", "output": None}, "has no value in field output"),
        ("alpaca", {"instruction": "i", "output": "o", "input": 3}, "field input is of type int, not text"),
        ("prompt_completion", {"prompt": "p", "completion": 4}, "field completion is of type int, not text"),
        ("text", {"prompt": "p"}, "has no value in field text, which the format text needs"),
        ("messages", {"text": "t"}, "has no value in field messages"),
        ("messages", {"messages": "hello"}, "messages is of type str, not a list"),
        ("messages", {"messages": []}, "messages is an empty list"),
        ("messages", {"messages": [CONVERSATION[1], {"role": "assistant"}]}, "turn 2 of messages has no "),
        ("messages", {"messages": [CONVERSATION[1], "Yes."]}, "turn 2 of messages is of type str, not an object"),
        (
            "messages",
            {"messages": [{"role": "narrator", "content": "a"}]},
            "turn 1 of messages has the unknown role",
        ),
    ],
)
def test_a_row_that_does_not_fit_its_format_is_named(
    tiny_tokenizer: Tokenizer, data_format: str, fields: dict[str, Any], problem: str
):
    with pytest.raises(DataError) as caught:
        tokenized([a_row(FORMAT_ROWS[data_format]), a_row(fields, 7)], tiny_tokenizer, data_format)
    assert "set.jsonl, line 7" in str(caught.value)
    assert problem in str(caught.value)


def test_an_unknown_format_and_no_rows_are_errors(tiny_tokenizer: Tokenizer):
    with pytest.raises(DataError, match="Unknown format 'dolly'"):
        tokenized([a_row({"text": "a"})], tiny_tokenizer, "dolly")
    with pytest.raises(DataError, match="no rows"):
        tokenized([], tiny_tokenizer)


# Rendering, with a chat template and without


@pytest.mark.parametrize(
    ("data_format", "prompt", "plain", "completion"),
    [
        ("messages", "How many?", "User: How many?\nAssistant:", "Twelve."),
        ("prompt_completion", "How many?", "How many?", "Twelve."),
        ("alpaca", "Count.\n\n1 2 3", "Instruction: Count.\n\n1 2 3\nResponse:", "Three."),
        ("gsm8k", "How many?", "Question: How many?\nAnswer:", "Ann has 12.\n#### 12"),
    ],
)
def test_a_conversation_is_rendered_by_the_chat_template_or_else_with_plain_headings_and_the_eos_token(
    tiny_tokenizer: Tokenizer,
    plain_tokenizer: Tokenizer,
    data_format: str,
    prompt: str,
    plain: str,
    completion: str,
):
    before = f"<|im_start|>user\n{prompt}{TURN_END}\n<|im_start|>assistant\n"
    for tokenizer, opening, counted in (
        (tiny_tokenizer, before, f"{completion}{TURN_END}\n"),
        (plain_tokenizer, plain, f" {completion}<|endoftext|>"),
    ):
        example = one(FORMAT_ROWS[data_format], tokenizer)
        assert texts_of(example, tokenizer) == (f"{opening}{counted}", [counted])
        assert tokenizer.decode(example.prompt_ids) == opening
        assert example.completion == completion


@pytest.mark.parametrize("missing", [{}, {"input": ""}, {"input": None}, {"input": float("nan")}])
def test_alpaca_without_input_leaves_no_trace_of_it(
    plain_tokenizer: Tokenizer, tiny_tokenizer: Tokenizer, missing: dict[str, Any]
):
    fields = {"instruction": "Count.", "output": "Three.", **missing}
    assert plain_tokenizer.decode(one(fields, plain_tokenizer).prompt_ids) == "Instruction: Count.\nResponse:"
    assert "Count.<|im_end|>" in tiny_tokenizer.decode(one(fields, tiny_tokenizer).prompt_ids)


@pytest.mark.parametrize(
    ("prompt", "completion", "text"),
    [("a", "b", "a b"), ("a\n", "b", "a\nb"), ("a ", "b", "a b"), ("a", "\nb", "a\nb"), ("", "b", "b")],
)
def test_one_space_parts_prompt_and_completion_unless_there_is_white_space(
    plain_tokenizer: Tokenizer, prompt: str, completion: str, text: str
):
    example = one({"prompt": prompt, "completion": completion}, plain_tokenizer)
    assert plain_tokenizer.decode(example.input_ids) == text + "<|endoftext|>"


def test_the_loss_of_a_text_counts_every_token_and_uses_no_template(tiny_tokenizer: Tokenizer):
    example = one(FORMAT_ROWS["text"], tiny_tokenizer)
    assert tiny_tokenizer.decode(example.input_ids) == "Ann has 12 apples.<|endoftext|>"
    assert example.labels == example.input_ids
    assert example.prompt_ids == ()
    assert example.num_target_tokens == len(example.input_ids) - 1


def test_the_loss_of_a_conversation_counts_every_assistant_turn(
    tiny_tokenizer: Tokenizer, plain_tokenizer: Tokenizer
):
    example = one({"messages": CONVERSATION}, tiny_tokenizer)
    whole, counted = texts_of(example, tiny_tokenizer)
    assert whole == tiny_tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    assert counted == [f"Yes, one.{TURN_END}\n", f"No, two.{TURN_END}\n"]
    assert tiny_tokenizer.decode(example.prompt_ids) == whole.removesuffix(f"No, two.{TURN_END}\n")
    assert example.completion == "No, two."
    whole, counted = texts_of(one({"messages": CONVERSATION}, plain_tokenizer), plain_tokenizer)
    assert whole == (
        "System: Be brief.\nUser: One?\nAssistant: Yes, one.<|endoftext|>"
        "\nUser: Two?\nAssistant: No, two.<|endoftext|>"
    )
    assert counted == [" Yes, one.<|endoftext|>", " No, two.<|endoftext|>"]


@pytest.mark.parametrize("which", ["tiny_tokenizer", "plain_tokenizer"])
def test_an_empty_assistant_turn_and_a_last_user_turn_are_not_counted(request: pytest.FixtureRequest, which: str):
    tokenizer = request.getfixturevalue(which)
    turns = [*CONVERSATION[:3], CONVERSATION[3], {"role": "assistant", "content": " "}, CONVERSATION[1]]
    example = one({"messages": turns}, tokenizer)
    counted = texts_of(example, tokenizer)[1]
    assert len(counted) == 1
    assert counted[0].strip().startswith("Yes, one.")
    assert example.completion == "Yes, one."


def test_completion_only_loss_false_counts_the_same_ids_in_full(tiny_tokenizer: Tokenizer):
    masked = one(FORMAT_ROWS["gsm8k"], tiny_tokenizer)
    full = one(FORMAT_ROWS["gsm8k"], tiny_tokenizer, completion_only_loss=False)
    assert full.input_ids == masked.input_ids
    assert full.prompt_ids == masked.prompt_ids
    assert full.labels == full.input_ids
    assert masked.labels[: len(masked.prompt_ids)] == (IGNORED_LABEL,) * len(masked.prompt_ids)
    assert masked.labels[len(masked.prompt_ids) :] == masked.input_ids[len(masked.prompt_ids) :]


def test_template_tokens_inside_a_completion_do_not_move_the_mask(tiny_tokenizer: Tokenizer):
    """A search for the assistant's heading among the ids would find the wrong one here."""
    quoted = "It writes <|im_start|>assistant\nand then stops."
    example = one({"prompt": quoted, "completion": quoted}, tiny_tokenizer)
    assert texts_of(example, tiny_tokenizer)[1] == [f"{quoted}{TURN_END}\n"]


@pytest.mark.parametrize(("ending", "falls_into_a_token"), [(" has", False), (" app", True)])
def test_generation_starts_from_the_ids_that_training_saw(
    with_template: Any, ending: str, falls_into_a_token: bool
):
    """The tokenizer knows ` apples` as one token: a cut before `les` falls into it, a cut before ` apples` not."""
    tokenizer = with_template(
        "{% for m in messages %}{{ 'ENDING' if m.role == 'assistant' }}{{ m.content }}{% endfor %}"
        "{{ 'ENDING' if add_generation_prompt }}".replace("ENDING", ending)
    )
    example = one({"prompt": "Ann", "completion": "les" if falls_into_a_token else " apples"}, tokenizer)
    length = len(example.prompt_ids)
    assert list(example.prompt_ids) == tokenizer(f"Ann{ending}")["input_ids"]
    assert example.input_ids[:length] == example.prompt_ids
    assert example.labels == (IGNORED_LABEL,) * length + example.input_ids[length:]
    as_a_whole = tokenizer(tokenizer.decode(example.input_ids))["input_ids"]
    assert (list(example.input_ids) == as_a_whole) is not falls_into_a_token


# The opening and the closing token


def test_a_tokenizer_that_opens_texts_opens_each_example_once(plain_tokenizer: Tokenizer, bos_tokenizer: Tokenizer):
    bos = bos_tokenizer.bos_token_id
    for data_format, fields in FORMAT_ROWS.items():
        ids = one(fields, bos_tokenizer, data_format=data_format).input_ids
        assert ids[0] == bos, data_format
        assert ids.count(bos) == 1, data_format
    assert one(FORMAT_ROWS["text"], bos_tokenizer).prompt_ids == (bos,)
    bos_tokenizer.chat_template = (
        "<s>{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
        + ("{% if add_generation_prompt %}assistant: {% endif %}")
    )
    ids = one(FORMAT_ROWS["gsm8k"], bos_tokenizer).input_ids
    assert ids[0] == bos
    assert ids.count(bos) == 1


def test_a_template_that_does_not_end_a_turn_gets_the_eos_token(with_template: Any):
    body = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer = with_template(body + "{% if add_generation_prompt %}assistant: {% endif %}")
    assert texts_of(one(FORMAT_ROWS["gsm8k"], tokenizer), tokenizer)[1] == ["Ann has 12.\n#### 12\n<|endoftext|>"]


def test_a_tokenizer_without_eos_is_an_error(plain_tokenizer: Tokenizer):
    plain_tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        tokenized([a_row({"text": "a"})], plain_tokenizer)


def test_generation_stops_at_the_end_of_a_turn_and_of_the_text(
    tiny_tokenizer: Tokenizer, plain_tokenizer: Tokenizer
):
    end_of_turn = tiny_tokenizer.convert_tokens_to_ids(TURN_END)
    assert find_stop_token_ids(tiny_tokenizer) == (tiny_tokenizer.eos_token_id, end_of_turn)
    assert find_stop_token_ids(plain_tokenizer) == (plain_tokenizer.eos_token_id,)


# Templates that change what they wrote before

OPENER = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def test_a_template_that_closes_the_whole_conversation_can_be_cut(with_template: Any):
    tokenizer = with_template(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}{{ eos_token }}{% endif %}"
    )
    counted = texts_of(one({"messages": CONVERSATION}, tokenizer), tokenizer)[1]
    assert counted == [f"Yes, one.{TURN_END}\n", f"No, two.{TURN_END}\n<|endoftext|>"]


def test_a_template_that_frames_only_the_last_turn_can_be_cut(with_template: Any):
    tokenizer = with_template(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last and m.role == 'assistant' %}"
        "[thought]\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}" + OPENER
    )
    counted = texts_of(one({"messages": CONVERSATION}, tokenizer), tokenizer)[1]
    assert counted == [f"Yes, one.{TURN_END}\n", f"[thought]\n\nNo, two.{TURN_END}\n"]


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages | length }} turns{% for m in messages %}{{ m.content }}{% endfor %}" + OPENER,
        "{% for m in messages %}{{ m.role }} {{ m.content if loop.last else '> ' + m.content }}{% endfor %}",
    ],
)
def test_a_template_whose_prefix_is_no_prefix_is_an_error(with_template: Any, template: str):
    with pytest.raises(
        DataError, match=r"set.jsonl, line 1: the chat template renders the conversation up to turn \d"
    ):
        one({"messages": CONVERSATION}, with_template(template))


def test_a_conversation_that_the_template_refuses_is_named(with_template: Any):
    tokenizer = with_template(
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    )
    with pytest.raises(DataError, match=r"set.jsonl, line 1: .* \(system, user, .*System role not supported"):
        one({"messages": CONVERSATION}, tokenizer)
    assert one({"messages": CONVERSATION[1:]}, tokenizer).completion == "No, two."


# Truncation, skipped rows, summary


def test_max_length_cuts_the_right_end_and_only_of_longer_examples(tiny_tokenizer: Tokenizer):
    whole = one(FORMAT_ROWS["gsm8k"], tiny_tokenizer)
    length = len(whole.input_ids)
    same = one(FORMAT_ROWS["gsm8k"], tiny_tokenizer, max_length=length)
    cut = one(FORMAT_ROWS["gsm8k"], tiny_tokenizer, max_length=length - 1)
    assert same == whole
    assert not same.is_truncated
    assert (cut.input_ids, cut.labels) == (whole.input_ids[:-1], whole.labels[:-1])
    assert cut.prompt_ids == whole.prompt_ids
    assert cut.is_truncated


def test_a_row_whose_labels_are_all_masked_is_skipped_with_a_reason(tiny_tokenizer: Tokenizer):
    short = one(FORMAT_ROWS["prompt_completion"], tiny_tokenizer)
    max_length = len(short.input_ids)
    rows = [
        a_row(FORMAT_ROWS["prompt_completion"], 1),
        a_row({"prompt": "How many? " * 20, "completion": "Twelve."}, 2),
        a_row({"prompt": "How many?", "completion": " \n"}, 3),
    ]
    result = tokenized(rows, tiny_tokenizer, max_length=max_length)
    assert [example.row.line for example in result.examples] == [1]
    assert [(item.row.line, item.reason) for item in result.skipped] == [
        (2, f"the prompt alone fills max_length {max_length}"),
        (3, "the completion is empty"),
    ]
    counted_in_full = tokenized(rows, tiny_tokenizer, max_length=max_length, completion_only_loss=False)
    assert len(counted_in_full.examples) == 3


def test_one_more_token_than_the_prompt_is_enough_and_the_prompt_is_not(tiny_tokenizer: Tokenizer):
    prompt_length = len(one(FORMAT_ROWS["gsm8k"], tiny_tokenizer).prompt_ids)
    assert one(FORMAT_ROWS["gsm8k"], tiny_tokenizer, max_length=prompt_length + 1).num_target_tokens == 1
    with pytest.raises(DataError, match="None of 1 row has anything to train on: 1 because the prompt alone fills"):
        one(FORMAT_ROWS["gsm8k"], tiny_tokenizer, max_length=prompt_length)


# Other completions


@pytest.mark.parametrize("data_format", [name for name in FORMAT_ROWS if name != "text"])
def test_another_completion_stands_behind_the_same_prompt(tiny_tokenizer: Tokenizer, data_format: str):
    row = a_row(FORMAT_ROWS[data_format])
    other = replace_completion(row, "None.", data_format=data_format)
    (first, second) = tokenized([row, other], tiny_tokenizer).examples
    assert second.prompt_ids == first.prompt_ids
    assert second.completion == "None."
    assert first.completion != "None."
    assert texts_of(second, tiny_tokenizer)[1] == [f"None.{TURN_END}\n"]


# Real text


@pytest.mark.shared
def test_the_real_sets_tokenize_with_the_real_template(shared_dir: Path):
    tokenizer = AutoTokenizer.from_pretrained(shared_dir / "models/tiny-base")
    for path, data_format in [("gsm8k/test", "gsm8k"), ("t0/ag_news.test", "prompt_completion")]:
        rows = load_rows(str(shared_dir / f"data/{path}.jsonl"), split="test")
        result = tokenized(rows, tokenizer, max_length=1024)
        assert result.data_format == data_format
        assert not result.skipped
        assert len(result.examples) == len(rows)
        for example in result.examples:
            turns = [
                {"role": "user", "content": next(iter(example.row.fields.values()))},
                {"role": "assistant", "content": example.completion},
            ]
            whole = tokenizer.apply_chat_template(turns, tokenize=False)
            assert list(example.input_ids) == tokenizer(whole, add_special_tokens=False)["input_ids"]
            assert (
                tokenizer.decode(example.input_ids[len(example.prompt_ids) :])
                == example.completion + "<|im_end|>\n"
            )
