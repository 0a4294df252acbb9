"""Splits: seeded, by patient, in any order the same, and an owner's split is kept."""

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts.data.converters.prepare import joined_patients
from scripts.data.converters.splits import Member, checked_fractions, describe_split, split_cases
from scripts.errors import ConfigError

USUAL = (0.7, 0.1, 0.2)


def members(patients, section=None):
    """One case for each name of a patient, numbered."""
    return [Member(f"{patient}.{number}", patient, section) for number, patient in enumerate(patients)]


def patients_of(drawn, cases):
    """Section -> its patients."""
    sections = {}
    for case in cases:
        sections.setdefault(drawn[case.case], set()).add(case.patient)
    return sections


shares = st.tuples(st.integers(1, 50), st.integers(0, 20), st.integers(0, 20)).map(
    lambda parts: tuple(part / sum(parts) for part in parts)
)
people = st.lists(st.integers(0, 40).map("p{:02d}".format), min_size=3, max_size=60)


@settings(max_examples=100, deadline=None)
@given(people, shares, st.integers(0, 2**32), st.randoms(use_true_random=False))
def test_a_drawn_split_keeps_its_promises(patients, fractions, seed, random):
    cases, count, wanted = members(patients), len(set(patients)), [share for share in fractions if share > 0]
    if count < len(wanted):
        with pytest.raises(ConfigError, match="at least one patient each"):
            split_cases(cases, fractions=fractions, seed=seed)
        return
    drawn = split_cases(cases, fractions=fractions, seed=seed)
    shuffled = random.sample(cases, len(cases))
    assert split_cases(shuffled, fractions=fractions, seed=seed) == drawn
    assert list(drawn) == [case.case for case in cases]
    sections = patients_of(drawn, cases)
    assert sum(map(len, sections.values())) == count  # none is in two sections
    assert len(sections) == len(wanted)
    for section, share in zip(("training", "validation", "test"), fractions, strict=True):
        got = len(sections.get(section, ()))
        # To within one patient; a section that would get none gets one, which the largest pays for.
        assert (got == 0) == (share == 0)
        assert got - share * count < 1
        assert share * count - got < 1 + sum(other * count < 1 for other in wanted)


def test_another_seed_gives_another_split():
    cases = members(f"p{number}" for number in range(30))
    drawn = {tuple(split_cases(cases, fractions=USUAL, seed=seed).values()) for seed in range(5)}
    assert len(drawn) == 5


def test_every_patient_can_come_into_every_section():
    cases = members("abcdefghij")
    met = {case: Counter() for case in "abcdefghij"}
    for seed in range(200):
        for case, section in split_cases(cases, fractions=USUAL, seed=seed).items():
            met[case[0]][section] += 1
    for counts in met.values():  # 140, 20 and 40 of 200 are expected; 5 standard deviations are 32, 21 and 28
        assert abs(counts["training"] - 140) < 32
        assert 0 < counts["validation"] < 41
        assert abs(counts["test"] - 40) < 28


@pytest.mark.parametrize(
    ("count", "fractions", "expected"),
    [
        (10, USUAL, (7, 1, 2)),
        (1000, (0.8, 0.1, 0.1), (800, 100, 100)),
        (5, USUAL, (3, 1, 1)),  # 3.5, 0.5 and 1 by share
        (4, (0.2, 0.4, 0.4), (1, 2, 1)),  # 0.8, 1.6 and 1.6
        (3, (0.98, 0.01, 0.01), (1, 1, 1)),
        (4, (1, 0, 0), (4, 0, 0)),
        (7, (0.5, 0, 0.5), (4, 0, 3)),
    ],
)
def test_counts_by_hand(count, fractions, expected):
    drawn = Counter(split_cases(members(map(str, range(count))), fractions=fractions, seed=3).values())
    assert tuple(drawn[name] for name in ("training", "validation", "test")) == expected


def test_an_official_split_is_kept_whatever_the_options():
    cases = [*members("aab", "training"), *members("cd", "validation"), *members("e", "test_kvasir")]
    for seed in range(5):
        drawn = split_cases(cases, fractions=(0.2, 0.4, 0.4), seed=seed)
        assert drawn == {case.case: case.section for case in cases}
    assert describe_split(cases, fractions=USUAL, seed=1) == {"rule": "official"}


