"""Prompts that people write, and the answers of a model, or of the base model and the tuned one of a run.

A prompt is rendered as the rows of the run's training were. So a model is asked in the form that it has learnt.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from parablock.config.load import load_config
from parablock.data.conversations import Message, kind_of, read_turns
from parablock.data.formats import FORMATS, read_conversation
from parablock.data.prompts import IGNORED_LABEL, Example, detect_format, tokenize_rows
from parablock.data.readers import parse_json, read_text_file
from parablock.data.sources import Row, load_rows, renamed, renamed_as_in_run
from parablock.data.switches import is_nothing, is_switch
from parablock.errors import DataError, InputError
from parablock.evaluation.generation import generate_completions
from parablock.evaluation.side_by_side import day_of, models_of
from parablock.model.pretrained import LoadedModel, load_model, load_tokenizer
from parablock.storage.run_directory import RunDirectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANSWER = "?"
"""Stands where the answer is to come; only what precedes it is used."""
_ANSWERS = {fields[-1] for fields in FORMATS.values() if len(fields) > 1}
"""Fields that a prompt may lack."""
_TURNS = {"messages", "sharegpt"}
_OF_TURNS = {name for data_format in _TURNS for name in FORMATS[data_format]}
"""Fields that hold the turns of a whole conversation."""


@dataclass(frozen=True)
class Speaker:
    """A model that answers.

    Attributes:
        label: base | tuned | model.
        loaded: The model; of a run, with the tokenizer of the tuned one, whose template both are asked by.
        data_format: The format of the rows that it was trained on.
        has_memory: Whether the prompt can hold earlier turns: the base has a chat template of its own, or it was
            trained on conversations.
        date: The day that its chat template writes, if it writes one; None: today.
    """

    label: str
    loaded: LoadedModel
    data_format: str
    has_memory: bool
    date: str | None = None


@dataclass(frozen=True)
class AskedPrompt:
    """A prompt as a person wrote it, and the reference of its row; None without one."""

    text: str
    row: Row
    reference: str | None = None


def open_speakers(
    model_or_run_dir: str,
    *,
    only: str | None = None,
    device: str = "auto",
    tell: Callable[[str], None] = lambda _: None,
) -> list[Speaker]:
    """Load a model, or the base model and the tuned one of a finished run.

    Args:
        model_or_run_dir: A Hugging Face folder or id, or a run directory.
        only: base | tuned: one model of a run; None: both.
        device: auto | cpu | cuda.
        tell: Called before each model is loaded.

    Raises:
        InputError: There is no such model, or it cannot be read.
    """
    models = models_of(model_or_run_dir)
    chosen = [model for model in models if only in (None, model[0])]
    if not chosen:
        found = " and ".join(label for label, _, _ in models)
        raise InputError(
            f"{model_or_run_dir} has no {only} model: it has {found}",
            remedy=f"Leave --only out, or name one of: {found}.",
        )
    speakers: list[Speaker] = []
    tokenizer, date = load_tokenizer(models[-1][1]), day_of(model_or_run_dir)
    data_format, has_memory = _form_of(model_or_run_dir, tokenizer)
    for label, name_or_path, dtype in chosen:
        tell(f"loading the {label} model" if label != "model" else "loading the model")
        loaded = load_model(name_or_path, dtype=dtype, device=device, init="pretrained", seed=0)
        speakers.append(Speaker(label, replace(loaded, tokenizer=tokenizer), data_format, has_memory, date))
    return speakers


def _form_of(model_or_run_dir: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, bool]:
    """Return the format of prompts for a model, and whether they can hold earlier turns."""
    directory = RunDirectory(model_or_run_dir)
    if not directory.manifest.exists():
        return "prompt_completion", tokenizer.chat_template is not None
    manifest = directory.read_manifest()
    formats = manifest.get("data_formats") or [name for name in FORMATS if name == manifest.get("data_format")]
    data_format = formats[0] if len(formats) == 1 else "prompt_completion"
    had_template = manifest.get("base_has_chat_template", tokenizer.chat_template is not None)
    knows_turns = had_template or not _TURNS.isdisjoint(formats)
    return data_format, knows_turns and data_format != "text"


def columns_of_run(model_or_run_dir: str) -> dict[str, str]:
    """Return `data.columns` of a run; none of what is no run directory."""
    path = RunDirectory(model_or_run_dir).config
    return load_config(path).data.columns if path.exists() else {}


def read_prompts(
    texts: Sequence[str],
    sources: Sequence[str],
    *,
    columns: Mapping[str, str] | None = None,
    of_run: Mapping[str, str] | None = None,
) -> list[AskedPrompt]:
    """Read prompts from texts and files.

    A line of a `.txt` file is a prompt. The rows of any other file are those of a run, and may lack the answer;
    where they have it, it is the reference.

    Args:
        texts: Prompts as they are.
        sources: Files, or `datasets` names.
        columns: As `data.columns`; a row may lack that of the answer.
        of_run: Those of a run, without columns; they are for rows that have them, or cannot be read without.

    Raises:
        DataError: There is no prompt, or a row or file does not fit.
    """
    prompts = [AskedPrompt(text, Row({"prompt": text}, "the command line", n)) for n, text in enumerate(texts, 1)]
    for source in sources:
        if source.endswith(".txt"):
            prompts += [_read_prompt(row) for row in _read_lines(source)]
        else:
            prompts += [_read_renamed(row, columns or {}, of_run or {}) for row in load_rows(source, split="test")]
    if not any(prompt.text.strip() for prompt in prompts):
        raise DataError("There is no prompt.", remedy='Give one, such as "What is 2 + 2?", or a file with --data.')
    return prompts


def _read_renamed(row: Row, columns: Mapping[str, str], of_run: Mapping[str, str]) -> AskedPrompt:
    if columns:
        return _read_prompt(renamed(row, columns, may_lack=_ANSWERS))
    row = renamed_as_in_run(row, of_run, _read_prompt)
    try:
        return _read_prompt(row)
    except DataError:
        lacking = {name for name, column in of_run.items() if column not in row.fields}
        if not lacking or not _ANSWERS.issuperset(lacking):
            raise
        return _read_prompt(renamed(row, of_run, may_lack=_ANSWERS))


def _read_lines(source: str) -> list[Row]:
    """Return the lines of a text file; a separator inside a line, such as a form feed, does not end it."""
    lines = read_text_file(source).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return [Row({"prompt": line}, source, n) for n, line in enumerate(lines, 1) if line.strip()]


def _read_prompt(row: Row) -> AskedPrompt:
    """Read what is asked, as training reads it, and the reference behind it."""
    told = {name: value for name, value in row.fields.items() if not (is_switch(name) or is_nothing(value))}
    fields = {name: _of_asking(name, value) for name, value in told.items()}
    answered = dict(fields)
    for *question, answer in FORMATS.values():
        if question and fields.get(question[0]) is not None and fields.get(answer) is None:
            answered[answer] = _ANSWER
    data_format = detect_format([replace(row, fields=answered)])
    if data_format == "text":
        return AskedPrompt(str(row.fields["text"]), row)
    *_, answer = FORMATS[data_format]
    given, reference = fields.get(answer), None
    if isinstance(given, list) if answer == "completion" else answer in _OF_TURNS:
        turns = [{**turn, "train": False} for turn in read_turns(replace(row, fields=fields), answer)]
        if turns[-1]["role"] == "assistant":
            reference = turns.pop()["content"]
        fields[answer] = [*turns, {"role": "assistant", "content": _ANSWER}]
    elif given is None or (isinstance(given, str | int | float) and not isinstance(given, bool)):
        is_whole = isinstance(given, float) and given.is_integer()  # among nulls, pandas makes 42 a 42.0
        reference, fields[answer] = None if given is None else str(int(given) if is_whole else given), _ANSWER
    else:
        raise DataError(f"{row.place}: field {answer} is {kind_of(given)}, not text.")
    asked = replace(row, fields=fields)
    turns = list(read_conversation(asked, data_format).turns[:-1])
    return AskedPrompt(turns[-1]["content"] if turns else "", asked, reference or None)


def _of_asking(name: str, value: Any) -> Any:
    """Return the value of a field without what only training asks of turns and of parts of their content."""
    if name in _OF_TURNS and isinstance(value, str):
        with suppress(ValueError, RecursionError):  # the reader of turns says what is wrong
            value = parse_json(value)
    if isinstance(value, list):
        return [_of_asking("", each) for each in value]
    if isinstance(value, dict):
        return {
            key: _of_asking("", each) if key in ("content", "value") else each
            for key, each in value.items()
            if not is_switch(key)
        }
    return value


def answer_prompts(
    speaker: Speaker,
    prompts: Sequence[AskedPrompt],
    *,
    system: str = "",
    on_done: Callable[[int], None] = lambda _: None,
    **generation: Any,
) -> list[str]:
    """Answer prompts that do not follow on each other; `generation` as in `generate_completions`.

    Raises:
        DataError: A prompt does not fit the model's template or context.
    """
    examples = [_example(speaker, prompt, system) for prompt in prompts]
    return generate_completions(
        speaker.loaded.model, speaker.loaded.tokenizer, examples, on_done=on_done, **generation
    )


def _example(speaker: Speaker, prompt: AskedPrompt, system: str) -> Example:
    row, tokenizer = prompt.row, speaker.loaded.tokenizer
    if speaker.data_format == "text" or _is_text(row):  # continued as it stands, as training has taught it
        if system:
            raise DataError(
                "A text is continued as it stands: it has no system prompt.", remedy="Leave --system out."
            )
        ids = tuple(tokenizer(prompt.text)["input_ids"])
        return Example(ids, (IGNORED_LABEL,) * len(ids), ids, "", row, False)
    is_written = set(row.fields) == {"prompt"}  # by a person, not a row of data
    if is_written or system:
        asked = (
            [_user(prompt.text)] if is_written else list(read_conversation(row, detect_format([row])).turns[:-1])
        )
        row = _as_row([*_opening(speaker, system), *asked], speaker.data_format)
    (example,) = tokenize_rows(
        [row],
        tokenizer,
        data_format="auto",
        max_length=sys.maxsize,
        completion_only_loss=True,
        date=speaker.date,
    ).examples
    return example


def _is_text(row: Row) -> bool:
    return row.fields.get("text") is not None and detect_format([row]) == "text"


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _opening(speaker: Speaker, system: str) -> list[Message]:
    if system and not speaker.has_memory:
        raise DataError(
            f"The {speaker.label} model has no chat template, so there is no place for a system prompt.",
            remedy="Leave --system out, or write it into the prompt.",
        )
    return [{"role": "system", "content": system}] if system else []


def _as_row(turns: Sequence[Message], data_format: str) -> Row:
    """Return the row of a conversation whose next turn is the answer."""
    if len(turns) == 1 and data_format not in _TURNS:
        question, answer = FORMATS[data_format]
        return Row({question: turns[0]["content"], answer: _ANSWER}, "the conversation", 1)
    return Row({"messages": [*turns, {"role": "assistant", "content": _ANSWER}]}, "the conversation", 1)


class Dialogue:
    """A conversation with one model, which remembers its turns if its prompts can hold them.

    Args:
        speaker: The model.
        system: The system prompt; empty without one.
        generation: Settings of `generate_completions`.
    """

    def __init__(self, speaker: Speaker, *, system: str = "", **generation: Any) -> None:
        self.speaker, self._generation = speaker, generation
        self.cut_at: int | None = None
        """At how many tokens the last answer was cut; None: it ended by itself."""
        self._opening = _opening(speaker, system)
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self._turns: list[Message] = list(self._opening)

    def ask(self, text: str, hear: Callable[[str], None] = lambda _: None) -> str:
        """Answer the next turn.

        Args:
            text: What the user says.
            hear: Gets the answer piece by piece. If it raises, the turn has not been.

        Returns:
            The whole answer.
        """
        turns, row = [*self._turns, _user(text)], Row({"prompt": text}, "the conversation", 1)
        if self.speaker.has_memory:
            row = _as_row(turns, self.speaker.data_format)
        ends: list[int] = []
        (answer,) = answer_prompts(
            self.speaker, [AskedPrompt(text, row)], hear=hear, on_endless=ends.append, **self._generation
        )
        self.cut_at = self._generation["max_new_tokens"] if ends else None
        if self.speaker.has_memory:
            self._turns = [*turns, {"role": "assistant", "content": answer}]
        return answer


def labelled(
    prompts: Sequence[AskedPrompt], answers: Mapping[str, Sequence[str]], cut: Mapping[str, Mapping[int, int]]
) -> Iterator[dict[str, Any]]:
    """Yield a record for each prompt: the prompt, the answer of each model by its label, and the reference.

    `cut` has, for each label, the places of the answers that were cut, and at how many tokens: `LABEL_cut_at`.
    """
    for n, prompt in enumerate(prompts):
        record: dict[str, Any] = {"prompt": prompt.text}
        for label, given in answers.items():
            record[label] = given[n]
            if n in cut[label]:
                record[f"{label}_cut_at"] = cut[label][n]
        yield record if prompt.reference is None else {**record, "reference": prompt.reference}
