from __future__ import annotations

import pytest

from bnexp.memory_size import format_bytes
from bnexp.statistics.lockstep import FINISHED, STOP, Lockstep
from bnexp.statistics.spill import OffloadStore


def test_all_wait_for_all():
    log = []
    lockstep = Lockstep()

    def job(number: int, rounds: int):
        def run():
            for round_ in range(rounds):
                log.append(("arrives", number, round_))
                answer = lockstep.wait(number * 10 + round_)
                log.append(("goes on", number, answer))

        return run

    def decide(items):
        log.append(("all", *items))
        return sum(item for item in items if item is not FINISHED)

    lockstep.run((job(n, 2 if n else 1) for n in range(3)), decide)
    assert log == [
        ("arrives", 0, 0),
        ("arrives", 1, 0),
        ("arrives", 2, 0),
        ("all", 0, 10, 20),
        ("goes on", 0, 30),
        ("goes on", 1, 30),
        ("arrives", 1, 1),
        ("goes on", 2, 30),
        ("arrives", 2, 1),
        ("all", FINISHED, 11, 21),
        ("goes on", 1, 32),
        ("goes on", 2, 32),
    ]


def test_stop_unwinds_the_jobs():
    unwound = []
    lockstep = Lockstep()

    def job():
        try:
            lockstep.wait(None)
        finally:
            unwound.append(True)

    lockstep.run([job, job], lambda items: STOP)
    assert unwound == [True, True]


@pytest.mark.parametrize("where", ["first leg", "second leg", "decide", "jobs"])
def test_an_exception_ends_everything(where):
    unwound = []
    lockstep = Lockstep()

    def job(number):
        def run():
            if where == "first leg" and number == 2:
                raise KeyError(where)
            try:
                lockstep.wait(number)
                if where == "second leg" and number == 1:
                    raise KeyError(where)
                lockstep.wait(number)
            finally:
                unwound.append(number)

        return run

    def jobs():
        yield from map(job, range(3))
        if where == "jobs":
            raise KeyError(where)

    def decide(items):
        if where == "decide":
            raise KeyError(where)

    with pytest.raises(KeyError, match=where):
        lockstep.run(jobs(), decide)
    assert sorted(unwound) == ([0, 1] if where == "first leg" else [0, 1, 2])


def test_the_store_uses_freed_room_again(tmp_path, monkeypatch):
    import tempfile

    import torch

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    generator = torch.Generator().manual_seed(0)
    store = OffloadStore(host_bytes=1000)
    kept = {}
    for step in range(300):
        size = int(torch.randint(1, 4000, (1,), generator=generator))
        data = torch.randint(0, 255, (size,), dtype=torch.uint8, generator=generator)
        kept[step] = (data.clone(), store.write(data.untyped_storage()))
        if len(kept) > 5:
            oldest = sorted(kept)[step % 3]
            expected, place = kept.pop(oldest)
            back = torch.zeros_like(expected)
            store.read(place, back.untyped_storage())
            assert torch.equal(back, expected)
    assert store._end < 12 * 4000
    store.close()
    assert not list(tmp_path.iterdir())


def test_sizes_for_people():
    assert [format_bytes(n) for n in (5, 2048, 150 * 2**20, 3.5 * 2**30)] == [
        "5 B",
        "2.0 KiB",
        "150 MiB",
        "3.5 GiB",
    ]
