"""Batches in one order, however often and in what parts they are gone through."""

from itertools import pairwise

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from bnexp.errors import UserError
from bnexp.evaluation.subsets import Batches, evenly


class Numbers(Dataset):
    """Says which of its samples were asked for."""

    def __init__(self, count):
        self.count, self.asked = count, []

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.asked.append(index)
        return torch.tensor([index])


def values(batches):
    return [b.flatten().tolist() for b in batches]


def test_a_loader_that_shuffles_keeps_its_order_and_loads_what_is_asked_for():
    dataset = Numbers(20)
    state = torch.get_rng_state()
    with torch.random.fork_rng([]):
        batches = Batches(DataLoader(dataset, batch_size=3, shuffle=True))
        first, second = values(batches), values(batches)
        dataset.asked.clear()
        some = values(batches.only([1, 6]))
    order = [number for batch in first for number in batch]
    assert first == second and sorted(order) == list(range(20)) != order
    assert batches.sizes == [3] * 6 + [2] and len(batches) == 7
    assert some == [first[1], first[6]]
    assert dataset.asked == first[1] + first[6]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_loader_with_a_generator_of_its_own_is_left_as_it_was():
    generator = torch.Generator().manual_seed(3)
    state = generator.get_state()
    loader = DataLoader(Numbers(8), batch_size=2, shuffle=True, generator=generator)
    batches = Batches(loader)
    assert torch.equal(generator.get_state(), state)
    assert values(batches) == values(batches)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.arange(10.0)[:, None])


class Own:
    """Batches of the user's own kind."""

    def __iter__(self):
        return iter(torch.arange(10.0)[:, None].split(4))


@pytest.mark.parametrize("source", [
    list(torch.arange(10.0)[:, None].split(4)),
    Own(),
    DataLoader(Stream(), batch_size=4),
    DataLoader(TensorDataset(torch.arange(10.0)), batch_size=4, collate_fn=torch.tensor),
    type("Loader", (DataLoader,), {})(Numbers(10), batch_size=4),
])  # fmt: skip
def test_batches_of_any_kind(source):
    batches = Batches(source)
    assert values(batches) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert values(batches.only([0, 2])) == [[0, 1, 2, 3], [8, 9]]
    assert batches.sizes == [4, 4, 2] and batches.samples == 10
    assert batches.places([0, 2]) == [0, 1, 2, 3, 8, 9]
    assert batches.spread(4) == [1] and batches.spread(100) == [0, 1, 2]


class Changing:
    """Batches of the user's own kind, others in each pass."""

    def __init__(self, *passes):
        self.passes = iter(passes)

    def __iter__(self):
        return iter(next(self.passes))


PAIRS = [(torch.zeros(2, 3), torch.tensor([0, 1])), (torch.zeros(2, 3), torch.tensor([1, 1]))]


@pytest.mark.parametrize(
    ("second", "message"),
    [(PAIRS[::-1], "batch number 0 is another"), (PAIRS[:1], "ends after 1 batches")],
)
def test_paired_batches_that_are_others_in_another_pass_are_refused(second, message):
    batches = Batches(Changing(PAIRS, PAIRS, second), "test", paired=True)
    assert len(list(batches)) == len(list(batches.only([0, 1]))) == 2
    with pytest.raises(UserError, match=rf"test is gone through several times.*{message}"):
        list(batches.only([0, 1]))


def test_batches_that_are_not_paired_may_vary_but_not_run_out():
    batches = Batches(Changing(PAIRS, PAIRS[::-1], PAIRS[:1], []), "population")
    assert [len(list(batches)) for _ in range(3)] == [2, 2, 1]
    with pytest.raises(UserError, match=r"population .*ends after 0 batches"):
        list(batches)


def test_an_infinite_sampler_is_not_drawn_to_its_end():
    class Endless:
        def __iter__(self):
            while True:
                yield [0, 1]

    loader = DataLoader(Numbers(4), batch_sampler=Endless())
    assert values(Batches(loader).only([0, 1])) == [[0, 1], [0, 1]]


@pytest.mark.parametrize(("count", "total"), [(1, 1), (1, 7), (3, 7), (7, 7), (9, 7), (50, 101)])
def test_evenly(count, total):
    numbers = evenly(count, total)
    assert len(numbers) == min(count, total) and numbers == sorted(set(numbers))
    gaps = [b - a for a, b in pairwise(numbers)]
    assert numbers[0] >= 0 and numbers[-1] < total
    assert not gaps or max(gaps) - min(gaps) <= 1
