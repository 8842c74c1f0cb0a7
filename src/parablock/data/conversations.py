"""Conversations: the turns of a row in one spelling, and which of them are learnt.

Turns are spelt `role` and `content`, or `from` and `value` as in ShareGPT. Other names of the same roles become
`system`, `user`, `assistant` and `tool`. An assistant turn is learnt, unless it says otherwise (`weight: 0`,
`train: false`, `loss: false`) or nothing comes before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from parablock.data.readers import RepeatedKeyError, parse_json
from parablock.data.sources import Row
from parablock.data.switches import SWITCHES, check_names, is_nothing, is_off
from parablock.errors import DataError

Message = dict[str, Any]
"""One turn of a conversation: `role`, `content`, and what else a chat template may write, such as `tool_calls`."""

ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human"),
    "assistant": ("assistant", "gpt", "model", "bot", "chatgpt", "ai"),
    "tool": ("tool", "function", "observation", "ipython"),
}
"""Role → its names in data."""

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Fields of a turn with what the assistant thought before it answered; templates differ in the name."""

_ROLE_OF = {name: role for role, names in ROLES.items() for name in names}
_SPELLINGS = {"role": ("role", "from"), "content": ("content", "value")}
_OF_TURNS = {*_SPELLINGS["role"], *_SPELLINGS["content"], "tool_calls", "function_call", *REASONING}
"""What a turn says, and no part of its content."""
_MAY_BE_EMPTY = {*_OF_TURNS, *SWITCHES}
_EXAMPLE = 'Each turn is an object such as {"role": "user", "content": "Hello"}.'


@dataclass(frozen=True, slots=True)
class Conversation:
    """The turns of a row.

    Args:
        turns: In the spelling of chat templates; `content` is always text.
        learnt: For each turn, whether the loss counts it.
        tools: The functions that the assistant may call, as JSON schemas; empty without any.
        off: The field by which the row says that nothing of it is learnt, as `weight: 0`; empty without one.
        unused: What the row has and no turn has, in words.
    """

    turns: tuple[Message, ...]
    learnt: tuple[bool, ...]
    tools: tuple[Any, ...] = ()
    off: str = ""
    unused: tuple[str, ...] = ()

    @property
    def begins_with_the_assistant(self) -> bool:
        """Whether the first turn, which nothing precedes, is the assistant's."""
        return bool(self.turns[0]["role"] == "assistant")


def converse(
    row: Row, turns: Sequence[Message], *, learnt: Sequence[bool] | None = None, system: str = "", tools: Any = None
) -> Conversation:
    """Make the conversation of a row.

    Args:
        row: The row, for messages.
        turns: At least one turn in one spelling, as `read_turns` returns them.
        learnt: For each turn, whether it may be learnt; None: all.
        system: A system turn for the beginning; empty: none.
        tools: The row's field `tools`: a list of JSON schemas, or JSON text of one; None: none.

    Raises:
        DataError: A turn says that it is learnt and cannot be, or `tools` is no list.
    """
    off, unused = is_off(row), list[str]()
    may = learnt or [True] * len(turns)
    flags = [
        _is_learnt(row, number, turn, allowed=allowed) and not off
        for number, (turn, allowed) in enumerate(zip(turns, may, strict=True))
    ]
    bare = [{key: value for key, value in turn.items() if key not in SWITCHES} for turn in turns]
    if system and turns[0]["role"] != "system":
        bare, flags = [{"role": "system", "content": system}, *bare], [False, *flags]
    elif system and system != turns[0]["content"]:
        unused.append("field system, beside a system turn of the row")
    if bare[0]["role"] == "assistant":  # nothing comes before it
        flags[0] = False
    return Conversation(tuple(bare), tuple(flags), tuple(_read_tools(row, tools)), off, tuple(unused))


def read_turns(row: Row, name: str) -> list[Message]:
    """Return the turns in a field of a row, in one spelling; a list, or JSON text of one.

    Raises:
        DataError: The field is no list of turns, or a turn has an unknown role or content that is no text.
    """
    turns = row.fields.get(name)
    if isinstance(turns, str):
        try:
            turns = _parsed(turns)
        except RepeatedKeyError as error:
            raise DataError(f"{row.place}: {name}: {error}.", remedy="Take one out, or rename it.") from None
    if not isinstance(turns, list) or not turns:
        raise DataError(
            f"{row.place}: {name} is {kind_of(row.fields.get(name))}, not a list of turns.", remedy=_EXAMPLE
        )
    return [_read_turn(row, name, number, turn) for number, turn in enumerate(turns, start=1)]


