"""What a user reads before the run starts."""

from __future__ import annotations

from weakref import ref

from parablock.config.load import load_config
from parablock.experiment.inputs import read_inputs
from parablock.methods.choose import make_method_model
from tiny_runs import Workshop, sum_row, write_rows


def warnings_of(workshop: Workshop, *overrides: str) -> list[str]:
    return [
        note for note in read_inputs(load_config(workshop.config, overrides)).notes if note.startswith("warning")
    ]


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
