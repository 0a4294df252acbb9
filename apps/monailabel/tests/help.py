"""Requests, and what comes back."""

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

NAMES = {1: "liver", 2: "spleen", 3: "pancreas", 4: "left kidney", 5: "right kidney"}


def infer(client: Any, image: str, *, model: str = "automedsam", **params: Any) -> Any:
    """Ask for a label map of an image in the datastore."""
    data = {"params": json.dumps({"device": "cpu", **params})}
    return client.post(f"/infer/{model}?image={image}&output=image", data=data)


def upload(client: Any, file: Path, *, output: str = "image", **params: Any) -> Any:
    """Ask for a label map of a file that the datastore does not have."""
    data = {"params": json.dumps({"device": "cpu", **params})}
    with file.open("rb") as stream:
        return client.post(f"/infer/automedsam?output={output}", data=data, files={"file": (file.name, stream)})


def put_label(client: Any, image: str, label: Path) -> None:
    """Save a label as a viewer does."""
    with label.open("rb") as stream:
        answer = client.put(f"/datastore/label?image={image}&tag=final", files={"label": (label.name, stream)})
    assert answer.status_code == 200, answer.text


def label_map(answer: Any) -> nibabel.Nifti1Image:
    """Read a label map out of an answer."""
    assert answer.status_code == 200, answer.text
    return nibabel.Nifti1Image.from_bytes(gzip.decompress(answer.content))


def values(image: nibabel.Nifti1Image) -> np.ndarray:
    """Give voxels as they are stored."""
    return np.asarray(image.dataobj)


def assert_on_grid(found: nibabel.Nifti1Image, image: Path) -> None:
    """The label map has the image's exact grid."""
    expected = nibabel.load(image)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found.affine, expected.affine, atol=1e-4)


def dice(found: np.ndarray, truth: np.ndarray, value: int) -> float:
    """Compare one class."""
    return float(2 * ((found == value) & (truth == value)).sum() / ((found == value).sum() + (truth == value).sum()))


def sha256(path: Path) -> str:
    """Name a file by its content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
