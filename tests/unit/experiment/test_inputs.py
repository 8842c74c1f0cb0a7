"""What a user reads before the run starts."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from weakref import ref

import pytest

from parablock.config.load import load_config
from parablock.errors import ConfigError, DataError
from parablock.experiment.inputs import read_inputs
from parablock.methods.choose import make_method_model
from tiny_runs import Workshop, sum_row, write_rows


def warnings_of(workshop: Workshop, *overrides: str) -> list[str]:
    notes = read_inputs(load_config(workshop.config, overrides)).notes
    return [note for note in notes if note.startswith("warning") and "test rows" not in note]


def test_random_embeddings_that_no_block_trains_are_warned_of(workshop: Workshop):
    (warning,) = warnings_of(workshop, "model.init=random")  # tied: one matrix is both
    assert "the embeddings and the head are in no block, so they stay random" in warning
    assert warning.endswith("set blocks.include_embeddings: true")


def test_nothing_is_warned_of_where_the_embeddings_are_trained_or_were_learned(workshop: Workshop):
    enough = "federation.num_rounds=8"
    assert warnings_of(workshop) == []
    assert warnings_of(workshop, "model.init=random", "blocks.include_embeddings=true", enough) == []
    assert warnings_of(workshop, "model.init=random", "blocks.include_head=true", enough) == []
    assert warnings_of(workshop, "model.init=random", "federation.method=fedavg", "federation.delay=0") == []


def test_sites_with_files_of_different_formats_train_together(workshop: Workshop):
    kept = workshop.client_file(1).read_text()
    rows = (sum_row(3, k) for k in range(10))
    try:
        write_rows(
            workshop.client_file(1), ({"instruction": row["prompt"], "output": row["completion"]} for row in rows)
        )
        job = read_inputs(load_config(workshop.config, ["data.test=[]"]))
    finally:
        workshop.client_file(1).write_text(kept)
    assert [note.split(": ")[1] for note in job.notes if note.startswith("client 1:")] == ["alpaca"]
    assert any(note.startswith("test: mixed formats: 4 examples") for note in job.notes)
    assert job.test[1].completion == job.test[1].row.fields["output"]


def test_at_a_site_all_rows_are_its_own_and_nothing_is_held_out(workshop: Workshop):
    config = load_config(workshop.config, ["data.test=[]"])
    here, split = read_inputs(config, all_rows_of=1), read_inputs(config)
    assert [len(examples) > 0 for examples in here.train] == [False, True, False, False]
    assert len(here.train[1]) == sum(map(len, split.train)) + len(split.test)
    assert here.test == () != split.test


def test_a_fleet_keeps_none_of_the_parameters_that_were_taken(workshop: Workshop):
    fleet = make_method_model(read_inputs(load_config(workshop.config)))
    taken = fleet.take_params()
    blocks = [ref(block) for block in taken]
    assert len(blocks) == fleet.num_blocks
    assert all(block() is not None for block in blocks)
    del taken
    assert all(block() is None for block in blocks)


def test_test_rows_that_are_trained_on_are_warned_of(workshop: Workshop, tmp_path: Path):
    apart = write_rows(tmp_path / "apart.jsonl", [sum_row(90, 1), sum_row(90, 2)])
    both = write_rows(tmp_path / "both.jsonl", [sum_row(90, 1), sum_row(2, 0)])

    def repeats(file: Path) -> list[str]:
        notes = read_inputs(load_config(workshop.config, [f"data.test={file}"])).notes
        return [note for note in notes if "test rows" in note]

    assert repeats(apart) == []
    (warning,) = repeats(both)
    assert f"1 of 2 test rows stand in the training rows too, the first in {both}, line 2" in warning
    (one, same) = sum_row(90, 1), sum_row(2, 0)
    renamed = [{"question": row["prompt"], "answer": row["completion"], "id": 7} for row in (one, same)]
    (warning,) = repeats(write_rows(tmp_path / "renamed.jsonl", renamed))
    assert "1 of 2 test rows" in warning and "line 2" in warning


def test_the_first_wrong_line_is_named_whichever_client_has_it(workshop: Workshop, tmp_path: Path):
    """The chat template refuses lines 4 and 9; the rows are shuffled over the clients."""
    asked = {"role": "user", "content": "1 plus 1?"}
    called = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    right, wrong = [asked, {"role": "assistant", "content": "2"}], [asked, called]
    rows = [{"messages": wrong if line in (4, 9) else right} for line in range(1, 12)]
    mixed = write_rows(tmp_path / "mixed.jsonl", rows)
    for seed in range(4):
        changes = [f"data.train={mixed}", "data.partition.scheme=iid", f"seed={seed}"]
        with pytest.raises(DataError, match=r"mixed\.jsonl, line 4: turn 2 calls a tool"):
            read_inputs(load_config(workshop.config, changes))


def test_who_has_nothing_to_learn_from_is_named(workshop: Workshop, tmp_path: Path):
    silent = write_rows(tmp_path / "silent.jsonl", [{"prompt": "1 plus 1?", "completion": ""}] * 3)
    files = [*(str(workshop.client_file(client_id)) for client_id in range(3)), str(silent)]
    with pytest.raises(DataError, match=r"client 3: None of 3 rows has anything to train on: 3 because"):
        read_inputs(load_config(workshop.config, [f"data.train={files}"]))
    with pytest.raises(DataError, match=r"the test rows: None of 3 rows has anything"):
        read_inputs(load_config(workshop.config, [f"data.test={silent}"]))


def test_fields_and_rows_that_are_not_used_are_said_with_their_number(workshop: Workshop, tmp_path: Path):
    rows = [{**sum_row(90, k), "id": k, "label": "a"} for k in range(10)]
    rows[3]["completion"] = ""
    file = write_rows(tmp_path / "labelled.jsonl", rows)
    changes = [f"data.train={file}", "data.partition.scheme=iid", "federation.num_clients=2"]
    notes = read_inputs(load_config(workshop.config, changes)).notes
    assert [note for note in notes if note.startswith("not ")] == [
        f"not trained on: {file}, line 4: the completion is empty",
        "not used: field id (10 rows); field label (10 rows)",
    ]


@pytest.mark.parametrize(("word", "is_told"), [("NaN", True), ("NA", True), ("None", False), ("12", False)])
def test_a_word_for_an_empty_cell_is_told_of(workshop: Workshop, tmp_path: Path, word: str, is_told: bool):
    rows = [sum_row(90, k) for k in range(10)]
    rows[3]["completion"] = rows[4]["completion"] = word
    file = write_rows(tmp_path / "cells.jsonl", rows)
    changes = [f"data.train={file}", "data.partition.scheme=iid", "federation.num_clients=2"]
    told = [
        note for note in read_inputs(load_config(workshop.config, changes)).notes if "leave the cell empty" in note
    ]
    assert (
        told
        == [
            f"warning: completion is {word!r} in 2 rows, which is learnt as that word; if nothing is meant, "
            "leave the cell empty"
        ]
        * is_told
    )


@pytest.mark.parametrize(
    ("layers", "delay", "is_refused"), [(4, 1, True), (2, 2, True), (2, 1, False), (4, 0, False)]
)
def test_blocks_that_are_always_in_flight_have_no_server_optimizer(
    workshop: Workshop, layers: int, delay: int, is_refused: bool
):
    """The model has four layers."""
    changes = [f"blocks.layers_per_block={layers}", f"federation.delay={delay}"]
    config = load_config(workshop.config, [*changes, "federation.server_optimizer.name=momentum"])
    if is_refused:
        with pytest.raises(ConfigError, match="always in flight"):
            read_inputs(config)
    else:
        read_inputs(config)
    read_inputs(load_config(workshop.config, changes))


def test_settings_that_the_run_has_chosen_are_known(workshop: Workshop):
    open_ones = ["engine.num_threads=null", "blocks.layers_per_block=auto"]
    chosen = read_inputs(load_config(workshop.config, open_ones)).manifest["chosen_settings"]
    assert chosen == ["blocks.layers_per_block", "engine.num_threads"]
    given = ["engine.num_threads=1", "blocks.layers_per_block=1"]
    assert read_inputs(load_config(workshop.config, given)).manifest["chosen_settings"] == []


def test_a_model_without_a_template_gets_one_that_is_stated(workshop: Workshop):
    template = (workshop.model / "chat_template.jinja").read_text()
    try:
        (workshop.model / "chat_template.jinja").unlink()
        job = read_inputs(load_config(workshop.config))
    finally:
        (workshop.model / "chat_template.jinja").write_text(template)
    (note,) = (note for note in job.notes if "no chat template" in note)
    assert "rows are written as '… …<|endoftext|>', and so it is saved" in note
    assert job.loaded.tokenizer.chat_template is not None
    assert not any("no chat template" in note for note in read_inputs(load_config(workshop.config)).notes)


def test_a_day_that_the_template_writes_is_that_of_the_run_and_is_kept(workshop: Workshop):
    template = (workshop.model / "chat_template.jinja").read_text()
    try:
        (workshop.model / "chat_template.jinja").write_text("{{ strftime_now('%Y-%m-%d') }}" + template)
        job = read_inputs(load_config(workshop.config))
        dated = read_inputs(load_config(workshop.config, ["data.date=2001-02-03"]))
    finally:
        (workshop.model / "chat_template.jinja").write_text(template)
    assert job.config.data.date == date.today().isoformat()
    text = dated.loaded.tokenizer.decode(dated.test[0].input_ids)
    assert text.startswith("2001-02-03<|im_start|>")
    assert read_inputs(load_config(workshop.config)).config.data.date is None
