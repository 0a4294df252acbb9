"""Put a bundle into the forms that it is downloaded in: a zip for `monai.bundle`, and a folder for Hugging Face."""

import json
import posixpath
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from scripts.errors import InputError
from scripts.files import atomic_folder, copy_files
from scripts.networks.checkpoints import read_state_dict, save_state_dict
from scripts.weights import sha256_of

# What a bundle is; its tests and benchmarks stay with the source code.
CONTENT = (
    *("LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "large_files.yml", "requirements*.txt"),
    *("pyproject.toml", "Makefile"),
    *("configs/**/*.json", "configs/**/*.yaml", "configs/*.conf", "docs/*.md", "docs/*.txt", "scripts/**/*.py"),
    *("models/model.pt", "models/model.json", "apps/**/*.py"),
)
REQUIRED = ("LICENSE", "configs/metadata.json", "configs/inference.json", "models/model.pt", "docs/README.md")
CHECKSUMS = "SHA256SUMS"  # as sha256sum writes and checks them
LARGE_FILES = "*.pt filter=lfs diff=lfs merge=lfs -text\n*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest date of a zip: the same content gives the same bytes
PERMISSIONS = 0o644 << 16  # of the files in the zip, where their type and mode stand
LINK = re.compile(r"(\]\()([^)#:\s]+\.(?:md|txt|json|yaml|py))(?=[)#])")


@dataclass(frozen=True)
class Published:
    """What was written.

    Attributes:
        archive: the zip, with its hash in a file beside it.
        hub: the folder for Hugging Face.
        sha256: of the archive.
    """

    archive: Path
    hub: Path
    sha256: str


def publish(bundle: str | Path, folder: str | Path) -> Published:
    """Write a bundle's zip and its Hugging Face folder; both appear when they are complete.

    The zip has the bundle in one folder, as `monai.bundle.download(url=...)` wants it; the other is a repository for
    the hub, whose README.md is the bundle's page with the hub's own head. Both hold the weights as model.pt and as
    model.safetensors, and SHA256SUMS of all files.

    Args:
        bundle: its folder.
        folder: new or empty.

    Raises:
        InputError: the folder is no bundle.
        CheckpointError: its weights cannot be read.
        OutputError: the folder holds something, or cannot be written.
    """
    bundle, folder = Path(bundle).resolve(), Path(folder).resolve()
    metadata = _metadata_of(bundle)
    name = bundle_name(metadata)
    with atomic_folder(folder) as temporary:
        content = temporary / "huggingface" / name
        copy_files(bundle, CONTENT, content)
        save_state_dict(read_state_dict(content / "models" / "model.pt"), content / "models" / "model.safetensors")
        _write_checksums(content)
        archive = temporary / f"{name}_v{metadata['version']}.zip"
        _write_zip(content, archive)
        sha256 = sha256_of(archive)
        _write(archive.with_name(f"{archive.name}.sha256"), f"{sha256}  {archive.name}\n")
        page = (content / "docs" / "README.md").read_text(encoding="utf-8")
        _write(content / "README.md", hub_page(page, metadata))
        _write(content / ".gitattributes", LARGE_FILES)
        _write_checksums(content)
    return Published(folder / archive.name, folder / "huggingface" / name, sha256)


def bundle_name(metadata: Mapping[str, Any]) -> str:
    """Give the name of a bundle's folder: lower case, without what a path cannot have."""
    return re.sub(r"[^a-z0-9]+", "_", str(metadata["name"]).lower()).strip("_")


def hub_page(page: str, metadata: Mapping[str, Any]) -> str:
    """Make the page that Hugging Face shows, with the head that it sorts models by.

    Args:
        page: docs/README.md, whose links start in docs/.
        metadata: of the bundle; `weights_license` is the weights' SPDX identifier, where they have one.
    """
    modalities = [word.strip() for word in re.split(r",| and ", str(metadata.get("modality", ""))) if word.strip()]
    licence = metadata.get("weights_license")
    head: dict[str, Any] = {"license": str(licence).lower()} if licence else {"license": "other"}
    if not licence:
        head |= {"license_name": "see-data-license", "license_link": "docs/data_license.txt"}
    head |= {
        "library_name": "monai",
        "pipeline_tag": "image-segmentation",
        "tags": ["monai", "medical", "segmentation", "automatic-prompting", *modalities],
    }
    text = yaml.safe_dump(head, sort_keys=False, allow_unicode=True)
    return f"---\n{text}---\n\n{LINK.sub(_from_the_root, page)}"


def _from_the_root(link: re.Match[str]) -> str:
    """Let a link that starts in docs/ start in the bundle's folder."""
    return link[1] + posixpath.normpath(posixpath.join("docs", link[2]))


def _metadata_of(bundle: Path) -> dict[str, Any]:
    """Read the metadata of what must be a whole bundle."""
    missing = [name for name in REQUIRED if not (bundle / name).is_file()]
    if missing:
        raise InputError(
            f"{bundle} is no whole bundle, {', '.join(missing)} is missing: give the folder of this software, or one "
            "that automedsam bundle has written"
        )
    metadata: dict[str, Any] = json.loads((bundle / "configs" / "metadata.json").read_text(encoding="utf-8"))
    return metadata


def _files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _write_checksums(folder: Path) -> None:
    """Write the hashes of all files of a folder, by their paths in it."""
    files = [path for path in _files_in(folder) if path.name != CHECKSUMS]
    lines = [f"{sha256_of(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    _write(folder / CHECKSUMS, "".join(lines))


def _write_zip(folder: Path, archive: Path) -> None:
    """Pack a folder under its own name, the same bytes for the same content."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for path in _files_in(folder):
            entry = zipfile.ZipInfo(path.relative_to(folder.parent).as_posix(), EPOCH)
            entry.external_attr = PERMISSIONS
            packed.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")
