"""What of the kernel's mapping only root can arrange: devices, full disks, huge pages, cgroups."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """These tests arrange what needs root; what they test needs none, and runs in contract too."""
    if os.geteuid() != 0:
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="arranges devices and mounts: root only"))


def run(*command: str) -> str:
    """The output of a command that must succeed."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def loop_device(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A loop device of 1 MiB and the file behind it."""
    image = tmp_path / "image"
    image.write_bytes(b"\3" * (1 << 20))
    device = run("losetup", "--find", "--show", str(image))
    yield device, image
    run("losetup", "--detach", device)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder))
    yield folder
    run("umount", "--lazy", str(folder))


@pytest.fixture
def small_ext4(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 MiB whose page cache has large folios."""
    folder, image = tmp_path / "ext4", tmp_path / "image"
    folder.mkdir()
    image.touch()
    os.truncate(image, 32 << 20)
    run("mkfs.ext4", "-q", "-F", str(image))
    run("mount", "-o", "loop", str(image), str(folder))
    yield folder
    run("umount", "--lazy", str(folder))


@pytest.fixture
def failing_disk(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A file system, and the folder of what is behind it: when that is full, writing back fails."""
    folder, behind = tmp_path / "failing", tmp_path / "behind"
    folder.mkdir()
    behind.mkdir()
    with contextlib.ExitStack() as stack:
        run("mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(behind))
        stack.callback(run, "umount", "--lazy", str(behind))
        image = behind / "image"
        with image.open("wb") as file:
            file.truncate(64 << 20)
        run("mkfs.ext2", "-q", "-F", str(image))
        device = run("losetup", "--find", "--show", str(image))
        stack.callback(run, "losetup", "--detach", device)
        run("mount", device, str(folder))
        stack.callback(run, "umount", "--lazy", str(folder))
        yield folder, behind
