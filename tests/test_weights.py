"""Published weights, fetched from a real server on this machine."""

import contextlib
import hashlib
import http.server
import re
import socket
import threading
from dataclasses import replace

import pytest
import yaml

from scripts import cli
from scripts.errors import CheckpointError, ConfigError, OutputError
from scripts.weights import Published, get, list_weights, perform_action, read_published, verify

CONTENT = bytes(range(256)) * 12_000  # 3 MB: several pieces
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Holds one file, and remembers what was asked of it."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.ranges = True  # whether it understands Range
        self.length = True  # whether it says how much will come
        self.cut = None  # bytes of an answer after which the line goes dead
        self.shift = 0  # how far a partial answer lies from what was asked for
        self.asked = []

    def url(self, name="weights.pth"):
        return f"http://127.0.0.1:{self.server_address[1]}/{name}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, wanted = self.server, self.headers.get("Range")
        server.asked.append(wanted)
        if self.path == "/moved.pth":
            self.send_response(302)
            self.send_header("Location", server.url())
            self.end_headers()
            return
        if self.path != "/weights.pth":
            self.send_error(404)
            return
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted).group(1)) if wanted and server.ranges else 0
        if start >= len(server.content):
            self.send_error(416)
            return
        start += server.shift if start else 0
        body = server.content[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}")
        if server.length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # who asked has seen enough
            self.wfile.write(body[: server.cut])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def row(server):
    return Published("mine", "weights.pth", server.url(), DIGEST, len(CONTENT), "Apache-2.0")


def fetch(row, folder):
    return get(row.name, {row.name: row}, folder, progress=False)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("size", [len(CONTENT), None])
def test_a_whole_file(tmp_path, server, row, size):
    text = fetch(replace(row, size=size), tmp_path)
    assert (tmp_path / "weights.pth").read_bytes() == CONTENT
    assert names(tmp_path) == ["weights.pth"]
    assert "SHA-256" in text
    assert "licence Apache-2.0" in text
    assert server.asked == [None]


def test_a_file_that_has_moved(tmp_path, server, row):
    fetch(replace(row, url=server.url("moved.pth")), tmp_path)
    assert (tmp_path / "weights.pth").read_bytes() == CONTENT


@pytest.mark.parametrize("size", [len(CONTENT), None])
def test_what_broke_off_goes_on_where_it_stopped(tmp_path, server, row, size):
    row, server.cut = replace(row, size=size), 1_500_000
    with pytest.raises(CheckpointError, match=r"the download broke off.* before all of 3072000 bytes had come"):
        fetch(row, tmp_path)
    assert names(tmp_path) == ["weights.pth.part"]
    assert (tmp_path / "weights.pth.part").read_bytes() == CONTENT[:1_500_000]
    server.cut = 500_000
    with pytest.raises(CheckpointError, match="broke off"):
        fetch(row, tmp_path)
    server.cut = None
    fetch(row, tmp_path)
    assert server.asked == [None, "bytes=1500000-", "bytes=2000000-"]
    assert names(tmp_path) == ["weights.pth"]
    assert (tmp_path / "weights.pth").read_bytes() == CONTENT


def test_a_server_that_knows_no_ranges_begins_anew(tmp_path, server, row):
    server.ranges = False
    (tmp_path / "weights.pth.part").write_bytes(b"x" * 1_000_000)
    fetch(row, tmp_path)
    assert server.asked == ["bytes=1000000-"]
    assert (tmp_path / "weights.pth").read_bytes() == CONTENT


def test_a_server_that_does_not_say_how_much_will_come(tmp_path, server, row):
    server.length, server.cut = False, 1_000_000
    with pytest.raises(CheckpointError, match="expected 3072000 bytes, got 1000000"):
        fetch(row, tmp_path)
    assert names(tmp_path) == []


def test_another_part_than_the_one_asked_for(tmp_path, server, row):
    server.shift = 5
    (tmp_path / "weights.pth.part").write_bytes(CONTENT[:1000])
    with pytest.raises(CheckpointError, match="expected the bytes from 1000 on, got bytes 1005-3071999/3072000"):
        fetch(row, tmp_path)
    assert (tmp_path / "weights.pth.part").read_bytes() == CONTENT[:1000]


