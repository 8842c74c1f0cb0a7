"""Answers of a model: generation, and how greedy answers agree with the references."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal
from functools import cache
from itertools import compress
from typing import TYPE_CHECKING, Any

import torch

from parablock.data.prompts import Example, find_stop_token_ids
from parablock.errors import DataError
from parablock.evaluation.scoring import TaskResult, context_length, evaluation_mode, first_samples
from parablock.seeding import seed_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH_SIZE = 16
"""The prompts that are answered at once."""

ANSWER_MARK = "####"
"""The mark before the final answer in GSM8K and similar data."""

_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)")


def score_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    judge: Callable[[str, str], float] | None = None,
    max_new_tokens: int = 256,
    batch_size: int = BATCH_SIZE,
    num_samples: int = 3,
    on_done: Callable[[int], None] = lambda _: None,
) -> TaskResult:
    """Compute the mean agreement of generated answers with the references.

    Args:
        model: The model; it and the following arguments are those of `generate_completions`.
        tokenizer: Its tokenizer.
        examples: The examples whose prompts are answered.
        judge: Gives the value of (answer, reference), 0 … 1; None: `answers_match`.
        max_new_tokens: Longest answer, in tokens.
        batch_size: Number of prompts at once.
        num_samples: Number of samples in the result.
        on_done: Called with the number of prompts that are answered.

    Raises:
        DataError: There are no examples, or one has no prompt or no room for an answer.
    """
    if not examples:
        raise DataError("There are no examples to answer.", remedy="Give test data with at least one row.")
    predictions = generate_completions(
        model, tokenizer, examples, max_new_tokens=max_new_tokens, batch_size=batch_size, on_done=on_done
    )
    references = (example.completion for example in examples)
    values = tuple(map(float, map(judge or answers_match, predictions, references)))
    samples = first_samples(tokenizer, examples, predictions, num_samples)
    return TaskResult(sum(values) / len(examples), len(examples), samples, tuple(predictions), values)


def answers_match(prediction: str, reference: str) -> bool:
    """Return whether a generated answer agrees with the reference.

    If the reference ends with a number after `####`, the number after the last `####` of the prediction must be the
    same, in any notation (`$1,000.` is 1000). The text before and after it does not count. If words follow `####`,
    or the reference has no mark, the words must be equal, except for white space and case.
    """
    if ANSWER_MARK not in reference:
        return _normalise(prediction) == _normalise(reference)
    if ANSWER_MARK not in prediction:
        return False
    predicted, wanted = _final_answer(prediction), _final_answer(reference)
    if not _NUMBER.fullmatch(wanted):
        return predicted == wanted
    number = _NUMBER.match(predicted)
    return number is not None and Decimal(number[0]) == Decimal(wanted)


def rouge_l(prediction: str, reference: str) -> float:
    """Return the F-measure of the longest common subsequence of words (ROUGE-L; Lin, 2004).

    A word is a run of letters and digits of any script, in lower case, and is not stemmed. Combining marks end a
    word, and a script without spaces has no words but its runs: there the value says little.

    Raises:
        DataError: The package rouge-score is not installed.
    """
    scorer = _rouge_scorer()
    return float(scorer.score(reference, prediction)["rougeL"].fmeasure)


@cache
def _rouge_scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise DataError(
            "rouge_l needs the package rouge-score, which is not installed",
            remedy="Install it: pip install 'parablock[eval]'",
        ) from None
    return RougeScorer(["rougeL"], tokenizer=_Words())


class _Words:
    """Cuts a text into words; the package's own cut leaves out all letters but a to z."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"\w+", text.casefold())


def _final_answer(text: str) -> str:
    """Return the line after the last mark, without commas, dollar signs and the full stop."""
    line = text.rpartition(ANSWER_MARK)[2].strip().partition("\n")[0]
    return _normalise(line.replace(",", "").replace("$", "")).removesuffix(".")


def _normalise(text: str) -> str:
    return " ".join(text.casefold().split())


