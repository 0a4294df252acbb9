"""The data sets of real images that the model of the bundle was trained on, and evaluations on them step by step."""

from pathlib import Path
from typing import Any

from monai.bundle import ConfigWorkflow

from scripts import cli
from scripts.networks.checkpoints import load_weights
from scripts.networks.model_card import ModelCard
from scripts.workflow import BUNDLE_ROOT, CONFIGS

SETS = ("kvasir_seg", "ph2_dermoscopy", "covid_chest_xray", "acdc_cine_mr", "lits_liver_ct", "chaos_t2_mr")
SECTION = "test"
METADATA = CONFIGS / "metadata.json"


def prepare_sets(data: Path, folder: Path) -> list[Path]:
    """Write the datalist of each data set."""
    for name in SETS:
        cli.prepare("shared", source=str(data / name), output=str(folder / name), progress_bar=False)
    return [folder / name / "datalist.json" for name in SETS]


def evaluation_of(datalist: Path, checkpoint: str | None, **settings: Any) -> tuple[Any, Any]:
    """Build the evaluation of a model on one datalist, without running it, and the network.

    Args:
        datalist: of one data set.
        checkpoint: with its card beside it; the bundle's own if none is given.
        settings: of configs/train.json and configs/evaluate.json.
    """
    weights = Path(checkpoint) if checkpoint else BUNDLE_ROOT / "models" / "model.pt"
    files = [str(CONFIGS / name) for name in ("train.json", "evaluate.json")]
    data = {"datalist": str(datalist), "dataset_dir": str(datalist.parent), "validation_section": SECTION}
    workflow = ConfigWorkflow(
        config_file=files,
        meta_file=str(METADATA),
        logging_file=False,
        workflow_type="train",
        bundle_root=str(BUNDLE_ROOT),
        checkpoint=str(weights),
        progress_bar=False,
        **{**data, **ModelCard.beside(weights).settings, **settings},
    )
    workflow.initialize()
    network = workflow.parser.get_parsed_content("network_def").eval()
    load_weights(network, weights)
    return workflow.parser, network
