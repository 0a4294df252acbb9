"""Configs are code, and so are files that are unpickled: what the bundle brings does no more than it needs to."""

import ast
import warnings

import pytest
import safety
import yaml
from monai.bundle import ConfigParser
from monai.bundle.workflows import _apply_logging_file, _reject_executable_logging_config

LOGGING = """[loggers]
keys=root
[handlers]
keys=console
[formatters]
keys=plain
[logger_root]
level=INFO
handlers=console
[handler_console]
class={handler}
formatter=plain
args={arguments}
[formatter_plain]
format=%(message)s
"""


def read(path):
    """Read a config as MONAI does, and take its warning of a key that stands twice as an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return ConfigParser.load_config_file(path)


@pytest.fixture(scope="session")
def configs(bundle_root):
    """All that is in configs/, as MONAI reads it."""
    folder = bundle_root / "configs"
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".yaml"))
    return {str(path.relative_to(folder)): read(path) for path in files}


def texts_of(content):
    """All texts of a config."""
    if isinstance(content, dict | list):
        for value in content.values() if isinstance(content, dict) else content:
            yield from texts_of(value)
    elif isinstance(content, str):
        yield content


def all_texts(configs):
    return [text for content in configs.values() for text in texts_of(content)]


def python_files(bundle_root):
    return sorted(path for room in ("scripts", "apps", "benchmarks") for path in (bundle_root / room).rglob("*.py"))


# ------------------------------------------------------------------------------------------------ what the bundle holds


def test_no_config_does_more_than_it_needs_to(configs):
    assert {"train.json", "metadata.json", "experiments/tables/table_2.yaml"} <= set(configs)
    problems = {name: safety.problems_of_config(content) for name, content in configs.items()}
    assert {name: found for name, found in problems.items() if found} == {}


def test_no_file_in_configs_is_of_a_kind_that_is_not_read_here(bundle_root):
    found = {path.suffix for path in (bundle_root / "configs").rglob("*") if path.is_file()}
    assert found == {".json", ".yaml", ".conf"}


def test_nothing_is_allowed_that_no_config_needs(configs):
    expressions = "\n".join(text for text in all_texts(configs) if text.startswith("$"))
    for name in (*safety.IMPORTS, *safety.MODULE_NAMES, *(text for _, text in safety.EXCEPTIONS)):
        assert name in expressions, name
    for name in safety.FUNCTIONS:
        assert f"{name}(" in expressions, name
    for name in safety.ATTRIBUTES:
        assert f".{name}" in expressions, name
    modules = {text.rpartition(".")[0] for text in all_texts(configs)}
    assert modules >= safety.FOREIGN_MODULES


def test_the_log_is_configured_as_monai_accepts_it(bundle_root):
    content = _reject_executable_logging_config(str(bundle_root / "configs" / "logging.conf"))
    assert "[handler_consoleHandler]" in content


def test_no_code_loads_what_can_run_code(bundle_root):
    files = python_files(bundle_root)
    assert len(files) > 50
    problems = {path.name: safety.problems_of_code(path.read_text(encoding="utf-8")) for path in files}
    assert {name: found for name, found in problems.items() if found} == {}


def test_weights_are_loaded_in_the_form_that_is_looked_for(bundle_root):
    """The search above finds the calls: it is not empty for want of any."""
    calls = [
        ast.unparse(node)
        for path in python_files(bundle_root)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    ]
    assert len(calls) >= 2
    assert all("weights_only=True" in call for call in calls)


def test_servers_are_for_this_machine_alone(bundle_root):
    files = [bundle_root / "README.md", bundle_root / "CHANGELOG.md", *(bundle_root / "docs").rglob("*.md")]
    files += sorted((bundle_root / "apps").rglob("*.md"))
    problems = {path.name: safety.problems_of_servers(path.read_text(encoding="utf-8")) for path in files}
    assert {name: found for name, found in problems.items() if found} == {}


def test_no_code_listens_to_other_machines(bundle_root):
    folders = [bundle_root / name for name in ("scripts", "apps", "configs", "benchmarks")]
    files = [
        path for folder in folders for path in folder.rglob("*") if path.suffix in (".py", ".json", ".yaml", ".sh")
    ]
    assert [path.name for path in files if "0.0.0.0" in path.read_text(encoding="utf-8")] == []  # noqa: S104


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').system('true')",
        "eval('1')",
        "exec('x = 1')",
        "compile('1', '', 'eval')",
        "open('/etc/passwd').read()",
        "getattr(@network, 'run')",
        "globals()",
        "().__class__.__base__.__subclasses__()",
        "@network.__class__",
        "@evaluator.run.__globals__['os']",
        "[c for c in ().__class__.__mro__]",
        "torch.os.system('true')",
        "torch.load('model.pt')",
        "torch.hub.load('a/b', 'c')",
        "torch.utils.cpp_extension.load('a', 'b')",
        "monai.bundle.run(config_file='other.json')",
        "monai.apps.download_url('https://example.org')",
        "sys.modules['os'].system('true')",
        "sys.path.insert(0, '/tmp')",
        "sys.exit(1)",
        "torch",
        "sys",
        "[torch][0].os.system('true')",
        "(lambda torch: torch.load)(@network)",
        "(lambda len: len.run())(@network)",
        "[sys for sys in @trained]",
        "f'{@network.__class__}'",
        "'{0.__class__}'.format(@network)",
        "@vocabulary.path.unlink()",
        "@settings[@network]",
        "@run(**@settings)",
        "@run(*@settings)",
        "(y := @network)",
        "{name: 1 for name in @trained}",
        "9 ** 9 ** 9",
        "' + __import__('os').system('true') + '@x",
        "lambda: (yield)",
        "import os",
        "import torch as t",
        "import sys; import os",
        "from os import system",
        " @network",
        "@network.run(",
        "logging.config.fileConfig('logging.conf')",
        "idist.spawn('nccl', @run)",
    ],
)
def test_an_expression_that_is_refused(expression):
    assert safety.problems_of_config({"setting": [f"${expression}"]})


@pytest.mark.parametrize(
    "config",
    [
        {"imports": ["$import os"]},
        {"imports": ["$import subprocess as torch"]},
        {"imports": ["$from torch import load"]},
        {"run": ["$import sys"]},
        {"run": ["$sys.path.insert(0, @bundle_root)"]},
        {"initialize": ["$sys.path.insert(0, @dataset_dir)"]},
        {"a": {"_target_": "os.system", "command": "true"}},
        {"a": {"_target_": "subprocess.run", "args": "true"}},
        {"a": {"_target_": "builtins.eval", "source": "1"}},
        {"a": {"_target_": "torch.load", "f": "model.pt"}},
        {"a": {"_target_": "torch.hub.load", "model": "a"}},
        {"a": {"_target_": "torch.os.system", "command": "true"}},
        {"a": {"_target_": "torch.utils.data.os.system", "command": "true"}},
        {"a": {"_target_": "torch.utils.data.random_split"}},
        {"a": {"_target_": "monai.bundle.run", "config_file": "a.json"}},
        {"a": {"_target_": "monai.apps.download_url", "url": "https://example.org"}},
        {"a": {"_target_": "monai.transforms.Path"}},
        {"a": {"_target_": "monai.transforms.NotThere"}},
        {"a": {"_target_": "Compose"}},
        {"a": {"_target_": "scripts.cli.infer", "source": "a"}},
        {"a": {"_target_": "scripts.demo.run_demo"}},
        {"a": {"_target_": "scripts.data.reading.os.system"}},
        {"a": {"_target_": "scripts.data.reading.NotThere"}},
        {"a": {"_target_": "scripts.data.vocabulary.Vocabulary.__init__"}},
        {"a": {"_target_": "scripts.data.reading.Path"}},
        {"a": {"_target_": "$@network.run"}},
        {"a": {"_target_": "@network"}},
        {"a": {"_target_": ["monai.transforms.Compose"]}},
        {"inferer_def#_target_": "os.system"},
        {"train::handlers::0::_target_": "os.system"},
        {"a": {"+_target_": "os.system"}},
        {"a": {"_target_": "monai.transforms.Compose", "_mode_": "debug"}},
        {"a": "%/tmp/other.json::a"},
        {"rows": [{"settings": {"amp": "$open('x')"}}]},
    ],
)
def test_a_config_that_is_refused(config):
    assert safety.problems_of_config(config)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: !!python/object/apply:os.system ['true']\n", yaml.constructor.ConstructorError),
        ("a: !!python/name:os.system\n", yaml.constructor.ConstructorError),
        ("a: 1\na: 2\n", UserWarning),
    ],
)
def test_a_file_that_is_refused(tmp_path, text, reason):
    """Neither objects nor a key that hides another get as far as to be looked through."""
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(reason):
        read(path)


@pytest.mark.parametrize(
    ("handler", "arguments"),
    [
        ("eval", "('1',)"),
        ("os.system", "('true',)"),
        ("StreamHandler().__class__", "(sys.stdout,)"),
        ("StreamHandler", "(__import__('os').system('true'),)"),
        ("StreamHandler", "(sys.stdin,)"),
        ("FileHandler", "(os.devnull,)"),
    ],
)
def test_a_log_that_is_refused(tmp_path, handler, arguments):
    path = tmp_path / "logging.conf"
    path.write_text(LOGGING.format(handler=handler, arguments=arguments))
    with pytest.raises(ValueError, match="refusing to apply logging config"):
        _apply_logging_file(str(path))


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=False)",
        "import torch\ntorch.load(path, weights_only=safe)",
        "import torch as t\nt.load(path)",
        "from torch import load\nload(path)",
        "from torch import load as read\nread(path, 'cpu')",
        "import torch\nread = torch.load\nread(path)",
        "import torch\nfunctools.partial(torch.load, weights_only=True)",
        "import torch\ntorch.jit.load(path)",
        "def f():\n    import pickle\n    pickle.loads(data)",
        "from pickle import load\nload(file)",
        "import pickle as p\np.Unpickler(file)",
        "import pickle\nreader = pickle\nreader.load(file)",
        "import _pickle",
        "import joblib\njoblib.load(path)",
        "from joblib import load",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import numpy as np\nnp.load(path, None, True)",
        "import numpy as np\nnp.load(path, **settings)",
        "import numpy\nread = numpy.load",
        "import yaml\nyaml.load(text)",
        "import yaml\nyaml.load(text, Loader=yaml.FullLoader)",
        "import yaml\nyaml.load(text, yaml.UnsafeLoader)",
        "import yaml\nyaml.unsafe_load(text)",
        "from yaml import full_load\nfull_load(text)",
        "eval('1')",
        "exec(text)",
        "compile(text, '', 'exec')",
        "import builtins\nbuiltins.eval(text)",
        "run = eval\nrun(text)",
    ],
)
def test_code_that_is_refused(source):
    assert safety.problems_of_code(source)


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(path, map_location='cpu', weights_only=True)",
        "import pickle\ntry:\n    pass\nexcept pickle.UnpicklingError:\n    pass",
        "import numpy as np\nnp.load(path, allow_pickle=False)",
        "import yaml\nyaml.safe_load(text)\nyaml.load(text, Loader=yaml.SafeLoader)",
        "import re\nre.compile(text)\nnetwork.eval()\nmodel.compile()",
    ],
)
def test_code_that_passes(source):
    assert safety.problems_of_code(source) == []


@pytest.mark.parametrize(
    "text",
    [
        "```\npython -m monailabel.main start_server --app app --studies images\n```",
        "```\nmonailabel start_server --app app --host 0.0.0.0\n```",
        "```\nmonailabel start_server \\\n    --app app --host=192.168.0.7\n```",
        "Then start it with `--host 0.0.0.0`.",
        "```bash\npython -m http.server\n```",
        "```\nmlflow ui --host ::\n```",
        "```\nHOST=0.0.0.0 serve\n```",
    ],
)
def test_a_server_that_is_refused(text):
    assert safety.problems_of_servers(text)


@pytest.mark.parametrize(
    "text",
    [
        "```\npython -m monailabel.main start_server \\\n    --app app --host 127.0.0.1 --port 8000\n```",
        "MONAI Label's start_server listens to all machines at 0.0.0.0 unless told otherwise.",
    ],
)
def test_a_server_that_passes(text):
    assert safety.problems_of_servers(text) == []
