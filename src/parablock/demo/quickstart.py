"""The run of `parablock demo`: a tiny model, four clients, a few minutes, and a timeline at the end.

With a `shared` folder beside the project, a small pretrained model learns real instructions. Otherwise a random
tiny Llama learns word problems.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parablock.config.keys import RunConfig
from parablock.config.load import parse_config
from parablock.demo.material import TEST_FILE_NAME, make_tiny_llama, make_word_problems
from parablock.evaluation.generation import answers_match
from parablock.evaluation.side_by_side import Score, score_models
from parablock.experiment.progress import Progress
from parablock.experiment.run import run
from parablock.report.timeline import draw_timeline
from parablock.storage.run_directory import RunDirectory
from parablock.trace import read_chrome_trace

NUM_CLIENTS = 4
FAMILIES = ("ag_news", "app_reviews", "glue_qqp", "rotten_tomatoes")
NUM_SCORED = 96


@dataclass(frozen=True)
class DemoResult:
    """The run of the demo; `is_real` says whether its text and model are real, and not made up.

    The scores are exact match of the base model and of the tuned one; there are none if the run was interrupted.
    """

    directory: Path
    is_real: bool
    summary: dict[str, Any]
    scores: list[Score]


def find_shared() -> Path | None:
    """Find the folder with real data and a small model, beside the project or the working directory."""
    for place in (Path.cwd(), Path(__file__).resolve().parents[3]):
        shared = place.parent / "shared"
        if (shared / "models/tiny-base").is_dir() and (shared / "data/t0").is_dir():
            return shared
    return None


def demo_config(shared: Path | None, made: Path) -> RunConfig:
    """Configure the demo for the real data and model in `shared`; if it is None, make up both in `made`."""
    if shared is not None:
        train, test = (
            [str(shared / f"data/t0/{name}.{kind}.jsonl") for name in FAMILIES] for kind in ("train", "test")
        )
        model, num_threads = shared / "models/tiny-base", 2
        num_rounds, learning_rate, schedule = 24, 1e-3, "constant"
    else:
        paths = make_word_problems(made, num_clients=NUM_CLIENTS, examples_per_client=600, seed=0)
        train, test = [str(path) for path in paths], [str(made / TEST_FILE_NAME)]
        rows = [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
        texts = [f"{row['question']}\n{row['answer']}" for row in rows]
        # A random model has more to learn than one that is fine-tuned: few layers, each of them often.
        model, num_threads = make_tiny_llama(made / "model", texts, seed=0, num_layers=4), 1
        num_rounds, learning_rate, schedule = 128, 4e-3, "cosine"
    return parse_config(
        {
            "model": {"name_or_path": str(model)},
            "data": {"train": train, "test": test, "max_length": 160, "partition": {"scheme": "by_file"}},
            "federation": {"num_clients": NUM_CLIENTS, "num_rounds": num_rounds, "delay": 1},
            "train": {
                "num_local_steps": 4,
                "per_device_train_batch_size": 8,
                "learning_rate": learning_rate,
                "lr_scheduler_type": schedule,
            },
            "wire": {"format": "bfloat16"},
            "link": {"upload_mbps": 50, "download_mbps": 50, "latency_s": 0.01},
            "engine": {"clock": "virtual", "num_threads": num_threads},
            "evaluation": {"every_rounds": 8, "max_examples": NUM_SCORED},
        }
    )


def run_demo(directory: Path, *, progress: Progress, asked_to_stop: Callable[[], bool]) -> DemoResult:
    """Run the demo.

    Raises:
        StorageError: The folder holds a run already, or cannot be written.
    """
    RunDirectory(directory).check_unused()
    shared = find_shared()
    config = demo_config(shared, directory / "generated")
    summary = run(config, directory, progress=progress, asked_to_stop=asked_to_stop)
    scores: list[Score] = []
    if summary["status"] == "completed":
        scores = score_models(
            str(directory),
            config.data.test,
            task="exact_match",
            max_new_tokens=48,
            stage=progress.stage,
            on_done=progress.done,
        )
    return DemoResult(directory, shared is not None, summary, scores)


def describe_demo(outcome: DemoResult) -> list[str]:
    """Return the last lines of the demo: the timeline, loss and overlap, and what to open."""
    summary, directory = outcome.summary, outcome.directory
    if not outcome.scores:
        return []
    base, tuned = outcome.scores
    right = [sample for sample in tuned.samples if answers_match(sample.prediction, sample.reference)]
    answer = (right or list(tuned.samples))[0]
    verdict = "which is right" if right else f"where {_one_line(answer.reference)!r} is right"
    data = "real instructions" if outcome.is_real else "word problems"
    return [
        "",
        "The first rounds, in simulated time: every client has a machine and a link of its own",
        *draw_timeline(read_chrome_trace(directory / "trace.json")),
        "",
        f"learned   {data} of {summary['num_clients']} clients in {summary['num_rounds']} rounds",
        f"          eval loss {summary['initial_eval_loss']:.3f} → {summary['final_eval_loss']:.3f}, "
        f"exact match {base.value:.0%} → {tuned.value:.0%} of {tuned.count} held-out questions",
        f"          asked {_last_line(answer.prompt)!r}, it answers {_one_line(answer.prediction)!r}, {verdict}",
        f"hidden    {summary['overlap_fraction']:.0%} of the communication, under computation: "
        f"{summary['wall_time_s']:.0f} s instead of {summary['sequential_s']:.0f} s one after the other",
        f"open      {directory / 'report.html'} in a browser (curves, the timeline of all rounds, every figure)",
        f"          {directory / 'model'} with AutoModelForCausalLM.from_pretrained",
    ]


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _last_line(prompt: str) -> str:
    lines = [line for line in prompt.replace("<|im_end|>", "").splitlines() if line.strip() and "<|" not in line]
    text = lines[-1] if lines else prompt
    return text if len(text) <= 100 else f"…{text[-99:]}"
