"""Whole cases: the answer must be that of the network alone, however slices and prompts are bundled."""

import hashlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy import ndimage
from torch import nn

from scripts.data.embeddings import EmbeddingShape, EmbeddingStore
from scripts.data.fitting import network_slices, restore_from_square
from scripts.data.placing import ImagePrompts
from scripts.data.vocabulary import Vocabulary
from scripts.engines.answers import ABSENT_LOGIT, CaseAnswers, SampledLogits
from scripts.engines.inferers import ClassPromptInferer
from scripts.errors import ConfigError, OutputError

HALF = {"rtol": 1e-3, "atol": 1e-5}  # the answer is in half precision, with 11 bits


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
    torch.testing.assert_close(logits.float(), one_by_one(network, image, class_ids), **HALF)


@pytest.mark.parametrize("slices_at_once", [1, 2, 5, 100])
@pytest.mark.parametrize("prompts_at_once", [1, 4, 100])
@pytest.mark.parametrize("noise_seed", [None, 7])
def test_bundling_does_not_change_the_answer(network, volume, slices_at_once, prompts_at_once, noise_seed):
    presence = torch.rand((1, 3, 5), generator=torch.Generator().manual_seed(1)) > 0.3
    asked = {"class_ids": [1, 2, 4], "presence": presence, "case": "a"}
    expected = ClassPromptInferer(slices_at_once=3, prompts_at_once=5, noise_seed=noise_seed)(volume, network, **asked)
    inferer = ClassPromptInferer(slices_at_once=slices_at_once, prompts_at_once=prompts_at_once, noise_seed=noise_seed)
    torch.testing.assert_close(inferer(volume, network, **asked), expected, **HALF)


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
    torch.testing.assert_close(some[where], everything[where], **HALF)
    assert torch.sigmoid(torch.tensor(ABSENT_LOGIT).half()) == 0


def test_no_question_at_all_is_no_class_at_all_and_nothing_is_encoded(network, volume):
    nothing = torch.zeros((1, 3, 5), dtype=torch.bool)
    encoded, hook = count_rows(network.image_encoder)
    logits = ClassPromptInferer()(volume, network, class_ids=[1, 2, 4], presence=nothing)
    hook.remove()
    assert (logits == ABSENT_LOGIT).all()
    assert encoded == []


@pytest.fixture
def padded(volume):
    """The volume between empty slices, one of them of another value; and its second slice once more at the end."""
    empty = torch.zeros_like(volume[..., :2])
    return torch.cat((empty, volume, empty + 7, volume[..., 1:2]), dim=-1)  # places 0, 1 | 2 to 6 | 7, 8 | 9


@pytest.mark.parametrize("slices_at_once", [1, 3, 100])
@pytest.mark.parametrize("noise", [{}, {"noise_seed": 3}, {"noise_seed": 3, "samples": 2}])
def test_slices_that_are_alike_are_asked_for_once_and_have_the_same_answer(network, padded, slices_at_once, noise):
    encoded, first = count_rows(network.image_encoder)
    decoded, second = count_rows(network.mask_decoder)
    answer = ClassPromptInferer(slices_at_once=slices_at_once, **noise)(padded, network, class_ids=[1, 4], case="a")
    first.remove()
    second.remove()
    assert sum(encoded) == 6  # five of the volume and one empty one
    assert sum(decoded) == 6 * 2 * noise.get("samples", 1)
    for values in answer if isinstance(answer, SampledLogits) else [answer]:
        for place, source in ((1, 0), (7, 0), (8, 0), (9, 3)):
            assert torch.equal(values[..., place], values[..., source])
        assert not torch.equal(values[..., 2], values[..., 3])


def test_leaving_out_what_is_alike_does_not_change_the_answer(network, padded):
    logits = ClassPromptInferer()(padded, network, class_ids=[1, 4])
    torch.testing.assert_close(logits.float(), one_by_one(network, padded, [1, 4]), **HALF)


def test_slices_alike_of_which_other_classes_are_asked_keep_their_own_answers(network, padded):
    presence = torch.ones((1, 2, 10), dtype=torch.bool)
    presence[0, 0, 0] = presence[0, 1, 1] = presence[0, :, 7] = False
    logits = ClassPromptInferer()(padded, network, class_ids=[1, 4], presence=presence)
    everything = one_by_one(network, padded, [1, 4])
    where = presence[:, :, None, None, :].expand_as(logits)
    assert (logits[~where] == ABSENT_LOGIT).all()
    torch.testing.assert_close(logits[where].float(), everything[where], **HALF)


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
    seed = int.from_bytes(hashlib.sha256(b"(7, 'a', 3, 4, 0)").digest()[:7], "big")
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


