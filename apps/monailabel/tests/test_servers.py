"""The real server over HTTP, as a viewer meets it: our app, and MONAI Label's own for bundles."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import nibabel
import numpy as np
import pytest
from help import NAMES, assert_on_grid, infer, label_map, put_label, sha256, upload, values

from scripts.networks.automedsam import AutoMedSAM
from scripts.networks.checkpoints import load_weights
from scripts.networks.model_card import ModelCard

APP = Path(__file__).resolve().parents[1]
START = 120  # seconds, on a busy machine
REQUEST = 180
LOG = 10


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def start(studies, tmp_path):
    """Start a server as docs/monai_label.md does, and give a client of it."""
    started = []

    def run(app, *conf, **environment):
        port = free_port()
        command = [
            sys.executable,
            "-m",
            "monailabel.main",
            "start_server",
            "--app",
            str(app),
            "--studies",
            str(studies),
        ]
        command += ["--host", "127.0.0.1", "--port", str(port), *conf]
        log = tmp_path / "server.log"
        with log.open("w") as stream:
            process = subprocess.Popen(
                command,
                cwd=tmp_path,
                stdout=stream,
                stderr=stream,
                env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},
            )
        client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=REQUEST)
        started.append((process, client))
        until = time.monotonic() + START
        while time.monotonic() < until:
            assert process.poll() is None, log.read_text()[-3000:]
            try:
                client.get("/info/").raise_for_status()
            except httpx.HTTPError:
                time.sleep(0.5)
            else:
                return client
        raise AssertionError(f"no server after {START} s: {log.read_text()[-3000:]}")

    yield run
    for process, client in started:
        client.close()
        process.terminate()
        process.wait(30)


def scored(client):
    """Wait until the scoring that the server begins by itself is done."""
    until = time.monotonic() + REQUEST
    while time.monotonic() < until:
        tasks = client.get("/scoring/", params={"all": True})
        states = [task["status"] for task in tasks.json()] if tasks.status_code == 200 else []
        if states and not {"SUBMITTED", "RUNNING"} & set(states):
            return states
        time.sleep(0.5)
    raise AssertionError("the scoring does not end")


def logged(log, sentence):
    """Say whether a sentence comes into a log; the answer leaves before it is written."""
    until = time.monotonic() + LOG
    while sentence not in log.read_text() and time.monotonic() < until:
        time.sleep(0.1)
    return sentence in log.read_text()


def test_our_app(start, bundle, phantoms, studies):
    client = start(APP, "--conf", "bundle", str(bundle))
    assert client.get("/info/").json()["labels"] == list(NAMES.values())
    found = label_map(infer(client, "phantom_000"))
    assert_on_grid(found, studies / "phantom_000.nii.gz")
    assert set(np.unique(values(found))) == {0, *NAMES}
    refused = infer(client, "phantom_000", classes="gallbladder")
    assert refused.status_code == 400
    assert "Class 'gallbladder' is unknown" in refused.json()["detail"]
    assert client.post("/infer/automedsam", data={"params": "{}"}).status_code == 400
    assert scored(client) == ["DONE"]
    first = client.post("/activelearning/uncertainty", json={})
    assert first.status_code == 200, first.text
    assert first.json()["id"].startswith("phantom_")
    assert 0 < first.json()["uncertainty"] < 1


@pytest.fixture
def stock(phantom_bundle, tmp_path):
    """MONAI Label's app for bundles with the phantoms' bundle in it."""
    app = Path(shutil.copytree(Path(sys.prefix) / "monailabel" / "sample-apps" / "monaibundle", tmp_path / "stock"))
    for name in ("configs", "models", "scripts"):
        shutil.copytree(phantom_bundle / name, app / "model" / "automedsam" / name)
    return app


def test_the_stock_app(start, stock, phantoms, studies, tmp_path):
    bundle = stock / "model" / "automedsam"
    client = start(stock, "--conf", "models", "automedsam", "--conf", "zoo_source", "local", "--conf", "sam2", "false")
    model = client.get("/info/").json()["models"]["automedsam"]
    assert model["type"] == "segmentation"
    assert model["labels"] == {name: class_id for class_id, name in NAMES.items()}
    assert model["config"]["modality"] == "CT"

    found = label_map(infer(client, "phantom_000"))
    assert_on_grid(found, studies / "phantom_000.nii.gz")
    assert set(np.unique(values(found))) == {0, *NAMES}
    alone = label_map(infer(client, "phantom_000", classes="spleen"))
    assert set(np.unique(values(alone))) == {0, 2}
    assert set(np.unique(values(label_map(infer(client, "phantom_000", label_prompt=[1, 4]))))) == {0, 1, 4}
    uploaded = label_map(upload(client, studies / "phantom_000.nii.gz"))
    np.testing.assert_array_equal(values(uploaded), values(found))
    assert not list(bundle.glob("runs")), "MONAI Label writes the files, and the bundle none beside"

    # What it answers to a wrong request is its own: no sentence, and 500 for everything.
    refused = infer(client, "phantom_000", classes="gallbladder")
    assert (refused.status_code, refused.text) == (500, "Internal Server Error")
    assert logged(tmp_path / "server.log", "PromptError: Class 'gallbladder' is unknown")

    before = sha256(bundle / "models" / "model.pt")
    for number in (0, 1):
        put_label(client, f"phantom_00{number}", phantoms / "labels" / f"phantom_00{number}.nii.gz")
    settings = {"device": "cpu", "max_epochs": 1, "multi_gpu": False, "val_split": 0.5}
    answer = client.post("/train/automedsam?run_sync=true", json=settings)
    assert (answer.status_code, answer.json()) == (200, {})
    assert sha256(bundle / "models" / "model.pt") == before
    trained = bundle / "runs" / "train" / "model.pt"
    card = ModelCard.beside(trained)
    assert card.training["datalist"] == "studies"
    load_weights(AutoMedSAM(**card.network), trained)

    request = {"device": "cpu", "multi_gpu": False, "max_workers": 1}
    answer = client.post("/batch/infer/automedsam?images=unlabeled&run_sync=true", json=request)
    assert sorted(answer.json()) == ["phantom_002", "phantom_003"]
    assert_on_grid(nibabel.load(studies / "labels" / "original" / "phantom_003.nii.gz"), studies / "phantom_003.nii.gz")
