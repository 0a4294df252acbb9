"""The joint loss: Eq. 17, which prompts count for which loss, and every degenerate batch."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from scripts.errors import ConfigError
from scripts.losses.joint import (
    LOSS_NAMES,
    SMALLEST_WEIGHT,
    JointLoss,
    PromptTargets,
    intersection_over_union,
    mean_over,
    pooled_dice,
)
from scripts.losses.shape_distance import distance_map
from scripts.networks.prompts import MaskPrediction, PromptEmbeddings

SIZE = 16
GRID = 2
PRESENT_ONLY = ("mse_sparse", "mse_dense", "shape_distance")  # and Dice, where it is taken of each


def disc(radius: float) -> np.ndarray:
    rows, columns = np.mgrid[:SIZE, :SIZE] - SIZE // 2
    return (rows**2 + columns**2 <= radius**2).astype(np.float32)


def targets_of(present: list[list[bool]]) -> PromptTargets:
    """Discs of different sizes where a class is present, nothing elsewhere."""
    masks = [
        [disc(2 + 0.7 * k + i) if there else np.zeros((SIZE, SIZE), np.float32) for k, there in enumerate(row)]
        for i, row in enumerate(present)
    ]
    distances = [[distance_map(mask) for mask in row] for row in masks]
    return PromptTargets(torch.tensor(np.array(masks)), torch.tensor(np.array(distances)), torch.tensor(present))


def prediction_of(generator: torch.Generator, images: int, prompts: int) -> MaskPrediction:
    """Random logits and embeddings, each of which wants a gradient."""

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    def embeddings() -> PromptEmbeddings:
        return PromptEmbeddings(draw(images * prompts, 2, 256), draw(images * prompts, 256, GRID, GRID))

    student, teacher = embeddings(), embeddings()
    logits = draw(images, prompts, SIZE, SIZE).requires_grad_(True)
    for value in student:
        value.requires_grad_(True)
    return MaskPrediction(logits, torch.zeros(images, prompts), student, teacher)


MIXED = [[True, False, True], [False, True, True]]


def parts_of(prediction: MaskPrediction, targets: PromptTargets, *, dice: str = "pooled") -> dict[str, float]:
    loss = JointLoss(dice=dice)
    loss(prediction, targets)
    return {name: value.item() for name, value in loss.components.items()}


def as_arrays(prediction: MaskPrediction, targets: PromptTargets) -> tuple[np.ndarray, ...]:
    """Probability, mask and presence, one row a prompt, in double precision."""
    probability = 1 / (1 + np.exp(-prediction.logits.detach().double().numpy()))
    mask = targets.mask.double().numpy()
    return probability.reshape(-1, SIZE, SIZE), mask.reshape(-1, SIZE, SIZE), targets.present.numpy().reshape(-1)


# Each loss against numpy.


@pytest.mark.parametrize("present", [MIXED, [[True]], [[True, True]]], ids=str)
def test_dice_of_each(present, generator):
    targets = targets_of(present)
    prediction = prediction_of(generator, *targets.present.shape)
    probability, mask, chosen = as_arrays(prediction, targets)
    overlap = 2 * (probability * mask).sum(axis=(1, 2)) + 1e-5
    total = (probability**2).sum(axis=(1, 2)) + (mask**2).sum(axis=(1, 2)) + 1e-5
    expected = (1 - overlap / total)[chosen].mean()
    assert parts_of(prediction, targets, dice="each")["dice"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("present", [MIXED, [[True]], [[False, False]]], ids=str)
def test_dice_of_all_together_is_the_default(present, generator):
    targets = targets_of(present)
    prediction = prediction_of(generator, *targets.present.shape)
    probability, mask, _ = as_arrays(prediction, targets)
    expected = 1 - (2 * (probability * mask).sum() + 1e-5) / ((probability**2).sum() + (mask**2).sum() + 1e-5)
    loss = JointLoss()
    loss(prediction, targets)
    assert loss.components["dice"].item() == pytest.approx(expected, rel=1e-5)
    assert pooled_dice(torch.from_numpy(probability), torch.from_numpy(mask)).item() == pytest.approx(expected)


def test_nothing_predicted_of_nothing_costs_nothing(generator):
    prediction, targets = prediction_of(generator, 1, 2), targets_of([[False, False]])
    silent = prediction._replace(logits=torch.full_like(prediction.logits, -1e4))
    assert parts_of(silent, targets)["dice"] == pytest.approx(0, abs=1e-6)


def test_both_forms_of_dice_agree_on_one_present_prompt(generator):
    prediction, targets = prediction_of(generator, 1, 1), targets_of([[True]])
    each, pooled = (parts_of(prediction, targets, dice=form)["dice"] for form in ("each", "pooled"))
    assert each == pytest.approx(pooled, rel=1e-5)


def test_cross_entropy_over_all_and_apart(generator):
    prediction, targets = prediction_of(generator, 2, 3), targets_of(MIXED)
    probability, mask, present = as_arrays(prediction, targets)
    entropy = -(mask * np.log(probability) + (1 - mask) * np.log(1 - probability)).mean(axis=(1, 2))
    parts = parts_of(prediction, targets)
    assert parts["cross_entropy"] == pytest.approx(entropy.mean(), rel=1e-5)
    assert parts["cross_entropy_present"] == pytest.approx(entropy[present].mean(), rel=1e-5)
    assert parts["cross_entropy_absent"] == pytest.approx(entropy[~present].mean(), rel=1e-5)
    assert len({round(value, 4) for name, value in parts.items() if name.startswith("cross_entropy")}) == 3


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_mean_squared_errors_of_the_embeddings(kind, generator):
    prediction, targets = prediction_of(generator, 2, 3), targets_of(MIXED)
    student, teacher = (
        getattr(embeddings, kind).detach().numpy() for embeddings in (prediction.prompts, prediction.teacher)
    )
    expected = ((student - teacher)[targets.present.numpy().reshape(-1)] ** 2).mean()
    assert parts_of(prediction, targets)[f"mse_{kind}"] == pytest.approx(expected, rel=1e-5)


def test_shape_distance(generator):
    prediction, targets = prediction_of(generator, 2, 3), targets_of(MIXED)
    probability, _, present = as_arrays(prediction, targets)
    distance = targets.distance.double().numpy().reshape(-1, SIZE, SIZE)
    each = np.abs(distance - probability).sum(axis=(1, 2)) / probability.sum(axis=(1, 2))
    assert parts_of(prediction, targets)["shape_distance"] == pytest.approx(each[present].mean(), rel=1e-5)


def test_a_perfect_prediction(generator):
    targets = targets_of(MIXED)
    prediction = prediction_of(generator, 2, 3)
    perfect = prediction._replace(logits=1e4 * (2 * targets.mask - 1), teacher=prediction.prompts)
    parts = parts_of(perfect, targets)
    assert parts["dice"] == pytest.approx(0, abs=1e-6)
    assert parts_of(perfect, targets, dice="each")["dice"] == pytest.approx(0, abs=1e-6)
    assert parts["cross_entropy"] == pytest.approx(0, abs=1e-6)
    assert parts["mse_sparse"] == parts["mse_dense"] == 0
    assert 0 < parts["shape_distance"] < 0.5  # its least value is at the distance map, not at the mask


# Who counts.


@pytest.mark.parametrize("dice", ["each", "pooled"])
def test_what_absent_prompts_change(dice, generator):
    targets = targets_of(MIXED)
    prediction = prediction_of(generator, 2, 3)
    absent = ~targets.present
    rows = absent.flatten()
    other = MaskPrediction(
        torch.where(absent[:, :, None, None], prediction.logits + 3, prediction.logits),
        prediction.quality,
        PromptEmbeddings(
            torch.where(rows[:, None, None], 50.0, prediction.prompts.sparse),
            torch.where(rows[:, None, None, None], 50.0, prediction.prompts.dense),
        ),
        PromptEmbeddings(
            torch.where(rows[:, None, None], -50.0, prediction.teacher.sparse),
            torch.where(rows[:, None, None, None], -50.0, prediction.teacher.dense),
        ),
    )
    before, after = (parts_of(some, targets, dice=dice) for some in (prediction, other))
    same = {name for name in before if before[name] == pytest.approx(after[name], rel=1e-6)}
    assert same == {*PRESENT_ONLY, "cross_entropy_present"} | ({"dice"} if dice == "each" else set())
    assert after["dice"] >= before["dice"] - 1e-6  # what is predicted of an absent class is never cheap


@pytest.mark.parametrize("name", [*PRESENT_ONLY, "dice"])
def test_absent_prompts_get_no_gradient_from_the_losses_of_present_ones(name, generator):
    targets, prediction = targets_of(MIXED), prediction_of(generator, 2, 3)
    JointLoss(losses=(name,), dice="each")(prediction, targets).backward()
    rows = targets.present.flatten()
    gradient = {
        "mse_sparse": prediction.prompts.sparse,
        "mse_dense": prediction.prompts.dense,
        "dice": prediction.logits,
        "shape_distance": prediction.logits,
    }[name].grad.reshape(6, -1)
    assert (gradient[~rows] == 0).all()
    assert (gradient[rows].abs().sum(dim=1) > 0).all()


@pytest.mark.parametrize("losses", [("cross_entropy",), ("dice",), LOSS_NAMES])
def test_absent_prompts_learn_from_cross_entropy_and_pooled_dice(losses, generator):
    targets, prediction = targets_of(MIXED), prediction_of(generator, 2, 3)
    JointLoss(losses=losses)(prediction, targets).backward()
    assert (prediction.logits.grad[~targets.present] > 0).all()  # every pixel is pressed down


def test_where_none_is_present_their_losses_are_zero_and_not_nan(generator):
    parts = parts_of(prediction_of(generator, 2, 2), targets_of([[False, False], [False, False]]), dice="each")
    names = (*PRESENT_ONLY, "dice")
    assert {name: parts[name] for name in names} == dict.fromkeys(names, 0.0)
    assert parts["cross_entropy_present"] == 0
    assert parts["cross_entropy"] == pytest.approx(parts["cross_entropy_absent"])
    assert parts["cross_entropy"] > 0


def test_where_all_are_present_none_is_absent(generator):
    parts = parts_of(prediction_of(generator, 1, 1), targets_of([[True]]))
    assert parts["cross_entropy_absent"] == 0
    assert parts["cross_entropy"] == pytest.approx(parts["cross_entropy_present"])


def test_one_prompt_weighs_the_same_in_any_batch(generator):
    """The parts of a batch are the means of its prompts' parts."""
    targets, prediction = targets_of([[True, True], [True, True]]), prediction_of(generator, 2, 2)
    together = parts_of(prediction, targets, dice="each")
    alone = []
    for row in range(4):
        i, k, one = row // 2, row % 2, slice(row, row + 1)
        part = MaskPrediction(
            prediction.logits[i : i + 1, k : k + 1],
            prediction.quality[i : i + 1, k : k + 1],
            PromptEmbeddings(prediction.prompts.sparse[one], prediction.prompts.dense[one]),
            PromptEmbeddings(prediction.teacher.sparse[one], prediction.teacher.dense[one]),
        )
        alone.append(parts_of(part, PromptTargets(*(value[i : i + 1, k : k + 1] for value in targets)), dice="each"))
    for name in LOSS_NAMES:
        assert together[name] == pytest.approx(np.mean([parts[name] for parts in alone]), rel=1e-5), name


