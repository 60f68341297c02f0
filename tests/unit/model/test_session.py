import pytest

from quire.model.session import Session, SessionError

SCRIPT = """
machine frames=3 swap=8 tlb=2   # a small one
file data 3p
mmap 3p rw shared file=data as=m
load m+1p 2
store m hello
msync m 3p
mmap 2p as=heap
store heap a
fork child
process child
store heap b
load heap
process init
load heap
"""


def run(session, script):
    steps = [session.do(line) for line in script.splitlines()]
    return [step for step in steps if step.line.strip()]


def kinds(step):
    return [event.kind for event in step.events]


def test_script():
    steps = run(Session(), SCRIPT)
    assert all(step.error is None for step in steps)
    results = [step.result for step in steps]
    assert results[3] == "'BB'"
    assert results[-3:] == ["'b'", "init runs", "'a'"]
    assert "copy on write" in {e.facts.get("by") for step in steps for e in step.events}
    assert "evict" in {kind for step in steps for kind in kinds(step)}


def test_step_shows_walk_fault_and_frame():
    session = Session()
    session.do("mmap 1p as=a")
    first, second = session.do("store a x"), session.do("store a y")
    assert kinds(first) == [
        *["tlb miss", "walk", "page fault", "vma", "frame", "fault", "tlb miss"],
        *["walk"] * 4,
        "tlb insert",
    ]
    assert kinds(second) == ["tlb hit"]
    assert "by=zero fill" in str(first)
    facts = first.as_json()
    assert facts["line"] == "store a x"
    assert facts["events"][5]["by"] == "zero fill"


def test_steps_show_what_the_tlb_takes_loses_and_forgets():
    session = Session()
    session.do("machine tlb=1")
    session.do("mmap 2p as=a")
    session.do("store a x")
    assert [kind for kind in kinds(session.do("store a+1p x")) if kind.startswith("tlb ")] == [
        *["tlb miss", "tlb miss", "tlb evict", "tlb insert"]
    ]
    assert "tlb flush" not in kinds(session.do("mprotect a 1p r"))
    forgets = session.do("munmap a 2p").events
    assert [str(event).split() for event in forgets if event.kind == "tlb flush"] == [
        ["tlb", "flush", f"page={(session.names['a'] >> 12) + 1:#x}", "count=1"]
    ]
    session.do("machine tlb=0")
    session.do("mmap 1p as=a")
    assert "tlb insert" not in kinds(session.do("store a x"))


def test_steps_tell_whose_page_it_was():
    session = Session()
    session.do("machine frames=1 swap=1 tlb=1")
    session.do("file f 1p")
    session.do("mmap 1p r shared file=f as=m")
    session.do("mmap 1p rw as=a")
    assert "cache hit  file=f page=0x0" in str(session.do("read f 0 1"))
    assert "rights=r--s object=f offset=0" in str(session.do("load m"))
    first = session.do("store a x")
    assert "of=f page=0x0" in str(first)
    session.do("load m")
    session.do("mmap 1p rw as=b")
    session.do("load b")
    page = session.names["b"] >> 12
    assert f"tlb evict  asid=1 page={page:#x}" in str(session.do("load m"))
    assert f"page={session.names['a'] >> 12:#x}" in str(first)


