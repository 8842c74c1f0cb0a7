"""The sections of docs/results.md on what a run survives: kills, drops, cut links, broken input.

Used by docs/generate_results.py.
"""

from __future__ import annotations

import re
from collections import Counter

from results_of_speed import Record, foot, spread, table


def kill_resume(found: Record) -> str:
    """Write the section of `benchmarks/kill_resume.py`."""
    trials = [trial for trial in found["results"]["trials"] if trial["was_running"]]
    expected = found["results"]["undisturbed"]
    by_origin: dict[str, Counter[bool]] = {}
    for trial in trials:
        by_origin.setdefault(trial["resumed_from"], Counter())[trial["model_sha256"] == expected] += 1
    rows = [
        [re.sub(r"round-0*", "the checkpoint of round ", origin), str(same.total()), str(same[True])]
        for origin, same in sorted(by_origin.items(), key=lambda item: (item[0] != "the start", item[0]))
    ]
    return "\n".join(
        [
            "## Killed and resumed: one process\n",
            "SIGKILL to the process that holds the server and all clients, at moments drawn at random, then",
            f"`parablock resume`; {found['options']['rounds']} rounds of a small model. A run that had ended",
            f"before its kill does not count: {len(found['results']['trials']) - len(trials)} of",
            f"{len(found['results']['trials'])}.\n",
            *table(["resumed from", "kills", "same model as undisturbed"], rows),
            *foot(found),
        ]
    )


def kill_sites(found: Record) -> str:
    """Write the section of `benchmarks/kill_sites.py`."""
    rows = []
    for number, run in enumerate(found["results"]["runs"]):
        kills = ", ".join(f"{kill['part']} after {kill['rounds_done']}" for kill in run["kills"])
        same = "yes" if run["model_sha256"] == found["results"]["undisturbed"] else "**no**"
        rows.append([str(number), kills, f"{run['seconds']:.0f}", same])
    return "\n".join(
        [
            "## Killed and gone on: the parts of a deployment\n",
            "SIGKILL to a site's trainer, to its SuperNode and to the SuperLink, at moments drawn at random:",
            f"real processes, two sites, {found['options']['rounds']} rounds. After the SuperLink's end",
            "`parablock resume` goes on.\n",
            *table(["run", "killed, after how many rounds", "s", "same model as one process"], rows),
            *foot(found),
        ]
    )


def drops(found: Record) -> str:
    """Write the section of `benchmarks/soak.py --only drops`."""
    options, runs = found["options"], found["results"]["drops"]
    rows = [
        [
            str(run["seed"]),
            *(f"{run[key]:.4f}" for key in ("initial_eval_loss", "final_eval_loss_undisturbed", "final_eval_loss")),
            f"{run['loss_ratio']:.4f}",
        ]
        for run in runs
    ]
    keys = ("initial_eval_loss", "final_eval_loss_undisturbed", "final_eval_loss", "loss_ratio")
    rows.append(["mean", *(spread([run[key] for run in runs]) for key in keys)])
    given_up = sum(run["faults_injected"] for run in runs)
    asked = 8 * options["drop_rounds"] * len(runs)
    return "\n".join(
        [
            "## Clients that drop\n",
            f"T0, eight families, one a client; {options['drop_rounds']} rounds of {options['steps']} local",
            f"steps of {options['batch_size']} examples, {options['schedule']} learning rate. Each client gives",
            f"each round up with probability 0.3: {given_up / asked:.0%} of the updates never came.\n",
            *table(["seed", "base model", "nobody drops", "30% drop", "ratio"], rows),
            *foot(found),
        ]
    )


def soak(found: Record) -> str:
    """Write the section of `benchmarks/soak.py`: faults of all kinds."""
    run = found["results"]["soak"]
    counted = [
        ["faults", ", ".join(f"{count} × {kind}" for kind, count in sorted(run["faults"].items()))],
        ["refused", ", ".join(f"{count} × {kind}" for kind, count in sorted(run["refused_updates"].items()))],
        ["loss: base model, undisturbed, with faults", ", ".join(f"{run[key]:.4f}" for key in LOSSES)],
        ["simulated s: undisturbed, with faults", ", ".join(f"{run[key]:.0f}" for key in SECONDS)],
    ]
    return "\n".join(
        [
            "## Something goes wrong every few rounds\n",
            f"A small model, eight clients, {found['options']['rounds']} rounds under the virtual clock; two of",
            "the clients die for good on the way.\n",
            *table(["what", "how much"], counted),
            *foot(found),
        ]
    )


SECONDS = ("wall_time_undisturbed_s", "wall_time_s")
LOSSES = ("initial_eval_loss", "final_eval_loss_undisturbed", "final_eval_loss")


def cut_link(found: Record) -> str:
    """Write the section of `benchmarks/cut_link.py`."""
    results, options = found["results"], found["options"]
    rows = []
    for name, told in (
        ("undisturbed", "never"),
        ("up", "while an update goes up"),
        ("down", "while values come down"),
    ):
        run = results[name]
        again = f"{run['again_bytes_per_cut'] / 1e3:.0f}" if name != "undisturbed" else ""
        same = "yes" if run["model_sha256"] == results["model_sha256"] else "**no**"
        rows.append([told, str(run["cuts"]), f"{run['up'] / 1e6:.2f}", f"{run['down'] / 1e6:.2f}", again, same])
    return "\n".join(
        [
            "## A link that breaks\n",
            f"Real processes over Flower; a block of {results['block_bytes'] / 1e6:.2f} MB takes",
            f"{options['transfer_s']:g} s each way in chunks of {options['chunk_bytes'] / 1e3:.0f} kB. A cut ends",
            f"all connections of one site in the middle of a transfer, for {options['outage_s']:g} s. Sent again",
            "is what crosses the link beyond the run without a cut, with what Flower says to connect anew.\n",
            *table(
                ["cut", "cuts", "MB up", "MB down", "sent again for a cut, kB", "same model as one process"], rows
            ),
            *foot(found),
        ]
    )


def fuzz(found: Record) -> str:
    """Write the section of `benchmarks/fuzz.py`."""
    guided = found["options"].get("engine") == "atheris"
    rows = [
        [
            name,
            *(f"{part.get(key, 0):,}" for key in ("tried", "refused", "read", "foreign")),
            f"{part['slowest_s']:.3f}",
            f"{part['memory_growth_mib']:.0f}",
        ]
        for name, part in found["results"].items()
    ]
    who = "atheris, guided by what they reach in the decoders" if guided else "kinds of mutation, drawn at random"
    return "\n".join(
        [
            f"## Broken input{', guided' if guided else ''}\n",
            f"Valid messages and configurations, changed by {who}.",
            "Foreign is any exception but the one that says what is wrong with the input.\n",
            *table(["what", "tried", "refused", "read", "foreign", "slowest, s", "memory, MiB"], rows),
            *foot(found),
        ]
    )
