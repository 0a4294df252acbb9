"""Run `automedsam` and write where its time goes: `python -X importtime stages.py REPORT START VERB ...`.

REPORT gets the seconds of each stage, START is the monotonic clock's time at which the process was asked for. What the
imports cost is in what Python itself reports on the error stream. The stages are timed around the bundle's own
functions, so that what is measured is the command as it is.
"""

import functools
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Stage -> function whose calls belong to it. They do not call each other.
STAGES = {
    "building the network": "scripts.networks.automedsam:AutoMedSAM.__init__",
    "loading the weights": "scripts.engines.handlers:LoadWeights.__call__",
    "reading the image": "scripts.data.reading:LoadImageCased.__call__",
    "encoding the slice": "scripts.networks.automedsam:AutoMedSAM.encode_image",
    "class prompts": "scripts.networks.automedsam:AutoMedSAM.encode_classes",
    "masks": "scripts.networks.automedsam:AutoMedSAM.decode",
    "overlay picture": "scripts.engines.postprocessing:SaveImageOverlayd.__call__",
    "writing": "scripts.engines.postprocessing:SaveImageSegmentationd.__call__",
}


def main() -> None:
    """Time the stages of a command."""
    report, start, words = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
    started = time.monotonic()
    from scripts.cli import main as command

    seconds: dict[str, float] = defaultdict(float)
    for stage, place in STAGES.items():
        _time_calls(place, stage, seconds)
    command(words)
    seconds["starting Python"] = started - start
    seconds["total"] = time.monotonic() - start
    report.write_text(json.dumps(seconds), encoding="utf-8")


def _time_calls(place: str, stage: str, seconds: dict[str, float]) -> None:
    """Add the time of a method's calls to a stage."""
    module_name, _, path = place.partition(":")
    class_name, _, method = path.partition(".")
    owner = getattr(__import__(module_name, fromlist=[class_name]), class_name)
    setattr(owner, method, timed(getattr(owner, method), stage, seconds))


def timed(function: Callable[..., Any], stage: str, seconds: dict[str, float]) -> Callable[..., Any]:
    """Wrap a function, so that the time of its calls is added to a stage."""

    @functools.wraps(function)
    def clocked(*arguments: Any, **settings: Any) -> Any:
        begun = time.monotonic()
        try:
            return function(*arguments, **settings)
        finally:
            seconds[stage] += time.monotonic() - begun

    return clocked


if __name__ == "__main__":
    main()
