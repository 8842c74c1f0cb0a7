"""Write docs/results.md, and a table of README.md, from the records in benchmarks/results and from nothing else.

.venv/bin/python docs/generate_results.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

from parablock.config.methods import METHODS

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS))

from results_at_a_glance import glance, missed  # noqa: E402
from results_of_quality import family_table, quality, words, words_apart  # noqa: E402
from results_of_speed import Record, flower, foot, peers, scale, slow_link, spread, step, table, wire  # noqa: E402
from results_of_survival import cut_link, drops, fuzz, kill_resume, kill_sites, soak  # noqa: E402

PAGE = DOCS / "results.md"
README = DOCS.parent / "README.md"
MARKS = "<!-- docs/generate_results.py writes from here -->\n", "<!-- to here -->\n"
RESULTS = DOCS.parent / "benchmarks" / "results"

HEAD = """# Results

<!-- Written by docs/generate_results.py from benchmarks/results/*.json; a test fails when this page is stale. -->

Every table comes from a record in `benchmarks/results/`, and carries the command that makes it again. Losses, bytes
and seconds of the virtual clock are the same at every repetition on the same machine. ± is the standard deviation
over seeds, unless it says otherwise. A bar that is missed says so.
"""
NAMES = {name: method.title for name, method in METHODS.items()}
T0_AGAIN = "The seeds of the table above on one thread instead of two, which changes the losses by about 1e-5."
T0_LONGER = "The longer the run, the less a round of lag weighs in its last loss."
T0_COSINE = (
    "The learning rate decays to nothing over the rounds of a run (cosine), as is usual in fine-tuning, so that a "
    "run's last loss is that of a model that has settled."
)
ENDED = "†: the last loss of a run that ended before."


def page(folder: Path = RESULTS) -> str:
    """Write the page from the records that are there."""
    found = records(folder)
    sections = {name: SECTIONS[name](record) for name, record in found.items()}
    headings = headings_of(sections)
    overview = ["## At a glance\n", *glance(found, headings), "", missed(found, headings), ""] if found else []
    return "\n".join([HEAD, *overview, *sections.values()])


def readme(text: str, folder: Path = RESULTS) -> str:
    """Give the README with its table as the records have it."""
    found = records(folder)
    headings = headings_of({name: SECTIONS[name](record) for name, record in found.items()})
    before, _, rest = text.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    return "".join(
        [before, MARKS[0], "\n".join([*glance(found, headings, "docs/results.md"), ""]), MARKS[1], after]
    )


def records(folder: Path) -> dict[str, Record]:
    """Read the records that are there, in the order of the page."""
    paths = {name: folder / f"{name}.json" for name in SECTIONS}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.exists()}


def headings_of(sections: dict[str, str]) -> dict[str, str]:
    """Give the heading of each section."""
    return {name: section.splitlines()[0].removeprefix("## ") for name, section in sections.items()}


def rate(found: Record) -> str:
    """Write the section of `benchmarks/rate.py`."""
    rows = [
        [
            name,
            f"{row['slope']:.3f} ± {row['half_interval']:.3f}",
            f"{fmean(v[-1] for v in row['squared_gradient']):.4g}",
        ]
        for name, row in found["results"].items()
    ]
    rounds, seeds = found["options"]["rounds"], len(found["options"]["seeds"])
    return "\n".join(
        [
            "## The same rate\n",
            "Logistic regression with a non-convex regulariser, on clients whose data differ: the squared norm of",
            f"the gradient, averaged over T rounds, for T from {rounds[0]} to {rounds[-1]} with a step ∝ 1/√T. The",
            f"slope is that of its logarithm against log T; ± is its 95% confidence interval over {seeds} seeds.",
            "`naive` leaves updates in flight out of the working parameters; `correction off` never takes an",
            "aggregate over.\n",
            *table(["variant", "slope", f"mean squared gradient at T = {rounds[-1]}"], rows),
            *foot(found),
        ]
    )


def methods(found: Record) -> str:
    """Write the section of `benchmarks/methods.py`."""
    results, options = found["results"], found["options"]
    names = list(dict.fromkeys(run["method"] for run in results["runs"]))
    runs = {name: [run for run in results["runs"] if run["method"] == name] for name in names}
    base = spread([run["curve"][0][2] for run in runs[names[0]]])
    ends = {name: fmean(run["curve"][-1][2] for run in group) for name, group in runs.items()}
    rows = [["base model", "", base, "", *[""] * len(options["links"])]]
    for name in names:
        final = spread([run["curve"][-1][2] for run in runs[name]])
        sent = runs[name][0]["curve"][-1][1] / runs[name][0]["num_rounds"] / 1e6
        seconds = [f"{value:.2f}" for value in results["round_s"][name].values()]
        rows.append([NAMES[name], str(runs[name][0]["num_rounds"]), final, f"{sent:.2f}", *seconds])
    speeds = [f"s a round, {mbps:g} Mbit/s" for mbps in options["links"]]
    rates = ", ".join(f"{kind} {value:g}" for kind, value in results["learning_rates"].items())
    return "\n".join(
        [
            "## All methods on T0\n",
            f"Eight instruction families, one a client; {options['steps']} local steps of {options['batch_size']}",
            f"examples a round; seeds {', '.join(map(str, options['seeds']))}; the loss of",
            f"{options['max_examples']} held-out rows. Learning rates, each the best of a grid on another seed,",
            f"for FL-BCD, FedAvg and FedIT: {rates}. The others of a kind have the same;",
            "FedCyBGD, where one client trains in a round and nothing is averaged, may want a smaller one.",
            "`local` and `central` send nothing.\n",
            *table(["method", "rounds", "eval loss", "MB a client and round", *speeds], rows),
            *equal(results["equal_seconds"], ends),
            *equal_bytes(results["equal_bytes"], ends),
            *families(results, runs),
            *foot(found),
        ]
    )


def equal(tables: Record, ends: dict[str, float]) -> list[str]:
    """Put the losses at equal seconds into one table, the best of each column in bold."""
    columns = [(mbps, seconds, losses) for mbps, times in tables.items() for seconds, losses in times.items()]
    head = [f"{float(mbps):g} Mbit/s, {float(seconds):g} s" for mbps, seconds, _ in columns]
    told = "The last time of each link is when ParaBlock has done all of its rounds. " + ENDED
    title = f"### At equal seconds\n\n{told}"
    return [
        f"\n{title}\n",
        *losses_table(head, [losses for _, _, losses in columns], ends),
    ]


def equal_bytes(tables: Record, ends: dict[str, float]) -> list[str]:
    """Put the losses at equal bytes into one table."""
    head = [f"{megabytes} MB" for megabytes in tables]
    title = f"### At equal bytes\n\nBytes that have crossed a client's link, both directions together. {ENDED}"
    return [f"\n{title}\n", *losses_table(head, list(tables.values()), ends)]


def losses_table(head: list[str], columns: Sequence[Record], ends: dict[str, float]) -> list[str]:
    """Write the means over seeds, the lowest of each column in bold, and name whose they are."""
    means, marks = [], []
    for column in columns:
        has_ended = {name for name, losses in column.items() if None in losses}
        means.append({name: ends[name] if name in has_ended else fmean(v) for name, v in column.items()})
        marks.append(has_ended)
    rows = []
    for name in means[0]:
        cells = []
        for mean, has_ended in zip(means, marks, strict=True):
            bold = "**" * (mean[name] == min(mean.values()))
            cells.append(f"{bold}{mean[name]:.4f}{bold}{'†' * (name in has_ended)}")
        rows.append([NAMES[name], *cells])
    wins = [min(mean, key=lambda name: mean[name]) for mean in means]
    told = f"Lowest loss, column by column: {', '.join(NAMES[name] for name in wins)}."
    by_lora = sum(METHODS[name].trains == "adapters" for name in wins)
    return [*table(["method", *head], rows), f"\n{told}\nA LoRA method wins {by_lora} of {len(wins)} columns."]


def families(results: Record, runs: dict[str, list[Record]]) -> list[str]:
    """Put the scores of some methods beside each other, for each family."""
    scored = {NAMES[name]: [run["scores"] for run in group] for name, group in runs.items() if group[0]["scores"]}
    return family_table(results["base"], scored) if results["base"] else []


def ablations(found: Record) -> str:
    """Write the section of `benchmarks/ablations.py`."""
    options = found["options"]
    parts = [
        "## One knob at a time\n",
        "The problem of the rate, without a model: the squared norm of the gradient, averaged over the last",
        f"quarter of {options['rounds']} rounds, with a constant step; {len(options['seeds'])} seeds.",
        "Small is good.",
    ]
    for knob, places in found["results"].items():
        delays = sorted({delay for values in places.values() for delay in values})
        rows = [[place, *(spread(v[d]) if d in v else "" for d in delays)] for place, v in places.items()]
        parts += ["", *table([knob, *(f"delay {delay}" for delay in delays)], rows)]
    return "\n".join([*parts, *foot(found)])


def model_ablations(found: Record) -> str:
    """Write the section of `benchmarks/model_ablations.py`."""
    options = found["options"]
    parts = [
        "## One setting at a time, on a model\n",
        f"A small random Llama of four layers on generated word problems, dealt to {options['clients']} clients",
        f"by topic (Dirichlet, α = 1); {options['rounds']} rounds of {options['steps']} local steps, ParaBlock",
        f"unless a row says otherwise; seed {', '.join(map(str, options['seeds']))}. An exchange takes as long as",
        "the computation of a round. Each table is what `parablock report` makes of the run directories.",
    ]
    for setting, made in found["results"].items():
        parts += [f"\n### {setting.replace('_', ' ').capitalize()}\n", *table(made["header"], made["rows"])]
        parts.append(f"\n`{made['command']}`")
    return "\n".join([*parts, *foot(found)])


def formats(found: Record) -> str:
    """Write the section of `benchmarks/formats.py`."""
    seeds, cells = found["results"]["seeds"], found["results"]["cells"]
    rows = []
    for name in seeds[0]:
        if name != "seed":
            runs = [row[name] for row in seeds]
            sent = runs[0]["uplink_bytes"] / 1e6
            rows.append([name, spread([run["final_eval_loss"] for run in runs]), f"{sent:.1f}"])
    exact = seeds[0]["float32"]["final_eval_loss"]
    by_way = [
        [f"{plain['format']}, {plain['rounding']}"]
        + [f"{cell['final_eval_loss'] / exact:.4f}" for cell in (plain, feedback)]
        for plain, feedback in zip(cells[::2], cells[1::2], strict=True)
    ]
    text = "## Few bits on the wire\n\nParaBlock on T0 with quantised updates, at equal rounds.\n"
    told = f"\nLoss over that with float32, seed {seeds[0]['seed']}:\n"
    ways = [told, *table(["format, rounding", "no error feedback", "error feedback"], by_way)] if cells else []
    return "\n".join([text, *table(["format", "eval loss", "MB up, all clients"], rows), *ways, *foot(found)])


def overlap(found: Record) -> str:
    """Write the section of `benchmarks/overlap.py`."""
    rows = []
    for row in found["results"]:
        seconds = (f"{row[delay]['wall_time_s']:.2f}" for delay in ("delay_0", "delay_1"))
        hidden = row["delay_1"]["overlap_fraction"]
        rows.append([f"{row['load']:g}", *seconds, f"{row['ratio']:.3f}", f"{hidden:.0%}"])
    text = "## Real time\n\nTwo clients over a shaped link, under the real clock.\n"
    return "\n".join(
        [
            text,
            *table(["exchange / computation", "FL-BCD, s", "ParaBlock, s", "ratio", "hidden"], rows),
            *foot(found),
        ]
    )


def robust(found: Record) -> str:
    """Write the section of `benchmarks/robust.py`."""
    clean = next(row for row in found["results"] if row["attack"] == "none")["final_eval_loss"]
    rows = [
        [
            row["attack"],
            row["rule"],
            f"{row['initial_eval_loss']:.4f}",
            f"{row['final_eval_loss']:.4f}",
            f"{row['final_eval_loss'] / clean:.4f}",
        ]
        for row in found["results"]
    ]
    options = found["options"]
    return "\n".join(
        [
            "## Hostile clients\n",
            f"T0, mixed and dealt evenly to {options['clients']} clients, of which {options['attackers']} attack",
            f"in every round; {options['rounds']} rounds of {options['steps']} local steps. They turn the sign",
            "of their update, or send it ten times too long as well. The last column is the loss over that of the",
            "plain mean when nobody attacks.\n",
            *table(["attack", "rule", "base model", "loss", "/ clean"], rows),
            *foot(found),
        ]
    )


def secure_aggregation(found: Record) -> str:
    """Write the section of `benchmarks/secure_aggregation.py`."""
    protocol, runs = found["results"]["protocol"], found["results"]["runs"]
    seconds = protocol["seconds"]
    names = {"none": "float32, nobody drops", "plain": "grid, two of eight drop", "masked": "masked, the same drop"}
    rows = [
        [
            names[grid],
            f"{run['initial_eval_loss']:.4f}",
            f"{run['final_eval_loss']:.4f}",
            run["model_sha256"][:12],
            f"{run['uplink_bytes'] / 1e6:.2f} MB",
        ]
        for grid, run in runs.items()
    ]
    return "\n".join(
        [
            "## Secure aggregation\n",
            f"Eight clients, of which two drop, with {protocol['elements']:,} elements each: to write six",
            f"updates on the grid takes {seconds['encode']:.2f} s of a core, to mask them {seconds['mask']:.2f} s,",
            f"and the server takes {seconds['unmask']:.2f} s to find the masks of their sum. Keys and shares for",
            f"{found['options']['num_rounds']} rounds are {protocol['setup_bytes_per_client'] / 1e3:.1f} kB a",
            f"client, once, and taking masks off {protocol['reveal_bytes_per_client'] / 1e3:.1f} kB a client and",
            f"round, beside updates of {protocol['update_bytes'] / 1e6:.1f} MB, masked or not. Runs on T0, eight",
            "families:\n",
            *table(["run", "base model", "loss", "model", "up"], rows),
            *foot(found),
        ]
    )


SECTIONS: dict[str, Callable[[Record], str]] = {
    "rate": rate,
    "quality_t0": quality("The same quality: T0", "Eight instruction families, one a client."),
    "quality_t0_families": quality("T0 again: how soon, and each family", T0_AGAIN),
    "quality_t0_long": quality("T0 for twice as long", T0_LONGER),
    "quality_t0_cosine": quality("T0 where the learning rate decays", T0_COSINE),
    "quality_gsm8k": quality("The same quality: GSM8K", "Four clients alike; the loss of the solutions."),
    "words": words,
    "words_alpha01": words_apart,
    "methods": methods,
    "ablations": ablations,
    "model_ablations": model_ablations,
    "formats": formats,
    "overlap": overlap,
    "robust": robust,
    "secure_aggregation": secure_aggregation,
    "kill_resume": kill_resume,
    "kill_sites": kill_sites,
    "soak": soak,
    "soak_drops": drops,
    "cut_link": cut_link,
    "fuzz": fuzz,
    "fuzz_guided": fuzz,
    "slow_link": slow_link,
    "scale": scale,
    "peers": peers,
    "step": step,
    "wire": wire,
    "flower": flower,
}


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    README.write_text(readme(README.read_text(encoding="utf-8")), encoding="utf-8")
