"""Chat templates: rows rendered as text that is cut into prompt and completion before tokenization.

The tokenizer's chat template renders a row; without one, a template of plain headings does, which is stated and
saved with the model. The template is applied to the turns before an assistant turn and up to its end. The lengths
of these renderings say where the completion begins and ends, so no template token is searched for among the ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, cast

from jinja2 import TemplateError

from parablock.data.conversations import Conversation, Message, check_text, says_something
from parablock.data.formats import read_conversation, read_text
from parablock.data.sources import Row
from parablock.data.switches import is_off
from parablock.data.template_limits import bounded_rendering, check_template
from parablock.data.unwritten import Unwritten
from parablock.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DATE_CALL = "strftime_now"
"""What a chat template calls to write the date."""
_WRITTEN_DATE = re.compile(rf"{DATE_CALL}\(\s*(['\"])(.*?)\1\s*\)")

_HEADINGS = {
    "prompt_completion": ("", ""),
    "input_output": ("", ""),
    "gsm8k": ("Question: ", "\nAnswer:"),
    "alpaca": ("Instruction: ", "\nResponse:"),
}
"""Format → the text before and after a prompt, for a tokenizer without a chat template."""

_ROLES_TEMPLATE = (
    "{% for m in messages %}{{ '' if loop.first else '\\n' }}{{ m['role'] | capitalize }}:"
    "{% if m['role'] == 'assistant' %}"
    "{{ '' if not m['content'] or m['content'][:1].isspace() else ' ' }}{{ m['content'] }}{{ eos_token }}"
    "{% else %}{{ ' ' + m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n' if messages else '' }}Assistant:{% endif %}"
)
_HEADED_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{% set before = '' if loop.first else BEFORE + messages[loop.index0 - 1]['content'] + AFTER %}"
    "{% set edge = before[-1:] + m['content'][:1] %}"
    "{{ ' ' if before and m['content'] and edge == edge.strip() else '' }}{{ m['content'] }}{{ eos_token }}"
    "{% elif m['role'] == 'user' %}{{ '' if loop.first else '\\n' }}{{ BEFORE + m['content'] + AFTER }}"
    "{% else %}{{ '' if loop.first else '\\n' }}{{ m['content'] }}{% endif %}{% endfor %}"
)


_RAISED_BY_TEMPLATES = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of rendered text that is either all prompt or all completion."""

    text: str
    is_completion: bool


@dataclass(frozen=True, slots=True)
class Rendering:
    """A row as text, piece by piece, and its last completion without additions of the template.

    The text before the last completion is the prompt for generation.

    Args:
        pieces: The text, cut.
        completion: The last completion.
        nothing: Why there is nothing to learn, where there is nothing.
        unused: What the row has and the text has not, in words.
    """

    pieces: tuple[Piece, ...]
    completion: str
    nothing: str = "the completion is empty"
    unused: tuple[str, ...] = field(default=())


def plain_template(tokenizer: PreTrainedTokenizerBase, data_format: str) -> str:
    """Return the chat template for rows of a format and a tokenizer that has none."""
    opening = "{{ bos_token }}" if _opens_texts(tokenizer) else ""
    if data_format not in _HEADINGS:
        return opening + _ROLES_TEMPLATE
    before, after = (f"'{text}'".replace("\n", "\\n") for text in _HEADINGS[data_format])
    return opening + _HEADED_TEMPLATE.replace("BEFORE", before).replace("AFTER", after)


def make_renderer(
    tokenizer: PreTrainedTokenizerBase, *, data_format: str, date: str | None = None
) -> Callable[[Row], Rendering]:
    """Return the function that renders rows of one format for one tokenizer.

    It raises a DataError for a row that the template refuses or that cannot be cut.

    Args:
        tokenizer: The tokenizer, with or without a chat template.
        data_format: A key of `FORMATS`.
        date: The day that a template writes which asks for it, as YYYY-MM-DD; None: today.

    Raises:
        ModelError: The tokenizer has no end-of-sequence token, or its chat template is beyond a limit.
    """
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "The tokenizer has no end-of-sequence token, so no completion could ever end.",
            remedy="Set eos_token in the model's tokenizer_config.json.",
        )
    if data_format == "text":
        opening = tokenizer.bos_token if _opens_texts(tokenizer) else ""
        return lambda row: _render_text(row, opening, tokenizer.eos_token)
    template = _Template(tokenizer, data_format, date)
    return lambda row: _render(row, read_conversation(row, data_format), template)


