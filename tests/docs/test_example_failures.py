"""What the larger examples promise of failures: torn writes, cut files, killed processes."""

from __future__ import annotations

import errno
import http.client
import importlib.util
import os
import resource
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import quire

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
LARGE_BYTES = 64 << 20


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


Store: Any = example("key_value_store").Store
file_server: Any = example("file_server")
frame_ring: Any = example("frame_ring")


class TestKeyValueStore:
    def test_keeps_values_and_grows(self, tmp_path: Path) -> None:
        rng, model = np.random.default_rng(1), {}
        for _ in range(3):
            with Store(tmp_path / "log") as store:
                assert store.dropped == 0
                for key in model:
                    assert store[key] == model[key]
                for number in rng.integers(0, 100, 200):
                    key = b"key %d" % number
                    if number % 7 == 0 and key in model:
                        del store[key], model[key]
                        continue
                    store[key] = model[key] = rng.bytes(int(number) * 300)
                for key in (b"key %d" % number for number in range(100)):
                    if key in model:
                        assert store[key] == model[key]
                    else:
                        with pytest.raises(KeyError):
                            store[key]
        assert (tmp_path / "log").stat().st_size > 1 << 20

    def test_a_torn_tail_is_dropped(self, tmp_path: Path) -> None:
        """Cut anywhere, the last record is not there, and what came before is."""
        path = tmp_path / "log"
        with Store(path) as store:
            store[b"first"] = b"durable"
            start = store._end
            store[b"last"] = b"\1" * 40
            whole = path.read_bytes()[: store._end]
        for torn in range(start, len(whole)):
            path.write_bytes(whole[:torn] + bytes(100))
            with Store(path) as store:
                assert store[b"first"] == b"durable"
                assert store.dropped == len(whole[start:torn].rstrip(b"\0"))
                with pytest.raises(KeyError):
                    store[b"last"]
                store[b"next"] = b"2"
            with Store(path) as store:
                assert (store[b"next"], store.dropped) == (b"2", 0)

    @pytest.mark.parametrize("place", [0, 5, 9, 12, 16, 30])
    def test_a_changed_byte_is_found(self, tmp_path: Path, place: int) -> None:
        path = tmp_path / "log"
        with Store(path) as store:
            store[b"first"] = b"durable"
            start = store._end
            store[b"last"] = b"\1" * 40
        changed = bytearray(path.read_bytes())
        changed[start + place] ^= 0x40
        path.write_bytes(changed)
        with Store(path) as store:
            assert store[b"first"] == b"durable"
            assert store.dropped > 0
            with pytest.raises(KeyError):
                store[b"last"]

    def test_one_process_at_a_time(self, tmp_path: Path) -> None:
        with Store(tmp_path / "log"), pytest.raises(BlockingIOError):
            Store(tmp_path / "log")
        Store(tmp_path / "log").__exit__()

    def test_no_room_changes_nothing(self, tmp_path: Path) -> None:
        with Store(tmp_path / "log") as store:
            store[b"small"] = b"1"
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 20, hard))
            try:
                with pytest.raises(quire.Error) as caught:
                    store[b"large"] = bytes(4 << 20)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            assert caught.value.errno == errno.EFBIG
            with pytest.raises(KeyError):
                store[b"large"]
            store[b"large"] = bytes(4 << 20)
        with Store(tmp_path / "log") as store:
            assert (store[b"small"], len(store[b"large"])) == (b"1", 4 << 20)

    def test_nothing_is_put_after_a_failed_sync(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: object) -> None:
            raise quire.SyncError("the disk is gone", errno=errno.EIO)

        with Store(tmp_path / "log") as store:
            store[b"key"] = b"value"
            with monkeypatch.context() as patch:
                patch.setattr(quire.KernelMapping, "sync", fail)
                with pytest.raises(quire.SyncError):
                    store.sync()
            with pytest.raises(quire.ClosedError):
                store[b"other"] = b"value"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[http.client.HTTPConnection]:
    """A client of a server of ``tmp_path / "root"``."""
    (tmp_path / "root").mkdir()
    (tmp_path / "root/numbers.bin").write_bytes(bytes(range(200)))
    (tmp_path / "root/empty.txt").touch()
    (tmp_path / "secret").write_text("outside")
    with file_server.serve(tmp_path / "root") as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        client = http.client.HTTPConnection(*serving.server_address[:2], timeout=60)
        yield client
        client.close()
        serving.shutdown()
        thread.join()


