"""The trainings and evaluations of a study's rows. What is complete is not run again."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from scripts.networks.model_card import ModelCard
from scripts.study.completion import is_complete, mark_complete, require_new_run
from scripts.study.plan import PlannedRows
from scripts.study.rows import StudyRow


def run_row(rows: PlannedRows, row: StudyRow) -> str | None:
    """Train and evaluate a row with every seed; give the reason where that failed."""
    from scripts.engines.evaluators import intended_error

    for seed in rows.plan.seeds:
        try:
            checkpoint = _train(rows, row, seed)
            for noise_seed in (None, *rows.plan.noise_seeds):
                _evaluate(rows, row, seed, noise_seed, checkpoint)
        except Exception as error:  # MONAI wraps what the bundle raises
            reason = intended_error(error)
            if reason is None:
                raise
            return " ".join(str(reason).split())
    return None


def trainable_parameters(card: ModelCard) -> int:
    """Count the parameters that a network's optimiser is given, from the card beside its weights."""
    import torch

    with torch.device("meta"):  # no memory, whatever the network's size
        learns_wholly = bool(card.training.get("image_encoder_trained", False))
        network = _network(card.architecture)(**card.network, train_image_encoder=learns_wholly)
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


def _network(architecture: str) -> Callable[..., nn.Module]:
    """Find the network of a model card."""
    from scripts.networks.automedsam import AutoMedSAM
    from scripts.networks.hsp_sam import HSPSAM
    from scripts.networks.unet import ClassUNet

    return {"automedsam": AutoMedSAM, "hsp_sam": HSPSAM, "unet": ClassUNet}[architecture]


def _train(rows: PlannedRows, row: StudyRow, seed: int) -> Path:
    """Train a row, unless that is done; give its checkpoint."""
    folder = rows.training_folder(row, seed)
    checkpoint, fingerprint = folder / "model.pt", rows.training_fingerprint(row, seed)
    if is_complete(folder, fingerprint):
        return checkpoint
    start = time.monotonic()
    require_new_run(folder)
    if row.weights is not None:
        _build_published(rows, row, folder)
        mark_complete(folder, fingerprint, seconds=time.monotonic() - start)
        return checkpoint
    _train_anew(rows, row, seed, folder)
    parameters = trainable_parameters(ModelCard.beside(checkpoint))
    mark_complete(folder, fingerprint, seconds=time.monotonic() - start, parameters=parameters)
    return checkpoint


def _train_anew(rows: PlannedRows, row: StudyRow, seed: int, folder: Path) -> None:
    """Train as `automedsam train` does."""
    from scripts import cli

    settings: dict[str, Any] = rows.settings(row, seed)
    cli.train(
        rows.datalist(row.trained_on),
        output=str(folder),
        config=[str(path) for path in rows.overlays(row)],
        seed=seed,
        presence=rows.plan.presence,  # the best epoch is chosen by the protocol of the evaluation
        **settings,
    )


def _evaluate(rows: PlannedRows, row: StudyRow, seed: int, noise_seed: int | None, checkpoint: Path) -> None:
    """Evaluate a row's network, unless that is done."""
    from scripts import cli

    folder = rows.evaluation_folder(row, seed, noise_seed)
    fingerprint = rows.evaluation_fingerprint(row, seed, noise_seed)
    if is_complete(folder, fingerprint):
        return
    start = time.monotonic()
    require_new_run(folder)
    settings = {**rows.settings(row, seed), **row.evaluation, "noise_seed": noise_seed}
    of_card = ModelCard.beside(checkpoint).network
    cli.evaluate(
        rows.datalist(row.tested_on),
        checkpoint=str(checkpoint),
        section=rows.section(row),
        presence=rows.plan.presence,
        output=str(folder),
        **{name: value for name, value in settings.items() if name not in {"pretrained", "architecture", *of_card}},
    )
    mark_complete(folder, fingerprint, seconds=time.monotonic() - start)


def _build_published(rows: PlannedRows, row: StudyRow, folder: Path) -> None:
    """Make a model and its card of a published file, for the classes of the data."""
    from scripts.networks.automedsam import AutoMedSAM
    from scripts.networks.checkpoints import load_weights, save_state_dict

    name = str(row.weights)
    entry = rows.weights[name]
    network = AutoMedSAM(
        image_encoder=entry["encoder"],
        pixel_normalisation=entry["pixels"],
        class_ids=sorted(rows.class_ids(row.tested_on)),
    )
    load_weights(network, rows.published(name))
    folder.mkdir(parents=True, exist_ok=True)
    save_state_dict(network.state_dict(), folder / "model.pt")
    ModelCard(network=network.settings, preprocessing={}, trained={}).write(folder / "model.json")
