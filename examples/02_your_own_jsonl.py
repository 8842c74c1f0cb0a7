"""Fine-tune your own Hugging Face model on your own JSONL file, split over two clients.

Without arguments the script makes both: 200 rows of prompt and completion, and a tiny Llama.

    python examples/02_your_own_jsonl.py [TEXT.jsonl MODEL_FOLDER [OUTPUT_DIR]]
"""

import json
import sys
import tempfile
from pathlib import Path

from parablock import RunConfig, run
from parablock.demo.material import make_tiny_llama
from parablock.evaluation.side_by_side import score_models

CAPITALS = {"Oslo": "Norway", "Lima": "Peru", "Rome": "Italy", "Cairo": "Egypt", "Quito": "Ecuador"}
QUESTIONS = ("{} is the capital of", "Name the country of {}:", "{} lies in", "Which country has {}?")


def make_text(path: Path) -> Path:
    """Write a file of twenty questions about capitals, ten times each."""
    pairs = [(question.format(city), country) for question in QUESTIONS for city, country in CAPITALS.items()]
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows * 10))
    return path


def main(text: Path, model: Path, output_dir: Path) -> None:
    config = RunConfig(
        model={"name_or_path": str(model)},
        data={"train": [str(text)], "max_length": 256, "test_fraction": 0.1},
        blocks={"include_embeddings": True},  # a random model needs this, a pretrained one does not
        federation={"num_clients": 2, "num_rounds": 24},
        train={"num_local_steps": 4, "learning_rate": 2e-3},
        engine={"clock": "virtual"},  # simulated time: the clients take turns and share one copy of the model
    )
    summary = run(config, output_dir)
    print(f"held-out loss {summary['initial_eval_loss']:.2f} -> {summary['final_eval_loss']:.2f}")

    base, tuned = score_models(str(output_dir), [str(text)], task="exact_match", max_examples=20, max_new_tokens=16)
    print(f"exact answers {base.value:.0%} -> {tuned.value:.0%} of {tuned.count}, for example:")
    print(f"  {tuned.samples[0].prompt!r}\n  {tuned.samples[0].prediction!r}")
    print(f"load it with AutoModelForCausalLM.from_pretrained({str(output_dir / 'model')!r})")


if __name__ == "__main__":
    folder = Path(tempfile.mkdtemp(prefix="parablock-"))
    if len(sys.argv) > 2:
        main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]) if len(sys.argv) > 3 else folder / "run")
    else:
        made = make_text(folder / "text.jsonl")
        main(made, make_tiny_llama(folder / "model", [made.read_text()], seed=0), folder / "run")
