import random

import pytest

from quire.model.policy import POLICIES, Clock, Fifo, Lru, Opt, TwoLists, count_faults

SILBERSCHATZ = [7, 0, 1, 2, 0, 3, 0, 4, 2, 3, 0, 3, 2, 1, 2, 0, 1, 7, 0, 1]
"""Silberschatz, Galvin, Gagne, Operating System Concepts: 15, 12 and 9 faults with three frames."""


def test_textbook_string():
    counted = {
        name: count_faults(SILBERSCHATZ, 3, name)[0] for name in ("fifo", "lru", "opt", "clock")
    }
    assert counted == {"fifo": 15, "lru": 12, "opt": 9, "clock": 14}


@pytest.mark.parametrize(("frames", "name"), [(0, "lru"), (3, "random")])
def test_counting_needs_a_frame_and_a_policy(frames, name):
    with pytest.raises(ValueError, match=r"at least 1|of two-lists, fifo, lru, clock, opt"):
        count_faults([1, 2], frames, name)


def machine_faults(world, string, frames, name):
    """How often a machine must bring a page in for a reference string, done with stores."""
    w = world(frames=frames, swap=None, policy=POLICIES[name](), tlb=2)
    at = w.anonymous(max(string) + 1)
    events = w.traced(lambda: [w.space.store(at + page * 4096, b"x") for page in string])
    return sum(event.kind == "frame" for event in events)


@pytest.mark.parametrize("name", ["fifo", "lru", "clock"])
def test_machine_counts_as_the_textbook(world, name):
    assert machine_faults(world, SILBERSCHATZ, 3, name) == count_faults(SILBERSCHATZ, 3, name)[0]


@pytest.mark.parametrize("seed", range(10))
def test_machine_and_reference_strings_agree(world, seed):
    """LRU by accessed bits is near to what it would be if every use were seen."""
    rng = random.Random(seed)
    string = [rng.randrange(7) for _ in range(40)]
    for name in ("fifo", "clock"):
        assert machine_faults(world, string, 4, name) == count_faults(string, 4, name)[0]
    sampled, exact = machine_faults(world, string, 4, "lru"), count_faults(string, 4, "lru")[0]
    assert abs(sampled - exact) <= len(string) // 10
    assert sampled >= count_faults(string, 4, "opt")[0]


def test_lru_by_accessed_bits():
    lru = Lru()
    for page in (1, 2, 3):
        lru.insert(page)
    assert lru.victim(lambda _: True) == 1  # the bits tell only that they came in
    lru.insert(4)
    assert lru.victim(lambda page: page == 2) == 3
    lru.touch(4)
    assert [lru.victim(lambda _: False) for _ in range(2)] == [2, 4]


def test_victims_are_told():
    _, faults = count_faults([1, 2, 3, 1, 4], 3, "lru")
    assert faults == [(1, None), (2, None), (3, None), (4, 2)]


@pytest.mark.parametrize("seed", range(20))
def test_no_policy_beats_the_optimum_and_lru_is_a_stack_algorithm(seed):
    rng = random.Random(seed)
    string = [rng.randrange(9) for _ in range(80)]
    for frames in range(1, 8):
        best = count_faults(string, frames, "opt")[0]
        for name in ("fifo", "lru", "clock"):
            assert count_faults(string, frames, name)[0] >= best
        assert count_faults(string, frames + 1, "lru")[0] <= count_faults(string, frames, "lru")[0]


@pytest.mark.parametrize("make", [Fifo, Lru, Clock, TwoLists, lambda: Opt([1, 2, 3])])
def test_contract(make):
    policy = make()
    assert policy.victim(lambda _: False) is None
    for page in (1, 2, 3):
        policy.insert(page)
    policy.remove(2)
    policy.remove(9)
    assert len(policy) == 2
    assert {policy.victim(lambda _: True) for _ in range(2)} == {1, 3}
    assert len(policy) == 0


def test_clock_gives_a_second_chance():
    clock = Clock()
    for page in (1, 2, 3):
        clock.insert(page)
    assert clock.victim(lambda _: False) == 1  # all were used: the hand goes round once
    clock.touch(2)
    assert clock.victim(lambda _: False) == 3
    assert clock.victim(lambda page: page == 2) == 2


def test_two_lists_keep_what_is_used_twice_from_a_scan():
    lists = TwoLists()
    for page in ("hot", "cold"):
        lists.insert(page)
    assert lists.victim(lambda page: page == "hot") == "cold"
    for page in range(5):
        lists.insert(page)
        assert lists.victim(lambda page: page == "hot") == page


def test_two_lists_take_one_use_for_the_arrival():
    lists = TwoLists()
    lists.insert(1)
    lists.insert(2)
    assert lists.victim(lambda page: page == 1) == 2
    lists.insert(3)
    assert 1 not in lists.active
    lists.touch(1)
    assert 1 in lists.active
    lists.touch(3)
    assert 3 not in lists.active
    assert lists.victim(lambda _: False) == 3


def test_two_lists_deactivate():
    lists = TwoLists()
    for page in (1, 2, 3):
        lists.insert(page)
    lists.deactivate(3)
    assert lists.victim(lambda _: False) == 3
