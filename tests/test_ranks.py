"""Several ranks: they meet, agree on where they are, and fail together."""

from __future__ import annotations

import threading
import time
from datetime import timedelta

import numpy as np
import pytest
import torch
from conftest import wait_for
from several import interrupt_me, kill_me, run_ranks, values
from torch import nn

import bnexp
from bnexp.errors import Interrupted, NotFinite, RunFailed, UserError
from bnexp.ranks import Alone, TorchRanks, choose_ranks, refuse_launcher
from bnexp.statistics.moments import Moments

# Seconds within which a failure reaches all ranks; generous, as the machine may be busy.
SOON = 60.0


def test_alone_everything_is_its_own():
    ranks = Alone()
    assert (ranks.rank, ranks.size) == (0, 1)
    assert ranks.gather("a", "here") == ["a"]
    assert ranks.broadcast("a", "here") == "a"
    ranks.agree("a", "here")
    with pytest.raises(ZeroDivisionError), ranks.together("this"):
        raise ZeroDivisionError


def test_torch_ranks_need_a_process_group():
    with pytest.raises(UserError, match="TorchRanks needs a process group"):
        TorchRanks()


def test_a_process_by_itself_need_not_choose():
    assert choose_ranks(None, "this") == choose_ranks(Alone(), "this") == Alone()


def test_launchers_of_several_processes_are_refused(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    refuse_launcher("bnexp train")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    refuse_launcher("bnexp train")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="bnexp train was started 2 times by a launcher"):
        refuse_launcher("bnexp train")


def asked_to_choose(rank):
    said = []
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    batches = [torch.randn(8, 3)]
    labelled = [(batches[0], torch.zeros(8, dtype=torch.int64))]
    for attempt in (
        lambda ranks: bnexp.StatisticsTracker(model, {"a": bnexp.Ema(0.9)}, ranks=ranks).close(),
        lambda ranks: bnexp.recompute_statistics(model, batches, ranks=ranks),
        lambda ranks: bnexp.audit(model, labelled, labelled, ranks=ranks),
    ):
        try:
            attempt(None)
            said.append("accepted")
        except UserError as error:
            said.append(str(error))
        attempt(Alone())
    return said


@pytest.mark.slow
def test_one_of_several_ranks_is_asked_to_choose():
    for said in values(run_ranks(asked_to_choose, 2)):
        for line in said:
            assert "one of 2 ranks" in line and "\n" not in line
            assert "ranks=bnexp.TorchRanks()" in line and "ranks=bnexp.Alone()" in line


SENT = [
    None,
    {"a": (1, 2.5, "text")},
    np.arange(6, dtype=np.float32).reshape(2, 3),
    torch.arange(5, dtype=torch.float64),
    torch.tensor(3.5, dtype=torch.bfloat16),
    torch.zeros(0, 3, dtype=torch.int64),
    torch.randn(4, 6).t(),
    Moments(7, torch.tensor([1.0, 2.0]).double(), torch.tensor([3.0, 4.0]).double()),
    bytes(range(256)) * 300,  # several messages
]


def same(a, b):
    if isinstance(a, Moments):
        return a.count == b.count and same(a.mean, b.mean) and same(a.m2, b.m2)
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return np.array_equal(a, b) and a.dtype == b.dtype if isinstance(a, np.ndarray) else a == b


def what_is_gathered(rank):
    ranks = TorchRanks()
    assert (ranks.rank, ranks.size) == (rank, 3)
    with ranks.together("gathering"):
        for value in SENT:
            found = ranks.gather((rank, value), "a value")
            assert [r for r, _ in found] == [0, 1, 2]
            assert all(same(other, value) for _, other in found)
        with torch.device("meta"), torch.inference_mode():
            assert ranks.gather(rank, "elsewhere") == [0, 1, 2]
        # Of different lengths, the longest in the middle.
        found = ranks.gather(bytes([rank]) * (50_000 * (rank % 2)), "unequal")
        assert found == [b"", b"\1" * 50_000, b""]
        assert ranks.broadcast(rank, "from the last", root=2) == 2
        ranks.agree({"method": "exact"}, "the method")
    again = TorchRanks()
    return again.gather(rank, "made again")


@pytest.mark.slow
def test_ranks_gather_in_their_order():
    torch.manual_seed(0)
    assert values(run_ranks(what_is_gathered, 3)) == [[0, 1, 2]] * 3


def in_a_part_of_the_group(rank):
    group = torch.distributed.new_group([1, 2])
    if rank == 0:
        with pytest.raises(UserError, match="not in the process group"):
            TorchRanks(group)
        return None
    ranks = TorchRanks(group)
    return ranks.rank, ranks.gather(rank, "here")


@pytest.mark.slow
def test_a_group_may_be_a_part_of_the_processes():
    assert values(run_ranks(in_a_part_of_the_group, 3)) == [None, (0, [1, 2]), (1, [1, 2])]


