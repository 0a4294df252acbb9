"""Which slices an epoch draws, and how often each.

Three choices follow one another: a data set, whether its slice shall show anything, and the slice. Each is left to the
data where it is not set; with none set every slice is drawn once.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Literal, Protocol

import numpy as np
from torch.utils.data import DistributedSampler

from scripts.errors import ConfigError

logger = logging.getLogger(__name__)
Balance = Literal["classes"]


class Slices(Protocol):
    """What is drawn from.

    Attributes:
        present: `(N, K)` bool, the classes that each slice shows.
        sets: the data set of each slice, N names.
    """

    present: np.ndarray
    sets: Sequence[str]

    def __len__(self) -> int:
        """Count the slices, N."""
        ...

    def __getitem__(self, index: int) -> object:
        """Give a sample of one slice."""
        ...


def set_shares(sizes: np.ndarray, *, power: float | None = None, floor: float | None = None) -> np.ndarray:
    """Decide how large a part of the draws each data set gets: in proportion to a power of its size.

    Power 1 takes the sets as they come, 0 all alike, 0.5 is between. What lies below the floor is raised to it, at the
    expense of the others in proportion.

    Args:
        sizes: `(M,)` slices of each set, all above 0.
        power: of the size; None for 1.
        floor: smallest share of a set, 0 to 1/M; None for 0.

    Returns:
        `(M,)` shares that add up to 1.

    Raises:
        ConfigError: a floor that so many sets cannot all have, or a number below 0.
    """
    floor = 0.0 if floor is None else floor
    power = 1.0 if power is None else power
    if floor < 0 or power < 0:
        raise ConfigError(f"set_power and set_floor are 0 or more, not {power} and {floor}")
    if floor * len(sizes) > 1:
        raise ConfigError(
            f"set_floor {floor} cannot hold for {len(sizes)} data sets; it is {1 / len(sizes):.3g} at most"
        )
    weights = (sizes / sizes.max()) ** power
    shares = weights / weights.sum()
    low = np.zeros(len(sizes), dtype=bool)
    for _ in sizes:  # each round may push further sets below the floor
        low |= shares < floor
        rest = np.where(low, 0.0, weights)
        if not rest.any():
            return np.full(len(sizes), 1 / len(sizes))
        shares = np.where(low, floor, rest / rest.sum() * (1 - floor * low.sum()))
    return shares


def slice_weights(
    present: np.ndarray,
    sets: Sequence[str],
    *,
    empty_share: float | None = None,
    balance: Balance | None = None,
    set_power: float | None = None,
    set_floor: float | None = None,
) -> np.ndarray:
    """Give the probability with which each draw takes each slice.

    Without `set_power` and `set_floor` all slices are one pool, otherwise each data set is one, with its share of
    `set_shares`. In a pool `empty_share` of the draws take a slice without any class, all of these alike; the others
    take slices that show a class: all of these alike, or with `balance` "classes" first one of the pool's classes, each
    with the same chance, then one of the slices that have it. A pool that has slices of one kind only is drawn from
    all the same.

    Args:
        present: `(N, K)` bool, the classes that each slice shows.
        sets: the data set of each slice, N names.
        empty_share: 0 to 1; None for the pool's own.
        balance: "classes" or None.
        set_power: see `set_shares`.
        set_floor: see `set_shares`.

    Returns:
        `(N,)` float64, adding up to 1.

    Raises:
        ConfigError: a share outside 0 to 1, an unknown balance, or what `set_shares` refuses.
    """
    if empty_share is not None and not 0 <= empty_share <= 1:
        raise ConfigError(f"empty_share lies in 0...1 or is null, not {empty_share}")
    if balance not in (None, "classes"):
        raise ConfigError(f"balance is 'classes' or null, not {balance!r}")
    _, pools = np.unique(list(sets), return_inverse=True)
    if set_power is None and set_floor is None:
        pools = np.zeros(len(present), dtype=int)
    sizes = np.bincount(pools)
    weights = np.zeros(len(present))
    for pool, share in enumerate(set_shares(sizes, power=set_power, floor=set_floor)):
        members = pools == pool
        weights[members] = share * _within_pool(present[members], empty_share=empty_share, balance=balance)
    return weights / weights.sum()


def _within_pool(present: np.ndarray, *, empty_share: float | None, balance: Balance | None) -> np.ndarray:
    """Give the probabilities (N,) within one pool of slices (N, K)."""
    shows = present.any(axis=1)
    if empty_share is None or shows.all() or not shows.any():
        empty_share = float(np.mean(~shows))
    filled = np.where(shows, 1.0, 0.0)
    if balance == "classes":
        slices_of_class = np.maximum(present.sum(axis=0), 1)
        filled = (present / slices_of_class).sum(axis=1)
    empty = np.where(shows, 0.0, 1.0)
    return empty_share * _as_share(empty) + (1 - empty_share) * _as_share(filled)


def _as_share(weights: np.ndarray) -> np.ndarray:
    return weights / max(weights.sum(), np.finfo(float).tiny)


def draw_slices(weights: np.ndarray, strata: np.ndarray, *, count: int, rng: np.random.Generator) -> np.ndarray:
    """Draw slices by their weights, each as often as its weight says, rounded up or down at random.

    Points at equal distances on the cumulated weights, from a random start (systematic sampling), the slices of a
    stratum side by side: so a stratum's share holds in every epoch and not only in the long run, and equal weights draw
    every slice once.

    Args:
        weights: `(N,)` probabilities.
        strata: `(N,)` whole numbers, which slices are of a kind.
        count: how many to draw.
        rng: source of the draws.

    Returns:
        `(count,)` indices in random order.
    """
    order = rng.permutation(np.flatnonzero(weights))
    order = order[np.argsort(strata[order], kind="stable")]
    edges = np.cumsum(weights[order])
    points = (np.arange(count) + rng.random()) / count * edges[-1]
    drawn = order[np.minimum(np.searchsorted(edges, points, side="right"), len(order) - 1)]
    return rng.permutation(drawn)


class SliceSampler(DistributedSampler):
    """Draws an epoch's slices, as many as there are, and shares them out among processes.

    Draws depend on seed and epoch alone, so that all processes take their parts of one drawing. With all options None
    it is PyTorch's DistributedSampler, draw by draw.

    Args:
        dataset: what is drawn from.
        num_replicas: number of processes.
        rank: of this one.
        seed: of the draws.
        empty_share: see `slice_weights`, also for the others.
        balance: "classes" or None.
        set_power: of the size of a data set.
        set_floor: smallest share of a data set.

    Raises:
        ConfigError: see `slice_weights`.
    """

    def __init__(
        self,
        dataset: Slices,
        *,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
        empty_share: float | None = None,
        balance: Balance | None = None,
        set_power: float | None = None,
        set_floor: float | None = None,
    ) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=True, seed=seed)  # type: ignore[arg-type]
        self.weights: np.ndarray | None = None
        if (empty_share, balance, set_power, set_floor) != (None, None, None, None):
            self.weights = slice_weights(
                dataset.present,
                dataset.sets,
                empty_share=empty_share,
                balance=balance,
                set_power=set_power,
                set_floor=set_floor,
            )
            self.strata = _strata(dataset)
            logger.info("%s", _describe(self.weights, dataset))

    def __iter__(self) -> Iterator[int]:
        """Give this process's part of the epoch."""
        if self.weights is None:
            return super().__iter__()
        rng = np.random.default_rng([self.seed, self.epoch])
        drawn = draw_slices(self.weights, self.strata, count=len(self.weights), rng=rng)
        whole = np.resize(drawn, self.total_size)  # filled up from the beginning, so that all parts are of one size
        return iter(whole[self.rank :: self.num_replicas].tolist())


def _strata(dataset: Slices) -> np.ndarray:
    """Number the slices (N,) by data set, and in it by the classes that they show, those without any first."""
    _, sets = np.unique(list(dataset.sets), return_inverse=True)
    _, strata = np.unique(np.column_stack([sets, dataset.present]), axis=0, return_inverse=True)
    return strata.reshape(-1)


def _describe(weights: np.ndarray, dataset: Slices) -> str:
    """Say what an epoch will be made of."""
    sets = np.array(list(dataset.sets))
    parts = [f"{name} {weights[sets == name].sum():.1%}" for name in dict.fromkeys(dataset.sets)]
    empty = weights[~dataset.present.any(axis=1)].sum()
    return f"an epoch draws {len(weights)} slices: {', '.join(parts)}; {empty:.1%} of them without any class"