@pytest.mark.parametrize("begun", [b"", b"x" * 1000])
def test_a_wrong_hash_leaves_nothing(tmp_path, server, row, begun):
    if begun:
        (tmp_path / "weights.pth.part").write_bytes(begun)
    else:
        server.content = CONTENT[:-1] + b"!"
    with pytest.raises(CheckpointError, match=f"expected the SHA-256 {DIGEST}, got .*; nothing was kept"):
        fetch(row, tmp_path)
    assert names(tmp_path) == []


def test_another_size_is_refused_before_anything_is_fetched(tmp_path, server, row):
    server.content = CONTENT[:-1]
    with pytest.raises(CheckpointError, match="expected 3072000 bytes, got 3071999"):
        fetch(row, tmp_path)
    assert names(tmp_path) == []


@pytest.mark.parametrize("size", [len(CONTENT), None])
def test_a_part_that_is_whole_is_only_compared(tmp_path, server, row, size):
    (tmp_path / "weights.pth.part").write_bytes(CONTENT)
    fetch(replace(row, size=size), tmp_path)
    assert server.asked == ([] if size else ["bytes=3072000-"])
    assert names(tmp_path) == ["weights.pth"]


def test_a_part_that_is_too_long_begins_anew(tmp_path, server, row):
    (tmp_path / "weights.pth.part").write_bytes(CONTENT + b"more")
    fetch(row, tmp_path)
    assert server.asked == [None]
    assert (tmp_path / "weights.pth").read_bytes() == CONTENT


def test_no_hash_is_said(tmp_path, row):
    assert "no hash of it is published" in fetch(replace(row, sha256=None), tmp_path)


def test_a_file_that_is_there_is_not_fetched_again(tmp_path, server, row):
    (tmp_path / "weights.pth").write_bytes(CONTENT)
    assert "already; its SHA-256 is the published one" in fetch(row, tmp_path)
    assert server.asked == []


def test_another_file_of_that_name_stays(tmp_path, server, row):
    (tmp_path / "weights.pth").write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"weights\.pth is there and is not mine: move it away"):
        fetch(row, tmp_path)
    assert (tmp_path / "weights.pth").read_bytes() == b"mine"
    assert server.asked == []


def test_no_such_file(tmp_path, server, row):
    with pytest.raises(CheckpointError, match="got the answer 404 Not Found; look at the owner's page"):
        fetch(replace(row, url=server.url("gone.pth")), tmp_path)
    assert names(tmp_path) == []


def test_no_server(tmp_path, row):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/weights.pth"
    with pytest.raises(
        CheckpointError, match=r"cannot be reached \(.*refused.*\): is there a network\? Fetch the file"
    ):
        fetch(replace(row, url=url), tmp_path)
    assert names(tmp_path) == []


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://127.0.0.1/weights.pth"])
def test_other_kinds_of_address(tmp_path, row, url):
    with pytest.raises(ConfigError, match="expected an address that begins with https://"):
        fetch(replace(row, url=url), tmp_path)


def test_a_folder_that_cannot_be_written_to(tmp_path, row):
    with pytest.raises(OutputError, match=r"weights\.pth\.part, but the system answered"):
        fetch(row, tmp_path / "gone")


def test_a_file_is_named_by_its_hash(tmp_path, row):
    (tmp_path / "renamed.bin").write_bytes(CONTENT)
    assert verify(tmp_path / "renamed.bin", {"mine": row}).endswith(
        f"renamed.bin is mine: weights.pth, Apache-2.0, from {row.url}"
    )


@pytest.mark.parametrize(("name", "hint"), [("weights.pth", "mine is called so"), ("other.pth", None)])
def test_a_file_that_is_none_of_them(tmp_path, row, name, hint):
    (tmp_path / name).write_bytes(b"other")
    found = hashlib.sha256(b"other").hexdigest()
    with pytest.raises(CheckpointError, match=f"is none of the published files: its SHA-256 is {found}") as caught:
        verify(tmp_path / name, {"mine": row, "unknown": replace(row, sha256=None)})
    assert (hint in str(caught.value)) if hint else str(caught.value).endswith(found)


def test_a_file_that_is_not_there(tmp_path, row):
    with pytest.raises(CheckpointError, match=r"gone\.pth cannot be read: No such file"):
        verify(tmp_path / "gone.pth", {"mine": row})


