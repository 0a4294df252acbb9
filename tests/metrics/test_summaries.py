"""Averages of many cases by hand, and two runs compared."""

import math
from dataclasses import replace

import numpy as np
import pytest

from scripts.errors import ConfigError, InputError
from scripts.metrics.pooling import BatchPooled
from scripts.metrics.scores import ClassScore, score_case
from scripts.metrics.statistics import class_intervals, compare_runs
from scripts.metrics.summaries import compare_scores, summarise, summarise_units


def class_score(case: str, class_id: int, name: str, dsc: float, nsd: float, **changes: object) -> ClassScore:
    missing = math.isnan(dsc)
    score = ClassScore(
        case=case,
        class_id=class_id,
        class_name=name,
        dsc=dsc,
        nsd=nsd,
        nsd_challenge=nsd,
        hd95=math.nan if missing else 3.0,
        assd=math.nan if missing else 1.0,
        volume_error_ml=0.5,
        patient=case,
        tolerance=2.0,
        unit="mm",
        truth_voxels=0 if missing else 50,
        predicted_voxels=40,
        slices=10,
        absent_slices=10 if missing else 4,
        false_positive_slices=1,
        adjacent_absent_slices=2,
        adjacent_false_positive_slices=1,
        swapped_voxels=None,
        false_negative_slices=0,
        slice_dsc=dsc,
        iou=dsc / (2 - dsc),
    )
    return replace(score, **changes)  # type: ignore[arg-type]


def test_summary_averages_cases_then_classes() -> None:
    scores = [
        class_score("b", 4, "left kidney", 0.2, 0.1),
        class_score("a", 1, "liver", 0.9, 0.8),
        class_score("b", 1, "liver", 0.7, 0.4, false_positive_slices=2),
        class_score("c", 1, "liver", math.nan, math.nan, false_positive_slices=6),
        class_score("c", 8, "right lung", math.nan, math.nan),
    ]
    summary = summarise(scores, protocol="all", unit="mm")
    liver, kidney, lung = summary.classes
    assert [entry.class_name for entry in summary.classes] == ["liver", "left kidney", "right lung"]
    assert [entry.class_id for entry in summary.classes] == [1, 4, 8]
    assert (liver.dsc, liver.nsd) == (pytest.approx(0.8), pytest.approx(0.6))
    assert (liver.cases, liver.cases_without, liver.absent_slices, liver.false_positive_slices) == (2, 1, 18, 9)
    assert liver.false_positive_rate == pytest.approx(0.5)
    assert (kidney.dsc, kidney.nsd, kidney.cases, kidney.cases_without) == (0.2, 0.1, 1, 0)
    assert math.isnan(lung.dsc)
    assert math.isnan(lung.nsd)
    assert (lung.cases, lung.cases_without) == (0, 1)
    # Unweighted over liver and left kidney: neither by cases (0.6) nor with the right lung, which does not occur.
    assert (summary.dsc, summary.nsd) == (pytest.approx(0.5), pytest.approx(0.35))
    assert (summary.protocol, summary.unit, summary.tolerance) == ("all", "mm", 2.0)


def test_summary_of_classes_that_never_occur() -> None:
    summary = summarise([class_score("a", 1, "liver", math.nan, math.nan)], protocol="oracle", unit="mm")
    assert math.isnan(summary.dsc)
    assert math.isnan(summary.nsd)


def test_false_positive_rate_needs_a_slice_without_the_class() -> None:
    score = class_score("a", 1, "liver", 0.5, 0.5, absent_slices=0, false_positive_slices=0)
    assert math.isnan(summarise([score], protocol="all", unit="mm").classes[0].false_positive_rate)


def test_a_score_that_is_wrongly_missing_is_refused() -> None:
    scores = [class_score("a", 1, "liver", 0.5, math.nan), class_score("b", 1, "liver", 0.5, 0.5)]
    with pytest.raises(InputError, match="DSC, IoU and NSD of 'liver', which the truth of 'a' has"):
        summarise(scores, protocol="all", unit="mm")


def test_an_iou_that_is_wrongly_missing_is_refused() -> None:
    with pytest.raises(InputError, match="IoU"):
        summarise([class_score("a", 1, "liver", 0.5, 0.5, iou=math.nan)], protocol="all", unit="mm")


