"""How MNIST gets here: from torchvision's mirrors, within a bounded time, checked, and whole or not at all."""

import gzip
import hashlib
import io
import threading
import time
import urllib.request
import zlib
from http.client import HTTPException
from pathlib import Path

from planar_helpers.run import replacing

SILENCE = 5.0  # seconds without a byte, from one server; twice that from all of them
TOTAL = 60.0  # seconds for everything, however steadily it trickles
LARGEST = 2**26  # bytes of one file, unpacked: the largest has 47 MB
MNIST_MD5 = {  # of the unpacked content
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


def download_mnist() -> dict[str, bytes]:
    """Return the unpacked content of MNIST's four files, each with the right checksum.

    Raises OSError if no server answers, answers stop, take too long, or hold something else.
    """
    transfer = _Transfer()
    thread = threading.Thread(target=transfer.run, daemon=True)  # a name server's silence has no timeout of its own
    start = time.monotonic()
    thread.start()
    while thread.is_alive():
        now = time.monotonic()
        if now - transfer.last_byte > 2 * SILENCE or now - start > TOTAL:
            transfer.stop.set()
            raise OSError(
                f"{'the download stopped' if transfer.received else 'no server answered'}: "
                f"given up after {now - start:.0f} seconds"
            )
        thread.join(0.05)
    if transfer.error is not None:
        raise OSError(transfer.error)
    return transfer.contents


def keep_mnist(folder: Path, contents: dict[str, bytes]) -> None:
    """Write the four files into MNIST/raw in the folder, each whole or not at all."""
    for name, content in contents.items():
        with replacing(folder / "MNIST" / "raw" / name) as temporary:
            temporary.write_bytes(content)


def unpack(name: str, content: bytes) -> bytes:
    """Return the unpacked content of MNIST's file of this name. Raises ValueError if it is damaged, or another file."""
    try:
        if content.startswith(b"\x1f\x8b"):  # else it is not packed
            content = gzip.GzipFile(fileobj=io.BytesIO(content)).read(LARGEST)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{name} is damaged: {error}") from error
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != MNIST_MD5[name]:
        raise ValueError(f"{name} is another file: its checksum differs")
    return content


class _Transfer:
    """One download in a thread of its own, which the caller watches and can give up."""

    def __init__(self) -> None:
        self.contents: dict[str, bytes] = {}
        self.error: str | None = None
        self.last_byte, self.received, self.stop = time.monotonic(), 0, threading.Event()

    def run(self) -> None:
        try:
            self.contents = {name: self._from_any_mirror(name) for name in MNIST_MD5}
        except OSError as error:
            self.error = str(error)

    def _from_any_mirror(self, name: str) -> bytes:
        from torchvision.datasets import MNIST  # a slow import, needed only here

        reason = "there is no mirror"
        for mirror in MNIST.mirrors:
            try:
                return unpack(name, self._read(f"{mirror}{name}.gz"))
            except (OSError, HTTPException, ValueError) as error:
                reason = (str(error) or type(error).__name__).splitlines()[0]
        raise OSError(reason)

    def _read(self, address: str) -> bytes:
        content = bytearray()
        with urllib.request.urlopen(address, timeout=SILENCE) as answer:
            while (piece := answer.read1(2**16)) and not self.stop.is_set():
                content += piece
                self.last_byte, self.received = time.monotonic(), self.received + len(piece)
                if len(content) > LARGEST:
                    raise OSError(f"{address} is larger than any file of MNIST")
        return bytes(content)  # part of a file, if the transfer was given up: nobody waits for it, `unpack` refuses it
