"""The life of a mapping that the kernel pages: sync, protect, advise, lock, resize, split, end."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import platform
import re
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import quire
from quire.map_flags import ADVICE
from quire.testing import children
from quire.testing.census import is_mapped
from quire.testing.touches import touch
from quire.testing.waiting import wait_until

PAGE = mmap.PAGESIZE


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "pages.bin"
    found.write_bytes(b"".join(bytes([number]) * PAGE for number in range(1, 17)))
    return found


def test_sync_of_a_part(path: Path) -> None:
    with quire.map(path, sharing="shared", protection="rw", offset=9) as mapping:
        mapping.array[:3] = 0
        mapping.sync(0, 3)
        mapping.sync(asynchronous=True)
        mapping.sync(5, 0)
        mapping.sync(invalidate=True)
        mapping.flush()
        for wrong in ((-1, None), (0, -1), (0, 1 << 40), (1 << 40, 1)):
            with pytest.raises(ValueError, match=r"negative|do not lie"):
                mapping.sync(*wrong)
        mapping.lock(0, 1)
        with pytest.raises(quire.SyncError, match="unlock") as busy:
            mapping.sync(invalidate=True)
        assert busy.value.errno == errno.EBUSY
    assert path.read_bytes()[8:13] == b"\1\0\0\0\1"


def test_protect_a_part(path: Path) -> None:
    with quire.map(path, sharing="shared", protection="rw") as mapping:
        array = mapping.array
        mapping.protect("r", 5 * PAGE + 7, 10)
        with pytest.raises(quire.ProtectionError, match="protected as read-only") as caught:
            touch(array, 5 * PAGE + 99, 0)
        assert caught.value.offset == 5 * PAGE + 99
        assert caught.value.source == str(path)
        assert touch(array, 5 * PAGE + 99) == 6  # the store was lost, and nothing else
        assert touch(array, 6 * PAGE, 0) == 0
        assert isinstance(mapping.failed, quire.ProtectionError)
        mapping.protect("none", 2 * PAGE, PAGE)
        with pytest.raises(quire.ProtectionError, match="allows none"):
            touch(array, 2 * PAGE)
        with pytest.raises(quire.ProtectionError, match="allows none"):
            mapping.read(2 * PAGE, 1)
        mapping.protect("rw")
        assert mapping.failed is None
        assert touch(array, 2 * PAGE, 5) == 5
        assert touch(array, 5 * PAGE + 99, 5) == 5
    assert path.read_bytes()[5 * PAGE + 99] == 5


def test_private_memory_keeps_what_it_holds_when_protected() -> None:
    with quire.map(size=2 * PAGE, sharing="private") as mapping:
        array = mapping.array
        array[:] = 7
        mapping.protect("r")
        with pytest.raises(quire.ProtectionError):
            touch(array, 3, 9)
        assert array[4] == 7
        mapping.protect("none")
        with pytest.raises(quire.ProtectionError):
            touch(array, PAGE)
        mapping.protect("rw")
        assert array[4:].sum() == 7 * (2 * PAGE - 4)


def test_protect_is_refused(path: Path) -> None:
    with quire.map(path, sharing="shared") as mapping:
        with pytest.raises(quire.Error, match="mprotect") as caught:
            mapping.protect("rw")
        assert caught.value.errno == errno.EACCES
        assert "open for reading only" in str(caught.value)
        assert 'protection="rw"' in str(caught.value)
        with pytest.raises(ValueError, match="no protection"):
            mapping.protect("?")
        with pytest.raises(ValueError, match="do not lie"):
            mapping.protect("r", 0, 1 << 30)


# Advice is for files and private anonymous memory, but for this.
FILE_ONLY = {"remove"}
MEMORY_ONLY = {"free", "wipeonfork"}
OF_A_HUGE_PAGE = {"collapse"}  # wholly inside
# What a kernel may be built without, and the folder of /sys/kernel/mm that it has otherwise.
CONFIGURED = {"mergeable": "ksm", "unmergeable": "ksm"}
CONFIGURED |= dict.fromkeys(("hugepage", "nohugepage"), "transparent_hugepage")
POISONS = {"hwpoison", "soft_offline"}


def given(mapping: quire.KernelMapping, advice: str) -> int | None:
    try:
        mapping.advise(advice)
    except quire.Error as error:
        return error.errno
    return None


@pytest.mark.parametrize("advice", sorted(set(ADVICE) - POISONS))
def test_every_advice(advice: str, path: Path) -> None:
    with (
        quire.map(path, sharing="shared", protection="rw") as file,
        quire.map(size=16 * PAGE, sharing="private") as memory,
    ):
        memory.array[:] = 1
        on_file, on_memory = given(file, advice), given(memory, advice)
        known = advice not in CONFIGURED or Path("/sys/kernel/mm", CONFIGURED[advice]).is_dir()
        nowhere = advice in OF_A_HUGE_PAGE or not known
        assert on_file == (errno.EINVAL if nowhere or advice in MEMORY_ONLY else None)
        assert on_memory == (errno.EINVAL if nowhere or advice in FILE_ONLY else None)


def test_collapsed_memory_keeps_what_it_holds() -> None:
    with quire.map(size="8 MiB", sharing="private") as memory:
        memory.array[:] = np.arange(8 << 20, dtype="u4").astype("u1")
        before = memory.array.sum()
        # EINVAL: no huge pages in this kernel; else none is free just now, or a page is in use.
        assert given(memory, "collapse") in {None, errno.EINVAL, errno.ENOMEM, errno.EAGAIN}
        assert memory.array.sum() == before


@pytest.mark.parametrize("advice", sorted(POISONS))
def test_poisoning_is_for_root_and_for_whole_pages(advice: str) -> None:
    """No page is poisoned here: it would be lost to the machine until it boots again."""
    known = "HardwareCorrupted" in Path("/proc/meminfo").read_text()  # CONFIG_MEMORY_FAILURE
    with quire.map(size=2 * PAGE, sharing="private") as mapping:
        mapping.array[:] = 7
        mapping.advise(advice, np.s_[PAGE - 5 : PAGE + 5])  # no page lies inside
        if os.geteuid() != 0 or not known:
            with pytest.raises(quire.Error) as caught:
                mapping.advise(advice)
            assert caught.value.errno == (errno.EPERM if known else errno.EINVAL)
            assert ("CAP_SYS_ADMIN" if known else "does not know") in str(caught.value)
        assert mapping.array.sum() == 7 * 2 * PAGE
        with pytest.raises(ValueError, match=r"no advice 'always'; there are: normal"):
            mapping.advise("always")


def test_what_advice_takes_away(path: Path) -> None:
    with quire.map(size=4 * PAGE, sharing="private") as memory:
        memory.array[:] = 1
        memory.advise("dontneed", np.s_[PAGE - 1 : 3 * PAGE - 1])  # one page lies inside
        assert memory.array.sum() == 3 * PAGE
        memory.advise("dontneed", np.s_[5:9])  # none does
        assert memory.array.sum() == 3 * PAGE
    with quire.map(path, sharing="shared", protection="rw") as file:
        file.advise("remove", np.s_[PAGE : 2 * PAGE])
        assert not file.array[PAGE : 2 * PAGE].any()
    assert path.read_bytes()[PAGE : 2 * PAGE] == bytes(PAGE)


def test_advice_to_a_part_of_a_failed_mapping(path: Path) -> None:
    """What has made it fail can be taken away again, by the index of the part."""
    with quire.map(size=4 * PAGE, sharing="private") as memory:
        part = np.s_[PAGE : 2 * PAGE]
        memory.advise("guard_install", part)
        with pytest.raises(quire.ProtectionError, match="guard page"):
            memory.read(PAGE, 1)
        assert memory.failed is not None
        with pytest.raises(quire.ProtectionError):
            memory.pin(part)
        assert not memory.resident(part).any()
        memory.advise("willneed", part)
        memory.advise("guard_remove", part)
        assert memory.read(PAGE, 1) == b"\0"


USERFAULTFD = {"x86_64": 323, "aarch64": 282}[platform.machine()]
UFFD_USER_MODE_ONLY, UFFDIO_API, UFFDIO_REGISTER = 1, 0xC018AA3F, 0xC020AA00


@contextmanager
def page_that_waits(address: int) -> Iterator[int]:
    """A page whose touch waits until the end (userfaultfd(2)); a descriptor that shows a touch."""
    libc = ctypes.CDLL(None, use_errno=True)
    waits = libc.syscall(USERFAULTFD, os.O_CLOEXEC | UFFD_USER_MODE_ONLY)
    assert waits >= 0, os.strerror(ctypes.get_errno())
    try:
        fcntl.ioctl(waits, UFFDIO_API, struct.pack("QQQ", 0xAA, 0, 0))
        fcntl.ioctl(waits, UFFDIO_REGISTER, struct.pack("QQQQ", address, PAGE, 1, 0))
        yield waits
    finally:
        os.close(waits)


CHANGES: dict[str, Callable[[quire.KernelMapping], object]] = {
    "unmap": lambda mapping: mapping.unmap(8 * PAGE, PAGE),
    "split": lambda mapping: mapping.split(8 * PAGE).close(),
    "seal": lambda mapping: mapping.seal(),
    "drop_descriptor": lambda mapping: mapping.drop_descriptor(),
    "resize": lambda mapping: mapping.resize(12 * PAGE),
    "protect": lambda mapping: mapping.protect("r"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_waits_for_a_call_lets_other_threads_go_on(change: str) -> None:
    """A change waits for a copy out of the mapping, which waits for the thread that makes both."""
    children.run(child_changes_beside_a_copy, change).check()


def child_changes_beside_a_copy(change: str) -> None:
    memory = os.memfd_create("waits", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.truncate(memory, 16 * PAGE)
    if change == "seal":
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    mapping = quire.map(memory, sharing="shared", protection="rw")
    begun = threading.Event()
    done: list[str] = []

    def read() -> None:
        assert mapping.read(3 * PAGE, 1) == b"\0"
        done.append("read")

    def change_it() -> None:
        begun.set()
        CHANGES[change](mapping)
        done.append(change)

    threads = [threading.Thread(target=read), threading.Thread(target=change_it)]
    with page_that_waits(mapping.address + 3 * PAGE) as waits:
        threads[0].start()
        assert os.read(waits, 32)  # the copy has met the page
        threads[1].start()
        begun.wait()
        wait_until(lambda: sleeps(threads[1]), "the change waits")
        assert done == []
    for thread in threads:
        thread.join()
    assert set(done) == {"read", change}
    os.close(memory)


def sleeps(thread: threading.Thread) -> bool:
    """Whether a thread stands in a futex of the system's, and has the interpreter lock or not."""
    stat = Path(f"/proc/self/task/{thread.native_id}/stat").read_text()
    return stat.rpartition(")")[2].split()[0] == "S"


