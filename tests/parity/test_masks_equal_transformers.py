"""What is learnt of twelve kinds of conversation, by six chat templates that many models have.

The templates are written here after the formats that the makers of models publish. Each has marks around what the
assistant says, `{% generation %}`: with them, Transformers itself says which tokens are the assistant's. ParaBlock
gets the template without the marks.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from parablock.data.prompts import IGNORED_LABEL
from parablock.data.sources import Row
from parablock.errors import DataError
from tokens import tokenized

SAID = "{% if m['learn'] %}{% generation %}TEXT{% endgeneration %}{% else %}TEXT{% endif %}"
ALTERNATE = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}{% endfor %}"
)


def said(text: str) -> str:
    """Return what a template writes for an assistant turn: marked where the turn is to be learnt."""
    return SAID.replace("TEXT", "{{ " + text + " }}")


TEMPLATES: dict[str, str] = {
    "ChatML": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
        + said("m['content'] + '<|im_end|>\n'")
        + "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "Llama 3": (
        "{{ '<|begin_of_text|>' }}{% for m in messages %}"
        "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}{% if m['role'] == 'assistant' %}"
        + said("m['content'] | trim + '<|eot_id|>'")
        + "{% else %}{{ m['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "Mistral": (
        "{{ '<s>' }}" + ALTERNATE + "{% for m in messages %}{% if m['role'] == 'user' %}"
        "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}" + said("m['content'] + '</s>'") + "{% endif %}"
        "{% endfor %}"
    ),
    "Gemma": (
        "{{ '<bos>' }}" + ALTERNATE + "{% for m in messages %}{% if m['role'] == 'assistant' %}"
        "{{ '<start_of_turn>model\n' }}"
        + said("m['content'] | trim + '<end_of_turn>\n'")
        + "{% else %}{{ '<start_of_turn>user\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "Zephyr": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' }}{% if m['role'] == 'assistant' %}"
        + said("m['content'] + '</s>\n'")
        + "{% else %}{{ m['content'] + '</s>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
    "Phi-3": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' }}{% if m['role'] == 'assistant' %}"
        + said("m['content'] + '<|end|>\n' + ('' if not loop.last else '<|endoftext|>')")
        + "{% else %}{{ m['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}"
        "{% elif messages[-1]['role'] != 'assistant' %}{{ '<|endoftext|>' }}{% endif %}"
    ),
}
ENDS = {
    "ChatML": "<|im_end|>",
    "Llama 3": "<|eot_id|>",
    "Mistral": "</s>",
    "Gemma": "<end_of_turn>",
    "Zephyr": "</s>",
}
OTHERS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<s>", "<bos>", "<start_of_turn>"]


def user(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": text, **more}


def answer(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


SYSTEM = {"role": "system", "content": "Be brief."}
LONG = [
    user("How many?"),
    answer("12 apples."),
    user("And Ann?"),
    answer("Ann has 12."),
    user("Why?"),
    answer("So."),
]

KINDS: dict[str, tuple[dict[str, Any], list[dict[str, Any]], list[int]]] = {
    # kind: the row, its turns as templates see them, the numbers of the turns that are learnt
    "one question": ({"messages": LONG[:2]}, LONG[:2], [1]),
    "three questions": ({"messages": LONG}, LONG, [1, 3, 5]),
    "a system prompt": ({"messages": [SYSTEM, *LONG[:2]]}, [SYSTEM, *LONG[:2]], [2]),
    "a system prompt in a field": ({"messages": LONG[:4], "system": "Be brief."}, [SYSTEM, *LONG[:4]], [2, 4]),
    "a question at the end": ({"messages": LONG[:5]}, LONG[:5], [1, 3]),
    "the assistant first": ({"messages": LONG[1:4]}, LONG[1:4], [2]),
    "a turn of weight 0": (
        {"messages": [LONG[0], {**LONG[1], "weight": 0}, *LONG[2:4]]},
        LONG[:4],
        [3],
    ),
    "a last turn that is not learnt": ({"messages": [*LONG[:3], {**LONG[3], "train": False}]}, LONG[:4], [1]),
    "an empty answer": ({"messages": [LONG[0], answer(""), *LONG[2:4]]}, [LONG[0], answer(""), *LONG[2:4]], [3]),
    "a prompt and a completion": ({"prompt": "How many?", "completion": "12 apples."}, LONG[:2], [1]),
    "turns as prompt and completion": ({"prompt": LONG[:3], "completion": [LONG[3]]}, LONG[:4], [3]),
    "words of one in the other": (
        {
            "conversations": [
                {"from": "human", "value": "Say: Ann"},
                {"from": "gpt", "value": "Say: Ann\n\n  é 🍏"},
            ]
            * 2
        },
        [user("Say: Ann"), answer("Say: Ann\n\n  é 🍏")] * 2,
        [1, 3],
    ),
}
REFUSED = {"a system prompt", "a system prompt in a field", "the assistant first"}
"""What a template refuses whose turns alternate."""


@pytest.fixture(scope="module")
def tokenizers(tiny_tokenizer: PreTrainedTokenizerFast) -> dict[str, PreTrainedTokenizerFast]:
    """A tokenizer for each template, with the marks."""
    made = {}
    for name, template in TEMPLATES.items():
        made[name] = copy.deepcopy(tiny_tokenizer)
        made[name].add_special_tokens({"additional_special_tokens": [*set(ENDS.values()), *OTHERS, "<|end|>"]})
        made[name].eos_token = ENDS.get(name, "<|endoftext|>")
        made[name].chat_template = template
    return made


def without_marks(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    bare = copy.deepcopy(tokenizer)
    marked = str(tokenizer.chat_template)
    both = r"\{% if m\['learn'\] %\}\{% generation %\}(.*?)\{% endgeneration %\}\{% else %\}\1\{% endif %\}"
    bare.chat_template = re.sub(both, r"\1", marked, flags=re.DOTALL)
    assert "generation %" not in bare.chat_template and "learn" not in bare.chat_template
    return bare


def by_transformers(tokenizer: PreTrainedTokenizerFast, turns: list[dict[str, Any]], learnt: list[int]) -> Any:
    marked = [{**turn, "learn": number in learnt} for number, turn in enumerate(turns)]
    found = tokenizer.apply_chat_template(
        marked, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, add_generation_prompt=False
    )
    return found["input_ids"], found["assistant_masks"]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_learnt_is_what_the_assistant_says(
    kind: str, name: str, tokenizers: dict[str, PreTrainedTokenizerFast]
):
    fields, turns, learnt = KINDS[kind]
    bare = without_marks(tokenizers[name])
    if name in ("Mistral", "Gemma") and kind in REFUSED:
        with pytest.raises(DataError, match="must alternate"):
            tokenized([Row(fields, "rows.jsonl", 1)], bare)
        return
    ids, mask = by_transformers(tokenizers[name], turns, learnt)
    (example,) = tokenized([Row(fields, "rows.jsonl", 1)], bare).examples
    assert list(example.input_ids) == ids
    assert [int(label != IGNORED_LABEL) for label in example.labels] == mask
    assert 0 < sum(mask) < len(mask)
    said_so = bare.decode([token for token, is_learnt in zip(ids, mask, strict=True) if is_learnt])
    assert all(turns[number]["content"].strip() in said_so for number in learnt)
    wrong = [number for number, turn in enumerate(turns) if turn["role"] == "assistant" and number not in learnt]
    _, all_turns = by_transformers(tokenizers[name], turns, [*learnt, *wrong])
    assert (all_turns == mask) == (not wrong), "a turn that is not learnt shows in the mask"
