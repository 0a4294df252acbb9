"""Whole cases: the answer must be that of the network alone, however slices and prompts are bundled."""

import hashlib

import pytest
import torch
from monai.data import MetaTensor
from torch import nn

from scripts.data.fitting import network_slices, restore_from_square
from scripts.engines.inferers import ABSENT_LOGIT, ClassPromptInferer

CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # what other sums in other orders may change


@pytest.fixture(scope="module")
def network(build_network):
    return build_network(class_ids=(1, 2, 4)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def volume():
    """A grey volume of 5 slices that are wider than high."""
    return torch.rand((1, 1, 12, 20, 5), generator=torch.Generator().manual_seed(3)) * 255


def one_by_one(network, image, class_ids):
    """The same logits by a call of the network for each slice and each class."""
    _, _, height, width, depth = image.shape
    logits = torch.zeros((1, len(class_ids), height, width, depth))
    for place in range(depth):
        square = network_slices(image[0, ..., place : place + 1], network.image_size)
        for k, class_id in enumerate(class_ids):
            answer = network(square, class_ids=torch.tensor([[class_id]])).logits
            restored = restore_from_square(answer, size=network.image_size, original=(height, width))
            logits[0, k, ..., place] = restored[0, 0]
    return logits


@pytest.mark.parametrize(
    ("shape", "class_ids"),
    [((1, 12, 20, 3), [1, 2, 4]), ((3, 40, 24, 1), [2]), ((3, 32, 32, 2), [4, 1]), ((1, 7, 5, 1), [9])],
)
@pytest.mark.parametrize("preset", ["paper", "release"])
def test_the_answer_is_that_of_the_network_slice_by_slice_and_class_by_class(
    build_network, shape, class_ids, preset, generator
):
    network = build_network(class_ids=(1, 2, 4), preset=preset).eval().requires_grad_(False)
    image = torch.rand((1, *shape), generator=generator) * 255
    logits = ClassPromptInferer()(image, network, class_ids=class_ids)
    assert logits.shape == (1, len(class_ids), *shape[1:])
    assert logits.std() > 1e-3
    torch.testing.assert_close(logits, one_by_one(network, image, class_ids), **CLOSE)


@pytest.mark.parametrize("slices_at_once", [1, 2, 5, 100])
@pytest.mark.parametrize("prompts_at_once", [1, 4, 100])
@pytest.mark.parametrize("noise_seed", [None, 7])
def test_bundling_does_not_change_the_answer(network, volume, slices_at_once, prompts_at_once, noise_seed):
    presence = torch.rand((1, 3, 5), generator=torch.Generator().manual_seed(1)) > 0.3
    asked = {"class_ids": [1, 2, 4], "presence": presence, "case": "a"}
    expected = ClassPromptInferer(slices_at_once=3, prompts_at_once=5, noise_seed=noise_seed)(volume, network, **asked)
    inferer = ClassPromptInferer(slices_at_once=slices_at_once, prompts_at_once=prompts_at_once, noise_seed=noise_seed)
    torch.testing.assert_close(inferer(volume, network, **asked), expected, **CLOSE)


def count_rows(module):
    """The number of rows of every later call of a module, appended; and the hook, to be removed."""
    rows = []
    return rows, module.register_forward_hook(
        lambda _, inputs, output: rows.append(len(output[0] if isinstance(output, tuple) else output))
    )


def test_each_slice_is_encoded_once_for_all_its_classes(network, volume):
    encoded, first = count_rows(network.image_encoder)
    decoded, second = count_rows(network.mask_decoder)
    ClassPromptInferer(slices_at_once=2, prompts_at_once=4)(volume, network, class_ids=[1, 2, 4])
    first.remove()
    second.remove()
    assert encoded == [2, 2, 1]
    assert decoded == [3, 3, 3, 3, 3]  # all classes of a slice, and no second slice's beside them: that would be six


def test_classes_beyond_the_bound_are_asked_for_in_turn(network, volume):
    decoded, hook = count_rows(network.mask_decoder)
    ClassPromptInferer(slices_at_once=5, prompts_at_once=2)(volume, network, class_ids=[1, 2, 4])
    hook.remove()
    assert decoded == [2, 2, 2, 2, 2, 2, 2, 1]  # two classes of each slice, then the third of two slices at a time


def test_only_what_is_asked_for_is_decoded(network, volume):
    presence = torch.zeros((1, 3, 5), dtype=torch.bool)
    presence[0, 0, 1] = presence[0, 2, 4] = True
    decoded, hook = count_rows(network.mask_decoder)
    ClassPromptInferer(slices_at_once=2)(volume, network, class_ids=[1, 2, 4], presence=presence)
    hook.remove()
    assert decoded == [1, 1]


def test_what_is_not_asked_for_comes_out_absent_and_the_rest_as_ever(network, volume):
    presence = torch.rand((1, 3, 5), generator=torch.Generator().manual_seed(2)) > 0.5
    everything, some = (
        ClassPromptInferer()(volume, network, class_ids=[1, 2, 4], presence=mask) for mask in (None, presence)
    )
    where = presence[:, :, None, None, :].expand_as(some)
    assert (some[~where] == ABSENT_LOGIT).all()
    torch.testing.assert_close(some[where], everything[where], **CLOSE)
    assert torch.sigmoid(torch.tensor(ABSENT_LOGIT).half()) == 0


def test_no_question_at_all_is_no_class_at_all(network, volume):
    nothing = torch.zeros((1, 3, 5), dtype=torch.bool)
    logits = ClassPromptInferer()(volume, network, class_ids=[1, 2, 4], presence=nothing)
    assert (logits == ABSENT_LOGIT).all()


@pytest.mark.parametrize(
    ("own", "asked", "expected"), [(None, None, 3), ([4], None, 1), ([4], [1, 2], 2), (None, torch.tensor([2]), 1)]
)
def test_which_classes_are_asked_for(network, volume, own, asked, expected):
    logits = ClassPromptInferer(class_ids=own)(volume, network, class_ids=asked)
    ids = asked if asked is not None else own or network.class_ids
    assert logits.shape[1] == expected
    torch.testing.assert_close(logits, ClassPromptInferer()(volume, network, class_ids=[int(i) for i in ids]))


def noise_of(network, image, *, class_ids=(1, 2, 4), case="a", **settings):
    """The noise (N, 256, h, w) that the class prompt encoder was given, in the order of slices and classes."""
    given = []
    hook = network.class_prompt_encoder.register_forward_pre_hook(lambda _, inputs: given.append(inputs[2]))
    ClassPromptInferer(**settings)(image, network, class_ids=class_ids, case=case)
    hook.remove()
    return torch.cat(given)


def test_noise_is_another_for_every_slice_and_class_and_depends_on_nothing_else(network, volume):
    torch.manual_seed(1)
    noise = noise_of(network, volume, noise_seed=7, prompts_at_once=4)
    torch.manual_seed(2)
    assert noise.shape == (15, 256, 4, 4)
    assert len(torch.unique(noise.flatten(1), dim=0)) == 15
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    assert torch.equal(noise, noise_of(network, volume, noise_seed=7, slices_at_once=1))
    # Slice 3 and class 4 alone have the noise that they have among others.
    assert torch.equal(noise_of(network, volume, noise_seed=7, class_ids=(4,))[3], noise[3 * 3 + 2])


@pytest.mark.parametrize("change", [{"noise_seed": 8}, {"case": "b"}])
def test_another_seed_or_case_has_another_noise(network, volume, change):
    first = noise_of(network, volume, noise_seed=7)
    second = noise_of(network, volume, **{"noise_seed": 7, **change})
    assert not any(torch.equal(*rows) for rows in zip(first, second, strict=True))


def test_the_noise_is_the_same_in_every_process(network, volume):
    """Python's own hash of a name is another in every process; this seed is not."""
    noise = noise_of(network, volume, noise_seed=7, class_ids=(4,), case="a")
    seed = int.from_bytes(hashlib.sha256(b"(7, 'a', 3, 4)").digest()[:7], "big")
    expected = torch.randn((256, 4, 4), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(noise[3], expected)


def test_noise_is_reproducible_and_changes_the_answer(network, volume):
    def answer(noise_seed, case="a"):
        return ClassPromptInferer(noise_seed=noise_seed)(volume, network, class_ids=[1, 2], case=case)

    assert torch.equal(answer(7), answer(7))
    assert torch.equal(answer(None), answer(None, case="b"))
    plain = answer(None)
    for other in (answer(7), answer(7, case="b"), answer(8), answer(0)):
        assert (other - plain).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("progress", "slices_at_once", "shown"), [(True, 2, True), (False, 2, False), (True, 5, False)]
)
def test_a_bar_is_shown_over_the_slices_of_a_volume(network, volume, capsys, progress, slices_at_once, shown):
    ClassPromptInferer(slices_at_once=slices_at_once, progress=progress)(volume, network, class_ids=[2])
    assert ("slices" in capsys.readouterr().err) == shown


def test_a_network_wrapped_for_several_processes_is_unwrapped(network, volume):
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    expected = ClassPromptInferer()(volume, network, class_ids=[2])
    assert torch.equal(ClassPromptInferer()(volume, Wrapper(network), class_ids=[2]), expected)


def test_metadata_of_the_image_does_not_get_into_the_answer(network, volume):
    assert type(ClassPromptInferer()(MetaTensor(volume), network, class_ids=[2])) is torch.Tensor
