from __future__ import annotations

import sys
from typing import Any

import pytest

from parablock.data.sources import Row
from parablock.errors import DataError
from parablock.evaluation.instructions import RULES, _identifier, checks_of, follow, with_references

GERMAN = "Der Hund läuft jeden Morgen durch den Garten, und die Katze sieht ihm dabei zu."
JAPANESE = "犬は毎朝庭を走り、猫はそれを見ている。"
CHINESE = "这只狗每天早上在花园里跑步，而猫在看着它。我们都很喜欢这个故事。"
ENGLISH = "The dog runs through the garden every morning, and the cat looks on."


def row(*instructions: tuple[str, dict[str, Any]], **fields: Any) -> Row:
    ids, kwargs = [name for name, _ in instructions], [given for _, given in instructions]
    return Row({"prompt": "Write.", "instruction_id_list": ids, "kwargs": kwargs, **fields}, "if.jsonl", 7)


FOLLOWED = [
    ("keywords:existence", {"keywords": ["sun", "C++"]}, "Sunny days, c++", "sunny days, C"),
    ("keywords:frequency", {"keyword": "tea", "frequency": 2, "relation": "at least"}, "Tea, tea", "Tea"),
    ("keywords:frequency", {"keyword": "tea", "frequency": 2, "relation": "less than"}, "Tea", "Tea tea"),
    ("keywords:forbidden_words", {"forbidden_words": ["cat", "dog"]}, "concatenate", "A Cat."),
    ("keywords:forbidden_words", {"forbidden_words": ["C++"]}, "I use C.", "I use C++."),
    ("keywords:letter_frequency", {"letter": "q", "let_frequency": 2, "let_relation": "at least"}, "Qq", "q"),
    ("language:response_language", {"language": "de"}, GERMAN, ENGLISH),
    ("language:response_language", {"language": "ja"}, JAPANESE, CHINESE),
    ("length_constraints:number_sentences", {"num_sentences": 3, "relation": "at least"},
     'One. "Two?" Three', "Dr. No e.g. has 3.5. Two"),
    ("length_constraints:number_sentences", {"num_sentences": 3, "relation": "less than"}, "One… Two!", "1. 2. 3."),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb\n***\n", "a *** *** b"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 1}, "alone", "a *** b"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, "a, b; c", "a, b"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, "a, b", "a b c"),
    ("length_constraints:nth_paragraph_first_word",
     {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "so"}, "Well\n\n'So, it is", "Well\n\nThus so"),
    ("length_constraints:nth_paragraph_first_word",
     {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "so"}, "Well\n\nso", "Well\n\nso\n\nand so"),
    ("length_constraints:nth_paragraph_first_word",
     {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "so"}, "Well\n\nso\n\n", "Well\n\n\n\nso"),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[a] and [b]", "[a]"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\n\np. s. More", "Bye. Psst."),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Bye. P.P.S more", "Bye. P.S. more"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* one\n- two\n**bold**", "* one"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* one\n  * two", "- 1\n- 2\n- 3"),
    ("detectable_format:constrained_response", {}, "My answer is maybe.", "Maybe."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and *b*", "*a* and * *"),
    ("detectable_format:multiple_sections",
     {"section_spliter": "Section", "num_sections": 2}, "Section 1\na\nSection 2\nb", "Section 1\nSection two"),
    ("detectable_format:json_format", {}, '```JSON\n{"a": [1]}\n```', "{'a': 1}"),
    ("detectable_format:json_format", {}, "[]", "[" * 100_000),
    ("detectable_format:title", {}, "<<Ode>>\nO", "<< >>\n<Ode>"),
    ("combination:two_responses", {}, "one ****** two", "one ****** one"),
    ("combination:two_responses", {}, "******one ****** two", "one ****** two ****** three"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say A."}, " say a. B", "B. Say A."),
    ("startend:end_checker", {"end_phrase": "The end."}, '"So it was. the end."', "The end. Or not"),
    ("startend:quotation", {}, ' "a" ', '"a'),
    ("startend:quotation", {}, '""', '"'),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "at least"},
     "NASA and DON'T", "Nasa and DON'T"),
    ("change_case:capital_word_frequency", {"capital_frequency": 1, "capital_relation": "less than"}, "so", "SO"),
    ("change_case:english_capital", {}, ENGLISH.upper(), ENGLISH),
    ("change_case:english_capital", {}, "OK", GERMAN.upper()),
    ("change_case:english_lowercase", {}, ENGLISH.lower(), ENGLISH),
    ("change_case:english_lowercase", {}, ENGLISH.lower(), GERMAN.lower()),
    ("punctuation:no_comma", {}, "a; b", "a, b"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "arguments", "right", "wrong"), FOLLOWED)
