"""The tables of the paper as files: what they hold, and what is refused."""

import json

import pytest
import yaml

from scripts.errors import ConfigError
from scripts.losses.joint import LOSS_NAMES
from scripts.networks.automedsam import AutoMedSAM
from scripts.study import TABLES
from scripts.study_rows import read_table

NAMES = sorted(path.stem for path in TABLES.glob("*.yaml"))
# What decides how many steps a row has, and of what.
STEPS = {"max_epochs", "batch_size", "classes_per_image", "learning_rate", "lr_scheduler", "seed", "pretrained"}
# Table 7 of the paper: DSC less that of the whole, as its text states them for two of the rows.
DELTAS = {"fixed weights": (3.582, 3.254)}


def test_every_table_of_the_studies_is_there():
    expected = [f"table_{number}" for number in range(2, 9)]
    assert [*expected, "table_8_medsam"] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_table_says_what_its_figures_are_worth(name):
    table = read_table(name, TABLES)
    assert table.title
    assert table.data
    with_figures = [row for row in table.rows if row.paper is not None]
    assert len(with_figures) >= 2
    for row in with_figures:
        assert row.comparable.startswith("no: "), row.name
        assert 0 < row.paper.dsc < 100
        assert 0 < row.paper.nsd < 100


@pytest.mark.parametrize("name", NAMES)
def test_rows_set_nothing_that_is_not_there_and_no_other_budget(bundle_root, name):
    known = json.loads((bundle_root / "configs" / "train.json").read_text())
    weights = yaml.safe_load((bundle_root / "configs" / "weights.yaml").read_text())
    for row in read_table(name, TABLES).rows:
        for setting in (*row.settings, *row.evaluation):
            assert setting.split("#")[0] in known, setting
        assert not STEPS & set(row.settings), row.name
        assert row.weights is None or row.weights in weights
        assert set(row.settings.get("losses", [])) <= set(LOSS_NAMES)
        switches = {key: row.settings[key] for key in ("prompt_branches", "diffusion", "preset") if key in row.settings}
        assert AutoMedSAM(image_encoder="compact", image_size=32, **switches)


@pytest.mark.parametrize(
    ("name", "row", "dsc", "nsd"),
    [
        ("table_2", "MedSAM", 93.505, 92.969),
        ("table_2", "AutoMedSAM, as in the equations", 94.580, 95.148),
        ("table_3", "H-SAM, BraTS-FLAIR", 90.615, 90.288),
        ("table_3", "AutoMedSAM, as in the equations, Kvasir-SEG", 96.828, 98.729),
        ("table_3", "SAM2, Chest-XML", 95.423, 95.975),
        ("table_4", "AutoMedSAM, AbdomenCT-1K to AMOS", 71.141, 77.282),
        ("5", "sparse only", 93.256, 90.532),
        ("6", "Without Diffusion", 91.562, 92.194),
        ("7", "without MSE", 92.573, 93.281),
        ("8", "whole image", 2.359, 2.366),
    ],
)
def test_figures_are_the_papers(name, row, dsc, nsd):
    paper = read_table(name, TABLES).row(row).paper
    assert (paper.dsc, paper.nsd) == (dsc, nsd)


def test_differences_that_the_papers_text_states():
    joint = read_table("7", TABLES)
    whole = joint.row("all losses, learned weights").paper
    for name, (dsc, nsd) in DELTAS.items():
        paper = joint.row(name).paper
        assert (whole.dsc - paper.dsc, whole.nsd - paper.nsd) == pytest.approx((dsc, nsd), abs=1e-9)
    plain, diffused = read_table("6", TABLES).rows
    assert (diffused.paper.dsc - plain.paper.dsc, diffused.paper.nsd - plain.paper.nsd) == pytest.approx((5.379, 5.173))


def test_a_loss_left_out_is_all_that_differs():
    rows = {row.name: row.settings for row in read_table("7", TABLES).rows}
    left_out = {name: set(LOSS_NAMES) - set(settings.get("losses", LOSS_NAMES)) for name, settings in rows.items()}
    assert left_out == {
        "without MSE": {"mse_sparse", "mse_dense"},
        "without Shape Distance": {"shape_distance"},
        "without Dice": {"dice"},
        "without cross-entropy": {"cross_entropy"},
        "fixed weights": set(),
        "all losses, learned weights": set(),
    }


def test_a_table_of_several_sets_has_rows_for_further_ones():
    table = read_table("3", TABLES, sets=["mine", "Kvasir-SEG"])
    row = table.row("AutoMedSAM, as released, mine")
    assert (row.trained_on, row.tested_on, row.paper) == ("mine", "mine", None)
    assert len(table.rows) == 4 * len(read_table("2", TABLES).rows)


def test_pairs_of_data_sets_are_crossed_once():
    table = read_table("4", TABLES, sets=["AbdomenCT-1K", "AMOS"])
    pairs = [(row.trained_on, row.tested_on) for row in table.rows if row.missing is None]
    assert pairs.count(("AbdomenCT-1K", "AMOS")) == 1
    assert {("AMOS", "AMOS"), ("AbdomenCT-1K", "AbdomenCT-1K"), ("AMOS", "AbdomenCT-1K")} < set(pairs)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("- 1", "expected a mapping"),
        ("rows: []", "expected rows with names"),
        ("rows: [{name: a}, {name: a}]", "names of their own, got a, a"),
        ("rows: [{settings: {}}]", "a row is a mapping with a name"),
        ("rows: [{name: a, setings: {}}]", "a row is a mapping with a name"),
        ("rows: [{name: a, paper: {dsc: 1, nsd: 2}}]", "the paper's figures of 'a'"),
        ("rows: [{name: a, paper: {dsc: 1, nsd: 2, basis: guessed}}]", "stated or inferred"),
        ("rows: [{name: a}]\nrow: 1", "expected a mapping of"),
        ("rows: [", "cannot be read as a table"),
    ],
)
def test_a_file_that_is_no_table(tmp_path, text, error):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=error):
        read_table(str(path), TABLES)


def test_a_table_that_is_not_there():
    with pytest.raises(ConfigError, match=r"no table '9': give one of table_2, .*table_8_medsam"):
        read_table("9", TABLES)