# --- several draws of noise


def test_several_samples_give_the_mean_and_spread_of_the_probability(build_network, volume):
    network = build_network(class_ids=(1, 4), preset="release").eval().requires_grad_(False)  # with much noise
    asked = {"class_ids": [1, 4], "case": "a"}
    answer = ClassPromptInferer(noise_seed=7, samples=3)(volume, network, **asked)
    draws = torch.stack([single_draw(network, volume, sample, **asked) for sample in range(3)])
    alone = ClassPromptInferer(noise_seed=7)(volume, network, **asked)
    torch.testing.assert_close(draws[0], alone.float(), **HALF)
    probability = torch.sigmoid(draws)
    torch.testing.assert_close(torch.sigmoid(answer.logits.float()), probability.mean(0), rtol=0, atol=1e-3)
    torch.testing.assert_close(answer.uncertainty.float(), probability.std(0, correction=0), rtol=2e-2, atol=2e-5)
    assert answer.uncertainty.max() > 1e-4
    assert answer.logits.shape == answer.uncertainty.shape == (1, 2, 12, 20, 5)


def single_draw(network, volume, sample, *, class_ids, case):
    """The logits of one draw of noise, in single precision, slice by slice and class by class."""
    rows = []
    for place in range(volume.shape[-1]):
        square = network_slices(volume[0, ..., place : place + 1], network.image_size)
        for class_id in class_ids:
            digest = hashlib.sha256(repr((7, case, place, class_id, sample)).encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            noise = torch.randn((1, 1, 256, 4, 4), generator=generator)
            rows.append(network(square, class_ids=torch.tensor([[class_id]]), noise=noise).logits[0, 0])
    squares = torch.stack(rows).unflatten(0, (volume.shape[-1], len(class_ids)))  # (D, K, S, S)
    restored = restore_from_square(squares, size=network.image_size, original=tuple(volume.shape[2:4]))
    return restored.permute(1, 2, 3, 0).unsqueeze(0).half().float()


def test_each_slice_is_encoded_once_for_all_samples(network, volume):
    encoded, hook = count_rows(network.image_encoder)
    ClassPromptInferer(noise_seed=1, samples=4, slices_at_once=5)(volume, network, class_ids=[1, 2])
    hook.remove()
    assert encoded == [5]


def test_what_is_not_asked_for_is_certainly_absent(network, volume):
    presence = torch.ones((1, 1, 5), dtype=torch.bool)
    presence[..., 2] = False
    answer = ClassPromptInferer(noise_seed=1, samples=2)(volume, network, class_ids=[1], presence=presence)
    assert (answer.logits[..., 2] == ABSENT_LOGIT).all()
    assert (answer.uncertainty[..., 2] == 0).all()


def test_draws_that_contradict_each_other_by_hand():
    answers = CaseAnswers((1, 2, 1), classes=1, samples=2, device=torch.device("cpu"))
    answers.put([0], [0], [torch.tensor([[[[90.0, 0.0]]]]), torch.tensor([[[[-90.0, 0.0]]]])])
    logits, uncertainty = answers.result()
    assert logits.flatten().tolist() == [0, 0]
    assert uncertainty.flatten().tolist() == [0.5, 0]


def test_a_sure_mean_is_a_number():
    answers = CaseAnswers((1, 2, 1), classes=1, samples=2, device=torch.device("cpu"))
    answers.put([0], [0], [torch.tensor([[[[900.0, -900.0]]]])] * 2)
    assert answers.result().logits.flatten().tolist() == pytest.approx([16, -16], abs=0.2)


@pytest.mark.parametrize("settings", [{"samples": 0}, {"samples": 2}, {"samples": -1, "noise_seed": 1}])
def test_samples_need_a_seed(settings):
    with pytest.raises(ConfigError, match="expected 1 sample, or more and a noise_seed"):
        ClassPromptInferer(**settings)


# --- embeddings in the store


@pytest.fixture
def store(tmp_path):
    return EmbeddingStore(tmp_path, encoder="e", shape=EmbeddingShape(channels=256, rows=4, columns=4))


def test_from_the_store_the_answer_is_the_same_and_nothing_is_encoded(network, volume, store):
    plain = ClassPromptInferer()(volume, network, class_ids=[1, 2])
    inferer = ClassPromptInferer(slices_at_once=2)
    inferer.store = store
    encoded, hook = count_rows(network.image_encoder)
    first = inferer(volume, network, class_ids=[1, 2])
    assert encoded == [2, 2, 1]
    second = inferer(volume, network, class_ids=[1, 2])
    hook.remove()
    assert encoded == [2, 2, 1]
    assert torch.equal(first, second)
    torch.testing.assert_close(first, plain, rtol=1e-2, atol=5e-3)  # embeddings in half precision


def test_the_store_holds_what_was_embedded_beforehand(network, padded, store):
    inferer = ClassPromptInferer()
    inferer.store = store
    assert inferer.embed(padded, network) == 10
    encoded, hook = count_rows(network.image_encoder)
    inferer(padded, network, class_ids=[1, 2])
    hook.remove()
    assert encoded == []


def test_a_damaged_shard_is_named_and_made_anew(network, volume, store, caplog):
    inferer = ClassPromptInferer()
    inferer.store = store
    expected = inferer(volume, network, class_ids=[1])
    (shard,) = store.folder.iterdir()
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-3] + b"xyz")
    assert torch.equal(inferer(volume, network, class_ids=[1]), expected)
    assert shard.name in caplog.text
    assert shard.read_bytes() == whole


