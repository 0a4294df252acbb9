"""The page: its figures are those of the CSV files, it needs nothing but itself, and people can read it."""

import base64
import csv
import json
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO
from urllib.parse import unquote
from xml.dom import minidom  # the project's own output

import numpy as np
import pytest
from PIL import Image

from scripts.cli import report
from scripts.errors import InputError, OutputError
from scripts.metrics.scores import score_case
from scripts.metrics.summaries import compare_scores
from scripts.report.attention_pictures import attention_name, attention_picture
from scripts.report.error_pictures import picture_name
from scripts.report.html.attention import attention_section
from scripts.report.html.cases import telling_cases
from scripts.report.html.elements import MISSING, table
from scripts.report.html.page import TITLE, flattened, write_report
from scripts.report.html.runs import Run, read_runs
from scripts.report.tables import read_scores_csv, write_scores_csv

VOID = {"meta", "link", "img", "br"}


class Parsed(HTMLParser):
    """A page taken apart: every tag must be closed in its turn."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.rows, self.text = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)
        if self.open and self.open[-1] in ("th", "td"):
            self.rows[-1][-1] += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def row(self, *start):
        (found,) = [row for row in self.rows if row[: len(start)] == list(start)]
        return found


def add_training(folder):
    rows = [f"{1 + i // 5},{i + 1},{5 - i / 10},{1 / (i + 1)},{1 - i / 50}" for i in range(20)]
    (folder / "losses.csv").write_text("\n".join(["epoch,iteration,loss,dice,lambda_dice", *rows]) + "\n")
    (folder / "epochs.csv").write_text("epoch,learning_rate,train_loss,val_mean_dsc\n1,0.1,4,\n2,0.05,3,0.8\n")


def add_pictures(folder):
    (folder / "pictures").mkdir()
    for score in read_scores_csv(folder / "metrics.csv"):
        if score.present:
            picture = Image.new("RGB", (40, 20), (200, 10, 10))
            picture.save(folder / "pictures" / picture_name(score.case, score.class_name))


def add_attention(folder):
    (folder / "attention").mkdir()
    maps = {level: np.full((2, 4, 4), 1 / 16) for level in range(4)}
    for case in {score.case for score in read_scores_csv(folder / "metrics.csv")}:
        path = folder / "attention" / f"{attention_name(case)}.png"
        image, masks = np.full((1, 32, 32), 90.0), np.zeros((0, 32, 32), dtype=bool)
        attention_picture(image, maps, masks, classes=[], levels=4, title=case, path=path)


def add_quality(folder):
    bins = [
        {"low": i / 4, "high": (i + 1) / 4, "error_rate": 0.1 * i if i else None, "voxels": 9 - i} for i in range(4)
    ]
    (folder / "uncertainty.json").write_text(json.dumps({"bins": bins}))
    voxels = [{"low": i / 2, "high": (i + 1) / 2, "count": 7, "mean": 0.3, "outcome": 0.25 + i / 2} for i in range(2)]
    (folder / "calibration.json").write_text(json.dumps({"voxels": {"calibration_error": 0.1, "bins": voxels}}))
    (folder / "quality.csv").write_text(
        "case,class,dsc,predicted_by_head,predicted_by_samples\na,liver,0.5,0.75,\nb,liver,0.5,0.5,\nc,liver,,0.25,\n"
    )


@pytest.fixture(scope="module")
def full(write_run, tmp_path_factory):
    """A page of two evaluations, the first with everything that a run can leave, and its folder."""
    folder = tmp_path_factory.mktemp("report")
    first = write_run(folder / "with <diffusion>")
    for add in (add_training, add_pictures, add_attention, add_quality):
        add(first)
    second = write_run(folder / "without", shifts=(2, 4, 3, 1, 6))
    write_report(read_runs([first, second]), folder / "report.html")
    return folder


@pytest.fixture(scope="module")
def page(full):
    return Parsed((full / "report.html").read_text(encoding="utf-8"))


def test_means_agree_with_the_csv(full, page):
    with (full / "with <diffusion>" / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["dsc"]]
    means = {
        name: [
            np.mean([float(row[column]) for row in rows if row["class"] == name])
            for column in ("dsc", "nsd", "nsd_challenge", "hd95", "assd", "volume_error_ml", "iou")
        ]
        for name in ("liver", "left kidney")
    }
    means["mean"] = np.mean(list(means.values()), axis=0)
    tables = [row for row in page.rows if len(row) == 8 and "[" in row[1]]
    for name, expected in means.items():
        shown = next(row for row in tables if row[0] == name)
        assert [float(cell.split("\n")[0]) for cell in shown[1:]] == pytest.approx(expected, abs=5e-3)
        assert float(shown[1].split("\n")[0]) == pytest.approx(expected[0], abs=5e-5)


def test_intervals_agree_with_the_summary(full, page):
    summary = json.loads((full / "with <diffusion>" / "summary.json").read_text())
    low, high = summary["units"]["mm"]["classes"]["liver"]["intervals"]["dsc"]
    shown = next(row for row in page.rows if row[0] == "liver" and "\n" in row[1])
    assert shown[1].split("\n")[1] == f"[{low:.4f}, {high:.4f}]"


def test_counts_agree_with_the_summary(full, page):
    entry = json.loads((full / "without" / "summary.json").read_text())["units"]["mm"]["classes"]["left kidney"]
    shown = [row for row in page.rows if row[0] == "left kidney" and len(row) == 10]
    assert shown[1][1:5] == [
        str(entry[key]) for key in ("cases", "cases_without", "false_negative_cases", "false_positive_cases")
    ]
    rates = ("false_positive_rate", "adjacent_false_positive_rate", "isolated_false_positive_rate")
    assert shown[1][5:8] == [f"{100 * entry[key]:.2f}" for key in rates]
    assert shown[1][9] == f"{100 * entry['swapped_share']:.2f}"


def test_the_comparison_is_that_of_the_statistics(full, page):
    scores = [read_scores_csv(full / name / "metrics.csv") for name in ("with <diffusion>", "without")]
    found = compare_scores(*scores)[0].comparisons[0]
    shown = [row for row in page.rows if row[0] == "liver" and row[-1] == "too few patients"]
    difference = found.difference
    assert shown[0][4] == f"{difference.mean:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]"
    assert shown[0][6] == found.verdict


def test_swapped_sides_are_compared_and_captions_name_the_protocol(write_run, tmp_path):
    many = {"shifts": (1, 3, 2, 0, 4, 1, 3, 2, 1, 4, 2, 3)}
    folders = [write_run(tmp_path / "one", **many), write_run(tmp_path / "two", **many)]
    for folder, step in zip(folders, (3, 7), strict=True):
        scores = read_scores_csv(folder / "metrics.csv")
        swapped = [None if score.swapped_voxels is None else step * (i + 1) for i, score in enumerate(scores)]
        changed = [replace(score, swapped_voxels=count) for score, count in zip(scores, swapped, strict=True)]
        write_scores_csv(changed, folder / "metrics.csv")
    *_, swaps = compare_scores(*(read_scores_csv(folder / "metrics.csv") for folder in folders))
    page = Parsed(write_report(read_runs(folders), tmp_path / "report.html").read_text(encoding="utf-8"))
    text = "".join(page.text)
    assert "DSC, two less one, paired by case; protocol all; averaged per case over the cases" in text
    assert "Swapped sides, two less one, paired by case; protocol all; share of the predicted voxels" in text
    difference = swaps.comparisons[0].difference
    assert difference.mean > 0
    shown = f"{difference.mean:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]"
    (row,) = [row for row in page.rows if row[0] == "left kidney" and shown in row]
    assert row[1:4] == [str(difference.cases), f"{swaps.first[0]:.4f}", f"{swaps.second[0]:.4f}"]
    assert row[6] == "worse"


def test_runs_of_other_cases_are_compared_in_what_they_share(write_run, tmp_path):
    folders = [write_run(tmp_path / "long"), write_run(tmp_path / "short", shifts=(2, 4, 3))]
    page = Parsed(write_report(read_runs(folders), tmp_path / "report.html").read_text(encoding="utf-8"))
    assert any("4 pairs of case and class that only one run has are left out" in text for text in page.text)
    assert next(row for row in page.rows if row[0] == "liver" and len(row) == 7 and row[1] == "3")


def test_runs_that_cannot_be_compared_say_why(write_run, tmp_path):
    folders = [write_run(tmp_path / "volumes"), write_run(tmp_path / "planar", planar=True)]
    page = write_report(read_runs(folders), tmp_path / "report.html").read_text(encoding="utf-8")
    assert "planar less volumes: not comparable. Expected one unit" in page
    summary = folders[1] / "summary.json"
    summary.write_text(summary.read_text().replace('"all"', '"oracle"'))
    page = write_report(read_runs(folders), tmp_path / "report.html").read_text(encoding="utf-8")
    assert "not comparable, the protocols are oracle and all" in page


def test_volumes_and_planar_cases_have_their_own_boxes(write_run, tmp_path):
    folders = [write_run(tmp_path / "volumes"), write_run(tmp_path / "planar", planar=True)]
    write_report(read_runs(folders), tmp_path / "report.html")
    names = {path.stem for path in (tmp_path / "report_files").iterdir()}
    assert names == {f"boxes_{score}_{unit}" for score in ("dsc", "nsd", "hd95") for unit in ("mm", "px")}


def test_the_page_needs_nothing_but_itself(full, page):
    assert page.all("script") == []
    for attributes in (attributes for _, attributes in page.tags):
        assert not attributes.keys() & {"srcset", "onload", "onclick", "xlink:href"}
        assert attributes.get("src", "data:").startswith("data:")
        assert not attributes.get("href", "").startswith(("http:", "https:", "//", "/", "file:"))
    assert all(link["href"] == "data:," for link in page.all("link"))
    text = (full / "report.html").read_text(encoding="utf-8")
    assert "@import" not in text
    assert "url(" not in text


def test_every_link_leads_to_a_file_or_a_section(full, page):
    places = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    targets = [attributes["href"] for attributes in page.all("a")]
    assert any(target.endswith("metrics.csv") for target in targets)
    for target in targets:
        assert target[1:] in places if target.startswith("#") else (full / unquote(target)).is_file(), target


def test_ids_are_unique(page):
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_charts_are_well_formed_and_lie_beside_the_page(full, page):
    text = (full / "report.html").read_text(encoding="utf-8")
    charts = [part.split("</svg>")[0] for part in text.split("<svg ")[1:]]
    for chart in charts:
        root = minidom.parseString(f"<svg {chart}</svg>").documentElement  # noqa: S318
        assert all(root.getElementsByTagName(tag)[0].firstChild.data for tag in ("title", "desc"))
    files = sorted((full / "report_files").iterdir())
    assert len(files) == len(charts) == 3 + 3 + 2 + 3  # boxes, iterations, epochs; uncertainty, calibration, quality
    for file in files:
        assert Image.open(file).getcolors(10**6)[0][0] > 0


def test_every_loss_and_every_weight_has_its_curve(full):
    names = {path.stem for path in (full / "report_files").iterdir()}
    assert {"run1_loss", "run1_dice", "run1_lambda_dice", "run1_learning_rate", "run1_val_mean_dsc"} <= names
    assert "run1_train_loss" not in names  # the mean of what is there by iteration


def test_tables_have_captions_and_heads_with_their_scope(full, page):
    assert len(page.all("caption")) == len(page.all("table"))
    assert {attributes["scope"] for attributes in page.all("th")} == {"col", "row"}
    assert {len(row) for row in page.rows} <= {3, 7, 8, 10}
    assert page.all("html") == [{"lang": "en"}]
    assert page.all("img")
    assert all(attributes["alt"] for attributes in page.all("img"))


def test_worst_median_and_best_case_are_shown(full, page):
    scores = read_scores_csv(full / "with <diffusion>" / "metrics.csv")
    text = "".join(page.text)
    for name in ("liver", "left kidney"):
        chosen = telling_cases([score for score in scores if score.class_name == name])
        for rank, score in chosen.items():
            assert f"{rank}: {score.case}, DSC {score.dsc:.4f}, NSD {score.nsd:.4f}" in text
    images = [attributes for attributes in page.all("img") if not attributes["alt"].startswith("attention")]
    pictures = [attributes["src"].partition("base64,")[2] for attributes in images]
    assert len(pictures) == 6
    assert Image.open(BytesIO(base64.b64decode(pictures[0]))).size == (40, 20)


def test_the_telling_cases_are_those_of_the_sorted_scores(full):
    scores = [s for s in read_scores_csv(full / "without" / "metrics.csv") if s.class_name == "left kidney"]
    chosen = telling_cases(scores)
    ordered = sorted((score for score in scores if score.present), key=lambda score: score.dsc)
    assert len(ordered) == 4
    assert [chosen[rank] for rank in ("worst", "median", "best")] == [ordered[0], ordered[1], ordered[3]]
    assert list(telling_cases(ordered[:2])) == ["worst", "best"]
    assert list(telling_cases(ordered[:1])) == ["worst"]
    assert telling_cases([score for score in scores if not score.present]) == {}


def test_a_run_without_pictures_says_so(page):
    assert "This run has no pictures" in "".join(page.text)


def test_the_attention_of_the_telling_cases_is_shown_once_each(full, page):
    scores = read_scores_csv(full / "with <diffusion>" / "metrics.csv")
    ranks = {}
    for name in ("liver", "left kidney"):
        for rank, score in telling_cases([score for score in scores if score.class_name == name]).items():
            ranks.setdefault(score.case, []).append(f"{rank} of {name}")
    assert 3 < len(ranks) < 6  # the worst of both classes is one case
    images = [attributes for attributes in page.all("img") if attributes["alt"].startswith("attention")]
    assert len(images) == len(ranks)
    for (case, words), attributes in zip(ranks.items(), images, strict=True):
        assert f" {case}:" in attributes["alt"]
        file = full / "with <diffusion>" / "attention" / f"{case}.png"
        assert base64.b64decode(attributes["src"].partition("base64,")[2]) == file.read_bytes()
        assert f"{case}: {', '.join(words)}" in page.text


def test_attention_is_explained_once_and_only_where_there_is_some(full, page, write_run, tmp_path):
    assert page.text.count("Where the abstract prompts look") == 2  # contents and head
    text = (full / "report.html").read_text(encoding="utf-8")
    section = text.partition("<h2>Where the abstract prompts look</h2>")[2].partition("</section>")[0]
    assert section.startswith("<p>Each map shows")
    assert "<h3>with &lt;diffusion&gt;</h3>" in section
    assert "<h3>without</h3>" not in section
    plain = write_report(read_runs([write_run(tmp_path / "plain")]), tmp_path / "r.html").read_text(encoding="utf-8")
    assert "attention" not in plain
    assert "abstract" not in plain


def test_attention_that_is_missing_is_named(write_run, tmp_path):
    folder = write_run(tmp_path / "run", shifts=(1, 2))
    add_attention(folder)
    (folder / "attention" / "case_00.png").unlink()
    text = write_report(read_runs([folder]), tmp_path / "r.html").read_text(encoding="utf-8")
    assert "case_00: best of liver, best of left kidney; there is no picture of it" in text
    (folder / "attention" / "case_01.png").unlink()
    text = write_report(read_runs([folder]), tmp_path / "r.html").read_text(encoding="utf-8")
    assert "abstract prompts" not in text


def test_attention_of_cases_without_a_score_is_said_to_lie_in_the_folder(tmp_path):
    nothing = np.zeros((1, 8, 8, 2), dtype=bool)
    scores = score_case(
        nothing, nothing, case="a", class_ids=[1], class_names=["liver"], spacing=(1.0, 1.0, 1.0), planar=False
    )
    section = attention_section(Run(name="run", folder=tmp_path, scores=scores))
    assert section == "<p>No case has a DSC to be chosen by; the pictures are in the run&#x27;s folder attention.</p>"


def test_command_versions_and_hashes_are_there(page):
    text = "".join(page.text)
    assert "automedsam evaluate 'a & b/datalist.json'" in text
    for words in (
        "versions python3.12.1",
        "files checkpoint sha2560123abcd",
        "files datalist 1 pathd.json",
        "failednone",
    ):
        assert words in text


def test_uncertainty_and_quality_are_shown(page):
    assert page.row("0.25 to 0.5") == ["0.25 to 0.5", "8", "10.00"]
    assert page.row("0 to 0.25")[2] == MISSING
    assert page.row("0.5 to 1") == ["0.5 to 1", "7", "75.00"]
    # Bins from 0.5 and from 0.7 hold a pair each, of which the second is 0.25 too high.
    text = "2 cases and classes, expected calibration error 0.1250, mean absolute error 0.1250, predicted less true"
    assert f"{text} +0.1250" in "".join(page.text)


def test_foreign_bins_and_words_for_numbers_are_named(write_run, tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "uncertainty.json").write_text('{"bins": [{"low": 0}]}')
    with pytest.raises(InputError, match=r"uncertainty\.json"):
        write_report(read_runs([folder]), tmp_path / "report.html")
    (folder / "uncertainty.json").unlink()
    (folder / "quality.csv").write_text("case,class,dsc,predicted_by_head\na,liver,high,0.5\n")
    with pytest.raises(InputError, match=r"quality\.csv"):
        write_report(read_runs([folder]), tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_a_training_alone_has_a_report(tmp_path):
    add_training(tmp_path)
    page = Parsed(write_report(read_runs([tmp_path]), tmp_path / "r.html").read_text(encoding="utf-8"))
    text = "".join(page.text)
    assert "training, without scores" in text
    assert "There is no run.json" in text
    assert page.all("table") == []


def test_names_cannot_break_the_page(page):
    text = "".join(page.text)
    assert "with <diffusion>" in text
    assert page.all("diffusion") == []
    assert Parsed(table("<b>", ["<i>", "x"], [["<u>", "&"]])).rows == [["<i>", "x"], ["<u>", "&"]]


def test_records_become_pairs():
    record = {"a_b": {"c": 1, "d": {}}, "e": [1, 2], "f": [{"g": "h"}], "i": None, "j": "k", "l": True}
    assert flattened(record) == [
        ("a b c", "1"),
        ("a b d", "none"),
        ("e", "[1, 2]"),
        ("f 1 g", "h"),
        ("i", "none"),
        ("j", "k"),
        ("l", "true"),
    ]


def test_a_second_writing_gives_the_same_bytes(full):
    before = {path.name: path.read_bytes() for path in (full / "report_files").iterdir()}
    text = (full / "report.html").read_bytes()
    write_report(read_runs([full / "with <diffusion>", full / "without"]), full / "report.html")
    assert (full / "report.html").read_bytes() == text
    assert {path.name: path.read_bytes() for path in (full / "report_files").iterdir()} == before


def test_a_place_that_cannot_be_written_is_named(write_run, tmp_path):
    runs = read_runs([write_run(tmp_path / "run")])
    (tmp_path / "report_files").write_text("a file")
    with pytest.raises(OutputError, match="report_files"):
        write_report(runs, tmp_path / "report.html")


def test_the_command_makes_the_folder_and_says_where_the_page_is(write_run, tmp_path):
    folder = write_run(tmp_path / "run")
    page = tmp_path / "new" / "mine.html"
    assert report(str(folder), output=str(page)) == f"the report is {page}"
    assert TITLE in page.read_text(encoding="utf-8")
    assert (tmp_path / "new" / "mine_files" / "boxes_dsc.png").is_file()
    assert 'href="../run/metrics.csv"' in page.read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------------- in a browser


NARROW_TEXT = """[...document.querySelectorAll("body *")].filter(element => element.getClientRects().length)
    .map(element => [element, parseFloat(getComputedStyle(element).fontSize) * (element.closest("svg") ?
        element.closest("svg").getBoundingClientRect().width / element.closest("svg").getAttribute("width") : 1)])
    .filter(([element, size]) => element.textContent && size < 11).map(([element]) => element.textContent)"""
CLIPPED = """[...document.querySelectorAll(".wide, figure, pre, dd, body")]
    .filter(element => element.scrollWidth > element.clientWidth + 1).map(element => element.outerHTML)"""
UNLOADED = "[...document.images].filter(image => !image.naturalWidth).length"
OVERFLOWING_LABELS = """[...document.querySelectorAll("svg text")].filter(text => {
    const own = text.getBoundingClientRect(), chart = text.closest("svg").getBoundingClientRect();
    return own.left < chart.left - 1 || own.right > chart.right + 1 || own.bottom > chart.bottom + 1 })
    .map(text => text.textContent)"""


def test_a_browser_shows_the_page_without_complaint(full, open_page):
    page = open_page(full / "report.html")
    assert page.complaints == []
    assert page.evaluate(UNLOADED) == 0
    assert (page.picture[0, 0] == 255).all()  # light paper
    red = (page.picture == (200, 10, 10)).all(axis=2)  # the pictures put into the page
    assert red.sum() == 6 * 40 * 20
    assert (page.picture == (0, 114, 178)).all(axis=2).sum() > 500  # boxes of the first run


def test_a_browser_clips_nothing_and_keeps_text_legible(full, open_page):
    page = open_page(full / "report.html")
    assert page.evaluate(CLIPPED) == []
    assert page.evaluate(NARROW_TEXT) == []
    assert page.evaluate(OVERFLOWING_LABELS) == []


@pytest.mark.parametrize("source", ["missing.png", "https://a.example/b.png"])
def test_the_browser_would_complain_about_a_missing_asset(tmp_path, open_page, source):
    """Else silence would say nothing."""
    path = tmp_path / "page.html"
    path.write_text(f'<!DOCTYPE html><title>t</title><link rel="icon" href="data:,"><img src="{source}" alt="x">')
    page = open_page(path)
    assert page.evaluate(UNLOADED) == 1
    # A missing file is no line in the console of every version; a network that is asked for is.
    assert any("ERR_" in complaint for complaint in page.complaints) or not source.startswith("https")


def test_the_browser_would_complain_about_an_error(tmp_path, open_page):
    path = tmp_path / "page.html"
    path.write_text("<!DOCTYPE html><title>t</title><link rel=icon href='data:,'><script>nothing()</script>")
    assert any("ReferenceError" in complaint for complaint in open_page(path).complaints)
