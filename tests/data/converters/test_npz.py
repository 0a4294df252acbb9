"""MedSAM's challenge files: what comes out is what was in, and a broken or hostile file does no harm."""

import io
import pickle
import zipfile
from pathlib import Path

import nibabel
import numpy as np
import pytest
import trees
from PIL import Image

from scripts.data.converters.npz import NpzRule, find_npz_cases, read_npz_rules
from scripts.data.reading import read_image
from scripts.errors import ConfigError, InputError, PromptError

CT_RULE = NpzRule(pattern="^CT_", modality="CT", classes={1: "liver", 3: "spleen"}, patient=r"(Case_\d+)")
POLYP_RULE = NpzRule(pattern="^E_", modality="endoscopy", classes={0: "polyp"})
DEPTH, HEIGHT, WIDTH = SHAPE = (3, 20, 24)


def labels(*values, shape=SHAPE):
    result = np.zeros(shape, np.uint8)
    for place, value in enumerate(values):
        result[..., 2 + 4 * place : 5 + 4 * place, 3:9] = value
    return result


def write(path: Path, **arrays) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)
    return path


def find(source, tmp_path, vocabulary, *rules):
    return find_npz_cases(
        source, output=tmp_path / "out", rules=list(rules or (CT_RULE, POLYP_RULE)), vocabulary=vocabulary
    )


def only(found):
    assert found.skipped == ()
    return found.cases[0]


def error_of(found):
    """The one error that stands for a file."""
    (finding,) = only(found).findings
    assert (finding.severity, finding.check) == ("error", "reading")
    return finding.text


# ------------------------------------------------------------------------------------------------------ what comes out


def test_a_volume_is_written_in_itks_axes(tmp_path, vocabulary):
    image = trees.noise(1, SHAPE) * 255 // 1
    write(tmp_path / "in/a/CT_x_Case_7.npz", imgs=image, gts=labels(1, 3, 6), spacing=np.array([0.8, 0.7, 5.0]))
    case = only(found := find(tmp_path / "in", tmp_path, vocabulary))
    assert (case.name, case.patient, case.section, case.modality) == ("CT_x_Case_7", "Case_7", None, "CT")
    assert case.annotated == ("liver", "spleen")
    assert found.label_map == {1: "liver", 2: "spleen"}
    volume, label = nibabel.load(case.image), nibabel.load(case.label)
    # (z, y, x) -> (X, Y, Z); ITK's x and y run to the left and the back.
    assert np.array_equal(np.asarray(volume.dataobj), image.astype(np.uint8).transpose(2, 1, 0))
    assert np.allclose(volume.affine, np.diag([-0.8, -0.7, 5.0, 1]))
    assert np.array_equal(label.affine, volume.affine)
    # Spleen has the vocabulary's id, and 6, which the rule does not know, is background.
    assert np.array_equal(np.asarray(label.dataobj), labels(1, 2).transpose(2, 1, 0))


@pytest.mark.parametrize("colours", [True, False])
def test_a_picture_stays_a_picture(tmp_path, vocabulary, colours):
    pixels = trees.colour(1, (HEIGHT, WIDTH)) if colours else trees.grey(1, (HEIGHT, WIDTH))
    write(tmp_path / "in/E_1.npz", imgs=pixels, gts=labels(2, 255, shape=(HEIGHT, WIDTH)))
    case = only(find(tmp_path / "in", tmp_path, vocabulary))
    with Image.open(case.image) as image, Image.open(case.label) as label:
        assert np.array_equal(np.asarray(image), pixels)
        assert np.array_equal(np.asarray(label), 6 * (labels(2, 255, shape=(HEIGHT, WIDTH)) > 0))  # polyp is 6


