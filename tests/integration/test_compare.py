"""`parablock compare`: the same data, seed and link for each method."""

from __future__ import annotations

import json
import re
import shutil
import sys
from itertools import count
from pathlib import Path
from statistics import mean, stdev
from xml.etree import ElementTree

import pytest
import yaml

from parablock.cli import terminal
from parablock.cli.output import SafeConsole
from parablock.compare import compare_methods, comparison_table, plan_comparison
from parablock.config.load import load_config
from parablock.errors import ConfigError, DataError, StoppedByUserError, StorageError
from parablock.evaluation import generation
from parablock.evaluation.side_by_side import check_task, score_models
from parablock.experiment.progress import PlainProgress, Progress
from tiny_runs import Workshop, after, assert_refused, command, done, metrics_of, sum_row, summary_of, write_rows


def test_methods_are_compared_in_one_table_with_the_base_model_first(
    workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    directory = tmp_path / "compared"
    shown = done(
        *("compare", str(workshop.config), "--output-dir", str(directory)),
        *("--methods", "parablock,fl_bcd,fedavg", "--seeds", "0,1"),
    ).stdout
    assert (directory / "compare.md").read_text() in shown
    for same, times in (
        ("base model: eval loss", 1),
        ("4 clients, ", 1),
        (" parameters in float32", 2),
        ("── ", 6),
    ):
        assert shown.count(same) == times, "what methods have in common is said once"
    summaries = json.loads((directory / "compare.json").read_text())
    for seconds, hidden in (
        (0.0, ["–"] * 9),
        (1e6, [f"{summary['overlap_fraction']:.0%}" for summary in summaries]),
    ):
        figures = comparison_table([{**summary, "communication_s": seconds} for summary in summaries])
        shown_as = [row[figures.header.index("hidden")] for row in figures.rows[1:]]
        assert shown_as[: len(hidden)] == hidden, "where nothing is sent, a share of it says nothing"
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(terminal, "console", terminal.SafeConsole())
    terminal.print_figures(comparison_table(summaries))
    on_a_terminal = re.sub("\x1b\\[[0-9;]*m", "", capsys.readouterr().out)
    assert "hidden" in on_a_terminal and "│" not in on_a_terminal and "|" not in on_a_terminal
    assert max(map(len, on_a_terminal.splitlines())) <= 80
    assert [summary["name"] for summary in summaries] == [
        f"{method}-seed{seed}" for seed in (0, 1) for method in ("parablock", "fl_bcd", "fedavg")
    ]
    for summary in summaries:
        assert summary_of(directory / summary["name"])["model_sha256"] == summary["model_sha256"]
    assert len({summary["model_sha256"] for summary in summaries}) == 6
    table = (directory / "compare.md").read_text().splitlines()
    assert "base model" in table[2]
    assert len({len(line) for line in table}) == 1  # it can be read as it stands
    assert "parablock-seed0" in table[3]
    assert (directory / "report.html").exists()
    assert [line.split("|")[1].strip() for line in table[-3:]] == [
        f"{method}, 2 seeds" for method in ("parablock", "fl_bcd", "fedavg")
    ]
    losses = [summary["final_eval_loss"] for summary in summaries if summary["method"] == "fedavg"]
    assert f"{mean(losses):.4f} ± {stdev(losses):.4f}" in table[-1]


def test_tasks_memory_and_the_picture_stand_beside_the_losses(workshop, tmp_path):
    directory = tmp_path / "compared"
    test = [{**sum_row(k, 1), "choices": ["#### 1", f"#### {k + 1}"]} for k in (1, 2, 3)]
    rows = write_rows(tmp_path / "choices.jsonl", test)
    done(
        *("compare", str(workshop.config), "--output-dir", str(directory)),
        *("--methods", "fl_bcd,fedit,fedavg,local,flora"),
        *("--tasks", "multiple_choice", "--set", "federation.num_rounds=4", "--set", f"data.test={rows}"),
        *("--for", "fedit:train.learning_rate=0.03", "--for", "fedit:lora.rank=2"),
    )
    blocks, adapters, everything, apart, stacked = json.loads((directory / "compare.json").read_text())
    for summary in (blocks, adapters, everything, apart, stacked):
        assert 0 <= summary["final_scores"]["multiple_choice"] <= 1
    memory = [summary["predicted_memory_bytes"] for summary in (adapters, blocks, everything, apart)]
    assert memory[0] != memory[1] and max(memory[:2]) < memory[2] == memory[3]
    table = (directory / "compare.md").read_text().splitlines()
    assert "multiple_choice" in table[0] and "memory" in table[0]
    assert len({line.count("|") for line in table}) == 1
    picture = ElementTree.parse(directory / "compare.svg").getroot()
    texts = [element.text for element in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert {"rounds", "seconds", "fl_bcd", "fedit", "fedavg", "local", "flora"} <= set(texts)
    assert len(list(picture.iter("{http://www.w3.org/2000/svg}polyline"))) == 3 * 5
    config = yaml.safe_load((directory / "fedit" / "config.yaml").read_text())
    assert (config["lora"]["rank"], config["train"]["learning_rate"]) == (2, 0.03)
    assert yaml.safe_load((directory / "fedavg" / "config.yaml").read_text())["train"]["learning_rate"] == 0.01


def test_every_method_runs_with_every_delay_that_it_can_have(workshop, tmp_path):
    directory = tmp_path / "delays"
    done(
        *("compare", str(workshop.config), "--output-dir", str(directory), "--set", "federation.num_rounds=4"),
        *("--methods", "parablock,fedit,flora", "--delays", "0,1"),
    )
    runs = {
        run["name"]: (run["method"], run["delay"]) for run in json.loads((directory / "compare.json").read_text())
    }
    assert runs == {
        "parablock-delay0": ("fl_bcd", 0),
        "parablock-delay1": ("parablock", 1),
        "fedit-delay0": ("fedit", 0),
        "fedit-delay1": ("fedit", 1),
        "flora-delay0": ("flora", 0),
    }
    assert {"fedit-delay0", "fedit-delay1"} <= set((directory / "compare.md").read_text().split())


def test_without_delays_the_configured_method_keeps_its_own_and_others_have_their_default(workshop):
    def delays(*overrides: str) -> dict[str, int]:
        planned = plan_comparison(load_config(workshop.config, overrides), ["parablock", "fedavg", "fedit"])
        return {run.name: run.config.federation.delay for run in planned}

    assert delays() == {"parablock": 1, "fedavg": 0, "fedit": 0}
    assert delays("federation.delay=2") == {"parablock": 2, "fedavg": 0, "fedit": 0}
    assert delays("federation.method=fedit") == {"parablock": 1, "fedavg": 0, "fedit": 1}


def test_a_compared_run_is_the_run_that_the_method_makes_alone(workshop, tmp_path):
    command("compare", str(workshop.config), "--output-dir", str(tmp_path / "c"), "--methods", "fl_bcd,parablock")
    workshop.run(tmp_path / "alone", "federation.delay=0")
    alone, compared = summary_of(tmp_path / "alone"), summary_of(tmp_path / "c" / "fl_bcd")
    assert alone["model_sha256"] == compared["model_sha256"]
    assert alone["model_sha256"] != summary_of(tmp_path / "c" / "parablock")["model_sha256"]


def test_what_is_said_of_blocks_holds_for_the_methods_that_train_blocks(workshop):
    config = load_config(workshop.config, ["blocks.layers_per_block=2", "blocks.schedule=cyclic"])
    by_name = {planned.name: planned.config for planned in plan_comparison(config, ["fl_bcd", "fedavg"])}
    assert by_name["fl_bcd"].blocks == config.blocks
    assert by_name["fedavg"].blocks != config.blocks
    assert by_name["fedavg"].train == config.train


def test_a_comparison_without_a_link_says_that_its_times_tell_little(workshop, tmp_path, capsys):
    real = ["engine={clock: real, num_threads: 1}"]
    for name, overrides in (("without", [*real, "link={}"]), ("with", real)):
        config = load_config(workshop.config, overrides)
        (run,) = plan_comparison(config, ["fl_bcd"])
        compare_methods([run], tmp_path / name, progress=PlainProgress(console=SafeConsole()))
        assert ("no link speed is given" in capsys.readouterr().out) is (name == "without")


def test_blocks_are_fitted_where_nobody_has_said_how_large_they_are_and_steps_are_a_number(workshop):
    def blocks(*particular: str) -> int | str:
        config = load_config(workshop.config, ["federation.method=fedit"])
        (run,) = plan_comparison(config, ["parablock"], particular=[f"parablock:{each}" for each in particular])
        return run.config.blocks.layers_per_block

    assert blocks() == blocks("blocks.schedule=cyclic") == "auto"
    assert blocks("train.num_local_steps=auto") == 1
    assert blocks("blocks.layers_per_block=2") == 2
    with pytest.raises(ConfigError, match="blocks"):
        blocks("blocks=2")


def test_fedavg_trains_and_sends_all_parameters_in_every_round(workshop, tmp_path):
    workshop.run(tmp_path / "fedavg", "federation.method=fedavg", "federation.delay=0")
    workshop.run(tmp_path / "fl_bcd", "federation.delay=0")
    fedavg, fl_bcd = summary_of(tmp_path / "fedavg"), summary_of(tmp_path / "fl_bcd")
    assert fedavg["num_blocks"] == 1
    assert {row["block_index"] for row in metrics_of(tmp_path / "fedavg")} == {0}
    # 4 layers, and embeddings of 300 · 32 with the final norm beside them: more than four blocks' worth of bytes
    assert fedavg["uplink_bytes"] > 4.5 * fl_bcd["uplink_bytes"]
    assert fedavg["final_eval_loss"] != fl_bcd["final_eval_loss"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--methods", "parablock,gossip"], "gossip"),
        (["--methods", "flora", "--set", "wire.format=sparse2"], "leaves most of an update to the next round"),
        (["--for", "fedit:train.learning_rate=1"], "for one of parablock, fl_bcd"),
        (["--for", "fl_bcd:federation.delay=2"], "what --delays says"),
        (
            ["--for", "fl_bcd:federation={method: fedavg, num_clients: 4, num_rounds: 6, delay: 0}"],
            "what --methods says",
        ),
        (["--for", "fl_bcd:seed=7"], "what --seeds says"),
        (["--for", "fl_bcd"], "method:key=value"),
        (["--delays", "0,x"], "whole numbers"),
        (["--delays", "1,1"], "each number once"),
        (["--for", "fl_bcd:train.learning_rat=1"], "train.learning_rate"),
        (["--tasks", "riddles"], "riddles"),
        (["--tasks", "exact_match", "--set", "data.test=[]"], "data.test"),
    ],
)
def test_a_wrong_comparison_is_refused_before_anything_runs(workshop, tmp_path, arguments, said):
    compare = ("compare", str(workshop.config), "--output-dir", str(tmp_path / "c"), *arguments)
    assert_refused(command(*compare), said)
    assert not (tmp_path / "c").exists()


def test_a_task_that_lacks_its_package_is_refused_before_anything_runs_or_answers(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    check_task("rouge_l")
    generation._rouge_scorer.cache_clear()
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    compare = ("compare", str(workshop.config), "--output-dir", str(tmp_path / "c"), "--tasks", "rouge_l")
    assert_refused(command(*compare), "parablock[eval]")
    assert not (tmp_path / "c").exists()
    with pytest.raises(DataError, match="rouge-score"):
        score_models("no/such model", [str(workshop.test_file)], task="rouge_l")
    check_task("exact_match")


def test_a_report_of_a_comparison_keeps_the_order_given(workshop, tmp_path):
    directory = tmp_path / "compared"
    arguments = ("--methods", "parablock,fedavg", "--set", "federation.num_rounds=4")
    done("compare", str(workshop.config), "--output-dir", str(directory), *arguments)
    rows = [line.split("|")[1].strip() for line in (directory / "report.md").read_text().splitlines()[4:7]]
    assert rows == ["base model", "parablock", "fedavg"]  # not by the alphabet


def test_a_comparison_that_is_stopped_says_how_to_go_on(workshop, tmp_path):
    runs = plan_comparison(load_config(workshop.config), ["parablock", "fedavg"])
    with pytest.raises(StoppedByUserError, match="stopped in parablock; 0 of 2 runs are complete") as stopped:
        compare_methods(runs, tmp_path / "compared", progress=Progress(), asked_to_stop=after(2))
    assert stopped.value.exit_code == 130
    assert "the same command" in stopped.value.remedy


def test_a_stopped_comparison_goes_on_where_it_was(workshop, tmp_path):
    config = load_config(workshop.config)
    runs = plan_comparison(config, ["fl_bcd", "parablock", "fedavg"])
    folder = tmp_path / "compared"
    calls = count()
    with pytest.raises(StoppedByUserError, match="stopped in parablock; 1 of 3 runs are complete"):
        stop = config.federation.num_rounds + 3  # in the second run
        compare_methods(runs, folder, progress=Progress(), asked_to_stop=lambda: next(calls) >= stop)
    first = (folder / "fl_bcd" / "summary.json").read_bytes()
    others = [
        plan_comparison(config, ["parablock", "fedavg"]),
        plan_comparison(config, ["fl_bcd", "parablock"], "", ["fl_bcd:train.learning_rate=0.5"]),
    ]
    for other in others:
        with pytest.raises(StorageError, match="holds another comparison, of which fl_bcd has begun"):
            compare_methods(other, folder, progress=Progress())
    file = Path(config.data.train[0])
    rows = file.read_bytes()
    file.write_bytes(rows + rows.splitlines(keepends=True)[0])
    with pytest.raises(StorageError, match=f"{file.name} is not what it was when the comparison"):
        compare_methods(runs, folder, progress=Progress())
    file.write_bytes(rows)
    written = (folder / "fl_bcd" / "config.yaml").read_text()
    (folder / "fl_bcd" / "config.yaml").write_text(written.replace("seed: 0", "seed: 7"))
    with pytest.raises(StorageError, match="is not that of this comparison: seed differ"):
        compare_methods(runs, folder, progress=Progress())
    (folder / "fl_bcd" / "config.yaml").write_text(written)
    summaries = compare_methods(runs, folder, progress=Progress())
    assert (folder / "fl_bcd" / "summary.json").read_bytes() == first
    undisturbed = compare_methods(runs, tmp_path / "undisturbed", progress=Progress())
    shas = [summary["model_sha256"] for summary in summaries]
    assert shas == [summary["model_sha256"] for summary in undisturbed] and len(set(shas)) == 3
    assert [summary["name"] for summary in json.loads((folder / "compare.json").read_text())] == [
        planned.name for planned in runs
    ]


def test_a_comparison_that_is_over_takes_one_more_method(workshop: Workshop, tmp_path: Path):
    folder, config = tmp_path / "compared", load_config(workshop.config)
    compare_methods(plan_comparison(config, ["fl_bcd"]), folder, progress=Progress())
    first = (folder / "fl_bcd" / "summary.json").read_bytes()
    shutil.copytree(folder / "fl_bcd", folder / "fedavg")  # somebody's run
    more = plan_comparison(config, ["fl_bcd", "fedavg"])
    with pytest.raises(StorageError, match="holds a run already"):
        compare_methods(more, folder, progress=Progress())
    shutil.rmtree(folder / "fedavg")
    summaries = compare_methods(more, folder, progress=Progress())
    assert [summary["method"] for summary in summaries] == ["fl_bcd", "fedavg"]
    assert (folder / "fl_bcd" / "summary.json").read_bytes() == first
    assert set(json.loads((folder / "comparison.json").read_text())["runs"]) == {"fl_bcd", "fedavg"}
    assert "fedavg" in (folder / "compare.md").read_text()
    other = write_rows(tmp_path / "other.jsonl", [sum_row(8, 1), sum_row(8, 2)])
    particular = [f"local:data.test=[{other}]"]
    third = plan_comparison(config, ["local", "fl_bcd", "fedavg"], "", particular)
    compare_methods(third, folder, progress=Progress())
    write_rows(other, [sum_row(8, 3)])
    with pytest.raises(StorageError, match=r"other\.jsonl is not what it was"):
        compare_methods(third, folder, progress=Progress())


def test_runs_that_a_comparison_has_still_to_do_stay_planned(workshop: Workshop, tmp_path: Path):
    """A start that names fewer methods leaves the plan of another one as it is, which may be at work."""
    folder, config = tmp_path / "compared", load_config(workshop.config)
    both = plan_comparison(config, ["fl_bcd", "fedavg"])
    with pytest.raises(StoppedByUserError):
        compare_methods(both, folder, progress=Progress(), asked_to_stop=after(2))
    compare_methods(both[:1], folder, progress=Progress())
    assert set(json.loads((folder / "comparison.json").read_text())["runs"]) == {"fl_bcd", "fedavg"}
    assert len(compare_methods(both, folder, progress=Progress())) == 2


def test_scores_that_a_comparison_loses_are_named(workshop: Workshop, tmp_path: Path):
    class Told(Progress):
        def message(self, text: str) -> None:
            said.append(text)

    said = list[str]()
    runs, told = plan_comparison(load_config(workshop.config), ["fl_bcd"]), Told()
    compare_methods(runs, tmp_path / "c", progress=told, tasks=["exact_match"])
    assert not [line for line in said if "--tasks" in line]
    compare_methods(runs, tmp_path / "c", progress=told)
    assert "note: the scores of exact_match go, since --tasks does not name them" in said


@pytest.mark.parametrize("damaged", ["{", "[1]", "{}", '[{"final_scores": 1}]'])
def test_a_damaged_table_of_a_comparison_is_written_anew(workshop: Workshop, tmp_path: Path, damaged: str):
    runs = plan_comparison(load_config(workshop.config), ["fl_bcd"])
    compare_methods(runs, tmp_path / "c", progress=Progress())
    whole = (tmp_path / "c" / "compare.json").read_text()
    (tmp_path / "c" / "compare.json").write_text(damaged)
    compare_methods(runs, tmp_path / "c", progress=Progress())
    assert (tmp_path / "c" / "compare.json").read_text() == whole


@pytest.mark.parametrize("left", [b"\xff", b"[]", None])
def test_a_comparison_of_which_nothing_has_begun_is_planned_anew(workshop, tmp_path, left):
    folder, config = tmp_path / "compared", load_config(workshop.config)
    with pytest.raises(StoppedByUserError):
        stop = after(0)
        compare_methods(plan_comparison(config, ["fl_bcd"]), folder, progress=Progress(), asked_to_stop=stop)
    shutil.rmtree(folder / "fl_bcd")
    if left is not None:
        (folder / "comparison.json").write_bytes(left)
    (summary,) = compare_methods(plan_comparison(config, ["fedavg"]), folder, progress=Progress())
    assert summary["method"] == "fedavg"


def test_a_comparison_does_not_write_over_the_report_of_a_run(workshop, tmp_path):
    workshop.run(tmp_path / "run")
    before = (tmp_path / "run" / "report.html").read_bytes()
    compare = ("compare", str(workshop.config), "--output-dir", str(tmp_path / "run"), "--methods", "fl_bcd")
    assert_refused(command(*compare), "holds a run already")
    assert (tmp_path / "run" / "report.html").read_bytes() == before


def test_blocks_are_fitted_where_the_configuration_trains_none(workshop: Workshop, tmp_path: Path):
    """A first run of adapters has few rounds: with a layer a block not all blocks would have their turn."""
    few = ("federation.num_rounds=2", "federation.delay=0")
    words = ["compare", str(workshop.config), "--methods", "parablock,fl_bcd,fedavg"]
    blocks = [word for setting in (*few, "blocks.layers_per_block=1") for word in ("--set", setting)]
    refused = command(*words, *blocks, "--output-dir", str(tmp_path / "blocks"))
    assert refused.code == 2 and "would never train block" in refused.stderr
    adapters = [word for setting in (*few, "federation.method=fedit") for word in ("--set", setting)]
    done(*words, *adapters, "--output-dir", str(tmp_path / "compared"))
    assert [
        summary["num_blocks"] for summary in json.loads((tmp_path / "compared" / "compare.json").read_text())
    ] == [*(2, 2, 1)]
