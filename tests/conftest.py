"""What every test shares."""

import os
from pathlib import Path

import pytest
import torch

from scripts.data.phantoms import write_phantoms
from scripts.packaging import package_model

BUNDLE_ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def bundle_root() -> Path:
    """The folder that holds configs/ and scripts/."""
    return BUNDLE_ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real images and golden outputs, kept beside the checkout; where they are missing CI fails, others skip."""
    folder = BUNDLE_ROOT.parent / "shared"
    if folder.is_dir():
        return folder
    message = f"{folder} is absent: real images and reference outputs are kept outside the repository"
    if os.environ.get("CI") == "true":
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="session")
def phantom_model() -> Path:
    """A small model that has learned the five organs of the CT phantoms, with its card beside it."""
    return BUNDLE_ROOT / "tests" / "data_files" / "phantom_model.pt"


@pytest.fixture(scope="session")
def phantom_bundle(phantom_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That model as a bundle of its own; not to be written to."""
    folder = tmp_path_factory.mktemp("bundles") / "phantoms"
    package_model(phantom_model, folder)
    return folder


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded source of random tensors."""
    return torch.Generator().manual_seed(20250206)


@pytest.fixture(scope="session")
def tiny_phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The datalist of five CT phantoms of 32 x 32 x 12 voxels: training 2, validation 1, test 2."""
    folder = tmp_path_factory.mktemp("phantoms")
    return write_phantoms(folder, training=2, validation=1, test=2, size=32, slices=12)
