"""`parablock eval`: one rendering for both models, what was trained on, and the tasks that it scores."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.main import get_command

from parablock.cli.main import app
from parablock.cli.terminal import OPTIONS_FOR
from parablock.evaluation.conversation import open_speakers
from parablock.evaluation.generation import rouge_l
from parablock.evaluation.side_by_side import score_models
from parablock.storage.run_directory import RunDirectory
from tiny_runs import NUM_CLIENTS, Row, Workshop, assert_refused, command, done, sum_row, summary_of, write_rows


def scores(stdout: str) -> dict[str, tuple[float, int]]:
    """Read label → (score, examples) off the table."""
    found = re.findall(r"(base|tuned|model)\W+(\d+\.\d+)\W+(\d+)\W", stdout)
    return {label: (float(value), int(count)) for label, value, count in found}


@pytest.fixture(scope="module")
def bare_model(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model without a chat template."""
    model, tokenizer = tmp_path_factory.mktemp("bare"), AutoTokenizer.from_pretrained(workshop.model)
    AutoModelForCausalLM.from_pretrained(workshop.model).save_pretrained(model)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(model)
    return model


def asked(k: int) -> Row:
    return {"question": f"{k} plus 1?", "answer": f"#### {k + 1}"}


def told(k: int) -> Row:
    return {"messages": [{"role": "user", "content": f"{k} and 1"}, {"role": "assistant", "content": f"{k + 1}"}]}


def files_of(folder: Path, *makes: Callable[[int], Row]) -> str:
    """Write a file of rows for each of the clients, in these formats by turns."""
    files = [write_rows(folder / f"{n}.jsonl", map(makes[n % len(makes)], range(8))) for n in range(NUM_CLIENTS)]
    return f"data.train=[{', '.join(map(str, files))}]"


def test_both_models_are_scored_on_one_rendering_where_formats_are_mixed(
    workshop: Workshop, bare_model: Path, tmp_path: Path
):
    test = [
        write_rows(tmp_path / f"test-{n}.jsonl", map(make, range(3))) for n, make in enumerate((asked, sum_row2))
    ]
    changes = [f"data.test=[{', '.join(map(str, test))}]", f"model.name_or_path={bare_model}"]
    assert workshop.run(tmp_path / "run", files_of(tmp_path, asked, sum_row2), *changes).code == 0
    summary = summary_of(tmp_path / "run")
    found = scores(done("eval", str(tmp_path / "run")).stdout)
    assert found == {
        "base": (pytest.approx(summary["initial_eval_loss"], abs=1e-4), 6),
        "tuned": (pytest.approx(summary["final_eval_loss"], abs=1e-4), 6),
    }
    (apart,) = score_models(str(bare_model), [str(path) for path in test], device="cpu")
    assert apart.value != pytest.approx(summary["initial_eval_loss"], abs=1e-4), "by itself it has headings"


def sum_row2(k: int) -> Row:
    return sum_row(k, 1)


def test_compare_scores_the_base_as_it_is_trained(workshop: Workshop, bare_model: Path, tmp_path: Path):
    choices = [{**sum_row(k, k), "choices": [f"#### {2 * k}", f"#### {2 * k + 1}"]} for k in range(8)]
    test = write_rows(tmp_path / "test.jsonl", choices)
    arguments = ["--set", f"data.test=[{test}]", "--set", f"model.name_or_path={bare_model}"]
    train = ["--set", files_of(tmp_path, asked, sum_row2)]
    target = tmp_path / "compared"
    done("compare", str(workshop.config), *arguments, *train, "--methods", "local", "--tasks", "multiple_choice",
         "--output-dir", str(target))  # fmt: skip
    (entry,) = json.loads((target / "compare.json").read_text())
    options = {"task": "multiple_choice", "device": "cpu", "max_examples": 8}
    model = str(target / "local" / "model" / "client_0")
    (same,) = score_models(str(bare_model), [str(test)], tokenizer_of=model, **options)  # type: ignore[arg-type]
    assert entry["initial_scores"] == {"multiple_choice": same.value}
    (apart,) = score_models(str(bare_model), [str(test)], **options)  # type: ignore[arg-type]
    assert apart.value != same.value, "by itself it has headings"


