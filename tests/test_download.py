"""The download, from real local servers: whole, checked, bounded in time whatever the server does."""

import gzip
import hashlib
import http.server
import io
import socket
import tarfile
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from torchvision.datasets import MNIST

from planar_helpers import download
from planar_helpers.data import load_images
from planar_helpers.download import download_mnist, keep_mnist, unpack


@pytest.fixture(autouse=True)
def files(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Four small files in place of MNIST's, and a patience to match."""
    contents = {name: name.encode() * 50 for name in download.MNIST_MD5}
    for name, content in contents.items():
        monkeypatch.setitem(download.MNIST_MD5, name, hashlib.md5(content).hexdigest())
    monkeypatch.setattr(download, "SILENCE", 0.3)
    monkeypatch.setattr(download, "TOTAL", 1.5)
    return contents


@contextmanager
def serving(contents: dict[str, bytes]) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = contents.get(self.path.strip("/"))
            self.send_response(404 if content is None else 200)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def speaking(speak: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that says whatever it likes."""
    server, stop = socket.create_server(("127.0.0.1", 0)), threading.Event()

    def accept() -> None:
        while not stop.is_set():
            try:
                connection, _ = server.accept()
                threading.Thread(target=answer, args=(connection,), daemon=True).start()
            except OSError:
                return

    def answer(connection: socket.socket) -> None:
        try:
            connection.recv(1000)
            speak(connection)
        except OSError:
            pass
        finally:
            connection.close()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.getsockname()[1]}/"
    finally:
        stop.set()
        server.close()


def packed(files: dict[str, bytes]) -> dict[str, bytes]:
    return {f"{name}.gz": gzip.compress(content) for name, content in files.items()}


def test_a_download_from_a_real_server_arrives_whole(files, tmp_path, monkeypatch) -> None:
    with serving(packed(files)) as address:
        monkeypatch.setattr(MNIST, "mirrors", [address])
        contents = download_mnist()
    assert contents == files
    keep_mnist(tmp_path / "new", contents)
    raw = tmp_path / "new" / "MNIST" / "raw"
    assert {path.name: path.read_bytes() for path in raw.iterdir()} == files


def test_the_next_mirror_is_asked_if_one_fails(files, monkeypatch) -> None:
    wrong = {name: gzip.compress(b"something else") for name in packed(files)}
    broken = {name: content[:-9] for name, content in packed(files).items()}
    with serving({}) as empty, serving(wrong) as other, serving(broken) as cut, serving(packed(files)) as right:
        monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/", empty, other, cut, right])
        assert download_mnist() == files
        for mirror, reason in ((empty, "404"), (other, "its checksum differs"), ("http://127.0.0.1:9/", "refused")):
            monkeypatch.setattr(MNIST, "mirrors", [mirror])
            with pytest.raises(OSError, match=reason):
                download_mnist()
    monkeypatch.setattr(MNIST, "mirrors", [])
    with pytest.raises(OSError, match="there is no mirror"):
        download_mnist()


def test_a_write_that_fails_leaves_no_half_file(files, tmp_path, monkeypatch) -> None:
    write = Path.write_bytes

    def disk_full(path: Path, content: bytes) -> None:
        write(path, content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", disk_full)
    with pytest.raises(OSError, match="No space left"):
        keep_mnist(tmp_path, files)
    assert list((tmp_path / "MNIST" / "raw").iterdir()) == []


def test_a_reader_never_sees_half_a_file(files, tmp_path, monkeypatch) -> None:
    keep_mnist(tmp_path, files)
    write, seen = Path.write_bytes, []

    def look(path: Path, content: bytes) -> None:
        write(path, b"half")
        seen.append({file.name: file.read_bytes() for file in path.parent.iterdir() if file.name in files})
        write(path, content)

    monkeypatch.setattr(Path, "write_bytes", look)
    keep_mnist(tmp_path, files)
    assert seen == [files] * 4


def silent(connection: socket.socket) -> None:
    time.sleep(5)


def babbling(connection: socket.socket) -> None:
    connection.sendall(b"220 hello\r\n\r\n")


def trickling_headers(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    for _ in range(100):
        connection.sendall(b"X-More: x\r\n")
        time.sleep(0.05)


def trickling(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    for _ in range(100):
        connection.sendall(b"x")
        time.sleep(0.05)


def falling_silent(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\nxxxx")
    time.sleep(5)


def hanging_up(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\nxxxx")


@pytest.mark.parametrize(
    ("speak", "mirrors", "reason"),
    [
        (silent, 50, "no server answered: given up"),
        (babbling, 2, "220 hello"),
        (trickling_headers, 1, "given up after"),
        (trickling, 1, "the download stopped: given up after"),
        (falling_silent, 1, "timed out|the download stopped: given up"),
        (hanging_up, 1, "checksum differs|more expected"),
    ],
)
def test_whatever_the_server_does_it_costs_seconds(tmp_path, monkeypatch, speak, mirrors: int, reason: str) -> None:
    with speaking(speak) as address:
        monkeypatch.setattr(MNIST, "mirrors", mirrors * [address])
        start = time.monotonic()
        with pytest.raises(OSError, match=reason):
            download_mnist()
        assert time.monotonic() - start < 3
    assert socket.getdefaulttimeout() is None


def test_a_name_server_that_is_silent_costs_seconds(monkeypatch) -> None:
    monkeypatch.setattr(MNIST, "mirrors", ["http://mnist.invalid/"])
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(4) or [])  # no address, in the end
    start = time.monotonic()
    with pytest.raises(OSError, match="no server answered: given up"):
        download_mnist()
    assert time.monotonic() - start < 3


def test_load_images_downloads_keeps_and_falls_back(files, tmp_path, monkeypatch, capsys) -> None:
    with speaking(babbling) as address:
        monkeypatch.setattr(MNIST, "mirrors", [address])
        assert load_images(root=tmp_path).name == "digits"
    assert "220 hello" in capsys.readouterr().out and list(tmp_path.iterdir()) == []


def test_files_are_unpacked_within_bounds(files, monkeypatch) -> None:
    name, content = next(iter(files.items()))
    assert unpack(name, content) == content and unpack(name, gzip.compress(content)) == content
    for damaged in (gzip.compress(content)[:-3], gzip.compress(content)[:20] + b"??", b"\x1f\x8b\x00"):
        with pytest.raises(ValueError, match=f"{name} is damaged: "):
            unpack(name, damaged)
    for other in (b"", content[:-1], gzip.compress(b"another")):
        with pytest.raises(ValueError, match=f"{name} is another file: its checksum differs"):
            unpack(name, other)
    monkeypatch.setattr(download, "LARGEST", 1000)
    monkeypatch.setitem(download.MNIST_MD5, name, hashlib.md5(bytes(1000)).hexdigest())
    assert unpack(name, gzip.compress(bytes(100_000))) == bytes(1000)
    with serving({f"{name}.gz": bytes(2000) for name in download.MNIST_MD5}) as address:
        monkeypatch.setattr(MNIST, "mirrors", [address])
        with pytest.raises(OSError, match="larger than any file of MNIST"):
            download_mnist()


# --- attacks: by name an error, else the digits said out loud; nothing is kept, and seconds at the most --------------


def answering(status: int, headers: str = "", body: bytes = b"") -> Callable[[socket.socket], None]:
    def speak(connection: socket.socket) -> None:
        connection.sendall(f"HTTP/1.1 {status} x\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode() + body)

    return speak


def climbing() -> bytes:
    """Packed, under a name that climbs out of any folder it would be unpacked in."""
    content = io.BytesIO()
    with gzip.GzipFile("../../../climbed", "wb", fileobj=content) as packer:
        packer.write(b"climbed")
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        tar.addfile(tarfile.TarInfo("../../../climbed"), io.BytesIO())
    return content.getvalue() + archive.getvalue()


def bomb() -> bytes:
    """Two megabytes that unpack to two gigabytes."""
    return gzip.compress(bytes(2**24), 9) * 128


ATTACKS = {
    "403": answering(403), "503": answering(503), "an HTML page": answering(200, "", b"<html>Please log in</html>"),
    "a redirect loop": answering(302, "Location: /again\r\n"),
    "a redirect to a file": answering(302, "Location: file:///etc/passwd\r\n"),
    "one byte a time for ever": trickling, "nothing": silent, "half a file": hanging_up,
    "a path that climbs out": answering(200, "", climbing()), "a bomb": answering(200, "", bomb()),
}  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_is_never_taken_for_data(files, digits, tmp_path, monkeypatch, capsys, tally, attack: str) -> None:
    root = tmp_path / "a" / "b" / "c"
    root.mkdir(parents=True)
    tracemalloc.start()
    try:
        with speaking(ATTACKS[attack]) as address:
            monkeypatch.setattr(MNIST, "mirrors", [address])
            start = time.monotonic()
            with pytest.raises(
                FileNotFoundError, match="root .* holds no MNIST, and it could not be downloaded"
            ) as error:
                load_images("mnist", root)
            assert load_images("auto", root).name == "digits"
            assert time.monotonic() - start < 8
        assert tracemalloc.get_traced_memory()[1] < 3 * download.LARGEST
    finally:
        tracemalloc.stop()
    said = capsys.readouterr().out
    assert "\n" not in str(error.value) and "falling back to the embedded digits" in said and said.count("\n") == 2
    assert sorted(path for path in tmp_path.rglob("*") if not path.is_dir()) == []
    tally("attacks by a server or an archive: never taken for data", 2, attack)


@pytest.mark.parametrize("attack", ["a path that climbs out", "a bomb", "an HTML page"])
def test_a_hostile_file_on_the_disk_is_refused_by_its_name(files, tmp_path, tally, attack: str) -> None:
    content = {"a path that climbs out": climbing(), "a bomb": bomb(), "an HTML page": b"<html>"}[attack]
    assert len(content) < 10e6
    keep_mnist(tmp_path, files)
    path = tmp_path / "MNIST" / "raw" / next(iter(files))
    path.write_bytes(content)
    for name in ("mnist", "auto"):
        with pytest.raises(ValueError, match=f"root holds a damaged {path.name}.*: delete "):
            load_images(name, tmp_path)
    assert not [found for found in tmp_path.parent.rglob("climbed")]
    tally("attacks by a server or an archive: never taken for data", 2, f"on the disk: {attack}")
