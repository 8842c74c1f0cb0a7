"""The benchmarks start, explain themselves, and with their smallest sizes leave a record of what they found."""

from __future__ import annotations

import argparse
import json
import runpy
import shlex
import sys
from collections.abc import Callable
from importlib import import_module
from math import log, log2
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from parablock.config.load import load_config, parse_config
from parablock.demo.material import make_tiny_llama, make_word_problems
from parablock.experiment.run import run
from parablock.report.write import write_report

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
FILES = ("quality", "llm", "device", "speed", "survival", "deployed")
RECORDS = sorted(path.stem for path in (FOLDER / "results").glob("*.json"))


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Import a file of benchmarks."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return import_module


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, load: Callable[[str], ModuleType]) -> Any:
    """Run a subcommand in this process; return its record."""

    def start(file: str, name: str, *arguments: str) -> dict[str, Any]:
        output = tmp_path / f"{name}.json"
        places = ["--output", str(output), "--work-dir", str(tmp_path / "runs")]
        monkeypatch.setattr(sys, "argv", [f"benchmarks/{file}.py", name, *arguments, *places])
        runpy.run_path(str(FOLDER / f"{file}.py"), run_name="__main__")
        record = json.loads(output.read_text())
        assert record["section"]["title"] and record["section"]["parts"]
        return record

    return start


def sections(load: Callable[[str], ModuleType]) -> dict[tuple[str, str], Callable[[Any], Any]]:
    return {(file, each.name): each.section for file in FILES for each in load(file).BENCHMARKS}


def parser(load: Callable[[str], ModuleType], file: str) -> argparse.ArgumentParser:
    made: argparse.ArgumentParser = load("_record").make_parser("", load(file).BENCHMARKS)
    return made


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_has_the_section_of_its_results_and_a_command_that_makes_it(
    name: str, load: Callable[[str], ModuleType]
) -> None:
    record = json.loads((FOLDER / "results" / f"{name}.json").read_text())
    python, script, subcommand, *arguments = shlex.split(record["command"])
    file = Path(script).stem
    assert (python, script) == ("python", f"benchmarks/{file}.py")
    options = parser(load, file).parse_args([subcommand, *arguments])
    assert (
        Path(options.output) == FOLDER / "results" / f"{name}.json"
        or options.output == f"benchmarks/results/{name}.json"
    )
    assert sections(load)[file, subcommand](record) == record["section"]


@pytest.mark.parametrize("file", FILES)
def test_help_gives_an_example_that_is_understood(
    file: str,
    load: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [f"benchmarks/{file}.py"])
    made = parser(load, file)
    for each in load(file).BENCHMARKS:
        with pytest.raises(SystemExit) as ended:
            made.parse_args([each.name, "--help"])
        assert ended.value.code == 0
        said = " ".join(capsys.readouterr().out.split())
        assert "--output" in said and f"example: python benchmarks/{file}.py {each.name}" in said
        made.parse_args([each.name, *shlex.split(each.example)])


def test_no_sequence_of_messages_does_harm(benchmark: Any) -> None:
    rows = benchmark("survival", "sequences", "--smoke")["results"]
    assert {row["sequences"] for row in rows} == {16, 4, 8, 12}
    assert not any(row["leak"] or row["foreign"] or row["ended"] for row in rows)


def test_masks_and_the_ledger_are_measured_beside_a_round_without_them(benchmark: Any) -> None:
    found = benchmark("survival", "masking_overhead", "--smoke", "--mbps", "0.001")
    added = {row["what"].partition(":")[2].strip(): row["added"] for row in found["results"]}
    assert added["masks"] == added["hash for the ledger"] == added["masks of the sum"] == "yes"
    assert added["the sum"] == ""
    assert found["bars"][0]["is_met"], "20,000 parameters take 21 minutes over 1 kbit/s"


def test_changed_audit_logs_are_all_found(benchmark: Any) -> None:
    rows = benchmark("survival", "audit_logs", "--smoke")["results"]
    assert [row["logs"] for row in rows] == [row["in_its_line"] for row in rows] == [20] * 3


