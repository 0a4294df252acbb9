"""Studies whose rows are of several networks: what these share, what each has for itself, and how that is recorded."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
import yaml

from scripts import cli
from scripts.data.phantoms import write_phantoms
from scripts.errors import ConfigError
from scripts.metrics.pooling import pool_batches
from scripts.networks.automedsam import AutoMedSAM
from scripts.networks.checkpoints import load_weights, read_state_dict, save_state_dict
from scripts.networks.hsp_sam import HSPSAM
from scripts.networks.model_card import ModelCard
from scripts.report.tables import read_scores_csv
from scripts.study.completion import FileDigests
from scripts.study.plan import TABLES, PlannedRows, StudyPlan
from scripts.study.rows import StudyRow, StudyTable, read_table
from scripts.study.runs import trainable_parameters
from scripts.study.starts import StartFiles
from scripts.study.study import run_study
from scripts.workflow import find_overlays

HSP_SAM = ("networks/hsp_sam.yaml", "networks/hsp_sam_compact.yaml")
NETWORKS = ("AutoMedSAM", "HSP-SAM")
FROZEN = {"pretrained": "$@bundle_root + '/models/model.pt'", "train_image_encoder": False}
TINY = {
    "image_size": 32,
    "channels": [8, 16, 32],
    "max_epochs": 1,
    "batch_size": 16,
    "learning_rate": 1e-5,
    "progress_bar": False,
    "tensorboard": False,
}
BOTH = {
    "title": "both networks",
    "reference": "AutoMedSAM",
    "common": {"image_encoder": "compact", "image_size": 96, "max_epochs": 100, **FROZEN},
    "rows": [
        {"name": "AutoMedSAM", "settings": {"embeddings_dir": None}, "comparable": "no: nothing to compare with"},
        {"name": "HSP-SAM", "overlays": list(HSP_SAM), "settings": {"prompts": 1}},
    ],
}


def table_of(*rows, common=None):
    return StudyTable(
        name="mine", title="", data="", presence="all", reference=rows[0].name, rows=rows, common=common or {}
    )


def planned(datalist, output, *rows, common=None, **plan):
    output.mkdir(exist_ok=True)
    arguments = {"settings": {}, **plan}
    table = table_of(*rows, common=common)
    return PlannedRows(StudyPlan(table=table, datalists={"phantoms": str(datalist)}, output=output, **arguments))


def figures(output):
    return {row["row"]: row for row in csv.DictReader((output / "study.csv").open())}


def state_of(folder):
    return read_state_dict(folder / "seed_0" / "model.pt")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Settings of small networks, and the weights to start from: a whole AutoMedSAM."""
    path = tmp_path_factory.mktemp("start") / "start.pt"
    with torch.random.fork_rng():
        torch.manual_seed(3)
        network = AutoMedSAM(image_encoder="compact", image_size=32, class_ids=[1], channels=[8, 16, 32])
    save_state_dict(network.state_dict(), path)
    return {**TINY, "pretrained": str(path)}