def test_a_full_disk_is_told_before_anything_is_encoded(network, volume, store, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    inferer = ClassPromptInferer()
    inferer.store = store
    encoded, hook = count_rows(network.image_encoder)
    with pytest.raises(OutputError, match="free space"):
        inferer(volume, network, class_ids=[1])
    hook.remove()
    assert encoded == []


# --- precision and runtime


def test_an_unknown_precision():
    with pytest.raises(ConfigError, match="'float32' or 'bfloat16', not 'half'"):
        ClassPromptInferer(precision="half")


def test_mixed_precision_is_pytorchs_own():
    with pytest.raises(ConfigError, match="of the runtime torch, not of onnx"):
        ClassPromptInferer(precision="bfloat16", runtime="onnx")


def test_bfloat16_where_the_processor_has_none_is_refused(network, volume, monkeypatch):
    monkeypatch.setattr("scripts.engines.acceleration.cpu_has_bfloat16", lambda: False)
    with pytest.raises(ConfigError, match="cpu has no instructions for it"):
        ClassPromptInferer(precision="bfloat16")(volume, network, class_ids=[1])


def test_bfloat16_is_close_and_leaves_the_default_alone(network, volume, monkeypatch):
    monkeypatch.setattr("scripts.engines.acceleration.cpu_has_bfloat16", lambda: True)
    exact = ClassPromptInferer()(volume, network, class_ids=[1])
    mixed = ClassPromptInferer(precision="bfloat16")(volume, network, class_ids=[1])
    assert not torch.equal(mixed, exact)
    torch.testing.assert_close(mixed, exact, rtol=0.1, atol=0.1)
    assert torch.equal(ClassPromptInferer()(volume, network, class_ids=[1]), exact)


# --- masks of which the network itself expects little


def qualities_of(network, volume, class_ids):
    judged = ClassPromptInferer(quality=True)(volume, network, class_ids=class_ids)
    return judged.quality.iou  # (D, K)


@pytest.mark.parametrize(("slices_at_once", "prompts_at_once"), [(1, 1), (5, 16)])
def test_classes_of_too_little_quality_are_absent_and_the_rest_is_as_ever(
    network, volume, slices_at_once, prompts_at_once
):
    ids = [1, 2, 4]
    expected = qualities_of(network, volume, ids)
    threshold = expected.median().item()
    offset = 0.5 - threshold  # an untrained head says anything: its values are brought to the range of a threshold
    last = network.mask_decoder.iou_prediction_head.layers[-1]
    before = last.bias.clone()
    last.bias.add_(offset)
    try:
        settings = {"slices_at_once": slices_at_once, "prompts_at_once": prompts_at_once}
        whole = ClassPromptInferer(**settings)(volume, network, class_ids=ids)
        found = ClassPromptInferer(**settings, smallest_quality=0.5)(volume, network, class_ids=ids)
    finally:
        last.bias.copy_(before)
    kept = ((expected + offset) >= 0.5).T  # (K, D)
    assert 0 < kept.sum() < kept.numel()
    for k, place in np.ndindex(*kept.shape):
        answer = found[0, k, :, :, place]
        if kept[k, place]:
            torch.testing.assert_close(answer, whole[0, k, :, :, place], **HALF)
        else:
            assert (answer == ABSENT_LOGIT).all()


@pytest.mark.parametrize("quality", [-0.1, 1.5])
def test_a_quality_is_a_share(quality):
    with pytest.raises(ConfigError, match=r"an intersection over union from 0 to 1"):
        ClassPromptInferer(smallest_quality=quality)


# --- what the network says in several positions, averaged


@pytest.fixture(scope="module")
def vocabulary(bundle_root):
    return Vocabulary.read(bundle_root / "configs" / "classes.yaml")


@pytest.fixture(scope="module")
def sharp():
    """Three slices whose pixels are those of the network's square, of which they fill a part: nothing is resized."""
    return torch.rand((1, 1, 20, 32, 3), generator=torch.Generator().manual_seed(5)) * 255


def laid(values, mirrored, turns):
    """Turn values (..., H, W, D) as a viewer would turn the file."""
    values = values.flip(-2) if mirrored else values
    return torch.rot90(values, turns, dims=(-3, -2))


def laid_back(values, mirrored, turns):
    values = torch.rot90(values, -turns, dims=(-3, -2))
    return values.flip(-2) if mirrored else values


EIGHT = [(mirrored, turns) for mirrored in (False, True) for turns in range(4)]


def averaging(vocabulary, kind="all", modality="CT", **settings):
    return ClassPromptInferer(averaged_orientations={modality: kind}, vocabulary=vocabulary, **settings)


@pytest.mark.parametrize(("kind", "positions"), [("none", EIGHT[:1]), ("mirror", [EIGHT[0], EIGHT[4]]), ("all", EIGHT)])
@pytest.mark.parametrize(("slices_at_once", "prompts_at_once"), [(1, 1), (4, 16)])
def test_the_answer_is_the_mean_of_those_for_turned_files(
    network, sharp, vocabulary, kind, positions, slices_at_once, prompts_at_once
):
    settings = {"slices_at_once": slices_at_once, "prompts_at_once": prompts_at_once}
    found = averaging(vocabulary, kind, **settings)(sharp, network, class_ids=[1, 2], modality="CT")
    answers = [
        torch.sigmoid(laid_back(ClassPromptInferer()(laid(sharp, *way), network, class_ids=[1, 2]).float(), *way))
        for way in positions
    ]
    torch.testing.assert_close(torch.sigmoid(found.float()), torch.stack(answers).mean(dim=0), rtol=1e-3, atol=1e-3)


def test_in_all_positions_the_answer_does_not_depend_on_how_the_image_lies(network, volume, vocabulary):
    inferer = averaging(vocabulary)
    asked = {"class_ids": [1, 2], "modality": "CT"}
    expected = inferer(volume, network, **asked)
    plain = ClassPromptInferer()(volume, network, class_ids=[1, 2])
    for way in EIGHT[1:]:
        found = laid_back(inferer(laid(volume, *way), network, **asked), *way)
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=2e-3)
        upright = laid_back(ClassPromptInferer()(laid(volume, *way), network, class_ids=[1, 2]), *way)
        assert (upright - plain).abs().max() > 10 * (found - expected).abs().max()