def generate_completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    max_new_tokens: int = 256,
    batch_size: int = BATCH_SIZE,
    temperature: float = 0.0,
    seed: int = 0,
    hear: Callable[[str], None] | None = None,
    on_done: Callable[[int], None] = lambda _: None,
    on_cut: Callable[[str], None] = lambda _: None,
    on_token: Callable[[int], None] | None = None,
    on_endless: Callable[[int], None] = lambda _: None,
) -> list[str]:
    """Answer the prompts of examples, until the turn ends.

    The model's own generation settings (sampling, penalties, forced tokens) have no effect. A prompt that is too
    long for the model's context loses its beginning, so that `max_new_tokens` fit; `describe_cut` says so.
    `batch_size` prompts are answered at once, padded on the left. The answers are without prompts and special
    tokens.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        examples: The examples whose prompts are answered.
        max_new_tokens: Longest answer, in tokens.
        batch_size: Number of prompts at once.
        temperature: 0 takes the likeliest token at every place; above 0, tokens are drawn.
        seed: What is drawn follows from it.
        hear: Gets the text of the only prompt's answer piece by piece, as it comes; None: nobody listens.
        on_done: Called with the number of prompts that are answered.
        on_cut: Called with what `describe_cut` says of them, if it says something.
        on_token: Called with the number of tokens that the answers of a batch have so far, and `max_new_tokens` for
            each batch before it.
        on_endless: Called with the place of each answer that has no end: it was cut at `max_new_tokens`.

    Raises:
        DataError: An example has no prompt, or the context has no room for a prompt and an answer.
    """
    room = _room(model, max_new_tokens)
    prompts = [_prompt(example, room) for example in examples]
    if told := describe_cut(model, examples, max_new_tokens):
        on_cut(told)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers: dict[int, str] = {}
    with evaluation_mode(model), _settings(model, tokenizer, max_new_tokens, temperature), _drawing(model, seed):
        for at in range(0, len(order), batch_size):
            chosen = order[at : at + batch_size]
            batch = [prompts[index] for index in chosen]
            tell = None if on_token is None else _after(at // batch_size * max_new_tokens, on_token)
            texts, cut = _generate_batch(model, tokenizer, batch, hear, tell)
            answers.update(zip(chosen, texts, strict=True))
            for index in compress(chosen, cut):
                on_endless(index)
            on_done(len(answers))
    return [answers[index] for index in range(len(examples))]


def _after(begun: int, on_token: Callable[[int], None]) -> Callable[[int], None]:
    return lambda count: on_token(begun + count)


def describe_cut(model: PreTrainedModel, examples: Sequence[Example], max_new_tokens: int) -> str:
    """Say which prompts lose their beginning, as the context does not hold them and an answer; "" if none does."""
    room = _room(model, max_new_tokens)
    long = [example for example in examples if room is not None and len(example.prompt_ids) > room]
    if not long:
        return ""
    who = "the prompt is" if len(examples) == 1 else f"{len(long)} of {len(examples)} prompts are"
    where = "" if len(examples) == 1 else f"; the first is {long[0].row.place}"
    return (
        f"{who} longer than the {room} tokens that a context of {context_length(model)} leaves beside an answer of "
        f"{max_new_tokens}: the beginning, with a system prompt if there is one, is cut off{where}"
    )


def _room(model: PreTrainedModel, max_new_tokens: int) -> int | None:
    """Return the longest prompt that the context holds beside an answer; None without a limit."""
    limit = context_length(model)
    room = None if limit is None else limit - max_new_tokens
    if room is not None and room < 1:
        raise DataError(
            f"An answer of {max_new_tokens} tokens leaves no room for a prompt in a context of {limit} tokens.",
            remedy="Ask for shorter answers (max_new_tokens).",
        )
    return room


def _prompt(example: Example, room: int | None) -> tuple[int, ...]:
    if not example.prompt_ids:
        raise DataError(
            f"{example.row.place} has no prompt to generate from.",
            remedy="Give rows with a prompt and a completion, or evaluate the loss instead.",
        )
    return example.prompt_ids if room is None else example.prompt_ids[-room:]


def _generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[tuple[int, ...]],
    hear: Callable[[str], None] | None,
    on_token: Callable[[int], None] | None,
) -> tuple[list[str], list[bool]]:
    """Return the answers of a batch, and which of them have no end."""
    from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer  # slow to import

    class Teller(StoppingCriteria):  # type: ignore[misc]
        """Tells of each token, and stops nothing."""

        def __call__(self, input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
            del scores
            if on_token is not None:
                on_token(input_ids.shape[1] - longest)
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    longest = max(map(len, prompts))
    pad = (tokenizer.pad_token_id,)
    input_ids = [pad * (longest - len(prompt)) + prompt for prompt in prompts]
    attention_mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    streamer = None
    if hear is not None:
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        streamer.on_finalized_text = lambda text, stream_end=False: hear(text)  # noqa: ARG005  as the library calls it
    output_ids = model.generate(
        input_ids=torch.tensor(input_ids, device=model.device),
        attention_mask=torch.tensor(attention_mask, device=model.device),
        streamer=streamer,
        stopping_criteria=StoppingCriteriaList([Teller()]),
    )
    answers: list[str] = tokenizer.batch_decode(output_ids[:, longest:], skip_special_tokens=True)
    stops = set(find_stop_token_ids(tokenizer))
    return answers, [stops.isdisjoint(said) for said in output_ids[:, longest:].tolist()]


@contextmanager
def _settings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, temperature: float
) -> Iterator[None]:
    """Replace the model's generation settings by plain greedy search, or plain sampling, in the block."""
    from transformers import GenerationConfig  # slow to import

    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {}
    kept = model.generation_config
    model.generation_config = GenerationConfig(
        **{"do_sample": False, **sampling},
        max_new_tokens=max_new_tokens,
        eos_token_id=list(find_stop_token_ids(tokenizer)),
        pad_token_id=tokenizer.pad_token_id,
    )
    try:
        yield
    finally:
        model.generation_config = kept


@contextmanager
def _drawing(model: PreTrainedModel, seed: int) -> Iterator[None]:
    """Let draws in the block follow from the seed, and leave the generators of torch as they were."""
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        for generator in [torch.default_generator, *(torch.cuda.default_generators[d.index or 0] for d in devices)]:
            generator.manual_seed(seed_for(seed, "answers"))
        yield
