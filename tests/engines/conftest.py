"""What the tests of the engines share: networks, cases and batches small enough for a CPU."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from scripts.data.vocabulary import Vocabulary
from scripts.networks.automedsam import AutoMedSAM


@pytest.fixture(scope="session")
def vocabulary(bundle_root) -> Vocabulary:
    return Vocabulary.read(bundle_root / "configs" / "classes.yaml")


@pytest.fixture(scope="session")
def build_network() -> Callable[..., AutoMedSAM]:
    """Build a small network; the same seed gives the same weights. T = 1 makes the noise as large as it can be."""

    def build(*, seed: int = 0, **settings: Any) -> AutoMedSAM:
        small = {"image_encoder": "compact", "image_size": 32, "channels": (8, 16, 32), "diffusion_steps": 1}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return AutoMedSAM(**{**small, **settings})

    return build


@pytest.fixture(scope="session")
def make_case() -> Callable[..., dict[str, Any]]:
    """Make a case as the transforms before the network leave it, with a block of each class in the first slice."""

    def make(
        name: str = "a",
        *,
        shape: tuple[int, int, int] = (12, 16, 4),
        classes: int = 2,
        annotated: tuple[int, ...] = (1, 2),
        spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
        planar: bool = False,
        channels: int = 1,
    ) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(sum(map(ord, name)))
        image = torch.rand((channels, *shape), generator=generator) * 255
        label = torch.zeros((classes, *shape), dtype=torch.uint8)
        for k in range(classes):
            label[k, 2 + k : 8 + k, 3 : 9 + k, k:2] = 1
        affine = torch.from_numpy(np.diag([*spacing, 1.0]))
        meta = {"original_affine": affine, "planar": planar, "picture": planar}
        return {
            "case": name,
            "image": MetaTensor(image, affine=affine, meta=dict(meta)),
            "label": MetaTensor(label, affine=affine, meta=dict(meta)),
            "annotated": list(annotated),
            "class_ids": [1, 2],
        }

    return make
