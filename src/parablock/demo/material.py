"""Made-up data and a tiny model for demos and tests: word problems and a random Llama, both from a seed.

`make_word_problems` writes arithmetic word problems and plain instructions in the format of GSM8K. Each client
has a topic of its own, so that the split is as uneven as that of real sites. `make_tiny_llama` writes a random
Llama that two CPU cores can fine-tune, with a tokenizer trained on given texts.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from parablock.errors import DataError
from parablock.model.save import save_model
from parablock.seeding import generator_for, seed_for
from parablock.storage.files import storage, write_atomically

TEST_FILE_NAME = "test.jsonl"
OWN_TOPIC_SHARE = 0.8
HELD_OUT_ONE_IN = 8

_NAMES = ("Ann", "Ben", "Cara", "Dan", "Eva", "Finn", "Gina", "Hugo")
_FRUITS = ("apples", "pears", "plums", "lemons", "figs", "limes")
_THINGS = ("pens", "cups", "books", "balls", "keys", "coins")
_WORDS = ("river", "stone", "cloud", "lamp", "tree", "bird", "road", "sand", "wind", "door", "moon", "leaf")

_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_VOCABULARY_SIZE = 512
_MAX_POSITIONS = 512

Problem = tuple[str, str, str]
"""Question, one line of reasoning, final answer."""


def _addition(draw: np.random.Generator) -> Problem:
    name, fruit = str(draw.choice(_NAMES)), str(draw.choice(_FRUITS))
    have, more = (int(number) for number in draw.integers(1, 5, size=2))
    total = have + more
    question = f"{name} has {have} {fruit} and picks {more} more. How many {fruit} does {name} have now?"
    return question, f"{name} has {have} + {more} = {total} {fruit}.", str(total)


def _subtraction(draw: np.random.Generator) -> Problem:
    name, thing = str(draw.choice(_NAMES)), str(draw.choice(_THINGS))
    left, spent = (int(number) for number in draw.integers(1, 5, size=2))
    money = left + spent
    question = f"{name} has ${money} and pays ${spent} for {thing}. How many dollars are left?"
    return question, f"{name} has {money} - {spent} = {left} dollars left.", str(left)


def _multiplication(draw: np.random.Generator) -> Problem:
    thing = str(draw.choice(_THINGS))
    boxes, each = (int(number) for number in draw.integers(2, 6, size=2))
    total = boxes * each
    question = f"There are {boxes} boxes with {each} {thing} in each box. How many {thing} are there?"
    return question, f"There are {boxes} * {each} = {total} {thing}.", str(total)


def _comparison(draw: np.random.Generator) -> Problem:
    first, second = (int(number) for number in draw.choice(10, size=2, replace=False))
    larger, smaller = max(first, second), min(first, second)
    return f"Which is larger, {first} or {second}?", f"{larger} is larger than {smaller}.", str(larger)


def _repetition(draw: np.random.Generator) -> Problem:
    words = " ".join(draw.choice(_WORDS, size=3))
    return f"Repeat the words: {words}", f"The words are {words}.", words


_TOPICS: dict[str, Callable[[np.random.Generator], Problem]] = {
    "fruit_addition": _addition,
    "money_subtraction": _subtraction,
    "box_multiplication": _multiplication,
    "which_is_larger": _comparison,
    "repeat_the_words": _repetition,
}


def make_word_problems(directory: Path, *, num_clients: int, examples_per_client: int, seed: int) -> list[Path]:
    """Write one JSONL file of word problems for each client, and a common test file.

    A row has `question`, `answer` (one line of reasoning, then `#### N`) and `template` (its topic). Most rows of
    a client are of its own topic, the others of any topic. The test file, `TEST_FILE_NAME`, goes through the
    topics in turn. A hash of the question decides which questions are held out for it, so that none of them is
    in a client's file.

    Returns:
        The client files, in the order of the clients.

    Raises:
        DataError: `num_clients` or `examples_per_client` is below 1.
        StorageError: A file cannot be written.
    """
    for key, value in (("num_clients", num_clients), ("examples_per_client", examples_per_client)):
        if value < 1:
            raise DataError(f"{key} is {value}.", remedy="Ask for at least 1.")
    paths = [directory / f"client_{client_id:03d}.train.jsonl" for client_id in range(num_clients)]
    topics = list(_TOPICS)[: max(2, num_clients)]
    for client_id, path in enumerate(paths):
        draw = generator_for(seed, "demo train", client_id)
        _write_rows(path, _client_rows(client_id, topics, examples_per_client, draw))
    draw = generator_for(seed, "demo test")
    num_test = max(4 * len(topics), num_clients * examples_per_client // HELD_OUT_ONE_IN)
    tested = itertools.islice(itertools.cycle(topics), num_test)
    _write_rows(directory / TEST_FILE_NAME, [_row(topic, draw, held_out=True) for topic in tested])
    return paths


def _client_rows(
    client_id: int, topics: Sequence[str], num_rows: int, draw: np.random.Generator
) -> list[dict[str, str]]:
    """Draw a client's rows: `OWN_TOPIC_SHARE` of them, on average, of its own topic."""
    own = topics[client_id % len(topics)]
    chosen = [own if draw.random() < OWN_TOPIC_SHARE else str(draw.choice(topics)) for _ in range(num_rows)]
    return [_row(topic, draw, held_out=False) for topic in chosen]


def _row(topic: str, draw: np.random.Generator, *, held_out: bool) -> dict[str, str]:
    """Draw problems of `topic` until one is on the wanted side of the train/test split."""
    while True:
        question, reasoning, answer = _TOPICS[topic](draw)
        if (hashlib.sha256(question.encode()).digest()[0] % HELD_OUT_ONE_IN == 0) == held_out:
            return {"question": question, "answer": f"{reasoning}\n#### {answer}", "template": topic}


def _write_rows(path: Path, rows: Iterable[dict[str, str]]) -> None:
    with storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def make_tiny_llama(directory: Path, texts: Iterable[str], *, seed: int, num_layers: int = 8) -> Path:
    """Write a random Llama of under two million parameters, and a tokenizer trained on `texts`; return `directory`.

    Raises:
        DataError: `texts` is empty.
        StorageError: The model cannot be written.
    """
    texts = list(texts)
    if not any(texts):
        raise DataError("There is no text to train a tokenizer on.", remedy="Give at least one text.")
    tokenizer = _train_tokenizer(texts)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=_MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed_for(seed, "demo model"))
        model = LlamaForCausalLM(config)
        # The tied embeddings are not trained, and a logit is at most √hidden_size (the norm of the final hidden
        # state) times the norm of an embedding. With the usual deviation no prediction could be confident, so
        # this deviation makes the norm 1.
        model.get_input_embeddings().weight.normal_(std=config.hidden_size**-0.5)
    save_model(model, tokenizer, directory)
    return directory


def _train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE that splits numbers into digits."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY_SIZE,
        special_tokens=["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        chat_template=_CHAT_TEMPLATE,
        model_max_length=_MAX_POSITIONS,
    )
