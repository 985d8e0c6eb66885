"""Downloads of files, complete or not at all."""

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from pathlib import Path

from bitgen.runtime.logging import log_info
from bitgen.runtime.progress import ProgressBar

_CHUNK = 1 << 20
_TIMEOUT = 30  # seconds without a byte


def download(url: str, file: Path, sha256: str = "") -> None:
    """Downloads to `file`; an interrupted download resumes, in a temporary file beside it.

    `sha256` is the digest that the file must have, or its first digits. Raises OSError with one
    line if the download fails, breaks off, or has another digest.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.part")
    try:
        whole = _fetch(url, part, file.name)
    except http.client.HTTPException as e:
        raise OSError(f"it broke off ({type(e).__name__}); the same command resumes it") from None
    size = part.stat().st_size
    if size < whole:
        raise OSError(f"it broke off after {size} of {whole} bytes; the same command resumes it")
    with part.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if not digest.startswith(sha256):
        part.unlink()
        raise OSError(f"what came is another file, of sha256 {digest[:8]} and not {sha256}")
    os.replace(part, file)


def _fetch(url: str, part: Path, name: str) -> int:
    """Appends the missing bytes to `part`; returns the full size in bytes, 0 if it is not known."""
    start = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
            if response.status != 206:  # the whole file, asked for or not
                start = 0
            length = int(response.headers.get("Content-Length") or 0)
            whole = start + length if length else 0
            log_info(f"downloading {name}, {whole / 1e6:.0f} MB" + (", going on" if start else ""))
            bar = ProgressBar(name, whole or None, unit="B", first=start, lines=False)
            with part.open("ab" if start else "wb") as stream, bar:
                while chunk := response.read(_CHUNK):
                    stream.write(chunk)
                    bar.add(len(chunk))
            return whole
    except urllib.error.HTTPError as e:
        if e.code == 416:  # past the end: all of it was there already
            return start
        raise