def test_a_view_waits_while_another_thread_resizes() -> None:
    with quire.map(size=PAGE, sharing="private", reserve="64 MiB") as mapping:
        ended = threading.Event()
        said: list[BaseException] = []

        def look() -> None:
            try:
                while not ended.is_set():
                    assert memoryview(mapping)[0] == 0
            except BaseException as error:
                said.append(error)

        threads = [threading.Thread(target=look) for _ in range(2)]
        for thread in threads:
            thread.start()
        resizes = 0
        for number in range(20_000):
            try:
                mapping.resize((2 + number % 64) * PAGE)
            except BufferError:  # a view is alive, and it would shrink
                continue
            resizes += 1
        ended.set()
        for thread in threads:
            thread.join()
        assert not said
        assert resizes


def test_guard_pages_raise_until_they_go() -> None:
    with quire.map(size=4 * PAGE, sharing="private") as memory:
        array = memory.array
        array[:] = 1
        memory.advise("guard_install", np.s_[PAGE : 2 * PAGE])
        for _ in range(3):
            with pytest.raises(quire.ProtectionError, match="guard page"):
                touch(array, PAGE + 5)
        assert touch(array, 2 * PAGE) == 1
        memory.advise("guard_remove")
        assert touch(array, PAGE + 5) == 0


