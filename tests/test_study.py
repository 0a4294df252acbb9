"""`automedsam study`: the rows of a table, trained, evaluated, resumed and laid out, on tiny phantoms."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
import yaml

from scripts import cli
from scripts.data.phantoms import write_phantoms
from scripts.errors import ConfigError, TrainingError
from scripts.metrics.statistics import class_intervals, compare_runs
from scripts.networks.automedsam import AutoMedSAM
from scripts.networks.checkpoints import read_state_dict, save_state_dict
from scripts.report.tables import read_scores_csv
from scripts.study.plan import TABLES, StudyPlan, read_overlays
from scripts.study.rows import read_table
from scripts.study.study import run_study
from scripts.workflow import CONFIGS

TINY = {
    "image_size": 32,
    "channels": [8, 16, 32],
    "diffusion_steps": 1,  # with the strongest noise
    "max_epochs": 1,
    "batch_size": 16,
    "learning_rate": 1e-5,  # hardly trained, a network finds something everywhere; trained briefly, nothing
    "progress_bar": False,
    "tensorboard": False,
}
CONTENT = {
    "title": "a study",
    "data": "a data set",
    "reference": "plain",
    "rows": [
        {
            "name": "plain",
            "paper": {"dsc": 90, "nsd": 91, "basis": "stated"},
            "comparable": "no: other data",
        },
        {
            "name": "no diffusion",
            "settings": {"diffusion": False},
            "paper": {"dsc": 80, "nsd": 81, "basis": "inferred"},
            "comparable": "no: other data",
        },
        {"name": "plain, asked twice", "evaluation": {"slices_at_once": 3}},
        {"name": "broken", "settings": {"prompt_branches": "dense"}},  # its sparse loss has nothing to compare
        {"name": "elsewhere", "missing": "this version has no such network", "comparable": "no"},
    ],
}


def markers(path):
    """When each complete run was marked as such."""
    return {str(file.relative_to(path)): file.stat().st_mtime_ns for file in path.rglob("complete.json")}


@pytest.fixture(scope="module")
def table_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tables") / "mine.yaml"
    path.write_text(yaml.safe_dump(CONTENT, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Settings of a small network, and the weights to start from: a whole model."""
    path = tmp_path_factory.mktemp("start") / "start.pt"
    with torch.random.fork_rng():
        torch.manual_seed(3)
        network = AutoMedSAM(image_encoder="compact", image_size=32, class_ids=[1], channels=[8, 16, 32])
    save_state_dict(network.state_dict(), path)
    return {**TINY, "pretrained": str(path)}


def plan_of(table_file, datalist, output, **settings):
    arguments = {"settings": {}, "seeds": [0], **settings}
    output.mkdir(exist_ok=True)
    table = read_table(str(table_file), TABLES)
    return StudyPlan(table=table, datalists={"phantoms": str(datalist)}, output=output, **arguments)


@pytest.fixture(scope="module")
def study(tmp_path_factory, tiny_phantoms, table_file, tiny):
    """A study with a row that fails: its outcome and folder."""
    output = tmp_path_factory.mktemp("study")
    return run_study(plan_of(table_file, tiny_phantoms, output, settings=tiny)), output


def figures(output):
    return {row["row"]: row for row in csv.DictReader((output / "study.csv").open())}


def values_of(path, measure="dsc"):
    """Scores (cases, classes) and the patients, read back from an evaluation."""
    scores = read_scores_csv(path / "metrics.csv")
    cases, ids = sorted({s.case for s in scores}), sorted({s.class_id for s in scores})
    table = np.full((len(cases), len(ids)), np.nan)
    for score in scores:
        table[cases.index(score.case), ids.index(score.class_id)] = getattr(score, measure)
    return table, [next(s.patient for s in scores if s.case == case) for case in cases]


def test_every_row_is_there_whatever_became_of_it(study):
    outcome, output = study
    assert list(figures(output)) == [row["name"] for row in CONTENT["rows"]]
    assert list(outcome.failures) == ["broken"]
    assert "gives no sparse prompts" in outcome.failures["broken"]
    for text in ("this version has no such network", "failed: the loss 'mse_sparse'", "90.000", "80.000*"):
        assert text in outcome.text
    assert outcome.text == (output / "table.txt").read_text()


def test_figures_are_those_of_the_evaluations(study):
    _, output = study
    first, patients = values_of(output / "plain" / "seed_0" / "evaluation")
    second, _ = values_of(output / "no_diffusion" / "seed_0" / "evaluation")
    classes, mean = class_intervals(second, patients=patients)
    row = figures(output)["no diffusion"]
    assert float(row["dsc"]) == pytest.approx(100 * mean.mean)
    assert float(row["dsc_low"]) == pytest.approx(100 * mean.low)
    assert float(row["nsd"]) == pytest.approx(
        100 * np.nanmean(values_of(output / "no_diffusion" / "seed_0" / "evaluation", "nsd")[0], axis=0).mean()
    )
    assert float(row["difference"]) == pytest.approx(
        100 * compare_runs(first, second, patients=patients)[1].difference.mean
    )
    assert int(row["seeds"]) == 1
    assert figures(output)["plain"]["difference"] == ""
    entries = {entry["row"]: entry for entry in json.loads((output / "study.json").read_text())["rows"]}
    assert list(entries["no diffusion"]["classes"].values()) == pytest.approx([100 * entry.mean for entry in classes])


