"""`parablock chat` and `parablock generate` on runs and on model folders."""

from __future__ import annotations

import io
import json
import math
import os
import pty
import select
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from parablock.cli import talk
from parablock.errors import DataError
from parablock.evaluation.conversation import Dialogue, answer_prompts, open_speakers, read_prompts
from tiny_runs import Runs, Workshop, assert_refused, command, command_line, done, sum_row, write_rows

SHORT = ("--max-new-tokens", "6")
USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "ref"}


@pytest.fixture(scope="module")
def tuned(runs: Runs) -> Path:
    """A run that has changed its model enough for other answers than the base model's."""
    return runs("federation.num_rounds=8", "train.learning_rate=0.05")


def answered(outcome_stdout: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in outcome_stdout.splitlines()]


def greedy(folder: Path, rendered: str, max_new_tokens: int) -> str:
    """Generate by transformers alone, from a text with its template around it."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(rendered, return_tensors="pt", add_special_tokens=False).input_ids
    stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    made = model.generate(ids, do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=stops, pad_token_id=1)
    return str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))


def templated(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def test_both_models_answer_as_they_do_by_hand(tuned: Path, workshop: Workshop):
    (record,) = answered(done("generate", str(tuned), "2 plus 2?", "--format", "jsonl", *SHORT).stdout)
    assert {name: record[name] for name in ("prompt", "base", "tuned")} == {
        "prompt": "2 plus 2?",
        "base": greedy(workshop.model, templated("2 plus 2?"), 6),
        "tuned": greedy(tuned / "model", templated("2 plus 2?"), 6),
    }
    assert record["base"] != record["tuned"]


def test_one_model_of_a_run_or_a_folder_answers_alone(tuned: Path):
    (both,) = answered(done("generate", str(tuned), "Hi", "--format", "jsonl", *SHORT).stdout)
    (only,) = answered(done("generate", str(tuned), "Hi", "--only", "tuned", "--format", "jsonl", *SHORT).stdout)
    assert only == {"prompt": "Hi", "tuned": both["tuned"]}
    (alone,) = answered(done("generate", str(tuned / "model"), "Hi", "--format", "jsonl", *SHORT).stdout)
    assert alone == {"prompt": "Hi", "model": both["tuned"]}
    assert_refused(command("generate", str(tuned / "model"), "Hi", "--only", "base"), "has no base model")


def test_prompts_come_from_rows_lines_and_arguments_and_rows_keep_their_reference(tuned: Path, tmp_path: Path):
    rows = [
        {"prompt": "1 plus 1?"},
        sum_row(2, 3),
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"messages": [{"role": "user", "content": "open"}]},
        {"question": "q", "answer": "#### 1"},
    ]
    lines = tmp_path / "lines.txt"
    lines.write_text("first line\n\nsecond line\n")
    (tmp_path / "files").mkdir()
    files = [str(write_rows(tmp_path / "files" / f"{n}.jsonl", [row])) for n, row in enumerate(rows)]
    data = [word for file in [*files, str(lines)] for word in ("--data", file)]
    target = tmp_path / "answers.jsonl"
    outcome = done("generate", str(tuned), "argument", *data, "--output", str(target), *SHORT)
    assert "8 prompts answered" in outcome.stderr and outcome.stdout == ""
    records = [json.loads(line) for line in target.read_text().splitlines()]
    prompts = ["argument", "1 plus 1?", "2 plus 3?", "a", "open", "q", "first line", "second line"]
    assert [record["prompt"] for record in records] == prompts
    references = {"2 plus 3?": "#### 5", "a": "b", "q": "#### 1"}
    assert {r["prompt"]: r["reference"] for r in records if "reference" in r} == references
    assert all(isinstance(record["base"], str) and isinstance(record["tuned"], str) for record in records)


def test_plain_answers_name_who_speaks(tuned: Path):
    said = done("generate", str(tuned), "Hi", *SHORT).stdout
    assert [line.partition(":")[0] for line in said.splitlines() if line] == ["prompt", "base", "tuned"]


def test_without_a_prompt_there_is_nothing_to_generate(tuned: Path):
    assert_refused(command("generate", str(tuned)), "There is no prompt")


def test_drawn_answers_follow_from_the_seed(tuned: Path):
    def drawn(*options: str) -> str:
        return done("generate", str(tuned), "Hi", "--only", "tuned", "--max-new-tokens", "24", *options).stdout

    first = drawn("--temperature", "1.5", "--seed", "1")
    assert first == drawn("--temperature", "1.5", "--seed", "1")
    assert first != drawn("--temperature", "1.5", "--seed", "2")
    assert drawn() == drawn("--seed", "2") != first


def test_a_system_prompt_changes_what_the_model_sees(tuned: Path, workshop: Workshop):
    options = ("--format", "jsonl", "--only", "tuned", *SHORT)
    (record,) = answered(done("generate", str(tuned), "Hi", "--system", "Be brief.", *options).stdout)
    rendered = f"<|im_start|>system\nBe brief.<|im_end|>\n{templated('Hi')}"
    assert record["tuned"] == greedy(tuned / "model", rendered, 6)


@pytest.mark.parametrize(
    ("fields", "text", "reference"),
    [
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "bot", "value": "ref"}]}, "q", "ref"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "GPT", "value": "ref"}]}, "q", "ref"),
        ({"messages": json.dumps([USER, ANSWER])}, "q", "ref"),
        ({"messages": json.dumps([USER, ANSWER, {**USER, "content": "last"}])}, "last", None),
        ({"messages": [USER, {**ANSWER, "weight": 0}], "weight": 0}, "q", "ref"),
        ({"prompt": "q", "completion": [ANSWER]}, "q", "ref"),
        ({"prompt": [USER], "completion": [{**ANSWER, "content": [{"type": "text", "text": "ref"}]}]}, "q", "ref"),
        ({"prompt": [USER]}, "q", None),
        ({"instruction": "q", "input": "more"}, "q\n\nmore", None),
        ({"question": "q", "answer": "ref"}, "q", "ref"),
        ({"question": "q", "answer": 42}, "q", "42"),
        ({"question": "q", "answer": 42.0}, "q", "42"),
        ({"question": "q", "answer": 4.5}, "q", "4.5"),
        ({"question": "q", "answer": float("nan")}, "q", None),
        ({"messages": [USER, ANSWER], "input": "x", "output": {"y": 1}}, "q", "ref"),
        ({"prompt": "q", "completion": "ref", "label": False, "training": "x"}, "q", "ref"),
        ({"prompt": [USER, {**ANSWER, "content": "a", "weight": 1}, USER], "completion": "ref"}, "q", "ref"),
        ({"messages": json.dumps([USER, {**ANSWER, "mask": 1}])}, "q", "ref"),
    ],
)
def test_a_row_asks_its_last_question_and_never_shows_the_answer(
    tmp_path: Path, fields: dict[str, Any], text: str, reference: str | None
):
    (prompt,) = read_prompts([], [str(write_rows(tmp_path / "rows.jsonl", [fields]))])
    assert (prompt.text, prompt.reference) == (text, reference)
    is_asked_before = reference is None and "ref" in str(fields)
    assert ("ref" in str(prompt.row.fields)) == is_asked_before


def test_lines_of_a_text_file_are_prompts_without_a_mark_or_other_ends(tmp_path: Path):
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeffone\u2028still\x0cone\r\n\ntwo\x85\n".encode())
    assert [prompt.text for prompt in read_prompts([], [str(file)])] == ["one\u2028still\x0cone", "two\x85"]
    file.write_bytes("one\n".encode("utf-16"))
    with pytest.raises(DataError, match=r"a\.txt is in UTF-16") as caught:
        read_prompts([], [str(file)])
    assert "iconv -f UTF-16 -t UTF-8" in str(caught.value.remedy)


def test_a_batch_answers_as_one_by_one(tuned: Path):
    speaker = open_speakers(str(tuned), only="tuned")[0]
    prompts = read_prompts(["1 plus 1?", "a much longer prompt than the first", "Hi"], [])
    done_so_far: list[int] = []
    together = answer_prompts(speaker, prompts, max_new_tokens=6, batch_size=2, on_done=done_so_far.append)
    assert together == [answer_prompts(speaker, [prompt], max_new_tokens=6)[0] for prompt in prompts]
    assert done_so_far == [2, 3]


def test_a_conversation_remembers_its_own_answers_until_it_begins_anew(tuned: Path):
    speaker = open_speakers(str(tuned), only="tuned")[0]
    conversation, pieces = Dialogue(speaker, max_new_tokens=6), list[str]()
    first = conversation.ask("2 plus 2?", pieces.append)
    assert "".join(pieces) == first
    second = conversation.ask("3 plus 3?")
    rendered = templated("2 plus 2?") + f"{first}<|im_end|>\n" + templated("3 plus 3?")
    assert second == greedy(tuned / "model", rendered, 6)
    conversation.forget()
    assert conversation.ask("3 plus 3?") == greedy(tuned / "model", templated("3 plus 3?"), 6)


def test_a_turn_that_is_cut_short_has_not_been(tuned: Path):
    conversation = Dialogue(open_speakers(str(tuned), only="tuned")[0], max_new_tokens=6)

    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conversation.ask("2 plus 2?", interrupt)
    assert conversation.ask("3 plus 3?") == greedy(
        Path(conversation.speaker.loaded.name_or_path), templated("3 plus 3?"), 6
    )


def test_without_a_template_a_model_is_asked_as_its_rows_were_written(
    workshop: Workshop, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
):
    bare, model = AutoTokenizer.from_pretrained(workshop.model), tmp_path / "bare"
    AutoModelForCausalLM.from_pretrained(workshop.model).save_pretrained(model)
    bare.chat_template = None
    bare.save_pretrained(model)
    rows = [{"question": f"{k} plus 1?", "answer": f"#### {k + 1}"} for k in range(8)]
    files = [write_rows(tmp_path / f"{n}.jsonl", rows) for n in range(4)]
    changes = [f"model.name_or_path={model}", f"data.train=[{', '.join(map(str, files))}]", "data.test=[]"]
    assert workshop.run(tmp_path / "run", *changes).code == 0
    (record,) = answered(done("generate", str(tmp_path / "run"), "5 plus 1?", "--format", "jsonl", *SHORT).stdout)
    assert record["base"] == greedy(model, "Question: 5 plus 1?\nAnswer:", 6)


def test_a_prompt_that_loses_its_beginning_is_told_of(tuned: Path, monkeypatch: pytest.MonkeyPatch):
    long, short = "word " * 600, "2 plus 2?"
    outcome = done("generate", str(tuned), long, short, *SHORT)
    assert outcome.stderr.count("1 of 2 prompts are longer than the") == 2
    for words in ("base: ", "tuned: ", "beside an answer of 6: the beginning, with a system prompt", "is cut off"):
        assert words in outcome.stderr
    assert "cut off" not in done("generate", str(tuned), short, *SHORT).stderr
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{short}\n/new\n{long}\n"))
    outcome = done("chat", str(tuned), "--only", "tuned", *SHORT)
    assert outcome.stderr.count("note: the prompt is longer than the") == 1
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{short}\n"))
    assert "cut off" not in done("chat", str(tuned), *SHORT).stderr


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_what_is_not_utf_8_is_named_and_not_asked(tuned: Path, encoding: str, monkeypatch: pytest.MonkeyPatch):
    lines = io.TextIOWrapper(io.BytesIO(b"2 plus 2?\ncaf" + 9999 * b"\xe9" + b"\n"), encoding=encoding)
    monkeypatch.setattr("sys.stdin", lines)
    outcome = command("chat", str(tuned), "--only", "tuned", *SHORT)
    assert outcome.code == 2 and "Traceback" not in outcome.stderr
    assert "line 2 of standard input is not in UTF-8: 'caf\\udce9" in outcome.stderr and len(outcome.stderr) < 1000
    assert "iconv" in outcome.stderr and len(outcome.stdout.splitlines()) >= 1
    not_text = os.fsdecode(b"caf\xe9")
    assert_refused(command("generate", str(tuned), "a", not_text), "prompt 2 is not in UTF-8")
    for words in (("generate", str(tuned), "a"), ("chat", str(tuned))):
        assert_refused(command(*words, "--system", not_text), "--system is not in UTF-8")


@pytest.mark.parametrize("name", ["generate", "chat"])
@pytest.mark.parametrize("temperature", ["nan", "inf", "1e-300"])
def test_a_temperature_that_draws_nothing_is_refused(name: str, temperature: str):
    outcome = command(name, "no-model", "--temperature", temperature)
    assert outcome.code == 2 and "draws no token" in " ".join(outcome.stderr.replace("│", "").split())


def test_answers_that_cannot_be_written_are_told_of_without_an_option_that_is_not_there(
    tuned: Path, tmp_path: Path
):
    outcome = command("generate", str(tuned / "model"), "Hi", *SHORT, "--output", str(tmp_path / "no" / "file"))
    assert_refused(outcome, "cannot be written", "Choose another place")
    assert "--output-dir" not in outcome.stderr


def test_answers_that_were_cut_say_so(tuned: Path, monkeypatch: pytest.MonkeyPatch):
    long = ("--max-new-tokens", "200", "--only", "tuned")
    (record,) = answered(done("generate", str(tuned), "2 plus 2?", "--format", "jsonl", *long).stdout)
    assert "tuned_cut_at" not in record  # it ended
    short = ("--max-new-tokens", "1")
    (record,) = answered(done("generate", str(tuned), "2 plus 2?", "--format", "jsonl", *short).stdout)
    assert record["base_cut_at"] == 1
    said = done("generate", str(tuned), "2 plus 2?", *short).stdout
    assert "… (cut at 1 tokens)" in said and "cut_at" not in said
    for options, is_cut in ((short, True), (long, False)):
        monkeypatch.setattr("sys.stdin", io.StringIO("2 plus 2?\n"))
        assert ("… (cut at 1 tokens)" in done("chat", str(tuned), *options).stdout) is is_cut


@pytest.mark.parametrize("place", ["no/file", ""])
def test_a_file_for_answers_is_looked_at_before_anything_is_loaded(
    tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
):
    monkeypatch.setattr(talk, "_warn_of_changes", lambda *_: pytest.fail("it goes on"))
    outcome = command("generate", str(tuned / "model"), "Hi", *SHORT, "--output", str(tmp_path / place))
    assert_refused(outcome, "cannot be written: it is a folder" if not place else "there is no folder")


def test_ctrl_c_ends_a_chat_that_reads_a_file(tuned: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*_: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(Dialogue, "ask", interrupted)
    monkeypatch.setattr("sys.stdin", io.StringIO("2 plus 2?\n3 plus 3?\n"))
    outcome = command("chat", str(tuned), *SHORT)
    assert (outcome.code, outcome.stdout) == (130, "")
    assert outcome.stderr.splitlines()[-1] == "stopped at once; the last line has no answer"


def test_lines_of_standard_input_are_turns(tuned: Path, monkeypatch: pytest.MonkeyPatch):
    wrong = {
        "/foo": "/foo is no command",
        "//x": "//x is no command",
        "/new x": "/new takes nothing behind it",
        "/quit\tnow": "/quit takes nothing behind it",
        "//quit now": "//quit is no command",
        "/" + "x" * 9999: f"/{'x' * 39} is no command",
    }
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(["/help", *wrong, "/quit", "2 plus 2?\n"])))
    outcome = done("chat", str(tuned), *SHORT)  # no model is asked that
    told = [talk.HELP, *(f"{words}; nothing was asked: {talk.HELP}" for words in wrong.values())]
    assert outcome.stdout == "" and outcome.stderr.splitlines()[-len(told) :] == told
    monkeypatch.setattr("sys.stdin", io.StringIO("/etc/passwd\n/usr is what?\n"))
    assert done("chat", str(tuned / "model"), *SHORT).stdout.count("\n") >= 2, "a path and a sentence are prompts"
    monkeypatch.setattr("sys.stdin", io.StringIO("2 plus 2?\n\n/new\n2 plus 2?\n"))
    said = [line for line in done("chat", str(tuned), *SHORT).stdout.splitlines() if line]
    assert [line.partition(":")[0] for line in said] == ["base", "tuned"] * 2
    assert said[:2] == said[2:]
    monkeypatch.setattr("sys.stdin", io.StringIO("2 plus 2?\n"))
    alone = done("chat", str(tuned / "model"), *SHORT).stdout.strip()
    assert alone == said[1].partition(": ")[2].strip()


def test_the_answers_of_two_models_stand_side_by_side():
    console = Console(width=60, file=io.StringIO(), _environ={})
    console.print(talk._Columns({"base": "left " * 12, "tuned": "right"}))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[0].split() == ["base", "tuned"]
    assert lines[1].split() == ["left"] * 6 + ["right"] or (lines[1].startswith("left") and "right" in lines[1])
    assert max(map(len, lines)) <= 60


def test_a_chat_on_a_terminal_streams_both_answers_and_ends_with_ctrl_d(tuned: Path):
    said, code = at_a_terminal(["chat", str(tuned), *SHORT], [b"2 plus 2?\r", b"\x04"])
    assert code == 0, said
    assert "base" in said and "tuned" in said and "> " in said
    assert "Traceback" not in said


def test_ctrl_c_at_the_prompt_ends_a_chat(tuned: Path):
    said, code = at_a_terminal(["chat", str(tuned), *SHORT], [b"\x03"])
    assert code == 130, said
    assert "Traceback" not in said


def at_a_terminal(arguments: list[str], keys: list[bytes], patience_s: float = 300.0) -> tuple[str, int]:
    """Run a command at a terminal, and press the keys at its prompts; give what it showed and its exit code.

    The last key is pressed again where nothing came of it, as a person would: Python drops a Ctrl-C that comes at
    the moment in which it begins to wait for a key.
    """
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(TERM="xterm", COLUMNS="80", LINES="40")
        os.execv(sys.executable, command_line(arguments))
    shown, waiting, end, pressed = b"", list(keys), time.monotonic() + patience_s, math.inf
    while time.monotonic() < end:
        if select.select([terminal], [], [], 0.1)[0]:
            try:
                piece = os.read(terminal, 4096)
            except OSError:  # the other end is closed
                break
            if not piece:
                break
            shown += piece
        if waiting and shown.count(b"> ") > len(keys) - len(waiting):
            time.sleep(0.3)  # readline has printed the prompt, and is about to wait for a key
            os.write(terminal, waiting.pop(0))
            pressed = time.monotonic()
        elif not waiting and time.monotonic() > pressed + 10:
            os.write(terminal, keys[-1])
            pressed = time.monotonic()
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    return shown.decode(errors="replace"), os.waitstatus_to_exitcode(status)
