from __future__ import annotations

import itertools
import json
import operator
from collections import Counter
from pathlib import Path

import pytest
import torch

from parablock.data.formats import detect_format
from parablock.data.sources import load_rows
from parablock.demo.material import TEST_FILE_NAME, make_tiny_llama, make_word_problems
from parablock.errors import DataError, StorageError
from parablock.model.pretrained import load_model
from parablock.model.save import model_sha256

TEXTS = ["Ann has 3 apples and picks 12 more.", "How many apples does Ann have now?", "#### 15"]
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def rows_of(path: Path) -> list[dict[str, str]]:
    return [row.fields for row in load_rows(str(path), split="train")]


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    folder = tmp_path_factory.mktemp("problems")
    return folder, make_word_problems(folder, num_clients=7, examples_per_client=200, seed=0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("model") / "tiny", TEXTS, seed=0)


# --- word problems


def test_there_is_one_file_for_each_client_and_one_to_test_on(problems):
    folder, paths = problems
    assert [path.name for path in paths] == [f"client_00{client_id}.train.jsonl" for client_id in range(7)]
    assert sorted(folder.iterdir()) == sorted([*paths, folder / TEST_FILE_NAME])
    assert [len(rows_of(path)) for path in paths] == [200] * 7
    assert len(rows_of(folder / TEST_FILE_NAME)) == 7 * 200 // 8


def test_the_files_are_a_function_of_the_seed(problems, tmp_path: Path):
    _, paths = problems
    again = make_word_problems(tmp_path / "again", num_clients=7, examples_per_client=200, seed=0)
    other = make_word_problems(tmp_path / "other", num_clients=7, examples_per_client=200, seed=1)
    for first, second, third in zip(paths, again, other, strict=True):
        assert first.read_bytes() == second.read_bytes() != third.read_bytes()
    tests = [path.parent / TEST_FILE_NAME for path in (paths[0], again[0], other[0])]
    assert tests[0].read_bytes() == tests[1].read_bytes() != tests[2].read_bytes()


def test_every_row_is_of_the_gsm8k_format_with_one_line_of_reasoning(problems):
    folder, paths = problems
    for path in [*paths, folder / TEST_FILE_NAME]:
        assert detect_format(load_rows(str(path), split="train")) == "gsm8k"
        for row in rows_of(path):
            reasoning, mark, answer = row["answer"].partition("\n#### ")
            assert (mark, "\n" in reasoning, bool(answer)) == ("\n#### ", False, True)


def test_every_answer_is_right(problems):
    _, paths = problems
    seen = Counter()
    for row in itertools.chain.from_iterable(rows_of(path) for path in paths):
        reasoning, answer = row["answer"].split("\n#### ")
        words = reasoning.rstrip(".").split()
        for left, sign, right, equals, result in zip(*(words[i:] for i in range(5)), strict=False):
            if equals == "=":  # such as: 3 + 4 = 7
                assert OPERATIONS[sign](int(left), int(right)) == int(result) == int(answer)
                assert left in row["question"] and right in row["question"]
                seen[sign] += 1
        if row["template"] == "which_is_larger":
            numbers = [int(word.strip(",?")) for word in row["question"].split() if word.strip(",?").isdigit()]
            assert max(numbers) == int(answer) and len(set(numbers)) == 2
            seen["larger"] += 1
        if row["template"] == "repeat_the_words":
            assert row["question"] == f"Repeat the words: {answer}"
            seen["repeat"] += 1
    assert sum(seen.values()) == 7 * 200 and set(seen) == {"+", "-", "*", "larger", "repeat"}


def test_every_client_has_a_topic_of_its_own_and_a_few_rows_of_others(problems):
    _, paths = problems
    favourites = []
    for path in paths:
        counts = Counter(row["template"] for row in rows_of(path))
        topic, count = counts.most_common(1)[0]
        favourites.append(topic)
        assert len(counts) == 5
        assert 0.75 < count / 200 < 0.93  # 0.8 + 0.2 / 5 = 0.84 on average
    assert len(set(favourites[:5])) == 5 and favourites[5:] == favourites[:2]


@pytest.mark.parametrize(("num_clients", "num_topics"), [(1, 2), (2, 2), (4, 4), (6, 5)])
def test_nobody_is_tested_on_a_topic_that_no_client_has_of_its_own(
    num_clients: int, num_topics: int, tmp_path: Path
):
    paths = make_word_problems(tmp_path, num_clients=num_clients, examples_per_client=40, seed=0)
    trained = {row["template"] for path in paths for row in rows_of(path)}
    assert len(trained) == num_topics
    assert {row["template"] for row in rows_of(tmp_path / TEST_FILE_NAME)} == trained


