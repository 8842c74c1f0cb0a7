"""A hundred ways of going wrong, from `plan` to a deployment: each says what it is, why, and what to do.

All of them go through the real command line, in one folder, where nothing may have changed afterwards. What can
be wrong with disks and with what a run left stands in `test_wrong_inputs.py`.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from broken_inputs import write_broken_files, write_broken_models
from tiny_runs import Workshop, command, half_written, sum_row, write_rows

IID = "--set data.partition.scheme=iid --set federation.num_clients=2"
READ = f"run run.yaml --output-dir out {IID} --set data.train"
BY_LABEL = "--set data.partition.scheme=by_field --set data.partition.field=label"
SPARSE = "--set 'data.partition={scheme: dirichlet, field: label, alpha: 0.01}'"


@dataclass(frozen=True)
class Wrong:
    """A command and the parts of what it has to say.

    Attributes:
        line: The words after `parablock`.
        what: What happened, with the value or the place.
        cause: Why, and where it helps whose fault it is.
        cure: What to do.
    """

    line: str
    what: str
    cause: str
    cure: str


# A command, and below it what happened | why | what to do.
TABLE = f"""
plan nowhere.yaml
  nowhere.yaml has 1 problem | there is no file | give the path of a YAML file
plan broken.yaml
  broken.yaml | it is not YAML | in line 2, column 1
plan twice.yaml
  twice.yaml | the key 'seed' stands there twice | in line 2, column 1
plan list.yaml
  list.yaml | it must hold sections | such as `model:` and `data:`
plan minimal.yaml
  minimal.yaml | not given | data: required
plan run.yaml --set train.lerning_rate=1
  the command line has 1 problem | train.lerning_rate: unknown key | did you mean `train.learning_rate`?
plan minimal.yaml --set seed=x
  minimal.yaml has 2 problems | data: required | seed: it must be a whole number (given: 'x') (on the command line)
plan pipe.yaml
  pipe.yaml has 1 problem | it is a pipe | write the settings to a file
plan /dev/null
  /dev/null has 1 problem | it is a device | write the settings to a file
{READ}=pipe.jsonl
  pipe.jsonl is a pipe, and no file | nobody may ever write there | Write the rows to a file
data /dev/null
  /dev/null is a device, and no file | nobody may ever write there | Write the rows to a file
generate model --data pipe.txt
  pipe.txt is a pipe, and no file | nobody may ever write there | Write the rows to a file
run run.yaml --output-dir gone/../run
  leads through gone, which is no folder | gone/../run | Give another --output-dir
compare run.yaml --output-dir gone/../compare
  leads through gone, which is no folder | gone/../compare | Give another --output-dir
export finished --output-dir gone/../export
  leads through gone, which is no folder | gone/../export | Give a new folder as --output-dir
eval finished --output-dir gone/../eval
  leads through gone, which is no folder | gone/../eval | Give another --output-dir
generate finished Hi --output gone/../generate
  leads through gone, which is no folder | gone/../generate | Choose another place for --output
init rows.jsonl --model model --output gone/../init
  leads through gone, which is no folder | gone/../init | Give another name with --output
forget finished --client 0 --output-dir gone/../forget --yes
  leads through gone, which is no folder | gone/../forget | Give another --output-dir
plan run.yaml --set train.learning_rate=fast
  train.learning_rate | given: 'fast' | it must be a number
plan run.yaml --upload-mbps 0
  link.upload_mbps | given: 0.0 | must be greater than 0
plan run.yaml --set seed
  'seed' | is not key=value | such as train.num_local_steps=4
plan run.yaml --set federation.method=fl_bcd --set federation.delay=2
  federation | method fl_bcd has delay 0, not 2 | for a delay choose parablock
plan run.yaml --set federation.method=fedavg --set federation.delay=0 --set blocks.layers_per_block=2
  blocks.layers_per_block | method fedavg, which trains no blocks | leave it out
plan run.yaml --set federation.num_clients=3
  by_file makes one client of each file | data.train has 4 and federation.num_clients is 3 | make them equal
plan run.yaml --probe
  engine.step_time_s | it states that a step takes 0.05 s, and --probe measures it | leave one of them out
