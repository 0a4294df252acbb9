"""What configs, code and documents may do, found by reading them: nothing is run to be refused.

MONAI evaluates each text of a config that begins with `$`, and builds whatever a `_target_` names, so that a config is
code. What the bundle's own configs need is little, and this allows that and no more.
"""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from typing import Any

from monai.bundle import ReferenceResolver

REFERENCES = "__local_refs"  # what MONAI puts in the place of @ before it evaluates

# An import is allowed in this very form, and among the `imports` of a config alone.
IMPORTS = {
    "import sys": "for the folder of the bundle in sys.path, see EXCEPTIONS",
    "import torch": "for the device, types and the processes of torchrun, see MODULE_NAMES",
    "import monai": "for the seed",
    "import logging": "so that one of several processes speaks",
    "import ignite.distributed as idist": "for the number of this process",
}
MODULES = tuple(statement.split()[-1] for statement in IMPORTS)  # the names that they bind

# Whole expressions that are allowed at one place, in spite of all below.
EXCEPTIONS = {
    ("initialize", "sys.path.insert(0, @bundle_root)"): "the classes of scripts/ are found from any folder; MONAI "
    "itself puts the folder there later, when it runs",
}

# What may be taken of a module, by its full name.
MODULE_NAMES = {
    "idist.finalize",
    "idist.get_rank",
    "idist.get_world_size",
    "idist.sync",
    "logging.NOTSET",
    "logging.WARNING",
    "logging.disable",
    "monai.utils.set_determinism",
    "torch.cuda.is_available",
    "torch.cuda.set_device",
    "torch.device",
    "torch.distributed.get_node_local_rank",
    "torch.distributed.get_rank",
    "torch.distributed.init_process_group",
    "torch.distributed.is_initialized",
    "torch.float16",
}
FUNCTIONS = {"bool", "iter", "len", "list", "next"}
# What may be taken of an object that the config has built, or that a lambda is given.
ATTRIBUTES = {
    "announce",
    "eval",  # of a network: evaluation mode
    "fill",
    "grid_size",
    "image_size",
    "sam_parts",
    "metrics",
    "parameters",
    "raise_failures",
    "requires_grad",
    "run",
    "settings",
    "state",
    "to",
    "type",
    "write",
}
PLAIN_NODES = (
    *(ast.Expression, ast.Constant, ast.Tuple, ast.List, ast.BoolOp, ast.BinOp, ast.UnaryOp, ast.Compare, ast.IfExp),
    *(ast.ListComp, ast.comprehension, ast.Lambda, ast.arguments, ast.expr_context),
    *(ast.boolop, ast.cmpop, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Not, ast.USub),
)

# Classes of other packages, from these modules; of our own rooms functions too.
FOREIGN_MODULES = {
    "ignite.handlers",
    "monai.data",
    "monai.engines",
    "monai.handlers",
    "monai.inferers",
    "monai.transforms",
    "torch.nn.parallel",
    "torch.optim",
    "torch.optim.lr_scheduler",
    "torch.utils.data",
}
OWN_ROOMS = ("scripts.data.", "scripts.engines.", "scripts.losses.", "scripts.metrics.", "scripts.networks.")
BUILDING_MODES = ("default", "callable")  # the third, debug, opens Python's debugger
DOTTED_NAME = re.compile(r"[A-Za-z]\w*(\.[A-Za-z]\w*)+")


# ------------------------------------------------------------------------------------------------------------- configs


def problems_of_config(content: Any) -> list[str]:
    """Say what in a config, as read from its file, is not allowed."""
    return [f"{' > '.join(place)}: {problem}" for place, problem in _problems(content, ())]


