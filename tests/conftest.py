"""Fixtures that several folders of tests share."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from parablock.model.pretrained import LoadedModel, load_model
from tiny_runs import Runs, Workshop, half_written, make_workshop

REPOSITORY = Path(__file__).resolve().parents[1]

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the long files first, so that no worker is left with one of them at the end."""
    first = {"test_flower.py": 0, "test_examples.py": 1, "test_readme.py": 2}
    items.sort(key=lambda item: (first.get(item.path.name, 3), "integration" not in item.path.parts))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _no_power_cut() -> Iterator[None]:
    """No test cuts the power, so none waits for the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture
def threads_left() -> Callable[[], set[threading.Thread]]:
    """Tell which threads of this test live; one that an earlier test left may end at any time."""
    before = set(threading.enumerate())
    return lambda: set(threading.enumerate()) - before


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with real data and a small pretrained model that lies beside the repository."""
    folder = REPOSITORY.parent / "shared"
    if not folder.is_dir():
        if os.environ.get("CI"):
            pytest.fail(f"{folder} is missing; CI must not skip the tests on real data")
        pytest.skip(f"{folder} is missing: the real data and model lie beside the repository")
    return folder


@pytest.fixture(scope="session")
def tiny_base(shared_dir: Path) -> LoadedModel:
    """The small pretrained model, which no test trains."""
    return load_model(
        str(shared_dir / "models/tiny-base"), dtype="float32", device="cpu", init="pretrained", seed=0
    )


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[..., LlamaForCausalLM]:
    """Make a random Llama; the same seed gives the same weights."""

    def make(
        num_layers: int = 4, hidden_size: int = 32, vocab_size: int = 128, dtype: str = "float32", seed: int = 0
    ) -> LlamaForCausalLM:
        config = LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=2 * hidden_size,
            num_hidden_layers=num_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=1,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return LlamaForCausalLM(config).to(getattr(torch, dtype))

    return make


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a chat template, trained on two lines."""
    special = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["How many apples does Ann have? Ann has 12 apples.", "#### 12"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
    )


@pytest.fixture(scope="module")
def workshop(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_llama: Callable[..., LlamaForCausalLM],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Workshop:
    """A folder for whole runs in a second, of the module's own."""
    return make_workshop(tmp_path_factory.mktemp("workshop"), tiny_llama, tiny_tokenizer)


@pytest.fixture(scope="module")
def runs(workshop: Workshop) -> Runs:
    """Return the run directory for these overrides, running at the first time; what it said is beside it."""
    made: dict[tuple[str, ...], Path] = {}

    def run_dir(*overrides: str) -> Path:
        if overrides not in made:
            path = workshop.path / "runs" / str(len(made))
            outcome = workshop.run(path, *overrides)
            assert outcome.code == 0, outcome.stderr
            assert half_written(path) == []
            path.with_suffix(".log").write_text(outcome.stdout)
            made[overrides] = path
        return made[overrides]

    return run_dir