def test_failed_calls_and_accesses_are_answers():
    session = Session()
    assert session.do("munmap 1 1p").error.startswith("EINVAL")
    assert session.do("load 0x5000").error == "SIGSEGV SEGV_MAPERR at 0x5000"
    assert "page fault" in session.do("translate 0x5000").error
    assert "canonical" in session.do("translate 0x800000000000").error


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("frobnicate", "no verb"),
        ("mmap", "length"),
        ("mmap ten", "no number"),
        ("mmap 1p rq", "no protection"),
        ("mmap 1p rw purple", "no flag"),
        ("mmap 1p rw shared file=none", "no file"),
        ("process nobody", "no process"),
        ("cpu 7", "no CPU"),
        ("machine geometry=pdp-11", "no geometry"),
        ("machine policy=random", "no policy"),
        ("machine overcommit=3", "0, 1 or 2"),
        ("faults 3 random 1 2", "no policy"),
        ("translate 0 touch", "no access"),
        ("mmap 1p zip=1", "no zip="),
        ("machine frames=0", "at least 1"),
        ("machine frames=many", "no number"),
        ("machine tlb=-1", "at least 0"),
        ("machine page_bits=8", "needs page_bits= and index_bits="),
        ("machine page_bits=16 index_bits=20,20,20", "76 address bits"),
        ("entry 0 1 -", "can be read"),
        ("entry 0 1 w", "can be read"),
        ("entry 0 table r level=1", "is no table"),
        ("translate 0 read supervisor", "user or kernel"),
        ("machine page_bits=8 index_bits=4,x", "no number"),
        ("machine page_bits=12 index_bits=40", "at most 20 index bits"),
        ("file f -1", "at least 0"),
        ("load 0x10000000000000000", "no address of 64 bits"),
        ("fork init", "there is a process"),
        ("faults 0 fifo 1 2", "at least 1"),
        ("faults 3 fifo", "at least one page"),
        ("entry 0 0x10000000000", "no frame"),
        ("entry 0xffff800000000000 1", "can have none"),
        ("entry 0 1 rw level=3", "no leaf at level 3"),
        ("entry 0 1 rw level=1", "a multiple of 512"),
        ("limit CPU 1", "no limit"),
        ("mlock 0 1p SOON", "no flag"),
    ],
)
def test_nonsense_is_refused(line, words):
    with pytest.raises(SessionError, match=words):
        Session().do(line)


def test_translation_with_tables_of_ones_own():
    session = Session()
    session.do("machine page_bits=5 index_bits=5,5 tlb=0")
    session.do("entry 0x3e0 9 r")
    step = session.do("translate 0x3e7")
    assert step.result == "virtual 0x3e7 is physical 0x127"
    assert step.events[0].facts["indices"] == "0, 31"
    assert "page fault" in session.do("translate 0x3e7 write").error
    assert session.do("tables").result.endswith("0x3e0 -> frame 9 r-- level 0")
    session.do("entry 0x3e0 4")  # in the place of the old one
    assert session.do("translate 0x3e7 write").result.endswith("0x87")
    assert session.do("entry 0x3e0 none").result == "page 0x1f has no translation"
    assert "error code 0x4" in session.do("translate 0x3e7").error


def test_blocks_in_tables_of_ones_own():
    session = Session()
    session.do("entry 0x40000000 1024 rw level=1")
    session.do("entry 0x80000000 0x80000 r level=2")
    assert session.do("translate 0x40012345 write").result.endswith("physical 0x412345")
    step = session.do("translate 0x80012345")
    assert step.result.endswith("physical 0x80012345")
    assert [e.facts["level"] for e in step.events if e.kind == "walk"] == [3, 2]
    with pytest.raises(SessionError, match="has a translation"):
        session.do("entry 0x80000000 1")


def test_rights_in_tables_of_ones_own():
    session = Session()
    session.do("entry 0x1000 7 rwk")
    session.do("entry 0x2000 8 rwx")
    assert "error code 0x5" in session.do("translate 0x1000").error
    assert session.do("translate 0x1000 write kernel").result.endswith("0x7000")
    assert "error code 0x11" in session.do("translate 0x1000 execute kernel").error
    assert session.do("tables").result.splitlines()[1] == "0x1000 -> frame 7 rw-k level 0"
    assert session.do("translate 0x2000 write").error is None
    session.do("entry 0x2000 table rx level=2")
    assert "error code 0x7" in session.do("translate 0x2000 write").error
    session.do("machine geometry=aarch64-4k")
    session.do("entry 0x2000 8 rw")
    with pytest.raises(SessionError, match="x86-64 alone"):
        session.do("entry 0x2000 table r level=2")


