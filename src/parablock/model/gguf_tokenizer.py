"""Tokenizers in GGUF: byte-level BPE, and BPE of SentencePiece's kind, as of Llama 2.

llama.cpp knows the first by merges and the name of how a text is cut before them, and the second by a score of each
token: it joins the two neighbours whose union has the highest one. Where merges do not say the same, or where the
spaces that llama.cpp writes are others, the tokenizer is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from parablock.errors import ModelError

if TYPE_CHECKING:
    from gguf import GGUFWriter, TokenType

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PRE_TOKENIZERS: dict[tuple[tuple[str, Any], ...], str] = {
    (("ByteLevel", True),): "gpt-2",
    (("Digits", True), ("ByteLevel", True)): "smollm",
    (("Split", _WORDS + r"\p{N}" + _REST), ("ByteLevel", False)): "qwen2",
    (("Split", _WORDS + r"\p{N}{1,3}" + _REST), ("ByteLevel", False)): "llama-bpe",
}
"""Steps of a pre-tokenizer, each with what it is given → llama.cpp's name of the whole."""
_GIVEN = {"ByteLevel": "use_regex", "Digits": "individual_digits", "Split": "pattern"}
SPACE, _UNKNOWN_LAST = "\u2581", -1e9
"""How SentencePiece writes a space; the score of what no merge makes."""
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_TURNS = ("user", "assistant", "user")


def add_tokenizer(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, num_rows: int) -> None:
    """Write a tokenizer for a model with so many rows of embeddings.

    Raises:
        ModelError: llama.cpp would read it as another one.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = json.loads(backend.to_str()) if backend is not None else {"model": {"type": "no fast one"}}
    tokens = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    if _is_sentencepiece(content):
        _add_sentencepiece(writer, tokenizer, content)
        scores = scores_of(content)
        writer.add_token_scores([scores.get(tokens.get(token_id, ""), 0.0) for token_id in range(num_rows)])
    elif (name := _pre_tokenizer_of(content)) is not None:
        merges = content["model"]["merges"]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(name)
        writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    else:
        cause = f"Those that are, are of SentencePiece, or cut texts like {', '.join(_PRE_TOKENIZERS.values())}."
        raise _refused(content, cause)
    writer.add_token_list([tokens.get(token_id, f"[PAD{token_id}]") for token_id in range(num_rows)])
    writer.add_token_types([_type_of(token_id, tokens, tokenizer, content) for token_id in range(num_rows)])
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(len(ids) > 1 and ids[0] == tokenizer.bos_token_id)
    for add, token_id in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
    ):
        if token_id is not None:
            add(token_id)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.get_chat_template())


def _refused(content: dict[str, Any], cause: str) -> ModelError:
    return ModelError(
        f"The tokenizer of this model ({content['model'].get('type')}) is not written as GGUF here",
        cause=cause,
        remedy="Export it with --format hf, and convert that folder with llama.cpp's convert_hf_to_gguf.py.",
    )


def _type_of(
    token_id: int, tokens: dict[int, str], tokenizer: PreTrainedTokenizerBase, content: dict[str, Any]
) -> TokenType:
    from gguf import TokenType

    added = tokenizer.added_tokens_decoder
    if token_id not in tokens:
        return TokenType.UNUSED
    if _is_sentencepiece(content):
        if tokens[token_id] == content["model"].get("unk_token"):
            return TokenType.UNKNOWN
        if _BYTE.fullmatch(tokens[token_id]):
            return TokenType.BYTE
    if token_id in added:
        return TokenType.CONTROL if added[token_id].special else TokenType.USER_DEFINED
    return TokenType.NORMAL


# -- SentencePiece
def _is_sentencepiece(content: dict[str, Any]) -> bool:
    return content["model"].get("type") == "BPE" and bool(content["model"].get("byte_fallback"))


def _writes_spaces_alone(content: dict[str, Any]) -> bool:
    """Tell whether a text is changed in nothing but its spaces before the merges, and cut nowhere."""
    given, cuts = content.get("normalizer"), content.get("pre_tokenizer")
    steps = [] if given is None else given["normalizers"] if given["type"] == "Sequence" else [given]
    writes = all(
        step == {"type": "Prepend", "prepend": SPACE}
        or (step["type"], step.get("pattern"), step.get("content")) == ("Replace", {"String": " "}, SPACE)
        for step in steps
    )
    whole = cuts is None or (cuts["type"], cuts.get("replacement"), cuts.get("split")) == (
        "Metaspace",
        SPACE,
        False,
    )
    return writes and whole


def _add_sentencepiece(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, content: dict[str, Any]) -> None:
    """Write whether texts get a space before them, at the start and behind special tokens."""
    if len([token for token in content["model"]["vocab"] if _BYTE.fullmatch(token)]) < 256:
        raise _refused(content, "It has no token for each byte, which llama.cpp looks for.")
    if not _writes_spaces_alone(content):
        raise _refused(
            content, "It changes or cuts texts in ways of its own before its merges; llama.cpp does not."
        )
    texts = _texts_of(tokenizer)
    wanted = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    for has_prefix in (True, False):
        read = spaced(content, has_prefix=has_prefix)
        if [read.encode(text, add_special_tokens=False).ids for text in texts] == wanted:
            writer.add_tokenizer_model("llama")
            writer.add_tokenizer_pre("default")
            writer.add_add_space_prefix(has_prefix)
            return
    cause = (
        "llama.cpp writes a space before a text and behind each special token, or nowhere; this one does neither."
    )
    raise _refused(content, cause)


def _texts_of(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return a conversation as the template has it, or plain texts where there is none."""
    if tokenizer.chat_template is None:
        return ["One or two.\nThree", " four"]
    turns = [{"role": role, "content": f"One or {n}.\n  Three"} for n, role in enumerate(_TURNS)]
    return [str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))]