plan run.yaml --set model.name_or_path=./nowhere
  no model folder ./nowhere | That path does not exist | Give a folder that holds config.json
plan run.yaml --set model.name_or_path=encoder_decoder
  encoder_decoder is of type t5 | It is an encoder | Choose a decoder-only model
plan run.yaml --set blocks.layers_per_block=9
  blocks.layers_per_block is 9 | the model has 4 decoder layers | Choose a number from 1 to 4
blocks config_not_json
  The configuration of config_not_json | not a valid JSON file | Copy or download the model again
blocks model --layers-path model.strata
  'model.strata', which names no ModuleList
  Lists of modules in this model: model.layers | blocks.layers_path: model.layers
run run.yaml --output-dir out --set model.name_or_path=without_tokenizer
  The tokenizer of  | missing or damaged | Copy or download the model again
run run.yaml --output-dir out --set model.name_or_path=incomplete_weights
  1 tensors are missing | The checkpoint is incomplete | Get the whole checkpoint again
run run.yaml --output-dir out --set model.name_or_path=small_vocabulary
  its model has 50 embeddings | The tokenizer is another model's | Use the tokenizer of this model
run run.yaml --output-dir out {IID} --set data.train=rows.jsonk
  'rows.jsonk' | Files are looked for from | check the name
run run.yaml --output-dir out {IID} --set data.train=row.jsonl
  row.jsonl does not exist | Relative paths start from | Did you mean rows.jsonl?
run run.yaml --output-dir out {IID} --set data.train=rows.xlsx
  rows.xlsx | has the suffix '.xlsx', which cannot be read | Save the sheet as CSV
run run.yaml --output-dir out {IID} --set data.train=rows.csv
  rows.csv, line 3 has 1 cell | the row is cut | export the table again
