"""Files and model folders that are wrong, each in one way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, T5Config

from tiny_runs import Workshop, sum_row, write_rows


def write_broken_files(path: Path) -> None:
    rows = [json.dumps(sum_row(2, k)) for k in range(8)]
    (path / "broken.jsonl").write_text("\n".join([*rows[:3], '{"prompt": "4 plus', *rows[4:]]))
    (path / "bytes.jsonl").write_bytes(rows[0].encode() + b'\n{"prompt": "\xff"}\n')
    (path / "numbers.jsonl").write_text(f"{rows[0]}\n5\n")
    (path / "empty.jsonl").write_text("")
    (path / "blank.jsonl").write_text("\n\n")
    (path / "rows.csv").write_text("prompt,completion\na,b\nc\n")
    (path / "rows.xlsx").write_bytes(b"PK")
    (path / "utf16.jsonl").write_bytes("\n".join(rows).encode("utf-16"))
    (path / "surrogate.jsonl").write_text(
        "\n".join([*rows[:2], '{"prompt": "a \\ud83d", "completion": "b"}', *rows])
    )
    asked, said = {"role": "user", "content": "1 plus 1?"}, {"role": "assistant", "content": "2"}
    called = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    for name, turns in {
        "tools": [asked, called],
        "weight": [asked, {**said, "weight": 0.5}],
        "narrator": [{**asked, "role": "narrator"}, said],
    }.items():
        write_rows(path / f"{name}.jsonl", [{"messages": [asked, said]}, *[{"messages": turns}] * 7])
    write_rows(path / "image.jsonl", [{"messages": [{"role": "user", "content": [{"type": "image"}]}, said]}] * 4)
    (path / "corrupt.parquet").write_bytes(b"PAR1 and then nothing of the kind PAR1")
    write_rows(path / "rows.jsonl", (sum_row(2, k) for k in range(8)))
    write_rows(path / "mixed.jsonl", [sum_row(1, 1), {"question": "1 plus 1?", "answer": "#### 2"}] * 4)
    write_rows(path / "fields.jsonl", [{"frage": "1 plus 1?", "antwort": "2"}] * 4)
    write_rows(path / "number_for_text.jsonl", [sum_row(1, 1), {"prompt": "1 plus 1?", "completion": 2}])
    write_rows(path / "turns.jsonl", [{"messages": [{"role": "user"}]}] * 4)
    write_rows(path / "silent.jsonl", [{"prompt": "1 plus 1?", "completion": ""}] * 4)
    labelled = [{**sum_row(2, k), "label": "ab"[k % 2]} for k in range(8)]
    write_rows(path / "labelled.jsonl", labelled)
    write_rows(path / "label_missing.jsonl", [*labelled[:4], sum_row(1, 1)])
    (path / "folder").mkdir()
    (path / "list.yaml").write_text("- model\n- data\n")
    (path / "broken.yaml").write_text("model: {name_or_path: [\n")
    (path / "twice.yaml").write_text("seed: 1\nseed: 2\n")
    (path / "minimal.yaml").write_text("model: {name_or_path: model}\n")
    (path / "many.yaml").write_text(
        "{model: {dtype: float16}, data: {train: rows.jsonl}, wire: {error_feedback: true}, sede: 3,"
        " train: {num_local_steps: 0, lerning_rate: 0.1}}"
    )


def write_broken_models(workshop: Workshop) -> None:
    def variant(name: str) -> Path:
        return Path(shutil.copytree(workshop.model, workshop.path / name))

    (variant("config_not_json") / "config.json").write_text("{")
    for file in variant("without_tokenizer").glob("*token*"):
        file.unlink()
    weights = variant("corrupt_weights") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    incomplete = variant("incomplete_weights") / "model.safetensors"
    tensors = load_file(incomplete)
    save_file(dict(list(tensors.items())[:-1]), incomplete, metadata={"format": "pt"})
    T5Config().save_pretrained(variant("encoder_decoder"))
    config = json.loads((workshop.model / "config.json").read_text())
    for name, changes in {
        "quantised": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        "with_code": {"model_type": "mymodel", "auto_map": {"AutoModelForCausalLM": "modeling_my.MyModel"}},
        "newer": {"model_type": "llama9000", "transformers_version": "9.1.0"},
    }.items():
        (variant(name) / "config.json").write_text(json.dumps(config | changes))
    for name, file, content in (
        ("adapter", "adapter_config.json", '{"base_model_name_or_path": "ann/base"}'),
        ("gguf", "a.gguf", "GGUF"),
    ):
        (workshop.path / name).mkdir()
        (workshop.path / name / file).write_text(content)
    (variant("pointer") / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    )
    (variant("broken_template") / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}")
    not_finite = variant("not_finite") / "model.safetensors"
    tensors = load_file(not_finite)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, not_finite, metadata={"format": "pt"})
    short = {"n_layer": 4, "n_embd": 8, "n_head": 1, "n_positions": 32, "vocab_size": 300}
    GPT2LMHeadModel(GPT2Config(**short, bos_token_id=0, eos_token_id=0)).save_pretrained(variant("short"))
    small = GPT2LMHeadModel(
        GPT2Config(n_layer=2, n_embd=8, n_head=1, vocab_size=50, bos_token_id=0, eos_token_id=0)
    )
    small.save_pretrained(variant("small_vocabulary"))