@pytest.mark.parametrize(
    ("second", "protocol", "unit", "error", "message"),
    [
        ({}, "prompted", "mm", ConfigError, "all, oracle"),
        ({}, "all", "px", ConfigError, "in px, got mm"),
        ({"unit": "px"}, "all", "mm", ConfigError, "mm and px"),
        ({"tolerance": 3.0}, "all", "mm", ConfigError, r"2\.0 and 3\.0 mm"),
        ({"case": "a"}, "all", "mm", InputError, "second one for 'liver' in 'a'"),
        ({"class_name": "spleen"}, "all", "mm", InputError, "one name per class id"),
        ({"class_id": 2}, "all", "mm", InputError, "one name per class id"),
    ],
)
def test_scores_that_cannot_be_averaged(
    second: dict[str, object], protocol: str, unit: str, error: type[Exception], message: str
) -> None:
    other = replace(class_score("b", 1, "liver", 0.5, 0.5), **second)  # type: ignore[arg-type]
    scores = [class_score("a", 1, "liver", 0.5, 0.5), other]
    with pytest.raises(error, match=message):
        summarise(scores, protocol=protocol, unit=unit)


def test_nothing_to_average() -> None:
    with pytest.raises(InputError, match="at least one case"):
        summarise([], protocol="all", unit="mm")


def test_two_patients_of_a_case_are_refused() -> None:
    scores = [class_score("a", 1, "liver", 0.5, 0.5), class_score("a", 2, "spleen", 0.5, 0.5, patient="p")]
    with pytest.raises(InputError, match="one patient of 'a'"):
        summarise(scores, protocol="all", unit="mm")


def blocks(case: str, widths: tuple[int, ...], predicted: tuple[int, ...]) -> ClassScore:
    """Score a block of each slice's width in the truth and in the prediction, as the only class."""
    masks = np.zeros((2, 1, 4, 30, len(widths)), bool)
    for place, (true, found) in enumerate(zip(widths, predicted, strict=True)):
        masks[0, 0, :, :found, place] = True
        masks[1, 0, :, :true, place] = True
    (score,) = score_case(
        *masks, case=case, class_ids=[1], class_names=["liver"], spacing=(1, 1, 1), planar=False, patient=case[0]
    )
    return score


def test_three_ways_to_average_the_dice() -> None:
    scores = [blocks("a1", (10, 10, 0), (10, 5, 0)), blocks("b1", (20,), (5,)), blocks("b2", (0, 0), (0, 9))]
    means = summarise(scores, protocol="all", unit="mm").classes[0].means
    # Widths 10+5 of 20+15 in the first case, 5 of 25 in the second; b2 lacks the class.
    assert means["dsc"].mean == pytest.approx((2 * 15 / 35 + 2 * 5 / 25) / 2)
    assert means["dsc_per_slice"].mean == pytest.approx((1 + 2 * 5 / 15 + 2 * 5 / 25) / 3)
    assert means["dsc_per_dataset"].mean == pytest.approx(2 * (15 + 5) / (35 + 25))
    assert means["volume_error_ml"].mean == pytest.approx((-5 - 15) * 4 / 1000 / 2)
    assert means["iou"].mean == pytest.approx((15 / 20 + 5 / 20) / 2)


def test_batches_are_pooled_beside_the_means() -> None:
    scores = [blocks("a1", (10, 10, 0), (10, 5, 0)), blocks("b1", (20,), (5,)), blocks("b2", (0, 0), (0, 9))]
    summary = summarise(scores, protocol="all", unit="mm", resamples=0, pooled_batch=2)
    assert summary.pooled_batch == 2
    # a1 and b1 together; b2, a batch of its own, lacks the class.
    assert summary.batch_pooled == summary.classes[0].batch_pooled == BatchPooled(dsc=40 / 60, iou=20 / 40)
    (of_default,) = summarise_units(scores, protocol="all", resamples=0)
    assert (of_default.pooled_batch, of_default.batch_pooled.dsc) == (40, 40 / 69)
    (of_two,) = summarise_units(scores, protocol="all", resamples=0, pooled_batch=2)
    assert of_two.batch_pooled == summary.batch_pooled
    with pytest.raises(ConfigError, match="pooled_batch"):
        summarise(scores, protocol="all", unit="mm", resamples=0, pooled_batch=0)