# Eq. 17.


def test_at_first_it_is_half_the_sum_and_log_two_for_each(generator):
    loss, targets, prediction = JointLoss(), targets_of(MIXED), prediction_of(generator, 2, 3)
    total = loss(prediction, targets).item()
    expected = 0.5 * sum(loss.components[name].item() for name in LOSS_NAMES) + 5 * math.log(2)
    assert total == pytest.approx(expected, rel=1e-5)


def test_any_weights():
    loss = JointLoss(losses=("dice", "cross_entropy"))
    with torch.no_grad():
        loss.weights.copy_(torch.tensor([0.5, -2.0]))
    total = loss.join({"cross_entropy": torch.tensor(0.8), "dice": torch.tensor(0.3)}).item()
    assert total == pytest.approx(0.3 / 0.5 + math.log(1.25) + 0.8 / 8 + math.log(5), rel=1e-5)


@pytest.mark.parametrize(("value", "squared"), [(1.0, 1.0), (0.1, 0.25), (0.01, 0.073)])
def test_the_weights_settle_where_they_should(value, squared):
    loss = JointLoss(losses=("dice",))
    optimizer = torch.optim.LBFGS(loss.parameters(), lr=0.5, max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        total = loss.join({"dice": torch.tensor(value)})
        total.backward()
        return total

    optimizer.step(closure)
    reached = loss.named_weights()["dice"] ** 2
    assert reached == pytest.approx((value + math.sqrt(value**2 + 8 * value)) / 4, rel=1e-3)
    assert reached == pytest.approx(squared, abs=5e-4)


def test_no_weight_divides_by_nothing():
    loss = JointLoss(losses=("dice",))
    with torch.no_grad():
        loss.weights.zero_()
    total = loss.join({"dice": torch.tensor(0.1)})
    assert total.item() == pytest.approx(0.1 / (2 * SMALLEST_WEIGHT**2), rel=1e-4)
    total.backward()
    assert torch.isfinite(loss.weights.grad).all()


@pytest.mark.parametrize("weight", [1e-4, -1e-4, 5e-3])
def test_a_weight_near_nothing_is_driven_away_from_it(weight):
    loss = JointLoss(losses=("dice",))
    with torch.no_grad():
        loss.weights.fill_(weight)
    loss.join({"dice": torch.tensor(0.1)}).backward()
    assert loss.weights.grad.item() * weight < 0  # a step against the gradient leads away from 0


def test_fixed_weighting_is_the_plain_sum(generator):
    loss, targets, prediction = JointLoss(weighting="fixed"), targets_of(MIXED), prediction_of(generator, 2, 3)
    total = loss(prediction, targets)
    assert total.item() == pytest.approx(sum(loss.components[name].item() for name in LOSS_NAMES), rel=1e-6)
    total.backward()
    assert not loss.weights.requires_grad
    assert loss.weights.grad is None


def test_the_weights_have_names_and_are_in_the_state():
    loss = JointLoss()
    assert loss.named_weights() == dict.fromkeys(LOSS_NAMES, 1.0)
    assert [name for name, _ in loss.named_parameters()] == list(loss.state_dict()) == ["weights"]
    again = JointLoss()
    again.load_state_dict({"weights": torch.arange(1.0, 6.0)})
    assert again.named_weights() == dict(zip(LOSS_NAMES, (1.0, 2.0, 3.0, 4.0, 5.0), strict=True))


# A choice of losses.


def test_a_choice_of_losses(generator):
    losses = ("cross_entropy", "dice")
    loss, targets = JointLoss(losses=losses), targets_of(MIXED)
    prediction = prediction_of(generator, 2, 3)._replace(teacher=None)  # which only the embedding losses need
    total = loss(prediction, targets).item()
    assert list(loss.components) == ["cross_entropy", "cross_entropy_present", "cross_entropy_absent", "dice"]
    assert list(loss.named_weights()) == list(losses)
    parts = sum(loss.components[name].item() for name in losses)
    assert total == pytest.approx(0.5 * parts + 2 * math.log(2), rel=1e-5)


@pytest.mark.parametrize("name", LOSS_NAMES)
def test_what_takes_no_part_is_not_computed(name, generator):
    loss = JointLoss(losses=(name,))
    loss(prediction_of(generator, 1, 1), targets_of([[True]]))
    assert set(loss.components) == {name, "cross_entropy", "cross_entropy_present", "cross_entropy_absent"}


def test_without_cross_entropy_it_is_told_but_does_not_count(generator):
    loss, targets, prediction = JointLoss(losses=["dice"]), targets_of(MIXED), prediction_of(generator, 2, 3)
    total = loss(prediction, targets).item()
    assert total == pytest.approx(0.5 * loss.components["dice"].item() + math.log(2), rel=1e-5)
    assert loss.components["cross_entropy"].item() > 0


def test_the_components_are_only_told(generator):
    loss = JointLoss()
    loss(prediction_of(generator, 1, 1), targets_of([[True]]))
    assert set(loss.components) == {*LOSS_NAMES, "cross_entropy_present", "cross_entropy_absent"}
    assert all(value.shape == () and not value.requires_grad for value in loss.components.values())


def test_a_branch_that_is_left_out_has_nothing_to_compare(generator):
    prediction = prediction_of(generator, 1, 1)
    prompts = prediction.prompts._replace(sparse=prediction.prompts.sparse[:, :0])
    with pytest.raises(ConfigError, match="'mse_sparse' has nothing to compare: the network gives no sparse prompts"):
        JointLoss()(prediction._replace(prompts=prompts), targets_of([[True]]))
    others = [name for name in LOSS_NAMES if name != "mse_sparse"]
    assert JointLoss(losses=others)(prediction._replace(prompts=prompts), targets_of([[True]])).isfinite()


@pytest.mark.parametrize("name", ["mse_sparse", "mse_dense"])
def test_a_missing_teacher_is_an_error(name, generator):
    prediction = prediction_of(generator, 1, 1)._replace(teacher=None)
    with pytest.raises(ConfigError, match=f"'{name}' needs the teacher's prompts"):
        JointLoss(losses=(name,))(prediction, targets_of([[True]]))


@pytest.mark.parametrize("losses", [(), ("dice", "ssim"), ("dice", "dice"), "dice"])
def test_a_wrong_choice_is_refused(losses):
    with pytest.raises(ConfigError, match="losses must be some of mse_sparse"):
        JointLoss(losses=losses)


def test_an_unknown_weighting_is_refused():
    with pytest.raises(ConfigError, match="'uncertainty' or 'fixed', not 'learned'"):
        JointLoss(weighting="learned")


def test_an_unknown_form_of_dice_is_refused():
    with pytest.raises(ConfigError, match="'pooled' or 'each', not 'batch'"):
        JointLoss(dice="batch")


# Degenerate batches.


@pytest.mark.parametrize("dice", ["each", "pooled"])
@pytest.mark.parametrize("weighting", ["uncertainty", "fixed"])
@pytest.mark.parametrize("logit", [-1e4, -30.0, 0.0, 1e4])
@pytest.mark.parametrize("present", [[[False]], [[True]], [[False, False], [False, False]], MIXED], ids=str)
def test_everything_stays_finite(weighting, dice, logit, present, generator):
    targets = targets_of(present)
    prediction = prediction_of(generator, *targets.present.shape)
    logits = torch.full_like(prediction.logits, logit, requires_grad=True)
    loss = JointLoss(weighting=weighting, dice=dice)
    total = loss(prediction._replace(logits=logits), targets)
    total.backward()
    values = [total, *loss.components.values(), logits.grad]
    values += [embedding.grad for embedding in prediction.prompts]
    values += [loss.weights.grad] if weighting == "uncertainty" else []
    for value in values:
        assert torch.isfinite(value).all()


def test_a_present_class_without_a_single_pixel_stays_finite(generator):
    """As when the augmentation moved it out of the picture."""
    targets = targets_of([[False, False]])._replace(present=torch.tensor([[True, True]]))
    prediction = prediction_of(generator, 1, 2)
    JointLoss()(prediction, targets).backward()
    assert torch.isfinite(prediction.logits.grad).all()


def test_half_precision_is_summed_in_single(generator):
    targets, prediction = targets_of(MIXED), prediction_of(generator, 2, 3)
    half = prediction._replace(logits=prediction.logits.detach().half())
    total = JointLoss()(half, targets)
    assert total.dtype == torch.float32
    exact = JointLoss()(half._replace(logits=half.logits.float()), targets)
    assert total.item() == pytest.approx(exact.item(), rel=1e-6)


def test_masks_may_be_bytes(generator):
    targets, prediction = targets_of(MIXED), prediction_of(generator, 2, 3)
    bytes_ = targets._replace(mask=targets.mask.to(torch.uint8))
    assert JointLoss()(prediction, bytes_).item() == JointLoss()(prediction, targets).item()


# The mean over the chosen.


def test_the_mean_of_the_chosen():
    values = torch.tensor([1.0, 10.0, 3.0], requires_grad=True)
    mean = mean_over(values, torch.tensor([True, False, True]))
    mean.backward()
    assert mean.item() == pytest.approx(2.0)
    assert values.grad.tolist() == [0.5, 0.0, 0.5]


def test_the_mean_of_none_is_zero_and_has_no_gradient():
    values = torch.tensor([1.0, math.inf, math.nan], requires_grad=True)
    mean = mean_over(values, torch.tensor([False, False, False]))
    (mean * 1e6).backward()
    assert mean.item() == 0
    assert values.grad.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("other", [math.inf, -math.inf, math.nan])
def test_what_is_not_chosen_may_be_anything(other):
    values = torch.tensor([1.0, other], requires_grad=True)
    mean = mean_over(values, torch.tensor([True, False]))
    mean.backward()
    assert mean.item() == 1
    assert values.grad.tolist() == [1.0, 0.0]


CHOICES = {
    "uneven": [[True, True, True], [True, False, False]],
    "one has none": [[False, False, False], [True, False, True]],
    "none": [[False, False, False], [False, False, False]],
}
VALUES = torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 40.0]])