@pytest.fixture(scope="module")
def table_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tables") / "both.yaml"
    path.write_text(yaml.safe_dump(BOTH, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def both(tmp_path_factory, tiny_phantoms, table_file, tiny):
    """A study of both networks: its folder and what its command printed."""
    output = tmp_path_factory.mktemp("both")
    printed = cli.study(str(table_file), str(tiny_phantoms), output=str(output), warmup_iterations=2, **tiny)
    return output, printed


# ------------------------------------------------------------------------------------------------------ what they share


def test_both_networks_are_trained_and_compared(both):
    output, printed = both
    rows = figures(output)
    assert all(rows[name]["dsc"] != "" for name in ("AutoMedSAM", "HSP-SAM"))
    assert (rows["AutoMedSAM"]["difference"], rows["HSP-SAM"]["difference"] == "") == ("", False)
    assert ModelCard.beside(output / "hsp_sam" / "seed_0" / "model.pt").architecture == "hsp_sam"
    assert ModelCard.beside(output / "automedsam" / "seed_0" / "model.pt").architecture == "automedsam"
    assert "paper DSC" not in printed


def test_both_start_from_the_encoder_of_one_file(both, tiny):
    output, _ = both
    (start,) = output.glob("start_*.pt")
    shipped = read_state_dict(tiny["pretrained"])
    for folder, own in (("automedsam", ()), ("hsp_sam", ("image_encoder.neck.",))):
        trained = state_of(output / folder)
        frozen = [
            name
            for name in shipped
            if name.startswith(("image_encoder.", "prompt_encoder.")) and not name.startswith(own or "-")
        ]
        assert len(frozen) > 50
        for name in frozen:
            assert torch.equal(trained[name], shipped[name]), name
    assert not any(name.startswith("class_prompt_encoder.") for name in read_state_dict(start))


def test_parameters_are_those_that_are_not_frozen(both):
    """Counted from the weights themselves: all but SAM's encoders, of which HSP-SAM's neck learns."""
    output, printed = both
    for name, folder in (("AutoMedSAM", "automedsam"), ("HSP-SAM", "hsp_sam")):
        learnt = {
            key: value
            for key, value in state_of(output / folder).items()
            if not key.startswith(("image_encoder.", "prompt_encoder."))
            or (folder == "hsp_sam" and key.startswith("image_encoder.neck."))
        }
        expected = sum(value.numel() for value in learnt.values())
        assert int(figures(output)[name]["parameters"]) == expected
        assert json.loads((output / folder / "seed_0" / "complete.json").read_text())["parameters"] == expected
        (line,) = [line for line in printed.splitlines() if line.startswith(f"{name} ")]
        assert f"{expected / 1e6:.2f}" in line.split()


@pytest.mark.parametrize(("encoder", "millions"), [("sam_vit_b", 19.1), ("sam_vit_h", 25.1)])
def test_parameters_of_the_published_sizes(encoder, millions):
    card = ModelCard(
        network={"image_encoder": encoder, "class_ids": [1]}, preprocessing={}, trained={}, architecture="hsp_sam"
    )
    assert trainable_parameters(card) / 1e6 == pytest.approx(millions, abs=0.05)


def test_an_encoder_that_learns_wholly_is_counted():
    settings = AutoMedSAM(image_encoder="compact", image_size=32, class_ids=[1], channels=[8, 16, 32]).settings
    wholly, frozen = (
        trainable_parameters(
            ModelCard(network=settings, preprocessing={}, trained={}, training={"image_encoder_trained": learns})
        )
        for learns in (True, False)
    )
    encoder = AutoMedSAM(image_encoder="compact", image_size=32).image_encoder
    assert wholly - frozen == sum(parameter.numel() for parameter in encoder.parameters())


def test_runs_without_a_record_of_their_parameters_show_them_all_the_same(
    both, tmp_path, table_file, tiny_phantoms, tiny
):
    output = tmp_path / "copy"
    shutil.copytree(both[0], output)
    for marker in output.glob("*/seed_0/complete.json"):
        content = json.loads(marker.read_text())
        del content["parameters"]
        marker.write_text(json.dumps(content))
    cli.study(str(table_file), str(tiny_phantoms), output=str(output), warmup_iterations=2, **tiny)
    for name, row in figures(output).items():
        assert row["parameters"] == figures(both[0])[name]["parameters"] != ""


def test_iou_and_batch_pooled_scores_are_those_of_the_evaluation(both):
    output, _ = both
    row = figures(output)["AutoMedSAM"]
    scores = read_scores_csv(output / "automedsam" / "seed_0" / "evaluation" / "metrics.csv")
    classes = sorted({score.class_id for score in scores})
    iou = [[score.iou for score in scores if score.class_id == class_id] for class_id in classes]
    assert float(row["iou"]) == pytest.approx(100 * np.mean([np.nanmean(values) for values in iou]))
    pooled = pool_batches(scores)[1]
    assert float(row["dsc_batch_pooled"]) == pytest.approx(100 * pooled.dsc)
    assert float(row["iou_batch_pooled"]) == pytest.approx(100 * pooled.iou)


# ---------------------------------------------------------------------------------------------------- random beginnings


@pytest.mark.slow
def test_from_nothing_both_begin_with_the_same_random_encoder(tiny_phantoms, table_file, tmp_path):
    """With a learning rate of 0 a trained network is what it was in the beginning."""
    settings = {**TINY, "learning_rate": 0.0, "weight_decay": 0.0, "pretrained": None, "train_image_encoder": True}
    cli.study(str(table_file), str(tiny_phantoms), output=str(tmp_path), **settings)
    (start,) = tmp_path.glob("start_*.pt")
    assert start.name == "start_seed_0_compact_32.pt"
    begun = {name: value for name, value in read_state_dict(start).items() if name.startswith("image_encoder.")}
    assert len(begun) > 50
    for folder in ("automedsam", "hsp_sam"):
        trained = state_of(tmp_path / folder)
        assert all(torch.equal(trained[name], value) for name, value in begun.items())
        assert ModelCard.beside(tmp_path / folder / "seed_0" / "model.pt").training["image_encoder_trained"]


def test_a_seed_gives_one_beginning_and_another_seed_another(tmp_path):
    (tmp_path / "again").mkdir()
    before = torch.get_rng_state()
    first, other = (StartFiles(tmp_path, FileDigests()).seeded("compact", 32, seed) for seed in (0, 1))
    again = StartFiles(tmp_path / "again", FileDigests()).seeded("compact", 32, 0)
    assert torch.equal(torch.get_rng_state(), before)
    assert again.read_bytes() == first.read_bytes()
    states = [read_state_dict(path) for path in (first, other)]
    assert not torch.equal(*(state["image_encoder.stages.0.0.weight"] for state in states))


def test_a_beginning_fits_both_networks(tmp_path):
    start = StartFiles(tmp_path, FileDigests()).seeded("compact", 32, 0)
    networks = [network(image_encoder="compact", image_size=32) for network in (AutoMedSAM, HSPSAM)]
    for network in networks:
        load_weights(network, start)
    first, second = (network.image_encoder.state_dict() for network in networks)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_beginning_of_the_encoder_with_details_has_them_in_both_parts(tmp_path):
    start = StartFiles(tmp_path, FileDigests()).seeded("compact_detailed", 32, 0)
    network = AutoMedSAM(image_encoder="compact_detailed", image_size=32)
    load_weights(network, start)
    state = read_state_dict(start)
    assert {name for name in network.sam_parts().state_dict() if ".details." in name} <= set(state)


def test_rows_of_one_network_begin_by_themselves_as_before(tiny_phantoms, tmp_path):
    rows = planned(
        tiny_phantoms, tmp_path, StudyRow("plain"), settings={"pretrained": None, "train_image_encoder": True}
    )
    assert rows.settings(StudyRow("plain"), 0)["pretrained"] is None
    assert list(tmp_path.glob("start*")) == []


# ------------------------------------------------------------------------------------------------- which settings win


def test_a_rows_overlays_lie_between_the_studys_and_its_settings(tiny_phantoms, tmp_path):
    of_study = tmp_path / "of_study.yaml"
    of_study.write_text("max_epochs: 3\nweight_decay: 0.5\nlearning_rate: 0.5\nbatch_size: 5\n")
    of_row = tmp_path / "of_row.yaml"
    of_row.write_text("weight_decay: 0.25\nlearning_rate: 0.25\nbatch_size: 4\ngradient_clipping: 2.0\n")
    row = StudyRow("a", overlays=(str(of_row),), settings={"gradient_clipping": 1.0})
    rows = planned(
        tiny_phantoms, tmp_path / "out", row, StudyRow("b"), settings={"learning_rate": 0.125}, overlays=[of_study]
    )
    expected = {
        "max_epochs": 3,
        "weight_decay": 0.25,
        "learning_rate": 0.125,
        "batch_size": 4,
        "gradient_clipping": 1.0,
    }
    settings = rows.settings(row, 0)
    assert {name: settings[name] for name in expected} == expected
    assert rows.settings(StudyRow("b"), 0)["batch_size"] == 5
    assert rows.overlays(row) == [of_study, of_row]


def test_what_is_common_stands_whatever_overlays_say(tiny_phantoms, tmp_path):
    row = StudyRow("HSP-SAM", overlays=HSP_SAM)
    common = {"image_size": 64, "max_epochs": 7, **FROZEN}
    settings = planned(tiny_phantoms, tmp_path, row, common=common).settings(row, 0)
    assert (settings["image_size"], settings["max_epochs"], settings["train_image_encoder"]) == (64, 7, False)
    assert settings["warmup_iterations"] == 50  # of the overlay
    of_study = find_overlays("experiments/from_scratch")
    settings = planned(tiny_phantoms, tmp_path, row, common=common, overlays=of_study).settings(row, 0)
    assert (settings["image_size"], settings["max_epochs"], settings["train_image_encoder"]) == (128, 7, True)
    assert settings["learning_rate"] == 0.0008  # each network keeps its own
    settings = planned(tiny_phantoms, tmp_path, row, common=common, settings={"max_epochs": 2}).settings(row, 0)
    assert settings["max_epochs"] == 2


def test_what_is_common_and_shipped_alike_makes_no_other_run(tiny_phantoms, tmp_path):
    """So the AutoMedSAM of a table stays complete when a row of another network joins it."""
    row = StudyRow("AutoMedSAM")
    common = {"image_encoder": "compact_detailed", "image_size": 128, "max_epochs": 100, **FROZEN}
    alone = planned(tiny_phantoms, tmp_path, row)
    joined = planned(tiny_phantoms, tmp_path, row, StudyRow("HSP-SAM", overlays=HSP_SAM), common=common)
    assert joined.training_fingerprint(row, 0) == alone.training_fingerprint(row, 0)
    other = planned(tiny_phantoms, tmp_path, row, common={**common, "max_epochs": 99})
    assert other.training_fingerprint(row, 0) != alone.training_fingerprint(row, 0)


def test_the_content_of_overlays_decides_whether_a_run_is_complete(tiny_phantoms, tmp_path):
    overlay = tmp_path / "mine.yaml"
    row = StudyRow("a", overlays=(str(overlay),))

    def fingerprint(text):
        overlay.write_text(text)
        return planned(tiny_phantoms, tmp_path / "out", row).training_fingerprint(row, 0)

    first = fingerprint("weight_decay: 0.25\n")
    assert fingerprint("# said otherwise\nweight_decay: 0.25\n") == first
    assert fingerprint("weight_decay: 0.5\n") != first


def test_rows_of_other_overlays_do_not_share_a_training(tiny_phantoms, tmp_path):
    rows = [StudyRow("a"), StudyRow("b", overlays=HSP_SAM), StudyRow("c", overlays=HSP_SAM)]
    found = planned(tiny_phantoms, tmp_path, *rows)
    assert [found.training_folder(row, 0).parent.name for row in rows] == ["a", "b", "b"]


def test_a_setting_of_one_network_is_left_out_for_the_other(tiny_phantoms, tmp_path):
    plain, levels = StudyRow("AutoMedSAM"), StudyRow("HSP-SAM", overlays=HSP_SAM)
    rows = planned(tiny_phantoms, tmp_path, plain, levels, settings={"prompts": 4, "learning_rat": 1})
    assert rows.settings(levels, 0)["prompts"] == 4
    assert "prompts" not in rows.settings(plain, 0)
    assert rows.settings(plain, 0)["learning_rat"] == 1  # of no network: the training says so


def test_slices_are_augmented_for_all_or_for_none(tiny_phantoms, tmp_path):
    levels = StudyRow("HSP-SAM", overlays=HSP_SAM)
    stored, anew = StudyRow("AutoMedSAM"), StudyRow("AutoMedSAM", settings={"embeddings_dir": None})
    beside_stored = planned(tiny_phantoms, tmp_path, stored, levels, common=FROZEN)
    assert beside_stored.settings(stored, 0)["embeddings_dir"] == str(tmp_path / "embeddings")
    assert beside_stored.settings(levels, 0)["embeddings_dir"] is None
    assert beside_stored.settings(levels, 0)["augment"] is False
    versions = planned(tiny_phantoms, tmp_path, stored, levels, common=FROZEN, settings={"augmented_versions": 3})
    assert versions.settings(levels, 0)["augment"] is True
    beside_anew = planned(tiny_phantoms, tmp_path, anew, levels, common=FROZEN)
    assert beside_anew.settings(anew, 0)["embeddings_dir"] is None
    assert "augment" not in beside_anew.settings(levels, 0)
    from_nothing = {"pretrained": None, "train_image_encoder": True}
    beside_learning = planned(tiny_phantoms, tmp_path, stored, levels, common=FROZEN, settings=from_nothing)
    assert "augment" not in beside_learning.settings(levels, 0)


def test_a_config_cannot_make_one_network_of_several(table_file, tiny_phantoms, tmp_path):
    with pytest.raises(ConfigError, match=r"--config makes one network of all rows, but both compares several"):
        cli.study(str(table_file), str(tiny_phantoms), output=str(tmp_path), config="networks/hsp_sam.yaml")


def test_an_overlay_that_is_not_there(tiny_phantoms, tmp_path):
    row = StudyRow("a", overlays=("networks/none.yaml",))
    plan = StudyPlan(table=table_of(row), datalists={"a": str(tiny_phantoms)}, output=tmp_path, settings={})
    with pytest.raises(ConfigError, match=r"no overlay 'networks/none\.yaml'"):
        run_study(plan)


# ------------------------------------------------------------------------------------------- other data, other sections


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """A data set of which all cases are for testing, as `automedsam prepare --fractions 0,0,1` makes it."""
    path = write_phantoms(
        tmp_path_factory.mktemp("target"), training=1, validation=1, test=2, size=32, slices=12, seed=9
    )
    content = json.loads(path.read_text())
    content |= {"training": [], "validation": []}
    path.write_text(json.dumps(content))
    return path


def test_a_set_may_have_nothing_but_cases_to_test_on(tiny_phantoms, target, tmp_path):
    names = {"first": str(tiny_phantoms), "second": str(target)}
    table = read_table("hsp_pairs", TABLES, sets=list(names))
    rows = PlannedRows(StudyPlan(table=table, datalists=names, output=tmp_path, settings={}))
    assert rows.reason_not_to_run(table.row("HSP-SAM, first to second")) is None
    assert "not given with --sets" in rows.reason_not_to_run(table.row("HSP-SAM, ISIC2018 to PH2"))
    reference = rows.reference(table.row("HSP-SAM, first to second"))
    assert reference.name == "AutoMedSAM, first to second"
    elsewhere = PlannedRows(StudyPlan(table=table, datalists=names, output=tmp_path, settings={}, section="nowhere"))
    assert "no data: " in elsewhere.reason_not_to_run(table.row("HSP-SAM, first to second"))


def test_each_section_has_its_own_reference(tiny_phantoms, tmp_path):
    table = read_table("hsp_polyp", TABLES)
    rows = PlannedRows(StudyPlan(table=table, datalists={"a": str(tiny_phantoms)}, output=tmp_path, settings={}))
    row = table.row("HSP-SAM, ETIS, unseen")
    assert rows.reference(row).name == "AutoMedSAM, ETIS, unseen"
    assert rows.section(row) == "test_etis"
    assert rows.training_folder(row, 0) == rows.training_folder(table.row("HSP-SAM, Kvasir, seen"), 0)


@pytest.mark.slow
def test_one_model_is_tested_on_two_sections(tiny_phantoms, tmp_path, tiny):
    content = json.loads(tiny_phantoms.read_text())
    cases = content.pop("test")
    folder = tmp_path / "data"
    shutil.copytree(tiny_phantoms.parent, folder)
    sections = {"test_kvasir": cases[:1], "test_etis": cases[1:]}
    (folder / "datalist.json").write_text(json.dumps({**content, **sections}))
    only = "AutoMedSAM, Kvasir, seen;HSP-SAM, Kvasir, seen;HSP-SAM, ETIS, unseen"
    words = {**tiny, "image_encoder": "compact"}
    cli.study("hsp_polyp", str(folder / "datalist.json"), output=str(tmp_path / "out"), only=only, **words)
    rows = figures(tmp_path / "out")
    assert [name for name, row in rows.items() if row["dsc"]] == only.split(";")
    assert len(list((tmp_path / "out").rglob("model.pt"))) == 2
    summaries = {
        name: {score.case for score in read_scores_csv(tmp_path / "out" / name / "seed_0/evaluation/metrics.csv")}
        for name in ("hsp_sam_kvasir_seen", "hsp_sam_etis_unseen")
    }
    assert summaries["hsp_sam_kvasir_seen"] == {cases[0]["case"]}
    assert summaries["hsp_sam_etis_unseen"] == {cases[1]["case"]}


@pytest.mark.slow
def test_pairs_run_by_their_command(tiny_phantoms, target, tmp_path, tiny):
    words = {**tiny, "image_encoder": "compact"}
    printed = cli.study("hsp_pairs", sets=f"first={tiny_phantoms},second={target}", output=str(tmp_path), **words)
    rows = figures(tmp_path)
    scored = [name for name, row in rows.items() if row["dsc"]]
    assert scored == [f"{network}, first to {place}" for place in ("first", "second") for network in NETWORKS]
    assert rows["HSP-SAM, first to second"]["difference"] != ""
    assert len(list(tmp_path.rglob("model.pt"))) == 2
    assert "IoU" in printed


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hsp_prompts", "hsp_source", "hsp_fusion", "hsp_adaptation", "hsp_networks"])
def test_an_own_table_runs_by_its_command(tiny_phantoms, tmp_path, name, tiny):
    printed = cli.study(name, str(tiny_phantoms), output=str(tmp_path), **{**tiny, "image_encoder": "compact"})
    rows = figures(tmp_path)
    table = read_table(name, TABLES)
    assert list(rows) == [row.name for row in table.rows]
    assert all(row["dsc"] != "" and int(row["parameters"]) > 0 for row in rows.values())
    assert all(row.name in printed for row in table.rows)
