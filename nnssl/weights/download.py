"""Weights at an address, ``https://...`` or ``hf://OWNER/REPO/FILE`` of the Hugging Face hub, which are downloaded.

The folder is below nnU-Net's results. A download is either complete or absent. What an interrupted one has received is kept and
continued if the server supports this and its file is the same. Nothing in a downloaded file is executed: it is opened as any
other file with weights.
"""

import hashlib
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, ClassVar
from urllib.error import HTTPError, URLError
from urllib.parse import quote, unquote, urlsplit
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPHandler,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
    UnknownHandler,
)

from nnssl.errors import UserError
from nnssl.locks import only_process
from nnssl.log import logger
from nnssl.paths import Folders, make_writable, resolve_folders
from nnssl.schema import STRICT, read, write
from nnssl.version import __version__

SCHEMA_VERSION = 1
FOLDER = "nnssl_downloads"
"""Folder below nnU-Net's results."""

HUB = "https://huggingface.co"
"""Address of the Hugging Face hub, unless ``HF_ENDPOINT`` names a mirror."""

SCHEMES = ("https://", "http://", "hf://")
LARGEST_GB = 20.0
"""Largest file that is downloaded, in 10^9 bytes, unless ``NNSSL_LARGEST_DOWNLOAD_GB`` says otherwise."""
TRIALS = 3
"""Number of times that a connection is made before an interrupted download is given up."""
SECONDS = 30
"""Time without data after which a connection counts as lost."""
BLOCK = 1 << 20
STAND_IN = "download it first and give the path"
LOCAL = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Address:
    """Where a file lies.

    Attributes:
        given: What the user gave.
        url: Address of the file.
        name: Name for the file.
        sha256: Its checksum, 64 hexadecimal digits; None if the user does not say.
    """

    given: str
    url: str
    name: str
    sha256: str | None


@dataclass(frozen=True)
class Download:
    """Record beside a downloaded file; beside an unfinished one, without checksum."""

    __pydantic_config__: ClassVar = STRICT
    __schema_version__: ClassVar = SCHEMA_VERSION

    schema_version: int
    url: str
    tag: str | None
    """What identifies the version of the file on its server; None if the server does not say."""
    sha256: str | None


def is_address(weights: Path | str) -> bool:
    """Return whether weights are given as an address rather than a path."""
    return str(weights).startswith(SCHEMES)


def local_weights(weights: Path | str, folders: Folders | None = None) -> Path:
    """Return the absolute path of a file with weights, which is downloaded if it is given as an address.

    Args:
        weights: A path, ``https://...`` or ``hf://OWNER/REPO/FILE[@REVISION]``; an address may end in ``#sha256=...``.
        folders: nnU-Net's folders; None for those of the environment.

    Raises:
        UserError: As ``parse_address`` and ``download``.
    """
    if not is_address(weights):
        return Path(weights).expanduser().absolute()
    return download(parse_address(str(weights)), (folders or resolve_folders()).results / FOLDER)


def parse_address(text: str) -> Address:
    """Read an address.

    Raises:
        UserError: If it names no file, its checksum is malformed, or it is not encrypted and has no checksum.
    """
    place, _, fragment = text.partition("#")
    checksum = re.fullmatch(r"sha256=([0-9a-fA-F]{64})", fragment)
    if fragment and checksum is None:
        raise UserError(
            f"{text}: what follows # must be sha256= and 64 hexadecimal digits, got {fragment}; correct or omit it"
        )
    url = _of_hub(text, place) if place.startswith("hf://") else place
    parts = urlsplit(url)
    name = re.sub(r"[^\w.+-]+", "_", unquote(parts.path).rpartition("/")[2]).lstrip(".")
    if not parts.hostname or not name:
        raise UserError(f"{text}: names no file; give https://HOST/FOLDER/FILE or hf://OWNER/REPO/FILE[@REVISION]")
    if parts.scheme == "http" and checksum is None and parts.hostname not in LOCAL:
        raise UserError(
            f"{text}: is not encrypted, so others could replace the file; use https://, or append #sha256=CHECKSUM"
        )
    return Address(text, url, name, checksum[1].lower() if checksum else None)


