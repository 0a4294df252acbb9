"""HSP-SAM through the bundle's own configs: trained, resumed, reloaded, evaluated and used, at a size of seconds."""

import csv
import json

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow
from PIL import Image

from scripts import cli
from scripts.engines.evaluators import intended_error
from scripts.engines.handlers import AnnounceTraining, LoadWeights
from scripts.errors import CheckpointError, ConfigError
from scripts.networks.checkpoints import save_state_dict
from scripts.networks.hsp_sam import HSPSAM
from scripts.networks.model_card import ModelCard

SIZE = 32
OVERLAYS = "networks/hsp_sam.yaml,networks/hsp_sam_compact.yaml"
SETTINGS = {
    "image_size": SIZE,
    "batch_size": 4,
    "max_epochs": 3,
    "warmup_iterations": 4,
    "tensorboard": False,
    "progress_bar": False,
    "device": "$torch.device('cpu')",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_phantoms):
    """A run of three epochs over 24 slices."""
    folder = tmp_path_factory.mktemp("trained")
    cli.train(str(tiny_phantoms), output=str(folder), config=OVERLAYS, **SETTINGS)
    return folder


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def network_of(folder):
    """The network that a card describes, with its weights."""
    card = ModelCard.beside(folder / "model.pt")
    assert card.architecture == "hsp_sam"
    network = HSPSAM(**card.network)
    LoadWeights(network, folder / "model.pt")(None)
    return network.eval()


def test_a_training_leaves_what_every_training_leaves(trained):
    assert {"model.pt", "model.json", "last.pt", "losses.csv", "epochs.csv"} <= {
        path.name for path in trained.iterdir()
    }
    table = rows(trained / "losses.csv")
    assert len(table) == 18
    assert {"loss", "cross_entropy", "dice"} <= set(table[0])
    for row in table:
        assert float(row["loss"]) == pytest.approx(
            0.2 * float(row["cross_entropy"]) + 0.8 * float(row["dice"]), rel=1e-4
        )
    assert np.mean([float(row["loss"]) for row in table[-6:]]) < np.mean([float(row["loss"]) for row in table[:6]])
    assert float(rows(trained / "epochs.csv")[-1]["val_mean_dsc"]) >= 0


def test_the_card_says_which_network_it_is_of(trained):
    card = ModelCard.beside(trained / "model.pt")
    assert card.architecture == "hsp_sam"
    assert card.network["prompts"] == 2
    assert card.network["lora_rank"] == 0  # the encoder learned wholly
    assert card.trained["CT"] == ["liver", "spleen", "pancreas", "left kidney", "right kidney"]


def test_the_learning_rate_warms_up_and_decays(bundle_root, tiny_phantoms, tmp_path):
    """Linear over W steps, then (1 - t / T)^5, after the first author's trainer."""
    files = [bundle_root / "configs" / name for name in ("train.json", *OVERLAYS.split(","))]
    workflow = ConfigWorkflow(
        config_file=[str(file) for file in files], logging_file=False, bundle_root=str(bundle_root)
    )
    settings = {"datalist": str(tiny_phantoms), "dataset_dir": str(tiny_phantoms.parent), "output_dir": str(tmp_path)}
    workflow.parser.update({**SETTINGS, **settings, "schedule_power": 5, "learning_rate": 8e-4})
    workflow.initialize()
    optimizer = workflow.parser.get_parsed_content("optimizer")
    scheduler = workflow.parser.get_parsed_content("lr_scheduler")
    rates = []
    for _ in range(18):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    expected = [8e-4 * (step + 1) / 4 for step in range(4)] + [8e-4 * (1 - step / 18) ** 5 for step in range(14)]
    assert rates == pytest.approx(expected, rel=1e-6)


def test_a_broken_run_goes_on_as_if_nothing_had_happened(trained, tiny_phantoms, tmp_path):
    first = {**SETTINGS, "max_epochs": 1, "lr_scheduler#schedulers#1#total_iters": 18}
    cli.train(str(tiny_phantoms), output=str(tmp_path), config=OVERLAYS, **first)
    cli.train(str(tiny_phantoms), output=str(tmp_path), config=OVERLAYS, resume=str(tmp_path / "last.pt"), **SETTINGS)
    whole, resumed = (read_state_dict_of_run(folder) for folder in (trained, tmp_path))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    assert rows(trained / "losses.csv") == rows(tmp_path / "losses.csv")


def read_state_dict_of_run(folder):
    return torch.load(folder / "last.pt", weights_only=True)["network"]


