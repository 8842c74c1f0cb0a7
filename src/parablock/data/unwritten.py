"""What a conversation has and its rendering has not.

A chat template decides by roles and by what turns have. So rows of one shape are tried once: every text of the
conversation is replaced by a mark, and a mark that the rendering lacks is a text that the template does not write.
What it does to a text itself, such as taking out reasoning, shows in the row: the text is not in the rendering.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from parablock.data.conversations import REASONING, Conversation, Message
from parablock.data.sources import Row
from parablock.errors import DataError

Render = Callable[[list[Message], tuple[Any, ...]], str | None]
"""Turns and tools → their text; None if the template refuses them."""

Part = tuple[int, str]
"""The index of a turn, and `content`, `reasoning`, or the number of a call in it."""

_PLAIN = {"role", "content", "tool_calls", *REASONING}
_BEGIN, _END = "<think>", "</think>"
_RESULT = ("<tool_response>", "</tool_response>")
"""Around what a tool returned, in a turn of the user; templates take such a turn for no new question."""
_CERTAIN = 20
"""A text of so many characters does not stand in a rendering by chance."""


class Unwritten:
    """Finds what one chat template does not write; knows the shapes of conversations that it has seen."""

    def __init__(self, render: Render) -> None:
        self._render = render
        self._seen: dict[Any, tuple[frozenset[Part], tuple[str, ...]]] = {}

    def find(self, row: Row, conversation: Conversation, whole: str) -> tuple[frozenset[int], tuple[str, ...]]:
        """Return the turns without their reasoning, and all that is not in the rendering, in words.

        Args:
            row: The row, for messages.
            conversation: Its turns.
            whole: Their rendering.

        Raises:
            DataError: It is a part, other than reasoning, of a turn that is to be learnt.
        """
        shape = _shape_of(conversation)
        if shape not in self._seen:
            self._seen[shape] = self._try(conversation)
        missing, unused = self._seen[shape]
        found, silent = dict.fromkeys(unused), set()
        for index, turn in enumerate(conversation.turns):
            role = turn["role"]
            what = _lost(turn["content"], whole, is_missing=(index, "content") in missing)
            if what == _REASONING_INSIDE:
                found[f"{what} of turns, which the chat template takes out"] = None
            elif what and conversation.learnt[index]:
                raise _refused(row, index, turn["content"], what)
            elif what:
                name = f"{role} turns" if what == _ALL and not turn.get("tool_calls") else f"{what} of {role} turns"
                found[f"{name}, which the chat template does not write"] = None
            if _lost(_thought(turn), whole, is_missing=(index, "reasoning") in missing):
                silent.add(index)
                found["reasoning of turns, which the chat template does not write"] = None
            for number, call in enumerate(turn.get("tool_calls") or (), start=1):
                if (index, str(number)) in missing and conversation.learnt[index]:
                    raise _refused_call(row, index, number, call)
                if (index, str(number)) in missing:
                    found[f"calls of {role} turns, which the chat template does not write"] = None
        for name in map(_name_of, conversation.tools):
            if name and name not in whole and _NO_TOOLS not in found:
                found["some of the tools, which the chat template does not write"] = None
        return frozenset(silent), tuple(found)

    def _try(self, conversation: Conversation) -> tuple[frozenset[Part], tuple[str, ...]]:
        """Render marks in place of texts; return the parts whose marks are lost, and other fields that are."""
        marked, marks = _marked(conversation)
        whole = self._render(marked, conversation.tools)
        if whole is None:
            return frozenset(), ()
        missing = frozenset(part for mark, part in marks.items() if mark not in whole)
        unused = []
        fields = dict.fromkeys((turn["role"], key) for turn in marked for key in turn if key not in _PLAIN)
        for role, name in fields:
            bare = [
                {key: value for key, value in turn.items() if turn["role"] != role or key != name}
                for turn in marked
            ]
            if self._render(bare, conversation.tools) == whole:
                unused.append(f"{name} of {role} turns, which the chat template does not write")
        if conversation.tools and self._render(marked, ()) == whole:
            unused.append(_NO_TOOLS)
        return missing, tuple(unused)


_ALL, _SOME, _REASONING_INSIDE = "the content", "a part of the content", "reasoning in the content"
_NO_TOOLS = "tools, which the chat template does not write"


def _thought(turn: Message) -> str:
    return str(turn.get(REASONING[0]) or "") if turn["role"] == "assistant" else ""


def _calls(turn: Message) -> list[dict[str, Any]]:
    return [call.get("function", call) for call in turn.get("tool_calls") or ()]


def _name_of(tool: Any) -> str:
    inner = tool.get("function", tool) if isinstance(tool, dict) else {}
    return str(inner.get("name") or "") if isinstance(inner, dict) else ""


def _shape_of(conversation: Conversation) -> Any:
    """Return what a template may decide by: all but the texts themselves, in a form that can be looked up."""
    return bool(conversation.tools), tuple(
        (
            turn["role"],
            not turn["content"].strip(),
            _frame_of(turn["content"]),
            bool(_thought(turn).strip()),
            tuple(_kind(call.get("arguments")) if isinstance(call, dict) else "" for call in _calls(turn)),
            frozenset((key, bool(turn[key])) for key in turn.keys() - _PLAIN),
        )
        for turn in conversation.turns
    )


def _frame_of(content: str) -> tuple[str, str]:
    """Return the frame of a text by which templates tell what it is; twice nothing without one."""
    return _RESULT if content.startswith(_RESULT[0]) and content.endswith(_RESULT[1]) else ("", "")


def _kind(arguments: Any) -> str:
    return f"{type(arguments).__name__} {bool(arguments)}"


def _marked(conversation: Conversation) -> tuple[list[Message], dict[str, Part]]:
    """Return the turns with a mark in place of each text that is not empty, and what each mark stands for."""
    marks: dict[str, Part] = {}

    def mark(index: int, part: str) -> str:
        text = f"mark{len(marks)}x"
        marks[text] = (index, part)
        return text

    turns = []
    for index, turn in enumerate(conversation.turns):
        changed = dict(turn)
        if turn["content"].strip():
            begin, end = _frame_of(turn["content"])
            changed["content"] = begin + mark(index, "content") + end
        if _thought(turn).strip():
            changed |= dict.fromkeys(REASONING, mark(index, "reasoning"))
        if turn.get("tool_calls"):
            calls = []
            for number, call in enumerate(turn["tool_calls"], start=1):
                function = call.get("function", call)
                if isinstance(function, dict) and function.get("name"):
                    function = {**function, "name": mark(index, str(number))}
                    if isinstance(function.get("arguments"), dict) and function["arguments"]:
                        function["arguments"] = {"key": mark(index, str(number))}
                calls.append({**call, "function": function} if "function" in call else function)
            changed["tool_calls"] = calls
        turns.append(changed)
    return turns, marks


def _spellings(text: str) -> Iterator[str]:
    """Yield a text as templates write it: as it is, or as JSON."""
    yield text
    yield json.dumps(text, ensure_ascii=False)[1:-1]
    yield json.dumps(text)[1:-1]


def _stands(text: str, whole: str) -> bool:
    """Return whether a text is in another one, whatever white space is between its words."""
    return any(spelt in whole for spelt in _spellings(text)) or "".join(text.split()) in "".join(whole.split())


def _lost(content: str, whole: str, *, is_missing: bool) -> str:
    """Return what of a text is not in a rendering, in words; empty if all of it is.

    Args:
        content: The text.
        whole: The rendering.
        is_missing: Whether the template does not write the text in conversations of this shape.
    """
    text = content.strip()
    if is_missing:
        return "" if len(text) >= _CERTAIN and text in whole else _ALL
    if not text or text in whole or _stands(text, whole):
        return ""
    if _END in text:
        thought, _, rest = text.rpartition(_END)
        thought = thought.strip().removeprefix(_BEGIN).strip()
        if _stands(rest.strip(), whole):
            return "" if _stands(thought, whole) else _REASONING_INSIDE
    return _SOME


def _refused(row: Row, index: int, content: str, what: str) -> DataError:
    shown = content.strip()
    shown = f"{shown[:60]}…" if len(shown) > 60 else shown
    return DataError(
        f"{row.place}: turn {index + 1} is to be learnt, and the model's chat template does not write {what} of it "
        f"as it stands ({shown!r}), so another text would be learnt.",
        cause="Some templates write no content beside calls of tools, or change what they find in it.",
        remedy="Take a model whose chat template writes it, or split or change the turn, or give it weight: 0.",
    )


def _refused_call(row: Row, index: int, number: int, call: dict[str, Any]) -> DataError:
    return DataError(
        f"{row.place}: turn {index + 1} calls a tool (tool_calls), and the model's chat template does not write "
        f"call {number} of it ({_name_of(call)!r}), so it could not be learnt.",
        cause="Some templates write no calls, or one call in a turn.",
        remedy="Take a model whose chat template does, or give each turn one call, or write the call into content.",
    )
