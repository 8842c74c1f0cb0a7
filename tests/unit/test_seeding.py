from parablock.seeding import generator_for, seed_for


def test_the_same_purpose_draws_the_same_numbers_and_another_purpose_others():
    draw = generator_for(0, "cohort", 3).random(4).tolist()
    assert generator_for(0, "cohort", 3).random(4).tolist() == draw
    assert generator_for(0, "batches", 3).random(4).tolist() != draw
    assert generator_for(0, "cohort", 4).random(4).tolist() != draw
    assert generator_for(1, "cohort", 3).random(4).tolist() != draw


def test_indices_do_not_run_together():
    assert seed_for(0, "batches", 1, 23) != seed_for(0, "batches", 12, 3)
    assert 0 <= seed_for(0, "batches") < 2**63