def spaced(content: dict[str, Any], *, has_prefix: bool) -> Tokenizer:
    """Make the tokenizer that llama.cpp makes of this one: spaces of its own, and added tokens as they stand."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prefix = [{"type": "Prepend", "prepend": SPACE}] if has_prefix else []
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return Tokenizer.from_str(
        json.dumps(
            content
            | {"normalizer": {"type": "Sequence", "normalizers": [*prefix, replace]}}
            | {"pre_tokenizer": None, "post_processor": None, "truncation": None, "padding": None}
            | {"added_tokens": [token | plain for token in content["added_tokens"]]}
        )
    )


def scores_of(content: dict[str, Any]) -> dict[str, float]:
    """Return the score of each token that a merge makes, from the order of the merges.

    Raises:
        ModelError: Scores cannot say what the merges do: two neighbours whose union is a token do not merge, or
            merges of two tokens lie among each other.
    """
    vocabulary, merges = content["model"]["vocab"], content["model"]["merges"]
    pairs = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]
    added = {token["content"] for token in content["added_tokens"]}
    known = set(pairs)
    for token in vocabulary:
        halves = () if token in added else ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        for left, right in halves:
            if left in vocabulary and right in vocabulary and (left, right) not in known:
                raise _refused(content, f"{left!r} and {right!r} do not merge, though {token!r} is a token.")
    first, last = dict[str, int](), dict[str, int]()
    for rank, pair in enumerate(pairs):
        first.setdefault("".join(pair), rank)
        last["".join(pair)] = rank
    scores, before, until = dict.fromkeys(vocabulary, _UNKNOWN_LAST), "", -1
    for rank, (token, begins) in enumerate(first.items(), 1):
        if begins < until:
            raise _refused(content, f"The merges of {before!r} and {token!r} lie among each other.")
        before, until = token, last[token]
        scores[token] = -float(rank)
    return {token: 0.0 if _BYTE.fullmatch(token) or token in added else score for token, score in scores.items()}


# -- byte-level BPE
def _pre_tokenizer_of(content: dict[str, Any]) -> str | None:
    """Return llama.cpp's name of how a tokenizer cuts a text before its merges; None if it has none."""
    given = content.get("pre_tokenizer") or {}
    normalizer = content.get("normalizer") or {"type": "NFC"}
    if content["model"].get("type") != "BPE" or normalizer["type"] != "NFC":
        return None
    steps = given.get("pretokenizers", []) if given.get("type") == "Sequence" else [given]
    if any(step.get("add_prefix_space") for step in steps):
        return None
    return _PRE_TOKENIZERS.get(tuple(_steps(steps)))


def _steps(steps: list[dict[str, Any]]) -> Iterator[tuple[str, Any]]:
    for step in steps:
        name = str(step.get("type"))
        value = step.get(_GIVEN.get(name, ""))
        is_pattern = name == "Split" and isinstance(value, dict) and step.get("behavior") == "Isolated"
        yield (
            name,
            value.get("Regex") if is_pattern and isinstance(value, dict) else value if name != "Split" else "",
        )