def test_fork_advice() -> None:
    wiped = quire.map(size=PAGE, sharing="private")
    hidden = quire.map(size=PAGE, sharing="private")
    wiped.array[:] = hidden.array[:] = 3
    arrays = wiped.array, hidden.array
    wiped.advise("wipeonfork")
    hidden.advise("dontfork")

    def look() -> None:
        assert arrays[0][0] == 0
        with pytest.raises(quire.PageIOError, match="child of a fork"):
            touch(arrays[1], 0)

    assert children.in_fork(look) == ""
    assert arrays[0][0] == arrays[1][0] == 3


def test_lock_unlock_and_pin(path: Path) -> None:
    with quire.map(path, sharing="shared") as mapping:
        before = locked_bytes()
        mapping.lock(PAGE - 1, 2)
        assert locked_bytes() - before == 2 * PAGE
        mapping.unlock()
        mapping.lock(on_fault=True)
        assert locked_bytes() - before == 16 * PAGE
        mapping.unlock()
        assert locked_bytes() == before
        first, second = mapping.pin(np.s_[: 2 * PAGE]), mapping.pin(np.s_[PAGE : 3 * PAGE])
        first.release()
        assert locked_bytes() - before == 2 * PAGE
        second.release()
        assert locked_bytes() == before
        mapping.prefetch().result()
        assert mapping.resident().all()


