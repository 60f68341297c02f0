"""One process of a row on the real kernel: does operations by raw system calls and real accesses.

Runs in a forked child of the test, never in the test's own process.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import itertools
import os
import re
import resource
import signal
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.model import flags as f
from quire.model.file_object import SEALS
from quire.testing.replay.model_world import (
    ARENA,
    ARENA_PAGES,
    action_of,
    bits,
    malformed,
    protection,
)
from quire.testing.replay.native import Fault, helper
from quire.testing.replay.rows import PAGE, Missing, Names, digest, page_token, stored_bytes

if TYPE_CHECKING:
    from quire.testing.replay.rows import Op, Outcome

__all__ = ["KernelProcess"]

ARENA_END = ARENA + ARENA_PAGES * PAGE
_NUMBERS = {
    "mmap": 9, "mprotect": 10, "munmap": 11, "mremap": 25, "msync": 26, "mincore": 27,
    "madvise": 28,
    "mlock": 149, "munlock": 150, "mlockall": 151, "munlockall": 152, "remap_file_pages": 216,
    "mlock2": 325, "mseal": 462, "capget": 125, "capset": 126, "fallocate": 285,
    "pread": 17, "pwrite": 18, "write": 1,
}  # fmt: skip
"""x86-64's."""
_SEGV = {1: "SEGV_MAPERR", 2: "SEGV_ACCERR", 128: "SI_KERNEL"}
_BUS = {1: "BUS_ADRALN", 2: "BUS_ADRERR", 3: "BUS_OBJERR", 4: "BUS_MCEERR_AR"}
_ERRNO = {**errno.errorcode, 95: "EOPNOTSUPP"}
_LIMITS = {
    "AS": resource.RLIMIT_AS,
    "DATA": resource.RLIMIT_DATA,
    "MEMLOCK": resource.RLIMIT_MEMLOCK,
    "STACK": resource.RLIMIT_STACK,
}
_USES = {"AS": "VmSize", "DATA": "VmData", "MEMLOCK": "VmLck"}
_MODES = {
    "r": os.O_RDONLY,
    "w": os.O_WRONLY,
    "rw": os.O_RDWR,
    "append": os.O_RDWR | os.O_APPEND,
    "path": os.O_PATH,
}
_FILLED_FROM = 0x2000_0000_0000
_SLACK_BLOCKS, _SLACK_EVERY = 40_000, 2_000
_CAPABILITIES = {"IPC_LOCK": 14, "SYS_RAWIO": 17}
_F_ADD_SEALS = 1033