@pytest.mark.parametrize(
    ("makes", "has_memory"), [((asked,), False), ((asked, sum_row2), False), ((asked, told), True), ((told,), True)]
)
def test_a_model_without_a_template_remembers_turns_where_it_has_learnt_them(
    makes: tuple[Callable[[int], Row], ...], has_memory: bool, workshop: Workshop, bare_model: Path, tmp_path: Path
):
    changes = [files_of(tmp_path, *makes), "data.test=[]", "federation.num_rounds=4", "evaluation.every_rounds=4"]
    assert workshop.run(tmp_path / "bare", *changes, f"model.name_or_path={bare_model}").code == 0
    speakers = open_speakers(str(tmp_path / "bare"))
    assert {speaker.has_memory for speaker in speakers} == {has_memory}
    path = RunDirectory(tmp_path / "bare").manifest
    manifest = json.loads(path.read_text())
    (name, *more) = manifest.pop("data_formats")
    path.write_text(json.dumps(manifest | {"data_format": "mixed formats" if more else name}))  # as of earlier runs
    again = open_speakers(str(tmp_path / "bare"))
    assert [speaker.data_format for speaker in again] == [speaker.data_format for speaker in speakers]
    assert more or {speaker.has_memory for speaker in again} == {has_memory}
    path.write_text(json.dumps(manifest))
    assert {speaker.data_format for speaker in open_speakers(str(tmp_path / "bare"))} == {"prompt_completion"}


def test_a_model_with_a_template_of_its_own_remembers_turns(workshop: Workshop, tmp_path: Path):
    changes = [files_of(tmp_path, asked), "data.test=[]", "federation.num_rounds=4"]
    assert workshop.run(tmp_path / "run", *changes).code == 0
    assert {speaker.has_memory for speaker in open_speakers(str(tmp_path / "run"))} == {True}


def test_a_model_of_sharegpt_rows_is_asked_like_any_other(workshop: Workshop, tmp_path: Path):
    def said(k: int) -> Row:
        return {"conversations": [{"from": "human", "value": f"{k}?"}, {"from": "gpt", "value": f"{k}!"}]}

    changes = [files_of(tmp_path, said), "data.test=[]", "federation.num_rounds=4"]
    assert workshop.run(tmp_path / "run", *changes).code == 0
    asked_once = ("generate", str(tmp_path / "run"), "1?", "--format", "jsonl", "--max-new-tokens", "3")
    assert set(json.loads(done(*asked_once).stdout)) >= {"prompt", "base", "tuned"}


def test_a_forgotten_client_has_not_been_trained_on(workshop: Workshop, tmp_path: Path):
    rows = workshop.client_file(2).read_text().splitlines()
    assert workshop.run(tmp_path / "without", "federation.excluded_clients=[2]").code == 0
    assert workshop.run(tmp_path / "with").code == 0
    data = ("--data", str(workshop.client_file(2)))
    others = {line for n in (0, 1, 3) for line in workshop.client_file(n).read_text().splitlines()}
    assert not others.intersection(rows)
    assert "trained on" not in done("eval", str(tmp_path / "without"), *data).stdout
    every = f"warning: {len(rows)} of {len(rows)} rows were trained on"
    assert every in done("eval", str(tmp_path / "with"), *data).stdout
    asked_again = ({"question": row["prompt"], "answer": row["completion"]} for row in map(json.loads, rows))
    other_names = ("--data", str(write_rows(tmp_path / "other.jsonl", asked_again)), "--format", "gsm8k")
    assert every in done("eval", str(tmp_path / "with"), *other_names).stdout


def test_training_data_that_changed_leave_open_what_was_trained_on(workshop: Workshop, tmp_path: Path):
    files = [shutil.copy(workshop.client_file(n), tmp_path) for n in range(NUM_CLIENTS)]
    run_dir = tmp_path / "run"
    assert workshop.run(run_dir, f"data.train=[{', '.join(files)}]").code == 0
    unknown = "whether rows were trained on is not known"
    assert unknown not in done("eval", str(run_dir)).stdout
    write_rows(Path(files[0]), (sum_row(9, k) for k in range(8)))
    outcome = command("eval", str(run_dir))
    assert outcome.code == 0 and unknown in outcome.stdout
    assert scores(outcome.stdout)["tuned"][0] == pytest.approx(summary_of(run_dir)["final_eval_loss"], abs=1e-4)


