from __future__ import annotations

import io
import threading
from typing import Any

import pytest
from rich.console import Console

from parablock.experiment.progress import LiveProgress, PlainProgress, make_progress
from parablock.report.units import format_bytes, format_duration, sparkline


def row(round_index: int, **changes: Any) -> dict[str, Any]:
    facts = {"block_index": 3, "train_loss": 2.8712, "round_s": 3.24, "uplink_bytes": 1_200_000}
    return {"round_index": round_index, **facts, "downlink_bytes": 800_000, **changes}


class SteppedClock:
    """A clock that moves only when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def file_console(**options: Any) -> Console:
    return Console(file=io.StringIO(), width=40, **options)


def lines_of(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def picture_of(progress: LiveProgress, *, encoding: str = "utf-8") -> str:
    console = Console(file=io.TextIOWrapper(io.BytesIO(), encoding=encoding), width=100, record=True)
    console.print(progress)
    return console.export_text()


@pytest.fixture
def live():
    console = Console(file=io.StringIO(), width=100, height=60, force_terminal=True, _environ={})
    with LiveProgress(console=console, now_s=SteppedClock()) as progress:
        yield progress


# --- plain lines


def test_a_plain_line_tells_round_block_losses_bytes_time_and_eta_unwrapped():
    console, clock = file_console(), SteppedClock()
    with PlainProgress(console=console, now_s=clock) as progress:
        progress.start(64, 8, 0)
        clock.now = 24.0  # 12 rounds in 24 s: the other 52 take 104 s
        progress.round_done(row(11, eval_loss=2.9))
    assert lines_of(console) == [
        "rounds 1 to 64, 8 clients",
        "round 12/64  block 3  train 2.871  eval 2.900  1.2 MB up 800.0 kB down  3.2 s  ETA 104 s",
    ]


@pytest.mark.parametrize(("num_rounds", "first_round"), [(8, 0), (1000, 0), (1000, 500), (1, 0)])
def test_plain_lines_of_a_long_run_are_thinned_but_keep_both_ends(num_rounds: int, first_round: int):
    console = file_console()
    progress = PlainProgress(console=console)
    progress.start(num_rounds, 8, first_round)
    for round_index in range(first_round, num_rounds):
        progress.round_done(row(round_index))
    shown = [int(line.split("/")[0].removeprefix("round ")) for line in lines_of(console)[1:]]
    assert (shown[0], shown[-1]) == (first_round + 1, num_rounds)
    assert len(shown) == num_rounds - first_round if num_rounds < 100 else 100 <= len(shown) <= 102


def test_every_evaluation_is_shown_even_where_lines_are_thinned():
    console = file_console()
    progress = PlainProgress(console=console)
    progress.start(1000, 8, 0)
    for round_index in range(1000):
        progress.round_done(row(round_index, eval_loss=2.5 if round_index in (332, 777) else None))
    evaluated = [line[:10] for line in lines_of(console) if "eval" in line]
    assert evaluated == ["round  333", "round  778"]


@pytest.mark.parametrize("num_blocks", [1, 2])
def test_a_block_is_named_where_there_is_more_than_one(num_blocks: int):
    console = file_console()
    progress = PlainProgress(console=console)
    progress.start(4, 2, 0, num_blocks=num_blocks)
    progress.round_done(row(0))
    live = LiveProgress(console=console)
    live.start(4, 2, 0, num_blocks=num_blocks)
    live.close()
    console.print(live)
    assert sum("block" in line for line in lines_of(console)) == (3 if num_blocks > 1 else 0), lines_of(console)


def test_the_eta_after_a_resume_is_paced_by_the_rounds_of_this_session_alone():
    console, clock = file_console(), SteppedClock()
    progress = PlainProgress(console=console, now_s=clock)
    progress.start(100, 8, 90)
    clock.now = 50.0  # rounds 90 … 94, ten seconds each: five more
    progress.round_done(row(94, eval_loss=1.0))
    assert lines_of(console)[-1].endswith("ETA 50 s")


def test_the_first_round_which_waited_for_sites_does_not_pace_the_others():
    console, clock = file_console(), SteppedClock()
    progress = PlainProgress(console=console, now_s=clock)
    progress.start(24, 8, 0)
    for number, clock.now in enumerate((100.0, 101.0, 102.0)):
        progress.round_done(row(number))
    first, second, third = (line.rpartition("ETA ")[2] for line in lines_of(console)[-3:])
    assert (first, second, third) == ("38 min", "22 s", "21 s")


def test_a_log_says_how_far_a_long_stage_or_round_is_and_is_silent_otherwise():
    console, clock = file_console(), SteppedClock()
    progress = PlainProgress(console=console, now_s=clock)
    progress.stage("scoring the base model", 256)
    for clock.now, count in ((10.0, 16), (40.0, 64), (45.0, 80)):
        progress.done(count)
    progress.stage("saving", is_brief=True)
    progress.start(48, 2, 0)
    for number, clock.now in enumerate((50.0, 60.0, 120.0), start=1):
        progress.step(1, number, 8)
    assert lines_of(console) == [
        "scoring the base model",
        "scoring the base model  64/256  40 s  ETA 2 min",
        "rounds 1 to 48, 2 clients",
        # 3 of 8 steps of one of two clients: 3/16 of a round in 75 s, so 47 13/16 rounds take 319 min
        "round 1/48  client 1  step 3/8  75 s  ETA 5 h 19 min",
    ]


STOPPING = "stopping at the next round and saving: waiting for "


def test_what_a_stop_waits_for_is_the_rest_of_the_round():
    clock = SteppedClock()
    progress = PlainProgress(console=file_console(), now_s=clock)
    assert progress.awaited() == ""
    progress.start(48, 1, 0)
    assert progress.awaited() == f"{STOPPING}the end of round 1"
    clock.now = 30.0
    for number in (1, 2):
        progress.step(0, number, 8)
    assert progress.awaited() == f"{STOPPING}the end of round 1, about 90 s"  # a quarter took 30 s
    progress.round_done(row(0))
    assert (
        progress.awaited() == f"{STOPPING}the end of round 2, about 30 s"
    )  # a round in 30 s, and none of this one
    progress.rounds_over()
    assert progress.awaited() == "the rounds are over: the model is being scored and written"


def test_a_run_that_stops_gives_no_time_for_the_rest_of_its_rounds():
    clock, console = SteppedClock(), file_console()
    progress = PlainProgress(console=console, now_s=clock)
    progress.start(48, 1, 0, delay=1)
    progress.round_done(row(0))
    for clock.now in (60.0, 120.0):
        progress.step(0, int(clock.now / 60), 8)
        progress.awaited()
    before, after = lines_of(console)[-2:]
    assert "ETA" in before
    assert after.endswith("stopping after what has begun") and "ETA" not in after


def test_a_stop_that_waits_for_no_time_names_none():
    clock = SteppedClock()
    progress = PlainProgress(console=file_console(), now_s=clock)
    progress.start(48, 1, 0)
    clock.now = 0.01  # as with a virtual clock
    progress.round_done(row(0))
    assert progress.awaited() == f"{STOPPING}the end of round 2"


def test_a_cohort_that_is_a_part_of_the_clients_makes_a_round():
    clock = SteppedClock()
    progress = LiveProgress(console=file_console(force_terminal=True, _environ={}), now_s=clock)
    progress.start(10, 8, 0, 2)
    progress.close()
    clock.now = 5.0
    for client_id in (3, 6):
        for number in range(1, 5):
            progress.step(client_id, number, 4)
    assert "ETA 45 s" in picture_of(progress)  # one round of ten in 5 s


def test_a_message_is_shown_as_it_is_though_it_looks_like_markup():
    console = file_console()
    PlainProgress(console=console).message("[bold]read[/nothing] 3 files")
    assert lines_of(console) == ["[bold]read[/nothing] 3 files"]


# --- the live display


def test_the_picture_shows_round_block_losses_total_bytes_and_clients(live: LiveProgress):
    live.start(64, 2, 0)
    live.begins(0, "computing")
    live.begins(1, "computing")
    live.ends(1, "computing")
    live.begins(1, "waiting")
    live.begins(1, "uploading")
    live.round_done(row(0, eval_loss=3.5))
    live.round_done(row(1, block_index=4, train_loss=2.5))
    words = " ".join(picture_of(live).split())
    assert "2/64" in words and "block 4" in words
    assert "train loss 2.500 █▁" in words and "eval loss 3.500 ▁" in words
    assert "sent 2.4 MB up, 1.6 MB down" in words
    assert "client 0 ███████ ······· ······· client 1 ······· ▲▲▲▲▲▲▲ ·······" in words
    assert "eval loss 2.500" not in words


def test_the_picture_moves_with_every_step_from_the_first_one():
    console, clock = Console(file=io.StringIO(), width=100, force_terminal=True, _environ={}), SteppedClock()
    with LiveProgress(console=console, now_s=clock) as progress:
        progress.start(48, 2, 0)
        pictures = [picture_of(progress)]
        for number in range(1, 4):
            clock.now += 4.0
            progress.step(0, number, 8)
            pictures.append(picture_of(progress))
    assert len(set(pictures)) == 4
    words = " ".join(pictures[-1].split())
    # 3 of 8 steps of one of two clients: 3/16 of a round in 12 s, so 47 13/16 rounds take 51 min
    assert "round 0/48" in words and "12 s ETA 51 min" in words
    assert "client 0 ······· ······· ······· 3/8" in words


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_the_picture_moves_also_where_nothing_is_reported(encoding: str):
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console, clock = Console(file=file, width=100, force_terminal=True, _environ={}), SteppedClock()
    with LiveProgress(console=console, now_s=clock) as progress:
        progress.stage("loading the model")
        pictures = set()
        for clock.now in (0.0, 3.0, 6.0):
            pictures.add(picture_of(progress, encoding=encoding))
        assert len(pictures) == 3
        assert all("loading the model" in picture for picture in pictures)
        progress.stage("scoring", 256)
        progress.done(64)
        clock.now = 8.0
        assert "scoring  64/256  2.0 s  ETA 6.0 s" in picture_of(progress, encoding=encoding)
        progress.stage("")
        assert "scoring" not in picture_of(progress, encoding=encoding)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_the_picture_moves_in_a_long_step_whose_time_is_told_in_minutes(encoding: str):
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console, clock = Console(file=file, width=100, force_terminal=True, _environ={}), SteppedClock()
    with LiveProgress(console=console, now_s=clock) as progress:
        progress.start(2, 1, 0)
        clock.now = 600.0
        progress.round_done(row(0))
        pictures = []
        for clock.now in (600.0, 601.0, 602.0):  # within a minute, and within a local step
            pictures.append(picture_of(progress, encoding=encoding))
        told = {picture[picture.index("round") :] for picture in pictures}
        assert len(told) == 1 and "10 min  ETA 10 min" in told.pop()
        assert len(set(pictures)) > 1
    end = []
    for clock.now in (603.0, 604.0):
        end.append(picture_of(progress, encoding=encoding))
    assert end[0] == end[1] and end[0].strip().startswith("round")


def test_the_picture_says_that_a_run_scores_while_a_checkpoint_is_saved_beside_it(live: LiveProgress):
    live.start(10, 2, 0, scored_every=5)
    live.stage("scoring the model", 20, is_brief=True, scores=True)
    live.stage("saving a checkpoint", is_brief=True)  # the last client's thread does so
    live.done(16)
    both = picture_of(live)
    assert "scoring the model  16/20" in both and "saving a checkpoint" in both
    live.stage("")
    assert "scoring the model  16/20" in picture_of(live)
    assert "saving a checkpoint" not in picture_of(live)
    live.stage("", scores=True)
    assert "scoring the model" not in picture_of(live)


def test_the_eta_holds_the_scorings_that_are_due_and_falls_while_one_runs():
    console, clock = file_console(), SteppedClock()
    progress = PlainProgress(console=console, now_s=clock)
    progress.stage("scoring the base model", 20, scores=True)
    clock.now = 40.0
    progress.stage("", scores=True)
    progress.start(4, 1, 0, scored_every=2)
    etas = []

    def tell(number: int) -> None:
        progress.round_done(row(number, eval_loss=1.0))
        etas.append(lines_of(console)[-1].rpartition("  ")[2])

    clock.now = 50.0
    progress.step(0, 1, 1)
    tell(0)  # three rounds of 10 s, and the scorings after the second and the fourth
    clock.now = 60.0
    progress.step(0, 1, 1)
    progress.stage("scoring the model", 20, scores=True)
    clock.now = 90.0
    assert progress._pace.remaining() == "ETA 70 s"  # the rest of this one, two rounds, and the last scoring
    clock.now = 100.0
    progress.stage("", scores=True)
    tell(1)
    clock.now = 120.0
    progress.rounds_over()
    clock.now = 150.0
    assert progress._pace.elapsed() == "80 s"  # the rounds are over
    tell(3)
    assert etas == ["ETA 110 s", "ETA 60 s", "done"]


def test_after_a_resume_the_picture_holds_the_rounds_before(live: LiveProgress):
    live.start(6, 2, 2, earlier=[row(0, train_loss=4.0), row(1, train_loss=3.0)])
    live.round_done(row(2, train_loss=2.5))
    words = " ".join(picture_of(live).split())
    assert "sent 3.6 MB up, 2.4 MB down" in words and "train loss 2.500 █▃▁" in words


def test_the_next_run_of_a_comparison_has_a_picture_of_its_own(live: LiveProgress):
    for num_rounds in (64, 32):
        live.start(num_rounds, 2, 0)
        live.round_done(row(0))
    words = " ".join(picture_of(live).split())
    assert "1/32" in words and "/64" not in words
    assert "sent 1.2 MB up" in words


def test_clients_may_tell_from_many_threads_while_the_picture_is_drawn(live: LiveProgress):
    live.start(64, 507, 0)
    tell = [
        threading.Thread(target=lambda i=i: [live.begins(i + j, "computing") for j in range(500)])
        for i in range(8)  # the dictionary grows while it is drawn: clients 0 … 506, of which 12 are rows
    ]
    for thread in tell:
        thread.start()
    for _ in range(5):
        picture_of(live)
    for thread in tell:
        thread.join()
    assert "… and 495 more  495 of them" in picture_of(live)


def test_the_live_display_ends_its_thread_also_after_an_error():
    before = set(threading.enumerate())
    console = Console(file=io.StringIO(), width=100, force_terminal=True, _environ={})
    with pytest.raises(ZeroDivisionError), LiveProgress(console=console) as progress:
        progress.start(64, 2, 0)
        (drawing,) = set(threading.enumerate()) - before
        progress.message("[odd] line")
        progress.round_done(row(5))
        raise ZeroDivisionError
    progress.close()
    drawing.join(timeout=10)
    assert not drawing.is_alive()
    assert "[odd] line" in console.file.getvalue() and "6/64" in console.file.getvalue()
    last_picture = picture_of(progress)
    assert "6/64" in last_picture and "client" not in last_picture


# --- the choice


@pytest.mark.parametrize(
    ("terminal", "environment", "plain", "kind"),
    [
        (True, {}, None, LiveProgress),
        (True, {"TERM": "dumb"}, None, PlainProgress),
        (False, {}, None, PlainProgress),
        (True, {}, True, PlainProgress),
        (False, {}, False, LiveProgress),
    ],
)
def test_a_terminal_gets_the_live_display_unless_plain_says_otherwise(terminal, environment, plain, kind):
    console = file_console(force_terminal=terminal, _environ=environment)
    assert type(make_progress(console=console, plain=plain)) is kind


# --- numbers for people


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_960, "1.0 MB"), (1.25e9, "1.2 GB"), (3e15, "3000.0 TB")],
)
def test_bytes_are_written_in_decimal_units(num_bytes: float, text: str):
    assert format_bytes(num_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.96, "10 s"), (119, "119 s"), (120, "2 min"), (7140, "119 min"), (7260, "2 h 1 min")],
)
def test_durations_are_written_coarsely(seconds: float, text: str):
    assert format_duration(seconds) == text


def test_a_sparkline_goes_from_the_lowest_to_the_highest_value():
    assert sparkline([0, 7, 3, 1]) == "▁█▄▂"
    assert sparkline([0, 7, 3, 1], ascii_only=True) == "_#~."
    assert sparkline([2.0, 2.0]) == "▁▁"
    assert sparkline([1.0, float("nan"), 2.0]) == "▁█"
    assert sparkline([float("inf")]) == sparkline([]) == ""


def test_a_stop_in_the_last_round_says_that_the_run_ends():
    progress = PlainProgress(console=file_console())
    progress.start(4, 2, 0, delay=1)
    progress.round_done(row(0))
    assert progress.awaited() == f"{STOPPING}the end of round 2, and of what has begun of round 3"
    progress.round_done(row(1))  # the third and the fourth are under way
    assert progress.awaited().startswith("the last round has begun: the run ends with it")


def test_a_stop_that_changes_nothing_leaves_the_time_for_the_rest():
    clock, console = SteppedClock(), file_console()
    progress = PlainProgress(console=console, now_s=clock)
    progress.start(4, 2, 0, delay=1)
    for t, clock.now in enumerate((60.0, 120.0)):
        progress.round_done(row(t))
    assert progress.awaited().startswith("the last round has begun")
    clock.now = 180.0
    progress.step(0, 1, 8)
    assert "ETA" in lines_of(console)[-1] and "stopping" not in lines_of(console)[-1]
