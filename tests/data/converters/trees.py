"""Small data sets in the layouts and names of their owners, for tests.

Every function writes one and returns what preparation has to find in it.
"""

import json
import locale
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import itk
import nibabel
import numpy as np
from PIL import Image

SHAPE = (24, 20, 6)  # X, Y, Z
AFFINE = np.array([[-1.5, 0, 0, 18], [0, -1.5, 0, 15], [0, 0, 4, 0], [0, 0, 0, 1]], dtype=float)  # LPS axes


@dataclass
class Expected:
    """What preparation has to find: cases a section, classes annotated, files left out, and options to give."""

    sections: dict[str, int]
    classes: set[str]
    skipped: int = 0
    options: dict[str, object] = field(default_factory=dict)


def noise(number: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Numbers in 0...1 that differ from case to case."""
    return np.random.default_rng(number).random(shape)


def ct_volume(number: int) -> np.ndarray:
    """A body in air, in HU."""
    volume = np.full(SHAPE, -1000.0)
    volume[2:-2, 2:-2] = 40 + 60 * noise(number)[2:-2, 2:-2]
    return volume.astype(np.int16)


def mr_volume(number: int) -> np.ndarray:
    """Positive numbers with some background."""
    volume = (noise(number) * 900 + 10).astype(np.int16)
    volume[:2] = 0
    return volume


def label_volume(*values: int) -> np.ndarray:
    """A block of each value; the first lies to the right of the patient (low X in LPS axes)."""
    labels = np.zeros(SHAPE, dtype=np.uint8)
    for place, value in enumerate(values):
        x = 3 + (place * 17) // max(len(values) - 1, 1)
        labels[x : x + 2, 5 + place % 8 : 9 + place % 8, 1:5] = value
    return labels


def save_volume(voxels: np.ndarray, path: Path, affine: np.ndarray = AFFINE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)


def save_picture(pixels: np.ndarray, path: Path, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def colour(number: int, size: tuple[int, int] = (20, 24)) -> np.ndarray:
    return (noise(number, (*size, 3)) * 255).astype(np.uint8)


def grey(number: int, size: tuple[int, int] = (20, 24)) -> np.ndarray:
    return (noise(number, size) * 255).astype(np.uint8)


def mask(top: int = 4, size: tuple[int, int] = (20, 24)) -> np.ndarray:
    pixels = np.zeros(size, dtype=np.uint8)
    pixels[top : top + 6, 6:14] = 255
    return pixels


def abdomenct1k(root: Path) -> Expected:
    for number in range(1, 7):
        part = root / f"AbdomenCT-1K-ImagePart{1 + number // 4}"
        save_volume(ct_volume(number), part / f"Case_{number:05d}_0000.nii.gz")
        if number < 6:  # some images have no mask
            labels = label_volume(2, 1, 3, 4, 2)  # kidneys on both sides, one value
            save_volume(labels, root / "Mask" / f"Case_{number:05d}.nii.gz")
    return Expected(
        {"training": 3, "validation": 1, "test": 1},
        {"liver", "spleen", "pancreas", "left kidney", "right kidney"},
        skipped=1,
        options={"fractions": (0.6, 0.2, 0.2)},
    )


def amos(root: Path) -> Expected:
    for section, numbers in {"Tr": (1, 4, 507), "Va": (8, 13)}.items():
        for number in numbers:
            volume = mr_volume(number) if number > 500 else ct_volume(number)
            save_volume(volume, root / "amos22" / f"images{section}" / f"amos_{number:04d}.nii.gz")
            labels = label_volume(2, 6, 10, 1, 15, 4, 3)
            save_volume(labels, root / "amos22" / f"labels{section}" / f"amos_{number:04d}.nii.gz")
    save_volume(ct_volume(2), root / "amos22/imagesTs/amos_0002.nii.gz")
    (root / "__MACOSX").mkdir()
    (root / "__MACOSX/._amos_0001.nii.gz").write_bytes(b"fork")
    classes = {"liver", "spleen", "pancreas", "left kidney", "right kidney"}
    return Expected({"training": 2, "validation": 2}, classes, skipped=1)


def brats(root: Path) -> Expected:
    for case in ("BraTS-GLI-00000-000", "BraTS-GLI-00002-000", "BraTS-GLI-00494-000", "BraTS-GLI-00494-001"):
        number = int(case.replace("-", "")[-8:])
        for place, sequence in enumerate(("t1c", "t1n", "t2f", "t2w")):
            save_volume(mr_volume(number * 4 + place), root / case / f"{case}-{sequence}.nii.gz")
        save_volume(label_volume(1, 2, 3), root / case / f"{case}-seg.nii.gz")
    return Expected({"training": 2, "validation": 1, "test": 1}, {"brain tumour"}, options={"sequence": "t1ce"})


def kvasir_seg(root: Path) -> Expected:
    names = [f"cju0qkwl35piu0993l0dew{number:03d}" for number in range(10)]
    for number, name in enumerate(names):
        save_picture(colour(number), root / f"Kvasir-SEG/images/{name}.jpg")
        save_picture(np.stack([mask(number)] * 3, axis=2), root / f"Kvasir-SEG/masks/{name}.jpg")
    (root / "Kvasir-SEG/kavsir_bboxes.json").write_text("{}")
    return Expected({"training": 7, "validation": 1, "test": 2}, {"polyp"})


def chest_xray_masks(root: Path) -> Expected:
    folder = root / "Lung Segmentation"
    for number in range(1, 5):
        save_picture(grey(number), folder / f"CXR_png/MCUCXR_{number:04d}_0.png")
        save_picture(mask(), folder / f"masks/MCUCXR_{number:04d}_0.png")
        save_picture(grey(50 + number), folder / f"CXR_png/CHNCXR_{number:04d}_1.png")
        if number < 4:
            save_picture(mask(), folder / f"masks/CHNCXR_{number:04d}_1_mask.png")
    (folder / "ClinicalReadings").mkdir()
    (folder / "ClinicalReadings/MCUCXR_0001_0.txt").write_text("normal")
    return Expected({"training": 5, "validation": 1, "test": 1}, {"lung"}, skipped=1)


def polyp(root: Path) -> Expected:
    names = ["1", "2", "30", "60", *(f"cju{number}" for number in range(6))]
    for number, name in enumerate(names):
        save_picture(colour(number), root / f"TrainDataset/image/{name}.png")
        save_picture(mask(number), root / f"TrainDataset/masks/{name}.png")
    tests = {"Kvasir": "cju9", "CVC-ClinicDB": "14", "CVC-ColonDB": "1", "ETIS-LaribPolypDB": "1", "CVC-300": "149"}
    for number, (name, stem) in enumerate(tests.items()):
        save_picture(colour(100 + number), root / f"TestDataset/{name}/images/{stem}.png")
        save_picture(mask(), root / f"TestDataset/{name}/masks/{stem}.png")
    parts = ("kvasir", "clinicdb", "colondb", "etis", "cvc300")
    return Expected({"training": 9, "validation": 1, **{f"test_{part}": 1 for part in parts}}, {"polyp"})


def isic2018(root: Path) -> Expected:
    for number, section in enumerate(("Training", "Training", "Validation", "Test")):
        inputs = root / f"ISIC2018_Task1-2_{section}_Input"
        save_picture(colour(number), inputs / f"ISIC_{number:07d}.jpg")
        (inputs / "LICENSE.txt").write_text("terms")
        truth = root / f"ISIC2018_Task1_{section}_GroundTruth"
        save_picture(mask(), truth / f"ISIC_{number:07d}_segmentation.png")
    return Expected({"training": 2, "validation": 1, "test": 1}, {"skin lesion"})


def ph2(root: Path) -> Expected:
    folder = root / "PH2Dataset/PH2 Dataset images"
    for number in (2, 3, 4, 6):
        name = f"IMD{number:03d}"
        save_picture(colour(number), folder / f"{name}/{name}_Dermoscopic_Image/{name}.bmp")
        save_picture(mask() > 0, folder / f"{name}/{name}_lesion/{name}_lesion.bmp")
        save_picture(mask() > 0, folder / f"{name}/{name}_roi/{name}_R1_Label4.bmp")
    return Expected({"training": 2, "validation": 1, "test": 1}, {"skin lesion"})


def drive(root: Path) -> Expected:
    for section, numbers in {"training": (21, 22, 23), "test": (1, 2)}.items():
        for number in numbers:
            name = f"{number:02d}_{section}"
            save_picture(colour(number), root / f"DRIVE/{section}/images/{name}.tif")
            save_picture(mask(), root / f"DRIVE/{section}/mask/{name}_mask.gif")
            if section == "training" or number == 1:
                save_picture(mask(), root / f"DRIVE/{section}/1st_manual/{number:02d}_manual1.gif")
    return Expected({"training": 2, "validation": 1, "test": 1}, {"retinal vessel"}, skipped=1)


def stare(root: Path) -> Expected:
    for number in (1, 2, 3, 4):
        save_picture(colour(number), root / f"stare-images/im{number:04d}.ppm")
        save_picture(mask(), root / f"labels-ah/im{number:04d}.ah.ppm")
    return Expected({"training": 2, "validation": 1, "test": 1}, {"retinal vessel"})


def clinicdb(root: Path) -> Expected:
    for number in (1, 2, 25, 26, 60, 70, 612):  # films 1, 1, 1, 2, 3, 4 and 29
        save_picture(colour(number), root / f"CVC-ClinicDB/Original/{number}.tif")
        save_picture(mask(), root / f"CVC-ClinicDB/Ground Truth/{number}.tif")
    return Expected({"training": 3, "validation": 3, "test": 1}, {"polyp"}, options={"fractions": (0.6, 0.2, 0.2)})


def colondb(root: Path) -> Expected:
    """The owner's package: frames, masks of polyps, of what is not informative, and contours, all in one folder."""
    for number in range(1, 5):
        save_picture(colour(number), root / f"CVC-ColonDB/{number}.bmp")
        for place, kind in enumerate("psc"):
            save_picture(mask(place + 1), root / f"CVC-ColonDB/{kind}{number}.bmp")
    return Expected({"training": 2, "validation": 1, "test": 1}, {"polyp"})


def colondb_redistributed(root: Path) -> Expected:
    """The 380 frames as others hand them on."""
    for number in range(1, 5):
        save_picture(colour(number), root / f"CVC-ColonDB/images/{number}.png")
        save_picture(mask(), root / f"CVC-ColonDB/masks/{number}.png")
    return Expected({"training": 2, "validation": 1, "test": 1}, {"polyp"})


def udiat(root: Path) -> Expected:
    for number in range(1, 5):
        save_picture(grey(number), root / f"BUS/original/{number:06d}.png")
        save_picture(mask(), root / f"BUS/GT/{number:06d}.png")
    return Expected({"training": 2, "validation": 1, "test": 1}, {"breast lesion"})


def busi(root: Path) -> Expected:
    folder = root / "Dataset_BUSI_with_GT"
    for number, name in enumerate(("benign (1)", "benign (100)", "malignant (1)", "normal (1)")):
        kind = name.split()[0]
        save_picture(grey(number), folder / f"{kind}/{name}.png")
        save_picture(mask() * (kind != "normal"), folder / f"{kind}/{name}_mask.png")
    save_picture(mask(12), folder / "benign/benign (100)_mask_1.png")
    return Expected({"training": 2, "validation": 1, "test": 1}, {"breast lesion"})


def dsb2018(root: Path) -> Expected:
    for number in range(4):
        name = f"{number:064x}"
        save_picture(np.dstack([colour(number), np.full((20, 24), 255, np.uint8)]), root / f"{name}/images/{name}.png")
        for place in range(number + 1):
            save_picture(mask(3 * place), root / f"{name}/masks/{number * 10 + place:064x}.png")
    return Expected({"training": 2, "validation": 1, "test": 1}, {"cell nucleus"})


def tnbc(root: Path) -> Expected:
    for patient, count in {1: 2, 2: 1, 3: 1}.items():
        for number in range(1, count + 1):
            name = f"{patient:02d}_{number}.png"
            save_picture(colour(10 * patient + number), root / f"TNBC_NucleiSegmentation/Slide_{patient:02d}/{name}")
            save_picture(mask(), root / f"TNBC_NucleiSegmentation/GT_{patient:02d}/{name}")
    return Expected(
        {"training": 2, "validation": 1, "test": 1}, {"cell nucleus"}, options={"fractions": (0.4, 0.3, 0.3), "seed": 1}
    )


def flare22(root: Path) -> Expected:
    for number in range(1, 5):
        save_volume(ct_volume(number), root / f"FLARE22Train/images/FLARE22_Tr_{number:04d}_0000.nii.gz")
        save_volume(label_volume(2, 1, 5, 3, 4, 13), root / f"FLARE22Train/labels/FLARE22_Tr_{number:04d}.nii.gz")
    classes = {"liver", "spleen", "pancreas", "left kidney", "right kidney"}
    return Expected({"training": 2, "validation": 1, "test": 1}, classes)


def acdc(root: Path) -> Expected:
    for section, patients in {"training": (1, 2, 3), "testing": (101,)}.items():
        for patient in patients:
            folder = root / f"ACDC/database/{section}/patient{patient:03d}"
            save_volume(np.stack([mr_volume(1)] * 2, axis=3), folder / f"patient{patient:03d}_4d.nii.gz")
            for frame in (1, 12):
                name = f"patient{patient:03d}_frame{frame:02d}"
                save_volume(mr_volume(patient * 20 + frame), folder / f"{name}.nii.gz")
                save_volume(label_volume(1, 2, 3), folder / f"{name}_gt.nii.gz")
            (folder / "Info.cfg").write_text("ED: 1\nES: 12\n")
    classes = {"right ventricle", "myocardium", "left ventricle"}
    return Expected({"training": 4, "validation": 2, "test": 2}, classes)


def dicom_series(voxels: np.ndarray, folder: Path, prefix: str, uid: str) -> list[str]:
    """Write (X, Y, Z) as DICOM slices; the numbers in the file names grow with the position."""
    folder.mkdir(parents=True, exist_ok=True)
    image = itk.image_from_array(np.ascontiguousarray(voxels.transpose(2, 1, 0)).astype(np.int16))
    names = [str(folder / f"{prefix}-{number:05d}.dcm") for number in range(1, voxels.shape[2] + 1)]
    usual = locale.setlocale(locale.LC_ALL)
    for number, name in enumerate(names):
        plane = itk.image_from_array(np.ascontiguousarray(itk.array_from_image(image)[number][None]))
        plane.SetSpacing((1.5, 1.5, 4.0))
        plane.SetOrigin((-18.0, -15.0, 4.0 * number))
        tags = plane.GetMetaDataDictionary()
        tags["0008|0060"] = "MR"
        tags["0020|000d"] = f"{uid}.1"
        tags["0020|000e"] = f"{uid}.2"
        tags["0020|0013"] = str(number + 1)
        tags["0020|0032"] = f"-18\\-15\\{4 * number}"
        tags["0020|0037"] = "1\\0\\0\\0\\1\\0"
        writer_io = itk.GDCMImageIO.New(KeepOriginalUID=True)
        itk.imwrite(plane, name, imageio=writer_io)
    locale.setlocale(locale.LC_ALL, usual)  # writing has set "C", in which Python takes every text file for ASCII
    return names


def _chaos(root: Path, inner: str, ground: str) -> Expected:
    for patient in (1, 2, 3, 5):
        folder = root / f"Train_Sets/MR/{patient}"
        names = dicom_series(mr_volume(patient), folder / inner, "IMG-0004", f"1.2.3.{patient}")
        labels = label_volume(126, 63, 252, 189)
        for number, name in enumerate(names):
            save_picture(labels[:, :, number].T, folder / ground / f"{Path(name).stem}.png")
    (root / "Test_Sets/MR/4").mkdir(parents=True)
    return Expected({"training": 2, "validation": 1, "test": 1}, {"liver", "spleen", "left kidney", "right kidney"})


def chaos_mr(root: Path) -> Expected:
    return _chaos(root, "T2SPIR/DICOM_anon", "T2SPIR/Ground")


def chaos_mr_t1(root: Path) -> Expected:
    return _chaos(root, "T1DUAL/DICOM_anon/InPhase", "T1DUAL/Ground")


def montgomery(root: Path) -> Expected:
    for number in range(1, 5):
        save_picture(grey(number), root / f"MontgomerySet/CXR_png/MCUCXR_{number:04d}_0.png")
        left, right = mask(), mask()
        left[:, 12:], right[:, :12] = 0, 0
        save_picture(left > 0, root / f"MontgomerySet/ManualMask/leftMask/MCUCXR_{number:04d}_0.png")
        save_picture(right > 0, root / f"MontgomerySet/ManualMask/rightMask/MCUCXR_{number:04d}_0.png")
    return Expected({"training": 2, "validation": 1, "test": 1}, {"lung"})


def msd(root: Path) -> Expected:
    """Task03_Liver, with the hidden files that its archive holds."""
    entries = []
    for number in (0, 1, 10, 100):
        save_volume(ct_volume(number), root / f"imagesTr/liver_{number}.nii.gz")
        save_volume(label_volume(1, 2), root / f"labelsTr/liver_{number}.nii.gz")
        (root / f"imagesTr/._liver_{number}.nii.gz").write_bytes(b"fork")
        entries.append({"image": f"./imagesTr/liver_{number}.nii.gz", "label": f"./labelsTr/liver_{number}.nii.gz"})
    table = {
        "name": "Liver",
        "licence": "CC-BY-SA 4.0",
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "liver", "2": "cancer"},
        "numTraining": 4,
        "training": entries,
        "test": ["./imagesTs/liver_132.nii.gz"],
    }
    (root / "dataset.json").write_text(json.dumps(table))
    return Expected({"training": 2, "validation": 1, "test": 1}, {"liver"}, skipped=1)


