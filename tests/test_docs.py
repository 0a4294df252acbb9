"""The documents say what is: the files, settings, defaults, commands and options that they name are there."""

import inspect
import json
import re
import shlex

import pytest
import yaml

from scripts import cli
from scripts.data.datalist import read_datalist
from scripts.data.vocabulary import Vocabulary

DOCUMENTS = (
    "README.md",
    "CHANGELOG.md",
    "docs/README.md",
    "docs/method.md",
    "docs/configuration.md",
    "docs/data.md",
    "docs/prompts.md",
    "docs/model.md",
    "docs/monai_label.md",
    "docs/deploy.md",
    "docs/evaluation.md",
    "docs/studies.md",
    "docs/data_license.txt",
)
MAIN_CONFIGS = ("train", "evaluate", "inference")
# Folders and files of the repository; what a run writes (runs/, out/, eval/) and a user's own data are none of them.
REPOSITORY_PATH = re.compile(
    r"(?<![\w./-])((?:configs|scripts|docs|tests|models)/[\w./-]*|[A-Za-z_-]+\.(?:md|cff|toml|yml)|requirements[\w-]*\.txt)"
)
NOT_IN_THE_REPOSITORY = ("models/model.ts", "models/medsam_vit_b.pth")
# Handed on by MONAI's command or by torchrun, not by a config.
OPTIONS_OF_OTHERS = {
    *("config_file", "standalone", "nnodes", "nproc_per_node", "meta_file", "filepath", "net_id", "help"),
    *("name", "url", "bundle_dir"),
}


def text_of(bundle_root, document):
    return (bundle_root / document).read_text(encoding="utf-8")


def config(bundle_root, name):
    return json.loads((bundle_root / "configs" / f"{name}.json").read_text(encoding="utf-8"))