def locked_bytes() -> int:
    found = re.search(r"VmLck:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def write_beyond(mapping: quire.KernelMapping) -> None:
    ctypes.memset(mapping.address + PAGE, 1, 1)
    for _ in range(10):
        pass


@pytest.mark.parametrize("sharing", ["private", "shared"])
def test_anonymous_memory_grows_in_place_where_room_was_kept(sharing: str) -> None:
    with quire.map(size=PAGE, sharing=sharing, reserve="1 MiB") as mapping:
        assert mapping.reserved_bytes == 1 << 20
        view, address = memoryview(mapping), mapping.address
        view[0] = 5
        mapping.resize("1 MiB")
        assert (mapping.address, len(mapping), mapping.size_bytes) == (address, 1 << 20, 1 << 20)
        array = mapping.array
        array[-1] = 6
        assert (view[0], array[0], array[-1], len(view)) == (5, 5, 6, PAGE)
        with pytest.raises(BufferError, match="reserve="):
            mapping.resize("2 MiB")
        with pytest.raises(BufferError, match="views"):
            mapping.resize(PAGE)
        del array
        view.release()
        mapping.resize(PAGE)
        with pytest.raises(quire.PageIOError, match="held for its growth"):
            write_beyond(mapping)
        mapping.resize(3 * PAGE)
        assert mapping.read(PAGE, 1) == b"\0"


@pytest.mark.parametrize("sharing", ["private", "shared"])
def test_anonymous_memory_moves_when_it_must(sharing: str) -> None:
    with quire.map(size=PAGE, sharing=sharing) as mapping:
        mapping.array[:] = 5
        mapping.resize("8 MiB")
        assert mapping.array[:PAGE].sum() == 5 * PAGE
        mapping.array[-1] = 6
        mapping.resize(2 * PAGE)
        assert mapping.array.sum() == 5 * PAGE
        with pytest.raises(ValueError, match="at least one byte"):
            mapping.resize(0)


def test_a_file_grows_with_its_mapping(path: Path) -> None:
    size = path.stat().st_size
    with quire.map(path, sharing="shared", protection="rw", offset=3) as mapping:
        mapping.resize(size + 100)
        mapping.array[-1] = 9
        mapping.resize(10)
        assert mapping.read() == b"\1" * 10
    assert path.stat().st_size == size + 103
    assert path.read_bytes()[-1] == 9
    with quire.map(path, 10, sharing="shared", dtype="u2", reserve=size) as reader:
        array = reader.array
        reader.resize(size)
        assert len(reader.array) == size // 2
        assert array[0] == 0x101
    assert path.stat().st_size == size + 103


@pytest.mark.parametrize("reserve", [None, "1 MiB"])
@pytest.mark.parametrize("sharing", ["shared", "private"])
def test_a_mapping_of_an_empty_file_grows(
    tmp_path: Path, sharing: str, reserve: str | None
) -> None:
    path = tmp_path / "empty.bin"
    path.write_bytes(b"")
    with quire.map(path, sharing=sharing, protection="rw", reserve=reserve) as mapping:
        assert mapping.array.size == 0
        assert mapping.sharing == sharing
        if sharing == "private":
            os.truncate(path, 3 * PAGE)  # a private mapping does not make its file longer
        for size in (100, PAGE, 3 * PAGE):
            mapping.resize(size)
            mapping.array[size - 1] = 7
        assert int(mapping.array.sum()) == 21
    written = path.read_bytes()
    assert len(written) == 3 * PAGE
    assert sum(written) == (21 if sharing == "shared" else 0)


def test_parts_that_differ_are_not_moved() -> None:
    with quire.map(size=4 * PAGE, sharing="private") as mapping:
        mapping.array[:] = 5
        mapping.protect("r", 0, PAGE)
        with pytest.raises(quire.Error, match=r"Parts of .*reserve=") as caught:
            mapping.resize("64 MiB")
        assert caught.value.errno == errno.EFAULT
        assert mapping.size_bytes == 4 * PAGE
        assert mapping.read() == b"\5" * (4 * PAGE)
        mapping.protect("rw")
        mapping.resize("64 MiB")
        assert mapping.read(0, 5 * PAGE) == b"\5" * (4 * PAGE) + bytes(PAGE)


def test_split(path: Path) -> None:
    mapping = quire.map(path, sharing="shared", protection="rw", offset=PAGE // 2)
    with pytest.raises(ValueError, match="no boundary"):
        mapping.split(PAGE)
    array = mapping.array
    with pytest.raises(BufferError, match="split"):
        mapping.split(PAGE // 2)
    del array
    rest = mapping.split(PAGE + PAGE // 2)
    assert (len(mapping), rest.offset) == (PAGE + PAGE // 2, 2 * PAGE)
    assert (mapping.array[-1], rest.array[0]) == (2, 3)
    mapping.close()
    rest.array[0] = 77
    with pytest.raises(quire.ClosedError):
        _ = mapping.array
    assert rest.read(0, 2) == b"\x4d\3"
    rest.close()
    assert path.read_bytes()[2 * PAGE] == 77


def test_unmap_of_a_part(path: Path) -> None:
    with quire.map(path, sharing="shared") as mapping:
        array, address = mapping.array, mapping.address
        with pytest.raises(ValueError, match="no whole pages"):
            mapping.unmap(5, PAGE)
        mapping.unmap(4 * PAGE, 2 * PAGE)
        with pytest.raises(quire.PageIOError, match="was unmapped") as caught:
            touch(array, 4 * PAGE + 5)
        assert caught.value.offset == 4 * PAGE + 5
        assert (touch(array, 4 * PAGE - 1), touch(array, 6 * PAGE)) == (4, 7)
        with pytest.raises(BufferError):
            mapping.unmap()
        del array, caught  # its traceback has the array
    assert not is_mapped(address + 4 * PAGE)


def kernel_names_memory() -> bool:
    """Asks the kernel itself (CONFIG_ANON_VMA_NAME), by the bare call."""
    with mmap.mmap(-1, PAGE) as page:
        address = ctypes.addressof(ctypes.c_char.from_buffer(page))
        return ctypes.CDLL(None).prctl(0x53564D41, 0, ctypes.c_ulong(address), PAGE, b"probe") == 0


def test_names(path: Path) -> None:
    with quire.map(size=PAGE, sharing="private") as memory:
        if kernel_names_memory():
            memory.name("quire test")
            assert "[anon:quire test]" in Path("/proc/self/maps").read_text()
            memory.name(None)
            assert "[anon:quire test]" not in Path("/proc/self/maps").read_text()
        else:
            with pytest.raises(quire.Error, match="CONFIG_ANON_VMA_NAME"):
                memory.name("quire test")
        with pytest.raises(quire.Error, match="79 printable"):
            memory.name("a$b")
    with quire.map(path, sharing="shared") as file, pytest.raises(quire.Error):
        file.name("file")


def test_numa_placement() -> None:
    with quire.map(size=8 * PAGE, sharing="private") as memory:
        memory.bind([0])
        memory.array[:] = 1
        memory.bind([0], "interleave", move=True)
        memory.bind([], "local")
        memory.bind([], "default")
        with pytest.raises(quire.Error, match="No such node") as caught:
            memory.bind([63])
        assert caught.value.errno == errno.EINVAL
        with pytest.raises(ValueError, match="no policy"):
            memory.bind([0], "near")
        with pytest.raises(ValueError, match="from 0 to 63"):
            memory.bind([64])


def test_seal(path: Path) -> None:
    children.run(child_seals, path).check()


def child_seals(path: str) -> None:
    """In a process of its own: what is sealed stays mapped to its end."""
    memory = quire.map(size=PAGE, sharing="private")
    memory.array[:] = 3
    memory.seal()
    assert memory.sealed
    for change in (lambda: memory.protect("r"), lambda: memory.unmap(0, PAGE)):
        with pytest.raises(quire.Error, match="sealed") as caught:
            change()
        assert caught.value.errno == errno.EPERM
    address = memory.address
    memory.close()
    assert is_mapped(address)
    with (
        quire.map(path, sharing="shared") as file,
        pytest.raises(ValueError, match="F_SEAL_SHRINK"),
    ):
        file.seal()


def test_the_end(path: Path) -> None:
    mapping = quire.map(path, sharing="shared")
    array, address = mapping.array, mapping.address
    with pytest.raises(BufferError, match="view"):
        mapping.close()
    with mapping:
        pass
    assert array[0] == 1
    assert not mapping.closed
    del array
    assert mapping.closed
    mapping.close()
    assert not is_mapped(address)
    calls: tuple[Callable[[], object], ...] = (
        mapping.sync,
        mapping.lock,
        mapping.unlock,
        mapping.seal,
        lambda: mapping.read(0, 1),
        lambda: mapping.advise("random"),
        lambda: mapping.protect("none"),
        lambda: mapping.resize(PAGE),
        lambda: mapping.split(PAGE),
        lambda: mapping.unmap(0, PAGE),
        lambda: mapping.name("closed"),
        lambda: mapping.set_budget("1 MiB"),
    )
    for call in calls:
        with pytest.raises(quire.ClosedError, match="make it again"):
            call()
    mapping.check()
    with pytest.raises(BufferError, match="closed"):
        memoryview(mapping)


if __name__ == "__main__":
    children.main()
