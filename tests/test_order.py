"""The order of training: bijections, every sample as often as the mix says, whatever happens to data and mix."""

import itertools
import random
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from data import batch_at, batches
from order import data_order, next_phase, places_of, samples_at, spread, unserved
from parallel import Ranks

pytestmark = pytest.mark.quick


class Rows(list):
    """Rows of ids as one source of data."""

    reference = None

    def number(self, source, i):
        return i


@pytest.mark.parametrize("n", [1, 2, 3, 5, 16, 17, 1000, 4097, 65_536])
def test_data_order_is_a_bijection(n):
    order = data_order(np.arange(n), n, seed=3)
    assert np.array_equal(np.sort(order), np.arange(n))
    assert [data_order(i, n, 3) for i in range(min(n, 20))] == order[:20].tolist()
    if n >= 1000:
        assert not np.array_equal(order, data_order(np.arange(n), n, seed=4))
        # As scattered as a random permutation: neighbours are n / 3 apart on average (standard error 0.24 n / sqrt(n)).
        assert abs(np.abs(np.diff(order)).mean() / n - 1 / 3) < 5 * 0.24 / n**0.5


def test_data_order_at_sizes_whose_permutation_could_not_be_stored():
    n = 10**15 + 37
    order = data_order(np.arange(100_000), n, seed=0)
    assert order.min() >= 0 and order.max() < n and len(set(order.tolist())) == 100_000
    with pytest.raises(ValueError, match="outside"):
        data_order(5, 5, 0)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_an_epoch_serves_every_sample_once_at_any_world_size(world):
    samples, phases = Rows(np.full(3, i) for i in range(100)), next_phase([], {"a zh": 100})
    batch, per_rank = 12, 12 // world
    served = []
    for step, rank in itertools.product(range(25), range(world)):
        ids, targets = batch_at(samples, phases, 7, step * batch + rank * per_rank, per_rank)
        assert ids.shape == targets.shape == (per_rank, 2)
        served += ids[:, 0].tolist()
    for epoch in range(3):
        assert Counter(served[epoch * 100 : epoch * 100 + 100]) == Counter(range(100))
    assert served[:100] != served[100:200]  # epochs differ
    ids, _ = batch_at(samples, phases, 7, 0, 300)  # and steps are the same at any world size
    assert served == ids[:, 0].tolist()


@pytest.mark.parametrize("world, n_micro, micro_batch", [(1, 6, 2), (2, 3, 2), (3, 1, 4)])
def test_the_loader_gives_each_rank_its_part_of_each_step(world, n_micro, micro_batch):
    samples = Rows(np.arange(i, i + 4) for i in range(50))
    phases = next_phase([], {"a zh": 50})
    phases[-1]["served"] = 24
    loaders = [batches(samples, phases, 7, Ranks(rank, world), n_micro, micro_batch) for rank in range(world)]
    for step in range(5):
        parts = [part for loader in loaders for part in next(loader)]
        assert len(parts) == world * n_micro and all(ids.shape == (micro_batch, 3) for ids, _ in parts)
        expected = batch_at(samples, phases, 7, 24 + 12 * step, 12)  # 24 are served already
        for got, whole in zip(zip(*parts), expected):
            assert np.array_equal(np.concatenate(got), whole)


def test_places_are_spread_evenly_and_exact_after_each_round():
    rng = random.Random(0)
    for _ in range(100):
        places = [rng.choice([0, 1, rng.randrange(50), rng.randrange(5000)]) for _ in range(rng.randrange(1, 7))]
        total = sum(places)
        if not total:
            continue
        before = [0] * len(places)
        for n in range(1, min(total, 2000) + 1):
            counts = spread(places, n)
            assert sorted(b - a for a, b in zip(before, counts)) == [0] * (len(places) - 1) + [1]
            assert all(abs(count - Fraction(n * own, total)) < len(places) for count, own in zip(counts, places))
            before = counts
        assert spread(places, 3 * total) == [3 * own for own in places]