def check_text(row: Row, what: str, text: str) -> str:
    """Return a text that can be encoded; a DataError names half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{row.place}: {what} holds \\u{ord(text[error.start]):04x} at character {error.start + 1}, half of a "
            "surrogate pair, which is no character.",
            cause="The text was cut in the middle of an emoji or a rare letter, and then written as JSON.",
            remedy="Export the row again, or take that half out.",
        ) from None
    return text


def kind_of(value: Any) -> str:
    """Say what a value is, in the words of a message."""
    return "an empty list" if value == [] else f"of type {type(value).__name__}"


def _parsed(text: str) -> Any:
    """Return the value of JSON text, or the text itself; a RepeatedKeyError where an object has a key twice."""
    try:
        return parse_json(text)
    except RepeatedKeyError:
        raise
    except (ValueError, RecursionError):
        return text


def _read_turn(row: Row, name: str, number: int, turn: Any) -> Message:
    where = f"turn {number} of {name}"
    if not isinstance(turn, dict):
        raise DataError(f"{row.place}: {where} is {kind_of(turn)}, not an object.", remedy=_EXAMPLE)
    present = {  # tables fill up with nothing, and cells of switches with empty text
        key: value for key, value in turn.items() if not (is_nothing(value) or (key in SWITCHES and value == ""))
    }
    check_names(row, where, present)
    if call := present.pop("function_call", None):  # the older name of the only call
        if present.get("tool_calls"):
            raise DataError(
                f"{row.place}: {where} has both tool_calls and function_call.", remedy="Leave function_call out."
            )
        with suppress(RepeatedKeyError):  # refused as the text that it is
            call = _parsed(call) if isinstance(call, str) else call
        if not isinstance(call, dict):
            raise DataError(
                f"{row.place}: function_call of {where} is {kind_of(call)}, not a call.",
                remedy='A call is an object such as {"name": "f", "arguments": {}}.',
            )
        present["tool_calls"] = [{"type": "function", "function": call}]
    is_name = "from" in present and bool(_known(present.get("role"))) and not _known(present["from"])
    speaker = {"from": present.pop("from")} if is_name else {}
    role, content = (_spelt(row, where, present, part) for part in ("role", "content"))
    if content is None and (present.get("tool_calls") or any(present.get(name) for name in REASONING)):
        content = ""
    if not isinstance(role, str) or content is None:
        given = {"role": isinstance(role, str), "content": content is not None}
        missing = [name for name, is_given in given.items() if not is_given]
        raise DataError(
            f"{row.place}: {where} has no {' and '.join(missing)}; it has the fields "
            f"{', '.join(present) or '(none)'}.",
            remedy=_EXAMPLE,
        )
    if role.lower() not in _ROLE_OF:
        raise DataError(
            f"{row.place}: {where} has the unknown role {role!r}.",
            cause="Known are " + "; ".join(", ".join(names) for names in ROLES.values()) + ".",
            remedy="Rename the role, or leave the turn out.",
        )
    spelt = {part for parts in _SPELLINGS.values() for part in parts}
    rest = {key: value for key, value in present.items() if key not in spelt} | speaker
    thought = next((rest[key] for key in REASONING if isinstance(rest.get(key), str)), None)
    if thought is not None:  # under every name, whichever the template reads
        rest |= dict.fromkeys(REASONING, check_text(row, f"the reasoning of {where}", thought))
    if "tool_calls" in rest:
        rest["tool_calls"] = _read_calls(row, where, rest["tool_calls"])
    return {"role": _ROLE_OF[role.lower()], "content": _read_content(row, where, content, rest), **rest}


def _read_calls(row: Row, where: str, calls: Any) -> list[dict[str, Any]]:
    """Return tool calls as templates read them: arguments as an object, where data has JSON text of one."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise DataError(
            f"{row.place}: tool_calls of {where} is {kind_of(calls)}, not a list of calls.",
            remedy='A call is an object such as {"type": "function", "function": {"name": "f", "arguments": {}}}.',
        )
    read = []
    for call in calls:
        function = call.get("function", call)
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            with suppress(RepeatedKeyError):  # learnt as the text that it is
                function = {**function, "arguments": _parsed(function["arguments"])}
        read.append({**call, "function": function} if "function" in call else function)
    return read


