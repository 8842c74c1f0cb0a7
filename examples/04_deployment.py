"""A real deployment on one machine: a server, a process for each site, TLS and keys.

The same run in one process ends with the same model, bit for bit.

    pip install "parablock[deploy]"
    python examples/04_deployment.py [OUTPUT_DIR]
"""

import sys
import tempfile
from pathlib import Path

from parablock import RunConfig, run
from parablock.demo.material import TEST_FILE_NAME, make_tiny_llama, make_word_problems
from parablock.deploy.direct_local import deploy_direct


def make_config(files: list[Path], made: Path, engine: str) -> RunConfig:
    """Configure two sites with a file each; only the engine differs."""
    return RunConfig(
        model={"name_or_path": str(made / "model")},
        data={
            "train": [str(file) for file in files],
            "test": [str(made / TEST_FILE_NAME)],
            "max_length": 128,
            "partition": {"scheme": "by_file"},
        },
        federation={"num_clients": 2, "num_rounds": 2},
        train={"num_local_steps": 2, "learning_rate": 3e-3},
        engine={"name": engine, "num_threads": 1},
        evaluation={"every_rounds": 0},
    )


def main(output_dir: Path) -> None:
    made = output_dir / "made"
    files = make_word_problems(made, num_clients=2, examples_per_client=50, seed=0)
    make_tiny_llama(made / "model", (file.read_text() for file in files), seed=0, num_layers=2)

    deployed = deploy_direct(make_config(files, made, "remote"), output_dir / "deployed")
    here = run(make_config(files, made, "inprocess"), output_dir / "here")
    for where, summary in (("as a deployment", deployed), ("in one process", here)):
        print(
            f"{where}: loss {summary['initial_eval_loss']:.2f} -> {summary['final_eval_loss']:.2f} "
            f"in {summary['wall_time_s']:.0f} s, model {summary['model_sha256'][:12]}"
        )
    print("the same model" if deployed["model_sha256"] == here["model_sha256"] else "two models")
    print(f"logs, keys and the sites' files: {output_dir / 'deployed' / 'deployment'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="parablock-")))
