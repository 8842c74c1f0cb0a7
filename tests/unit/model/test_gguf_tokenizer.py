"""Tokenizers of SentencePiece's kind in GGUF; those of byte-level BPE are in `test_gguf_file.py`."""

from __future__ import annotations

from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader, GGUFWriter
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from parablock.errors import ModelError
from parablock.model.gguf_tokenizer import add_tokenizer

BYTES = [f"<0x{n:02X}>" for n in range(256)]
MADE = ["▁t", "he", "▁the", "▁a", "▁▁", "at", "▁at", "hat", "that", "▁that"]  # the best first
VOCABULARY = ["<unk>", "<s>", "</s>", *BYTES, *MADE, *"▁theaOnrwo.T"]
ROWS = 300
TEXTS = ["the that", "  hat at  the", "a  that\nZürich", "thethat", "One or two."]
TEMPLATES = {
    "from the start": "<s>{% for m in messages %}{{ m.role }} {{ m.content }}{{ eos_token }}{% endfor %}",
    "words first": "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}",
    "words alone": "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}",
}
REPLACE = normalizers.Replace(" ", "▁")
SPACES: dict[str, Any] = {
    "always": normalizers.Sequence([normalizers.Prepend("▁"), REPLACE]),
    "never": normalizers.Sequence([REPLACE]),
    "once": pre_tokenizers.Metaspace(prepend_scheme="first", split=False),
    "other letters": normalizers.Sequence([normalizers.NFKC(), normalizers.Prepend("▁"), REPLACE]),
    "digits": pre_tokenizers.Digits(individual_digits=True),
}


def merges_of(made: list[str]) -> list[tuple[str, str]]:
    """Return every way to make each of these tokens of two others."""
    halves = ((token[:cut], token[cut:]) for token in made for cut in range(1, len(token)))
    return [pair for pair in halves if all(half in VOCABULARY for half in pair)]


