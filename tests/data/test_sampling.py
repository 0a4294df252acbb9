"""How often each slice is drawn: shares worked out by hand, PyTorch's sampler where nothing is set, and no process
draws another epoch than the others."""

import logging

import numpy as np
import pytest
from torch.utils.data import DistributedSampler

from scripts.data.sampling import SliceSampler, draw_slices, set_shares, slice_weights
from scripts.errors import ConfigError

OPTIONS = ({"empty_share": 0.2}, {"balance": "classes"}, {"set_power": 0.5}, {"set_floor": 0.4})


class Drawn:
    """Slices (N, K) of data sets, without images."""

    def __init__(self, present, sets=None):
        self.present = np.array(present, dtype=bool)
        self.sets = ["a"] * len(self.present) if sets is None else list(sets)

    def __len__(self):
        return len(self.present)

    def __getitem__(self, index):
        return index


# The shares of the sets


@pytest.mark.parametrize(
    ("sizes", "options", "expected"),
    [
        ([900, 100], {}, [0.9, 0.1]),
        ([900, 100], {"power": 1.0}, [0.9, 0.1]),
        ([900, 100], {"power": 0.0}, [0.5, 0.5]),
        ([900, 100], {"power": 0.5}, [0.75, 0.25]),  # 30 to 10
        ([100, 900], {"power": 0.5}, [0.25, 0.75]),
        ([900, 100], {"floor": 0.2}, [0.8, 0.2]),
        ([900, 100], {"floor": 0.05}, [0.9, 0.1]),
        ([900, 100], {"floor": 0.0}, [0.9, 0.1]),
        ([900, 100], {"floor": 0.5}, [0.5, 0.5]),
        ([600, 300, 100], {"floor": 0.2}, [0.8 * 2 / 3, 0.8 / 3, 0.2]),
        # The smallest is raised to 0.28, which leaves 0.72: a third of that is 0.24 and has to be raised in turn.
        ([600, 300, 100], {"floor": 0.28}, [0.44, 0.28, 0.28]),
        ([600, 300, 100], {"floor": 1 / 3}, [1 / 3, 1 / 3, 1 / 3]),
        ([10**6, 1], {"power": 0.5, "floor": 0.1}, [0.9, 0.1]),
        ([7], {"power": 0.5, "floor": 0.3}, [1.0]),
        ([7], {"floor": 1.0}, [1.0]),
    ],
)
def test_shares_of_sets_by_hand(sizes, options, expected):
    assert set_shares(np.array(sizes), **options) == pytest.approx(expected)


def test_a_floor_for_too_many_sets():
    with pytest.raises(ConfigError, match=r"set_floor 0\.4 cannot hold for 3 data sets; it is 0\.333 at most"):
        set_shares(np.array([5, 5, 5]), floor=0.4)


@pytest.mark.parametrize("options", [{"power": -1.0}, {"floor": -0.1}])
def test_shares_below_nothing(options):
    with pytest.raises(ConfigError, match="set_power and set_floor are 0 or more"):
        set_shares(np.array([5, 5]), **options)


# The weights of the slices

# Two empty slices; class 0 on three, class 1 on one of these and on one of its own.
PRESENT = np.array([[0, 0], [1, 0], [1, 0], [1, 1], [0, 1], [0, 0]], dtype=bool)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1 / 6] * 6),
        ({"empty_share": 0.5}, [1 / 4, 1 / 8, 1 / 8, 1 / 8, 1 / 8, 1 / 4]),
        ({"empty_share": 0.0}, [0, 1 / 4, 1 / 4, 1 / 4, 1 / 4, 0]),
        ({"empty_share": 1.0}, [1 / 2, 0, 0, 0, 0, 1 / 2]),
        # Of the four slices with a class: half the draws by class 0, a sixth each; half by class 1, a quarter each.
        ({"empty_share": 0.0, "balance": "classes"}, [0, 1 / 6, 1 / 6, 1 / 6 + 1 / 4, 1 / 4, 0]),
        # Left alone, a third of the slices is empty.
        ({"balance": "classes"}, [1 / 6, 1 / 9, 1 / 9, 2 / 3 * 5 / 12, 1 / 6, 1 / 6]),
    ],
)
def test_weights_of_one_set_by_hand(options, expected):
    assert slice_weights(PRESENT, ["a"] * 6, **options) == pytest.approx(expected)
    assert slice_weights(PRESENT, ["a"] * 6, set_power=0.5, set_floor=0.1, **options) == pytest.approx(expected)