def find_stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the tokens that end a generation: end of sequence, and the chat template's end of a turn."""
    probe = Row({"prompt": "q", "completion": "a"}, "the chat template", 1)
    ending = make_renderer(tokenizer, data_format="prompt_completion")(probe).pieces[-1].text
    special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = tokenizer(ending, add_special_tokens=False)["input_ids"]
    return tuple(sorted({tokenizer.eos_token_id} | special.intersection(ids)))


class _Template:
    """A chat template, ready to be applied to turns, and the tokens that may close a turn."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data_format: str, date: str | None) -> None:
        self._tokenizer, self.eos = tokenizer, tokenizer.eos_token
        self._options: dict[str, Any] = {}
        if tokenizer.chat_template is None:
            self._options["chat_template"] = plain_template(tokenizer, data_format)
        elif date is not None and DATE_CALL in str(tokenizer.chat_template):
            self._options["chat_template"] = _with_day(_source_of(tokenizer), datetime.fromisoformat(date))
        check_template(self._options.get("chat_template") or _source_of(tokenizer))
        self.unwritten = Unwritten(self._try)
        self.closing = tuple({token.content for token in tokenizer.added_tokens_decoder.values()} | {self.eos})

    def _try(self, turns: list[Message], tools: tuple[Any, ...]) -> str | None:
        try:
            return self.apply(Row({}, "a row", 1), turns, tools, generate=False)
        except DataError:
            return None

    def apply(self, row: Row, turns: list[Message], tools: tuple[Any, ...], *, generate: bool) -> str:
        """Render turns, with the opening of the assistant's answer if it is to `generate`."""
        try:
            with bounded_rendering(row.place):
                return cast(
                    str,
                    self._tokenizer.apply_chat_template(
                        turns,
                        tools=list(tools) or None,
                        tokenize=False,
                        add_generation_prompt=generate,
                        **self._options,
                    ),
                )
        except (TemplateError, *_RAISED_BY_TEMPLATES) as error:
            raise DataError(
                f"{row.place}: the chat template of the tokenizer refuses the conversation "
                f"({', '.join(turn['role'] for turn in turns)}): {' '.join(str(error).split())}",
                remedy="Use roles, and an order of roles, that the template accepts.",
            ) from error