def test_intervals_are_those_of_the_statistics_over_patients() -> None:
    generator = np.random.default_rng(1)
    values = generator.random((12, 2))
    values[3, 1] = math.nan
    scores = [
        class_score(f"c{i:02}", k + 1, f"organ {k}", values[i, k], values[i, k], patient=f"p{i // 2}")
        for i in range(12)
        for k in range(2)
    ]
    summary = summarise(scores[::-1], protocol="all", unit="mm", seed=4)
    classes, overall = class_intervals(values, patients=[f"p{i // 2}" for i in range(12)], seed=4)
    assert [entry.means["dsc"] for entry in summary.classes] == classes
    assert summary.means["nsd"] == overall
    classes, overall = class_intervals(values / (2 - values), patients=[f"p{i // 2}" for i in range(12)], seed=4)
    assert [entry.means["iou"] for entry in summary.classes] == classes
    assert summary.means["iou"] == overall
    assert (summary.cases, summary.patients) == (12, 6)


def test_means_come_without_intervals_when_nothing_is_drawn() -> None:
    scores = [class_score(case, 1, "liver", value, value) for case, value in (("a", 0.5), ("b", 0.7))]
    fast = summarise(scores, protocol="all", unit="mm", resamples=0)
    assert fast.dsc == summarise(scores, protocol="all", unit="mm").dsc == pytest.approx(0.6)
    assert math.isnan(fast.means["dsc"].low)


def test_infinite_distances_are_counted_and_in_no_mean() -> None:
    lost = {"hd95": math.inf, "assd": math.inf, "predicted_voxels": 0}
    scores = [
        class_score("a", 1, "liver", 0.5, 0.5),
        class_score("b", 1, "liver", 0.0, 0.0, **lost),
        class_score("c", 1, "liver", 0.0, 0.0, hd95=math.inf, assd=math.inf),
        class_score("d", 1, "liver", math.nan, math.nan),
    ]
    entry = summarise(scores, protocol="all", unit="mm").classes[0]
    assert (entry.means["hd95"].mean, entry.means["hd95"].cases, entry.means["dsc"].cases) == (3.0, 1, 3)
    assert (entry.infinite_distances, entry.false_negative_cases, entry.false_positive_cases) == (2, 1, 1)


def test_false_positives_next_to_the_class_are_told_apart() -> None:
    counts = {"absent_slices": 8, "false_positive_slices": 5}
    adjacent = {"adjacent_absent_slices": 2, "adjacent_false_positive_slices": 1}
    scores = [
        class_score("a", 1, "liver", 0.5, 0.5, **counts, **adjacent, false_negative_slices=1),
        class_score("b", 1, "liver", math.nan, math.nan, **(counts | {"false_positive_slices": 0})),
    ]
    entry = summarise(scores, protocol="all", unit="mm").classes[0]
    assert entry.false_positive_rate == pytest.approx(5 / 16)
    assert entry.adjacent_false_positive_rate == pytest.approx(2 / 4)
    assert entry.isolated_false_positive_rate == pytest.approx(3 / 12)
    assert entry.false_negative_rate == pytest.approx(1 / (20 - 16))
    assert entry.false_positive_cases == 0


def test_swaps_are_averaged_over_cases_with_a_prediction() -> None:
    scores = [
        class_score("a", 4, "left kidney", 0.5, 0.5, swapped_voxels=10, predicted_voxels=40),
        class_score("b", 4, "left kidney", 0.5, 0.5, swapped_voxels=0, predicted_voxels=10),
        class_score("c", 4, "left kidney", 0.0, 0.0, swapped_voxels=0, predicted_voxels=0),
        class_score("a", 1, "liver", 0.5, 0.5),
    ]
    liver, kidney = summarise(scores, protocol="all", unit="mm").classes
    assert (kidney.swapped_share, kidney.swap_cases, kidney.has_partner) == (pytest.approx(0.125), 2, True)
    assert (liver.swap_cases, liver.has_partner) == (0, False)
    assert math.isnan(liver.swapped_share)


def test_units_are_averaged_apart() -> None:
    scores = [class_score("a", 1, "liver", 0.5, 0.5), class_score("b", 6, "polyp", 0.9, 0.9, unit="px")]
    volumes, pictures = summarise_units(scores, protocol="oracle")
    assert (volumes.unit, volumes.dsc, volumes.protocol) == ("mm", 0.5, "oracle")
    assert (pictures.unit, pictures.dsc) == ("px", 0.9)
    with pytest.raises(InputError, match="at least one case"):
        summarise_units([], protocol="all")