def test_validation_is_drawn_from_training_by_patient():
    cases = [*members("abcdefgh" * 2, "training"), *members("xyz", "test")]
    drawn = split_cases(cases, fractions=(0.6, 0.2, 0.2), seed=4)
    sections = patients_of(drawn, cases)
    assert {name: len(patients) for name, patients in sections.items()} == {"training": 6, "validation": 2, "test": 3}
    assert not sections["training"] & sections["validation"]
    assert sections["test"] == set("xyz")
    rule = "official, validation drawn from training by patient"
    assert describe_split(cases, fractions=(0.6, 0.2, 0.2), seed=4) == {
        "rule": rule,
        "fractions": [0.6, 0.2, 0.2],
        "seed": 4,
    }


@pytest.mark.parametrize("fractions", [(0.8, 0, 0.2), (1, 0, 0)])
def test_no_validation_is_drawn_when_none_is_wanted(fractions):
    cases = [*members("ab", "training"), *members("c", "test")]
    assert set(split_cases(cases, fractions=fractions, seed=0).values()) == {"training", "test"}
    assert describe_split(cases, fractions=fractions, seed=0) == {"rule": "official"}


def test_a_set_for_tests_alone_needs_no_training():
    cases = [*members("ab", "test_kvasir"), *members("c", "test_etis")]
    assert split_cases(cases, fractions=USUAL, seed=0) == {case.case: case.section for case in cases}
    assert describe_split(cases, fractions=USUAL, seed=0) == {"rule": "official"}


def test_one_training_patient_cannot_be_two():
    with pytest.raises(ConfigError, match="at least one patient each for training, validation, got 1; give"):
        split_cases([*members("aaa", "training"), *members("b", "test")], fractions=USUAL, seed=0)


@pytest.mark.parametrize(
    "fractions",
    [
        (), (1,), (0.5, 0.5), (0.7, 0.1, 0.1), (0.7, 0.1, 0.1, 0.1), (1.2, -0.1, -0.1), (0, 0, 0), 0.7, None, "abc",
        (math.nan, 0.5, 0.5), (0.5, math.nan, 0.5), (math.inf, 0, 0), ("a", "b", "c"),
    ],
)  # fmt: skip
def test_fractions_that_are_none_are_refused(fractions):
    with pytest.raises(ConfigError, match="--fractions are three shares"):
        checked_fractions(fractions)


def test_a_set_may_be_only_tested_on():
    assert checked_fractions((0, 0, 1)) == (0, 0, 1)
    assert set(split_cases(members("abc"), fractions=(0, 0, 1), seed=0).values()) == {"test"}


def test_rounding_is_no_reason_to_refuse_fractions():
    assert checked_fractions((1 / 3, 1 / 3, 1 / 3)) == (1 / 3, 1 / 3, 1 / 3)
    assert checked_fractions(["0.7", "0.1", "0.2"]) == USUAL


# -------------------------------------------------------------------------------------------- patients of equal images


def test_patients_of_equal_images_are_joined_through_others():
    owners = [("d", "1"), ("b", "2"), ("c", "1"), ("c", "2"), ("a", "3"), ("e", "3"), ("f", "4")]
    joined = {"a": "a", "b": "b", "c": "b", "d": "b", "e": "a", "f": "f"}
    assert joined_patients(owners) == joined
    assert joined_patients(owners[::-1]) == joined


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 12).map(str)), max_size=25))
def test_joined_patients_are_the_connected_ones(owners):
    """Against the reachability of a graph, computed by repeated multiplication of its matrix."""
    joined = joined_patients(owners)
    reached = {patient: {patient} for patient, _ in owners}
    for _ in range(len(reached)):
        for patient, known in reached.items():
            contents = {content for owner, content in owners if owner in known}
            reached[patient] = known | {owner for owner, content in owners if content in contents}
    assert joined == {patient: min(known) for patient, known in reached.items()}