def msd_brain(root: Path) -> Expected:
    """Task01_BrainTumour: four channels along the fourth axis."""
    entries = []
    for number in (1, 2, 3, 4):
        channels = np.stack([mr_volume(number * 10 + place) for place in range(4)], axis=3)
        save_volume(channels, root / f"imagesTr/BRATS_{number:03d}.nii.gz")
        save_volume(label_volume(1, 2, 3), root / f"labelsTr/BRATS_{number:03d}.nii.gz")
        entries.append(
            {"image": f"./imagesTr/BRATS_{number:03d}.nii.gz", "label": f"./labelsTr/BRATS_{number:03d}.nii.gz"}
        )
    table = {
        "name": "BRATS",
        "modality": {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"},
        "labels": {"0": "background", "1": "edema", "2": "non-enhancing tumor", "3": "enhancing tumour"},
        "training": entries,
        "test": [],
    }
    (root / "dataset.json").write_text(json.dumps(table))
    options = {"sequence": "t1ce"}
    return Expected({"training": 2, "validation": 1, "test": 1}, {"brain tumour"}, options=options)


def medsam_npz(root: Path) -> Expected:
    folder = root / "CVPR24-MedSAMLaptopData/train_npz"
    for number in range(1, 5):
        volume = (noise(number, (5, 20, 24)) * 255).astype(np.uint8)  # (D, H, W)
        labels = np.zeros((5, 20, 24), dtype=np.uint8)
        labels[1:4, 4:9, 4:9], labels[2, 10:14, 4:8], labels[2, 10:14, 12:16] = 1, 4, 6
        _save_npz(folder / f"CT/AbdomenCT1K/CT_AbdomenCT_Case_{number:05d}.npz", volume, labels, (1.0, 1.5, 2.5))
        picture = colour(number)
        numbered = (mask() > 0).astype(np.uint8) * (2 if number > 1 else 255)
        _save_npz(folder / f"Endoscopy/Kvasir-SEG/Endoscopy_Kvasir-SEG_cju{number}.npz", picture, numbered)
        chest = np.stack([grey(number)] * 3, axis=2)
        _save_npz(folder / f"XRay/XRay_Chest-Xray-Masks-and-Labels_MCUCXR_000{number}_0.npz", chest, numbered)
    _save_npz(folder / "US/US_Unknown_1.npz", grey(90), (mask() > 0).astype(np.uint8))
    classes = {"liver", "pancreas", "spleen", "polyp", "lung"}
    return Expected({"training": 8, "validation": 1, "test": 3}, classes, skipped=1)


def _save_npz(path: Path, image: np.ndarray, labels: np.ndarray, spacing: tuple[float, ...] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {"imgs": image, "gts": labels}
    np.savez_compressed(path, **arrays if spacing is None else {**arrays, "spacing": np.array(spacing)})


OWNERS: dict[str, Callable[[Path], Expected]] = {
    maker.__name__: maker
    for maker in (
        abdomenct1k, amos, brats, kvasir_seg, chest_xray_masks, polyp, isic2018, ph2, drive, stare, clinicdb, colondb,
        udiat, busi, dsb2018, tnbc, flare22, acdc, chaos_mr, chaos_mr_t1, montgomery, msd, medsam_npz,
    )
}  # fmt: skip