def runs() -> tuple[list[ClassScore], list[ClassScore]]:
    """Two runs over eight cases of two classes, the second better in the liver by 0.1 and worse in the spleen."""
    generator = np.random.default_rng(0)
    first, second = [], []
    for i in range(8):
        low, noise = generator.uniform(0.3, 0.6), generator.uniform(0.05, 0.15, size=2)
        first += [class_score(f"c{i}", 1, "liver", low, low), class_score(f"c{i}", 2, "spleen", low, low)]
        values = low + noise[0], low - noise[1]
        second += [class_score(f"c{i}", k + 1, first[k].class_name, values[k], values[k]) for k in range(2)]
    return first, second


def test_comparison_is_that_of_the_statistics() -> None:
    first, second = runs()
    found = compare_scores(first, second[::-1])
    assert [entry.score for entry in found] == ["dsc", "nsd", "nsd_challenge"]
    tables = [np.array([score.dsc for score in run]).reshape(8, 2) for run in (first, second)]
    classes, overall = compare_runs(*tables, patients=[f"c{i}" for i in range(8)])
    assert found[0].comparisons == (*classes, overall)
    assert [entry.verdict for entry in found[0].comparisons[:2]] == ["better", "worse"]
    assert found[0].first == pytest.approx((*tables[0].mean(axis=0), tables[0].mean()))
    assert found[0].second == pytest.approx((*tables[1].mean(axis=0), tables[1].mean()))
    assert found[0].class_names == ("liver", "spleen")


def test_swapped_sides_are_compared_where_both_runs_have_a_prediction() -> None:
    first, second = [], []
    for i in range(8):
        of_first, of_second = 10 + i, 4 + i
        dsc = math.nan if i == 1 else 0.5  # a case without the class has a prediction, which may lie in the other side
        common = {"patient": f"p{min(i, 6)}"}
        first.append(class_score(f"c{i}", 4, "left kidney", dsc, dsc, swapped_voxels=of_first, **common))
        second.append(class_score(f"c{i}", 4, "left kidney", dsc, dsc, swapped_voxels=of_second, **common))
        for run in (first, second):
            run.append(class_score(f"c{i}", 1, "liver", 0.5, 0.5, **common))
    second[0] = replace(second[0], predicted_voxels=0, swapped_voxels=0)
    *scores, swaps = compare_scores(first, second)
    assert [entry.score for entry in scores] == ["dsc", "nsd", "nsd_challenge"]
    assert (swaps.score, swaps.class_names, swaps.unit) == ("swapped_share", ("left kidney",), "mm")
    tables = [
        np.array([[math.nan], *([run[2 * i].swapped_voxels / 40] for i in range(1, 8))]) for run in (first, second)
    ]
    classes, overall = compare_runs(*tables, patients=[f"p{min(i, 6)}" for i in range(8)])
    assert swaps.comparisons == (*classes, overall)
    assert swaps.comparisons[0].difference.cases == 7
    assert swaps.first[0] == pytest.approx(np.mean([10 + i for i in range(1, 8)]) / 40)
    assert swaps.comparisons[0].verdict == "worse"  # the difference is below zero
    assert swaps.verdicts == ("better", "better")
    assert scores[0].verdicts == ("not distinguishable",) * 3


def test_classes_are_compared_by_name() -> None:
    first, second = runs()
    turned = [replace(score, class_id=3 - score.class_id) for score in second]
    assert compare_scores(first, turned) == compare_scores(first, second)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"case": "other"}, InputError, "liver in c0, liver in other in one run only"),
        ({"truth_voxels": 51}, InputError, "50 and 51 voxels of liver in c0"),
        ({"slices": 11}, InputError, "one truth in both runs"),
        ({"tolerance": 1.0}, ConfigError, "2 mm and 1 mm"),
        ({"unit": "px"}, ConfigError, "2 mm and 2 px"),
    ],
)
def test_runs_that_cannot_be_compared(changes: dict[str, object], error: type[Exception], message: str) -> None:
    first, second = runs()
    with pytest.raises(error, match=message):
        compare_scores(first, [replace(second[0], **changes), *second[1:]])  # type: ignore[arg-type]


def test_runs_of_nothing_cannot_be_compared() -> None:
    with pytest.raises(InputError, match="no case at all"):
        compare_scores([], [])
