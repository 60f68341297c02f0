"""The world of a row on the model: named processes, files and descriptors around a `Machine`."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from quire.model import AddressSpace, CallError, Machine, OpenFile, Signalled
from quire.model import flags as f
from quire.model.invariants import check
from quire.model.views import maps
from quire.testing.replay.rows import Missing, Names, digest, page_token, pattern, stored_bytes
from quire.testing.replay.scale import Scale

if TYPE_CHECKING:
    from collections.abc import Callable

    from quire.model import FileObject, Geometry
    from quire.testing.replay.rows import Op, Outcome, Row

__all__ = ["ModelWorld"]

ARENA = 0x1000_0000_0000
ARENA_PAGES = 4096
_WORD = 1 << 64
_LOW = 1 << 20
_NEAR_VARIABLE = 1 << 21
_USUAL_LIMIT = 8 << 20
"""RLIMIT_STACK and RLIMIT_MEMLOCK, unless a row sets them."""
_MODES = {
    "r": (True, False),
    "w": (False, True),
    "rw": (True, True),
    "append": (True, True),
    "path": (True, True),
}


OPERATIONS = frozenset(
    """
    mmap munmap mprotect mremap msync madvise mincore mlock munlock mlock2 mlockall munlockall
    remap_file_pages mseal load store exec snapshot open pipe close pread pwrite ftruncate punch
    fsize fhash unlink seal read_into write_from pipe_write_from maps vmlck diff below mod setrlimit
    dropcap fill_map_count settle fork exit
    """.split()  # noqa: SIM905 - as a list it would fill a page
)


def bits(names: dict[str, int], value: Any) -> int:
    """Flags given as a number, a name, or a list of these."""
    if isinstance(value, int):
        return value
    total = 0
    for part in value if isinstance(value, list) else [value]:
        total |= part if isinstance(part, int) else Names(names)[part]
    return total


def protection(value: Any) -> int:
    """A protection given as letters or as a number."""
    if isinstance(value, int):
        return value
    letters = Names({"r": f.PROT_READ, "w": f.PROT_WRITE, "x": f.PROT_EXEC})
    return sum(letters[letter] for letter in value)


def action_of(world: object, op: Op) -> Callable[[Op], Outcome]:
    """The method for an operation.

    Raises:
        Missing: there is no such operation.
    """
    action: Callable[[Op], Outcome] | None = getattr(world, f"_{op['op']}", None)
    if action is None or op["op"] not in OPERATIONS:
        raise Missing(op["op"])
    return action


def malformed(op: Op, error: Missing) -> Outcome:
    """The outcome of an operation that the format does not know, or that lacks something."""
    what = error.args[0]
    if what == op["op"]:
        return {"harness": f"there is no operation {what!r}"}
    return {"harness": f"{op['op']}: no {what!r}, which is needed or must be made before"}


class Process:
    """A process of a row: its address space, and its copy of variables and descriptors."""

    def __init__(
        self, space: AddressSpace, variables: dict[str, int], files: dict[str, OpenFile]
    ) -> None:
        self.space = space
        self.variables = Names(variables)
        self.files = Names(files)


class ModelWorld:
    """Does one row's operations on a fresh machine. With `checked`, invariants after each."""

    def __init__(self, row: Row, machine: Machine, *, checked: bool = False) -> None:
        self.row = row
        self.machine = machine
        self.checked = checked
        self.scale = Scale(machine.geometry)
        self.files: dict[str, FileObject] = {}
        self.unlinked: set[str] = set()
        for name, file in row.files.items():
            content = self.scale.stretch(_content(file))
            self.files[name] = machine.file(name, content, on_disk=row.on_disk)
        space = AddressSpace(machine)
        for name in ("STACK", "MEMLOCK"):
            space.limits[name] = self.scale.up(_USUAL_LIMIT)
        self.processes = Names({"p0": Process(space, {}, {})})
        self.p = self.processes["p0"]

    @property
    def geometry(self) -> Geometry:
        """How the machine translates."""
        return self.machine.geometry

    def do(self, op: Op) -> Outcome:
        """The outcome of one operation."""
        try:
            self.p = self.processes[op.get("proc", "p0")]
            outcome = action_of(self, op)(Names(op))
        except Missing as error:
            return malformed(op, error)
        except CallError as error:
            outcome = {"err": error.errno}
        except Signalled as signal:
            outcome = self._signal(signal)
        if self.checked:
            check(self.machine)
        return outcome

    # Addresses and outcomes.

    def _address(self, at: Any) -> int:
        if at is None:
            return 0
        if isinstance(at, int):
            return ARENA + self.scale.up(at)
        if isinstance(at, str):
            return self.p.variables[at]
        if "abs" in at:
            return self._word(at["abs"])
        return self.p.variables[Names(at)["var"]] + self.scale.up(at.get("delta", 0))

    def _relative(self, address: int) -> Any:
        if ARENA <= address < ARENA + (ARENA_PAGES + 1) * self.geometry.page_size:
            return self.scale.down(address - ARENA)
        for name, value in self.p.variables.items():
            if value <= address < value + _NEAR_VARIABLE * self.scale.factor:
                return {"var": name, "delta": self.scale.down(address - value)}
        if address < _LOW * self.scale.factor:
            return {"abs": self.scale.down(address)}
        return "elsewhere"

    def _place(self, op: Op, address: int) -> Outcome:
        if op.get("as"):
            self.p.variables[op["as"]] = address
        if ARENA <= address < ARENA + ARENA_PAGES * self.geometry.page_size:
            return {"ok": {"at": self.scale.down(address - ARENA)}}
        if address < _LOW * self.scale.factor:
            return {"ok": {"abs": self.scale.down(address)}}
        return {"ok": "elsewhere"}

    def _signal(self, signal: Signalled) -> Outcome:
        outcome: Outcome = {
            "sig": signal.signal,
            "code": signal.code,
            "at": self._relative(signal.address),
        }
        if signal.done:
            outcome["done"] = self.scale.down(signal.done)
        return outcome

    def _range(self, op: Op) -> tuple[int, int]:
        return self._address(op["at"]), self._word(op["len"])

    def _word(self, value: int) -> int:
        """An argument of a system call, in the 64 bits of a register."""
        return self.scale.up(value) % _WORD

    def _fd(self, op: Op) -> OpenFile:
        return self.p.files[op["fd"]]

    # Mapping calls.

    def _mmap(self, op: Op) -> Outcome:
        fd = op.get("fd")
        file = self.p.files.get(fd) if isinstance(fd, str) else None
        address = self.p.space.mmap(
            self._address(op.get("at")),
            self._word(op["len"]),
            protection(op["prot"]),
            bits(f.MAP, op["flags"]),
            file,
            self._word(op.get("off", 0)),
        )
        return self._place(op, address)

    def _munmap(self, op: Op) -> Outcome:
        self.p.space.munmap(*self._range(op))
        return {"ok": 0}

    def _mprotect(self, op: Op) -> Outcome:
        self.p.space.mprotect(*self._range(op), protection(op["prot"]))
        return {"ok": 0}

    def _mremap(self, op: Op) -> Outcome:
        address = self.p.space.mremap(
            self._address(op["at"]),
            self._word(op["old"]),
            self._word(op["new"]),
            bits(f.MREMAP, op.get("flags", 0)),
            self._address(op.get("to")),
        )
        return self._place(op, address)

    def _msync(self, op: Op) -> Outcome:
        self.p.space.msync(*self._range(op), bits(f.MS, op["flags"]))
        return {"ok": 0}

    def _madvise(self, op: Op) -> Outcome:
        self.p.space.madvise(*self._range(op), bits(f.MADV, op["advice"]))
        return {"ok": 0}

    def _mincore(self, op: Op) -> Outcome:
        start, length = self._range(op)
        bad = op.get("vec") in ("bad", "null")
        if bad and length:
            self.p.space.mincore(start, min(length, 1))  # answers are copied out VMA by VMA
        resident = [] if bad else self.p.space.mincore(start, length)
        if length == 0:
            return {"ok": 0}
        if bad:
            raise CallError("EFAULT", "the vector is not writable memory")
        page = self.geometry.page_size
        shown = [
            "?" if self._is_cached(start + i * page) and not op.get("files") else str(int(here))
            for i, here in enumerate(resident)
        ]
        return {"vec": "".join(shown)}

    def _is_cached(self, address: int) -> bool:
        """Whether what is in memory there is a cache's matter: a row's file, shared huge pages."""
        vma = self.p.space.vmas.find(address)
        if vma is None:
            return False
        shared_huge = vma.flags & f.HUGETLB and not vma.private
        return bool(shared_huge) or any(vma.object is file for file in self.files.values())

    def _mlock(self, op: Op) -> Outcome:
        self.p.space.mlock(*self._range(op))
        return {"ok": 0}

    def _mlock2(self, op: Op) -> Outcome:
        self.p.space.mlock2(*self._range(op), op["flags"])
        return {"ok": 0}

    def _munlock(self, op: Op) -> Outcome:
        self.p.space.munlock(*self._range(op))
        return {"ok": 0}

    def _mlockall(self, op: Op) -> Outcome:
        self.p.space.mlockall(op["flags"])
        return {"ok": 0}

    def _munlockall(self, op: Op) -> Outcome:
        self.p.space.munlockall()
        return {"ok": 0}

    def _remap_file_pages(self, op: Op) -> Outcome:
        self.p.space.remap_file_pages(*self._range(op), op.get("prot", 0), op["pgoff"])
        return {"ok": 0}

    def _mseal(self, op: Op) -> Outcome:
        self.p.space.mseal(*self._range(op), op.get("flags", 0))
        return {"ok": 0}

    # Accesses.

    def _load(self, op: Op) -> Outcome:
        count = self.scale.up(op.get("n", 1))
        return digest(self.scale.shrink(self.p.space.load(self._address(op["at"]), count)))

    def _store(self, op: Op) -> Outcome:
        content = stored_bytes(op)
        self.p.space.store(self._address(op["at"]), self.scale.stretch(content))
        return {"ok": len(content)}

    def _exec(self, op: Op) -> Outcome:
        self.p.space.fetch(self._address(op["at"]))
        return {"ok": 0}

    def _snapshot(self, op: Op) -> Outcome:
        page = self.geometry.page_size
        tokens = []
        for number in range(op["page"], op["page"] + op["pages"]):
            try:
                content = self.p.space.load(ARENA + number * page, page)
                tokens.append(page_token(self.scale.shrink(content)))
            except Signalled as signal:
                bus = signal.signal == "SIGBUS"
                tokens.append("B" if bus else "U" if signal.code == "SEGV_MAPERR" else "N")
        return {"pages": " ".join(tokens)}

    # Files.

    def _open(self, op: Op) -> Outcome:
        name = op["file"]
        readable, writable = Names(_MODES)[op["mode"]]
        kind = "regular" if name in self.files else _kind(name)
        if name in self.unlinked or kind is None:
            raise CallError("ENOENT", f"there is no {name}")
        if kind == "directory" and writable and op["mode"] != "path":
            raise CallError("EISDIR", f"{name} is a directory")
        self.p.files[op["fd"]] = OpenFile(
            name,
            kind,
            self.files.get(name),
            readable,
            writable,
            appends=op["mode"] == "append",
            only_path=op["mode"] == "path",
        )
        return {"ok": 0}

    def _pipe(self, op: Op) -> Outcome:
        self.p.files[op["r"]] = OpenFile("pipe", "pipe", None, True, False)
        self.p.files[op["w"]] = OpenFile("pipe", "pipe", None, False, True)
        return {"ok": 0}

    def _close(self, op: Op) -> Outcome:
        self._fd(op)
        del self.p.files[op["fd"]]
        return {"ok": 0}

    def _pread(self, op: Op) -> Outcome:
        if not op["n"]:
            return {"ok": 0}
        content = self._fd(op).pread(self.scale.up(op["n"]), self.scale.up(op["off"]))
        return digest(self.scale.shrink(content))

    def _pwrite(self, op: Op) -> Outcome:
        content = self.scale.stretch(stored_bytes(op))
        return {"ok": self.scale.down(self._fd(op).pwrite(content, self.scale.up(op["off"])))}

    def _ftruncate(self, op: Op) -> Outcome:
        self._fd(op).ftruncate(self.scale.up(op["size"]))
        return {"ok": 0}

    def _punch(self, op: Op) -> Outcome:
        self._fd(op).punch(self.scale.up(op["off"]), self.scale.up(op["n"]))
        return {"ok": 0}

    def _seal(self, op: Op) -> Outcome:
        self._fd(op).add_seals(set(op["seals"]))
        return {"ok": 0}

    def _fsize(self, op: Op) -> Outcome:
        return {"ok": self.scale.down(self._fd(op).size)}

    def _fhash(self, op: Op) -> Outcome:
        file = self._fd(op)
        size = file.size
        content = self.scale.shrink(file.pread(size, 0))
        sha1 = hashlib.sha1(content).hexdigest()[:16]
        return {"size": self.scale.down(size), "sha1": sha1}

    def _unlink(self, op: Op) -> Outcome:
        self.unlinked.add(op["file"])
        return {"ok": 0}

    def _read_into(self, op: Op) -> Outcome:
        count = self.scale.up(op["n"])
        done = self.p.space.read_into(
            self._fd(op), self._address(op["at"]), count, self.scale.up(op["off"])
        )
        return {"ok": self.scale.down(done)}

    def _write_from(self, op: Op) -> Outcome:
        count = self.scale.up(op["n"])
        done = self.p.space.write_from(
            self._fd(op), self._address(op["at"]), count, self.scale.up(op["off"])
        )
        return {"ok": self.scale.down(done)}

    def _pipe_write_from(self, op: Op) -> Outcome:
        pipe = self._fd(op)
        if not pipe.writable:
            raise CallError("EBADF", "the end of a pipe that is read")
        done = self.p.space.pipe_write_from(pipe, self._address(op["at"]), self.scale.up(op["n"]))
        return {"ok": self.scale.down(done)}

    # Processes, views, limits.

    def _fork(self, op: Op) -> Outcome:
        space = self.p.space.fork()
        self.processes[op["child"]] = Process(space, dict(self.p.variables), dict(self.p.files))
        return {"ok": 0}

    def _exit(self, op: Op) -> Outcome:
        self.p.space.exit()
        del self.processes[op.get("proc", "p0")]
        return {"ok": 0}

    def _maps(self, op: Op) -> Outcome:
        size = self.geometry.page_size
        return {
            "vmas": [
                [
                    (line.start - ARENA) // size,
                    (line.end - line.start) // size,
                    line.permissions,
                    self.scale.down(line.offset),
                    line.name,
                ]
                for line in maps(self.p.space)
                if line.start >= ARENA and line.end <= ARENA + ARENA_PAGES * size
            ]
        }

    def _vmlck(self, op: Op) -> Outcome:
        return {"ok": self.scale.down(self.p.space.locked_bytes())}

    def _diff(self, op: Op) -> Outcome:
        difference = self.p.variables[op["a"]] - self.p.variables[op["b"]]
        return {"ok": self.scale.down(difference)}

    def _mod(self, op: Op) -> Outcome:
        return {"ok": self.scale.down(self.p.variables[op["a"]] % self.scale.up(op["n"]))}

    def _below(self, op: Op) -> Outcome:
        end = self.p.variables[op["a"]] + self.scale.up(op.get("len", 0))
        return {"ok": end <= self.scale.up(op["limit"])}

    def _settle(self, op: Op) -> Outcome:
        return {"ok": 0}

    def _setrlimit(self, op: Op) -> Outcome:
        space, name = self.p.space, op["res"]
        if name not in space.limits:
            raise Missing(name)
        if "cur" in op:
            limit = self.scale.up(op["cur"])
        else:
            used = {
                "AS": space.mapped_pages() << space.page_bits,
                "DATA": space.data_pages() << space.page_bits,
                "MEMLOCK": space.locked_bytes(),
            }
            limit = Names(used)[name] + self.scale.up(op["cur_plus"])
        space.limits[name] = limit
        return {"ok": 0}

    def _dropcap(self, op: Op) -> Outcome:
        name = Names({"IPC_LOCK": "may_lock_beyond_limit", "SYS_RAWIO": "may_map_low"})[op["cap"]]
        setattr(self.p.space, name, False)
        return {"ok": 0}

    def _fill_map_count(self, op: Op) -> Outcome:
        self.p.space.vmas.limit = len(self.p.space.vmas) + op["spare"]
        return {"ok": 0}


def _kind(path: str) -> str | None:
    """What a row finds at a path that is none of its files."""
    if path == "/dev/zero":
        return "zero"
    if path in ("/", "/dev", "/etc", "/proc", "/tmp", "/usr"):
        return "directory"
    return "stream" if path.startswith("/dev/") else None


def _content(file: dict[str, int]) -> bytes:
    if "seed" in file:
        return pattern(file["seed"], 0, file["size"])
    byte = 0xC3 if file.get("code") else file.get("byte", 0)
    return bytes([byte]) * file["size"]