@pytest.mark.parametrize("shape", [SHAPE, (HEIGHT, WIDTH), (HEIGHT, 3), (3, 3, 3)])
def test_grey_in_three_channels_is_grey(tmp_path, vocabulary, shape):
    """Also where an axis is as long as there are colours."""
    grey = trees.grey(1, shape)
    mask = np.zeros(shape, np.uint8)
    mask[..., :2] = 1
    spacing = {"spacing": np.ones(3)} if len(shape) == 3 else {}
    for name, image in (("CT_grey", grey), ("CT_three", np.stack([grey] * 3, axis=-1))):
        write(tmp_path / f"in/{name}.npz", imgs=image, gts=mask, **spacing)
    first, second = find(tmp_path / "in", tmp_path, vocabulary).cases
    # Of a volume left and right are a guess.
    assert [finding.check for finding in first.findings] == ["orientation"] * (len(shape) == 3)
    assert np.array_equal(read_image(first.image), read_image(second.image))
    assert read_image(first.image).shape == (1, *shape[::-1], *(1,) * (3 - len(shape)))


def test_labels_of_validation_files_lie_beside_them(tmp_path, vocabulary):
    for name in ("CT_a", "CT_b"):
        write(tmp_path / f"in/imgs/{name}.npz", imgs=trees.grey(1, SHAPE), spacing=np.ones(3), boxes=np.zeros((1, 6)))
    write(tmp_path / "in/gts/CT_a.npz", gts=labels(1))
    write(tmp_path / "in/gts/CT_lost.npz", gts=labels(1))
    found = find(tmp_path / "in", tmp_path, vocabulary)
    assert [case.name for case in found.cases] == ["CT_a"]
    assert nibabel.load(found.cases[0].label).get_fdata().any()
    assert dict(found.skipped) == {"imgs/CT_b.npz": "no label", "gts/CT_lost.npz": "label without a case"}
    # The folder of the images alone finds them too.
    assert [case.name for case in find(tmp_path / "in/imgs", tmp_path, vocabulary).cases] == ["CT_a"]


def test_every_file_is_a_case_or_a_line(tmp_path, vocabulary):
    image, spacing = trees.grey(1, SHAPE), np.ones(3)
    write(tmp_path / "in/CT_1.npz", imgs=image, gts=labels(1), spacing=spacing)
    write(tmp_path / "in/CT_kidneys.npz", imgs=image, gts=labels(6, 7), spacing=spacing)
    write(tmp_path / "in/US_1.npz", imgs=image, gts=labels(1))
    found = find(tmp_path / "in", tmp_path, vocabulary)
    assert [case.name for case in found.cases] == ["CT_1"]
    assert dict(found.skipped) == {
        "CT_kidneys.npz": "none of its label values is a known class",
        "US_1.npz": "nothing says what its label values mean; give --label-map and --modality",
    }


def test_a_rule_of_ones_own_has_to_explain_every_value(tmp_path, vocabulary):
    write(tmp_path / "in/x.npz", imgs=trees.grey(1, SHAPE), gts=labels(1, 9), spacing=np.ones(3))
    own = NpzRule(pattern="", modality="CT", classes={1: "liver"}, complete=True)
    assert error_of(find(tmp_path / "in", tmp_path, vocabulary, own)) == (
        "x.npz: its label values [9] are not in --label-map; add them"
    )
    own = NpzRule(pattern="", modality="CT", classes={1: "liver", 9: "spleen"}, complete=True)
    label = nibabel.load(only(find(tmp_path / "in", tmp_path, vocabulary, own)).label)
    assert np.array_equal(np.asarray(label.dataobj), labels(1, 2).transpose(2, 1, 0))
    with pytest.raises(PromptError, match="'livver' is unknown"):
        find(tmp_path / "in", tmp_path, vocabulary, NpzRule(pattern="", modality="CT", classes={1: "livver"}))