class Account:
    """What must come, kept slowly: of each source a list that its epochs empty, and the places left of the round."""

    def __init__(self):
        self.samples, self.lists, self.round, self.places = {}, {}, Counter(), Counter()

    def begin(self, samples, places, goes_on):
        for source, n in samples.items():
            self.lists[source] = self.lists.get(source, []) + list(range(self.samples.get(source, 0), n))
        if goes_on:
            self.round = Counter(
                {source: self.round[source] + own - self.places[source] for source, own in places.items()}
            )
        else:
            self.round = Counter(places)
        self.samples, self.places = samples, Counter(places)

    def serve(self, source, i):
        if not any(self.round.values()):
            self.round = Counter(self.places)
        self.round[source] -= 1
        assert self.round[source] >= 0, "a source has more places in a round than the mix gives it"
        self.lists[source] = self.lists[source] or list(range(self.samples[source]))
        self.lists[source].remove(i)  # an error if it is served twice in an epoch


def test_every_sample_comes_as_often_as_the_mix_says_in_200_random_histories():
    """Sources grow and appear, and the mix changes, at any moment."""
    rng = random.Random(0)
    for _ in range(200):
        phases, account, samples, mix = [], Account(), {}, {}
        for phase in range(rng.randrange(1, 6)):
            new_mix = phase == 0 or rng.random() < 0.3
            for source in rng.sample(["a zh", "b zh", "c en", "d code"], rng.randrange(1, 4)):
                samples = samples | {source: samples.get(source, 0) + rng.randrange(1, 40)}
            if new_mix:
                share = rng.random() < 0.3
                names = rng.sample(list(samples), rng.randrange(1, len(samples) + 1))
                mix = {"mix": ",".join(f"{name}={rng.choice(['0.3', '1', '2', '2.5'])}" for name in names)}
                mix = {"shares": ",".join(f"{name}=1/{len(names)}" for name in names)} if share else mix
            places, goes_on = places_of(samples, **mix), not new_mix and "mix" in mix
            phases = next_phase(phases, samples, places, goes_on)
            account.begin(samples, places, goes_on)
            count = rng.randrange(0, 150)
            got = samples_at(0, count, phases, "seed")
            for source, i in got:
                account.serve(source, i)
            for _ in range(3):  # any part of it by itself
                first = rng.randrange(0, count + 1)
                part = rng.randrange(0, count + 1 - first)
                assert samples_at(first, part, phases, "seed") == got[first : first + part]
            phases[-1]["served"] = count
            assert Counter(unserved(phases)) == account.round


SAMPLES = {"web zh": 1000, "web en": 300, "wiki zh": 10, "code code": 500}


@pytest.mark.parametrize(
    "flags, places",
    [
        ({}, (1000, 300, 10, 500)),
        ({"mix": "wiki=3,code=0.5"}, (1000, 300, 30, 250)),
        ({"mix": "zh=2"}, (2000, 300, 20, 500)),
        ({"mix": "web zh=0,wiki=0.01"}, (0, 300, 1, 500)),
        ({"shares": "zh=0.8,en=0.1,code=0.1"}, (800, 101, 8, 101)),  # of 1,010
        ({"shares": "web=1"}, (10, 3, 0, 0)),
        ({"shares": "web zh=1/3,code=2/3"}, (1, 0, 0, 2)),
    ],
    ids=str,
)
def test_a_round_has_the_places_that_the_mix_says(flags, places):
    assert places_of(SAMPLES, **flags) == dict(zip(SAMPLES, places))


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"mix": "news=2"}, "--mix news: the data have web zh, web en, wiki zh, code code: name one"),
        ({"mix": "web"}, "--mix web: expected a name and a number, such as web=2"),
        ({"mix": "web=x"}, "expected a name and a number"),
        ({"mix": "web=-1"}, "expected 0 or more"),
        ({"mix": "web=2,zh=1"}, "--mix: web and zh both mean web zh: name it once"),
        ({"mix": "web=0,wiki=0,code=0"}, "nothing is left to train on"),
        ({"shares": "zh=0.8,en=0.1"}, "--mix-share zh=0.8,en=0.1: the shares add up to 0.9, expected 1"),
    ],
    ids=str,
)
def test_a_mix_that_cannot_be_gets_one_line(flags, message):
    with pytest.raises(ValueError) as error:
        places_of(SAMPLES, **flags)
    assert message in str(error.value) and "\n" not in str(error.value)