def tokenizer_of(
    spaces: str,
    template: str | None = None,
    *,
    vocabulary: list[str] = VOCABULARY,
    leave_out: int | None = None,
    mixed: bool = False,
) -> PreTrainedTokenizerFast:
    merges = merges_of(MADE)
    if mixed:  # each second merge first
        merges = merges[1::2] + merges[::2]
    if leave_out is not None:
        del merges[leave_out]
    ids = {token: n for n, token in enumerate(vocabulary)}
    made = Tokenizer(models.BPE(ids, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    if isinstance(SPACES[spaces], pre_tokenizers.PreTokenizer):
        made.pre_tokenizer = SPACES[spaces]
    else:
        made.normalizer = SPACES[spaces]
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = {f"{name}_token": token for name, token in (("unk", "<unk>"), ("bos", "<s>"), ("eos", "</s>"))}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, **special)
    tokenizer.chat_template = template and TEMPLATES[template]
    return tokenizer


def written(tokenizer: PreTrainedTokenizerFast, path: Path) -> dict[str, Any]:
    writer = GGUFWriter(path, "llama")
    add_tokenizer(writer, tokenizer, ROWS)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    reader = GGUFReader(path)
    start = "tokenizer.ggml."
    return {
        key.removeprefix(start): reader.fields[key].contents() for key in reader.fields if key.startswith(start)
    }


def read_as_llama_cpp_does(file: dict[str, Any], text: str) -> list[int]:
    """Join neighbours, the best first and of equals the left ones, as llama.cpp joins those of SentencePiece."""
    ids, ends = {token: n for n, token in enumerate(file["tokens"])}, list[int]()
    parts = text.replace("</s>", "\0</s>\0").replace("<s>", "\0<s>\0").split("\0")
    for part in filter(None, parts):
        if part in ("<s>", "</s>"):
            ends.append(ids[part])
            continue
        pieces = list(((" " if file["add_space_prefix"] else "") + part).replace(" ", "▁"))
        while True:
            joined = [left + right for left, right in pairwise(pieces)]
            scores = {n: file["scores"][ids[token]] for n, token in enumerate(joined) if token in ids}
            if not scores:
                break
            best = max(scores, key=lambda n: (scores[n], -n))
            pieces[best : best + 2] = [joined[best]]
        for piece in pieces:
            ends += [ids[piece]] if piece in ids else [ids[f"<0x{byte:02X}>"] for byte in piece.encode()]
    return ends


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


@pytest.mark.parametrize("spaces", ["always", "never"])
def test_scores_join_what_merges_do(spaces: str, tmp_path: Path):
    tokenizer = tokenizer_of(spaces)
    file = written(tokenizer, tmp_path / "model.gguf")
    assert (file["model"], file["pre"], file["add_space_prefix"]) == ("llama", "default", spaces == "always")
    for text in (*TEXTS, "the</s>that<s> a", "</s>"):
        assert read_as_llama_cpp_does(file, text) == ids_of(tokenizer, text), text
    other = file | {"scores": [-score for score in file["scores"]]}
    assert any(read_as_llama_cpp_does(other, text) != ids_of(tokenizer, text) for text in TEXTS)
    other = file | {"add_space_prefix": spaces == "never"}
    assert all(read_as_llama_cpp_does(other, text) != ids_of(tokenizer, text) for text in TEXTS)


def test_tokens_have_types_and_scores(tmp_path: Path):
    tokenizer = tokenizer_of("never")
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    file = written(tokenizer, tmp_path / "model.gguf")
    types = dict(zip(file["tokens"], file["token_type"], strict=True))
    assert {token: types[token] for token in ("<unk>", "<s>", "</s>", "<tool>", "<0x0A>", "▁the", "[PAD299]")} == {
        "<s>": 3,
        "</s>": 3,
        "<unk>": 2,
        "<tool>": 4,
        "<0x0A>": 6,
        "▁the": 1,
        "[PAD299]": 5,
    }
    assert len(file["tokens"]) == len(file["scores"]) == ROWS
    scores = dict(zip(file["tokens"], file["scores"], strict=True))
    assert 0 > scores["▁t"] > scores["he"] > scores["▁that"] > scores["a"]


@pytest.mark.skipif(
    find_spec("transformers.integrations.gguf") is None,
    reason="this Transformers leaves out the space before the first word; newer ones have a reader of their own",
)
def test_transformers_reads_the_same(tmp_path: Path):
    again = tokenizer_of("once", "from the start")
    written(again, tmp_path / "once.gguf")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    read = AutoTokenizer.from_pretrained(tmp_path, gguf_file="once.gguf")
    assert [ids_of(read, text) for text in TEXTS] == [ids_of(again, text) for text in TEXTS]


@pytest.mark.parametrize(("template", "has_prefix"), [("from the start", False), ("words alone", True)])
def test_one_space_before_the_first_word_is_written_where_conversations_come_out_the_same(
    template: str, has_prefix: bool, tmp_path: Path
):
    """Llama 2's tokenizer in Transformers writes one; llama.cpp one behind each special token too, or none."""
    tokenizer = tokenizer_of("once", template)
    file = written(tokenizer, tmp_path / "model.gguf")
    assert file["add_space_prefix"] == has_prefix
    turns = [{"role": "user", "content": "the that"}, {"role": "assistant", "content": "a  hat"}] * 2
    text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    assert read_as_llama_cpp_does(file, text) == ids_of(tokenizer, text)
    other = file | {"add_space_prefix": not has_prefix}
    assert read_as_llama_cpp_does(other, text) != ids_of(tokenizer, text)


@pytest.mark.parametrize("template", ["words first", None])
def test_spaces_that_llama_cpp_would_write_elsewhere_are_refused(template: str | None, tmp_path: Path):
    with pytest.raises(ModelError, match="is not written as GGUF here") as refused:
        written(tokenizer_of("once", template), tmp_path / "model.gguf")
    assert "behind each special token" in (refused.value.cause or "")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"leave_out": 1}, "'h' and 'e' do not merge, though 'he' is a token"),
        ({"mixed": True}, "lie among each other"),
        ({"vocabulary": [token for token in VOCABULARY if token != "<0x7F>"]}, "no token for each byte"),
    ],
)
def test_what_scores_cannot_say_is_refused(changes: dict[str, Any], says: str, tmp_path: Path):
    with pytest.raises(ModelError, match="is not written as GGUF here") as refused:
        written(tokenizer_of("always", **changes), tmp_path / "model.gguf")
    assert says in (refused.value.cause or "")


@pytest.mark.parametrize("spaces", ["other letters", "digits"])
def test_what_else_is_done_to_a_text_is_refused(spaces: str, tmp_path: Path):
    with pytest.raises(ModelError, match="is not written as GGUF here") as refused:
        written(tokenizer_of(spaces), tmp_path / "model.gguf")
    assert "in ways of its own" in (refused.value.cause or "")


def test_a_unigram_tokenizer_is_refused(tmp_path: Path):
    made = Tokenizer(models.Unigram([("<unk>", 0.0), *((token, -1.0) for token in BYTES)], 0, byte_fallback=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")
    with pytest.raises(ModelError, match=r"\(Unigram\) is not written as GGUF here"):
        written(tokenizer, tmp_path / "model.gguf")
