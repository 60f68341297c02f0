"""Virtual memory in readable Python: the machine that `mmap` works on, step by step.

A second, independent implementation of the semantics, never a fallback: it depends on nothing in
quire. It teaches (every step can be had as an event), and it is the oracle of property tests: its
outcomes agree with those of Linux 6.18, recorded in `tests/model/cases`.

From the bottom up::

    geometry        how an address is cut up; bits of entries
    physical_memory frames and their counts
    page_table      tables in frames, walked as hardware does
    tlb, mmu        translation, or a page fault
    page            content, wherever it is; reverse map
    disk, swap      where it goes
    policy, pageout which page gives way
    flusher         when dirty pages are written
    memory_object   what can be mapped: file_object, device
    huge_pool       huge pages set aside and promised
    vma, vma_set    what was asked
    space, fault    one address space; the one way a fault is resolved (huge_fault: of the pool)
    calls/          the system calls: checks as data, then the effect
    address_space   their methods
    machine         all of it together
    views           /proc's maps, smaps, pagemap
    invariants      what must be true after every operation
"""

from quire.model.address_space import AddressSpace
from quire.model.device import CounterDriver, DeviceObject, Driver
from quire.model.errors import CallError, DiskError, ModelError, OutOfMemory, Signalled
from quire.model.file_object import FileObject
from quire.model.files import OpenFile
from quire.model.geometry import GEOMETRIES, Geometry
from quire.model.machine import Machine
from quire.model.mmu import Access, PageFault
from quire.model.policy import count_faults

__all__ = [
    "GEOMETRIES",
    "Access",
    "AddressSpace",
    "CallError",
    "CounterDriver",
    "DeviceObject",
    "DiskError",
    "Driver",
    "FileObject",
    "Geometry",
    "Machine",
    "ModelError",
    "OpenFile",
    "OutOfMemory",
    "PageFault",
    "Signalled",
    "count_faults",
]
