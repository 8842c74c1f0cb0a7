"""What a chat template makes of tools, reasoning, weights and days, and the templates of models that have none."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast as Tokenizer

from parablock.data.prompts import IGNORED_LABEL, Tokenized
from parablock.data.sources import Row
from parablock.data.templates import plain_template
from parablock.errors import DataError
from tokens import tokenized

USER, ANSWER = {"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Twelve."}
CALLING = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}]}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "12"}
WITH_TOOLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}"
    "<call>{{ c.function.name }}({{ c.function.arguments | tojson }})</call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def with_template(tokenizer: Tokenizer, template: str | None) -> Tokenizer:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def one(turns: list[dict[str, Any]], tokenizer: Tokenizer, **fields: Any) -> Tokenized:
    return tokenized([Row({"messages": turns, **fields}, "set.jsonl", 3)], tokenizer, max_length=512)


def learnt(result: Tokenized, tokenizer: Tokenizer) -> str:
    (example,) = result.examples
    return tokenizer.decode([label for label in example.labels if label != IGNORED_LABEL])


def test_a_call_of_a_tool_is_learnt_where_the_template_writes_it(tiny_tokenizer: Tokenizer):
    tokenizer = with_template(tiny_tokenizer, WITH_TOOLS)
    result = one([USER, CALLING, RESULT, ANSWER], tokenizer, tools=[{"name": "f"}])
    assert learnt(result, tokenizer) == '<call>f({"a": 1})</call><|im_end|>\nTwelve.<|im_end|>\n'
    assert tokenizer.decode(result.examples[0].input_ids).startswith('[{"name": "f"}]<|im_start|>user')
    assert dict(result.unused) == {"tool_call_id of tool turns, which the chat template does not write": 1}


def test_a_call_that_the_template_does_not_write_is_refused(tiny_tokenizer: Tokenizer):
    with pytest.raises(DataError, match=r"set.jsonl, line 3: turn 2 calls a tool .* does not write call 1 of it"):
        one([USER, CALLING, RESULT, ANSWER], tiny_tokenizer)


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_learnt_where_the_template_writes_it_and_said_where_not(tiny_tokenizer: Tokenizer, name: str):
    tokenizer = with_template(tiny_tokenizer, WITH_TOOLS)
    turns = [USER, {**ANSWER, name: "Ann has 12."}]
    result = one(turns, tokenizer)
    assert learnt(result, tokenizer) == "<think>Ann has 12.</think>Twelve.<|im_end|>\n"
    assert not result.unused
    left_out = one(turns, tiny_tokenizer)
    assert learnt(left_out, tiny_tokenizer) == "Twelve.<|im_end|>\n"
    assert dict(left_out.unused) == {"reasoning of turns, which the chat template does not write": 1}


def test_what_is_not_used_is_counted_by_name(tiny_tokenizer: Tokenizer):
    turns = [{**USER, "name": "Ann"}, ANSWER]
    result = one(turns, tiny_tokenizer, tools=[{"name": "f"}], id=7, text="…", nothing=None)
    assert dict(result.unused) == {
        "field id": 1,
        "field text": 1,
        "name of user turns, which the chat template does not write": 1,
        "tools, which the chat template does not write": 1,
    }


def said_by(turns: list[dict[str, Any]], tokenizer: Tokenizer) -> str:
    with pytest.raises(DataError) as caught:
        one(turns, tokenizer)
    assert "set.jsonl, line 3" in str(caught.value)
    return f"{caught.value} {caught.value.remedy}"


NO_OTHER_ROLES = (
    "{% for m in messages %}{% if m.role in ('user', 'assistant') %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_turns_that_the_template_does_not_write_are_counted_by_role(tiny_tokenizer: Tokenizer):
    turns = [{"role": "system", "content": "a"}, USER, {**ANSWER, "content": "a"}, RESULT, ANSWER]
    left_out = one(turns, with_template(tiny_tokenizer, NO_OTHER_ROLES))
    assert [name for name in left_out.unused if "_id" not in name] == [
        "system turns, which the chat template does not write",
        "tool turns, which the chat template does not write",
    ]
    written = one(turns, with_template(tiny_tokenizer, WITH_TOOLS))
    assert [name for name in written.unused if "_id" not in name] == []


def test_what_stands_in_a_row_by_chance_is_not_taken_for_a_turn(tiny_tokenizer: Tokenizer):
    rows = [
        Row({"messages": [{"role": "system", "content": text}, USER, ANSWER]}, "set.jsonl", 1)
        for text in ("Twelve.", "How many?", "Be brief.")
    ]
    result = tokenized(rows, with_template(tiny_tokenizer, NO_OTHER_ROLES), max_length=512)
    assert dict(result.unused) == {"system turns, which the chat template does not write": 3}


ONE_CALL = WITH_TOOLS.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]")
CALLS_ALONE = WITH_TOOLS.replace("{{ m.content }}", "{% if not m.tool_calls %}{{ m.content }}{% endif %}")
NO_ARGUMENTS = WITH_TOOLS.replace("{{ c.function.arguments | tojson }}", "")


@pytest.mark.parametrize(
    ("template", "turn", "words"),
    [
        (ONE_CALL, {**CALLING, "tool_calls": CALLING["tool_calls"] * 2}, "does not write call 2 of it ('f')"),
        (NO_ARGUMENTS, CALLING, "does not write call 1 of it ('f')"),
        (
            CALLS_ALONE,
            {**CALLING, "content": "I look."},
            "does not write the content of it as it stands ('I look.')",
        ),
        (
            WITH_TOOLS.replace("m.content", "m.content | replace('not ', '')"),
            {**ANSWER, "content": "It is not 12."},
            "does not write a part of the content of it as it stands ('It is not 12.')",
        ),
    ],
)
def test_a_learnt_turn_of_which_the_template_drops_a_part_is_refused(
    tiny_tokenizer: Tokenizer, template: str, turn: dict[str, Any], words: str
):
    assert words in said_by([USER, turn], with_template(tiny_tokenizer, template))
    whole = learnt(one([USER, turn], with_template(tiny_tokenizer, WITH_TOOLS)), tiny_tokenizer)
    assert turn["content"] in whole
    assert whole.count("<call>f(") == len(turn.get("tool_calls", ()))


def test_a_turn_that_is_not_learnt_may_be_written_in_part(tiny_tokenizer: Tokenizer):
    turns = [USER, {**CALLING, "content": "I look.", "weight": 0}, ANSWER]
    result = one(turns, with_template(tiny_tokenizer, CALLS_ALONE))
    assert dict(result.unused) == {"the content of assistant turns, which the chat template does not write": 1}
    silent = one(turns, with_template(tiny_tokenizer, NO_ARGUMENTS))
    assert learnt(silent, tiny_tokenizer) == "Twelve.<|im_end|>\n"
    assert dict(silent.unused) == {"calls of assistant turns, which the chat template does not write": 1}


LAST_REASONING = WITH_TOOLS.replace(
    "{% if m.reasoning_content %}", "{% if loop.last and m.reasoning_content %}"
).replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] | trim }}")


def test_reasoning_that_only_some_turns_keep_is_counted(tiny_tokenizer: Tokenizer):
    tokenizer = with_template(tiny_tokenizer, LAST_REASONING)
    turns = [USER, {**ANSWER, "thinking": "One."}, USER, {**ANSWER, "thinking": "Two."}]
    assert dict(one(turns, tokenizer).unused) == {"reasoning of turns, which the chat template does not write": 1}
    assert not one(turns[2:], tokenizer).unused
    inside = one([USER, {**ANSWER, "content": "<think>Hm.</think>Twelve."}], tokenizer)
    assert dict(inside.unused) == {"reasoning in the content of turns, which the chat template takes out": 1}
    assert learnt(inside, tokenizer) == "Twelve.<|im_end|>\n"


def test_reasoning_is_kept_where_a_result_of_a_tool_is_told_by_its_text(tiny_tokenizer: Tokenizer):
    asks = "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' and not "
    asks += "(m.content.startswith('<tool_response>') and m.content.endswith('</tool_response>')) %}"
    asks += "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    since = "{% if loop.index0 > ns.last and m.reasoning_content %}"
    template = asks + WITH_TOOLS.replace("{% if m.reasoning_content %}", since)
    tokenizer = with_template(tiny_tokenizer, template)
    thought = {"role": "assistant", "content": "", "reasoning": "Look it up."}
    plain = one([USER, thought, {**USER, "content": "5"}, ANSWER], tokenizer)
    assert learnt(plain, tokenizer) == "Twelve.<|im_end|>\n"
    assert dict(plain.unused) == {"reasoning of turns, which the chat template does not write": 1}
    result = one([USER, thought, {**USER, "content": "<tool_response>5</tool_response>"}, ANSWER], tokenizer)
    assert learnt(result, tokenizer) == "<think>Look it up.</think><|im_end|>\nTwelve.<|im_end|>\n"
    assert not result.unused


def test_reasoning_of_white_space_alone_is_nothing_to_learn(tiny_tokenizer: Tokenizer):
    turns = [USER, {"role": "assistant", "content": "", "reasoning": " \n"}, USER, ANSWER]
    assert learnt(one(turns, tiny_tokenizer), tiny_tokenizer) == "Twelve.<|im_end|>\n"


def test_a_turn_of_reasoning_alone_is_learnt_where_it_is_written(tiny_tokenizer: Tokenizer):
    turns = [USER, {"role": "assistant", "content": None, "reasoning": "Hm."}]
    result = one(turns, with_template(tiny_tokenizer, WITH_TOOLS))
    assert learnt(result, tiny_tokenizer) == "<think>Hm.</think><|im_end|>\n"
    left_out = one([*turns, USER, ANSWER], tiny_tokenizer)
    assert learnt(left_out, tiny_tokenizer) == "Twelve.<|im_end|>\n"
    assert dict(left_out.unused) == {"reasoning of turns, which the chat template does not write": 1}


@pytest.mark.parametrize(
    ("keeps", "cure"), [(True, "Begin the content of the turn with '<think>"), (False, "Take a model")]
)
def test_a_generation_prompt_that_begins_with_reasoning_is_the_cause_that_is_named(
    tiny_tokenizer: Tokenizer, keeps: bool, cure: str
):
    opens = WITH_TOOLS.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    written = opens if keeps else opens.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] | trim }}")
    tokenizer = with_template(tiny_tokenizer, written)
    words = said_by([USER, ANSWER], tokenizer)
    assert "opens an answer that is to be generated with '<think>\\n', and turn 2 does not begin so" in words
    assert cure in words
    if keeps:
        cured = {**ANSWER, "content": "<think>\nHm.</think>Twelve."}
        assert learnt(one([USER, cured], tokenizer), tokenizer) == "Hm.</think>Twelve.<|im_end|>\n"


@pytest.mark.parametrize("completion_only_loss", [True, False])
def test_a_row_that_says_so_trains_nothing_and_is_counted(tiny_tokenizer: Tokenizer, completion_only_loss: bool):
    rows = [
        Row({"messages": [USER, ANSWER], "weight": weight}, "set.jsonl", line)
        for line, weight in enumerate((0, 1), 1)
    ]
    texts = [
        Row({"text": "Twelve.", "train": train}, "texts.jsonl", line) for line, train in enumerate(("0", ""), 1)
    ]
    result = tokenized([*rows, *texts], tiny_tokenizer, completion_only_loss=completion_only_loss)
    assert [example.row.place for example in result.examples] == ["set.jsonl, line 2", "texts.jsonl, line 2"]
    assert [item.reason for item in result.skipped] == ["the row says so (weight: 0)", "the row says so (train: 0)"]
    assert not result.unused
    with pytest.raises(DataError, match="None of 1 row has anything to train on: 1 because the row says so"):
        tokenized(rows[:1], tiny_tokenizer)


def test_a_turn_of_weight_zero_stands_in_the_prompt(tiny_tokenizer: Tokenizer):
    bad = {**ANSWER, "content": "Ten.", "weight": 0}
    result = one([USER, bad, USER, {**ANSWER, "weight": 1}], tiny_tokenizer)
    assert learnt(result, tiny_tokenizer) == "Twelve.<|im_end|>\n"
    assert "Ten.<|im_end|>" in tiny_tokenizer.decode(result.examples[0].prompt_ids)
    assert "Ten." in learnt(one([USER, {**bad, "weight": 1}, USER, ANSWER], tiny_tokenizer), tiny_tokenizer)


def test_a_row_that_trains_nothing_is_skipped_with_its_reason_even_if_the_template_refuses_it(
    tiny_tokenizer: Tokenizer,
):
    strict = with_template(
        tiny_tokenizer,
        "{% if messages[0].role != 'user' %}{{ raise_exception('begin with a user') }}{% endif %}" + WITH_TOOLS,
    )
    rows = [
        Row({"messages": turns}, "set.jsonl", line)
        for line, turns in enumerate(([ANSWER], [USER], [USER, {**ANSWER, "weight": 0}], [USER, ANSWER]), start=1)
    ]
    result = tokenized(rows, strict, max_length=512)
    assert [(item.row.line, item.reason) for item in result.skipped] == [
        (1, "no turn of the assistant is to be learnt, and the chat template refuses it"),
        (2, "no turn is the assistant's"),
        (3, "no turn of the assistant is to be learnt"),
    ]
    with pytest.raises(DataError, match="begin with a user"):
        one([ANSWER, USER, ANSWER], strict)


def test_a_template_writes_the_day_that_it_is_given(tiny_tokenizer: Tokenizer):
    tokenizer = with_template(tiny_tokenizer, "Today: {{ strftime_now('%d %b %Y %H:%M') }}\n" + WITH_TOOLS)
    row = Row({"messages": [USER, ANSWER]}, "set.jsonl", 1)

    def text(date: str | None) -> str:
        (example,) = tokenized([row], tokenizer, max_length=512, date=date).examples
        return str(tokenizer.decode(example.input_ids))

    assert text("2024-02-29").startswith("Today: 29 Feb 2024 00:00\n")
    assert text("2024-03-01") != text("2024-02-29")
    assert "2024 00:00" not in text(None)


# Models without a template

PLAIN = {
    "messages": (
        {"messages": [USER, ANSWER, USER, ANSWER]},
        "User: How many?\nAssistant: Twelve.<|endoftext|>\nUser",
    ),
    "prompt_completion": ({"prompt": "How many?", "completion": "Twelve."}, "How many? Twelve.<|endoftext|>"),
    "alpaca": (
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        "Instruction: Add.\n\n1 2\nResponse: 3<|endoftext|>",
    ),
    "gsm8k": ({"question": "How many?", "answer": "12"}, "Question: How many?\nAnswer: 12<|endoftext|>"),
}


@pytest.mark.parametrize("data_format", PLAIN)
def test_a_template_that_is_saved_writes_what_was_trained_on(tiny_tokenizer: Tokenizer, data_format: str):
    without = with_template(tiny_tokenizer, None)
    saved = with_template(tiny_tokenizer, plain_template(without, data_format))
    fields, text = PLAIN[data_format]
    rows = [Row(fields, "set.jsonl", 1)]
    (before,), (after,) = (tokenized(rows, each, max_length=512).examples for each in (without, saved))
    assert before == after
    assert tiny_tokenizer.decode(before.input_ids).startswith(text)
    if data_format != "messages":  # what a chat asks for is what training saw before the completion
        prompt = fields.get("prompt") or fields.get("question") or "Add.\n\n1 2"
        asked = saved.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
        assert list(before.prompt_ids) == asked["input_ids"]