def _problems(value: Any, place: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    own = _problems_of_value(value, place) if place else []
    yield from ((place, problem) for problem in own)
    if isinstance(value, dict):
        for key, below in value.items():
            yield from _problems(below, (*place, str(key)))
    elif isinstance(value, list):
        for number, below in enumerate(value):
            yield from _problems(below, (*place, str(number)))


def _problems_of_value(value: Any, place: tuple[str, ...]) -> list[str]:
    key = re.split("#|::", place[-1])[-1].lstrip("+")
    if key == "_target_":
        return problems_of_target(value)
    if key == "_mode_":
        return [] if value in BUILDING_MODES else [f"the mode {value!r} is none of {', '.join(BUILDING_MODES)}"]
    if not isinstance(value, str):
        return []
    if value.startswith("%"):
        return [f"the macro {value!r} may bring in another file"]
    return problems_of_expression(value[1:], setting=place[0].lstrip("+")) if value.startswith("$") else []


def problems_of_target(target: Any) -> list[str]:
    """Say why something may not be built."""
    if not isinstance(target, str) or not DOTTED_NAME.fullmatch(target):
        return [f"the target {target!r} is not the plain name of a class or function"]
    module = target.rpartition(".")[0]
    if module not in FOREIGN_MODULES and not target.startswith(OWN_ROOMS):
        return [f"the target {target} is of none of {', '.join(sorted(FOREIGN_MODULES))}, {', '.join(OWN_ROOMS)}"]
    found = _find(target)
    if found is None:
        return [f"the target {target} does not exist"]
    package = target.partition(".")[0]
    if getattr(found, "__module__", "").partition(".")[0] != package:
        return [f"the target {target} is not defined in {package}"]
    allowed = callable(found) if package == "scripts" else inspect.isclass(found)
    return [] if allowed else [f"the target {target} is not a class"]


def _find(target: str) -> Any:
    """Import what a name stands for: an attribute of a module, or of a class in a module."""
    names = target.split(".")
    for count in range(len(names) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(names[:count]))
        except ModuleNotFoundError:
            continue
        for name in names[count:]:
            found = getattr(found, name, None)
        return found
    return None


# --------------------------------------------------------------------------------------------------------- expressions


class _EveryId(dict):
    """References of any name, for MONAI's own substitution."""

    def __contains__(self, key: object) -> bool:
        return True


def problems_of_expression(text: str, *, setting: str = "") -> list[str]:
    """Say what in an expression is not allowed.

    Args:
        text: what stands behind the `$`.
        setting: the setting of the config that it is in.
    """
    if (setting, text) in EXCEPTIONS or (setting == "imports" and text in IMPORTS):
        return []
    # What is read is what MONAI evaluates: references in texts, too, become code.
    evaluated = ReferenceResolver.update_refs_pattern(f"${text}", _EveryId())[1:]
    try:
        tree = ast.parse(evaluated, mode="eval")
    except (SyntaxError, ValueError):
        return [f"{text!r} is not an expression that is allowed"]
    reading = _Reading(tree)
    reading.visit(tree)
    return reading.problems


class _Reading(ast.NodeVisitor):
    """Look through an expression; what is not known to be harmless is a problem."""

    def __init__(self, tree: ast.AST) -> None:
        self.problems: list[str] = []
        stored = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        self.bound = stored | {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
        if self.bound & {*MODULES, *FUNCTIONS, REFERENCES}:
            self.problems.append(f"{', '.join(sorted(self.bound))} would hide another name")

    def generic_visit(self, node: ast.AST) -> None:
        """Pass what is plain, with all in it."""
        if not isinstance(node, PLAIN_NODES):
            self.problems.append(f"{type(node).__name__} is not allowed: {ast.unparse(node)}")
        super().generic_visit(node)

    def visit_arg(self, node: ast.arg) -> None:
        """Arguments of a lambda are bound names."""

    def visit_Name(self, node: ast.Name) -> None:
        """A name is bound by the expression itself, or one of the few functions."""
        if node.id not in self.bound | FUNCTIONS:
            self.problems.append(f"the name {node.id} is not allowed by itself")

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """Of a module the whole name counts, of an object the attribute."""
        name = ast.unparse(node)
        if isinstance(_root(node), ast.Name) and name.partition(".")[0] in MODULES:
            if name not in MODULE_NAMES:
                self.problems.append(f"{name} is not allowed")
            return
        if node.attr not in ATTRIBUTES:
            self.problems.append(f"the attribute {node.attr} is not allowed: {name}")
        self.visit(node.value)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        """References, and parts that are named."""
        if not isinstance(node.slice, ast.Constant):
            self.problems.append(f"the part must be written out: {ast.unparse(node)}")
        if not (isinstance(node.value, ast.Name) and node.value.id == REFERENCES):
            self.visit(node.value)

    def visit_Call(self, node: ast.Call) -> None:
        """What is called, and its arguments, all of them written out."""
        self.visit(node.func)
        for argument in node.args:
            self.visit(argument)
        for keyword in node.keywords:
            if keyword.arg is None:
                self.problems.append(f"arguments must be written out: {ast.unparse(node)}")
            self.visit(keyword.value)


def _root(node: ast.expr) -> ast.expr:
    """What a chain of attributes begins with."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node


# ---------------------------------------------------------------------------------------------------------------- code

# Modules that exist to make objects of bytes, and functions of others that do.
UNSAFE_MODULES = {"_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
UNSAFE_NAMES = {
    *("yaml.unsafe_load", "yaml.unsafe_load_all", "yaml.full_load", "yaml.full_load_all", "yaml.load_all"),
    *("yaml.Loader", "yaml.FullLoader", "yaml.UnsafeLoader", "torch.jit.load", "torch.hub.load", "pandas.read_pickle"),
}
BUILTINS = {"eval", "exec", "compile"}
PICKLE_ERRORS = {"pickle.UnpicklingError", "pickle.PicklingError", "pickle.PickleError"}  # to be caught
SAFE_LOADERS = {"yaml.SafeLoader", "yaml.CSafeLoader"}


def problems_of_code(source: str) -> list[str]:
    """Say where Python code would load something that can run code, or evaluates text."""
    tree = ast.parse(source)
    names = _imported(tree)
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    within = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    problems = [f"line {line}: {module} is imported" for module, line in _unsafe_imports(tree)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and id(node) not in within:
            reason = _unsafe_use(_full_name(node, names), calls.get(id(node)), names)
            problems += [f"line {node.lineno}: {reason}"] if reason else []
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle" and not _is_literally(node.value, False):
            problems.append(f"line {node.value.lineno}: allow_pickle is not False")
    return problems


def _imported(tree: ast.AST) -> dict[str, str]:
    """The full names behind the names that a module imports, wherever in it."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _unsafe_imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            yield from ((module, node.lineno) for module in modules if module.partition(".")[0] in UNSAFE_MODULES)


def _full_name(node: ast.expr, names: dict[str, str]) -> str:
    """The name of an attribute by its module; empty where the chain begins with something else."""
    root = _root(node)
    if not isinstance(root, ast.Name):
        return ""
    rest = ast.unparse(node)[len(root.id) :]
    return names.get(root.id, root.id) + rest


def _unsafe_use(name: str, call: ast.Call | None, names: dict[str, str]) -> str | None:
    """Say why a name may not be used so; `call` is the call of it, if it is called."""
    if name.removeprefix("builtins.") in BUILTINS or name in UNSAFE_NAMES:
        return f"{name} is used"
    if name.partition(".")[0] == "pickle" and name not in PICKLE_ERRORS:
        return f"{name} is used"
    keywords = {} if call is None else {keyword.arg: keyword.value for keyword in call.keywords}
    if name == "torch.load" and not _is_literally(keywords.get("weights_only"), True):
        return "torch.load without weights_only=True"
    if name == "yaml.load" and _full_name(keywords.get("Loader", ast.Constant(0)), names) not in SAFE_LOADERS:
        return "yaml.load without a safe loader"
    if name in ("numpy.load", "np.load") and (call is None or len(call.args) > 1 or None in keywords):
        return "numpy.load whose arguments are not written out"
    return None


def _is_literally(node: ast.expr | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


# ----------------------------------------------------------------------------------------------------------- documents

HERE = ("127.0.0.1", "localhost")
SERVERS = re.compile(r"\b(start_server|http\.server|uvicorn|gunicorn)\b")


def problems_of_servers(text: str) -> list[str]:
    """Say which commands of a document would let other machines in: MONAI Label does unless told otherwise."""
    joined = text.replace("\\\n", " ")
    hosts = re.findall(r"--(?:host|bind)[ =]+[\"']?([\w.:*\[\]-]+)", joined)
    problems = [f"a server for {host}" for host in hosts if host not in HERE]
    for block in re.findall(r"^```[^\n]*\n(.*?)^```", joined, re.DOTALL | re.MULTILINE):
        for line in block.splitlines():
            if "0.0.0.0" in line:  # noqa: S104 - looked for, not listened to
                problems.append(f"an open address: {line.strip()}")
            if SERVERS.search(line) and not re.search(r"--(host|bind)[ =]", line):
                problems.append(f"a server without --host 127.0.0.1: {line.strip()}")
    return problems