def test_the_list_says_what_is_there(tmp_path, row):
    rows = [replace(row, name=name, file=f"{name}.pth") for name in ("whole", "short", "begun", "gone")]
    rows.append(replace(row, name="unsized", file="unsized.pth", size=None))
    (tmp_path / "whole.pth").write_bytes(CONTENT)
    (tmp_path / "short.pth").write_bytes(b"123")
    (tmp_path / "begun.pth.part").write_bytes(CONTENT[:1_000_000])
    lines = list_weights({one.name: one for one in rows}, tmp_path).splitlines()
    assert lines[0].split() == ["name", "file", "size", "licence", "in", f"{tmp_path.name}/"]
    assert [re.split(r"\s{2,}", line) for line in lines[1:]] == [
        ["whole", "whole.pth", "3 MB", "Apache-2.0", "yes"],
        ["short", "short.pth", "3 MB", "Apache-2.0", "a file of 3 bytes in place of 3072000"],
        ["begun", "begun.pth", "3 MB", "Apache-2.0", "begun, 1 MB"],
        ["gone", "gone.pth", "3 MB", "Apache-2.0", "no"],
        ["unsized", "unsized.pth", "unknown", "Apache-2.0", "no"],
    ]


@pytest.mark.parametrize("content", ["", "[1]", "a: {file: b}", "a: [", "a: b"])
def test_a_list_that_is_none(tmp_path, content):
    (tmp_path / "weights.yaml").write_text(content)
    with pytest.raises(ConfigError, match="expected rows with file, url, sha256, bytes and licence"):
        read_published(tmp_path / "weights.yaml")


# ------------------------------------------------------------------------------------------------------ command line


def test_the_shipped_list_is_complete(bundle_root):
    rows = read_published(bundle_root / "configs" / "weights.yaml")
    assert {"sam_vit_b", "medsam_vit_b", "lite_medsam", "mobile_sam"} <= set(rows)
    for row in rows.values():
        assert row.sha256 is None or re.fullmatch("[0-9a-f]{64}", row.sha256)
        assert row.url.startswith("https://")
    assert len({row.file for row in rows.values()}) == len(rows)


def test_what_only_people_may_fetch(bundle_root, tmp_path):
    with pytest.raises(
        ConfigError, match=r"Open https://drive\.google\.com/\S+ in a browser, save the file as .*lite_m"
    ):
        get("lite_medsam", read_published(bundle_root / "configs" / "weights.yaml"), tmp_path)


def test_an_unknown_name(row, tmp_path):
    with pytest.raises(ConfigError, match="there are no published weights 'min', only mine; did you mean mine"):
        get("min", {"mine": row}, tmp_path)


@pytest.mark.parametrize("words", [("get", None), ("verify", None), ("list", "mine"), ("fetch", "mine")])
def test_the_words_of_the_verb(bundle_root, tmp_path, words):
    with pytest.raises(
        ConfigError, match="expected weights list, weights get NAME or weights verify FILE, got: weights"
    ):
        perform_action(*words, listed=bundle_root / "configs" / "weights.yaml", folder=tmp_path)


def test_the_verb(tmp_path, server, row, capsys, monkeypatch):
    configs, folder = tmp_path / "configs", tmp_path / "new" / "models"
    configs.mkdir()
    entry = {"file": row.file, "url": row.url, "sha256": row.sha256, "bytes": row.size, "licence": row.licence}
    (configs / "weights.yaml").write_text(yaml.safe_dump({"mine": entry}))
    monkeypatch.setattr(cli, "CONFIGS", configs)
    cli.main(["weights"])
    assert "mine  weights.pth  3 MB  Apache-2.0  no" in capsys.readouterr().out
    cli.main(["weights", "get", "mine", "--output", str(folder)])
    assert "mine is in" in capsys.readouterr().out
    assert (folder / "weights.pth").read_bytes() == CONTENT
    cli.main(["weights", "verify", str(folder / "weights.pth")])
    assert "is mine: weights.pth" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        cli.main(["weights", "verify", str(configs / "weights.yaml")])
    assert stop.value.code == 1
    assert "is none of the published files" in capsys.readouterr().err
