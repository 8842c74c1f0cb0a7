"""A run from Python: two clients in one process fine-tune a tiny Llama on word problems.

The script makes model and text. Each client has a topic of its own and a slow link. While an update travels, the
client trains the next block.

    python examples/01_two_clients.py [OUTPUT_DIR]
"""

import logging
import sys
import tempfile
from pathlib import Path

from parablock import RunConfig, run
from parablock.demo.material import TEST_FILE_NAME, make_tiny_llama, make_word_problems


def main(output_dir: Path) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # a run reports to the logger `parablock`

    made = output_dir / "made"
    files = make_word_problems(made, num_clients=2, examples_per_client=200, seed=0)
    make_tiny_llama(made / "model", (file.read_text() for file in files), seed=0)

    config = RunConfig(
        model={"name_or_path": str(made / "model")},
        data={
            "train": [str(file) for file in files],
            "test": [str(made / TEST_FILE_NAME)],
            "max_length": 128,
            "partition": {"scheme": "by_file"},
        },
        federation={"num_clients": 2, "num_rounds": 16},
        train={"num_local_steps": 4, "learning_rate": 3e-3},
        link={"upload_mbps": 40, "download_mbps": 40},
        evaluation={"every_rounds": 8},
    )
    summary = run(config, output_dir / "run")

    print(f"\neval loss {summary['initial_eval_loss']:.2f} -> {summary['final_eval_loss']:.2f}")
    print(f"{summary['overlap_fraction']:.0%} of the communication was hidden under computation")
    print(f"model: {output_dir / 'run' / 'model'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="parablock-")))
