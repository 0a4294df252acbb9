"""Run the bundle's configs from Python, with overlays and settings."""

import copy
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.errors import ConfigError
from scripts.networks.model_card import CONFIG_SIGNS

BUNDLE_ROOT = Path(__file__).resolve().parents[1]
CONFIGS = BUNDLE_ROOT / "configs"
JSON_WORDS = {"true": True, "false": False, "null": None, "none": None}  # Fire knows only Python's spelling
NETWORK_OVERLAYS: dict[str, tuple[str, ...]] = {  # over the configs, by network
    "automedsam": (),
    "hsp_sam": ("networks/hsp_sam.yaml",),
    "unet": ("networks/unet.yaml",),
}


def run_configs(configs: Sequence[str | Path], overrides: dict[str, Any]) -> Any:
    """Initialise, run and finalise a workflow of the bundle.

    Raises:
        ConfigError: an override that names no setting.
    """
    from monai.bundle import ConfigWorkflow

    files = [str(CONFIGS / config) for config in configs]
    workflow = ConfigWorkflow(
        config_file=files,
        meta_file=str(CONFIGS / "metadata.json"),
        logging_file=False,
        workflow_type="train" if "train.json" in configs else "infer",
        bundle_root=str(BUNDLE_ROOT),
    )
    known = workflow.parser.get()
    for name in overrides:
        if name.split("#")[0].split("::")[0] not in known:
            near = difflib.get_close_matches(name, list(known), n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise ConfigError(f"there is no setting '{name}' in {', '.join(Path(file).name for file in files)}{hint}")
    # MONAI rewrites nested settings in place, and the caller goes on with his own.
    own = copy.deepcopy(overrides)
    workflow.parser.update({name: as_setting(value, known.get(name)) for name, value in own.items()})
    workflow.initialize()
    workflow.run()
    workflow.finalize()
    return workflow


def as_setting(value: Any, default: Any) -> Any:
    """Read a setting as a config would: `false` is no text, and where a list stands, one value is a list of one."""
    if isinstance(value, str) and value.lower() in JSON_WORDS and not _is_choice(value, default):
        return JSON_WORDS[value.lower()]
    if isinstance(value, str) and "#" in value and not value.startswith(CONFIG_SIGNS):
        # In a config # divides ids and @ refers to one; in a path they are letters.
        return "$" + repr(value).replace("#", r"\x23").replace("@", r"\x40")
    if isinstance(value, tuple):
        return list(value)
    return [value] if isinstance(default, list) and isinstance(value, int | float) else value


def _is_choice(value: str, default: Any) -> bool:
    """Say whether `none` is a choice of its own, as of `fusion`: where the default is a word and no expression."""
    return value.lower() == "none" and isinstance(default, str) and not default.startswith(CONFIG_SIGNS)


def find_overlays(config: str | Sequence[str]) -> list[Path]:
    """Find overlays by path, or by name within configs/.

    Raises:
        ConfigError: there is none of that name.
    """
    names = config.split(",") if isinstance(config, str) else config
    found = []
    for name in names:
        places = [Path(name).absolute(), CONFIGS / name, CONFIGS / f"{name}.yaml"]
        existing = [place for place in places if place.is_file()]
        if not existing:
            raise ConfigError(f"there is no overlay '{name}': give a path, or a name within {CONFIGS}")
        found.append(existing[0])
    return found
