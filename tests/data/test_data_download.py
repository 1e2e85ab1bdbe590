"""The downloader, against a server on this machine: resumed, checked, set aside."""

import dataclasses
import hashlib
import http.server
import io
import socket
import tarfile
import threading
import zipfile

import pytest

from tests.data.data_files import ML1M_RATINGS, load, ml1m_zip
from ultra_hstu.data.download import Download, fetch, obtain
from ultra_hstu.data.sources import PUBLIC


class Server:
    """Serves `files` by path with byte ranges; cuts `cuts` connections, each after `cut` bytes."""

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str | None]] = []
        self.cuts, self.cut, self.ranges = 0, 0, True
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                asked = self.headers.get("Range")
                outer.requests.append((self.path, asked))
                data = outer.files.get(self.path)
                if data is None:
                    return self.send_error(404)
                start = (
                    int(asked.removeprefix("bytes=").split("-")[0]) if asked and outer.ranges else 0
                )
                if start and start >= len(data):
                    return self.send_error(416)
                self.send_response(206 if start else 200)
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
                self.send_header("Content-Length", str(len(data) - start))
                self.end_headers()
                stop = len(data)
                if outer.cuts:
                    outer.cuts -= 1
                    stop = start + outer.cut
                self.wfile.write(data[start:stop])

            def log_message(self, *_):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = False  # joined on close: nothing is left behind
        self.address = f"http://127.0.0.1:{self.http.server_port}"

    def put(self, path: str, data: bytes, checksum: str | None = "sha256") -> Download:
        self.files[path] = data
        return Download(
            self.address + path,
            checksum and f"{checksum}:{hashlib.new(checksum, data).hexdigest()}",
        )


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.http.shutdown()
    server.http.server_close()
    thread.join()


CONTENT = bytes(range(256)) * 4000


@pytest.mark.parametrize("kind", ["md5", "sha256"])
def test_download(server, tmp_path, kind, capsys):
    download = server.put("/file.bin", CONTENT, kind)
    assert fetch(download, tmp_path).read_bytes() == CONTENT
    assert "file.bin" in capsys.readouterr().out  # progress is shown
    fetch(download, tmp_path)
    assert len(server.requests) == 1  # a file that is there and right is not fetched again
    assert [path.name for path in tmp_path.iterdir()] == ["file.bin"]


def test_a_cut_connection_is_resumed(server, tmp_path):
    download = server.put("/file.bin", CONTENT)
    server.cuts, server.cut = 2, 300_000
    assert fetch(download, tmp_path, pause=0).read_bytes() == CONTENT
    assert [asked for _, asked in server.requests] == [None, "bytes=300000-", "bytes=600000-"]


def test_the_next_run_continues(server, tmp_path):
    download = server.put("/file.bin", CONTENT)
    server.cuts, server.cut = 2, 100_000
    with pytest.raises(
        ConnectionError, match="cut after 200000 of 1024000 bytes .*run again to continue"
    ):
        fetch(download, tmp_path, attempts=2, pause=0)
    assert not (tmp_path / "file.bin").exists()
    assert fetch(download, tmp_path).read_bytes() == CONTENT
    assert server.requests[-1] == ("/file.bin", "bytes=200000-")


def test_a_server_without_ranges_starts_over(server, tmp_path):
    download = server.put("/file.bin", CONTENT)
    server.cuts, server.cut, server.ranges = 1, 100_000, False
    assert fetch(download, tmp_path, pause=0).read_bytes() == CONTENT


def test_a_part_of_another_file_starts_over(server, tmp_path):
    download = server.put("/file.bin", CONTENT)
    (tmp_path / "file.bin.part").write_bytes(
        bytes(len(CONTENT) + 5)
    )  # longer than what there is to fetch
    assert fetch(download, tmp_path).read_bytes() == CONTENT