def test_the_noise_of_the_network_is_drawn_several_times(study, table_file, tiny_phantoms, tmp_path, tiny):
    output = tmp_path / "copy"
    shutil.copytree(study[1], output)
    outcome = run_study(plan_of(table_file, tiny_phantoms, output, only=["plain"], noise_seeds=[3, 4], settings=tiny))
    drawn = [
        np.nanmean(values_of(output / "plain" / "seed_0" / f"evaluation_noise_{seed}")[0], axis=0).mean()
        for seed in (3, 4)
    ]
    assert drawn[0] != drawn[1]
    assert float(figures(output)["plain"]["dsc_noise_deviation"]) == pytest.approx(100 * np.std(drawn, ddof=1))
    assert figures(output)["plain"]["dsc"] == figures(study[1])["plain"]["dsc"]  # without noise, as before
    assert "draws of the network's noise: plain" in " ".join(outcome.text.split())


def test_rows_that_are_trained_alike_share_the_training(study):
    _, output = study
    assert (output / "plain" / "seed_0" / "model.pt").is_file()
    assert not (output / "plain_asked_twice" / "seed_0" / "model.pt").exists()
    assert figures(output)["plain, asked twice"]["dsc"] == figures(output)["plain"]["dsc"]


def test_all_rows_start_alike_and_without_a_class_prompt_encoder(study, tiny):
    _, output = study
    (start,) = output.glob("start_*.pt")
    begun, shipped = read_state_dict(start), read_state_dict(tiny["pretrained"])
    assert {name for name in shipped if name not in begun} == {
        name for name in shipped if name.startswith("class_prompt_encoder.")
    }
    assert len(list((output / "embeddings").iterdir())) == 1  # of the one frozen encoder


def test_what_is_complete_is_not_run_again(study, table_file, tiny_phantoms, tiny):
    outcome, output = study
    before = markers(output)
    again = run_study(
        plan_of(table_file, tiny_phantoms, output, only=["plain", "no diffusion", "plain, asked twice"], settings=tiny)
    )
    assert markers(output) == before
    assert again.failures == {}
    assert [line for line in again.text.splitlines() if line.startswith(("plain", "no diffusion"))] == [
        line for line in outcome.text.splitlines() if line.startswith(("plain", "no diffusion"))
    ]


def test_a_row_alone_is_the_row_among_others(study, table_file, tiny_phantoms, tmp_path, tiny):
    _, output = study
    run_study(plan_of(table_file, tiny_phantoms, tmp_path / "alone", only=["No diffusion"], settings=tiny))
    alone = figures(tmp_path / "alone")
    assert alone["no diffusion"]["dsc"] == figures(output)["no diffusion"]["dsc"]
    assert alone["plain"]["note"] == "not run"
    assert alone["plain"]["paper_dsc"] == "90.0"


def test_what_broke_off_or_has_other_settings_is_run_again(study, table_file, tiny_phantoms, tmp_path, tiny):
    _, complete = study
    output = tmp_path / "copy"
    shutil.copytree(complete, output)
    marker = output / "no_diffusion" / "seed_0" / "evaluation" / "complete.json"
    marker.write_text("{")  # as a full disk leaves it
    before = markers(output)
    only = ["no diffusion"]
    run_study(plan_of(table_file, tiny_phantoms, output, only=only, settings=tiny))
    changed = {name for name, time in markers(output).items() if before[name] != time}
    assert changed == {"no_diffusion/seed_0/evaluation/complete.json"}
    run_study(plan_of(table_file, tiny_phantoms, output, only=only, settings={**tiny, "learning_rate": 0.001}))
    changed = {name for name, time in markers(output).items() if before[name] != time}
    assert "no_diffusion/seed_0/complete.json" in changed
    assert "plain/seed_0/complete.json" not in changed
    assert figures(output)["plain"]["note"] == "not run"  # what is there has other settings


def test_several_seeds_are_averaged_and_spread(table_file, tiny_phantoms, study, tmp_path, tiny):
    _, complete = study
    output = tmp_path / "copy"
    shutil.copytree(complete, output)
    run_study(plan_of(table_file, tiny_phantoms, output, only=["plain"], seeds=[0, 1], settings=tiny))
    means = [
        np.nanmean(values_of(output / "plain" / f"seed_{seed}" / "evaluation")[0], axis=0).mean() for seed in (0, 1)
    ]
    row = figures(output)["plain"]
    assert float(row["dsc"]) == pytest.approx(100 * np.mean(means))
    assert float(row["dsc_seed_deviation"]) == pytest.approx(100 * np.std(means, ddof=1))
    assert means[0] != means[1]
    assert (row["seeds"], figures(output)["no diffusion"]["seeds"]) == ("2", "1")