def test_the_test_file_has_every_topic_equally_often_and_no_question_of_a_client(problems):
    folder, paths = problems
    held_out = rows_of(folder / TEST_FILE_NAME)
    trained_on = {row["question"] for path in paths for row in rows_of(path)}
    assert set(Counter(row["template"] for row in held_out).values()) == {len(held_out) // 5}
    assert trained_on.isdisjoint(row["question"] for row in held_out)
    assert not trained_on.isdisjoint(row["question"] for row in rows_of(paths[0]))


@pytest.mark.parametrize("key", ["num_clients", "examples_per_client"])
def test_no_clients_or_no_examples_is_an_error_that_names_it(key: str, tmp_path: Path):
    with pytest.raises(DataError, match=f"{key} is 0"):
        make_word_problems(tmp_path, **{"num_clients": 1, "examples_per_client": 1, "seed": 0, key: 0})
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_is_an_error_and_leaves_no_half_file(tmp_path: Path):
    (tmp_path / TEST_FILE_NAME).mkdir()
    with pytest.raises(StorageError, match=TEST_FILE_NAME):
        make_word_problems(tmp_path, num_clients=1, examples_per_client=3, seed=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["client_000.train.jsonl", TEST_FILE_NAME]
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file"):
        make_word_problems(tmp_path / "file", num_clients=1, examples_per_client=3, seed=0)


# --- the model


def test_the_checkpoint_is_a_function_of_seed_and_texts(checkpoint: Path, tmp_path: Path):
    again = make_tiny_llama(tmp_path / "again", iter(TEXTS), seed=0)
    other_seed = make_tiny_llama(tmp_path / "other_seed", TEXTS, seed=1)
    other_texts = make_tiny_llama(tmp_path / "other_texts", ["Which is larger? " * 5], seed=0)
    assert model_sha256(again) == model_sha256(checkpoint) != model_sha256(other_seed)
    tokenizers = [(path / "tokenizer.json").read_bytes() for path in (checkpoint, again, other_seed, other_texts)]
    assert tokenizers[0] == tokenizers[1] == tokenizers[2] != tokenizers[3]


def test_making_a_model_leaves_the_global_generator_alone(tmp_path: Path):
    before = torch.get_rng_state()
    make_tiny_llama(tmp_path / "tiny", TEXTS, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    assert not torch.equal(torch.get_rng_state(), before)


def test_the_checkpoint_loads_as_a_small_llama_of_eight_layers_or_as_asked_with_tied_embeddings(
    checkpoint: Path, tmp_path: Path
):
    loaded = load_model(str(checkpoint), dtype="float32", device="cpu", init="pretrained", seed=0)
    assert loaded.model.config.num_hidden_layers == 8
    assert loaded.model.get_input_embeddings().weight is loaded.model.get_output_embeddings().weight
    assert 1_000_000 < sum(parameter.numel() for parameter in loaded.model.parameters()) < 3_000_000
    assert len(loaded.tokenizer) == loaded.model.config.vocab_size <= 1024
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == ["tiny"]
    flat = make_tiny_llama(tmp_path / "flat", TEXTS, seed=0, num_layers=2)
    assert json.loads((flat / "config.json").read_text())["num_hidden_layers"] == 2


def test_the_tokenizer_spells_any_text_and_numbers_digit_by_digit(checkpoint: Path):
    tokenizer = load_model(str(checkpoint), dtype="float32", device="cpu", init="pretrained", seed=0).tokenizer
    for text in [*TEXTS, "Grüße, 世界! 🙂\n\ttab"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.tokenize(" apples") == ["Ġapples"]  # learned from the texts, unlike the next
    assert len(tokenizer.tokenize(" zebras")) > 1
    assert tokenizer.tokenize("1512") == ["1", "5", "1", "2"]


def test_no_text_at_all_is_an_error(tmp_path: Path):
    for texts in ([], [""]):
        with pytest.raises(DataError, match="no text"):
            make_tiny_llama(tmp_path / "tiny", texts, seed=0)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_cannot_be_written_is_an_error(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError):
        make_tiny_llama(tmp_path / "file" / "tiny", TEXTS, seed=0)