def _source_of(tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        return cast(str, tokenizer.get_chat_template())
    except ValueError as error:
        raise ModelError(
            "The tokenizer has several chat templates, and none is the default one: "
            + " ".join(str(error).split()),
            remedy="Name one of them `default` in the model's tokenizer_config.json.",
        ) from None


def _with_day(template: str, day: datetime) -> str:
    """Write a day into a template, wherever it asks for today."""
    return _WRITTEN_DATE.sub(lambda call: json.dumps(day.strftime(call[2]), ensure_ascii=False), template)


def _opens_texts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether this tokenizer puts its first special token before every text."""
    ids = tokenizer("a")["input_ids"]
    return len(ids) > 1 and ids[0] == tokenizer.bos_token_id


def _render_text(row: Row, opening: str, eos: str) -> Rendering:
    text = read_text(row)
    if off := is_off(row):
        return Rendering((), "", f"the row says so ({off})")
    return _join_pieces([Piece(opening, False), Piece(text + eos, bool(text.strip()))], text)


def _render(row: Row, conversation: Conversation, template: _Template) -> Rendering:
    turns, tools = list(conversation.turns), conversation.tools
    if conversation.off:
        return Rendering((), "", f"the row says so ({conversation.off})")
    learnt = [index for index, turn in enumerate(turns) if conversation.learnt[index] and says_something(turn)]
    try:
        whole = check_text(row, "the conversation", template.apply(row, turns, tools, generate=False))
    except DataError:
        if learnt:
            raise
        return Rendering((), "", f"{_why_nothing(conversation)}, and the chat template refuses it")
    silent, unwritten = template.unwritten.find(row, conversation, whole)
    pieces, completion, at = [], "", 0
    for index in learnt:
        if index in silent and not (turns[index]["content"].strip() or turns[index].get("tool_calls")):
            continue
        before = template.apply(row, turns[:index], tools, generate=True)
        if not whole.startswith(before):
            raise _opened_otherwise(row, conversation, index, before, whole, template) or _uncuttable(row, index)
        if index == len(turns) - 1:
            end = len(whole)
        else:
            until = template.apply(row, turns[: index + 1], tools, generate=False)
            end = _turn_end(whole, before, until, turns[index]["content"], template.eos)
            if end < 0:
                raise _uncuttable(row, index)
        pieces += [Piece(whole[at : len(before)], False), Piece(whole[len(before) : end], True)]
        completion, at = turns[index]["content"] or whole[len(before) : end].strip(), end
    if at and at == len(whole) and not whole.rstrip().endswith(template.closing):
        pieces.append(Piece(template.eos, True))
    unused = [*conversation.unused, *unwritten]
    if conversation.begins_with_the_assistant:
        unused.append("the assistant's opening turn, which answers nothing and is not learnt")
    return _join_pieces([*pieces, Piece(whole[at:], False)], completion, _why_nothing(conversation), tuple(unused))


def _why_nothing(conversation: Conversation) -> str:
    if any(conversation.learnt):
        return "the completion is empty"
    if any(turn["role"] == "assistant" for turn in conversation.turns):
        return "no turn of the assistant is to be learnt"
    return "no turn is the assistant's"


def _turn_end(whole: str, before: str, until: str, content: str, eos: str) -> int:
    """Return the end of a turn in the middle, or −1 if it cannot be found.

    The conversation up to this turn (`until`) may differ from the whole one in two harmless ways: the template adds
    the end-of-sequence token at its end, or opens only the last turn with a frame for reasoning.
    """
    turn = until[len(before) :]
    bare = turn[max(turn.find(content.strip()), 0) :]
    for candidate in (turn, turn.removesuffix(eos), bare):
        if candidate and whole.startswith(candidate, len(before)):
            return len(before) + len(candidate)
    return -1


def _opened_otherwise(
    row: Row, conversation: Conversation, index: int, before: str, whole: str, template: _Template
) -> DataError | None:
    """Return the error where a turn does not begin as the template opens an answer; None where it does."""

    def rendered(*turns: Message) -> str:
        return template.apply(row, list(turns), conversation.tools, generate=False)

    *earlier, turn = conversation.turns[: index + 1]
    if not whole.startswith(rendered(*earlier)):
        return None
    same = next(
        (at for at, (one, other) in enumerate(zip(before, whole, strict=False)) if one != other), len(whole)
    )
    opening = before[same:]
    ended = f"{opening}…{opening.strip().replace('<', '</', 1)}"
    helps = rendered(*earlier, {**turn, "content": ended + turn["content"]}).startswith(before)
    begin = (
        f"Begin the content of the turn with {opening!r}, and end its reasoning there as the model does. Or take"
    )
    return DataError(
        f"{row.place}: the chat template opens an answer that is to be generated with {opening!r}, and turn "
        f"{index + 1} does not begin so: another beginning would be learnt than the model is given.",
        cause="The generation prompt of the template begins with reasoning, and the turn has none.",
        remedy=f"{begin if helps else 'Take'} a model whose chat template opens no reasoning, or take {opening!r} "
        "out of the end of its chat template.",
    )


def _uncuttable(row: Row, index: int) -> DataError:
    return DataError(
        f"{row.place}: the chat template renders the conversation up to turn {index + 1} differently when later "
        "turns follow, so prompt and completion cannot be told apart.",
        cause="The template changes a turn depending on later turns.",
        remedy="Split the conversation into rows that each end with the one assistant turn to learn.",
    )


def _join_pieces(
    pieces: list[Piece], completion: str, nothing: str = "the completion is empty", unused: tuple[str, ...] = ()
) -> Rendering:
    """Join neighbouring pieces of one kind and drop empty ones."""
    joined: list[Piece] = []
    for piece in pieces:
        if joined and joined[-1].is_completion == piece.is_completion:
            joined[-1] = Piece(joined[-1].text + piece.text, piece.is_completion)
        elif piece.text:
            joined.append(piece)
    return Rendering(tuple(joined), completion, nothing, unused)
