"""Render a row to text that is cut, before any tokenisation, into prompt and completion.

The model's own chat template does it where the tokenizer has one, else a few plain headings. A template
is asked what it writes before an assistant turn and up to the end of it; where a completion begins and ends
follows from the lengths of these renderings, and no template token is ever looked for among the ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from jinja2 import TemplateError

from parablock.data.formats import Message, alpaca_input, conversation, plain_text
from parablock.data.sources import Row
from parablock.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of rendered text that is either all prompt or all completion."""

    text: str
    is_completion: bool


@dataclass(frozen=True, slots=True)
class Rendering:
    """A row as text.

    Args:
        pieces: The whole text, in order; what precedes the last completion is the prompt to generate from.
        completion: The last completion as the row has it, without what the template adds.
    """

    pieces: tuple[Piece, ...]
    completion: str


def renderer(tokenizer: PreTrainedTokenizerBase, *, data_format: str) -> Callable[[Row], Rendering]:
    """Make the function that renders rows for one tokenizer.

    Args:
        tokenizer: The model's tokenizer; its chat template is used where it has one.
        data_format: A key of `FORMATS`.

    Returns:
        Row → Rendering; it raises DataError for a row that the template refuses or cannot cut.

    Raises:
        ModelError: The tokenizer has no end-of-sequence token.
    """
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "The tokenizer has no end-of-sequence token, so no completion could ever end.",
            remedy="Set eos_token in the model's tokenizer_config.json.",
        )
    opening = _opening(tokenizer)
    if data_format == "text":
        return lambda row: _render_text(row, opening, tokenizer.eos_token)
    if tokenizer.chat_template is None:
        return lambda row: _render_plainly(row, data_format, opening, tokenizer.eos_token)
    closing = tuple({token.content for token in tokenizer.added_tokens_decoder.values()} | {tokenizer.eos_token})
    return lambda row: _render_by_template(row, conversation(row, data_format), tokenizer, closing)


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tell at which tokens generation ends: end of sequence, and what the chat template ends a turn with."""
    probe = Row({"prompt": "q", "completion": "a"}, "the chat template", 1)
    ending = renderer(tokenizer, data_format="prompt_completion")(probe).pieces[-1].text
    special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = tokenizer(ending, add_special_tokens=False)["input_ids"]
    return tuple(sorted({tokenizer.eos_token_id} | special.intersection(ids)))


def _opening(tokenizer: PreTrainedTokenizerBase) -> str:
    """Give the token that this tokenizer puts before a text by itself, if any."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token if len(ids) > 1 and ids[0] == tokenizer.bos_token_id else ""


def _render_text(row: Row, opening: str, eos: str) -> Rendering:
    text = plain_text(row)
    return _rendering([Piece(opening, False), Piece(text + eos, bool(text.strip()))], text)


def _render_plainly(row: Row, data_format: str, opening: str, eos: str) -> Rendering:
    if data_format == "messages":
        return _render_roles(conversation(row, data_format), opening, eos)
    user, assistant = (turn["content"] for turn in conversation(row, data_format))
    if data_format == "gsm8k":
        user = f"Question: {user}\nAnswer:"
    elif data_format == "alpaca":
        context = alpaca_input(row)
        user = (
            f"Instruction: {row.fields['instruction']}\n" + (f"Input: {context}\n" if context else "") + "Response:"
        )
    return _rendering([Piece(opening + user, False), *_answer(user, assistant, eos)], assistant)


def _render_roles(turns: Sequence[Message], opening: str, eos: str) -> Rendering:
    pieces, completion = [Piece(opening, False)], ""
    for index, turn in enumerate(turns):
        heading = ("\n" if index else "") + turn["role"].capitalize() + ":"
        pieces.append(Piece(heading, False))
        if turn["role"] == "assistant":
            pieces += _answer(heading, turn["content"], eos)
            completion = turn["content"] if turn["content"].strip() else completion
        else:
            pieces.append(Piece(f" {turn['content']}", False))
    return _rendering(pieces, completion)


def _answer(before: str, completion: str, eos: str) -> list[Piece]:
    """Set a completion apart from the prompt by one space, unless either brings white space of its own."""
    if not completion.strip():
        return [Piece(eos, False)]
    space = "" if not before or before[-1].isspace() or completion[0].isspace() else " "
    return [Piece(space + completion + eos, True)]


def _render_by_template(
    row: Row, turns: list[Message], tokenizer: PreTrainedTokenizerBase, closing: tuple[str, ...]
) -> Rendering:
    whole = _apply(row, turns, tokenizer, generate=False)
    pieces, completion, at = [], "", 0
    for index, turn in enumerate(turns):
        if turn["role"] != "assistant" or not turn["content"].strip():
            continue
        before = _apply(row, turns[:index], tokenizer, generate=True)
        if not whole.startswith(before):
            raise _uncuttable(row, index)
        if index == len(turns) - 1:
            end = len(whole)
        else:
            until = _apply(row, turns[: index + 1], tokenizer, generate=False)
            end = _turn_end(whole, before, until, turn["content"], tokenizer.eos_token)
            if end < 0:
                raise _uncuttable(row, index)
        pieces += [Piece(whole[at : len(before)], False), Piece(whole[len(before) : end], True)]
        completion, at = turn["content"], end
    if at == len(whole) and not whole.rstrip().endswith(closing):
        pieces.append(Piece(tokenizer.eos_token, True))
    return _rendering([*pieces, Piece(whole[at:], False)], completion)


def _turn_end(whole: str, before: str, until: str, content: str, eos: str) -> int:
    """Find where a turn in the middle ends, or −1.

    A conversation cut after the turn (`until`) may differ from the whole one in two harmless ways: the
    template closes it with the end-of-sequence token, or opens only the last turn with a frame for reasoning.
    """
    turn = until[len(before) :]
    bare = turn[max(turn.find(content.strip()), 0) :]
    for candidate in (turn, turn.removesuffix(eos), bare):
        if candidate and whole.startswith(candidate, len(before)):
            return len(before) + len(candidate)
    return -1


def _apply(row: Row, turns: list[Message], tokenizer: PreTrainedTokenizerBase, *, generate: bool) -> str:
    if not turns:
        raise DataError(
            f"{row.place}: the conversation begins with the assistant, so there is nothing that it answers.",
            remedy="Put a user or a system turn first.",
        )
    try:
        return cast(str, tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generate))
    except TemplateError as error:
        raise DataError(
            f"{row.place}: the chat template of the tokenizer refuses the conversation "
            f"({', '.join(turn['role'] for turn in turns)}): {error}",
            remedy="Change the roles or their order to what the model knows.",
        ) from error


def _uncuttable(row: Row, index: int) -> DataError:
    return DataError(
        f"{row.place}: what the chat template writes up to turn {index + 1} is not the beginning of what it writes "
        "for the whole conversation, so prompt and completion cannot be told apart.",
        cause="The template changes a turn by what follows it.",
        remedy="Split the conversation into rows that end with the one assistant turn to learn.",
    )


def _rendering(pieces: Sequence[Piece], completion: str) -> Rendering:
    """Join neighbours of one kind and drop what is empty."""
    joined: list[Piece] = []
    for piece in pieces:
        if joined and joined[-1].is_completion == piece.is_completion:
            joined[-1] = Piece(joined[-1].text + piece.text, piece.is_completion)
        elif piece.text:
            joined.append(piece)
    return Rendering(tuple(joined), completion)
