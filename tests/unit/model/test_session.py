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
    ]
    assert kinds(second) == ["tlb hit"]
    assert "by=zero fill" in str(first)
    facts = first.as_json()
    assert facts["line"] == "store a x"
    assert facts["events"][5]["by"] == "zero fill"


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
        ("faults 3 random 1 2", "no policy"),
        ("translate 0 touch", "no access"),
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
    with pytest.raises(SessionError, match="has a translation"):
        session.do("entry 0x3e0 4")


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
