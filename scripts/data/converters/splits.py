"""Which patient is for training, validation or test: an owner's split is kept, any other is drawn."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from scripts.errors import ConfigError

DRAWN_SECTIONS = ("training", "validation", "test")


@dataclass(frozen=True)
class Member:
    """What a split needs to know of a case.

    Attributes:
        case: its name.
        patient: whose it is; cases of one patient stay together.
        section: the owner's section, None where there is none.
    """

    case: str
    patient: str
    section: str | None


def split_cases(members: Sequence[Member], *, fractions: Sequence[float], seed: int) -> dict[str, str]:
    """Give every case its section.

    Without an official split, patients are drawn into training, validation and test. With one, it is kept; where it
    has training but no validation, the patients of that are drawn from training, in the proportion that the fractions
    have to each other. No patient is ever drawn into two sections.

    Args:
        members: all cases, either all with a section or all without.
        fractions: of the patients, for training, validation and test; a section of fraction 0 is left out, so 0,0,1
            makes a set that is only tested on.
        seed: of the draw; the same seed and patients give the same split, whatever their order.

    Returns:
        Case -> section, in the order of `members`.

    Raises:
        ConfigError: fractions that are none, or too few patients to fill every section.
    """
    shares = checked_fractions(fractions)
    official = {member.case: member.section for member in members if member.section is not None}
    if not official:
        drawn = _draw([member.patient for member in members], dict(zip(DRAWN_SECTIONS, shares, strict=True)), seed)
        return {member.case: drawn[member.patient] for member in members}
    if not _draws_validation(members, shares[1]):
        return {member.case: official[member.case] for member in members}
    own = [member.patient for member in members if member.section == "training"]
    drawn = _draw(own, {"training": shares[0], "validation": shares[1]}, seed)
    return {
        member.case: drawn[member.patient] if member.section == "training" else official[member.case]
        for member in members
    }


def describe_split(members: Sequence[Member], *, fractions: Sequence[float], seed: int) -> dict[str, object]:
    """Say for the datalist how `split_cases` came to its sections."""
    own = {member.section for member in members} - {None}
    if not own:
        return {"rule": "drawn by patient", "fractions": list(fractions), "seed": seed}
    if not _draws_validation(members, fractions[1]):
        return {"rule": "official"}
    return {"rule": "official, validation drawn from training by patient", "fractions": list(fractions), "seed": seed}


def _draws_validation(members: Sequence[Member], share: float) -> bool:
    """Tell whether an official split lacks a validation section that can be drawn from its training section."""
    sections = {member.section for member in members}
    return share > 0 and "training" in sections and "validation" not in sections


def checked_fractions(fractions: Sequence[float]) -> tuple[float, float, float]:
    """Check fractions of training, validation and test.

    Raises:
        ConfigError: not three numbers in 0...1 that add up to 1.
    """
    try:
        training, validation, test = (float(fraction) for fraction in fractions)
    except (TypeError, ValueError):
        training = validation = test = math.nan
    if not (training >= 0 and validation >= 0 and test >= 0 and abs(training + validation + test - 1) <= 1e-6):
        raise ConfigError(
            f"--fractions are three shares for training, validation and test that add up to 1, such as 0.7,0.1,0.2; "
            f"got {fractions}"
        )
    return training, validation, test


def _draw(patients: Sequence[str], shares: Mapping[str, float], seed: int) -> dict[str, str]:
    """Draw patients into sections; every section with a share gets at least one."""
    order = sorted(set(patients))
    wanted = {section: share for section, share in shares.items() if share > 0}
    if len(order) < len(wanted):
        raise ConfigError(
            f"expected at least one patient each for {', '.join(wanted)}, got {len(order)}; give --fractions with a 0, "
            "such as 1,0,0"
        )
    shuffled = [order[index] for index in np.random.default_rng(seed).permutation(len(order))]
    sections: dict[str, str] = {}
    for section, count in _counts(len(order), wanted).items():
        sections |= dict.fromkeys(shuffled[len(sections) : len(sections) + count], section)
    return sections


def _counts(total: int, shares: Mapping[str, float]) -> dict[str, int]:
    """Divide a number by shares: the largest remainders are rounded up; who would get nothing gets 1 of the largest."""
    exact = {section: total * share / sum(shares.values()) for section, share in shares.items()}
    counts = {section: int(value) for section, value in exact.items()}
    by_remainder = sorted(exact, key=lambda section: exact[section] - counts[section], reverse=True)
    for section in by_remainder[: total - sum(counts.values())]:
        counts[section] += 1
    for section in [section for section, count in counts.items() if count == 0]:
        counts[max(counts, key=lambda other: counts[other])] -= 1
        counts[section] = 1
    return counts