def test_a_rule_tells_an_answer_that_follows_from_one_that_does_not(
    name: str, arguments: dict[str, Any], right: str, wrong: str
):
    checks = checks_of(row((name, arguments)))
    assert (follow(checks, right), follow(checks, wrong)) == ((True,), (False,))


def test_every_instruction_of_ifeval_has_a_rule_and_a_case_here():
    assert {name for name, *_ in FOLLOWED} == set(RULES) and len(RULES) == 25


def test_an_empty_answer_follows_nothing_and_each_instruction_is_checked_by_itself():
    checks = checks_of(row(("punctuation:no_comma", {}), ("startend:quotation", {})))
    assert follow(checks, '"a"') == (True, True)
    assert follow(checks, "a") == (True, False)
    assert follow(checks, " \n") == (False, False)


def test_arguments_may_be_floats_and_nulls_as_in_tables():
    """The dataset has a column for every argument, and null where an instruction does not take it."""
    given = {"num_words": 2.0, "relation": "at least", "keywords": None, "language": None}
    ((_, check),) = checks_of(row(("length_constraints:number_words", given)))
    assert check("two words") and not check("one")


def test_rows_without_an_answer_get_their_instructions_as_the_reference_and_others_keep_theirs():
    bare, own = row(("startend:quotation", {}), ("punctuation:no_comma", {})), row(("punctuation:no_comma", {}))
    own.fields["completion"] = "a"
    made = with_references([bare, own])
    assert [each.fields["completion"] for each in made] == ["startend:quotation; punctuation:no_comma", "a"]
    assert "completion" not in bare.fields and made[0].place == "if.jsonl, line 7"


LIMIT = {"num_words": 2, "relation": "at least"}


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (Row({"prompt": "a"}, "if.jsonl", 7), "no list of instructions in the field instruction_id_list"),
        (row(), "no list of instructions"),
        (row(("punctuation:no_commas", {})), "there is no instruction 'punctuation:no_commas'"),
        (row((7, {})), "there is no instruction 7"),  # type: ignore[arg-type]
        (row(("punctuation:no_comma", {}), kwargs=[{}, {}]), "arguments of each of 1 instructions"),
        (row(("punctuation:no_comma", {}), kwargs="{}"), "arguments of each of 1 instructions"),
        (row(("punctuation:no_comma", {"num_words": 2})), "takes the arguments none; kwargs has num_words"),
        (row(("punctuation:no_comma", {}), kwargs=["none"]), "kwargs has no object"),
        (row(("length_constraints:number_words", {"num_words": 2})), "num_words, relation; kwargs has num_words"),
        (row(("length_constraints:number_words", LIMIT | {"num_words": "2"})), "is '2', and not a whole number"),
        (row(("length_constraints:number_words", LIMIT | {"num_words": True})), "is True, and not a whole number"),
        (row(("length_constraints:number_words", LIMIT | {"num_words": -1})), "is -1, and not a whole number"),
        (row(("length_constraints:number_words", LIMIT | {"relation": "about"})), "'less than' or 'at least'"),
        (row(("language:response_language", {"language": "tlh"})), "is 'tlh', and not one of ar, bg"),
        (row(("keywords:existence", {"keywords": "sun"})), "is 'sun', and not a list of texts"),
        (row(("keywords:existence", {"keywords": [""]})), "is [''], and not a list of texts"),
        (row(("startend:end_checker", {"end_phrase": " "})), "is ' ', and not a text that is not empty"),
    ],
)
def test_a_wrong_row_is_named_with_what_is_wrong_in_it(wrong: Row, says: str):
    with pytest.raises(DataError) as refused:
        with_references([row(("punctuation:no_comma", {})), wrong])
    assert refused.value.what.startswith("if.jsonl, line 7") and says in refused.value.what
    assert refused.value.remedy


def test_languages_need_their_package_before_anything_is_answered(monkeypatch: pytest.MonkeyPatch):
    _identifier.cache_clear()
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    with_references([row(("punctuation:no_comma", {}))])
    with pytest.raises(DataError, match="py3langid") as refused:
        with_references([row(("change_case:english_capital", {}))])
    assert "parablock[eval]" in (refused.value.remedy or "")
