"""Chat templates are programs of whoever made the model: none takes all time or memory, and good ones run."""

from __future__ import annotations

import copy
import resource
import sys
from typing import Any

import pytest

from parablock.data import template_limits
from parablock.data.sources import Row
from parablock.data.templates import make_renderer
from parablock.errors import DataError, ModelError

ROW = Row({"prompt": "What is 2 + 3?", "completion": "5"}, "set.jsonl", 1)
GOOD = "{% for message in messages %}{{ message.role }}: {{ message.content }}{{ eos_token }}{% endfor %}"
LONG_LOOP = "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}"
DOUBLING = (
    "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}"
)


def rendered(tokenizer: Any, template: Any) -> str:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return "".join(piece.text for piece in make_renderer(tokenizer, data_format="prompt_completion")(ROW).pieces)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (LONG_LOOP, r"takes more than 2,000,000 steps for the conversation of set\.jsonl, line 1"),
        (GOOD.replace("{{ eos_token }}", LONG_LOOP), "takes more than 2,000,000 steps"),
        (DOUBLING, "takes more than 64 MiB"),
        ("{{ 'a' | center(900000000) }}", "takes more than 64 MiB"),
        ("{{ '%900000000d' % 1 }}", "takes more than 64 MiB"),
        ("{{ 'a' * 10 ** 12 }}", r"multiplies \(\*, \*\*\)"),
        ("{{ 10 ** 10 ** 10 }}", r"multiplies \(\*\*\)"),
        ("{% for", "unexpected 'end of template'"),
        ("a" * (1 << 21), "has 2,097,152 characters"),
        ({"tools": GOOD}, "several chat templates"),
    ],
)
def test_a_template_beyond_a_limit_is_refused(tiny_tokenizer, monkeypatch, template, words: str):
    monkeypatch.setattr(template_limits, "MAX_BYTES", 64 << 20)
    with pytest.raises((ModelError, DataError), match=words):
        rendered(tiny_tokenizer, template)
    assert "What is 2 + 3?" in rendered(tiny_tokenizer, GOOD)  # the control, within the same limits


def test_a_template_that_takes_long_with_few_steps_is_refused(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(template_limits, "MAX_S", -1.0)
    with pytest.raises(ModelError, match="takes longer than -1 s"):
        rendered(tiny_tokenizer, GOOD)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 // 0 }}",
        "{{ range(200000) | length }}",
        "{{ messages[0].content + 1 }}",
        "{{ raise_exception('no') }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    ],
)
def test_an_error_of_a_template_is_one_of_the_row(tiny_tokenizer, template: str):
    with pytest.raises(DataError, match=r"set\.jsonl, line 1: the chat template of the tokenizer refuses"):
        rendered(tiny_tokenizer, template)


def test_limits_leave_the_process_as_it_was(tiny_tokenizer):
    calls = []

    def tracer(frame, event, argument):
        calls.append(event)

    before, limit = sys.gettrace(), resource.getrlimit(resource.RLIMIT_AS)
    sys.settrace(tracer)
    try:
        rendered(tiny_tokenizer, GOOD)
        assert sys.gettrace() is tracer
        with pytest.raises(ModelError):
            rendered(tiny_tokenizer, LONG_LOOP)
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(before)
    assert resource.getrlimit(resource.RLIMIT_AS) == limit
    assert calls