# Set x: slices 0, 2, 3 (one of them empty); set y: slice 1, never empty.
MIXED = np.array([[0, 0], [0, 1], [1, 0], [1, 0]], dtype=bool)
SETS = ["x", "y", "x", "x"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"set_power": 1.0}, [1 / 4] * 4),
        ({"set_power": 0.0}, [1 / 6, 1 / 2, 1 / 6, 1 / 6]),
        ({"set_floor": 0.4}, [0.2, 0.4, 0.2, 0.2]),
        # The share of empty slices holds in the set that has both kinds.
        ({"set_power": 0.0, "empty_share": 0.5}, [1 / 4, 1 / 2, 1 / 8, 1 / 8]),
        # Without shares of sets all slices are one pool, in which the classes are balanced.
        ({"balance": "classes"}, [1 / 4, 3 / 8, 3 / 16, 3 / 16]),
        ({"empty_share": 0.5}, [1 / 2, 1 / 6, 1 / 6, 1 / 6]),
        ({"set_power": 1.0, "balance": "classes"}, [1 / 4] * 4),
    ],
)
def test_weights_of_two_sets_by_hand(options, expected):
    assert slice_weights(MIXED, SETS, **options) == pytest.approx(expected)


@pytest.mark.parametrize("empty_share", [0.0, 0.3, 1.0, None])
@pytest.mark.parametrize("balance", [None, "classes"])
@pytest.mark.parametrize("kind", [False, True])
def test_slices_of_one_kind_are_drawn_all_the_same(empty_share, balance, kind):
    present = np.full((4, 2), kind)
    weights = slice_weights(present, ["a"] * 4, empty_share=empty_share, balance=balance)
    assert weights == pytest.approx([1 / 4] * 4)


def test_a_class_that_no_slice_shows_takes_no_part():
    present = np.array([[1, 0, 0], [1, 0, 0], [0, 0, 1]], dtype=bool)
    assert slice_weights(present, ["a"] * 3, balance="classes") == pytest.approx([1 / 4, 1 / 4, 1 / 2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"empty_share": 1.1}, r"empty_share lies in 0\.\.\.1 or is null, not 1\.1"),
        ({"empty_share": -0.1}, r"empty_share lies in 0\.\.\.1 or is null, not -0\.1"),
        ({"balance": "sets"}, "balance is 'classes' or null, not 'sets'"),
        ({"set_floor": 0.6}, r"set_floor 0\.6 cannot hold for 2 data sets"),
    ],
)
def test_options_that_cannot_be_met(options, message):
    with pytest.raises(ConfigError, match=message):
        slice_weights(MIXED, SETS, **options)


# The draws


def test_equal_weights_draw_every_slice_once():
    for seed in range(20):
        drawn = draw_slices(np.full(37, 1 / 37), np.arange(37) % 3, count=37, rng=np.random.default_rng(seed))
        assert sorted(drawn) == list(range(37))


def test_every_slice_is_drawn_as_often_as_its_weight_says():
    weights = np.array([0.0, 0.5, 0.31, 0.0, 0.19])
    totals = np.zeros(5)
    for seed in range(400):
        drawn = draw_slices(weights, np.zeros(5), count=10, rng=np.random.default_rng(seed))
        counts = np.bincount(drawn, minlength=5)
        assert (counts >= np.floor(weights * 10)).all()
        assert (counts <= np.ceil(weights * 10)).all()
        totals += counts
    # Four standard deviations of 400 draws that are rounded up or down.
    assert totals / 4000 == pytest.approx(weights, abs=4 * 0.5 / np.sqrt(400) / 10)


def test_strata_have_their_share_in_every_drawing():
    """Each slice would be drawn 0.55 times; a stratum of 20 of them is drawn 11 times."""
    strata = np.repeat([0, 1, 2], [20, 20, 10])
    weights = np.repeat([0.55 / 50, 0.55 / 50, 28 / 500], [20, 20, 10])
    shuffled = np.random.default_rng(5).permutation(50)
    slices = set()
    for seed in range(20):
        drawn = draw_slices(weights[shuffled], strata[shuffled], count=50, rng=np.random.default_rng(seed))
        assert np.bincount(strata[shuffled][drawn]).tolist() == [11, 11, 28]
        slices |= set(drawn.tolist())
    assert slices == set(range(50))


