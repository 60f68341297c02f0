//! What holds of every policy.

use std::collections::{BTreeSet, HashSet, VecDeque};

use proptest::prelude::*;

use super::cache::{Cache, Request, Sees};
use super::{FEW, NAMES, Policy, by_name};
use crate::units::{PageCount, PageIndex};

fn known(policy: &dyn Policy) -> Vec<u64> {
    let mut pages = Vec::new();
    policy.for_each(&mut |page| pages.push(page.0));
    pages.sort_unstable();
    assert_eq!(pages.len(), policy.len());
    pages
}

#[derive(Clone, Debug)]
enum Op {
    /// Loads the page if it is not resident; by a fault or ahead of need.
    Load(u64, bool),
    /// Sets the reference bit of the page if it is resident, and tells the hit.
    Touch(u64),
    Evict,
    Remove(u64),
    /// Keeps the pages that are not a multiple.
    Retain(u64),
}

fn ops(pages: u64) -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![
        8 => (0..pages, any::<bool>()).prop_map(|(page, fault)| Op::Load(page, fault)),
        4 => (0..pages).prop_map(Op::Touch),
        5 => Just(Op::Evict),
        1 => (0..pages).prop_map(Op::Remove),
        1 => (5..20u64).prop_map(Op::Retain),
    ];
    prop::collection::vec(op, 0..400)
}

proptest! {
    /// Against a set of resident pages and their bits, kept here.
    #[test]
    fn it_knows_exactly_the_resident_pages(ops in ops(90), which in 0..NAMES.len()) {
        let mut policy = by_name(NAMES[which]).unwrap();
        let mut resident: BTreeSet<u64> = BTreeSet::new();
        let mut bits: HashSet<u64> = HashSet::new();
        for op in ops {
            match op {
                Op::Load(page, fault) if resident.insert(page) => {
                    policy.insert(PageIndex(page));
                    if fault { bits.insert(page); }
                }
                Op::Load(..) => {}
                Op::Touch(page) => if resident.contains(&page) {
                    bits.insert(page);
                    policy.hit(PageIndex(page));
                },
                Op::Evict => {
                    let mut ask = || policy.victim(&mut |page| {
                        assert!(resident.contains(&page.0), "asked of {page:?}, which it cannot know");
                        bits.remove(&page.0)
                    });
                    match ask().or_else(ask) {
                        Some(page) => {
                            prop_assert!(resident.remove(&page.0), "unknown victim {:?}", page);
                            bits.remove(&page.0);
                        }
                        None => prop_assert!(resident.is_empty(), "it spared all, twice"),
                    }
                }
                Op::Remove(page) => {
                    prop_assert_eq!(policy.remove(PageIndex(page)), resident.remove(&page));
                    bits.remove(&page);
                }
                Op::Retain(factor) => {
                    policy.retain(&mut |page| page.0 % factor != 0);
                    resident.retain(|page| page % factor != 0);
                    bits.retain(|page| page % factor != 0);
                }
            }
            prop_assert_eq!(known(&*policy), resident.iter().copied().collect::<Vec<_>>());
        }
    }

    /// A thread whose page was just loaded gets to read it: none of the newest is given up before
    /// its bit was taken.
    #[test]
    fn new_pages_are_spared(loads in prop::collection::vec((0u64..120, any::<bool>()), 1..600), capacity in 1usize..60, which in 0..NAMES.len()) {
        let mut policy = by_name(NAMES[which]).unwrap();
        let mut bits: HashSet<u64> = HashSet::new();
        let mut resident: VecDeque<u64> = VecDeque::new(); // in the order of loads
        for (page, fault) in loads {
            if resident.contains(&page) {
                continue;
            }
            if resident.len() == capacity {
                let before = bits.clone();
                let mut ask = || policy.victim(&mut |page| bits.remove(&page.0)).map(|page| page.0);
                let first = ask();
                let newest: HashSet<u64> = resident.iter().rev().take(FEW).copied().collect();
                if let Some(victim) = first {
                    prop_assert!(!(newest.contains(&victim) && before.contains(&victim)), "page {} is new", victim);
                }
                let victim = first.or_else(ask).expect("one of them goes");
                resident.retain(|page| *page != victim);
                bits.remove(&victim);
            }
            policy.insert(PageIndex(page));
            resident.push_back(page);
            if fault { bits.insert(page); }
        }
    }

    #[test]
    fn a_cache_keeps_to_its_capacity(pages in prop::collection::vec(0u64..80, 1..500), capacity in 1u64..60, which in 0..NAMES.len(), hits: bool) {
        let sees = if hits { Sees::Hits } else { Sees::Faults };
        let mut cache = Cache::that_sees(sees, by_name(NAMES[which]).unwrap(), PageCount(capacity));
        let mut model: BTreeSet<u64> = BTreeSet::new();
        for page in pages {
            let was = model.contains(&page);
            match cache.request(PageIndex(page)) {
                Request::Hit => prop_assert!(was),
                Request::Miss { victim } => {
                    prop_assert!(!was);
                    prop_assert_eq!(victim.is_some(), model.len() as u64 == capacity);
                    if let Some(victim) = victim {
                        prop_assert!(model.remove(&victim.0));
                    }
                    model.insert(page);
                }
            }
            prop_assert!(cache.len().0 <= capacity);
            prop_assert_eq!(known(cache.policy()), model.iter().copied().collect::<Vec<_>>());
        }
    }

    /// The textbook's LRU and FIFO: a list, searched from end to end.
    #[test]
    fn lru_and_fifo_are_the_textbooks(pages in prop::collection::vec(0u64..60, 1..500), capacity in 1usize..50) {
        for (name, moves) in [("lru", true), ("fifo", false)] {
            let mut cache = Cache::new(by_name(name).unwrap(), PageCount(capacity as u64));
            let mut list: Vec<u64> = Vec::new();
            for page in &pages {
                let at = list.iter().position(|known| known == page);
                let expected = match at {
                    Some(at) => {
                        if moves {
                            let page = list.remove(at);
                            list.push(page);
                        }
                        Request::Hit
                    }
                    None => {
                        let victim = (list.len() == capacity).then(|| PageIndex(list.remove(0)));
                        list.push(*page);
                        Request::Miss { victim }
                    }
                };
                prop_assert_eq!(cache.request(PageIndex(*page)), expected);
            }
        }
    }
}

