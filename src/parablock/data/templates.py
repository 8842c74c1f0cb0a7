"""Chat templates: rows rendered as text that is cut into prompt and completion before tokenization.

The tokenizer's chat template renders a row; without one, a few plain headings do. The template is applied to the
turns before an assistant turn and up to its end. The lengths of these renderings say where the completion begins
and ends, so no template token is ever searched for among the ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from jinja2 import TemplateError

from parablock.data.formats import Message, read_alpaca_input, read_conversation, read_text
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
    """A row as text, piece by piece, and its last completion without additions of the template.

    The text before the last completion is the prompt for generation.
    """

    pieces: tuple[Piece, ...]
    completion: str


def make_renderer(tokenizer: PreTrainedTokenizerBase, *, data_format: str) -> Callable[[Row], Rendering]:
    """Return the function that renders rows of one format for one tokenizer.

    It raises a DataError for a row that the template refuses or that cannot be cut.

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
    return lambda row: _render_by_template(row, read_conversation(row, data_format), tokenizer, closing)


def find_stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the tokens that end a generation: end of sequence, and the chat template's end of a turn."""
    probe = Row({"prompt": "q", "completion": "a"}, "the chat template", 1)
    ending = make_renderer(tokenizer, data_format="prompt_completion")(probe).pieces[-1].text
    special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = tokenizer(ending, add_special_tokens=False)["input_ids"]
    return tuple(sorted({tokenizer.eos_token_id} | special.intersection(ids)))


def _opening(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the token that this tokenizer puts before every text; empty if there is none."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token if len(ids) > 1 and ids[0] == tokenizer.bos_token_id else ""


def _render_text(row: Row, opening: str, eos: str) -> Rendering:
    text = read_text(row)
    return _join_pieces([Piece(opening, False), Piece(text + eos, bool(text.strip()))], text)


def _render_plainly(row: Row, data_format: str, opening: str, eos: str) -> Rendering:
    if data_format == "messages":
        return _render_roles(read_conversation(row, data_format), opening, eos)
    user, assistant = (turn["content"] for turn in read_conversation(row, data_format))
    if data_format == "gsm8k":
        user = f"Question: {user}\nAnswer:"
    elif data_format == "alpaca":
        context = read_alpaca_input(row)
        user = (
            f"Instruction: {row.fields['instruction']}\n" + (f"Input: {context}\n" if context else "") + "Response:"
        )
    return _join_pieces([Piece(opening + user, False), *_answer_pieces(user, assistant, eos)], assistant)


def _render_roles(turns: Sequence[Message], opening: str, eos: str) -> Rendering:
    pieces, completion = [Piece(opening, False)], ""
    for index, turn in enumerate(turns):
        heading = ("\n" if index else "") + turn["role"].capitalize() + ":"
        pieces.append(Piece(heading, False))
        if turn["role"] == "assistant":
            pieces += _answer_pieces(heading, turn["content"], eos)
            completion = turn["content"] if turn["content"].strip() else completion
        else:
            pieces.append(Piece(f" {turn['content']}", False))
    return _join_pieces(pieces, completion)


def _answer_pieces(before: str, completion: str, eos: str) -> list[Piece]:
    """Put one space between prompt and completion, unless either already has white space there."""
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
    return _join_pieces([*pieces, Piece(whole[at:], False)], completion)


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


def _apply(row: Row, turns: list[Message], tokenizer: PreTrainedTokenizerBase, *, generate: bool) -> str:
    if not turns:
        raise DataError(
            f"{row.place}: the conversation begins with the assistant, so the assistant has nothing to answer.",
            remedy="Put a user or a system turn first.",
        )
    try:
        return cast(str, tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generate))
    except TemplateError as error:
        raise DataError(
            f"{row.place}: the chat template of the tokenizer refuses the conversation "
            f"({', '.join(turn['role'] for turn in turns)}): {error}",
            remedy="Use roles, and an order of roles, that the template accepts.",
        ) from error


def _uncuttable(row: Row, index: int) -> DataError:
    return DataError(
        f"{row.place}: the chat template renders the conversation up to turn {index + 1} differently when later "
        "turns follow, so prompt and completion cannot be told apart.",
        cause="The template changes a turn depending on later turns.",
        remedy="Split the conversation into rows that each end with the one assistant turn to learn.",
    )


def _join_pieces(pieces: Sequence[Piece], completion: str) -> Rendering:
    """Join neighbouring pieces of one kind and drop empty ones."""
    joined: list[Piece] = []
    for piece in pieces:
        if joined and joined[-1].is_completion == piece.is_completion:
            joined[-1] = Piece(joined[-1].text + piece.text, piece.is_completion)
        elif piece.text:
            joined.append(piece)
    return Rendering(tuple(joined), completion)
