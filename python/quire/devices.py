"""How long a device is that says so in a way of its own; the core asks files and block devices."""

from __future__ import annotations

import fcntl
import struct
from pathlib import Path

__all__ = ["device_bytes"]

FBIOGET_FSCREENINFO = 0x4602
FIX_SCREENINFO = struct.Struct("16s L I 3I 3H I L I I 2H")  # struct fb_fix_screeninfo, linux/fb.h
UIO = Path("/sys/class/uio")


def device_bytes(path: str) -> int | None:
    """The bytes of a framebuffer or a UIO region by its path; None for any other path.

    None also for one that cannot be asked: to open it then says why.

    >>> device_bytes("/dev/zero")
    """
    name = Path(path).name
    if name.startswith("uio"):
        size = UIO / name / "maps/map0/size"
        return int(size.read_text(), 16) if size.exists() else None
    if not name.startswith("fb"):
        return None
    try:
        with open(path, "rb") as device:
            found = fcntl.ioctl(device, FBIOGET_FSCREENINFO, bytes(FIX_SCREENINFO.size))
    except OSError:
        return None
    return int(FIX_SCREENINFO.unpack(found)[2])