def test_weights_that_were_rounded_after_the_run_had_scored_them_are_told_of(workshop: Workshop, tmp_path: Path):
    rounded = "note: the run scored before its weights were rounded to bfloat16"
    base = tmp_path / "base"
    shutil.copytree(workshop.model, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    assert workshop.run(tmp_path / "rounded", f"model.name_or_path={base}").code == 0
    assert workshop.run(tmp_path / "exact").code == 0
    assert rounded in done("eval", str(tmp_path / "rounded")).stdout
    assert rounded not in done("eval", str(tmp_path / "exact")).stdout


def test_the_held_out_rows_of_each_client_are_scored_by_themselves(workshop: Workshop, tmp_path: Path):
    run_dir = tmp_path / "run"
    assert workshop.run(run_dir, "data.test=[]", "data.test_fraction=0.25").code == 0
    outcome = done("eval", str(run_dir), "--per-client")
    written = json.loads((run_dir / "evaluation" / "loss.json").read_text())
    records = [json.loads(line) for line in (run_dir / "evaluation" / "loss.jsonl").read_text().splitlines()]
    assert [record["client"] for record in written["clients"]] == list(range(NUM_CLIENTS))
    assert sum(record["examples"] for record in written["clients"]) == len(records)
    for client in written["clients"]:
        own = [record for record in records if f"client_{client['client']}.jsonl" in record["row"]]
        alone = workshop.client_file(client["client"]).read_text().splitlines()
        rows = tmp_path / f"{client['client']}.jsonl"
        rows.write_text("".join(alone[int(record["row"].rpartition(" ")[2]) - 1] + "\n" for record in own))
        found = score_models(str(run_dir), [str(rows)], device="cpu")
        assert client["examples"] == len(own) == found[0].count
        assert {score.label: score.value for score in found} == {
            label: pytest.approx(client[label], abs=1e-6) for label in ("base", "tuned")
        }
        assert f"{client['tuned']:.4f}" in outcome.stdout
    assert len({client["base"] for client in written["clients"]}) == NUM_CLIENTS
    done("eval", str(run_dir))
    assert "clients" not in json.loads((run_dir / "evaluation" / "loss.json").read_text())
    for options, says in (
        (("--data", str(workshop.test_file)), "--per-client is for rows that a run held out"),
        (("--max-examples", "2"), "leave --max-examples out"),
    ):
        refused = command("eval", str(run_dir), "--per-client", *options)
        assert refused.code == 2 and says in " ".join(refused.stderr.replace("│", "").split())


def test_rouge_l_is_a_task(workshop: Workshop, tmp_path: Path):
    assert workshop.run(tmp_path / "run").code == 0
    data = ("--data", str(workshop.test_file), "--max-new-tokens", "6")
    outcome = done("eval", str(tmp_path / "run"), "--task", "rouge_l", *data)
    written = json.loads((tmp_path / "run" / "evaluation" / "rouge_l.json").read_text())
    assert {score["label"]: (pytest.approx(score["value"], abs=1e-4), 6) for score in written["scores"]} == scores(
        outcome.stdout
    )
    records = (tmp_path / "run" / "evaluation" / "rouge_l.jsonl").read_text().splitlines()
    assert all(
        json.loads(r)["tuned_score"] == rouge_l(json.loads(r)["tuned"], json.loads(r)["reference"]) for r in records
    )


def test_instructions_are_checked_by_rules(workshop: Workshop, tmp_path: Path):
    assert workshop.run(tmp_path / "run").code == 0
    asked = [
        {
            "key": k,
            "prompt": f"Add {k} and 1. " * (k // 16 + 1),  # the longer one fills the length of the run's rows
            "instruction_id_list": ["length_constraints:number_words", "punctuation:no_comma"],
            "kwargs": [{"num_words": k, "relation": "at least", "keywords": None}, {}],
        }
        for k in (1, 99)
    ]
    data = ("--data", str(write_rows(tmp_path / "ifeval.jsonl", asked)), "--max-new-tokens", "6")
    outcome = done("eval", str(tmp_path / "run"), "--task", "ifeval", *data)
    written = json.loads((tmp_path / "run" / "evaluation" / "ifeval.json").read_text())
    records = (tmp_path / "run" / "evaluation" / "ifeval.jsonl").read_text().splitlines()
    first, second = map(json.loads, records)
    assert first["reference"] == "length_constraints:number_words; punctuation:no_comma"
    assert "99 and 1. Add 99" in second["prompt"] if "prompt" in second else second["row"].endswith("2")
    for score in written["scores"]:
        label, followed = score["label"], [row[f"{score['label']}_followed"] for row in (first, second)]
        assert "length_constraints:number_words" not in followed[1], "six tokens are not 99 words"
        both = [len(names) == 2 for names in followed]
        assert [row[f"{label}_score"] for row in (first, second)] == both
        assert score["value"] == sum(both) / 2
        assert score["instruction_accuracy"] == sum(map(len, followed)) / 4
        assert f"{label}: {score['instruction_accuracy']:.4f} of all instructions are followed" in outcome.stdout
    (own,) = score_models(str(workshop.model), [data[1]], task="ifeval", max_new_tokens=6, max_examples=1)
    assert own.count == len(own.followed) == 1 and own.predictions == (first["base"],)
    assert "instruction_accuracy" not in done("eval", str(tmp_path / "run")).stdout


def test_rows_that_are_not_scored_and_prompts_that_are_cut_are_told_of(workshop: Workshop, tmp_path: Path):
    long = {"prompt": "word " * 600, "completion": "#### 1", "note": "x"}
    file = write_rows(tmp_path / "rows.jsonl", [sum_row(1, 1), long, sum_row(2, 2)])
    words, folder = ("eval", str(workshop.model), "--data", str(file), "--output-dir", str(tmp_path / "scores")), {}
    said = {}
    for task in ("loss", "exact_match"):
        outcome = done(*words, "--task", task, "--max-new-tokens", "2")
        said[task] = " ".join(outcome.stdout.split())
        folder[task] = json.loads((tmp_path / "scores" / f"{task}.json").read_text())
    assert "not scored: " in said["loss"] and f"{file}, line 2: the prompt alone fills max_length" in said["loss"]
    assert [entry["row"] for entry in folder["loss"]["rows_left_out"]] == [f"{file}, line 2"]
    assert folder["loss"]["scores"][0]["examples"] == 2
    assert "not scored" not in said["exact_match"] and folder["exact_match"]["rows_left_out"] == []
    assert folder["exact_match"]["scores"][0]["examples"] == 3
    assert "model: 1 of 3 prompts are longer than the" in said["exact_match"]
    assert f"cut off; the first is {file}, line 2" in folder["exact_match"]["scores"][0]["prompts_cut"]
    for task in folder:
        assert "not used: field note (1 row)" in said[task]
    write_rows(file, [sum_row(1, 1)])
    outcome = done(*words, "--task", "exact_match", "--max-new-tokens", "2")
    assert "cut off" not in outcome.stdout and "not used" not in outcome.stdout


def renamed(row: Row) -> Row:
    return {"frage": row["prompt"], "antwort": row["completion"]}


def test_rows_in_the_columns_of_a_run_are_scored_and_asked(workshop: Workshop, tmp_path: Path):
    """`eval` and `generate` read them as the run did; other columns, and those of a model, are given."""
    files = [write_rows(tmp_path / f"{n}.jsonl", (renamed(sum_row(n, k)) for k in range(8))) for n in range(4)]
    train, run_dir = f"data.train=[{', '.join(map(str, files))}]", str(tmp_path / "run")
    columns = "data.columns={prompt: frage, completion: antwort}"
    assert workshop.run(tmp_path / "run", train, columns, "data.test=[]").code == 0
    new = write_rows(tmp_path / "new.jsonl", (renamed(sum_row(9, k)) for k in range(3)))
    plain = write_rows(tmp_path / "plain.jsonl", (sum_row(9, k) for k in range(3)))
    own = ("--column", "prompt=frage", "--column", "completion=antwort")
    found = [
        scores(done("eval", *arguments).stdout)
        for arguments in (
            (run_dir, "--data", str(new)),
            (run_dir, "--data", str(plain)),
            (str(tmp_path / "run" / "model"), "--data", str(new), *own),
        )
    ]
    assert found[0] == found[1] and found[0]["tuned"] == found[2]["model"]
    missing = command("eval", run_dir, "--data", str(plain), *own)
    assert_refused(missing, "has no column 'frage'", "data.columns is --column")
    refused = command("eval", str(tmp_path / "run" / "model"), "--data", str(new))
    assert_refused(refused, "For this command data.columns is --column field=column, data.format is --format.")
    assert_refused(command("eval", run_dir, *own), "--column is for the rows of --data")

    changes = (train, columns, f"data.test=[{new}]", "federation.num_rounds=4")
    words = [word for change in changes for word in ("--set", change)]
    compared = ("compare", str(workshop.config), "--output-dir", str(tmp_path / "compared"), "--methods", "fl_bcd")
    done(*compared, "--tasks", "rouge_l", *words)

    asked = ("--format", "jsonl", "--max-new-tokens", "2")
    answers = [
        [json.loads(line) for line in done("generate", *arguments, *asked).stdout.splitlines()]
        for arguments in (
            (run_dir, "--data", str(new)),
            (run_dir, "--data", str(plain)),
            (run_dir, "--data", str(new), *own),
        )
    ]
    assert answers[0] == answers[1] == answers[2] and answers[0][1]["reference"] == "#### 10"
    alone = write_rows(tmp_path / "alone.jsonl", [{"frage": "1 plus 1?"}])
    mixed = write_rows(tmp_path / "mixed.jsonl", [{**sum_row(1, 1), "frage": "another"}])
    lines = tmp_path / "lines.txt"
    lines.write_text("1 plus 1?\n")
    for file, more in ((alone, ()), (alone, own), (mixed, ()), (lines, ()), (lines, own)):
        (answer,) = done("generate", run_dir, "--data", str(file), *more, *asked).stdout.splitlines()
        assert json.loads(answer)["prompt"] == "1 plus 1?"
    typed = command("generate", run_dir, "--data", str(mixed), "--column", "prompt=typo")
    assert_refused(typed, "has no column 'typo'")
    refused = command("generate", str(tmp_path / "run" / "model"), "--data", str(new))
    assert_refused(refused, "For this command data.columns is --column field=column.")
    assert_refused(command("generate", run_dir, "1?", *own), "--column is for the rows of --data")


def test_rows_of_other_names_stay_as_they_are_where_a_run_renames(workshop: Workshop, tmp_path: Path):
    """A column of the run may be a field of theirs that means something else."""
    held = [{"prompt": [*told(k)["messages"]]} for k in range(8)]
    train = f"data.train=[{', '.join(str(write_rows(tmp_path / f'{n}.jsonl', held)) for n in range(4))}]"
    run_dir = str(tmp_path / "run")
    changes = (train, "data.columns={messages: prompt}", "data.test=[]")
    assert workshop.run(tmp_path / "run", *changes).code == 0
    plain = write_rows(tmp_path / "plain.jsonl", (sum_row(9, k) for k in range(3)))
    own = write_rows(tmp_path / "own.jsonl", held[:3])
    followed = {"prompt": "Say it.", "instruction_id_list": ["length_constraints:number_words"]}
    followed |= {"kwargs": [{"num_words": 2, "relation": "at least"}], "key": 1}
    rules = write_rows(tmp_path / "rules.jsonl", [followed])
    assert scores(done("eval", run_dir, "--data", str(plain)).stdout)["tuned"][1] == 3
    assert "3 of 3 rows were trained on" in done("eval", run_dir, "--data", str(own)).stdout
    done("eval", run_dir, "--data", str(rules), "--task", "ifeval", "--max-new-tokens", "2")


def test_rows_that_a_run_does_not_learn_are_not_trained_on(workshop: Workshop, tmp_path: Path):
    rows = [sum_row(7, k) for k in range(12)]
    silent = [{**row, "train": 0} if k % 2 else row for k, row in enumerate(rows)]
    train = f"data.train=[{', '.join(str(write_rows(tmp_path / f'{n}.jsonl', silent)) for n in range(4))}]"
    assert workshop.run(tmp_path / "run", train, "data.test=[]", "data.test_fraction=0.1").code == 0
    for which, said in ((1, None), (0, "6 of 6 rows were trained on")):
        file = write_rows(tmp_path / f"asked-{which}.jsonl", rows[which::2])
        printed = done("eval", str(tmp_path / "run"), "--data", str(file)).stdout
        assert said in printed if said else "were trained on" not in printed


def test_the_line_of_options_is_for_what_they_are_for(workshop: Workshop, tmp_path: Path):
    missing = command("eval", str(workshop.model), "--data", str(tmp_path / "data.columns.jsonl"))
    assert_refused(missing, "does not exist")
    assert "For this command" not in missing.stderr
    harness = command("eval", str(workshop.model), "--harness", "x", "--column", "prompt=y", "--data", "z")
    assert_refused(harness, "--harness has rows of its own; leave --data, --column out")


def test_options_that_stand_for_keys_are_options_of_their_command():
    for name, options in OPTIONS_FOR.items():
        parameters = {text for parameter in get_command(app).commands[name].params for text in parameter.opts}  # type: ignore[attr-defined]
        assert parameters.issuperset(option.split()[0] for option in options.values())