def section(text, heading):
    """The part of a document under a heading of the second level."""
    found = re.search(rf"^## {re.escape(heading)}$(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    assert found, f"no section {heading}"
    return found.group(1)


def rows(text):
    """The rows of all tables in a text, each a list of its cells."""
    lines = [line for line in text.splitlines() if line.startswith("|") and not set(line) <= set("|-: ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def command_lines(text):
    """The commands of the fenced blocks, continued lines joined."""
    blocks = re.findall(r"^```\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if re.match(r"\S*(?:automedsam|python|torchrun) ", line)]


def override_keys(content):
    """The keys of a config that a user may set: neither imports nor remarks nor single entries of parts."""
    return [key for key in content if not key.startswith(("_", "+")) and key != "imports"]


@pytest.mark.parametrize("name", MAIN_CONFIGS)
def test_every_key_of_a_main_config_is_explained_in_its_order(bundle_root, name):
    text = section(text_of(bundle_root, "docs/configuration.md"), f"{name}.json")
    explained = [row[0].strip("`") for row in rows(text) if row[0].startswith("`")]
    assert explained == override_keys(config(bundle_root, name))


@pytest.mark.parametrize("name", MAIN_CONFIGS)
def test_stated_defaults_are_those_of_the_config(bundle_root, name):
    content = config(bundle_root, name)
    settings = [
        row for row in rows(section(text_of(bundle_root, "docs/configuration.md"), f"{name}.json")) if len(row) == 4
    ]
    assert settings
    for setting, default, *_ in settings[1:]:
        assert default.strip("`") == json.dumps(content[setting.strip("`")]), setting


def test_overlays_set_nothing_that_is_not_explained(bundle_root):
    text = text_of(bundle_root, "docs/configuration.md")
    explained = {row[0].strip("`") for row in rows(text)}
    for path in sorted((bundle_root / "configs").glob("multi_gpu_*.json")):
        keys = override_keys(json.loads(path.read_text(encoding="utf-8")))
        assert {key.split("#")[0] for key in keys} <= explained, path.name


def test_settings_of_hsp_sam_are_explained(bundle_root):
    """In its own section, or in that of train.json, whose setting it then is."""
    content = yaml.safe_load(text_of(bundle_root, "configs/networks/hsp_sam.yaml"))
    text = text_of(bundle_root, "docs/configuration.md")
    own = {row[0].strip("`"): row[1].strip("`") for row in rows(section(text, "HSP-SAM"))[1:]}
    for setting, value in own.items():
        assert str(content[setting]).lower() == value, setting
    known = {row[0].strip("`") for row in rows(section(text, "train.json"))}
    assert {key.split("#")[0] for key in content} <= known | set(own)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_named_is_there(bundle_root, document):
    folder = (bundle_root / document).parent
    for path in set(REPOSITORY_PATH.findall(text_of(bundle_root, document))):
        name = path.rstrip(".")
        beside = folder / name  # "method.md" within docs/
        assert (bundle_root / name).exists() or beside.exists() or name in NOT_IN_THE_REPOSITORY, name


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_leads_somewhere(bundle_root, document):
    here = bundle_root / document
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(bundle_root, document)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = here if not path else (here.parent / path).resolve()
        assert file.is_file(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, target


def test_names_beside_a_module_are_in_it(bundle_root):
    checked = 0
    for row in rows(text_of(bundle_root, "docs/method.md")):
        for cell in row:
            for path, names in re.findall(r"`(scripts/[\w/]+\.py)`((?: `\w+`)*)", cell):
                content = text_of(bundle_root, path)
                for name in re.findall(r"`(\w+)`", names):
                    assert re.search(rf"\b(?:def|class) {name}\b|self\.{name} =", content), f"{name} in {path}"
                    checked += 1
    assert checked > 20


def test_settings_that_change_a_reading_exist(bundle_root):
    contents = [config(bundle_root, name) for name in MAIN_CONFIGS]
    table = [row for row in rows(text_of(bundle_root, "docs/method.md")) if len(row) == 5]
    assert table[0][-1] == "changed by"
    for row in table[1:]:
        named = re.findall(r"`([^`]+)`", row[-1])
        assert named or row[-1] == "-", row[0]
        for name in named:
            is_file = "/" in name and (bundle_root / name).is_file()
            assert is_file or any(reaches(content, name) for content in contents), name


def reaches(content, name):
    """Whether a nested setting is in a config, or is an argument that its part takes by default."""
    *parents, last = name.split("#")
    for parent in parents:
        content = content.get(parent, {})
    target = content.get("_target_", "")
    return last in content or (bool(parents) and target.startswith("scripts.") and last in parameters_of(target))


def parameters_of(target):
    module, _, name = target.rpartition(".")
    return inspect.signature(getattr(__import__(module, fromlist=[name]), name)).parameters


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_of_the_bundle_exist_and_take_their_options(bundle_root, document):
    settings = {key for name in MAIN_CONFIGS for key in override_keys(config(bundle_root, name))}
    for line in command_lines(text_of(bundle_root, document)):
        words = shlex.split(line, comments=True)
        options = {word[2:].partition("=")[0] for word in words if word.startswith("--")}
        verb = verb_of(words)
        if verb is not None:
            known = set(inspect.signature(getattr(cli, verb)).parameters) | settings
            assert options <= known, line
        elif "monai.bundle" in words:
            assert {option.split("#")[0] for option in options} - OPTIONS_OF_OTHERS <= settings, line


def verb_of(words):
    """The verb of a call of the bundle's own command, however it is spelt."""
    if words and words[0].rpartition("/")[2] == "automedsam":
        return words[1]
    return words[3] if words[1:3] == ["-m", "scripts"] else None


@pytest.mark.parametrize("document", DOCUMENTS)
def test_make_has_the_targets_named(bundle_root, document):
    targets = re.findall(r"^([\w-]+):", text_of(bundle_root, "Makefile"), re.MULTILINE)
    text = text_of(bundle_root, document)
    named = re.findall(r"`make ([\w-]+)`", text) + re.findall(r"^make ([\w-]+)", text, re.MULTILINE)
    assert set(named) <= set(targets)


def test_the_first_screen_shows_both_commands(bundle_root):
    first_screen = "\n".join(text_of(bundle_root, "README.md").splitlines()[:24])
    assert "make demo" in first_screen
    assert "make test" in first_screen


def test_every_verb_of_the_command_is_in_the_documents(bundle_root):
    documents = "\n".join(text_of(bundle_root, document) for document in DOCUMENTS)
    own = [item for item in vars(cli).values() if inspect.isfunction(item) and item.__module__ == cli.__name__]
    for verb in {item.__name__ for item in own if not item.__name__.startswith("_")} - {"main"}:
        assert re.search(rf"\b(?:automedsam|scripts) {verb}\b", documents), verb


def test_examples_of_datalists_are_valid(bundle_root, tmp_path):
    vocabulary = Vocabulary.read(bundle_root / "configs" / "classes.yaml")
    examples = re.findall(r"^```json\n(.*?)^```", text_of(bundle_root, "docs/data.md"), re.DOTALL | re.MULTILINE)
    assert len(examples) == 3
    for number, example in enumerate(examples):
        content = json.loads(example)
        sections = [name for name, value in content.items() if isinstance(value, list)]
        assert {"training", "validation"} <= set(sections)
        folder = tmp_path / str(number)
        for name in re.findall(r'"((?:images|masks)/[^"]+)"', example):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
        (folder / "datalist.json").write_text(example, encoding="utf-8")
        cases = read_datalist(folder / "datalist.json", section=sections, vocabulary=vocabulary)
        assert all(case["annotated"] for case in cases)


def test_figures_of_the_evaluation_are_what_the_command_beside_them_prints(bundle_root, capsys):
    text = text_of(bundle_root, "docs/evaluation.md")
    command, printed = re.search(
        r"^python - <<'END'\n(.*?)^END$.*?^It prints\n\n```\n(.*?)^```", text, re.DOTALL | re.MULTILINE
    ).groups()
    exec(command, {})  # noqa: S102 - the document's own
    assert capsys.readouterr().out == printed
