"""The sections of docs/results.md on ParaBlock beside FL-BCD: losses, how soon, right answers.

Used by docs/generate_results.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from results_of_speed import Record, foot, spread, table

SAME_S = 0.01
"""Seeds differ in the seconds of a round by what their headers have in digits; more than this is another round."""
RIVALS = ("FL-BCD", "ParaBlock")
WORD_COLUMNS = (("fl_bcd", "initial"), ("fl_bcd", "loss"), ("parablock", "loss"))


def quality(title: str, what: str) -> Callable[[Record], str]:
    """Make the section of one data set, of `benchmarks/quality.py`."""

    def section(found: Record) -> str:
        rows = []
        for row in found["results"]:
            serial, overlapped = row["runs"]
            losses = [serial["initial_eval_loss"], serial["final_eval_loss"], overlapped["final_eval_loss"]]
            rows.append([str(row["seed"]), *(f"{loss:.4f}" for loss in losses), f"{losses[2] / losses[1]:.4f}"])
        columns = list(zip(*((float(cell) for cell in row[1:]) for row in rows), strict=True))
        rows.append(["mean", *(spread(column) for column in columns)])
        options = found["options"]
        facts = f"{options['rounds']} rounds of {options['steps']} local steps of {options['batch_size']} examples."
        return "\n".join(
            [
                f"## {title}\n",
                f"{what} {facts}\n",
                *table(["seed", "base model", "FL-BCD", "ParaBlock", "ratio"], rows),
                *(how_soon(found["results"]) if "time_ratio" in found["results"][0] else []),
                *(quality_families(found) if "base_scores" in found["results"][0] else []),
                *foot(found),
            ]
        )

    return section


def how_soon(results: Sequence[Record]) -> list[str]:
    """Put the curves of both beside each other, in seconds, with the time to FL-BCD's last loss."""
    rows = []
    for row in results:
        serial, (overlapped, rounds) = row["runs"][0], longest(row)
        time = row["time_ratio"]
        reached = ["never", ""] if time is None else [f"{time * serial['seconds']:.1f}", f"{time:.3f}"]
        rows.append([str(row["seed"]), f"{serial['final_eval_loss']:.4f}", f"{serial['seconds']:.1f}", *reached])
        rows[-1] += [f"{min(loss for _, loss in overlapped):.4f} ({rounds})"]
    known = [row["time_ratio"] for row in results if row["time_ratio"] is not None]
    if known:
        rows.append(["mean", "", "", "", spread(known, 3), ""])
    told = (
        "An exchange takes as long as the computation of a round (virtual clock). Seconds until ParaBlock is\n"
        "first scored no worse than FL-BCD at its end; where equal rounds are too few, in a longer run (its\n"
        "rounds are in the last column), which is looked at every two rounds."
    )
    head = [
        "seed",
        "FL-BCD's last loss",
        "its seconds",
        "ParaBlock's seconds to it",
        "ratio",
        "its lowest (rounds)",
    ]
    return [f"\n### How soon\n\n{told}\n", *table(head, rows), *at_equal_seconds(results)]


def at_equal_seconds(results: Sequence[Record]) -> list[str]:
    """Put the last losses that both were scored with before some seconds beside each other."""
    rows = []
    for at, _ in results[0]["runs"][0]["curve"]:
        curves = [[row["runs"][0]["curve"] for row in results], [longest(row)[0] for row in results]]
        seen = [[[loss for s, loss in curve if s <= at + SAME_S] for curve in group] for group in curves]
        if all(losses for group in seen for losses in group) and at <= min(c[-1][0] for c in curves[1]) + 1:
            rows.append([f"{at:.1f}", *(spread([losses[-1] for losses in group]) for group in seen)])
    return [
        "\nThe last loss by then, of those that were computed (in the first rounds, after every fourth):\n",
        *table(["seconds", *RIVALS], rows),
    ]