def test_a_wrong_checksum(server, tmp_path):
    download = server.put("/file.bin", CONTENT)
    server.files["/file.bin"] = CONTENT[:-1] + b"x"
    found = hashlib.sha256(server.files["/file.bin"]).hexdigest()
    with pytest.raises(
        ValueError,
        match=f"file.bin is corrupt: expected {download.checksum.replace(':', ' ')}, found {found}",
    ):
        fetch(download, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file.bin.corrupt"]
    server.files["/file.bin"] = CONTENT
    assert fetch(download, tmp_path).read_bytes() == CONTENT  # starts over


def test_unreachable_says_what_to_fetch_by_hand(server, tmp_path):
    gone = Download(f"{server.address}/gone.csv")
    with pytest.raises(ConnectionError, match="404 Not Found") as error:
        obtain([gone], ["gone.csv"], tmp_path / "raw")
    assert f"fetch {server.address}/gone.csv by hand" in str(error.value)
    assert "raw_dir (--config.data.raw_dir=...) at a folder with the files gone.csv" in str(
        error.value
    )
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with pytest.raises(ConnectionError, match=f"127.0.0.1:{port}.*tried 5 times"):
        obtain([Download(f"http://127.0.0.1:{port}/a.csv")], ["a.csv"], tmp_path / "raw", pause=0)
    assert not (tmp_path / "raw").exists()


@pytest.mark.parametrize("suffix", [".zip", ".tar.gz"])
def test_a_truncated_archive_is_set_aside(server, tmp_path, suffix):
    buffer = io.BytesIO()
    if suffix == ".zip":
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("set/data/a.csv", CONTENT)
    else:
        with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
            info = tarfile.TarInfo("set/data/a.csv")
            info.size = len(CONTENT)
            archive.addfile(info, io.BytesIO(CONTENT))
    whole = buffer.getvalue()
    download = server.put(f"/set{suffix}", whole[: len(whole) // 2], None)
    with pytest.raises(ValueError, match=f"set{suffix} is no whole archive"):
        obtain([download], ["a.csv"], tmp_path / "raw")
    assert not (tmp_path / "raw").exists() and (tmp_path / f"set{suffix}.corrupt").exists()
    download = server.put(f"/set{suffix}", whole, None)
    obtain([download], ["a.csv"], tmp_path / "raw")
    assert (tmp_path / "raw/a.csv").read_bytes() == CONTENT
    assert not (tmp_path / f"set{suffix}").exists()  # unpacked: no longer needed
    with pytest.raises(ValueError, match=f"set{suffix} has no b.csv"):
        obtain([download], ["b.csv"], tmp_path / "other")


def test_a_file_without_published_checksum_is_verified_at_every_later_use(server, tmp_path):
    download = server.put("/a.csv", b"1,2,3\n", None)
    sums = obtain([download], ["a.csv"], tmp_path / "raw")
    assert sums == {"a.csv": hashlib.sha256(b"1,2,3\n").hexdigest()}
    assert obtain([download], ["a.csv"], tmp_path / "raw") == sums and len(server.requests) == 1
    (tmp_path / "raw/a.csv").write_bytes(b"1,2,4\n")
    with pytest.raises(
        ValueError,
        match=f"raw/a.csv has changed since it was downloaded: expected sha256 {sums['a.csv']}",
    ):
        obtain([download], ["a.csv"], tmp_path / "raw")
    assert obtain([download], ["a.csv"], tmp_path / "raw") == sums and len(server.requests) == 2


def test_a_source_is_downloaded_once_and_prepared(server, tmp_path, monkeypatch):
    archive = ml1m_zip(tmp_path / "ml-1m.zip", tmp_path / "made").read_bytes()
    download = server.put("/ml-1m.zip", archive, "md5")
    set_ = dataclasses.replace(PUBLIC["ml-1m"], downloads=(download,))
    monkeypatch.setitem(PUBLIC, "ml-1m", set_)
    for _ in range(2):
        assert load(tmp_path, "ml-1m").num_events == len(ML1M_RATINGS)
    assert len(server.requests) == 1
