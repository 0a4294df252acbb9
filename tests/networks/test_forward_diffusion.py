"""Forward diffusion: the closed forms against the loop over time steps that they stand for."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from scripts.networks.forward_diffusion import (
    accumulated_noise_scale,
    diffuse_accumulated,
    diffuse_once,
    noise_scale,
)

# Variance of the accumulated noise and its root, from the fact sheet of the paper and its code.
VARIANCE_OF_100_STEPS = 0.635082
DEVIATION = {100: 0.79692, 7: 0.72624}


def loop(
    image_embedding: torch.Tensor, class_map: torch.Tensor, *, steps: int, generator: torch.Generator | None
) -> torch.Tensor:
    """The reference: from step T down to 1, add a noise of deviation 1 / (t + 1), if any is wanted, and the class."""
    diffused = image_embedding
    for t in range(steps, 0, -1):
        if generator is not None:
            diffused = diffused + torch.randn(image_embedding.shape, generator=generator) / (t + 1)
        diffused = diffused + class_map
    return diffused


def inputs(generator: torch.Generator, *, rows: int = 2, height: int = 4, width: int = 4) -> tuple[torch.Tensor, ...]:
    embedding = torch.randn((rows, 256, height, width), generator=generator)
    class_map = torch.randn((rows, 1, height, width), generator=generator)
    return embedding, class_map, torch.randn(embedding.shape, generator=generator)


@pytest.mark.parametrize("steps", [1, 7, 100])
@pytest.mark.parametrize("rows", [1, 3])
def test_without_noise_the_closed_form_is_the_loop(steps, rows, generator):
    embedding, class_map, _ = inputs(generator, rows=rows, height=2, width=5)
    expected = loop(embedding, class_map, steps=steps, generator=None)
    torch.testing.assert_close(diffuse_accumulated(embedding, class_map, None, steps), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("steps", [7, 100])
def test_the_noise_of_the_closed_form_has_the_mean_and_deviation_of_the_loop(steps, generator):
    embedding = torch.full((2, 256, 16, 16), 0.25)
    class_map = torch.full((2, 1, 16, 16), -0.5)
    noise = torch.randn(embedding.shape, generator=generator)
    expected = loop(embedding, class_map, steps=steps, generator=generator)
    diffused = diffuse_accumulated(embedding, class_map, noise, steps)
    # 131 072 values each: four standard errors of a mean are 0.009, of a deviation 0.006.
    for result in (diffused, expected):
        assert result.mean().item() == pytest.approx(0.25 - 0.5 * steps, abs=9e-3)
        assert result.std().item() == pytest.approx(DEVIATION[steps], abs=6e-3)


@pytest.mark.parametrize(("steps", "deviation"), DEVIATION.items())
def test_the_deviation_is_that_of_the_fact_sheet(steps, deviation):
    assert accumulated_noise_scale(steps) == pytest.approx(deviation, abs=5e-6)


def test_the_variance_of_one_hundred_steps():
    assert accumulated_noise_scale(100) ** 2 == pytest.approx(VARIANCE_OF_100_STEPS, abs=5e-7)


def test_one_accumulated_step_is_the_first_single_step(generator):
    embedding, class_map, noise = inputs(generator)
    single = diffuse_once(embedding, class_map, noise, torch.ones(2))
    torch.testing.assert_close(diffuse_accumulated(embedding, class_map, noise, 1), single)


def test_the_accumulated_noise_is_scaled_value_by_value(generator):
    embedding, class_map, noise = inputs(generator)
    added = diffuse_accumulated(embedding, class_map, noise, 7) - diffuse_accumulated(embedding, class_map, None, 7)
    torch.testing.assert_close(added, DEVIATION[7] * noise, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("timestep", "deviation"), [(1, 1 / 2), (2, 1 / 3), (100, 1 / 101)])
def test_the_single_step_has_deviation_one_over_t_plus_one(timestep, deviation, generator):
    embedding, class_map, noise = inputs(generator)
    diffused = diffuse_once(embedding, class_map, noise, torch.full((2,), float(timestep)))
    torch.testing.assert_close(diffused, embedding + class_map + deviation * noise)
    assert noise_scale(torch.tensor(float(timestep))).item() == pytest.approx(deviation)


def test_each_row_has_its_own_time_step(generator):
    embedding, class_map, noise = inputs(generator)
    diffused = diffuse_once(embedding, class_map, noise, torch.tensor([1.0, 100.0]))
    torch.testing.assert_close(diffused[0], embedding[0] + class_map[0] + noise[0] / 2)
    torch.testing.assert_close(diffused[1], embedding[1] + class_map[1] + noise[1] / 101)


def test_the_single_step_adds_the_class_once_and_to_every_channel(generator):
    embedding, class_map, _ = inputs(generator, rows=1)
    diffused = diffuse_once(embedding, class_map, None, torch.tensor([50.0]))
    torch.testing.assert_close(diffused - embedding, class_map.expand_as(embedding), rtol=1e-4, atol=1e-5)


def test_the_inputs_stay_as_they_were(generator):
    embedding, class_map, noise = inputs(generator)
    before = [value.clone() for value in (embedding, class_map, noise)]
    diffuse_once(embedding, class_map, noise, torch.ones(2))
    diffuse_accumulated(embedding, class_map, noise, 100)
    assert all(torch.equal(value, old) for value, old in zip((embedding, class_map, noise), before, strict=True))


def test_nothing_is_drawn(generator):
    embedding, class_map, noise = inputs(generator)
    state = torch.get_rng_state()
    diffuse_once(embedding, class_map, noise, torch.ones(2))
    diffuse_accumulated(embedding, class_map, noise, 100)
    assert torch.equal(torch.get_rng_state(), state)


class CountOperations(TorchDispatchMode):
    """Counts the operations on tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += 1
        return operation(*args, **(kwargs or {}))


def test_more_steps_are_not_more_work(generator):
    embedding, class_map, noise = inputs(generator)
    counts = []
    for steps in (1, 10_000):
        with CountOperations() as operations:
            diffuse_accumulated(embedding, class_map, noise, steps)
        counts.append(operations.count)
    assert counts[0] == counts[1] > 0
