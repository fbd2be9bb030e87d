"""Weights at addresses: from a server in this process that can answer ranges, break off, and change its file."""

import hashlib
import logging
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from nnssl.cli.info import main as info
from nnssl.errors import UserError
from nnssl.log import lines_to
from nnssl.paths import Folders, resolve_folders
from nnssl.weights import download as module
from nnssl.weights.download import FOLDER, is_address, local_weights, parse_address
from nnssl.weights.export import export
from nnssl.weights.export_settings import ExportSettings
from tests.nnssl.weights.tiny_networks import unet, write_trained
from trainers.benchmark.arms import parse_arms
from trainers.finetuning.pretrained_weights import find_weights

BODY = bytes(range(256)) * 4001
SUM = hashlib.sha256(BODY).hexdigest()


class Server(ThreadingHTTPServer):
    """A server of one file. ``answers`` holds, for each request in turn, how it fails; afterwards all succeed."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.body, self.tag, self.ranges, self.length = BODY, '"one"', True, True
        self.answers: list = []
        self.asked: list = []
        """Path and range of every request."""

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}/folder/weights.pth"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args):
        pass

    def do_GET(self):
        server, wanted = self.server, self.headers.get("Range")
        server.asked.append((self.path, wanted))
        failure = server.answers.pop(0) if server.answers else None
        if isinstance(failure, int):
            self.send_error(failure)
            return
        if isinstance(failure, str):
            self.send_response(302)
            self.send_header("Location", failure)
            self.end_headers()
            return
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        partial = wanted is not None and server.ranges and self.headers.get("If-Range") == server.tag
        if not partial:
            start = 0
        self.send_response(206 if partial else 200)
        if partial:
            self.send_header("Content-Range", f"bytes {start}-{len(server.body) - 1}/{len(server.body)}")
        if server.tag:
            self.send_header("ETag", server.tag)
        if server.length:
            self.send_header("Content-Length", str(len(server.body) - start))
        self.end_headers()
        rest = server.body[start:]
        self.wfile.write(rest[: len(rest) // 3] if failure == ("cut",) else rest)


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def folders(tmp_path):
    (tmp_path / "results").mkdir()
    return Folders(*(tmp_path / name for name in ("raw", "preprocessed", "results")))


def fetch(address, folders):
    said: list[str] = []
    with lines_to(said.append):
        path = local_weights(address, folders)
    return path, "\n".join(said)


def refusal(address, folders):
    with pytest.raises(UserError) as caught, lines_to(lambda line: None):
        local_weights(address, folders)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(address)
    return message


def test_a_file_is_downloaded_once(server, folders):
    path, said = fetch(server.address, folders)
    assert path.read_bytes() == BODY
    assert path.name == "weights.pth"
    assert path.is_relative_to(folders.results / FOLDER)
    assert f"append #sha256={SUM}" in said
    assert "1.0 of 1.0 MB" in said
    again, said = fetch(f"{server.address}#sha256={SUM.upper()}", folders)
    assert again == path
    assert "downloaded already" in said
    assert len(server.asked) == 1
    other, _ = fetch(server.address.replace("folder", "other"), folders)
    assert other != path
    assert sorted(each.name for each in path.parent.iterdir() if each.suffix != ".lock") == [
        "weights.pth", "weights.pth.json",
    ]  # fmt: skip


def test_a_wrong_checksum(server, folders):
    wrong = "0" * 64
    assert f"another checksum, {SUM}" in refusal(f"{server.address}#sha256={wrong}", folders)
    assert "delete" in refusal(f"{server.address}#sha256={wrong}", folders)
    assert len(server.asked) == 1
    assert fetch(f"{server.address}#sha256={SUM}", folders)[0].read_bytes() == BODY


def test_an_interrupted_download_continues(server, folders):
    server.answers = [("cut",)]
    path, said = fetch(server.address, folders)
    assert path.read_bytes() == BODY
    assert "Connection lost" in said
    assert server.asked[1][1] == f"bytes={len(BODY) // 3}-"


def test_a_later_command_continues(server, folders):
    server.answers = [("cut",)] * 3
    message = refusal(server.address, folders)
    assert "bytes are kept and the same command continues" in message
    assert "download it first and give the path" in message
    assert not list(folders.results.rglob("weights.pth"))
    path, _ = fetch(server.address, folders)
    assert path.read_bytes() == BODY
    assert int(server.asked[3][1].removeprefix("bytes=").removesuffix("-")) > len(BODY) // 2


@pytest.mark.parametrize("change", ["file", "no ranges", "no tag", "no length"])
def test_what_cannot_be_continued_is_received_again(server, folders, change):
    server.answers = [("cut",)] * 3
    server.tag = None if change == "no tag" else server.tag
    refusal(server.address, folders)
    if change == "file":
        server.body, server.tag = BODY[::-1], '"two"'
    server.ranges, server.length = change != "no ranges", change != "no length"
    # without a length, a lost connection is only noticed by the checksum
    checksum = f"#sha256={hashlib.sha256(server.body).hexdigest()}" if change == "no length" else ""
    path, _ = fetch(f"{server.address}{checksum}", folders)
    assert path.read_bytes() == server.body


def test_a_server_that_does_not_say_the_length_needs_a_checksum(server, folders):
    server.length = False
    assert "a lost connection would not be noticed; append #sha256=CHECKSUM" in refusal(server.address, folders)
    assert not list(folders.results.rglob("weights.pth"))


def test_a_partial_file_that_the_server_cannot_continue(server, folders):
    server.answers = [("cut",)] * 3
    refusal(server.address, folders)
    server.answers = [416]
    assert fetch(server.address, folders)[0].read_bytes() == BODY


@pytest.mark.parametrize("code", [401, 404, 500])
def test_answers_that_are_errors(server, folders, code):
    server.answers = [code]
    message = refusal(server.address, folders)
    assert f"the server answers {code}" in message
    assert "download it first and give the path" in message
    assert len(server.asked) == 1


@pytest.mark.parametrize("target", ["file:///etc/hostname", "ftp://127.0.0.1/a"])
def test_redirections_leave_the_web_nowhere(server, folders, target):
    server.answers = [target] * 3
    refusal(server.address, folders)


def test_without_a_network(server, folders):
    address = server.address.replace(f":{server.server_port}", ":9")
    assert "download it first and give the path" in refusal(address, folders)
    assert "download it first and give the path" in refusal("https://nowhere.invalid/a.pth", folders)


@pytest.mark.parametrize("length", [True, False])
def test_the_largest_size(server, folders, monkeypatch, length):
    server.length = length
    address = f"{server.address}#sha256={hashlib.sha256(BODY).hexdigest()}"
    monkeypatch.setenv("NNSSL_LARGEST_DOWNLOAD_GB", "0.0005")
    message = refusal(address, folders)
    assert "the limit is 0.0005; set NNSSL_LARGEST_DOWNLOAD_GB" in message
    for wrong in ("much", "nan", "-1"):
        monkeypatch.setenv("NNSSL_LARGEST_DOWNLOAD_GB", wrong)
        with pytest.raises(UserError, match=f"must be a number above 0, got {wrong}"), lines_to(lambda line: None):
            local_weights(address, folders)
    monkeypatch.delenv("NNSSL_LARGEST_DOWNLOAD_GB")
    assert fetch(address, folders)[0].read_bytes() == BODY


def test_no_space(server, folders, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(UserError, match="has no space for 0.00102 GB"), lines_to(lambda line: None):
        local_weights(server.address, folders)


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("hf://a/b/w.pth", "https://huggingface.co/a/b/resolve/main/w.pth"),
        ("hf://a/b/deep/w.pth@v1.0", "https://huggingface.co/a/b/resolve/v1.0/deep/w.pth"),
        ("hf://a/b@v1.0/deep/w x.pth", "https://huggingface.co/a/b/resolve/v1.0/deep/w%20x.pth"),
        ("hf://a/b/w.pth@refs/pr/1", None),
        ("https://host/x/w.pth?download=1", "https://host/x/w.pth?download=1"),
    ],
)
def test_addresses(text, url):
    if url is None:
        assert parse_address(text).url.endswith("/resolve/main/w.pth%40refs/pr/1")
    else:
        assert parse_address(text).url == url
        assert parse_address(f"{text}#sha256={SUM}").sha256 == SUM


def test_names_cannot_leave_their_folder():
    assert parse_address("https://host/a/..%2F..%2Fx.pth").name == "x.pth"
    assert parse_address("https://host/a/.hidden pth").name == "hidden_pth"
    assert not is_address("weights.pth")
    assert not is_address("/a/https:/b.pth")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("https://host/", "names no file"),
        ("https:///a.pth", "names no file"),
        ("hf://owner/repo", r"must have the form hf://OWNER/REPO/FILE\[@REVISION\]"),
        ("https://host/a.pth#md5=00", "must be sha256= and 64 hexadecimal digits, got md5=00"),
        ("http://host/a.pth", "is not encrypted"),
    ],
)
def test_addresses_that_are_none(text, message):
    with pytest.raises(UserError, match=message):
        parse_address(text)


def test_a_checksum_stands_in_for_encryption():
    assert parse_address(f"http://host/a.pth#sha256={SUM}").url == "http://host/a.pth"


def test_commands_take_addresses(server, nnunet_folders, monkeypatch, tmp_path, capsys):
    weights = write_trained(tmp_path / "a.pth", unet("plain", 2), 2, ["CT"])
    server.body = (tmp_path / "a.pth").read_bytes()
    assert info([server.address]) == 0
    assert "trained by nnU-Net with labels" in capsys.readouterr().out
    monkeypatch.setenv("HF_ENDPOINT", server.address.removesuffix("/folder/weights.pth"))
    folders = resolve_folders()
    found = find_weights("hf://owner/repo/weights.pth@v2", folders)
    assert server.asked[-1][0] == "/owner/repo/resolve/v2/weights.pth"
    assert found.read_bytes() == server.body
    (arm,) = parse_arms([f"sup={server.address}"], folders)
    assert arm.name == "sup"
    assert arm.checkpoint is not None
    assert arm.checkpoint.read_bytes() == server.body
    logging.getLogger("nnssl").info("")
    path = export(server.address, ExportSettings(out=tmp_path / "o.pth"), folders).path
    state = torch.load(path, weights_only=True)["network_weights"]
    name = "encoder.stages.1.0.convs.0.conv.weight"
    assert torch.equal(state[name], weights[name])
    assert info(["https://nowhere.invalid/a.pth"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "download it first and give the path" in error
