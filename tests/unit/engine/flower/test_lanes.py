"""The lanes of a site: which SuperNode has which, and how much an exchange over them carries."""

from __future__ import annotations

from frames import OPENING
from parablock.engine.flower.lanes import Lane, Site, site_among


def test_a_supernode_that_comes_back_takes_its_place_and_a_second_one_does_not():
    site = Site()
    assert site.take_lane("up", 1) and not site.is_complete
    assert site.take_lane("down", 2) and site.is_complete
    assert not site.take_lane("up", 3)
    assert not site.take_lane("both", 3)
    site.lanes["up"].offline = True
    assert not site.take_lane("both", 3)  # the other direction still has one
    assert site.take_lane("up", 3) and site.lanes["up"].node_id == 3
    for lane in site.lanes.values():
        lane.offline = True
    assert site.take_lane("both", 4) and list(site.lanes) == ["both"]


def test_what_all_replies_together_may_carry_does_not_grow_with_the_sites():
    for num_sites, together in ((1, 50 << 20), (2, 100 << 20), (4, 100 << 20), (1000, 1000 * (8 << 20))):
        sites = [site_among(num_sites) for _ in range(num_sites)]
        budgets = []
        for site in sites:
            assert site.ask(Lane("up", 1), OPENING, 0.0).budget_bytes == 8 << 20, "its speed is not known yet"
            site.up.note(1 << 30, 1.0)
            budgets.append(site.ask(Lane("up", 1), OPENING, 0.0).budget_bytes)
        assert sum(budgets) == together
