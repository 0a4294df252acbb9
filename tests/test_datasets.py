"""Every data set that `automedsam prepare` knows: its overlay, its place in the documents, and the way to a network."""

import csv
import hashlib
import importlib.util
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from monai.bundle import ConfigWorkflow
from monai.utils import set_determinism

from scripts import cli
from scripts.data.converters.layouts import PROGRAMS, names_of_sets
from scripts.data.converters.patterns import PathPattern
from scripts.data.converters.prepare import read_tables
from scripts.data.datalist import read_datalist
from scripts.networks.model_card import ModelCard

BUNDLE_ROOT = Path(__file__).resolve().parents[1]
CONFIGS = BUNDLE_ROOT / "configs"
TABLES = read_tables(CONFIGS)
LAYOUTS = {name: layout for name, layout in TABLES.layouts.items() if not name.startswith("shared/")}
SHARED = [name.removeprefix("shared/") for name in TABLES.layouts if name.startswith("shared/")]
TASKS = {  # of the Decathlon: overlay -> what its dataset.json says (names as the owner has them)
    "msd_brain": {},  # as the tree has it
    "msd_liver": {},
    "msd_pancreas": {"name": "Pancreas", "labels": {"0": "background", "1": "pancreas", "2": "cancer"}},
    "msd_spleen": {"name": "Spleen", "labels": {"0": "background", "1": "spleen"}},
}
OVERLAYS = {path.stem: path for path in sorted((CONFIGS / "datasets").glob("*.yaml"))}
TINY = {
    "image_size": 32,
    "channels": [8, 16, 32],
    "max_epochs": 1,
    "batch_size": 2,
    "pretrained": None,
    "train_image_encoder": True,
    "tensorboard": False,
    "progress_bar": False,
}
# A CT volume with a label that is written anew, a picture, and a DICOM series; the others are `slow`.
FAST = ("abdomenct1k", "kvasir_seg", "chaos_mr")
# HSP-SAM trains on the first and tests on the second, arXiv 2506.02854.
PAIRS = [("isic2018", "ph2"), ("drive", "stare"), ("clinicdb", "colondb"), ("udiat", "busi"), ("dsb2018", "tnbc")]


def load_trees():
    """The makers of small trees, which lie beside the tests of preparation."""
    path = BUNDLE_ROOT / "tests" / "data" / "converters" / "trees.py"
    specification = importlib.util.spec_from_file_location("trees_of_owners", path)
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # its dataclass asks for it
    specification.loader.exec_module(module)
    return module


TREES = load_trees()


def overlay_settings(name):
    return yaml.safe_load(OVERLAYS[name].read_text(encoding="utf-8"))


# --------------------------------------------------------------------------------------------------------- the overlays


def test_every_set_has_an_overlay_and_the_reverse():
    assert set(OVERLAYS) == {*LAYOUTS, *SHARED, *TASKS}


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_says_where_and_what(name):
    settings = overlay_settings(name)
    window = {"window"} & set(settings)
    assert set(settings) - window == {"dataset_dir", "output_dir", "class_ids", "classes_per_image", "absent_share"}
    assert settings["dataset_dir"] == f"$@bundle_root + '/data/{name}'"
    assert settings["output_dir"] == f"$@bundle_root + '/runs/{name}'"
    assert settings["class_ids"] == sorted(settings["class_ids"])
    assert settings["classes_per_image"] == min(2, len(settings["class_ids"]))


@pytest.mark.parametrize("name", TABLES.layouts)
def test_an_overlay_names_the_classes_of_its_layout(name):
    settings, layout = overlay_settings(name.removeprefix("shared/")), TABLES.layouts[name]
    assert settings["class_ids"] == sorted(TABLES.vocabulary.resolve(known).id for known in layout.class_names)
    windowed = layout.modality == "CT" and name != "shared/lits_liver_ct"  # whose HU are windowed already
    assert settings.get("window") == ("abdomen" if windowed else None)


# -------------------------------------------------------------------------------------------------------- the documents