def test_an_unknown_option_is_refused(benchmark: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        benchmark("quality", "rate", "--no-such-option")
    assert ended.value.code == 2


def test_a_section_can_be_made_again_without_measuring(benchmark: Any, tmp_path: Path) -> None:
    record = benchmark("quality", "rate", "--smoke")
    changed = record | {"results": record["results"] | {"FL-BCD": record["results"]["naive"]}}
    (tmp_path / "rate.json").write_text(json.dumps(changed))
    again = benchmark("quality", "rate", "--section-only")
    assert again | {"section": None} == changed | {"section": None}
    first, naive = again["section"]["parts"][-1]["rows"][0], again["section"]["parts"][-1]["rows"][2]
    assert first[1:] == naive[1:] != record["section"]["parts"][-1]["rows"][0][1:]


def test_a_bar_says_whether_it_is_met(load: Callable[[str], ModuleType]) -> None:
    Bar = load("_record").Bar
    assert str(Bar("ratio", 0.55, 0.6)) == "ratio: 0.55 (≤ 0.6: met)"
    assert str(Bar("ratio", 0.65, 0.6)) == "ratio: 0.65 (≤ 0.6: MISSED)"
    assert str(Bar("overlap", 0.95, 0.9, at_most=False)) == "overlap: 0.95 (≥ 0.9: met)"
    assert str(Bar("overlap", 0.85, 0.9, at_most=False)) == "overlap: 0.85 (≥ 0.9: MISSED)"


def test_overlap_measures_two_delays_over_one_link_and_says_where(
    benchmark: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    record = benchmark("speed", "overlap", "--smoke")
    assert {"command", "commit", "machine", "versions", "config", "bars"} <= set(record)
    assert {"torch", "transformers"} <= set(record["versions"])
    (repeat,) = record["results"]
    serial, overlapped = repeat["delay_0"], repeat["delay_1"]
    assert (serial["delay"], overlapped["delay"]) == (0, 1)
    assert serial["overlap_fraction"] == 0.0 < overlapped["overlap_fraction"]
    assert serial["model_sha256"] == repeat["calibration"]["model_sha256"] != overlapped["model_sha256"]
    said = capsys.readouterr().out
    assert "wall time of delay 1 / delay 0" in said and ("met" in said or "MISSED" in said)


def test_real_sites_are_deployed_and_what_they_cost_is_told(benchmark: Any) -> None:
    record = benchmark("deployed", "deployment", "--smoke")
    (row,) = record["results"]
    assert row["delay"] == 1 and len(row["rounds_s"]) == len(row["server_cpu_s"]) == row["rounds"] - 4
    assert min(row["rounds_s"]) > 0 and min(row["server_cpu_s"]) > 0
    assert row["sent_again_bytes"] == 0 and row["compute_s"] == 0
    assert [bar["name"] for bar in record["bars"]] == ["an empty exchange, s, median"]


def test_the_wire_folds_every_format_and_order_beside_the_arithmetic_alone(benchmark: Any) -> None:
    record = benchmark("speed", "wire", "--smoke")
    alone, *folds = record["results"]["aggregation"]["rows"]
    assert alone["what"] == "the arithmetic alone"
    orders = ("in turns", "one client late")
    assert [row["what"] for row in folds] == [f"{f}, {o}" for f in ("float32", "int8", "int4") for o in orders]
    assert all(row["seconds"] and row["relative_throughput"] > 0 for row in (alone, *folds))
    assert all(row["file_gigabytes"] == 0 for row in folds), "all of it is less than what memory is for"
    names = [bar["name"] for bar in record["bars"]]
    assert sum("aggregation / plain add_" in name for name in names) == 4
    assert "peak memory of aggregation, blocks" in names


def test_delays_run_each_method_serial_overlapped_and_without_own_updates(benchmark: Any) -> None:
    record = benchmark("quality", "delays", "--smoke")
    for row in record["results"]:
        ends = [row[way] for way in ("delay 0", "delay 1", "delay 1, none")]
        assert [end["delay"] for end in ends] == [0, 1, 1]
        assert len({end["model_sha256"] for end in ends}) == 3
        assert ends[1]["curve"][-1][0] < 0.8 * ends[0]["curve"][-1][0], "an exchange takes as long as a round"
    assert [row["group"] for row in record["results"]] == ["fedit", "rolora"]
    assert len(record["bars"]) == 5, "two of each, and how soon fedit has the loss of delay 0"


@pytest.mark.parametrize(("name", "num_bars"), [("sparse", 3), ("in_flight", 0), ("optimizers", 1)])
def test_ways_are_run_with_the_same_rows_and_differ(
    benchmark: Any, load: Callable[[str], ModuleType], name: str, num_bars: int
) -> None:
    record, about = benchmark("quality", name, "--smoke"), load("_record").ABOUT[name]
    runs = [row[way] for row in record["results"] for way in about["ways"]]
    assert len({run["model_sha256"] for run in runs}) == len(runs) > 1
    assert len({run["initial_eval_loss"] for run in runs}) == 1
    assert len(record["bars"]) == num_bars
    if name == "in_flight":
        *_, rules, figure = record["section"]["parts"]
        best, *_ = rules["rows"]
        (curve,) = figure["panels"]["α, words"].values()
        assert [alpha for alpha, _ in curve if alpha in (0, 0.25, 1)] == [0, 0.25, 1] and len(curve) == 5
        losses = {way: record["results"][0][way]["final_eval_loss"] for way in about["ways"]}
        assert best[0] == f"`{min(losses, key=lambda way: losses[way])}`" and best[-1] == "1"


def test_rivals_are_timed_to_a_loss_that_each_of_them_reaches(
    benchmark: Any, load: Callable[[str], ModuleType]
) -> None:
    record = benchmark("quality", "rivals", "--smoke")
    full, adapters, ours = record["results"]["runs"]
    assert ours["uplink_bytes"] < adapters["uplink_bytes"] < full["uplink_bytes"] / 10
    assert ours["round_s"]["core"]["10"] < adapters["round_s"]["core"]["10"], "fewer bits, behind the computation"
    assert full["round_s"]["GPU"]["10"] < full["round_s"]["core"]["10"]
    quality = load("quality")
    runs = [full, adapters, ours | {"curve": [[2, 9.0], [4, 0.1], [6, 9.0]]}]
    assert quality.rounds_to(runs) == {
        (full["way"], 0): (next(t for t, loss in full["curve"] if loss <= adapters["curve"][-1][1]), True),
        (adapters["way"], 0): (8, True),
        (ours["way"], 0): (4 + 1, True),
    }
    assert quality.rounds_to([full, adapters, ours | {"curve": [[8, 9.0]]}])[ours["way"], 0] == (9, False)
    (core, gpu) = quality.rival_bars(runs, [10.0])
    best = min(
        full["round_s"]["core"]["10"] * quality.rounds_to(runs)[full["way"], 0][0],
        adapters["round_s"]["core"]["10"] * 8,
    )
    assert core.value == pytest.approx(5 * ours["round_s"]["core"]["10"] / best) and "a GPU" in gpu.name


def test_quality_keeps_what_is_complete_and_runs_what_is_not(benchmark: Any, tmp_path: Path) -> None:
    def summaries() -> dict[str, int]:
        return {path.parent.name: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/summary.json")}

    first = benchmark("quality", "quality", "--smoke", "--only", "gsm8k")["results"]
    kept = summaries()
    assert len(kept) == 3  # the third, since ParaBlock is not as low after as many rounds
    assert benchmark("quality", "quality", "--smoke", "--only", "gsm8k")["results"] == first
    assert summaries() == kept
    assert benchmark("quality", "quality", "--smoke", "--only", "gsm8k", "--seeds", "1")["results"] != first
    assert len(summaries()) >= 5 and summaries().items() >= kept.items()
    (row,) = first
    (serial, overlapped), longer = row["runs"], row["longer"]
    # after eight of its ten rounds the longer run is where the shorter one ends
    assert longer["curve"][-2] == [overlapped["seconds"], overlapped["final_eval_loss"]] != longer["curve"][-1]
    anew = run(load_config(tmp_path / "runs" / longer["directory"] / "config.yaml"), tmp_path / "anew")
    assert anew["model_sha256"] == longer["model_sha256"] != overlapped["model_sha256"]
    (decayed,) = benchmark("quality", "quality", "--smoke", "--only", "gsm8k", "--lr-scheduler-type", "cosine")[
        "results"
    ]
    assert decayed["runs"][0]["final_eval_loss"] != serial["final_eval_loss"]
    assert decayed["longer"]["num_rounds"] == 9  # a run of its own, whose rate decays over one round more
    assert decayed["longer"]["curve"][0] != decayed["runs"][1]["curve"][0]
    metrics = (tmp_path / "anew" / "metrics.jsonl").read_text().splitlines()
    assert sum(json.loads(line)["round_s"] for line in metrics) == pytest.approx(longer["seconds"], rel=1e-6)
    # an exchange takes as long as the computation of a round, and the last exchange is hidden by nothing
    assert overlapped["seconds"] / serial["seconds"] == pytest.approx(9 / 16, abs=0.05)
    reached = [seconds for seconds, loss in longer["curve"] if loss <= serial["final_eval_loss"]]
    assert row["time_ratio"] == (reached[0] / serial["seconds"] if reached else None)


def test_the_few_answers_of_a_template_are_its_choices(load: Callable[[str], ModuleType], tmp_path: Path) -> None:
    write_choices = load("quality").write_choices

    def write(name: str, *rows: tuple[str, str]) -> Path:
        lines = [json.dumps({"prompt": "?", "completion": right, "template": kind}) for kind, right in rows]
        (tmp_path / name).write_text("\n".join(lines))
        return tmp_path / name

    free = [("free", str(number)) for number in range(17)]
    train = write("train", ("two", "yes"), ("two", " no "), ("one", "positive"), *free)
    test = write("test", ("two", "no"), ("one", "positive"), ("free", "3"))
    assert write_choices(train, test, tmp_path / "made" / "rows") == 1
    (row,) = map(json.loads, (tmp_path / "made" / "rows").read_text().splitlines())
    assert row == {"prompt": "?", "completion": "no", "template": "two", "choices": ["no", "yes"]}
    assert write_choices(write("single", ("two", "no")), test, tmp_path / "rows") == 0


def test_the_rate_benchmark_finds_the_slopes_of_every_variant(benchmark: Any) -> None:
    record = benchmark("quality", "rate", "--smoke")
    assert {"FL-BCD", "ParaBlock", "naive", "correction off"} <= set(record["results"])
    slopes = [row["slope"] for row in record["results"].values()]
    assert len(set(slopes)) == len(slopes)
    assert all(row["half_interval"] > 0 for row in record["results"].values())
    assert len(record["bars"]) == 3


def test_model_ablations_make_the_tables_of_the_report_command(benchmark: Any, tmp_path: Path) -> None:
    found = benchmark("quality", "model_ablations", "--smoke")["results"]["delay"]
    assert [row[1] for row in found["rows"]] == ["0", "1", "2", "4"]
    seconds = [float(row[found["header"].index("time, s")]) for row in found["rows"]]
    assert seconds[1] < seconds[0]
    write_report([tmp_path / "runs" / "delay"])
    told = " ".join((tmp_path / "runs" / "delay" / "report.md").read_text().split())  # cells are padded there
    for row in found["rows"]:
        assert f"| {' | '.join(row)} |" in told


def test_the_methods_benchmark_tunes_and_runs_what_it_is_asked_for(benchmark: Any) -> None:
    record = benchmark("quality", "methods", "--smoke", "--only", "parablock", "fl_bcd", "ffa_lora")
    found = record["results"]
    assert [run["method"] for run in found["runs"]] == ["parablock", "fl_bcd", "ffa_lora"]
    assert set(found["learning_rates"]) == {"blocks", "all parameters", "adapters"}
    # over the same link a round of FL-BCD takes longer, and one of adapters' B fewer seconds than one of blocks
    seconds = {method: times["10.0"] for method, times in found["round_s"].items()}
    assert seconds["fl_bcd"] > seconds["parablock"]
    assert seconds["fl_bcd"] > seconds["ffa_lora"]
    (losses,) = (found["equal_seconds"]["10.0"][key] for key in list(found["equal_seconds"]["10.0"])[-1:])
    assert losses["parablock"] == [found["runs"][0]["curve"][-1][2]]
    assert losses["fl_bcd"] == [None] or losses["fl_bcd"][0] > found["runs"][1]["curve"][-1][2]


def test_the_search_keeps_a_row_for_each_setting_and_no_model(benchmark: Any, tmp_path: Path) -> None:
    block, adapters = benchmark("llm", "llm_search", "--smoke")["results"]
    assert (block["run"], adapters["run"]) == ("parablock, 5 layers, 1e-3", "fedit, 1e-3")
    assert (block["method"], adapters["method"]) == ("parablock", "fedit")
    assert 0 < adapters["megabytes"] < block["megabytes"]
    assert block["ratio"] == block["final_eval_loss"] / block["initial_eval_loss"] < 1
    assert [path.parent.name for path in tmp_path.glob("runs/*/model")] == ["material"], "half a GB each"


def test_families_are_clients_and_forgetting_is_of_other_rows(benchmark: Any) -> None:
    record = benchmark("llm", "llm_t0", "--smoke", "--only", "fedit, rank 64, delay 1", "fedavg, sparse2, delay 1")
    adapters, sparse = record["results"]["runs"]
    assert record["config"]["federation"]["num_clients"] == 4
    assert sparse["curve"][-1][1] < adapters["curve"][-1][1] / 10
    assert len(record["section"]["parts"]) == 2, "no budget of methods that are not there"
    assert (adapters["delay"], sparse["delay"]) == (1, 1)
    assert adapters["curve"][-1][2] < adapters["curve"][0][2] and "GSM8K" not in record["results"]["base"]
    assert record["bars"][0]["name"] == "T0: loss of fedit, rank 64, delay 1 / base model"


def test_methods_on_a_model_are_compared_and_what_they_forget_is_told(
    benchmark: Any, load: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    record = benchmark("llm", "llm_methods", "--smoke")
    block, serial, adapters = record["results"]["runs"]
    llm, options = load("llm"), argparse.Namespace(**record["options"])
    settings = llm.kit.ABOUT["llm_methods"]["ways"]["parablock"]
    first = llm.step_s(options, "a block", settings)
    assert first == record["results"]["step_s"]["a block"], "it is kept"
    options.max_length += 1
    assert llm.step_s(options, "a block", settings) != first, "other settings, another step"
    assert len([*tmp_path.glob("runs/base-*-others-*.json")]) == 1
    assert [row["way"] for row in (block, serial, adapters)] == ["parablock", "fl_bcd", "fedit, delay 0"]
    assert block["curve"][0] == serial["curve"][0] and block["curve"][-1] != serial["curve"][-1]
    assert block["round_s"]["10"] < serial["round_s"]["10"], "the exchange is hidden"
    assert adapters["round_s"]["10"] < block["round_s"]["10"], "few bytes"
    assert block["forgotten"] != serial["forgotten"] != record["results"]["base"]
    rounds, seconds = (part["rows"] for part in record["section"]["parts"] if isinstance(part, dict))
    assert [row[0] for row in rounds] == ["base model", "parablock", "fl_bcd", "fedit, delay 0"]
    # when ParaBlock has done its four rounds, FL-BCD is between two of its own, and FedIT has ended
    assert seconds[0][-1].strip("*") == f"{block['curve'][-1][2]:.4f}"
    assert float(seconds[1][-1]) > serial["curve"][-1][2] and seconds[2][-1].endswith("†")
    assert record["bars"][0]["name"] == "GSM8K: final loss, parablock / fl_bcd"


def test_answers_are_counted_beside_those_of_the_base_model(
    benchmark: Any, load: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    base, tuned = benchmark("llm", "llm_answers", "--smoke")["results"]
    assert [len(base[score]) for score in ("exact_match", "last_number", "ifeval")] == [4, 4, 22]
    assert tuned["loss"] < base["loss"] and set(base["exact_match"]) == {"0"}, "a generated model knows nothing"
    (kept,) = tmp_path.glob("runs/fedit*-exact_match-*.json")
    rows = json.loads(kept.read_text())
    for row in rows[1:]:
        row |= {"model": row["reference"].replace("####", "it is"), "model_score": 0.0}
    rows[2]["model_score"] = 1.0
    kept.write_text(json.dumps(rows))
    record = benchmark("llm", "llm_answers", "--smoke")
    assert record["results"][0] == base
    assert (record["results"][1]["exact_match"], record["results"][1]["last_number"]) == ("0010", "0111")
    exact, number, rules = record["section"]["parts"][1]["rows"][1::2]
    assert (exact[3], exact[-2:]) == ("1 of 4", ["+1 −0", "1"])
    assert (number[3], number[-2:]) == ("3 of 4", ["+3 −0", "0.25"])
    assert rules[0] == "rules"
    llm = load("llm")
    assert llm.wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert (llm.mcnemar(1, 9), llm.mcnemar(3, 3)) == (pytest.approx(22 / 1024), 1)
    assert (llm.last("1,250 less 9.5 is 1,240.50."), llm.last("5 − -3"), llm.last("none")) == (1240.5, -3, None)


def test_a_longer_run_tells_how_soon_the_loss_of_the_serial_one_is_there(
    benchmark: Any, load: Callable[[str], ModuleType]
) -> None:
    record = benchmark("llm", "llm_longer", "--smoke")
    serial, overlapped = record["results"]["runs"]
    assert (serial["num_rounds"], overlapped["num_rounds"]) == (4, 27)
    soon = next(t for t, _, loss in overlapped["curve"] if loss <= serial["curve"][-1][2])
    assert record["bars"][0]["value"] == (soon + 1) / 8
    never = [serial, overlapped | {"curve": [[27, 1.0, 99.0]]}]
    assert load("llm").times_as_soon(never, serial["way"], overlapped["way"]) == [9.99]


def test_text_is_learnt_in_bits_a_byte_and_drawn(benchmark: Any, load: Callable[[str], ModuleType]) -> None:
    record = benchmark("llm", "llm_text", "--smoke")
    adapters, block = record["results"]["runs"]
    assert adapters["curve"][0][2] == block["curve"][0][2] > block["curve"][-1][2]
    assert block["curve"][-1][:1] == [8.0] and block["curve"][-1][1] > adapters["curve"][-1][1]
    assert record["section"]["parts"][-1]["figure"] == "llm_text.svg"
    plain = load("llm").plain
    page = '.TH ls 1\n\\fBls\\fP zeigt \\-l\n.\\" Kommentar\nund  mehr \\(bu \\%Zeilen'
    assert plain(page) == "ls zeigt -l und mehr • Zeilen"


def test_adapters_beside_a_block_train_more_and_send_more(benchmark: Any) -> None:
    record = benchmark("llm", "beside_blocks", "--smoke")
    adapters, block, both = record["results"]
    ends = [row["curve"][-1] for row in (adapters, block, both)]
    assert ends[0][0] == ends[2][0] == 5
    assert max(ends[0][1], ends[1][1]) < ends[2][1] < ends[0][1] + ends[1][1], "not those of the active block"
    assert len({end[2] for end in ends}) == 3 and all(end[2] < adapters["curve"][0][2] for end in ends)
    rows = record["section"]["parts"][1]["rows"]
    assert float(rows[0][-2]) == float(rows[0][-3]), "adapters have their own bytes at their end"
    assert rows[0][-1].endswith("†")


def test_the_device_runs_what_its_minutes_allow(benchmark: Any) -> None:
    record = benchmark("device", "device", "--smoke")
    assert [(row["way"], row["seed"]) for row in record["results"]["runs"]] == [
        ("parablock", 0),
        ("fl_bcd", 0),
        ("parablock", 1),
        ("fl_bcd", 1),
    ]
    assert "±" in record["section"]["parts"][1]["rows"][1][-2]
    short = benchmark("device", "device", "--smoke", "--minutes", "0")["results"]
    assert short["runs"] == record["results"]["runs"][:1] and short["not_run"][0] == "fl_bcd, seed 0"
    assert len(short["not_run"]) == 3


def test_few_bits_end_near_float32_and_are_compared_way_by_way(benchmark: Any) -> None:
    found = benchmark("quality", "formats", "--smoke")["results"]
    (row,) = found["seeds"]
    assert row["int4"]["uplink_bytes"] < 0.2 * row["float32"]["uplink_bytes"]
    assert row["int4"]["final_eval_loss"] == pytest.approx(row["float32"]["final_eval_loss"], rel=0.05)
    assert row["int4"]["model_sha256"] != row["float32"]["model_sha256"]
    assert [(cell["rounding"], cell["error_feedback"]) for cell in found["cells"]] == [
        ("nearest", False),
        ("nearest", True),
    ]


def test_a_round_on_a_slow_link_is_its_computation_in_few_bits_and_its_exchange_in_many(benchmark: Any) -> None:
    few, many = benchmark("speed", "slow_link", "--smoke")["results"]["runs"]
    assert (few["format"], many["format"]) == ("int4", "float32")
    assert few["ratio"] == pytest.approx(1.0, abs=0.01)
    # 218 M parameters of 4 bytes at 30 Mbit/s are 233 s one way
    assert many["round_s"] == pytest.approx(8 * 4 * 218_112_000 / 30e6, rel=0.03)


def test_masked_sums_are_plain_ones_and_look_like_noise(benchmark: Any) -> None:
    record = benchmark("survival", "secure_aggregation", "--smoke", "--grids")
    assert [bar["is_met"] for bar in record["bars"]] == [True, True, True]
    assert {"encode", "mask", "unmask"} <= set(record["results"]["protocol"]["seconds"])
    assert record["results"]["runs"] == {}


def test_peers_are_followed_to_the_same_loss(benchmark: Any) -> None:
    block, whole = benchmark("quality", "peers", "--smoke")["results"]
    assert [row["peer"] for row in (block, whole)] == ["ParaBlock, int4", "Flower's FedAvg"]
    for row in (block, whole):
        assert row["to_loss"]["loss"] <= 8.0 < row["initial_eval_loss"]
        assert row["points"][-1]["bytes"] >= row["to_loss"]["bytes"] > 0
    assert block["to_loss"]["seconds"] < whole["to_loss"]["seconds"]
    assert block["memory_bytes"] < whole["memory_bytes"]


def test_flowers_own_fedavg_ends_where_ours_does(load: Callable[[str], ModuleType], tmp_path: Path) -> None:
    train = make_word_problems(tmp_path, num_clients=2, examples_per_client=8, seed=0)
    make_tiny_llama(tmp_path / "model", train[0].read_text().splitlines(), seed=0)
    tree = {
        "model": {"name_or_path": str(tmp_path / "model")},
        "data": {"train": list(map(str, train)), "max_length": 96, "partition": {"scheme": "by_file"}},
        "federation": {"method": "fedavg", "delay": 0, "num_clients": 2, "num_rounds": 3},
        "train": {"num_local_steps": 2, "learning_rate": 0.01},
        "engine": {"clock": "virtual", "num_threads": 1, "step_time_s": 0.1},
    }
    before, points = load("quality").run_fedavg(parse_config(tree))
    ours = run(parse_config(tree), tmp_path / "run")
    assert before == pytest.approx(ours["initial_eval_loss"], rel=1e-6)
    assert points[-1]["loss"] == pytest.approx(ours["final_eval_loss"], rel=1e-4)
    for other in (before, points[0]["loss"]):  # the controls: rounds change the model, each in its own way
        assert points[-1]["loss"] != pytest.approx(other, rel=1e-3)


def test_scale_simulates_full_size_transfers_without_their_memory(benchmark: Any) -> None:
    found = benchmark("speed", "scale", "--smoke")["results"]
    for row in found["cohorts"]:
        assert row["simulated_s"] == pytest.approx(row["planned_s"], rel=0.02)
        assert row["grown_bytes"] < 0.5 * row["full_size_bytes"]
    speeds = {row["way"]: row["mbps"] for row in found["bandwidths"] if row["model"] == "8B"}
    # computing half of the time, FL-BCD has one computation's time for the exchange, and ParaBlock two
    assert speeds["FL-BCD, bf16"]["50%"] == pytest.approx(2 * speeds["ParaBlock, bf16"]["50%"])
    assert speeds["ParaBlock, int4"]["99%"] < 0.3 * speeds["ParaBlock, bf16"]["99%"]


def test_a_step_by_hand_ends_with_the_same_block(benchmark: Any) -> None:
    row = benchmark("speed", "step", "--smoke", "--model", "none")["results"][0]
    assert row["by_hand_ends_with_the_same_block"] is True
    assert set(row["peak_bytes_beside_the_model"]) == set(row["step_s"]) == {"block", "by hand", "full", "lora"}


def test_the_words_benchmark_reads_both_delays_at_equal_rounds(benchmark: Any) -> None:
    (row,) = benchmark("quality", "words", "--smoke")["results"]
    names = ("fl_bcd", "parablock", "parablock, more rounds")  # with the third, since the second is not as low
    assert (row["alpha"], *(row[name]["rounds"] for name in names)) == (0.3, 8, 8, 9)
    assert row["ratio"] == row["parablock"]["loss"] / row["fl_bcd"]["loss"] > 1
    assert row["parablock, more rounds"]["loss"] <= row["fl_bcd"]["loss"]
    reached_at = [s / row["fl_bcd"]["seconds"] for s, _ in row["parablock, more rounds"]["curve"]]
    assert row["time_ratio"] in reached_at and 0.5 < row["time_ratio"] < 0.65
    assert all(row[name]["curve"][-1] == [row[name]["seconds"], row[name]["loss"]] for name in names)
    # an exchange takes as long as a round computes: FL-BCD's rounds take twice as long
    assert row["parablock"]["seconds"] / row["fl_bcd"]["seconds"] == pytest.approx(0.5, abs=0.1)


def test_the_ablations_change_one_knob_at_a_time(benchmark: Any) -> None:
    found = benchmark("quality", "ablations", "--smoke")["results"]
    assert {"delay", "local steps", "participation", "server momentum", "wire"} <= set(found)
    standard = found["delay"]["1"]["1"]
    assert found["local steps"]["2"]["1"] == found["wire"]["float32"]["1"] == standard
    for knob, places in found.items():
        values = [tuple(map(tuple, place.values())) for place in places.values()]
        assert len(set(values)) == len(values), f"{knob} changes nothing"


def test_facts_are_counted_in_bits_and_drawn(
    benchmark: Any, load: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = benchmark("quality", "facts", "--smoke")
    block, adapters = record["results"]["runs"]
    assert [run["way"] for run in (block, adapters)] == ["block, Muon", "rank 1"]
    assert block["curve"][-1][0] > 5 * adapters["curve"][-1][0] > 0
    assert (
        0 < adapters["bits_of_base"] < block["bits_of_base"] < record["results"]["base"]["bits"] < 8 * 5 * log2(10)
    )
    (figure,) = (part for part in record["section"]["parts"] if "figure" in part)
    assert figure["panels"]["seconds"]["rank 1"][-1] == adapters["curve"][-1][1:]
    quality = load("quality")
    (fact,) = quality.write_facts(tmp_path / "one.jsonl", range(1), 1, 0).read_text().splitlines()
    assert fact.startswith('{"prompt": "AAA", "completion": " ')
    monkeypatch.setattr(quality, "learnt_of", lambda *_: (3, 3 * 7))  # three facts of seven learnt tokens
    config = quality.kit.configured(quality.kit.Material("m", ("a",), ("a",)), {})
    assert quality.bits_recalled(config, 0.0) == pytest.approx(3 * 5 * log2(10))
    assert quality.bits_recalled(config, log(2)) == pytest.approx(
        3 * (5 * log2(10) - 7)
    )  # a bit a token is missing
    assert quality.bits_recalled(config, 9.0) == 0
    crossing = quality.crossing
    low, high = ([{"curve": [[at, 0.0, bits / 4], [2 * at, 0.0, bits]]}] for at, bits in ((1, 80.0), (10, 100.0)))
    told = crossing({"block, Muon": high, "rank 1": low})
    assert told.endswith("overtakes that of rank 1.") and "more than rank 1; when" in told
    told = crossing({"block, Muon": low, "rank 1": high})
    assert told.endswith("moves in all, more than rank 1. Over bytes its curve overtakes that of no adapters.")
    assert "more than no adapters, and not more than rank 1; when" in told
    assert crossing({"rank 1": high, "rank 4": low}) == "", "without blocks there is nothing to say"


def test_the_methods_say_where_lora_wins(load: Callable[[str], ModuleType]) -> None:
    losses_table = load("quality").losses_table
    ends = {"parablock": [4.0], "fedit": [4.5]}
    columns = {
        "10 s": {"parablock": [4.0, 5.0], "fedit": [4.0, 4.5]},
        "20 s": {"parablock": [4.0], "fedit": [None]},
    }
    made, told = losses_table(columns, ends)
    assert ["FedIT", "**4.2500**", "4.5000†"] in made["rows"]
    assert told.endswith("column by column: FedIT, ParaBlock.\nA LoRA method wins 1 of 2 columns.")
    assert "wins 0 of 1 columns" in losses_table({"20 s": columns["20 s"]}, ends)[-1]


def test_the_section_of_quality_shows_seconds_and_families_where_a_record_has_them(
    load: Callable[[str], ModuleType],
) -> None:
    def run(delay: int, loss: float, right: float) -> dict[str, Any]:
        scores = {"ag_news": {"loss": {"value": loss, "rows": 9}, "exact_match": {"value": right, "rows": 7}}}
        curve = [[2.0 - delay, 5.0], [4.0 / (1 + delay), loss]]
        losses = {"initial_eval_loss": 6.0, "final_eval_loss": loss, "seconds": curve[-1][0], "num_rounds": 2}
        return losses | {"curve": curve, "scores": scores}

    def rows(**changes: Any) -> list[list[str]]:
        made = load("quality").quality_section(record | {"results": [row | changes]})
        return [line for part in made["parts"] if isinstance(part, dict) for line in part["rows"]]

    record = json.loads((FOLDER / "results" / "quality_gsm8k.json").read_text())
    row = {"data": "gsm8k", "seed": 7, "runs": [run(0, 4.0, 0.25), run(1, 3.5, 0.75)], "time_ratio": 0.5}
    assert ["7", "4.0000", "4.0", "2.0", "0.500", "3.5000 (2)"] in rows()
    assert ["2.0", "5.0000", "3.5000"] in rows()  # the last losses by then
    assert ["7", "4.0000", "4.0", "never", "", "3.5000 (2)"] in rows(time_ratio=None)
    assert not any("ag_news" in line for line in rows())
    base = {"ag_news": {"loss": {"value": 6.0, "rows": 9}, "exact_match": {"value": 0.0, "rows": 7}}}
    assert ["ag_news", "loss, 9 rows", "6.000", "4.000", "3.500"] in rows(base_scores=base)
    assert ["ag_news", "exact match, 7 rows", "0.00", "0.25", "0.75"] in rows(base_scores=base)