def test_draws_come_in_random_order():
    weights, strata = np.array([0.5, 0.5]), np.array([0, 1])
    firsts = {int(draw_slices(weights, strata, count=8, rng=np.random.default_rng(seed))[0]) for seed in range(20)}
    assert firsts == {0, 1}


# The sampler


@pytest.mark.parametrize("replicas", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 7, 24])
def test_without_options_it_is_the_sampler_of_pytorch(replicas, count):
    dataset = Drawn(np.zeros((count, 2)))
    for rank in range(replicas):
        ours = SliceSampler(dataset, num_replicas=replicas, rank=rank, seed=3)
        theirs = DistributedSampler(dataset, num_replicas=replicas, rank=rank, shuffle=True, seed=3)
        for epoch in (0, 1, 5):
            ours.set_epoch(epoch)
            theirs.set_epoch(epoch)
            assert list(ours) == list(theirs)
            assert len(ours) == len(theirs)


def epochs_of(options, *, replicas=1, count=3, size=12, seed=0):
    """The draws of each process in each epoch."""
    present = np.random.default_rng(1).random((size, 3)) < 0.3
    dataset = Drawn(present, ["a"] * (size - 4) + ["b"] * 4)
    found = []
    for epoch in range(count):
        found.append([])
        for rank in range(replicas):
            sampler = SliceSampler(dataset, num_replicas=replicas, rank=rank, seed=seed, **options)
            sampler.set_epoch(epoch)
            found[-1].append(list(sampler))
            assert len(sampler) == len(found[-1][-1])
    return found


@pytest.mark.parametrize("options", OPTIONS)
def test_processes_share_one_drawing(options):
    alone = [parts[0] for parts in epochs_of(options)]
    shared = epochs_of(options, replicas=2)
    for whole, (first, second) in zip(alone, shared, strict=True):
        assert (whole[0::2], whole[1::2]) == (first, second)


@pytest.mark.parametrize("options", OPTIONS)
def test_parts_are_filled_up_to_one_size(options):
    (whole,), parts = epochs_of(options, count=1, size=11)[0], epochs_of(options, replicas=3, count=1, size=11)[0]
    assert [len(part) for part in parts] == [4, 4, 4]
    assert [parts[i % 3][i // 3] for i in range(12)] == [*whole, whole[0]]


@pytest.mark.parametrize("options", OPTIONS)
def test_only_seed_and_epoch_decide(options):
    first = epochs_of(options)
    np.random.seed(0)
    assert epochs_of(options) == first
    assert epochs_of(options, seed=1) != first
    assert first[0] != first[1]


def test_shares_hold_in_every_epoch():
    present = np.zeros((100, 2), dtype=bool)
    present[:10, 0] = present[10:50, 1] = True
    sampler = SliceSampler(Drawn(present), empty_share=0.2, balance="classes")
    for epoch in range(5):
        sampler.set_epoch(epoch)
        drawn = np.array(list(sampler))
        assert len(drawn) == 100
        kinds = [np.sum(drawn < 10), np.sum((drawn >= 10) & (drawn < 50)), np.sum(drawn >= 50)]
        assert kinds == [40, 40, 20]
    counts = np.bincount(drawn[drawn < 10], minlength=10)
    assert set(counts.tolist()) == {4}  # 0.04 of 100 draws each


def test_what_an_epoch_is_made_of_is_said(caplog):
    caplog.set_level(logging.INFO, logger="scripts.data.sampling")
    SliceSampler(Drawn(MIXED, SETS), set_power=0.0, empty_share=0.5)
    assert caplog.messages == ["an epoch draws 4 slices: x 50.0%, y 50.0%; 25.0% of them without any class"]
    caplog.clear()
    SliceSampler(Drawn(MIXED, SETS))
    assert caplog.messages == []


def test_a_floor_that_cannot_hold_is_refused_at_once():
    with pytest.raises(ConfigError, match=r"set_floor 0\.6 cannot hold for 2 data sets"):
        SliceSampler(Drawn(MIXED, SETS), set_floor=0.6)