def section(level, heading):
    """The part of docs/data.md under a heading."""
    text = (BUNDLE_ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    found = re.search(
        rf"^#{{{level}}} {re.escape(heading)}$(.*?)(?=^#{{2,{level}}} |\Z)", text, re.DOTALL | re.MULTILINE
    )
    assert found, f"no section {heading}"
    return found.group(1)


def part_of(name):
    return section(3, f"`{name}`")


def rows(text):
    """The tables of a text, a list of cells each row."""
    lines = [line for line in text.splitlines() if line.startswith("|") and not set(line) <= set("|-: ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def blocks(text):
    return re.findall(r"^```\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def table_of_sets():
    table = rows(section(2, "Data sets").split("### ")[0])
    assert table[0] == ["name", "data set", "modality", "classes", "split", "patients told apart", "run on"]
    return {re.match(r"\[`(\w+)`\]\(#(\w+)\)", row[0])[1]: row[1:] for row in table[1:]}


def commands(text):
    """The calls of `automedsam` in a text, as words."""
    lines = [line for block in blocks(text) for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("automedsam ")]


def option(words, name, default=None):
    return words[words.index(f"--{name}") + 1] if f"--{name}" in words else default


def preparations():
    """(name, folder of the datalist) -> the command of the documents, for every `automedsam prepare`."""
    found = {}
    for words in commands(section(2, "Data sets")):
        if words[1] == "prepare":
            found[words[2], option(words, "output", f"data/{words[2]}")] = words  # a set's own part is the last
    return found


def test_the_table_of_sets_is_whole():
    table = table_of_sets()
    assert set(table) == {*PROGRAMS, *LAYOUTS} == set(names_of_sets(TABLES.layouts))
    for name, layout in LAYOUTS.items():
        _, modality, classes, split, _, files = table[name]
        assert (modality, classes) == (layout.modality, ", ".join(layout.class_names)), name
        assert split.split(",")[0].split(":")[0] == ("kept" if layout.sections else "drawn"), name
        assert files == "made files", name
    assert table["shared"][-1] == "**real files**"


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_set_is_documented_as_its_layout_says(name):
    text, layout = " ".join(part_of(name).split()), LAYOUTS[name]
    assert f"Page: <{layout.page}>." in text
    assert f"Licence: {layout.licence}." in text
    assert (name, f"data/{name}") in preparations()


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_folder_tree_of_the_documents_fits_the_layout(name):
    paths = [re.split(r" {2,}", line)[0] for line in blocks(part_of(name))[0].splitlines()]
    layout = LAYOUTS[name]
    fields = {**layout.fields, **{option: next(iter(values.values())) for option, values in layout.choices.items()}}
    labels = [layout.label] if layout.label else list(layout.mask.values())
    for patterns in (layout.image, *labels):
        for text in patterns:
            # A folder of a DICOM series is there when a file in it is.
            pattern = PathPattern(f"{text}*" if text.endswith("/") else text, fields=fields)
            assert any(pattern.match(path) for path in paths), text


def test_every_shared_set_and_task_is_documented():
    assert {row[0].strip("`") for row in rows(part_of("shared"))[1:]} == set(SHARED)
    for row in rows(part_of("shared"))[1:]:
        assert row[2] == ", ".join(TABLES.layouts[f"shared/{row[0].strip('`')}"].class_names)
    assert {("shared", f"data/{name}") for name in SHARED} <= set(preparations())
    assert {("msd", f"data/{name}") for name in TASKS} <= set(preparations())


def test_every_option_of_preparing_is_documented():
    table = rows(section(3, "How a set is prepared"))
    options = [row[0].strip("`") for row in table if len(row) == 3][1:]
    assert sorted(options) == sorted(set(inspect.signature(cli.prepare).parameters) - {"name"})


def test_the_pairs_of_the_documents_have_their_classes_in_common():
    table = [[cell.strip("[]`").split("`")[0] for cell in row] for row in rows(section(3, "From one set to another"))]
    assert [tuple(row) for row in table[1:]] == PAIRS
    for source, target in PAIRS:
        assert overlay_settings(source)["class_ids"] == overlay_settings(target)["class_ids"]


def test_the_output_that_is_shown_is_that_of_the_command(shared, tmp_path):
    said = cli.prepare("shared", source=str(shared / "data" / "chaos_t2_mr"), output=str(tmp_path), progress_bar=False)
    table, _, last = said.rpartition("\n\n")
    assert last.startswith("the datalist is ")
    assert f"```\n{table}\n```" in section(3, "How a set is prepared")


# ---------------------------------------------------------------------------------- from the owner's files to a network


@pytest.fixture(autouse=True)
def random_state():
    """Training seeds every generator; the other tests should not notice."""
    yield
    set_determinism(seed=None)


@pytest.fixture
def bundle(tmp_path, monkeypatch):
    """A bundle of its own to be in: what is prepared and trained by default comes to lie in it."""
    root = tmp_path / "bundle"
    root.mkdir()
    for part in ("configs", "models", "scripts"):
        (root / part).symlink_to(BUNDLE_ROOT / part)
    monkeypatch.chdir(root)
    monkeypatch.setattr(sys, "path", list(sys.path))  # a workflow puts its bundle there
    return root


def make_source(name, folder):
    """Write the tree of a set; gives the options that so few cases need."""
    makers = {**TREES.OWNERS, **dict.fromkeys(TASKS, TREES.msd), "msd_brain": TREES.msd_brain}
    folder.mkdir()
    options = makers[name](folder).options
    if TASKS.get(name):
        path, known = folder / "dataset.json", range(1, len(TASKS[name]["labels"]))
        path.write_text(json.dumps({**json.loads(path.read_text()), **TASKS[name]}))
        for label in folder.glob("labelsTr/*.nii.gz"):
            TREES.save_volume(TREES.label_volume(*known), label)
    return {key: value for key, value in options.items() if key != "sequence"}


def prepare_as_documented(name, source, options=None, *, kind=None):
    """Run the command of the documents, its source and what so few cases need aside."""
    kind = kind or ("msd" if name in TASKS else name)
    words = preparations()[kind, f"data/{name}"][1:]
    words[words.index("--source") + 1] = str(source)
    for key, value in (options or {}).items():
        words += [f"--{key}", ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    cli.main([*words, "--progress_bar", "false"])


def read_all(path):
    content = json.loads(path.read_text())
    sections = [name for name, entries in content.items() if isinstance(entries, list)]
    return read_datalist(path, section=sections, vocabulary=TABLES.vocabulary)


def sections_of_patients(folder):
    record = json.loads((folder / "preparation.json").read_text())
    return {case["patient"]: case["section"] for case in record["cases"]}


def workflow(root, *configs, **settings):
    """Run configs of the bundle in another folder, without any place being told."""
    flow = ConfigWorkflow(
        config_file=[str(CONFIGS / config) for config in configs],
        logging_file=False,
        workflow_type="train",
        bundle_root=str(root),
        **{**TINY, **settings},
    )
    flow.initialize()
    flow.run()
    flow.finalize()


def train(root, name, **settings):
    workflow(root, "train.json", f"datasets/{name}.yaml", **settings)
    return root / "runs" / name


def check_run(run, name):
    """A network, its card and its table are there, and the card says what the overlay said."""
    settings, card = overlay_settings(name), ModelCard.beside(run / "model.pt")
    assert (run / "model.pt").is_file()
    with open(run / "epochs.csv", newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1"]
    assert card.network["class_ids"] == settings["class_ids"]
    assert card.training["datalist"] == name
    assert "window" not in settings or card.preprocessing["window"] == settings["window"]
    taught = {TABLES.vocabulary.resolve(word).id for words in card.trained.values() for word in words}
    assert taught == set(settings["class_ids"])


def contents(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


OWN = [*LAYOUTS, *TASKS]


@pytest.mark.parametrize("name", OWN)
def test_the_documented_command_prepares_a_set(bundle, name):
    options = make_source(name, bundle / "source")
    prepare_as_documented(name, bundle / "source", options)
    cases = read_all(bundle / "data" / name / "datalist.json")
    assert {class_id for case in cases for class_id in case["annotated"]} == set(overlay_settings(name)["class_ids"])


@pytest.mark.parametrize("name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in OWN])
def test_a_prepared_set_trains_with_its_overlay_alone(bundle, name):
    options = make_source(name, bundle / "source")
    prepare_as_documented(name, bundle / "source", options)
    check_run(train(bundle, name), name)


def test_both_releases_of_colondb_are_read(bundle):
    names = []
    for maker in (TREES.colondb, TREES.colondb_redistributed):
        source = bundle / maker.__name__
        source.mkdir()
        maker(source)
        prepare_as_documented("colondb", source)
        names.append([case["case"] for case in read_all(bundle / "data" / "colondb" / "datalist.json")])
    assert sorted(names[0]) == sorted(names[1]) == ["1", "2", "3", "4"]


def excerpt(shared, name, folder):
    """The first patient of each section of a real set, its files where they are."""
    source, layout = shared / "data" / name, TABLES.layouts[f"shared/{name}"]
    with open(source / "split.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    key = layout.split_table.patient or "case"
    firsts = {row["split"]: row[key] for row in reversed(rows)}
    kept = [row for row in rows if row[key] == firsts[row["split"]]]
    names = {row["case"] for row in kept}
    for path in [*source.glob("images/*"), *source.glob("masks/**/*.*")]:
        if path.name.split(".")[0] in names:
            copy = folder / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.symlink_to(path)
    with open(folder / "split.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(kept)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARED)
def test_a_real_set_trains_with_its_overlay_alone(shared, bundle, name):
    excerpt(shared, name, bundle / name)
    prepare_as_documented(name, bundle / name, kind="shared")
    check_run(train(bundle, name, batch_size=8), name)


def test_training_runs_by_the_documented_command(bundle):
    """By MONAI's own, from the folder of the bundle: the overlay and the shipped defaults are all it takes."""
    options = make_source("kvasir_seg", bundle / "source")
    prepare_as_documented("kvasir_seg", bundle / "source", options)
    [line] = [block.strip() for block in blocks(section(2, "Data sets"))[:2] if "monai.bundle" in block]
    words = [sys.executable, *shlex.split(line)[1:], "--max_epochs", "1", "--progress_bar", "False"]
    settings = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=bundle, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    check_run(bundle / "runs" / "kvasir_seg", "kvasir_seg")


def test_scores_leave_the_training_alone(bundle):
    options = make_source("ph2", bundle / "source")
    prepare_as_documented("ph2", bundle / "source", options)
    run = train(bundle, "ph2")
    before, overlay, checkpoint = contents(run), "datasets/ph2.yaml", str(run / "model.pt")
    workflow(bundle, "train.json", overlay, "evaluate.json", checkpoint=checkpoint)
    assert contents(run) == before
    written = {"metrics.csv", "summary.json", "run.json"}
    assert written <= set(contents(bundle / "runs" / "evaluate"))
    summary = json.loads((bundle / "runs" / "evaluate" / "summary.json").read_text())
    assert list(summary["units"]["px"]["classes"]) == ["skin lesion"]
    workflow(bundle, "train.json", "evaluate.json", overlay, checkpoint=checkpoint)
    after = contents(run)
    assert {*before, *written} <= set(after)
    assert {name: after[name] for name in before} == before


def test_a_set_that_was_not_trained_on_is_scored_whole(bundle, capsys):
    source, target = PAIRS[0]
    for name in (source, target):
        make_source(name, bundle / f"{name}_files")
    prepare_as_documented(source, bundle / f"{source}_files")
    train(bundle, source)
    prepare, evaluate = commands(section(3, "From one set to another"))
    assert (prepare[2], option(prepare, "fractions")) == (target, "0,0,1")
    prepare[prepare.index("--source") + 1] = str(bundle / f"{target}_files")
    cli.main([*prepare[1:], "--progress_bar", "false"])
    datalist = json.loads((bundle / "data" / target / "datalist.json").read_text())
    assert [name for name, value in datalist.items() if isinstance(value, list)] == ["test"]
    cli.main([*evaluate[1:], "--progress_bar", "false"])
    with open(bundle / option(evaluate, "output") / "metrics.csv", newline="") as file:
        assert {row["case"] for row in csv.DictReader(file)} == {entry["case"] for entry in datalist["test"]}
    assert "skin lesion" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("first", "second"), [("brats", ("brats", "data/brats_t1ce")), ("chaos_mr", ("chaos_mr_t1", "data/chaos_mr_t1"))]
)
def test_two_sequences_of_a_patient_are_in_the_same_section(bundle, first, second):
    make_source(first, bundle / "source")
    prepare_as_documented(first, bundle / "source")
    if second[0] != first:
        make_source(second[0], bundle / "other")
    words = [*preparations()[second]]
    words[words.index("--source") + 1] = str(bundle / ("source" if second[0] == first else "other"))
    cli.main([*words[1:], "--progress_bar", "false"])
    sections = sections_of_patients(bundle / "data" / first)
    assert sections_of_patients(bundle / second[1]) == sections
    assert set(sections.values()) == {"training", "validation", "test"}


# --------------------------------------------------------------------------------------------------- a set of one's own


def generic_command(output):
    return preparations()["generic", output][1:]


def test_label_maps_of_ones_own(bundle):
    for number in range(3):
        TREES.save_volume(TREES.ct_volume(number), bundle / f"my_ct/images/p00{number}.nii.gz")
        TREES.save_volume(TREES.label_volume(1, 2), bundle / f"my_ct/labels/p00{number}.nii.gz")
    cli.main([*generic_command("data/my_ct"), "--progress_bar", "false"])
    cases = read_all(bundle / "data/my_ct/datalist.json")
    assert sorted(case["case"] for case in cases) == ["p000", "p001", "p002"]
    assert all(case["annotated"] == [1, 2] for case in cases)


def test_masks_and_stacks_of_ones_own(bundle):
    for patient in ("p01", "p02", "p03"):
        for phase in ("ED", "ES"):
            for number in (1, 2, 10):
                file = f"{patient}_{phase}_{number:02d}.png"
                pixels = TREES.grey(int(patient[1:]) * 100 + number + (50 if phase == "ES" else 0))
                TREES.save_picture(pixels, bundle / "my_mr/images" / file)
                for word in ("LV", "MYO"):
                    TREES.save_picture(TREES.mask(), bundle / "my_mr/masks" / word / file)
    cli.main([*generic_command("data/my_mr"), "--progress_bar", "false"])
    cases = read_all(bundle / "data/my_mr/datalist.json")
    assert sorted(case["case"] for case in cases) == [f"p0{n}_{phase}" for n in (1, 2, 3) for phase in ("ED", "ES")]
    names = {TABLES.vocabulary.entry(class_id).name for class_id in cases[0]["annotated"]}
    assert names == {"left ventricle", "myocardium"}
    assert [Path(file).stem for file in cases[0]["image"]] == [f"{cases[0]['case']}_{n}" for n in ("01", "02", "10")]
    sections = sections_of_patients(bundle / "data/my_mr")
    assert sorted(sections.values()) == ["test", "training", "validation"]


def test_challenge_files(bundle):
    (bundle / "source").mkdir()
    expected = TREES.medsam_npz(bundle / "source")
    prepare_as_documented("medsam_npz", bundle / "source", expected.options)
    cases = read_all(bundle / "data/medsam_npz/datalist.json")
    classes = {TABLES.vocabulary.entry(class_id).name for case in cases for class_id in case["annotated"]}
    assert classes == expected.classes
    rules = rows(part_of("medsam_npz"))[1:]
    assert [row[0].strip("`") for row in rules] == [rule.pattern.removeprefix("^") for rule in TABLES.npz_rules]
    assert [row[1] for row in rules] == [rule.modality for rule in TABLES.npz_rules]