def test_limits_of_other_kinds_leave_the_privilege_to_lock():
    session = Session()
    session.do("limit AS 1G")
    assert session.do("mmap 16M rw locked as=a").error is None
    session.do("limit MEMLOCK 1M")
    assert session.do("mmap 2M rw locked").error.startswith("EAGAIN")


def test_what_can_fail():
    session = Session()
    session.do("machine memory=1M overcommit=2 maps=2")
    assert session.do("mmap 1M").error.startswith("ENOMEM: more memory than may be promised")
    session.do("file f 1p")
    session.do("break f 0")
    assert session.do("sync f").error.startswith("EIO")
    session.do("mmap 3p as=a")
    session.do("store a x")
    assert session.do("poison a").result == "frame 3 has failed"
    assert session.do("load a").error.startswith("SIGBUS BUS_MCEERR_AR")
    assert "max_map_count" in session.do("mprotect a+1p 1p r").error
    with pytest.raises(SessionError, match="touch it first"):
        session.do("poison a+1p")


def test_machine_with_one_table():
    session = Session()
    session.do("machine page_bits=12 index_bits=9")
    session.do("mmap 2p rw as=a")
    assert session.do("store a+0xffe hello there").result == "11 bytes stored"
    assert session.do("load a+0xffe 11").result == "'hello there'"
    assert session.do("madvise a 2p COLLAPSE").error.startswith("EINVAL")
    assert session.do("brk").result == session.do("brk 0x300000").result


@pytest.mark.parametrize("frames", [3, 4])
def test_beladys_anomaly(frames):
    string = "1 2 3 4 1 2 5 1 2 3 4 5"
    counts = {"fifo": {3: 9, 4: 10}, "lru": {3: 10, 4: 8}, "opt": {3: 7, 4: 6}}
    step = Session().do(f"faults {frames} fifo,lru,opt {string}")
    assert step.result.splitlines() == [f"{name}: {counts[name][frames]} faults" for name in counts]


def test_every_verb_works():
    session = Session()
    for line in """machine cpus=2 disk=9 policy=clock geometry=aarch64-16k
        file f 2p
        file s 1p memory
        device d
        mmap 2p rw shared file=d as=d
        load d
        mmap 4p rwx as=a
        fetch a
        mprotect a 1p r
        madvise a 2p dontneed
        mlock a+1p 1p
        munlock a+1p 1p
        mincore a 4p
        mremap a+1p 3p 5p maymove as=b
        mseal a 1p
        mlock b 1p onfault
        mlockall current,future
        munlockall
        brk
        limit MEMLOCK 1M
        mmap 2p rw shared file=f as=s
        remap_file_pages s 1p 1
        munmap s 2p
        munmap a+1p 1p
        read f 0 4
        write f 2 xx
        truncate f 1p
        punch f 0 10
        sync f
        writeback
        maps
        smaps
        pagemap a
        tables
        tlb
        statistics
        cpu 1
        help
        fork c
        exit
        exit
        maps""".splitlines():
        step = session.do(line)
        assert step.error is None, step
    assert step.result == "nothing is mapped"


def test_a_process_killed_for_want_of_memory_is_gone():
    session = Session()
    for line in (
        "machine frames=3",
        "mmap 8p rw as=a",
        "fork c1",
        "store a x",
        "store a+1p x",
        "store a+2p x",
        "process c1",
        "store a x",
    ):
        step = session.do(line)
    assert any(event.kind == "oom kill" for event in step.events)
    with pytest.raises(SessionError, match="no process 'init': of c1"):
        session.do("process init")
    for line, result in (("exit", "c1 has ended"), ("mmap 1p rw as=b", None), ("store b x", None)):
        step = session.do(line)
        assert step.error is None
        assert result in (None, step.result)


def test_the_last_process_killed_gives_way_to_init():
    session = Session()
    session.do("machine frames=1")
    session.do("mmap 2p rw as=a")
    session.do("store a x")
    assert session.do("store a+1p x").error.startswith("SIGKILL OOM")
    assert session.do("load a").error.startswith("SIGSEGV")
    assert session.do("exit").result == "init has ended"
