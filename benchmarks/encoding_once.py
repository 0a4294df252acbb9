"""What encoding once saves: `python benchmarks/encoding_once.py [--runs N]`.

- forward diffusion of T = 100 steps at once, against the loop of the authors' released code;
- an epoch of training from stored embeddings, against encoding every slice in every step.
"""

import argparse
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from measure import compare, peak_mb, write_result
from monai.bundle import ConfigWorkflow

BUNDLE_ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(BUNDLE_ROOT))

from scripts.data.phantoms import write_phantoms  # noqa: E402
from scripts.networks.automedsam import AutoMedSAM  # noqa: E402
from scripts.networks.checkpoints import save_state_dict  # noqa: E402
from scripts.networks.forward_diffusion import diffuse_accumulated  # noqa: E402

STEPS = 100
COMMAND = "python benchmarks/encoding_once.py"


def main() -> None:
    """Measure, print and write `results/`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    forward_diffusion(options.runs)
    for encoder, size in (("lite_medsam", 256), ("sam_vit_b", 256)):
        training(encoder, size, runs=min(options.runs, 3))


def forward_diffusion(runs: int) -> None:
    """Compare the closed form with the loop, for one image and class on SAM's grid."""
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn((1, 256, 64, 64), generator=generator)
    class_map = torch.randn((1, 1, 64, 64), generator=generator)

    def loop() -> torch.Tensor:
        diffused = embedding
        for step in range(STEPS, 0, -1):
            diffused = diffused + torch.randn(embedding.shape, generator=generator) / (step + 1) + class_map
        return diffused

    def at_once() -> torch.Tensor:
        noise = torch.randn(embedding.shape, generator=generator)
        return diffuse_accumulated(embedding, class_map, noise, STEPS)

    report("forward_diffusion", asdict(compare(loop, at_once, runs=runs)))


def training(encoder: str, size: int, *, runs: int) -> None:
    """Compare an epoch over phantom slices through the store with one through the encoder, validation left out."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        datalist = write_phantoms(folder / "phantoms", training=1, validation=1, test=1, size=64, slices=12)
        network = AutoMedSAM(image_encoder=encoder, image_size=size, class_ids=[1, 2, 3, 4, 5])
        save_state_dict(network.state_dict(), folder / "weights.pt")
        settings = {"image_encoder": encoder, "image_size": size, "datalist": str(datalist), "augment": False}
        settings |= {"dataset_dir": str(datalist.parent), "pretrained": str(folder / "weights.pt"), "batch_size": 4}
        through = epochs(settings, folder / "a")
        stored = epochs({**settings, "embeddings_dir": str(folder / "store")}, folder / "b")
        report(f"training_from_store_{encoder}_{size}", asdict(compare(through, stored, runs=runs)))


def epochs(settings: dict[str, object], output: Path) -> object:
    """Prepare a training whose every call goes through the training slices once more."""
    workflow = ConfigWorkflow(
        config_file=str(BUNDLE_ROOT / "configs" / "train.json"),
        meta_file=str(BUNDLE_ROOT / "configs" / "metadata.json"),
        logging_file=False,
        workflow_type="train",
        bundle_root=str(BUNDLE_ROOT),
        output_dir=str(output),
        max_epochs=1,
        val_interval=10**6,
        tensorboard=False,
        progress_bar=False,
        **settings,
    )
    output.mkdir()
    workflow.initialize()
    trainer = workflow.parser.get_parsed_content("train#trainer")

    def epoch() -> None:
        trainer.state.max_epochs = trainer.state.epoch + 1
        trainer.run()

    return epoch


def report(name: str, values: dict[str, object]) -> None:
    """Write and print one row."""
    write_result(name, {**values, "peak_mb": peak_mb()}, command=COMMAND)
    sys.stdout.write(f"{name}: {values['ratio']} times ({values['low']} to {values['high']})\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