def test_other_modalities_are_asked_upright_alone(network, volume, vocabulary):
    expected = ClassPromptInferer()(volume, network, class_ids=[1])
    for modality in ("MR", None):
        assert torch.equal(averaging(vocabulary)(volume, network, class_ids=[1], modality=modality), expected)
    assert not torch.equal(averaging(vocabulary)(volume, network, class_ids=[1], modality="CT"), expected)


def test_the_modality_is_found_in_the_metadata(network, volume, vocabulary):
    image = MetaTensor(volume.clone())
    image.meta["prompts"] = ImagePrompts((1, 2), modality="CT")
    expected = averaging(vocabulary)(volume, network, class_ids=[1, 2], modality="CT")
    assert torch.equal(averaging(vocabulary)(image, network), expected)


def test_a_mirrored_image_is_asked_for_the_partner(build_network, sharp, vocabulary, monkeypatch):
    left, right = 4, 5
    network = build_network(class_ids=(left, right)).eval().requires_grad_(False)
    asked, encode = [], network.encode_classes

    def listening(embedding, class_ids, **settings):
        asked.append(class_ids.tolist())
        return encode(embedding, class_ids, **settings)

    monkeypatch.setattr(network, "encode_classes", listening)
    found = averaging(vocabulary, "mirror", "MR")(sharp, network, class_ids=[left, right], modality="MR")
    # An untrained network answers much alike for both, so what it is asked is looked at too.
    assert asked == [[[left, right]] * 3, [[right, left]] * 3]
    upright = ClassPromptInferer()(sharp, network, class_ids=[left, right]).float()
    mirrored = ClassPromptInferer()(sharp.flip(-2), network, class_ids=[right, left]).float().flip(-2)
    expected = (torch.sigmoid(upright) + torch.sigmoid(mirrored)) / 2
    torch.testing.assert_close(torch.sigmoid(found.float()), expected, rtol=1e-3, atol=1e-3)