class KernelProcess:
    """`paths` says where the row's files are."""

    def __init__(self, paths: dict[str, str]) -> None:
        self.paths = paths
        self.names = {os.stat(path).st_ino: name for name, path in paths.items()}  # noqa: PTH116
        self.variables: Names[int] = Names()
        self.fds: Names[int] = Names()
        self.native = helper()

    def do(self, op: Op) -> Outcome:
        """The outcome of one operation."""
        try:
            return action_of(self, op)(Names(op))
        except Missing as error:
            return malformed(op, error)
        except OSError as error:
            return {"err": _ERRNO[error.errno or 0]}

    # Addresses and outcomes.

    def _address(self, at: Any) -> int:
        if at is None:
            return 0
        if isinstance(at, int):
            return ARENA + at
        if isinstance(at, str):
            return self.variables[at]
        if "abs" in at:
            return int(at["abs"])
        return self.variables[Names(at)["var"]] + int(at.get("delta", 0))

    def _relative(self, address: int) -> Any:
        if ARENA <= address < ARENA_END + PAGE:
            return address - ARENA
        for name, value in self.variables.items():
            if value <= address < value + (1 << 21):
                return {"var": name, "delta": address - value}
        return {"abs": address} if address < 1 << 20 else "elsewhere"

    def _call(self, name: str, *arguments: int) -> int:
        signed = [(value + (1 << 63)) % (1 << 64) - (1 << 63) for value in arguments]
        signed += [0] * (6 - len(signed))
        return int(self.native.touch_syscall(_NUMBERS[name], *signed))

    def _answer(self, answer: int, op: Op | None = None) -> Outcome:
        """An errno, a number, or with `op` an address."""
        if -4096 < answer < 0:
            return {"err": _ERRNO[-answer]}
        if op is None:
            return {"ok": answer}
        if op.get("as"):
            self.variables[op["as"]] = answer
        if ARENA <= answer < ARENA_END:
            return {"ok": {"at": answer - ARENA}}
        return {"ok": {"abs": answer} if answer < 1 << 20 else "elsewhere"}

    def _ranged(self, op: Op, *more: int) -> Outcome:
        return self._answer(self._call(op["op"], self._address(op["at"]), op["len"], *more))

    # Mapping calls.

    def _mmap(self, op: Op) -> Outcome:
        fd = op.get("fd", -1)
        number = self.fds[fd] if isinstance(fd, str) else fd
        flags = bits(f.MAP, op["flags"])
        at, prot = self._address(op.get("at")), protection(op["prot"])
        return self._answer(
            self._call("mmap", at, op["len"], prot, flags, number, op.get("off", 0)), op
        )

    def _munmap(self, op: Op) -> Outcome:
        return self._ranged(op)

    def _mprotect(self, op: Op) -> Outcome:
        return self._ranged(op, protection(op["prot"]))

    def _mremap(self, op: Op) -> Outcome:
        at, to = self._address(op["at"]), self._address(op.get("to"))
        flags = bits(f.MREMAP, op.get("flags", 0))
        return self._answer(self._call("mremap", at, op["old"], op["new"], flags, to), op)

    def _msync(self, op: Op) -> Outcome:
        return self._ranged(op, bits(f.MS, op["flags"]))

    def _madvise(self, op: Op) -> Outcome:
        advice = bits(f.MADV, op["advice"])
        assert advice not in (f.MADV["HWPOISON"], f.MADV["SOFT_OFFLINE"]), "would break real memory"
        return self._ranged(op, advice)

    def _mincore(self, op: Op) -> Outcome:
        count = max(1, -(-op["len"] // PAGE)) if op["len"] < 1 << 30 else 1
        vector = (ctypes.c_ubyte * count)()
        place = {"bad": 8, "null": 0}.get(op.get("vec", ""), ctypes.addressof(vector))
        start = self._address(op["at"])
        answer = self._call("mincore", start, op["len"], place)
        if answer < 0 or op["len"] == 0:
            return self._answer(answer)
        shown = [
            "?" if self._is_cached(start + i * PAGE) and not op.get("files") else str(bit & 1)
            for i, bit in enumerate(vector)
        ]
        return {"vec": "".join(shown)}

    def _is_cached(self, address: int) -> bool:
        """Whether what is in memory there is a cache's matter: a row's file, shared huge pages.

        (Of those, mincore looks at the file where the process has no page table, else at that.)
        """
        for low, high, permissions, _, inode, path in _raw_maps():
            if low <= address < high:
                shared_huge = permissions[3] == "s" and path.startswith("/anon_hugepage")
                return shared_huge or inode in self.names
        return False

    def _mlock(self, op: Op) -> Outcome:
        return self._ranged(op)

    def _mlock2(self, op: Op) -> Outcome:
        return self._ranged(op, op["flags"])

    def _munlock(self, op: Op) -> Outcome:
        return self._ranged(op)

    def _mlockall(self, op: Op) -> Outcome:
        return self._answer(self._call("mlockall", op["flags"]))

    def _munlockall(self, op: Op) -> Outcome:
        return self._answer(self._call("munlockall"))

    def _remap_file_pages(self, op: Op) -> Outcome:
        return self._ranged(op, op.get("prot", 0), op["pgoff"], op.get("flags", 0))

    def _mseal(self, op: Op) -> Outcome:
        return self._ranged(op, op.get("flags", 0))

    # Accesses.

    def _signal(self, fault: Fault) -> Outcome:
        number = signal.Signals(fault.signal)
        codes = _SEGV if number is signal.SIGSEGV else _BUS
        outcome: Outcome = {
            "sig": number.name,
            "code": codes.get(fault.code, str(fault.code)),
            "at": self._relative(fault.address),
        }
        if fault.done:
            outcome["done"] = fault.done
        return outcome

    def _load(self, op: Op) -> Outcome:
        count, fault = op.get("n", 1), Fault()
        into = ctypes.create_string_buffer(count)
        if self.native.touch_load(self._address(op["at"]), count, into, fault):
            return self._signal(fault)
        return digest(into.raw)

    def _store(self, op: Op) -> Outcome:
        content, fault = stored_bytes(op), Fault()
        if self.native.touch_store(self._address(op["at"]), len(content), content, fault):
            return self._signal(fault)
        return {"ok": len(content)}

    def _exec(self, op: Op) -> Outcome:
        fault = Fault()
        if self.native.touch_call(self._address(op["at"]), fault):
            return self._signal(fault)
        return {"ok": 0}

    def _snapshot(self, op: Op) -> Outcome:
        tokens, fault = [], Fault()
        into = ctypes.create_string_buffer(PAGE)
        for number in range(op["page"], op["page"] + op["pages"]):
            caught = self.native.touch_load(ARENA + number * PAGE, PAGE, into, fault)
            if caught == signal.SIGSEGV:
                tokens.append("U" if fault.code == 1 else "N")
            else:
                tokens.append("B" if caught == signal.SIGBUS else page_token(into.raw))
        return {"pages": " ".join(tokens)}

    # Files.

    def _open(self, op: Op) -> Outcome:
        path = self.paths.get(op["file"], op["file"])
        self.fds[op["fd"]] = os.open(str(path), Names(_MODES)[op["mode"]])
        return {"ok": 0}

    def _pipe(self, op: Op) -> Outcome:
        self.fds[op["r"]], self.fds[op["w"]] = os.pipe()
        return {"ok": 0}

    def _close(self, op: Op) -> Outcome:
        os.close(self.fds[op["fd"]])
        del self.fds[op["fd"]]
        return {"ok": 0}

    def _pread(self, op: Op) -> Outcome:
        if not op["n"]:
            return {"ok": 0}
        return digest(os.pread(self.fds[op["fd"]], op["n"], op["off"]))

    def _pwrite(self, op: Op) -> Outcome:
        return {"ok": os.pwrite(self.fds[op["fd"]], stored_bytes(op), op["off"])}

    def _ftruncate(self, op: Op) -> Outcome:
        os.ftruncate(self.fds[op["fd"]], op["size"])
        return {"ok": 0}

    def _punch(self, op: Op) -> Outcome:
        punch_and_keep_size = 3
        fd = self.fds[op["fd"]]
        return self._answer(self._call("fallocate", fd, punch_and_keep_size, op["off"], op["n"]))

    def _seal(self, op: Op) -> Outcome:
        fcntl.fcntl(self.fds[op["fd"]], _F_ADD_SEALS, sum(SEALS[name] for name in op["seals"]))
        return {"ok": 0}

    def _fsize(self, op: Op) -> Outcome:
        return {"ok": os.fstat(self.fds[op["fd"]]).st_size}

    def _fhash(self, op: Op) -> Outcome:
        size = os.fstat(self.fds[op["fd"]]).st_size
        content = os.pread(self.fds[op["fd"]], size, 0)
        return {"size": size, "sha1": hashlib.sha1(content).hexdigest()[:16]}

    def _unlink(self, op: Op) -> Outcome:
        Path(self.paths[op["file"]]).unlink()
        return {"ok": 0}

    def _read_into(self, op: Op) -> Outcome:
        at = self._address(op["at"])
        return self._answer(self._call("pread", self.fds[op["fd"]], at, op["n"], op["off"]))

    def _write_from(self, op: Op) -> Outcome:
        at = self._address(op["at"])
        return self._answer(self._call("pwrite", self.fds[op["fd"]], at, op["n"], op["off"]))

    def _pipe_write_from(self, op: Op) -> Outcome:
        return self._answer(
            self._call("write", self.fds[op["fd"]], self._address(op["at"]), op["n"])
        )

    # Views, limits, privileges.

    def _maps(self, op: Op) -> Outcome:
        vmas = []
        for low, high, permissions, offset, inode, path in _raw_maps():
            if low >= ARENA and high <= ARENA_END:
                name = self._name(inode, path)
                place = (low - ARENA) // PAGE
                vmas.append([place, (high - low) // PAGE, permissions, offset if name else 0, name])
        return {"vmas": vmas}

    def _name(self, inode: int, path: str) -> str | None:
        if inode in self.names:
            return self.names[inode]
        if path == "/dev/zero (deleted)":
            return "shm"  # a shared anonymous object
        return path.split(" ")[0] if path else None

    def _vmlck(self, op: Op) -> Outcome:
        return {"ok": _status("VmLck")}

    def _diff(self, op: Op) -> Outcome:
        return {"ok": self.variables[op["a"]] - self.variables[op["b"]]}

    def _mod(self, op: Op) -> Outcome:
        return {"ok": self.variables[op["a"]] % op["n"]}

    def _below(self, op: Op) -> Outcome:
        return {"ok": self.variables[op["a"]] + op.get("len", 0) <= op["limit"]}

    def _settle(self, op: Op) -> Outcome:
        """Plugs the small holes of the area where mappings go, so that placement is determined."""
        area = [line for line in _raw_maps() if 0x7 << 44 < line[0] < 1 << 47]
        flags = bits(f.MAP, ["FIXED_NOREPLACE", "PRIVATE", "ANON", "NORESERVE"])
        for below, above in itertools.pairwise(area):
            if below[1] < above[0] and not above[5].startswith("[stack"):
                self._call("mmap", below[1], above[0] - below[1], 0, flags, -1, 0)
        return {"ok": 0}

    def _setrlimit(self, op: Op) -> Outcome:
        number = Names(_LIMITS)[op["res"]]
        cur = op["cur"] if "cur" in op else _status(Names(_USES)[op["res"]]) + op["cur_plus"]
        resource.setrlimit(number, (cur, resource.getrlimit(number)[1]))
        return {"ok": 0}

    def _dropcap(self, op: Op) -> Outcome:
        number = Names(_CAPABILITIES)[op["cap"]]
        header = ctypes.create_string_buffer(struct.pack("Ii", 0x2008_0522, 0))
        data = ctypes.create_string_buffer(24)
        self._call("capget", ctypes.addressof(header), ctypes.addressof(data))
        effective, *rest = struct.unpack("6I", data.raw)
        data.raw = struct.pack("6I", effective & ~(1 << number), *rest)
        return self._answer(self._call("capset", ctypes.addressof(header), ctypes.addressof(data)))

    def _fill_map_count(self, op: Op) -> Outcome:
        """Makes mappings far from the arena until there are max_map_count - spare.

        As many as the kernel grants (it refuses when there are more than the limit), less what is
        to spare. The interpreter keeps memory of its own in hand, for it would get none later.
        """
        self._slack = [bytes(256) for _ in range(_SLACK_BLOCKS)][::_SLACK_EVERY]
        flags = bits(f.MAP, ["FIXED", "PRIVATE", "ANON"])
        place = _FILLED_FROM
        while self._call("mmap", place, PAGE, f.PROT_READ, flags, -1, 0) >= 0:
            place += 2 * PAGE
        for _ in range(op["spare"] + 1):
            place -= 2 * PAGE
            self._call("munmap", place, PAGE)
        return {"ok": 0}


def _raw_maps() -> list[tuple[int, int, str, int, int, str]]:
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        match = re.match(r"([0-9a-f]+)-([0-9a-f]+) (\S+) ([0-9a-f]+) \S+ (\d+)\s*(.*)", line)
        assert match is not None
        low, high, permissions, offset, inode, path = match.groups()
        found.append((int(low, 16), int(high, 16), permissions, int(offset, 16), int(inode), path))
    return found


def _status(name: str) -> int:
    """A size of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)
