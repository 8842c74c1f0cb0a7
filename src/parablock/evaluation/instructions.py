"""Instructions whose following a rule can check: rows, identifiers and rules of IFEval (arXiv 2311.07911).

A row has a `prompt`, a list `instruction_id_list`, and a list `kwargs` with the arguments of each instruction. The
rules are those of the authors, read strictly; but sentences end at `.`, `?`, `!` or `…` before white space, except
for a few abbreviations, words are runs of letters and digits, and py3langid tells languages apart.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from parablock.data.prompts import Example
from parablock.data.sources import Row
from parablock.errors import DataError
from parablock.evaluation.generation import generate_completions
from parablock.evaluation.scoring import TaskResult, first_samples

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

IDS_FIELD, ARGUMENTS_FIELD = "instruction_id_list", "kwargs"
RELATIONS = ("less than", "at least")
LANGUAGES = (
    *("ar", "bg", "bn", "de", "en", "es", "fa", "fi", "fr", "gu", "he", "hi", "it", "ja", "kn", "ko", "ml", "mr"),
    *("ne", "pa", "pl", "pt", "ru", "sw", "ta", "te", "th", "uk", "ur", "vi"),
)
"""The languages that IFEval asks for, in ISO 639-1."""
_OTHER_LANGUAGES = (
    *("af", "ca", "cs", "cy", "da", "el", "et", "gl", "hr", "hu", "id", "lt", "lv", "mk", "nl", "no", "ro", "sk"),
    *("sl", "sq", "sr", "sv", "tl", "tr", "zh"),
)
"""Those that an answer may be in instead."""

_UNKNOWN = -1e30  # below any score of a text that py3langid knows something of
_OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_ABBREVIATIONS = r"(?<!\b(?:Mr|Ms|Dr|St|Jr|Sr|vs)\.)(?<!\b(?:Mrs|etc)\.)(?<!\b(?:Prof)\.)(?<!\b(?:e\.g|i\.e)\.)"
_SENTENCE_END = re.compile(rf"{_ABBREVIATIONS}(?<=[.?!…。？！])[\"'”’)\]]*(?:\s+|$)|(?<=[。？！])")


Check = Callable[[str], bool]


def _holds(count: int, relation: str, limit: int) -> bool:
    return count < limit if relation == RELATIONS[0] else count >= limit


# -- rules: arguments by name, and the answer last
def _has_keywords(answer: str, *, keywords: list[str]) -> bool:
    return all(keyword.casefold() in answer.casefold() for keyword in keywords)


def _has_keyword_often(answer: str, *, keyword: str, frequency: int, relation: str) -> bool:
    return _holds(answer.casefold().count(keyword.strip().casefold()), relation, frequency)


def _lacks_words(answer: str, *, forbidden_words: list[str]) -> bool:
    return not any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", answer, re.IGNORECASE) for word in forbidden_words)


def _has_letter_often(answer: str, *, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _holds(answer.lower().count(letter.strip().lower()), let_relation, let_frequency)


def _is_in_language(answer: str, *, language: str) -> bool:
    """Tell whatever the case; an answer too short to tell by is in any language, as with the authors."""
    found, log_prob = _identifier().classify(answer.lower())
    return bool(found == language or log_prob < _UNKNOWN)


def _has_sentences(answer: str, *, num_sentences: int, relation: str) -> bool:
    return _holds(sum(bool(part.strip()) for part in _SENTENCE_END.split(answer)), relation, num_sentences)


def _has_words(answer: str, *, num_words: int, relation: str) -> bool:
    return _holds(len(re.findall(r"\w+", answer)), relation, num_words)


def _has_paragraphs(answer: str, *, num_paragraphs: int) -> bool:
    """Count what stands between `***`; only the first and the last part may be empty."""
    first, *inner, last = [part.strip() for part in answer.split("***")] if "***" in answer else (answer, "")
    return all(inner) and len(inner) + bool(first.strip()) + bool(last) == num_paragraphs


def _paragraph_begins(answer: str, *, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    paragraphs = [part.strip() for part in answer.split("\n\n")]
    if sum(map(bool, paragraphs)) != num_paragraphs or not 1 <= nth_paragraph <= num_paragraphs:
        return False
    if not (words := paragraphs[nth_paragraph - 1].split()):  # counted with the empty ones, as the authors do
        return False
    word = words[0].lstrip("'\"")
    return re.split(r"[.,?!'\"]", word)[0].lower() == first_word.strip().lower()


def _has_placeholders(answer: str, *, num_placeholders: int) -> bool:
    return len(re.findall(r"\[.*?\]", answer)) >= num_placeholders


def _has_postscript(answer: str, *, postscript_marker: str) -> bool:
    letters = [re.escape(letter) for letter in postscript_marker.strip().lower() if not letter.isspace()]
    pattern = r"\s?".join(letters) if "." in postscript_marker else re.escape(postscript_marker.strip().lower())
    return re.search(pattern, answer.lower()) is not None


def _has_bullets(answer: str, *, num_bullets: int) -> bool:
    return len(re.findall(r"^\s*(?:\*[^*]|-)", answer, re.MULTILINE)) == num_bullets


def _is_an_option(answer: str) -> bool:
    return any(option in answer for option in _OPTIONS)


def _has_highlights(answer: str, *, num_highlights: int) -> bool:
    """Count `*…*` and, once more, `**…**`, as the authors do."""
    single = [found.strip("*").strip() for found in re.findall(r"\*[^\n*]*\*", answer)]
    double = [found[2:-2].strip() for found in re.findall(r"\*\*[^\n*]*\*\*", answer)]
    return sum(map(bool, single + double)) >= num_highlights


def _has_sections(answer: str, *, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"{re.escape(section_spliter.strip())}\s?\d+", answer)) >= num_sections


def _is_json(answer: str) -> bool:
    text = re.sub(r"^```(?:json)?", "", answer.strip(), flags=re.IGNORECASE).removesuffix("```")
    try:
        json.loads(text.strip())
    except (ValueError, RecursionError):
        return False
    return True


def _has_title(answer: str) -> bool:
    return any(title.strip("<> ") for title in re.findall(r"<<[^\n]+>>", answer))


def _has_two_answers(answer: str) -> bool:
    parts = [part.strip() for part in answer.split("******")]
    given = [part for part in parts if part]
    return all(parts[1:-1]) and len(given) == 2 and given[0] != given[1]


def _repeats_prompt(answer: str, *, prompt_to_repeat: str) -> bool:
    return answer.strip().lower().startswith(prompt_to_repeat.strip().lower())


def _ends_with(answer: str, *, end_phrase: str) -> bool:
    return answer.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _has_capital_words(answer: str, *, capital_frequency: int, capital_relation: str) -> bool:
    words = re.findall(r"\w+(?:['’-]\w+)*", answer)
    return _holds(sum(word.isupper() for word in words), capital_relation, capital_frequency)


def _is_english_in_capitals(answer: str) -> bool:
    return answer.isupper() and _is_in_language(answer, language="en")


def _is_english_in_small_letters(answer: str) -> bool:
    return answer.islower() and _is_in_language(answer, language="en")


def _lacks_commas(answer: str) -> bool:
    return "," not in answer


def _is_quoted(answer: str) -> bool:
    text = answer.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


RULES: dict[str, Callable[..., bool]] = {
    "keywords:existence": _has_keywords,
    "keywords:frequency": _has_keyword_often,
    "keywords:forbidden_words": _lacks_words,
    "keywords:letter_frequency": _has_letter_often,
    "language:response_language": _is_in_language,
    "length_constraints:number_sentences": _has_sentences,
    "length_constraints:number_paragraphs": _has_paragraphs,
    "length_constraints:number_words": _has_words,
    "length_constraints:nth_paragraph_first_word": _paragraph_begins,
    "detectable_content:number_placeholders": _has_placeholders,
    "detectable_content:postscript": _has_postscript,
    "detectable_format:number_bullet_lists": _has_bullets,
    "detectable_format:constrained_response": _is_an_option,
    "detectable_format:number_highlighted_sections": _has_highlights,
    "detectable_format:multiple_sections": _has_sections,
    "detectable_format:json_format": _is_json,
    "detectable_format:title": _has_title,
    "combination:two_responses": _has_two_answers,
    "combination:repeat_prompt": _repeats_prompt,
    "startend:end_checker": _ends_with,
    "startend:quotation": _is_quoted,
    "change_case:capital_word_frequency": _has_capital_words,
    "change_case:english_capital": _is_english_in_capitals,
    "change_case:english_lowercase": _is_english_in_small_letters,
    "punctuation:no_comma": _lacks_commas,
}
"""Identifier of an instruction → its rule: a function of the answer and the arguments by name."""
_NEED_LANGUAGES = ("language:response_language", "change_case:english_capital", "change_case:english_lowercase")


@cache
def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise DataError(
            "instructions about the language of an answer need the package py3langid, which is not installed",
            remedy="Install it: pip install 'parablock[eval]'",
        ) from None
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
    identifier.set_languages([*LANGUAGES, *_OTHER_LANGUAGES])
    return identifier


# -- rows
def with_references(rows: Sequence[Row]) -> list[Row]:
    """Check rows, and give those without an answer the identifiers of their instructions as the reference.

    Raises:
        DataError: A row has no instructions, an unknown one, or other arguments than the instruction takes; or
            py3langid is missing where one is about a language.
    """
    made = []
    for row in rows:
        checks_of(row)
        ids = row.fields[IDS_FIELD]
        is_bare = isinstance(row.fields.get("prompt"), str) and row.fields.get("completion") is None
        made.append(replace(row, fields={**row.fields, "completion": "; ".join(ids)}) if is_bare else row)
    return made


def checks_of(row: Row) -> list[tuple[str, Check]]:
    """Return the identifier of each instruction of a row, and what says whether an answer follows it."""
    ids = row.fields.get(IDS_FIELD)
    if not isinstance(ids, list) or not ids:
        raise DataError(
            f"{row.place} has no list of instructions in the field {IDS_FIELD}.",
            remedy="Give rows such as "
            f'{{"prompt": "…", "{IDS_FIELD}": ["punctuation:no_comma"], "{ARGUMENTS_FIELD}": [{{}}]}}.',
        )
    arguments = row.fields.get(ARGUMENTS_FIELD) or [{}] * len(ids)
    if not isinstance(arguments, list) or len(arguments) != len(ids):
        raise DataError(
            f"{row.place}: {ARGUMENTS_FIELD} is not a list with the arguments of each of {len(ids)} instructions.",
            remedy="Write {} for an instruction without arguments.",
        )
    return [(name, _check(row, name, given or {})) for name, given in zip(ids, arguments, strict=True)]


def _check(row: Row, name: Any, given: Any) -> Check:
    rule = RULES.get(name) if isinstance(name, str) else None
    if rule is None:
        raise DataError(f"{row.place}: there is no instruction {name!r}.", remedy=f"Known are {', '.join(RULES)}.")
    takes = _arguments_of(rule)
    found = {key: value for key, value in given.items() if value is not None} if isinstance(given, dict) else None
    if found is None or found.keys() != takes.keys():
        said = "no object" if found is None else ", ".join(found) or "none"
        raise DataError(
            f"{row.place}: {name} takes the arguments {', '.join(takes) or 'none'}; {ARGUMENTS_FIELD} has {said}.",
            remedy=f"Correct {ARGUMENTS_FIELD} in that row; null stands for an argument that is not given.",
        )
    values = {key: _value(row, name, key, kind, found[key]) for key, kind in takes.items()}
    if name in _NEED_LANGUAGES:
        _identifier()  # what is missing is said now, and not after the answers
    return partial(rule, **values)


@cache
def _arguments_of(rule: Callable[..., bool]) -> dict[str, Any]:
    hints = get_type_hints(rule)
    named = inspect.signature(rule).parameters.values()
    return {each.name: hints[each.name] for each in named if each.kind is each.KEYWORD_ONLY}


def _value(row: Row, name: str, key: str, kind: Any, value: Any) -> Any:
    """Return an argument as its rule takes it; tables hold whole numbers as floats where others have none."""
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if key.endswith("relation"):
        fits, wanted = value in RELATIONS, " or ".join(map(repr, RELATIONS))
    elif key == "language":
        fits, wanted = value in LANGUAGES, f"one of {', '.join(LANGUAGES)}"
    elif kind is int:
        fits, wanted = type(value) is int and value >= 0, "a whole number of at least 0"
    elif kind is str:
        fits, wanted = isinstance(value, str) and bool(value.strip()), "a text that is not empty"
    else:
        (item,) = get_args(kind)
        fits = isinstance(value, list) and bool(value) and all(isinstance(each, item) and each for each in value)
        wanted = "a list of texts that are not empty"
    if not fits:
        raise DataError(
            f"{row.place}: {key} of {name} is {value!r}, and not {wanted}.", remedy=f"Correct {ARGUMENTS_FIELD}."
        )
    return value


# -- the task
def score_instructions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    max_new_tokens: int = 256,
    num_samples: int = 3,
    on_done: Callable[[int], None] = lambda _: None,
) -> tuple[TaskResult, tuple[tuple[bool, ...], ...]]:
    """Answer prompts, and say of each answer which of its instructions it follows.

    Returns:
        The share of answers that follow all of their instructions (strict accuracy of prompts), and for each
        example whether each instruction is followed, in the order of its row.
    """
    predictions = generate_completions(model, tokenizer, examples, max_new_tokens=max_new_tokens, on_done=on_done)
    followed = tuple(
        follow(checks_of(example.row), answer) for example, answer in zip(examples, predictions, strict=True)
    )
    values = tuple(float(all(each)) for each in followed)
    samples = first_samples(tokenizer, examples, predictions, num_samples)
    return TaskResult(sum(values) / len(values), len(values), samples, tuple(predictions), values), followed


def follow(checks: Sequence[tuple[str, Check]], answer: str) -> tuple[bool, ...]:
    """Return of each instruction whether an answer follows it; an empty answer follows none."""
    return tuple(bool(answer.strip()) and check(answer) for _, check in checks)