def says_something(turn: Message) -> bool:
    """Return whether a turn has anything that can be learnt: text, a call or reasoning that is not empty."""
    return bool(turn["content"].strip() or turn.get("tool_calls") or str(turn.get(REASONING[0]) or "").strip())


def _known(name: Any) -> str:
    """Return the role that a name is one of; empty if it is none."""
    return _ROLE_OF.get(name.lower(), "") if isinstance(name, str) else ""


def _spelt(row: Row, where: str, turn: Message, part: str) -> Any:
    given = {name: turn[name] for name in _SPELLINGS[part] if name in turn}
    found = list(given.values())
    meant = [_known(value) or value if part == "role" else value for value in found]
    if len(meant) > 1 and meant[0] != meant[1]:
        raise DataError(
            f"{row.place}: {where} has both {' and '.join(given)}, and they differ.",
            remedy=f"Leave one out: {' and '.join(given)} are two names of the same.",
        )
    return found[0] if found else None


def _read_content(row: Row, where: str, content: Any, rest: Message) -> str:
    """Return content as one text: a text, or a list of parts that are text; other fields of parts go to `rest`."""
    parts = content if isinstance(content, list) else [content]
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            found = (
                f"a part of type {part['type']!r}" if isinstance(part, dict) and "type" in part else kind_of(part)
            )
            raise DataError(
                f"{row.place}: {where} has no role and content that are text: its content is {found}.",
                cause="Models here read text; images, audio and other parts cannot be learnt from.",
                remedy=_EXAMPLE,
            )
        if isinstance(part, dict):
            given = {key: value for key, value in part.items() if key not in ("type", "text")}
            more = {  # a schema of several kinds of parts gives each the fields of all, perhaps empty
                key: value
                for key, value in given.items()
                if not (is_nothing(value) or (key in _MAY_BE_EMPTY and value in ("", [], {})))
            }
            if switches := [key for key in more if key in SWITCHES]:
                raise DataError(
                    f"{row.place}: a part of the content of {where} has {switches[0]} {more[switches[0]]!r}.",
                    cause="Turns are learnt whole or not at all.",
                    remedy=f"Give {switches[0]} to the turn, or make several turns of it.",
                )
            check_names(row, f"a part of the content of {where}", more)
            if taken := [key for key in more if key in _OF_TURNS]:
                raise DataError(
                    f"{row.place}: a part of the content of {where} has {taken[0]} {more[taken[0]]!r}.",
                    cause="Who speaks, what is said, thought and called is said by the turn.",
                    remedy=f"Give {taken[0]} to the turn, or leave it out of the part.",
                )
            rest |= {key: value for key, value in more.items() if key not in rest}
        texts.append(text)
    return check_text(row, where, "".join(texts))


def _is_learnt(row: Row, index: int, turn: Message, *, allowed: bool) -> bool:
    is_assistant = turn["role"] == "assistant"
    given = {key: turn[key] for key in SWITCHES if key in turn}
    for key, value in given.items():
        if value not in (0, 1):  # so is a boolean
            raise DataError(
                f"{row.place}: turn {index + 1} has {key} {value!r}; a turn is learnt (1, true) or not (0, false).",
                remedy="Give 0 or 1; a row counts more often where it stands more often.",
            )
        if value and not is_assistant:
            raise DataError(
                f"{row.place}: turn {index + 1} of the {turn['role']} is to be learnt ({key}: {value!r}).",
                cause="Only turns of the assistant are learnt one by one.",
                remedy=f"Leave out {key}; for a loss over everything set train.completion_only_loss: false.",
            )
        if value and not allowed:
            raise DataError(
                f"{row.place}: turn {index + 1} of the assistant is to be learnt ({key}: {value!r}), and is in "
                "the prompt.",
                cause="Of a prompt and its completion, the completion alone is learnt.",
                remedy=f"Leave {key} out, or write prompt and completion as one list of messages.",
            )
    return is_assistant and allowed and all(given.values())


def _read_tools(row: Row, tools: Any) -> list[Any]:
    if isinstance(tools, str):
        try:
            tools = _parsed(tools) if tools.strip() else []
        except RepeatedKeyError as error:
            raise DataError(f"{row.place}: tools: {error}.", remedy="Take one out, or rename it.") from None
    if tools is None:
        return []
    if not isinstance(tools, list):
        raise DataError(
            f"{row.place}: field tools is {kind_of(tools)}, not a list of functions.",
            remedy="Give a list of JSON schemas, as for the tools of a chat template.",
        )
    return tools