def raising(error):
    raise error


def failing(rank, case):
    """Rank 1 fails in the third of five meetings; the others must learn of it."""
    ranks = TorchRanks()
    with ranks.together("the work"):
        for turn in range(5):
            if rank == 1 and turn == 2:
                FAULTS[case]()
            ranks.gather(turn, f"turn {turn}")


def failing_inside(rank):
    """Whoever catches the error of another rank can't go on with the others' work."""
    ranks = TorchRanks()
    with ranks.together("outer"), ranks.together("inner"):
        if rank == 1:
            raise NotFinite("NaN in layer 'a'")
        try:
            ranks.gather(None, "here")
        except UserError as error:
            raise KeyError("turned into something else") from error


def failing_at_different_places(rank):
    ranks = TorchRanks()
    with ranks.together("the work"):
        ranks.gather(None, "layer 'a'")
        ranks.gather(None, "layer 'b'" if rank else "layer 'c'")


def one_meeting_more(rank):
    ranks = TorchRanks()
    with ranks.together("the work"):
        for _ in range(3 + rank):
            ranks.gather(None, "a turn")


def disagreeing(rank):
    ranks = TorchRanks()
    with ranks.together("the work"):
        ranks.agree({"method": "exact" if rank < 2 else "pooled"}, "the arguments")


def failing_at_once(rank):
    with TorchRanks().together("the work"):
        raise UserError(f"fault {rank}")


def failing_within_a_long_value(rank):
    ranks = TorchRanks()
    with ranks.together("the work"):
        raise_at = ranks._line.exchange
        if rank == 1:
            rounds = iter(range(3))

            def exchange(message, size):
                if next(rounds) == 2:
                    ranks._line.exchange = raise_at
                    raise UserError("between two messages")
                return raise_at(message, size)

            ranks._line.exchange = exchange
        ranks.gather(bytes(200_000), "a long value")


def not_to_be_sent(rank):
    ranks = TorchRanks()
    with ranks.together("the work"):
        ranks.gather((lambda: 0) if rank == 1 else 0, "a value")


FAULTS = {
    "user": lambda: raising(UserError("the loader gives strings")),
    "finite": lambda: raising(NotFinite("NaN in layer 'a'")),
    "run": lambda: raising(RunFailed("the loss is NaN")),
    "disk": lambda: raising(OSError(28, "No space left on device", "spill")),
    "memory": lambda: raising(MemoryError("5 GiB")),
    "bug": lambda: raising(IndexError("list index out of range")),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "case, kind, text",
    [
        ("user", UserError, "rank 1: the loader gives strings"),
        ("finite", NotFinite, "rank 1: NaN in layer 'a'"),
        ("run", RunFailed, "rank 1: the loss is NaN"),
        ("disk", RunFailed, "rank 1: the disk is full (spill)"),
        ("memory", RunFailed, "rank 1: out of memory (MemoryError: 5 GiB)"),
        ("bug", RunFailed, "rank 1: IndexError: list index out of range"),
    ],
)
def test_an_error_of_one_rank_is_raised_on_all(case, kind, text):
    for outcome in run_ranks(failing, 3, case, deadline=SOON):
        assert type(outcome.error) is kind, outcome.trace
        assert str(outcome.error) == text


@pytest.mark.slow
@pytest.mark.parametrize(
    "function, kind, text",
    [
        (failing_inside, NotFinite, "rank 1: NaN in layer 'a'"),
        (failing_at_once, UserError, "rank 0: fault 0"),
        (failing_within_a_long_value, UserError, "rank 1: between two messages"),
        (
            failing_at_different_places,
            RunFailed,
            "the ranks are at different places: rank 0 at \"layer 'c'\", rank 1 at \"layer 'b'\"",
        ),
        (
            one_meeting_more,
            RunFailed,
            "the ranks are at different places: rank 0 at 'the end of the work', rank 1 at "
            "'a turn'",
        ),
        (
            disagreeing,
            UserError,
            "the arguments: rank 0 has {'method': 'exact'}, rank 2 has {'method': 'pooled'}: give "
            "all ranks the same",
        ),
    ],
)
def test_all_ranks_raise_the_same(function, kind, text):
    size = 2 if function is one_meeting_more else 3
    for outcome in run_ranks(function, size, deadline=SOON):
        assert type(outcome.error) is kind, outcome.trace
        assert str(outcome.error) == text


@pytest.mark.slow
def test_what_cannot_be_sent_is_an_error_on_all():
    for outcome in run_ranks(not_to_be_sent, 2, deadline=SOON):
        assert type(outcome.error) is RunFailed
        assert str(outcome.error).startswith("rank 1: ")