#[test]
fn few_referenced_pages_are_spared_and_many_are_not() {
    for name in NAMES {
        for pages in [1, 2, FEW as u64, FEW as u64 + 1, 40] {
            let mut policy = by_name(name).unwrap();
            (0..pages).for_each(|page| policy.insert(PageIndex(page)));
            let mut bits: HashSet<u64> = (0..pages).collect();
            let mut victim = || policy.victim(&mut |page| bits.remove(&page.0));
            assert_eq!(victim().is_none(), pages <= FEW as u64, "{name} of {pages}");
            // Of 17 pages 16 are left, which are spared in their turn, once.
            let next = [victim(), victim()];
            assert!(next[0].or(next[1]).is_some(), "{name} of {pages}");
        }
    }
}

#[test]
fn metadata_is_small_and_goes_with_the_pages() {
    let most = [("clock", 12), ("fifo", 12), ("2q", 24), ("s3fifo", 30), ("sieve", 31), ("lru", 31)];
    for (name, bytes_max) in most {
        for pages in [10_000u64, 49_152, 70_000] {
            let mut cache = Cache::new(by_name(name).unwrap(), PageCount(pages));
            (0..pages * 4).for_each(|page| {
                cache.request(PageIndex(page));
            });
            let bytes = cache.policy().metadata_bytes();
            assert!(
                bytes <= bytes_max * pages as usize,
                "{name}: {} bytes a page",
                bytes as f64 / pages as f64
            );
            assert!(bytes >= 8 * pages as usize, "{name} counts less than it must hold");
        }
    }
}