def longest(row: Record) -> tuple[list[list[float]], int]:
    """Give the curve of the longest run of ParaBlock, and its rounds."""
    run = row.get("longer", row["runs"][1])
    return run["curve"], run["num_rounds"]


def quality_families(found: Record) -> list[str]:
    """Put the scores of the base model and of both beside each other, for each family."""
    results = found["results"]
    scored = {name: [row["runs"][delay]["scores"] for row in results] for delay, name in enumerate(RIVALS)}
    return family_table(results[0]["base_scores"], scored)


def word_table(found: Record) -> list[str]:
    """Write a row for each α of `benchmarks/words.py`."""
    rows = []
    for alpha in dict.fromkeys(row["alpha"] for row in found["results"]):
        group = [row for row in found["results"] if row["alpha"] == alpha]
        losses = [[row[name][key] for row in group] for name, key in WORD_COLUMNS]
        matches = [[row[name].get("exact_match", 0.0) for row in group] for name in ("fl_bcd", "parablock")]
        times = ["never" if row["time_ratio"] is None else f"{row['time_ratio']:.2f}" for row in group]
        rows.append(
            [f"{alpha:g}", str(len(group)), *(spread(v) for v in losses), spread([row["ratio"] for row in group])]
            + [spread(values, 2) for values in matches]
            + [", ".join(times)]
        )
    head = ["α", "seeds", "base model", "FL-BCD", "ParaBlock", "ratio", "exact match, FL-BCD", "ParaBlock"]
    return table([*head, "time to FL-BCD's loss / its time"], rows)


def words(found: Record) -> str:
    """Write the section of `benchmarks/words.py`."""
    options = found["options"]
    return "\n".join(
        [
            "## Word problems, by how much clients differ, and how soon\n",
            "Generated word problems, dealt to four clients by topic with a Dirichlet distribution. Losses at",
            f"equal rounds: {options['rounds']} of {options['steps']} local steps of {options['batch_size']}",
            f"examples, learning rate {options['learning_rate']:g}, {options['schedule']}. An exchange takes as",
            "long as the computation of a round. The last column is the time after which ParaBlock has reached",
            "FL-BCD's last loss, over FL-BCD's time, for each seed; where equal rounds are too few, in a run with",
            "one more for every twelve; `never` is: not within these. Answers are those at the end of each run.",
            "Longer rounds do worse: 48 rounds of 4 local steps of 8 examples had a ratio of 1.053 on seed 7,",
            "so this setting has more and smaller ones (`--seeds 7 --alphas 0.3 --rounds 48 --steps 4",
            "--batch-size 8 --max-examples 125`); 16 rounds at a constant rate had 1.095 on seed 0.\n",
            *word_table(found),
            *foot(found),
        ]
    )


def words_apart(found: Record) -> str:
    """Write the section of the smallest α."""
    said = "The same where each client has few topics. This is shown, and nothing is promised of it.\n"
    return "\n".join(["## Word problems, clients far apart\n", said, *word_table(found), *foot(found)])


def family_table(base: Record, scored: dict[str, list[Record]]) -> list[str]:
    """Write two rows for each family: its loss, and its share of right answers."""
    rows = []
    for family, tasks in base.items():
        for task, score in tasks.items():
            digits = 3 if task == "loss" else 2
            cells = [spread([run[family][task]["value"] for run in group], digits) for group in scored.values()]
            label = f"{task.replace('_', ' ')}, {score['rows']} rows"
            rows.append([family, label, f"{score['value']:.{digits}f}", *cells])
    told = (
        "Multiple choice is between the answers that the training rows of a template have, where these are a\n"
        "few; exact match wants the words of the reference. `dbpedia_14` and `rotten_tomatoes` hold one label\n"
        "only, so a model is right there once it has learnt to say it, and the held-out rows of `ag_news` hold\n"
        "one of the two answers, so that a base model which prefers it by habit is right and its share may fall\n"
        "while the loss falls too. Shares of so few rows tell little apart."
    )
    return [f"\n### Each family apart\n\n{told}\n", *table(["family", "score", "base model", *scored], rows)]