def ask(
    client: http.client.HTTPConnection, path: str, said: str | None = None, method: str = "GET"
) -> tuple[int, str | None, bytes]:
    """Status, Content-Range and body."""
    client.request(method, path, headers={} if said is None else {"Range": said})
    answer = client.getresponse()
    return answer.status, answer.headers["Content-Range"], answer.read()


class TestFileServer:
    @pytest.mark.parametrize(
        ("said", "status", "content_range", "part"),
        [
            (None, 200, None, slice(0, 200)),
            ("bytes=0-199", 200, None, slice(0, 200)),
            ("bytes=10-19", 206, "bytes 10-19/200", slice(10, 20)),
            ("bytes=190-500", 206, "bytes 190-199/200", slice(190, 200)),
            ("bytes=-5", 206, "bytes 195-199/200", slice(195, 200)),
            ("bytes=-500", 200, None, slice(0, 200)),
            ("bytes=200-", 416, "bytes */200", slice(0, 0)),
            ("bytes=-0", 416, "bytes */200", slice(0, 0)),
            ("bytes=20-10", 200, None, slice(0, 200)),
            ("bytes=-", 200, None, slice(0, 200)),
            ("lines=1-2", 200, None, slice(0, 200)),
        ],
    )
    def test_ranges(
        self,
        server: http.client.HTTPConnection,
        said: str | None,
        status: int,
        content_range: str | None,
        part: slice,
    ) -> None:
        answer = ask(server, "/numbers.bin", said)
        assert answer == (status, content_range, bytes(range(200))[part])
        assert ask(server, "/numbers.bin", said, "HEAD") == (200, None, b"")

    @pytest.mark.parametrize("path", ["/", "/absent", "/../secret", "/%2e%2e/secret", "/a%00b"])
    def test_what_is_not_there(self, server: http.client.HTTPConnection, path: str) -> None:
        assert ask(server, path)[0] == 404

    def test_an_empty_file(self, server: http.client.HTTPConnection) -> None:
        assert ask(server, "/empty.txt") == (200, None, b"")

    def test_a_file_that_is_cut_before_the_answer(
        self, server: http.client.HTTPConnection, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = quire.map

        def map_and_cut(path: Path, **how: Any) -> quire.KernelMapping:
            mapping = whole(path, **how)
            os.truncate(path, 0)
            return mapping

        with monkeypatch.context() as patch:
            patch.setattr(file_server.quire, "map", map_and_cut)
            status, _, body = ask(server, "/numbers.bin")
        assert status == 503
        assert b"the file ends after 0 bytes" in body
        assert ask(server, "/numbers.bin") == (200, None, b"")

    def test_a_file_that_is_cut_within_the_answer(
        self,
        server: http.client.HTTPConnection,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        path = tmp_path / "root/large.bin"
        path.write_bytes(b"\7" * LARGE_BYTES)
        server.request("GET", "/large.bin")
        answer = server.getresponse()
        assert answer.read(1000) == b"\7" * 1000
        os.truncate(path, 4096)
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            answer.read()
        server.close()
        assert ask(server, "/numbers.bin")[0] == 200
        assert "the file ends after 4096 bytes" in capsys.readouterr().out


class TestFrameRing:
    def test_the_end_of_the_consumer_is_noticed(self) -> None:
        producer = frame_ring.Producer()
        producer.process.kill()
        pixels = np.zeros((frame_ring.HEIGHT, frame_ring.WIDTH, 3), "u1")
        for _ in range(frame_ring.SLOTS):
            producer.put(pixels)
        with pytest.raises(frame_ring.ConsumerGone):
            producer.put(pixels)
        assert producer.written - producer.done == frame_ring.SLOTS
        producer.stop()
        assert producer.process.returncode == -9
        producer.start_consumer()
        for number in range(20):
            producer.put(pixels + np.uint8(number))
        producer.close()
        assert producer.done == producer.written >= 20 + frame_ring.SLOTS
        assert producer.process.returncode == 0

    def test_a_damaged_frame_is_found(self, capfd: pytest.CaptureFixture[str]) -> None:
        producer = frame_ring.Producer()
        producer.written = 1  # a frame of zeros, whose CRC is not 0
        producer.socket.sendall(frame_ring.READY.pack(0))
        with pytest.raises(frame_ring.ConsumerGone):
            producer.wait_done()
        producer.stop()
        assert producer.process.returncode == 1
        assert "frame 0 is damaged" in capfd.readouterr().err

    def test_the_end_of_the_producer_ends_the_consumer(self) -> None:
        producer = frame_ring.Producer()
        producer.socket.close()
        assert producer.process.wait(60) == 0
