"""What the tests of the report share: runs with few cases, written by the bundle's own functions."""

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from scripts.metrics.scores import ClassScore, score_case
from scripts.metrics.summaries import summarise_units
from scripts.report.tables import write_scores_csv, write_summary_json


def scored(case: str, *, shift: int, planar: bool = False, empty: bool = False) -> list[ClassScore]:
    """Score two blocks predicted some pixels too low, the second a slice too long; a case can lack the second class."""
    truth = np.zeros((2, 20, 24, 6), dtype=bool)
    truth[0, 4:12, 5:15, 1:5] = True
    truth[1, 12:18, 10:20, 2:4] = not empty
    predicted = np.roll(truth, shift, axis=1)
    predicted[1, ..., 4] = predicted[1, ..., 3]
    return score_case(
        predicted,
        truth,
        case=case,
        class_ids=[1, 2],
        class_names=["liver", "left kidney"],
        spacing=(1.0, 1.0, 2.0),
        planar=planar,
        patient=f"patient of {case[:-1]}",
        partners=[None, 1],
    )


@pytest.fixture(scope="session")
def write_run() -> Callable[..., Path]:
    """Write the folder of an evaluation of five cases, the fourth of which lacks the second class."""

    def write(folder: Path, *, shifts: Sequence[int] = (1, 3, 2, 0, 4), planar: bool = False) -> Path:
        scores = [
            score
            for index, shift in enumerate(shifts)
            for score in scored(f"case_{index // 2}{index % 2}", shift=shift, planar=planar, empty=index == 3)
        ]
        folder.mkdir(parents=True)
        write_scores_csv(scores, folder / "metrics.csv")
        write_summary_json(summarise_units(scores, protocol="all"), folder / "summary.json")
        record = {
            "command": "automedsam evaluate 'a & b/datalist.json'",
            "versions": {"python": "3.12.1"},
            "files": {"checkpoint": {"path": "model.pt", "sha256": "0123abcd"}, "datalist": [{"path": "d.json"}]},
            "failed": {},
        }
        (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
        return folder

    return write


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
OPTIONS = [
    "--headless",
    "--no-sandbox",  # which the superuser cannot have
    "--disable-gpu",
    "--hide-scrollbars",
    # Nothing but the page itself, and no name leads anywhere.
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
    "--host-resolver-rules=MAP * ~NOTFOUND",
]
SECONDS = 60
# A Chromium browser told to do so takes commands on file descriptor 3 and answers on 4.
STARTER = "import os, sys; [os.dup2(int(sys.argv[i]), i + 2) for i in (1, 2)]; os.execv(sys.argv[3], sys.argv[3:])"
COMPLAINTS = {
    "Runtime.exceptionThrown": lambda event: event["exceptionDetails"]["exception"]["description"],
    "Runtime.consoleAPICalled": lambda event: str(event["args"]),
    "Log.entryAdded": lambda event: event["entry"]["text"],
    "Network.loadingFailed": lambda event: event["errorText"],
}


def _is_idle(event: dict[str, Any], loader: str) -> bool:
    """Whether the page of this loader, and not an earlier one, has nothing more to load."""
    parameters = event.get("params", {})
    return (parameters.get("name"), parameters.get("loaderId")) == ("networkIdle", loader)


class Browser:
    """A headless Chromium browser without a network, by the DevTools protocol (chromedevtools.github.io)."""

    def __init__(self, executable: str, profile: Path) -> None:
        (commands, self.commands), (self.answers, answers) = os.pipe(), os.pipe()
        options = ["--remote-debugging-pipe", f"--user-data-dir={profile}"]
        self.process = subprocess.Popen(
            [sys.executable, "-c", STARTER, str(commands), str(answers), executable, *OPTIONS, *options],
            pass_fds=(commands, answers),
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self.unread, self.count = b"", 0
        self.events: list[dict[str, Any]] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")
        self.ask("Page.setLifecycleEventsEnabled", enabled=True)

    def ask(self, method: str, **parameters: Any) -> Any:
        """Send a command and wait for its result."""
        self.count += 1
        session = {"sessionId": self.session} if hasattr(self, "session") else {}
        message = {"id": self.count, "method": method, "params": parameters, **session}
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while (answer := self.read()).get("id") != self.count:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def read(self) -> dict[str, Any]:
        """Read the next message."""
        end = time.monotonic() + SECONDS
        while b"\0" not in self.unread:
            assert select.select([self.answers], [], [], max(0, end - time.monotonic()))[0], "the browser is silent"
            part = os.read(self.answers, 1 << 16)
            assert part, "the browser ended"
            self.unread += part
        message, _, self.unread = self.unread.partition(b"\0")
        return json.loads(message)

    def open(self, path: Path, width: int) -> None:
        """Load a page and wait until everything in it has come or failed to."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.events = []
        loader = self.ask("Page.navigate", url=path.as_uri())["loaderId"]
        while not any(_is_idle(event, loader) for event in self.events):
            self.events.append(self.read())

    def evaluate(self, expression: str) -> Any:
        """Give what an expression in the page's own language comes to."""
        result = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"]["value"]

    @property
    def complaints(self) -> list[str]:
        """What the console shows, and what could not be loaded."""
        self.evaluate("1")  # the events before it have come then
        events = [event for event in self.events if event["method"] in COMPLAINTS]
        return [COMPLAINTS[event["method"]](event["params"]) for event in events]

    @property
    def picture(self) -> np.ndarray:
        """The whole page as it is seen, `(height, width, 3)`."""
        data = self.ask("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        return np.asarray(Image.open(BytesIO(base64.b64decode(data))).convert("RGB"))

    def close(self) -> None:
        """End the browser."""
        self.ask("Browser.close")
        self.process.wait(SECONDS)


def find_browser() -> str:
    """Find the browser; where there is none CI fails, unless its system has no apt-get to install one, others skip."""
    for path in map(shutil.which, BROWSERS):
        if path is not None:
            return path
    message = f"no browser: none of {', '.join(BROWSERS)} is installed; apt-get install chromium"
    if os.environ.get("CI") == "true" and shutil.which("apt-get") is not None:
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="session")
def open_page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Browser]]:
    """Open a page in a headless browser that reaches no network."""
    browser = Browser(find_browser(), tmp_path_factory.mktemp("profile"))

    def open_in_browser(path: Path, *, width: int = 1200) -> Browser:
        browser.open(path, width)
        return browser

    yield open_in_browser
    browser.close()