run run.yaml --output-dir out {IID} --set data.train=./*.parquets
  ./*.parquets matches no file | Relative patterns start from | Check the pattern
run run.yaml --output-dir out {IID} --set data.train=broken.jsonl
  broken.jsonl, line 4 | is not JSON: Unterminated string | one JSON object per line
run run.yaml --output-dir out {IID} --set data.train=empty.jsonl
  empty.jsonl is empty | it holds no row | Give a source with at least one example
run run.yaml --output-dir out {IID} --set data.train=fields.jsonl
  fields.jsonl, line | it has the fields frage, antwort | Or set data.format
run run.yaml --output-dir out {IID} --set data.train=silent.jsonl
  None of 2 rows has anything to train on | because the completion is empty | give rows with completions
run run.yaml --output-dir out {IID} --set data.train=corrupt.parquet
  corrupt.parquet cannot be read | The file is damaged | Fetch or export it again
run run.yaml --output-dir out --set engine.name=flower --set engine.clock=real --set engine.step_time_s=null
  engine.name: flower | has its clients at sites | start it with `parablock deploy local`
run run.yaml --output-dir out --set engine.name=flower
  engine: | flower runs in real time | leave clock: real
run run.yaml --output-dir out --set blocks.layers_per_block=auto --set train.num_local_steps=auto
  blocks.layers_per_block: auto | follows from train.num_local_steps, which is auto too | set a number
{READ}=folder
  folder is a folder without a data file | Data files end with .jsonl | Name another folder
{READ}=utf16.jsonl
  utf16.jsonl is in UTF-16, and not in UTF-8 | spreadsheets and PowerShell write such files | iconv -f UTF-16
{READ}=surrogate.jsonl
  surrogate.jsonl, line 3: field prompt holds \\ud83d | cut in the middle of an emoji | take that half out
{READ}=tools.jsonl
  tools.jsonl, line 2: turn 2 calls a tool | chat template does not write call 1 of it | Take a model whose
{READ}=weight.jsonl
  weight.jsonl, line 2: turn 2 has weight 0.5 | a turn is learnt (1, true) or not | Give 0 or 1
{READ}=narrator.jsonl
  narrator.jsonl, line 2: turn 1 of messages has the unknown role 'narrator' | Known are | Rename the role
{READ}=image.jsonl
  image.jsonl, line 1: turn 1 | a part of type 'image' | audio and other parts cannot be learnt from
{READ}=rows.jsonl --set 'data.columns={{prompt: frage}}'
  rows.jsonl, line 1 has no column 'frage' | data.columns names; it has prompt, completion | Correct data.columns
{READ}=rows.jsonl --set 'data.columns={{promt: prompt}}'
  data.columns | no format has a field 'promt' | known are messages
{READ}=rows.jsonl --set data.date=29.2.2024
  data.date | '29.2.2024' | must be a day such as
{READ}=rows.jsonl --set model.name_or_path=quantised
  The weights of | are quantised (gptq) | Take the model that it was made from
{READ}=rows.jsonl --set model.name_or_path=with_code
  brings code of its own (modeling_my.py) | could do anything on this machine | architecture is part of Transformers
{READ}=rows.jsonl --set model.name_or_path=newer
  of the type llama9000 | It was written by version 9.1.0 | Install a newer one
{READ}=rows.jsonl --set model.name_or_path=adapter
  adapter holds an adapter | names ann/base | merge_and_unload
{READ}=rows.jsonl --set model.name_or_path=gguf
  gguf holds a model for inference (a.gguf) | GGUF is what llama.cpp reads | config.json and *.safetensors
{READ}=rows.jsonl --set model.name_or_path=pointer
  model.safetensors is a pointer of Git LFS | cloned without its large files | lfs pull
{READ}=rows.jsonl --set model.name_or_path=not_finite
  not finite, the first in model. | of a training that diverged | Take another checkpoint
{READ}=rows.jsonl --set model.name_or_path=broken_template
  The chat template of | no template of Jinja | Correct chat_template.jinja
{READ}=rows.jsonl --set model.name_or_path=short
  data.max_length is 64, and gpt2 has 32 positions | a table that was learnt with the model | data.max_length: 32
plan run.yaml --set model.name_or_path=short --set data.max_length=33
  data.max_length is 33, and gpt2 has 32 positions | no row for a later token | or less
data rows.jsonl --column prompt
  --column | 'prompt' is not field=column | such as prompt=frage
data surrogate.jsonl
  surrogate.jsonl, line 3 | half of a surrogate pair | Export the row again
{READ}=bytes.jsonl
  bytes.jsonl, line 2 is not JSON | byte 0xff at position 12 is not UTF-8 | one JSON object per line, in UTF-8
{READ}=numbers.jsonl
  numbers.jsonl, line 2 | holds a value of type int, not an object | one JSON object per line
{READ}=blank.jsonl
  blank.jsonl is empty | it holds no row | at least one example
{READ}=mixed.jsonl
  mixed.jsonl, line 2 has the format gsm8k | line 1 has prompt_completion | into one format
{READ}=number_for_text.jsonl
  number_for_text.jsonl, line 2 | field completion is of type int, not text | as a string
{READ}=turns.jsonl
  turns.jsonl, line 1 | turn 1 of messages has no content | such as {{"role": "user"
{READ}=rows.jsonl --set data.format=gsm8k
  rows.jsonl, line 1 | no value in field question | gsm8k: question, answer
{READ}=rows.jsonl --set data.max_length=8
  None of 4 rows | because the prompt alone fills max_length 8 | Raise data.max_length
{READ}=rows.jsonl --set federation.num_clients=9
  8 rows cannot be split over 9 clients | Every client needs at least one row | lower federation.num_clients
{READ}=rows.jsonl --set federation.num_clients=8 --set data.test=[]
  client 0 has 1 row | a part of each client's rows is held out | Give data.test
{READ}=label_missing.jsonl {BY_LABEL}
  label_missing.jsonl, line 5 | no value in field 'label' | Choose a field for data.partition.field
{READ}=labelled.jsonl {BY_LABEL} --set data.partition.field=colour
  labelled.jsonl, line 1 | no value in field 'colour' | Choose a field for data.partition.field
{READ}=labelled.jsonl {BY_LABEL} --set federation.num_clients=3
  by_field gives one value of 'label' to each client | 2 values and 3 clients | Set federation.num_clients: 2
{READ}=labelled.jsonl --set federation.num_clients=8 {SPARSE}
  over 8 rows | gave each of 8 clients | Raise data.partition.alpha
run run.yaml --output-dir out --set federation.num_rounds=3
  federation.num_rounds: 3 rounds | would never train block | give at least 4 rounds
run run.yaml --output-dir rows.jsonl/out
  rows.jsonl/out cannot be a folder | rows.jsonl is a file | Give another --output-dir
run run.yaml --output-dir finished
  finished holds a run already | A run never writes over another one | look at it: parablock eval finished
run run.yaml --output-dir unfinished
  unfinished holds a run already | A run never writes over another one | go on with it: parablock resume unfinished
compare run.yaml --output-dir out --methods parablock,parablock
  --methods | parablock, parablock | give each method once
compare run.yaml --output-dir out --seeds 0,x
  --seeds | '0,x' | give whole numbers such as 0,1,2
blocks model --split thirds
  blocks.split | is 'thirds' | Choose one of layer, attention_mlp
eval finished --data many.jsonl --task multiple_choice
  many.jsonl, line 1 has no field choices | only where there are 2 to 16 | Give each row a field choices
eval finished --data missing.jsonl
  missing.jsonl does not exist | Relative paths start from | Check the path
eval unfinished --data test.jsonl
  the run in unfinished has no model yet | It was killed after round 6. | parablock resume unfinished
eval model --data test.jsonl --task vibes
  'vibes' | there is no task | Choose one of loss
eval model --data test.jsonl --task ifeval
  test.jsonl, line 1 | no list of instructions in the field instruction_id_list | Give rows such as
eval model --data instructions.jsonl --task ifeval
  instructions.jsonl, line 2 | there is no instruction 'keywords:rhymes' | Known are keywords:existence
eval model --data plain.jsonl --task exact_match
  plain.jsonl, line 1 | has no prompt to generate from | evaluate the loss instead
eval model --data choices.jsonl --task multiple_choice
  choices.jsonl, line 1 | not among its choices | Add it to the list
export finishd --output-dir out
  finishd does not exist | Relative paths start from | Did you mean finished? Give the --output-dir
generate ./finishd Hi
  There is no run or model folder ./finishd | That path does not exist | Did you mean finished? Give a run directory
init rows.jsonl --model ./modle --output new.yaml
  There is no model folder ./modle | That path does not exist | Did you mean model? Give a folder
export damaged --output-dir out --format gguf
  damaged has no model yet | It was killed after round 6. | Finish it with: parablock resume damaged
export finished --output-dir folder
  folder is there already | | Give a new folder as --output-dir
export finished --output-dir out --push-to-hub alice
  'alice' is not the name of a repository | Give OWNER/NAME | such as alice/my-model
generate finished
  There is no prompt | | or a file with --data
generate model Hi --only base
  model has no base model: it has model | | Leave --only out
forget model --client 0
  model holds no run | it has no config.yaml | of an earlier `parablock run`
forget finished --client 4
  --client 4 | the command line | the run has clients 0 to 3
init rows.jsonl --model model --output run.yaml
  run.yaml is there already | | Give another name with --output
compare run.yaml --output-dir out --methods parablok
  --methods | there is no method parablok | there are parablock
compare run.yaml --output-dir out --tasks vibes
  --tasks | there is no task vibes | there are exact_match
compare run.yaml --output-dir out --for fedavg:seed=1
  --for | 'fedavg:seed=1' | is not method:key=value for one of parablock, fl_bcd
audit nowhere.jsonl
  there is no log nowhere.jsonl | A site has its log in its state_dir | audit.jsonl
deploy keys show folder
  folder holds neither server.key nor site.key | no key has been made in it yet | deploy keys request folder
deploy keys request out --name alice
  'alice' is not a name of this federation | the client's that it stands for | The names are: server, site-0
deploy keys --sites 2 --output-dir model
  model is not empty | | keys are never overwritten
deploy client no-site.yaml --server localhost:8000 --insecure
  no-site.yaml has 1 problem | there is no file | give the path of a YAML file
report folder
  folder holds no run | that has ended | Give the --output-dir of a `parablock run`
resume folder
  folder holds no run | it has no config.yaml | Give the --output-dir
resume finished
  the run in finished is complete | nothing to resume | parablock eval finished
resume damaged
  every checkpoint in damaged/checkpoints is damaged
  Files were changed, or the disk lost them | Start the run anew
resume half_a_manifest
  half_a_manifest/manifest.json cannot be read | changed by hand, or the disk lost a part | Put back a copy of it
resume other_rows
  the data (data_sha256) is not what it was | changed in the meantime | Put back what changed, or start a new run
"""

ERRORS = [Wrong(*map(str.strip, re.split(r"[|\n]", row))) for row in re.split(r"\n(?=\w)", TABLE.strip())]


@pytest.fixture(scope="module")
def folder(workshop: Workshop) -> Iterator[Path]:
    """The current folder of a user with good and broken files, models and runs."""
    path = workshop.path
    write_broken_files(path)
    write_broken_models(workshop)
    write_rows(path / "plain.jsonl", [{"text": "Ann has 12 apples."}] * 4)
    write_rows(path / "choices.jsonl", [{**sum_row(1, 1), "choices": ["#### 3", "#### 4"]}])
    asked = ("startend:quotation", "keywords:rhymes")
    write_rows(
        path / "instructions.jsonl",
        [{"prompt": "Write.", "instruction_id_list": [name], "kwargs": [{}]} for name in asked],
    )
    write_rows(path / "many.jsonl", (sum_row(1, k) for k in range(20)))
    for name in ("pipe.yaml", "pipe.jsonl", "pipe.txt"):
        os.mkfifo(path / name)
    make_runs(workshop)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield path


def make_runs(workshop: Workshop) -> None:
    path = workshop.path
    assert workshop.run(path / "finished").code == 0
    shutil.copytree(path / "finished", path / "unfinished")
    shutil.rmtree(path / "unfinished" / "model")
    (path / "unfinished" / "summary.json").unlink()
    for name in ("damaged", "half_a_manifest", "other_rows"):
        shutil.copytree(path / "unfinished", path / name)
    for checkpoint in (path / "damaged" / "checkpoints").iterdir():
        (checkpoint / "state.json").write_text('{"format_version"')
    (path / "half_a_manifest" / "manifest.json").write_text('{"data_sha256": {')
    config = path / "other_rows" / "config.yaml"
    config.write_text(config.read_text().replace("client_1.jsonl", "rows.jsonl"))


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture(scope="module")
def said(folder: Path) -> dict[str, str]:
    """What every command says on stderr; each must have ended with 2 and changed nothing."""
    told, before = {}, contents(folder)
    for wrong in ERRORS:
        outcome = command(*shlex.split(wrong.line))
        assert outcome.code == 2, (wrong.line, outcome)
        assert contents(folder) == before, wrong.line
        told[wrong.line] = outcome.stderr
    assert half_written(folder) == []
    return told


@pytest.mark.parametrize("wrong", ERRORS, ids=lambda wrong: wrong.line)
def test_an_error_says_what_happened_why_and_what_to_do(wrong: Wrong, said: dict[str, str]):
    text = said[wrong.line]
    assert text.startswith("error: ")
    assert "Traceback" not in text
    for part in (wrong.what, wrong.cause, wrong.cure):
        assert part in text


def test_there_are_a_hundred_and_no_two_are_the_same(said: dict[str, str]):
    assert len(said) >= 100
    texts = list(said.values())
    assert [line for line, text in said.items() if texts.count(text) > 1] == []


def test_what_the_wrong_commands_are_made_of_is_right(folder: Path):
    """So each is refused for its own reason alone."""
    assert command("plan", "run.yaml").code == 0
    assert command("blocks", "model").code == 0
    assert command("eval", "finished", "--data", "test.jsonl", "--task", "exact_match").code == 0
    rows = shlex.split(f"{IID} --set data.train=rows.jsonl --set federation.num_rounds=4")
    assert command("run", "run.yaml", "--output-dir", "right", *rows).code == 0
    assert command("resume", "unfinished").code == 0
