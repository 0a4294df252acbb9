"""What the tests of the app share: phantoms to label, a bundle that may be written to, clients in process."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from monailabel.config import settings

APP = Path(__file__).resolve().parents[1]
BUNDLE = APP.parents[1]
sys.path[:0] = [str(APP), str(BUNDLE)]

from scripts.data.phantoms import write_phantoms  # noqa: E402
from scripts.packaging import package_model  # noqa: E402

CASES = 4


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `images/` and `labels/` of four phantoms of 64 x 64 x 14 voxels."""
    return write_phantoms(
        tmp_path_factory.mktemp("phantoms"), training=CASES, validation=0, test=0, size=64, slices=14
    ).parent


@pytest.fixture
def studies(phantoms: Path, tmp_path: Path) -> Path:
    """A datastore with the images and no label yet."""
    return Path(shutil.copytree(phantoms / "images", tmp_path / "studies"))


@pytest.fixture(scope="session")
def phantom_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle around the model of the phantoms; not to be written to."""
    folder = tmp_path_factory.mktemp("bundles") / "phantoms"
    package_model(BUNDLE / "tests" / "data_files" / "phantom_model.pt", folder)
    return folder


@pytest.fixture
def bundle(phantom_bundle: Path, tmp_path: Path) -> Path:
    """A copy of its configs and models, to train in."""
    for name in ("configs", "models"):
        shutil.copytree(phantom_bundle / name, tmp_path / "bundle" / name)
    return tmp_path / "bundle"


@pytest.fixture
def prompted_bundle(bundle: Path) -> Path:
    """The same, whose card says that the phantom model has learned boxes and points, so that it may be asked."""
    path = bundle / "models" / "model.json"
    card = json.loads(path.read_text())
    card["training"]["boxes_trained"] = True
    path.write_text(json.dumps(card))
    return bundle


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch, studies: Path) -> Iterator[Callable[[Path], Any]]:
    """Start the app in this process on a bundle, and give a client of it."""
    from fastapi.testclient import TestClient
    from monailabel.app import app
    from monailabel.interfaces.utils.app import clear_cache

    clients = []

    def start(bundle: Path) -> TestClient:
        monkeypatch.setattr(settings, "MONAI_LABEL_APP_DIR", str(APP))
        monkeypatch.setattr(settings, "MONAI_LABEL_STUDIES", str(studies))
        monkeypatch.setattr(settings, "MONAI_LABEL_APP_CONF", {"bundle": str(bundle)})
        monkeypatch.setattr(settings, "MONAI_LABEL_DATASTORE_AUTO_RELOAD", False)
        monkeypatch.setattr(settings, "MONAI_LABEL_AUTO_UPDATE_SCORING", False)
        clear_cache()
        client = TestClient(app, raise_server_exceptions=False)
        clients.append(client)
        return client.__enter__()

    yield start
    for client in clients:
        client.__exit__(None, None, None)
