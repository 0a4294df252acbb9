"""Segment a volume without any shortcut: `python slice_by_slice.py MODEL VOLUME OUTPUT IDS [--plain]`.

What `infer` is compared with: the network is called for each slice and each class, and encodes the slice each time. The
volume lies in display orientation already, so that nothing has to be turned.
"""

import argparse
from pathlib import Path

import nibabel
import numpy as np
import torch
from model_files import ABDOMINAL_WINDOW, read_model
from plain_networks import PlainAutoMedSAM

from scripts.data.fitting import network_slices, restore_from_square
from scripts.data.preprocessing import scale_intensity
from scripts.networks.automedsam import AutoMedSAM
from scripts.networks.prompts import MaskPrediction


def main() -> None:
    """Read, segment and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path, help="model.pt with its model.json")
    parser.add_argument("volume", type=Path, help="CT in HU, .nii.gz, axes posterior, left, superior")
    parser.add_argument("output", type=Path, help="label map to write")
    parser.add_argument("ids", help="class ids, separated by commas")
    parser.add_argument("--plain", action="store_true", help="the plain form of the network")
    options = parser.parse_args()
    image = nibabel.nifti1.load(options.volume)
    voxels = torch.from_numpy(np.asarray(image.dataobj, dtype=np.float32))[None]  # (1, H, W, D)
    scaled = scale_intensity(voxels, modality="CT", window=ABDOMINAL_WINDOW)
    ids = [int(word) for word in options.ids.split(",")]
    labels = segment(read_model(options.model), scaled, ids, plain=options.plain)
    nibabel.nifti1.save(nibabel.nifti1.Nifti1Image(labels, image.affine), options.output)


@torch.no_grad()
def segment(network: AutoMedSAM, volume: torch.Tensor, ids: list[int], *, plain: bool) -> np.ndarray:
    """Ask for classes in a volume `(1, H, W, D)` of 0...255: ids `(H, W, D)` uint8, 0 where none is more likely."""
    released = PlainAutoMedSAM(network) if plain else None
    _, height, width, depth = volume.shape
    labels = np.zeros((height, width, depth), dtype=np.uint8)
    for place in range(depth):
        image = network_slices(volume[..., place : place + 1], network.image_size)  # (1, 3, S, S)
        squares = [_ask(network, image, i) if released is None else released(image, i) for i in ids]
        logits = restore_from_square(torch.cat(squares, dim=1), size=network.image_size, original=(height, width))
        highest, winner = logits[0].half().max(dim=0)  # in half precision, as `infer` compares them
        labels[..., place] = torch.where(highest > 0, torch.tensor(ids, dtype=torch.uint8)[winner], 0).numpy()
    return labels


def _ask(network: AutoMedSAM, image: torch.Tensor, class_id: int) -> torch.Tensor:
    """Call the network for one image and class: logits `(1, 1, S, S)`."""
    prediction = network(image, class_ids=torch.tensor([[class_id]]))
    if not isinstance(prediction, MaskPrediction):
        raise TypeError(f"expected a MaskPrediction of a call with class_ids, got {type(prediction).__name__}")
    return prediction.logits


if __name__ == "__main__":
    main()