# ---------------------------------------------------------------------------------------------------- what is no input


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"gts": labels(1)[:2]}, r"expected gts \(3, 20, 24\) of whole numbers, got \(2, 20, 24\) uint8"),
        ({"gts": labels(1) * 1.0}, "of whole numbers, got .* float64"),
        ({"gts": labels(1)[0]}, r"expected imgs \(H, W"),
        ({"imgs": trees.colour(1, (DEPTH * HEIGHT, WIDTH)).reshape(*SHAPE, 3)}, "a grey volume, got one in colour"),
        (
            {"imgs": trees.grey(1, (*SHAPE, 2))},
            r"expected imgs \(H, W\[, 3\]\) or .*, got \(3, 20, 24, 2\)",
        ),
        ({"imgs": np.zeros((0, 20, 24))}, "expected imgs"),
        ({"imgs": np.float32(3)}, "expected imgs"),
        ({"imgs": trees.noise(1, SHAPE)}, r"whole numbers in 0\.\.\.255, got fractions"),  # 0...1 would become black
        ({"imgs": trees.ct_volume(1)}, r"0\.\.\.255, got -1000 to"),
        ({"imgs": trees.noise(1, SHAPE) * np.nan}, "got nan to nan"),
        ({"imgs": np.full(SHAPE, "text")}, "whole numbers .* got <U4"),
        ({"spacing": np.zeros(3)}, "3 numbers above 0 mm"),
        ({"spacing": np.array([1.0, np.inf, 1])}, "3 numbers above 0 mm"),
        ({"spacing": np.array([1.0, 1])}, "3 numbers above 0 mm"),
        ({"spacing": np.array(["a", "b", "c"])}, "3 numbers above 0 mm"),
        ({"imgs": None}, "expected an array 'imgs', got gts, spacing"),
    ],
)
def test_arrays_that_are_not_as_described_are_errors(tmp_path, vocabulary, changes, text):
    arrays = {"imgs": trees.grey(1, SHAPE), "gts": labels(1), "spacing": np.ones(3), **changes}
    write(tmp_path / "in/CT_1.npz", **{name: array for name, array in arrays.items() if array is not None})
    found = find(tmp_path / "in", tmp_path, vocabulary)
    with pytest.raises(InputError, match=rf"^CT_1\.npz: .*{text}"):
        raise InputError(error_of(found))


