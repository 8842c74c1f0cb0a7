"""Turns of every spelling are one conversation, and what is not to be learnt is not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from parablock.data.formats import check_rows, read_conversation
from parablock.data.sources import Row
from parablock.errors import DataError

USER, ANSWER = {"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Twelve."}
NAN, EMPTY = float("nan"), {"tool_calls": [], "thinking": "", "function_call": {}, "role": None}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"city": "Ulm"}'}}


def conversation(turns: Any, **fields: Any) -> Any:
    return read_conversation(Row({"messages": turns, **fields}, "set.jsonl", 3), "messages")


def said(turns: Any, **fields: Any) -> str:
    with pytest.raises(DataError) as caught:
        conversation(turns, **fields)
    assert "set.jsonl, line 3" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "turns",
    [
        [{"role": "human", "content": "How many?"}, {"role": "gpt", "content": "Twelve."}],
        [{"role": "User", "content": "How many?"}, {"role": "Model", "content": "Twelve."}],
        [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": "Twelve."}],
        [
            {"role": "user", "content": [{"type": "text", "text": "How "}, {"type": "text", "text": "many?"}]},
            ANSWER,
        ],
        [{**USER, "tool_calls": None, "weight": None}, ANSWER],
        [{**USER, "weight": NAN, "mask": NAN}, {**ANSWER, "train": NAN}],
        [{**USER, "weight": ""}, {**ANSWER, "train": "", "loss": ""}],
        [{**USER, "content": [{"type": "text", "text": USER["content"], **EMPTY, "weight": NAN}]}, ANSWER],
        [{**USER, "from": "human", "value": USER["content"]}, ANSWER],
        json.dumps([USER, ANSWER]),
    ],
)
def test_other_spellings_are_the_same_conversation(turns: Any):
    assert conversation(turns) == conversation([USER, ANSWER])
    assert conversation([USER, ANSWER]).learnt == (False, True)
    assert conversation(turns) != conversation([USER, {**ANSWER, "content": "Ten."}])


@pytest.mark.parametrize("switch", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"loss": False}])
def test_a_turn_that_is_not_to_be_learnt_is_read_and_not_learnt(switch: dict[str, Any]):
    turns = [USER, {**ANSWER, **switch}, USER, {**ANSWER, **dict.fromkeys(switch, 1)}]
    read = conversation(turns)
    assert read.learnt == (False, False, False, True)
    assert read.turns == conversation([USER, ANSWER, USER, ANSWER]).turns


@pytest.mark.parametrize(
    ("turns", "words"),
    [
        ([USER, {**ANSWER, "weight": 0.5}], "turn 2 has weight 0.5; a turn is learnt (1, true) or not (0, false)"),
        ([{**USER, "train": True}, ANSWER], "turn 1 of the user is to be learnt (train: True)"),
        ([USER, {"role": "narrator", "content": "x"}], "turn 2 of messages has the unknown role 'narrator'"),
        (
            [USER, {"role": "assistant", "content": None}],
            "turn 2 of messages has no content; it has the fields role",
        ),
        ([USER, {"text": "a"}], "turn 2 of messages has no role and content; it has the fields text"),
        ([USER, {**ANSWER, "Weight": 0}], "turn 2 of messages has Weight 0, with which other programs say"),
        ([USER, {**ANSWER, "mask": True}], "turn 2 of messages has mask True"),
        ([USER, {**ANSWER, "train_detail": []}], "turn 2 of messages has train_detail []"),
        ([USER, {**ANSWER, "label": False}], "turn 2 of messages has label False"),
        ([{**USER, "value": "Or this?"}, ANSWER], "turn 1 of messages has both content and value, and they differ"),
        ([{**USER, "from": "gpt"}, ANSWER], "turn 1 of messages has both role and from, and they differ"),
        (
            [USER, {**ANSWER, "content": [{"type": "text", "text": "Ten.", "weight": 0}]}],
            "a part of the content of turn 2 of messages has weight 0",
        ),
        *(
            (
                [USER, {**ANSWER, "content": [{"type": "text", "text": "Ten.", name: "tool"}]}],
                f"a part of the content of turn 2 of messages has {name} 'tool'",
            )
            for name in ("role", "from", "content", "value", "tool_calls", "function_call", "thinking")
        ),
        ([USER, {"content": [{"text": "Ten."}]}], "turn 2 of messages has no role; it has the fields content"),
        (
            [USER, {**ANSWER, "content": [{"text": "Ten.", "mask": 1}]}],
            "a part of the content of turn 2 of messages has mask",
        ),
        (
            [USER, {**ANSWER, "tool_calls": [CALL], "function_call": CALL["function"], "content": ""}],
            "has both tool_calls and function_call",
        ),
        ([USER, {**ANSWER, "function_call": "f()"}], "function_call of turn 2 of messages is of type str"),
        ([{"role": "user", "content": [{"type": "image"}]}, ANSWER], "its content is a part of type 'image'"),
        ([USER, {**ANSWER, "tool_calls": "f()"}], "tool_calls of turn 2 of messages is of type str"),
        ([{"role": "user", "content": "a \ud83d"}, ANSWER], "turn 1 of messages holds \\ud83d at character 3"),
        ([USER, {**ANSWER, "reasoning": "\udc00"}], "the reasoning of turn 2 of messages holds \\udc00"),
        ("[unclosed", "messages is of type str, not a list of turns"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(turns: Any, words: str):
    assert words in said(turns)


def test_tools_are_a_list_or_its_json_and_arguments_are_an_object():
    read = conversation(
        [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}], tools='[{"name": "f"}]'
    )
    assert read.tools == ({"name": "f"},)
    assert read.turns[1]["content"] == ""
    assert read.turns[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Ulm"}
    assert read.learnt == (False, True)
    assert "field tools is of type dict, not a list" in said([USER, ANSWER], tools={"name": "f"})


def test_the_older_spelling_of_a_call_is_a_call():
    older = {"role": "assistant", "content": None, "function_call": CALL["function"]}
    newer = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL["function"]}]}
    assert conversation([USER, older]) == conversation([USER, newer])
    older["function_call"] = json.dumps(CALL["function"])
    assert conversation([USER, older]) == conversation([USER, newer])
    assert conversation([USER, older]) != conversation([USER, ANSWER])


def test_a_turn_may_hold_reasoning_alone():
    assert conversation([USER, {"role": "assistant", "content": None, "thinking": "Hm."}]).turns[1]["content"] == ""


def test_a_part_of_content_keeps_what_else_it_has():
    parts = [{"type": "text", "text": "How many?", "cache_control": {"type": "ephemeral"}, "image": None}]
    assert conversation([{"role": "user", "content": parts}, ANSWER]).turns[0] == {
        **USER,
        "cache_control": {"type": "ephemeral"},
    }


@pytest.mark.parametrize(
    ("fields", "off"),
    [
        ({"weight": 0}, "weight: 0"),
        ({"train": False}, "train: False"),
        ({"loss": "false", "weight": "1"}, "loss: false"),
        ({"weight": 1, "train": "True", "loss": None}, ""),
        ({"weight": "", "label": True}, ""),
        ({"weight": float("nan"), "loss_mask": float("nan")}, ""),
        ({"label": False, "masked": False, "training": True}, ""),
        ({"masked": "False", "training": "true", "trainable": "1", "mask": ""}, ""),
    ],
)
def test_a_row_says_whether_it_is_learnt(fields: dict[str, Any], off: str):
    read = conversation([USER, ANSWER], **fields)
    assert (read.off, read.learnt) == (off, (False, not off))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"weight": 0.5}, "the row has weight 0.5; a row is learnt (1, true) or not (0, false)"),
        ({"train": "maybe"}, "the row has train 'maybe'"),
        ({"masked": True}, "the row has masked True, with which other programs say what is learnt"),
        ({"training": False}, "the row has training False"),
        ({"training": "false"}, "the row has training 'false'"),
        ({"masked": "1"}, "the row has masked '1'"),
        ({"mask": False}, "the row has mask False"),
        ({"Weight": 0}, "the row has Weight 0"),
        ({"loss_mask": [0, 1]}, "the row has loss_mask [0, 1]"),
    ],
)
def test_a_row_that_says_it_otherwise_is_refused(fields: dict[str, Any], words: str):
    assert words in said([USER, ANSWER], **fields)
    with pytest.raises(DataError) as caught:
        check_rows([Row({"text": "a", **fields}, "set.jsonl", 3)], "auto")
    assert words in str(caught.value)


def test_a_turn_of_a_prompt_cannot_be_learnt():
    row = Row({"prompt": [USER, {**ANSWER, "weight": 1}, USER], "completion": [ANSWER]}, "set.jsonl", 3)
    with pytest.raises(
        DataError, match=r"turn 2 of the assistant is to be learnt \(weight: 1\), and is in the prompt"
    ):
        read_conversation(row, "prompt_completion")


def test_a_system_field_comes_first_unless_a_turn_does():
    assert conversation([USER, ANSWER], system="Be brief.").turns[0] == {"role": "system", "content": "Be brief."}
    own = [{"role": "system", "content": "Mine."}, USER, ANSWER]
    assert conversation(own, system="Be brief.").turns == conversation(own).turns
    assert conversation(own, system="Be brief.").unused == ("field system, beside a system turn of the row",)
    assert conversation(own, system="Mine.").unused == conversation(own, system="").unused == ()


def test_an_opening_turn_of_the_assistant_is_read_and_not_learnt():
    read = conversation([ANSWER, USER, ANSWER])
    assert read.learnt == (False, False, True)
    assert read.begins_with_the_assistant
    assert not conversation([USER, ANSWER]).begins_with_the_assistant


def test_a_prompt_of_turns_is_not_learnt_and_its_completion_is():
    row = Row({"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}, "set.jsonl", 1)
    assert read_conversation(row, "prompt_completion").learnt == (False, False, False, True)


def test_an_answer_that_was_judged_bad_is_refused_and_a_class_is_not():
    for label in (False, "False"):  # the latter of a table
        judged = {"prompt": "a", "completion": "b", "label": label}
        with pytest.raises(DataError, match=f"the row has label {label!r}, with which other programs say"):
            check_rows([Row(judged, "set.jsonl", 3)], "auto")
    check_rows([Row({**judged, "label": "0"}, "set.csv", 3)], "auto")
    check_rows([Row({"text": "a", "label": False}, "set.jsonl", 3)], "auto")


def test_a_speaker_beside_a_role_is_a_field_like_others():
    assert conversation([{**USER, "from": "alice"}, ANSWER]).turns[0] == {**USER, "from": "alice"}