def _of_hub(text: str, place: str) -> str:
    """Return the address of a file on the hub. The revision may follow the file or, as in the hub's own notation, the repo."""
    parts = place.removeprefix("hf://").split("/")
    if len(parts) < 3 or not all(parts):
        raise UserError(f"{text}: must have the form hf://OWNER/REPO/FILE[@REVISION]")
    owner, repo, *path = parts
    repo, _, revision = repo.partition("@")
    if not revision:
        path[-1], _, revision = path[-1].partition("@")
    hub = os.environ.get("HF_ENDPOINT") or HUB
    file = quote("/".join(path))
    return f"{hub.rstrip('/')}/{quote(owner)}/{quote(repo)}/resolve/{quote(revision or 'main', safe='')}/{file}"


def download(address: Address, folder: Path) -> Path:
    """Download a file, unless it is there already, and print its checksum.

    Args:
        address: Where the file lies.
        folder: Folder for downloads, in which every address has a folder of its own.

    Returns:
        Path of the file.

    Raises:
        UserError: If there is no connection, no such file, or no space; or if the file is too large or has another checksum.
    """
    own = make_writable(folder / hashlib.blake2b(address.url.encode(), digest_size=6).hexdigest())
    path = own / address.name
    record = own / f"{address.name}.json"
    with only_process(own, "downloading"):
        known = read_record(record).sha256 if path.exists() and record.exists() else None
        if known is not None:
            found = known
            logger.info(f"{address.given}: downloaded already, {path}")
        else:
            found = _download(address, path, record)
        if address.sha256 is not None and found != address.sha256:
            raise UserError(
                f"{address.given}: the file has another checksum, {found}, so it is not used; check address and checksum, or "
                f"delete {path} to download it again"
            )
        if address.sha256 is None:
            logger.info(f"sha256 of {path.name}: {found} (append #sha256={found} to the address to have it checked)")
    return path


def read_record(path: Path) -> Download:
    """Read the record of a download; see ``nnssl.schema.read``."""
    return read(Download, path, "record of a download", "delete it to download the file again")