class Trap:
    """What runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def hostile_array(path, trap):
    write(path, imgs=np.array([Trap(trap)], dtype=object), gts=labels(1))


def hostile_file(path, trap):
    path.write_bytes(pickle.dumps(Trap(trap)))


@pytest.mark.parametrize("make", [hostile_array, hostile_file])
def test_nothing_is_ever_unpickled(tmp_path, vocabulary, make):
    (tmp_path / "in").mkdir()
    make(tmp_path / "in/CT_1.npz", tmp_path / "trap")
    assert "expected plain arrays in a complete .npz" in error_of(find(tmp_path / "in", tmp_path, vocabulary))
    assert not (tmp_path / "trap").exists()
    loaded = np.load(tmp_path / "in/CT_1.npz", allow_pickle=True)
    _ = loaded["imgs"] if make is hostile_array else None
    assert (tmp_path / "trap").exists()  # the trap works


def as_single_array(content):
    stream = io.BytesIO()
    np.save(stream, np.zeros(3))
    return stream.getvalue()


def with_other_bytes(content):
    """Damage inside the compressed stream of the first array."""
    middle = len(content) // 4
    return content[:middle] + bytes(byte ^ 255 for byte in content[middle : middle + 40]) + content[middle + 40 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: b"PK",
        as_single_array,
        with_other_bytes,
    ],
)
def test_a_broken_file_is_an_error_beside_good_ones(tmp_path, vocabulary, damage):
    for number in (1, 2, 3):
        path = write(
            tmp_path / f"in/CT_{number}.npz", imgs=trees.grey(number, SHAPE), gts=labels(1), spacing=np.ones(3)
        )
        if number == 2:
            path.write_bytes(damage(path.read_bytes()))
    found = find(tmp_path / "in", tmp_path, vocabulary)
    assert [(case.name, any(finding.severity == "error" for finding in case.findings)) for case in found.cases] == [
        ("CT_1", False),
        ("CT_2", True),
        ("CT_3", False),
    ]


def test_an_archive_of_an_unknown_kind_is_an_error(tmp_path, vocabulary):
    path = write(tmp_path / "in/CT_1.npz", imgs=trees.grey(1, SHAPE))
    content = bytearray(path.read_bytes())
    for at in (content.index(b"PK\x03\x04") + 8, content.index(b"PK\x01\x02") + 10):
        content[at : at + 2] = (99).to_bytes(2, "little")  # a method of compression that Python has not
    path.write_bytes(content)
    with pytest.raises(NotImplementedError), zipfile.ZipFile(path) as archive:
        archive.read("imgs.npy")
    assert "complete .npz" in error_of(find(tmp_path / "in", tmp_path, vocabulary))


@pytest.mark.parametrize("paths", [(), ("gts/CT_1.npz",), ("a/gts/CT_1.npz",)])
def test_a_folder_without_images_is_refused(tmp_path, vocabulary, paths):
    (tmp_path / "in").mkdir()
    for path in paths:
        write(tmp_path / "in" / path, gts=labels(1))
    with pytest.raises(InputError, match=r"holds no \.npz file of images"):
        find(tmp_path / "in", tmp_path, vocabulary)


def test_two_files_of_one_name_are_refused(tmp_path, vocabulary):
    for folder in ("a", "b"):
        write(tmp_path / f"in/{folder}/CT_1.npz", imgs=trees.grey(1, SHAPE), gts=labels(1))
    with pytest.raises(InputError, match=r"a/CT_1.npz and b/CT_1.npz have the same name"):
        find(tmp_path / "in", tmp_path, vocabulary)


def test_files_that_are_all_left_out_are_refused(tmp_path, vocabulary):
    write(tmp_path / "in/US_1.npz", imgs=trees.grey(1, SHAPE), gts=labels(1))
    with pytest.raises(InputError, match=r"all 1 \.npz files are left out, the first because of: nothing says"):
        find(tmp_path / "in", tmp_path, vocabulary)


# ------------------------------------------------------------------------------------------------------------ the rules


# Names of published files and what they are, as the challenge's authors list them.
@pytest.mark.parametrize(
    ("name", "modality", "patient"),
    [
        ("CT_AbdomenCT_Case_00001", "CT", None),
        ("MR_BraTS_FLAIR_BraTS-GLI-00494-001", "MR", "BraTS-GLI-00494"),
        (
            "Endoscopy_Kvasir-SEG_cju0qkwl35piu0993l0dewei2",
            "endoscopy",
            "Endoscopy_Kvasir-SEG_cju0qkwl35piu0993l0dewei2",
        ),
        ("XRay_Chest-Xray-Masks-and-Labels_MCUCXR_0001_0", "xray", "XRay_Chest-Xray-Masks-and-Labels_MCUCXR_0001_0"),
    ],
)
def test_published_names_are_known(tmp_path, tables, vocabulary, name, modality, patient):
    flat = modality in ("endoscopy", "xray")
    shape = SHAPE[1:] if flat else SHAPE
    write(tmp_path / f"in/{name}.npz", imgs=trees.grey(1, shape), gts=labels(1, shape=shape))
    case = only(find(tmp_path / "in", tmp_path, vocabulary, *tables.npz_rules))
    assert (case.modality, case.patient) == (modality, patient or name)


RULE = "{pattern: x, modality: mri, classes: {1: liver}}"


def test_modalities_of_rules_are_canonical(tmp_path, vocabulary):
    path = tmp_path / "rules.yaml"
    path.write_text(f"- {RULE}")
    assert read_npz_rules(path, vocabulary) == [NpzRule(pattern="x", modality="MR", classes={1: "liver"})]


@pytest.mark.parametrize(
    "text",
    [
        None,
        "a: [",
        "- 3",
        "3",
        "- {pattern: x}",
        f"- {RULE.replace('x', '(')}",
        f"- {RULE.replace('mri', 'radar')}",
        f"- {RULE.replace('liver', 'livver')}",
        f"- {RULE.replace('{1: liver}', 'liver')}",
        f"- {RULE[:-1]}, more: 1}}",
    ],
)
def test_broken_rules_are_refused(tmp_path, vocabulary, text):
    path = tmp_path / "rules.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=r"rules.yaml cannot be used"):
        read_npz_rules(path, vocabulary)
