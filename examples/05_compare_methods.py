"""Compare FL-BCD (delay 0) and ParaBlock (delay 1) on the same model, text, seed and link.

The clock is virtual: four clients show the times of four machines, on any machine.

    python examples/05_compare_methods.py [OUTPUT_DIR]
"""

import sys
import tempfile
from pathlib import Path

from parablock import RunConfig, run
from parablock.demo.material import TEST_FILE_NAME, make_tiny_llama, make_word_problems


def main(output_dir: Path) -> None:
    made = output_dir / "made"
    files = make_word_problems(made, num_clients=4, examples_per_client=100, seed=0)
    make_tiny_llama(made / "model", (file.read_text() for file in files), seed=0)

    print("| method | delay | eval loss | seconds | of it hidden | MB per client and round |")
    print("|---|---|---|---|---|---|")
    for delay in (0, 1):
        config = RunConfig(
            model={"name_or_path": str(made / "model")},
            data={
                "train": [str(file) for file in files],
                "test": [str(made / TEST_FILE_NAME)],
                "max_length": 128,
                "partition": {"scheme": "by_file"},
            },
            federation={"num_clients": 4, "num_rounds": 16, "delay": delay},
            train={"num_local_steps": 2, "learning_rate": 3e-3},
            link={"upload_mbps": 20, "download_mbps": 20, "latency_s": 0.02},
            engine={"clock": "virtual", "step_time_s": 0.3},
            evaluation={"every_rounds": 0},
        )
        summary = run(config, output_dir / f"delay-{delay}")
        print(
            f"| {summary['method']} | {delay} "
            f"| {summary['initial_eval_loss']:.2f} → {summary['final_eval_loss']:.2f} "
            f"| {summary['wall_time_s']:.1f} | {summary['overlap_fraction']:.0%} "
            f"| {summary['bytes_per_client_round'] / 1e6:.2f} |"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="parablock-")))