def test_a_partner_that_the_network_does_not_know_is_an_error(network, volume, vocabulary):
    with pytest.raises(ConfigError, match="a mirrored image shows class 5 where class 4 was"):
        averaging(vocabulary, "all", "MR")(volume, network, class_ids=[1, 4], modality="MR")


def test_the_quality_is_the_mean_over_the_positions(network, sharp, vocabulary):
    inferer = averaging(vocabulary, quality=True)
    found = inferer(sharp, network, class_ids=[1, 2], modality="CT").quality.iou
    expected = torch.stack([qualities_of(network, laid(sharp, *way), [1, 2]) for way in EIGHT]).mean(dim=0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_averaging_from_the_store_encodes_nothing_anew(network, sharp, vocabulary, tmp_path):
    inferer = averaging(vocabulary)
    inferer.store = EmbeddingStore(tmp_path, encoder="e", shape=EmbeddingShape(channels=256, rows=4, columns=4))
    first = inferer(sharp, network, class_ids=[1], modality="CT")
    encoded, hook = count_rows(network.image_encoder)
    second = inferer(sharp, network, class_ids=[1], modality="CT")
    hook.remove()
    assert encoded == []
    assert torch.equal(first, second)


def test_orientations_need_the_vocabulary():
    with pytest.raises(ConfigError, match="averaged_orientations need the vocabulary"):
        ClassPromptInferer(averaged_orientations={"CT": "all"})


# --- of what there is one of, the largest body


def test_of_each_class_the_largest_body_of_a_volume_stays(network):
    image = torch.rand((1, 1, 12, 20, 5), generator=torch.Generator().manual_seed(8)) * 255
    plain = ClassPromptInferer()(image, network, class_ids=[1, 2, 4])[0]
    median = plain.flatten(1).median(dim=1).values  # so that every mask has several bodies
    answers = CaseAnswers((12, 20, 5), classes=3, samples=1, device=torch.device("cpu"))
    answers.put(range(5), range(3), [(plain - median.reshape(-1, 1, 1, 1)).permute(3, 0, 1, 2)])
    before = answers.result()[0].clone()
    answers.keep_largest([0, 2])
    after = answers.result()[0]
    assert torch.equal(after[1], before[1])
    several = 0
    for channel in (0, 2):
        labels, count = ndimage.label((before[channel] > 0).numpy(), structure=np.ones((3, 3, 3)))
        several += count > 1
        sizes = [(labels == label).sum() for label in range(1, count + 1)]
        largest = torch.from_numpy(labels == 1 + int(np.argmax(sizes)))
        assert torch.equal(after[channel] > 0, largest)
        gone = (before[channel] > 0) & ~largest
        assert (after[channel][gone] == ABSENT_LOGIT).all()
        assert torch.equal(after[channel][~gone], before[channel][~gone])
    assert several


def bodies(depth):
    """Logits (D, 1, 6, 6) of a body of 4 x depth pixels and one of a single pixel, which do not touch."""
    logits = torch.full((depth, 1, 6, 6), -1.0)
    logits[:, :, :2, :2] = 2.0
    logits[0, :, 4, 4] = 3.0
    return logits


@pytest.mark.parametrize(("depth", "left"), [(2, 8), (1, 5)])
def test_the_largest_body_by_hand_and_single_slices_stay(depth, left):
    answers = CaseAnswers((6, 6, depth), classes=1, samples=1, device=torch.device("cpu"))
    answers.put(range(depth), [0], [bodies(depth)])
    answers.keep_largest([0])
    assert (answers.result() > 0).sum() == left


def test_the_quality_counts_what_stays():
    logits = bodies(3)
    logits[2] = -1.0
    logits[2, :, 5, 5] = 1.0  # alone in its slice
    answers = CaseAnswers((6, 6, 3), classes=1, samples=1, device=torch.device("cpu"), judged=True)
    answers.put(range(3), [0], [logits], [torch.full((3, 1), 0.5)])
    assert answers.result().quality.area.tolist() == [[5], [4], [1]]
    answers.keep_largest([0])
    quality = answers.result().quality
    assert quality.area.tolist() == [[4], [4], [0]]
    assert quality.overlaps.flatten().tolist() == [5, 4, 0]


def test_the_inferer_keeps_the_largest_body_where_it_is_told_to(network, volume, monkeypatch):
    kept = []
    monkeypatch.setattr(CaseAnswers, "keep_largest", lambda self, columns: kept.append(columns))
    ClassPromptInferer()(volume, network, class_ids=[1, 4])
    assert kept == []
    ClassPromptInferer(largest_component=True)(volume, network, class_ids=[1, 4])
    assert kept == [[0, 1]]