def test_the_command_says_which_row_failed_and_ends_with_an_error(study, table_file, tiny_phantoms, capsys, tiny):
    _, output = study
    words = [part for name, value in tiny.items() for part in (f"--{name}", str(value))]
    command = ["study", table_file, tiny_phantoms, "--output", output, *words]
    with pytest.raises(SystemExit) as stop:
        cli.main([str(word) for word in command])
    printed = capsys.readouterr()
    assert stop.value.code == 1
    assert "1 of 5 rows failed: broken (the loss 'mse_sparse'" in printed.err
    assert "no diffusion" in printed.out


def test_training_across_data_sets(tiny_phantoms, tmp_path, tiny):
    other = write_phantoms(tmp_path / "other", training=2, validation=1, test=2, size=32, slices=12, seed=9)
    names = {"first": str(tiny_phantoms), "second": str(other)}
    table = read_table("4", TABLES, sets=list(names))
    pair = "AutoMedSAM, first to second"
    plan = StudyPlan(
        table=table, datalists=names, output=tmp_path, settings=tiny, only=[pair, pair.replace("first", "second")]
    )
    run_study(plan)
    rows = figures(tmp_path)
    assert rows[pair]["difference"] != ""
    assert "not given with --sets" in rows["AutoMedSAM, AbdomenCT-1K to AMOS"]["note"]
    across, _ = values_of(tmp_path / "automedsam_first_to_second" / "seed_0" / "evaluation")
    within, patients = values_of(tmp_path / "automedsam_second_to_second" / "seed_0" / "evaluation")
    expected = compare_runs(within, across, patients=patients)[1].difference.mean
    assert float(rows[pair]["difference"]) == pytest.approx(100 * expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["table_2", "table_3", "table_5", "table_6", "table_7", "table_8"])
def test_a_table_of_the_bundle_runs_by_its_command(tiny_phantoms, tmp_path, name, tiny):
    words = {**tiny, "slices_at_once": 8}
    printed = cli.study(name, str(tiny_phantoms), output=str(tmp_path), **words)
    rows = figures(tmp_path)
    table = read_table(name, TABLES, sets=[tiny_phantoms.parent.name])
    assert list(rows) == [row.name for row in table.rows]
    able = [row for row in table.rows if not row.missing and not row.weights and row.trained_on in (None, *rows)]
    for row in able:
        assert rows[row.name]["dsc"] != "", row.name
    assert all(row.name in printed for row in table.rows)
    assert sum(row["dsc"] != "" for row in rows.values()) >= 2


# ---------------------------------------------------------------------------------------------- what cannot be studied


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"only": ["nothing"]}, "mine has no row 'nothing'"),
        ({"settings": {"output_dir": "x"}}, "decides output_dir itself"),
        ({"presence": "some"}, "the presence 'all' or 'oracle'"),
        ({"seeds": []}, "needs seeds"),
    ],
)
def test_a_plan_that_cannot_be(table_file, tiny_phantoms, tmp_path, settings, error):
    with pytest.raises(ConfigError, match=error):
        run_study(plan_of(table_file, tiny_phantoms, tmp_path, **settings))


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({}, "one datalist, or --sets"),
        ({"sets": "a"}, "--sets is written"),
        ({"sets": "a=x,a=y"}, "each name once"),
        ({"sets": "a=x,b=y"}, "of one data set"),
        ({"datalist": "x", "seeds": "0,0"}, "seeds are different whole numbers"),
        ({"datalist": "x", "seeds": "one"}, "seeds are different whole numbers"),
    ],
)
def test_a_command_that_cannot_be(tmp_path, settings, error):
    with pytest.raises(ConfigError, match=error):
        cli.study("table_5", output=str(tmp_path), **settings)


def test_boxes_in_another_protocol_are_refused_row_by_row(tiny_phantoms, tmp_path, tiny):
    table = read_table("table_8", TABLES)
    plan = StudyPlan(table=table, datalists={"a": str(tiny_phantoms)}, output=tmp_path, settings=tiny, presence="all")
    run_study(plan)
    assert {row["note"] for row in figures(tmp_path).values()} == {
        'boxes of the truth can be asked for in the protocol "oracle" alone'
    }


def test_overlays_become_settings_of_all_rows(tmp_path):
    settings = read_overlays([CONFIGS / "datasets" / "acdc_cine_mr.yaml"])
    assert settings == {"classes_per_image": 2, "absent_share": 0.25}
    adding = tmp_path / "adding.yaml"
    adding.write_text("+losses: [dice]\n")
    with pytest.raises(ConfigError, match=r"\+losses adds"):
        read_overlays([adding])


def test_nothing_to_evaluate_is_a_row_that_failed(tiny_phantoms, tmp_path, tiny):
    content = json.loads(tiny_phantoms.read_text())
    with pytest.raises(TrainingError, match=r"3 of 3 rows failed.*section 'nowhere'"):
        cli.study("table_5", str(tiny_phantoms), output=str(tmp_path), section="nowhere", **tiny)
    assert "nowhere" not in content