def run_rank(rank: int, folder: str) -> None:
    """One of two processes: its shares of the means, their gradients, and a joint loss of its half of a batch."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    results = {}
    for name, choice in CHOICES.items():
        values = VALUES[rank].clone().requires_grad_(True)
        mean = mean_over(values, torch.tensor(choice[rank]))
        mean.backward()
        results[name] = (mean.detach(), values.grad)
    prediction, targets = shared_batch()
    half = slice(3 * rank, 3 * rank + 3)
    own = MaskPrediction(
        prediction.logits[rank : rank + 1],
        prediction.quality[rank : rank + 1],
        PromptEmbeddings(prediction.prompts.sparse[half], prediction.prompts.dense[half]),
        PromptEmbeddings(prediction.teacher.sparse[half], prediction.teacher.dense[half]),
    )
    for dice in ("each", "pooled"):
        prediction.logits.grad, loss = None, JointLoss(dice=dice)
        total = loss(own, PromptTargets(*(value[rank : rank + 1] for value in targets)))
        total.backward(retain_graph=True)
        results[dice] = (total.detach(), loss.weights.grad, prediction.logits.grad)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def shared_batch() -> tuple[MaskPrediction, PromptTargets]:
    prediction = prediction_of(torch.Generator().manual_seed(5), 2, 3)
    return prediction, targets_of([[True, True, True], [False, True, False]])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(run_rank, args=(str(folder),), nprocs=2)
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", CHOICES)
def test_two_processes_average_to_the_mean_over_both(name, ranks):
    chosen = torch.tensor(CHOICES[name])
    count = int(chosen.sum())
    expected = float(VALUES[chosen].mean()) if count else 0.0
    assert (ranks[0][name][0] + ranks[1][name][0]).item() / 2 == pytest.approx(expected, rel=1e-6)
    for rank in range(2):  # half of each gradient, as DistributedDataParallel averages
        share = chosen[rank].float() / count if count else torch.zeros(3)
        torch.testing.assert_close(ranks[rank][name][1] / 2, share)


@pytest.mark.parametrize("dice", ["each", "pooled"])
def test_two_processes_have_the_joint_loss_of_one(dice, ranks):
    prediction, targets = shared_batch()
    loss = JointLoss(dice=dice)
    total = loss(prediction, targets)
    total.backward()
    first, second = (rank[dice] for rank in ranks)
    torch.testing.assert_close((first[0] + second[0]) / 2, total.detach())
    torch.testing.assert_close((first[1] + second[1]) / 2, loss.weights.grad)
    torch.testing.assert_close((first[2] + second[2]) / 2, prediction.logits.grad)


# The decoder's quality, which the paper leaves untrained.


def test_the_quality_learns_the_iou_of_the_thresholded_mask(generator):
    prediction, targets = prediction_of(generator, 2, 3), targets_of(MIXED)
    quality = torch.rand((2, 3), generator=generator, requires_grad=True)
    loss = JointLoss(losses=["iou"], weighting="fixed")
    total = loss(prediction._replace(quality=quality), targets)
    probability, mask, _ = as_arrays(prediction, targets)
    predicted, true = probability > 0.5, mask > 0.5
    iou = (predicted & true).sum(axis=(1, 2)) / (predicted | true).sum(axis=(1, 2))
    difference = quality.detach().numpy().reshape(-1) - iou
    assert total.item() == pytest.approx((difference**2).mean(), rel=1e-5)
    total.backward()
    np.testing.assert_allclose(quality.grad.reshape(-1), 2 * difference / 6, rtol=1e-4)
    assert prediction.logits.grad is None


def test_the_iou_by_hand():
    logits = torch.tensor([[[1.0, 1.0, -1.0]], [[-1.0, 0.0, -2.0]], [[-1.0, -1.0, -1.0]], [[5.0, -1.0, -1.0]]])
    mask = torch.tensor([[[0.0, 1.0, 1.0]], [[0.0, 0.0, 0.0]], [[1.0, 0.0, 0.0]], [[0.0, 0.0, 0.0]]])
    found = intersection_over_union(logits.requires_grad_(True), mask)
    assert found.tolist() == pytest.approx([1 / 3, 1.0, 0.0, 0.0])
    assert not found.requires_grad


def test_the_quality_is_no_part_of_the_papers_loss(generator):
    prediction, targets = prediction_of(generator, 2, 3), targets_of(MIXED)
    loss = JointLoss()
    before = loss(prediction, targets)
    assert "iou" not in loss.components
    assert torch.equal(before, loss(prediction._replace(quality=torch.ones(2, 3)), targets))


def test_the_quality_has_a_weight_beside_the_five(generator):
    loss = JointLoss(losses=[*LOSS_NAMES, "iou"])
    assert loss.named_weights() == dict.fromkeys((*LOSS_NAMES, "iou"), 1.0)
    total = loss(prediction_of(generator, 2, 3), targets_of(MIXED))
    expected = 0.5 * sum(loss.components[name].item() for name in (*LOSS_NAMES, "iou")) + 6 * math.log(2)
    assert total.item() == pytest.approx(expected, rel=1e-4)