def test_a_reloaded_model_gives_the_same_masks_bit_for_bit(trained, tmp_path):
    """The abstract prompts too: the first author's code loses them."""
    network = network_of(trained)
    with torch.no_grad():
        for prompts in network.abstract_prompts.values():
            prompts.normal_(generator=torch.Generator().manual_seed(1))
    image = torch.rand((2, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(0))
    save_state_dict(network.state_dict(), tmp_path / "model.pt")
    ModelCard.beside(trained / "model.pt").write(tmp_path / "model.json")
    with torch.no_grad():
        assert torch.equal(network_of(tmp_path)(image), network(image))
        assert not torch.equal(network_of(trained)(image), network(image))


def test_evaluation_takes_the_network_from_the_card(trained, tiny_phantoms, tmp_path):
    settings = {"attention_pictures": True, "progress_bar": False}
    text = cli.evaluate(str(tiny_phantoms), checkpoint=str(trained / "model.pt"), output=str(tmp_path), **settings)
    assert "liver" in text
    assert len(list((tmp_path / "attention").glob("*.png"))) == 2
    table = rows(tmp_path / "metrics.csv")
    assert len(table) == 10  # two cases, five classes
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["settings"]["network"]["prompt_source"] == "static"


def test_inference_needs_no_class(trained, tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (40, 24), dtype=np.uint8)).save(tmp_path / "scan.png")
    settings = {"checkpoint": str(trained / "model.pt"), "modality": "CT", "progress_bar": False, "force": False}
    cli.infer(str(tmp_path / "scan.png"), output=str(tmp_path / "out"), network="hsp_sam", **settings)
    labels = np.asarray(Image.open(tmp_path / "out" / "scan_seg.png"))
    assert labels.shape == (40, 24)
    names = json.loads((tmp_path / "out" / "labels.json").read_text())
    assert list(names.values()) == ["background", "liver", "spleen", "pancreas", "left kidney", "right kidney"]
    assert set(np.unique(labels)) <= set(map(int, names))


def test_the_label_map_is_the_most_probable_of_the_maps(trained, tmp_path):
    rng = np.random.default_rng(1)
    Image.fromarray(rng.integers(0, 255, (32, 24), dtype=np.uint8)).save(tmp_path / "scan.png")
    settings = {"checkpoint": str(trained / "model.pt"), "modality": "CT", "progress_bar": False}
    cli.infer(str(tmp_path / "scan.png"), output=str(tmp_path / "out"), probability_maps=True, **settings)
    labels = np.asarray(Image.open(tmp_path / "out" / "scan_seg.png"))
    names = json.loads((tmp_path / "out" / "labels.json").read_text())
    ids = {int(value): name for value, name in names.items() if int(value)}
    paths = [tmp_path / "out" / f"scan_prob_{name.replace(' ', '_')}.png" for name in ids.values()]
    maps = np.stack([np.asarray(Image.open(path), dtype=float) / 255 for path in paths])
    rest = 1 - maps.sum(axis=0)  # the background's
    assert (rest > -5 / 255).all()
    together = np.concatenate([rest[None], maps])
    clear = np.diff(np.sort(together, axis=0)[-2:], axis=0)[0] > 3 / 255  # the maps are kept in 8 bits
    winners = np.array([0, *ids])[together.argmax(axis=0)]
    assert clear.mean() > 0.5
    assert np.array_equal(winners[clear], labels[clear])


@pytest.mark.parametrize(
    ("asked", "checkpoint", "error", "reason"),
    [
        ("hsp_sam", None, ConfigError, "the bundle's own model is of automedsam: train hsp_sam with"),
        ("automedsam", "given", CheckpointError, "is a model of hsp_sam, not of automedsam"),
        ("nnunet", "given", ConfigError, "one of automedsam, hsp_sam, unet, not 'nnunet'"),
    ],
)
def test_another_network_than_asked_for(trained, tmp_path, asked, checkpoint, error, reason):
    path = None if checkpoint is None else str(trained / "model.pt")
    with pytest.raises(error, match=reason):
        cli.infer(str(tmp_path), network=asked, checkpoint=path, output=str(tmp_path / "out"))


def test_samples_are_refused(trained, tmp_path):
    Image.new("L", (32, 32), 90).save(tmp_path / "scan.png")
    with pytest.raises(RuntimeError) as caught:  # MONAI wraps what the bundle raises
        cli.infer(
            str(tmp_path / "scan.png"), checkpoint=str(trained / "model.pt"), modality="CT", samples=3,
            output=str(tmp_path / "out"),
        )  # fmt: skip
    assert "draws no noise" in str(intended_error(caught.value))


