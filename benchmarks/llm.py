"""On a real LLM, SmolLM2-135M-Instruct: the settings of each method, and the methods beside each other.

The model is made by `../shared/tools/make_smollm2.py` where it is not there yet. Its weights are dequantised from
4 bits, so every figure is of that rounded model. Runs are kept and resumed as those of quality.py; a record grows
run by run.

    .venv/bin/python benchmarks/llm.py llm_search --only "fedit, 1e-3"
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import _record as kit
import torch
from _record import Found, Options, benchmarks, main, record

MODEL = kit.REPOSITORY / "runs" / "SmolLM2-135M-Instruct"


def smollm2() -> str:
    """Return the folder of the model; make it where it is missing."""
    if not (MODEL / "model.safetensors").exists():
        made = subprocess.run(
            [sys.executable, str(kit.SHARED / "tools" / "make_smollm2.py"), str(MODEL)], check=False
        )
        if made.returncode:
            sys.exit(f"{MODEL} cannot be made; --smoke runs on a generated model and text")
    return str(MODEL)


def gsm8k(options: Options) -> kit.Material:
    """Return the model and the rows of GSM8K that are short, or what is generated for a smoke test."""
    if options.smoke:
        return kit.generated(Path(options.work_dir).resolve() / "material", num_clients=2)
    folder, made = Path(options.work_dir).resolve() / "material", []
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("train", "test"):
        rows = (kit.SHARED / "data" / "gsm8k" / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
        short = [row for row in rows if sum(map(len, json.loads(row).values())) <= options.max_chars]
        made.append(folder / f"{part}-{options.max_chars}.jsonl")
        made[-1].write_text("\n".join(short) + "\n", encoding="utf-8")
    return kit.Material(smollm2(), (str(made[0]),), (str(made[1]),))


def run_of(options: Options, name: str, settings: Found) -> kit.Kept:
    """Run one setting, unless it is there; its model is kept until it has been scored."""
    usual = {"data.partition.scheme": "iid", "federation.num_clients": 2, "evaluation.num_answers": 0}
    config = kit.configured(gsm8k(options), kit.training(options) | usual | settings)
    return kit.Kept(config, options, "".join(c if c.isalnum() else "-" for c in name))


# -- the settings of each method
def llm_search(options: Options) -> None:
    """Try block sizes, optimizers and learning rates of each method on GSM8K; one row for each run."""
    about, found = kit.ABOUT["llm_search"], list[Found]()
    for name in options.only:
        run = run_of(options, name, about["tried"][name])
        shutil.rmtree(run.directory.model, ignore_errors=True)  # half a GB each
        sent = run.summary["uplink_bytes"] / run.config.federation.num_clients / run.config.federation.num_rounds
        told = run.told("method", "delay", "num_rounds", "uplink_bytes") | {"megabytes": sent / 1e6}
        found.append({"run": name, "ratio": run.loss / run.summary["initial_eval_loss"]} | told)
        record(options, found, [], run.config)  # the rest may not be reached


TRIED = [*kit.ABOUT["llm_search"]["tried"]]
BENCHMARKS = benchmarks(globals(), llm_search={"only": TRIED})

if __name__ == "__main__":
    torch.set_num_threads(1)
    main(__doc__, BENCHMARKS)