def interrupted(rank, waiting, folder):
    """Ctrl-C on rank 1, at work or while it waits for the others."""
    pressed = folder / "pressed"

    def press():
        time.sleep(0.3)
        interrupt_me()
        pressed.touch()

    ranks = TorchRanks()
    with ranks.together("the work"):
        ranks.gather(None, "before")
        if rank == 1:
            if waiting:
                threading.Thread(target=press).start()
            else:
                interrupt_me()
        elif waiting:
            wait_for(pressed.exists)
        for _ in range(5):
            ranks.gather(None, "after")


@pytest.mark.slow
@pytest.mark.parametrize("waiting", [False, True])
def test_an_interrupted_rank_interrupts_all(waiting, tmp_path):
    outcomes = run_ranks(interrupted, 3, waiting, tmp_path, deadline=SOON)
    found = [outcome.error for outcome in outcomes]
    assert type(found[1]) is KeyboardInterrupt
    for error in (found[0], found[2]):
        assert type(error) is Interrupted and str(error) == "rank 1: interrupted"


def killed(rank):
    ranks = TorchRanks()
    with ranks.together("the work"):
        ranks.gather(None, "before")
        if rank == 1:
            kill_me()
        try:
            ranks.gather(None, "after")
        finally:
            start = time.monotonic()
    return start


@pytest.mark.slow
def test_a_killed_rank_ends_the_others():
    outcomes = run_ranks(killed, 4, deadline=SOON)
    for rank in (0, 2, 3):
        assert type(outcomes[rank].error) is RunFailed
        assert str(outcomes[rank].error).startswith("at 'after': another rank was killed")


def hung_seen_by_rank_0(rank, folder):
    """Rank 1 comes when rank 0 has given up."""
    ranks = TorchRanks()
    if rank == 1:
        wait_for((folder / "timed out").exists)
        with pytest.raises(RunFailed):
            ranks.gather(None, "after")
        return None
    # Not before they have met, which takes longer on a busy machine.
    torch.distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=1), ranks._line._group)
    with pytest.raises(RunFailed, match="does not answer in time"), ranks.together("the work"):
        ranks.gather(None, "after")
    with pytest.raises(RunFailed, match="lost before"):
        TorchRanks().gather(None, "again")
    (folder / "timed out").touch()
    return "timed out"


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_others_by_the_timeout(tmp_path):
    assert values(run_ranks(hung_seen_by_rank_0, 2, tmp_path)) == ["timed out", None]


def beside_other_collectives(rank):
    """Its messages don't meet those of a DDP that goes on at the same time."""
    ranks = TorchRanks()
    work = torch.distributed.all_reduce(torch.ones(1000), async_op=True)
    with ranks.together("the work"):
        if rank == 1:
            raise UserError("rank 1 only")
        ranks.gather(None, "here")
    work.wait()


@pytest.mark.slow
def test_a_failure_beside_other_collectives():
    for outcome in run_ranks(beside_other_collectives, 2, deadline=SOON):
        assert str(outcome.error) == "rank 1: rank 1 only"


def failing_and_going_on(rank):
    """What was said of one failure does not end what comes after it."""
    ranks = TorchRanks()
    found = []
    for turn in range(3):
        try:
            with ranks.together("the work"):
                if rank == turn % 2:
                    raise UserError(f"turn {turn}")
                for _ in range(3):
                    time.sleep(0.6)
                    ranks.heed()
        except UserError as error:
            found.append(str(error))
        with ranks.together("more work"):
            for _ in range(2):
                time.sleep(0.6)
                ranks.heed()
            found.append(ranks.gather(rank, "after it"))
    return found


@pytest.mark.slow
def test_ranks_go_on_after_a_failure():
    expected = ["rank 0: turn 0", [0, 1], "rank 1: turn 1", [0, 1], "rank 0: turn 2", [0, 1]]
    assert values(run_ranks(failing_and_going_on, 2)) == [expected] * 2


def ending(rank):
    ranks = TorchRanks()
    ranks.gather(None, "before")
    if rank == 0:
        time.sleep(1)
    came = time.monotonic()
    ranks.let_rank_0_end()
    return came, time.monotonic()


@pytest.mark.slow
def test_ranks_that_end_wait_until_rank_0_can_speak():
    (came, _), *others = values(run_ranks(ending, 3, deadline=SOON))
    for _, went in others:
        assert went > came


def left_alone(rank, folder):
    """Rank 0 comes to its end when rank 1 has."""
    ranks = TorchRanks()
    ranks.gather(None, "before")
    if rank == 0:
        wait_for((folder / "gone").exists)
    ranks.let_rank_0_end()
    (folder / "gone").touch()


@pytest.mark.slow
def test_ranks_that_end_do_not_wait_for_ever(tmp_path):
    values(run_ranks(left_alone, 2, tmp_path, deadline=2 * SOON))