def test_embeddings_are_not_stored(tiny_phantoms, tmp_path):
    with pytest.raises(RuntimeError) as caught:
        cli.train(
            str(tiny_phantoms),
            output=str(tmp_path),
            config=OVERLAYS,
            embeddings_dir=str(tmp_path / "store"),
            **SETTINGS,
        )
    assert "leave embeddings_dir out" in str(intended_error(caught.value))


def test_a_card_of_an_unknown_network(trained, tmp_path):
    content = json.loads((trained / "model.json").read_text()) | {"architecture": "vista3d"}
    (tmp_path / "model.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="is of the network 'vista3d'"):
        ModelCard.beside(tmp_path / "model.pt")


@pytest.mark.parametrize("rank", [0, 4])
def test_a_frozen_encoder_needs_weights(rank, caplog):
    network = HSPSAM(image_encoder="lite_medsam", image_size=32, lora_rank=rank)
    with pytest.raises(ConfigError, match="no weights to freeze"):
        AnnounceTraining(network, started_from=None)(None)
    with caplog.at_level("INFO"):
        AnnounceTraining(network, started_from="lite_medsam.pth")(None)
    assert ("the image encoder is frozen but for LoRA of rank 4;" in caplog.text) == (rank == 4)


def test_inference_merges_lora(tmp_path):
    settings = {"image_encoder": "lite_medsam", "image_size": 32, "lora_rank": 2}
    with torch.random.fork_rng():
        torch.manual_seed(2)
        source = HSPSAM(**settings).eval()
    with torch.no_grad():
        for name, value in source.named_parameters():
            if name.endswith("_up"):
                value.normal_(std=0.1)
    save_state_dict(source.state_dict(), tmp_path / "model.pt")
    network = HSPSAM(**settings).eval()
    LoadWeights(network, tmp_path / "model.pt", merge_lora=True)(None)
    assert not any("parametrizations" in name for name in network.state_dict())
    image = torch.rand((1, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(
            network(image, known_only=True), source(image, known_only=True), atol=1e-5, rtol=1e-5
        )


def test_one_workflow_runs_again_with_the_file_of_that_time(bundle_root, tiny_phantoms, tmp_path):
    """LoRA is merged in each run; the next one finds a network that was merged before."""
    settings = {"image_encoder": "lite_medsam", "image_size": SIZE, "class_ids": [1, 2], "lora_rank": 2}
    image = tiny_phantoms.parent / "images" / "phantom_004.nii.gz"
    configs = [bundle_root / "configs" / name for name in ("inference.json", "networks/hsp_sam.yaml")]
    workflow = ConfigWorkflow(
        config_file=[str(path) for path in configs], logging_file=False, bundle_root=str(bundle_root)
    )
    place = {"dataset_dir": str(image), "modality": "CT", "output_dir": str(tmp_path / "out"), "progress_bar": False}
    trained = {"trained": {"CT": ["liver", "spleen"]}, "checkpoint": str(tmp_path / "model.pt")}
    workflow.parser.update({**settings, **place, **trained, "device": "$torch.device('cpu')"})
    workflow.initialize()
    found = []
    for seed in (1, 2, 1):
        save_random_weights(tmp_path / "model.pt", seed=seed, **settings)
        workflow.run()
        workflow.finalize()
        found.append((tmp_path / "out" / "phantom_004_seg.nii.gz").read_bytes())
    assert found[0] == found[2] != found[1]


def save_random_weights(path, *, seed, **settings):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = HSPSAM(**settings)
        with torch.no_grad():
            for name, value in network.named_parameters():
                if name.endswith("_up"):
                    value.normal_(std=0.1)
    save_state_dict(network.state_dict(), path)


@pytest.mark.parametrize("variant", ["hsp_sam", "hsp_sam_lite_medsam", "hsp_sam_compact"])
def test_the_overlays_build_their_networks(bundle_root, variant):
    """Over each of the bundle's configs; ViT-B is built on no device, as it is large."""
    overlays = ["networks/hsp_sam.yaml", *([f"networks/{variant}.yaml"] if variant != "hsp_sam" else [])]
    for configs in (["train.json"], ["train.json", "evaluate.json"], ["inference.json"]):
        parser = ConfigParser()
        parser.read_config([str(bundle_root / "configs" / name) for name in (*configs, *overlays)])
        parser.update({"bundle_root": str(bundle_root)})
        with torch.device("meta"):
            network = parser.get_parsed_content("network_def")
        assert isinstance(network, HSPSAM)
        assert network.settings["lora_rank"] == (0 if variant == "hsp_sam_compact" else 32)
        assert type(parser.get_parsed_content("inferer_def")).__name__ == "PromptFreeInferer"