def _download(address: Address, path: Path, record: Path) -> str:
    """Download a file in as many connections as it takes, and return its checksum."""
    part = path.with_name(f"{path.name}.part")
    logger.info(f"Downloading {address.url} to {path}")
    for trial in range(1, TRIALS + 1):
        try:
            tag = _receive(address, part, record)
            break
        except HTTPError as error:
            error.close()
            raise UserError(
                f"{address.given}: the server answers {error.code} ({error.reason}); check the address, or {STAND_IN}"
            ) from error
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            kept = _kept(part, record)[0]
            no_network = isinstance(error, URLError) and kept == 0
            if no_network or trial == TRIALS or (isinstance(error, OSError) and error.filename is not None):
                received = f"; {kept:,} bytes are kept and the same command continues" if kept else ""
                raise UserError(f"{address.given}: cannot be downloaded ({reason}){received}; {STAND_IN}") from error
            logger.info(f"Connection lost ({reason}); continuing after {kept:,} bytes")
    digest = hashlib.sha256()
    with open(part, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    write(record, Download(SCHEMA_VERSION, address.url, tag, digest.hexdigest()))
    os.replace(part, path)
    return digest.hexdigest()


def _kept(part: Path, record: Path) -> tuple[int, str | None]:
    """Return how many bytes of an interrupted download can be continued after, and the version that they belong to."""
    if not part.exists() or not record.exists():
        return 0, None
    tag = read_record(record).tag
    return (0 if tag is None else part.stat().st_size), tag


def _receive(address: Address, part: Path, record: Path) -> str | None:
    """Receive a file, or the rest of it, in one connection; return what identifies its version."""
    start, begun = _kept(part, record)
    headers = {"User-Agent": f"nnssl/{__version__}", "Accept-Encoding": "identity"}
    if start and begun is not None:
        headers |= {"Range": f"bytes={start}-", "If-Range": begun}
    try:
        answer = _opener().open(Request(address.url, headers=headers), timeout=SECONDS)
    except HTTPError as error:
        if error.code != 416:
            raise
        error.close()
        part.unlink()  # nothing is left to send: the file is another one or complete, so it is received from its start
        return _receive(address, part, record)
    with answer:
        if urlsplit(address.url).scheme == "https" and urlsplit(answer.geturl()).scheme != "https":
            raise UserError(f"{address.given}: leads to {answer.geturl()}, which is not encrypted; {STAND_IN}")
        tag = answer.headers.get("ETag")
        tag = None if tag is None or tag.startswith("W/") else tag  # a weak tag does not identify bytes
        if answer.status != 206 or not str(answer.headers.get("Content-Range")).startswith(f"bytes {start}-"):
            start = 0
        length = answer.headers.get("Content-Length")
        total = None if length is None else start + int(length)
        _check_size(address, total, part.parent, start)
        if total is None and address.sha256 is None and answer.headers.get("Transfer-Encoding") != "chunked":
            raise UserError(
                f"{address.given}: the server does not say how large the file is, so a lost connection would not be noticed; "
                f"append #sha256=CHECKSUM, or {STAND_IN}"
            )
        if not start:
            part.unlink(missing_ok=True)  # bytes of another version must never follow the new record
        write(record, Download(SCHEMA_VERSION, address.url, tag, None))
        with open(part, "ab" if start else "wb") as file, _progress(start, total) as show:
            received = start
            while block := answer.read(BLOCK):
                received += len(block)
                _check_size(address, received, None, 0)
                file.write(block)
                show(len(block))
    if total is not None and received < total:
        raise ConnectionError(f"{received:,} of {total:,} bytes were sent")
    return tag


def _opener() -> OpenerDirector:
    """Return what opens http and https only, through the user's proxies; redirections to anything else fail."""
    opener = OpenerDirector()
    for handler in (
        ProxyHandler(), HTTPHandler(), HTTPSHandler(), HTTPRedirectHandler(), HTTPDefaultErrorHandler(), HTTPErrorProcessor(),
        UnknownHandler(),
    ):  # fmt: skip
        opener.add_handler(handler)
    return opener


def _check_size(address: Address, size: int | None, folder: Path | None, received: int) -> None:
    """Check the size of a file against the limit, and what is still to come against the space in a folder.

    Raises:
        UserError: If it is too large.
    """
    if size is None:
        return
    text = os.environ.get("NNSSL_LARGEST_DOWNLOAD_GB") or str(LARGEST_GB)
    try:
        limit = float(text) * 1e9
    except ValueError:
        limit = 0.0
    if not limit > 0:
        raise UserError(f"NNSSL_LARGEST_DOWNLOAD_GB must be a number above 0, got {text}")
    if size > limit:
        raise UserError(
            f"{address.given}: has {size / 1e9:.3g} GB or more, and the limit is {limit / 1e9:g}; set NNSSL_LARGEST_DOWNLOAD_GB "
            f"to a larger number, or {STAND_IN}"
        )
    if folder is not None and size - received > shutil.disk_usage(folder).free:
        raise UserError(f"{folder}: has no space for {(size - received) / 1e9:.3g} GB; free space, or {STAND_IN}")


@contextmanager
def _progress(start: int, total: int | None) -> Iterator[Callable[[int], Any]]:
    """Show a bar on a terminal, else a line for every tenth of the file; yields what is called with the bytes of a block."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, initial=start, unit="B", unit_scale=True) as bar:
            yield bar.update
        return
    state = {"received": start, "shown": start}

    def show(size: int) -> None:
        state["received"] += size
        if state["received"] - state["shown"] >= max((total or 0) / 10, 10 * BLOCK) or state["received"] == total:
            of = "" if total is None else f" of {total / 1e6:,.1f}"
            logger.info(f"  {state['received'] / 1e6:,.1f}{of} MB")
            state["shown"] = state["received"]

    yield show
