//! Readahead over traces: by hand, random, and walks of made-up arrays.

use std::collections::{HashSet, VecDeque};

use proptest::prelude::*;

use super::*;

const GRANULE: u64 = 65536;

fn limits(window: u64, end: u64) -> Limits {
    Limits { granule: GRANULE, window, row: window, end, unit: 1 }
}

fn on_its_way(page: u64) -> Fault {
    Fault { offset: page * GRANULE, thread: 1, missing: false }
}

/// What is asked for at each fault on these pages, none of which is missing.
fn faults(pages: &[u64], window: u64, end: u64) -> Vec<Vec<u64>> {
    let mut readahead = Readahead::default();
    let asked =
        |page: &u64| readahead.note(on_its_way(*page), limits(window, end)).runs(1).flatten().collect();
    pages.iter().map(asked).collect()
}

/// A mapping and its readers: what is asked for is there at the next touch.
struct Machine {
    readahead: Readahead,
    limits: Limits,
    resident: HashSet<u64>,
    order: VecDeque<u64>,
    frames: usize,
    faults: u64,
    asked: u64,
    hits: u64,
    wasted: u64,
}

impl Machine {
    fn new(granule: u64, end: u64, frames: usize) -> Self {
        Machine {
            readahead: Readahead::default(),
            limits: Limits { granule, window: 16, row: 16, end, unit: 1 },
            resident: HashSet::new(),
            order: VecDeque::new(),
            frames,
            faults: 0,
            asked: 0,
            hits: 0,
            wasted: 0,
        }
    }

    fn fill(&mut self, page: u64) {
        assert!(page < self.limits.end, "page {page} is beyond the end");
        if self.resident.insert(page) {
            self.order.push_back(page);
            if self.order.len() > self.frames {
                self.resident.remove(&self.order.pop_front().expect("not empty"));
            }
        }
    }

    fn touch(&mut self, thread: u64, offset: u64) {
        if self.resident.contains(&(offset / self.limits.granule)) {
            return;
        }
        self.faults += 1;
        let ahead = self.readahead.note(Fault { offset, thread, missing: true }, self.limits);
        self.hits += ahead.hits;
        self.wasted += ahead.wasted;
        self.fill(offset / self.limits.granule);
        for page in ahead.runs(4).flatten() {
            self.asked += 1;
            self.fill(page);
        }
    }

    /// Touches all bytes of a range, first to last.
    fn read(&mut self, thread: u64, offset: u64, len: u64) {
        let granule = self.limits.granule;
        let boundaries = (offset / granule + 1..=(offset + len - 1) / granule).map(|page| page * granule);
        [offset].into_iter().chain(boundaries).for_each(|offset| self.touch(thread, offset));
    }
}

#[test]
fn a_sequence_opens_a_growing_window() {
    let got = faults(&[10, 11, 12, 15, 20], 8, 1000);
    assert_eq!(got, [vec![], vec![], vec![13, 14], (16..20).collect(), (21..29).collect()]);
}

#[test]
fn a_sequence_backwards_asks_for_the_nearest_first() {
    let got = faults(&[50, 49, 48, 45, 40], 8, 1000);
    let down = |from: u64, to: u64| (to..=from).rev().collect::<Vec<u64>>();
    assert_eq!(got, [vec![], vec![], down(47, 46), down(44, 41), down(39, 32)]);
}

#[test]
fn runs_end_where_the_store_s_units_do() {
    let runs_of = |pages: [u64; 5]| {
        let mut readahead = Readahead::default();
        let mut runs = |page| readahead.note(on_its_way(page), limits(8, 1000)).runs(4).collect::<Vec<_>>();
        let [_, _, _, fourth, fifth] = pages.map(&mut runs);
        (fourth, fifth)
    };
    assert_eq!(runs_of([9, 10, 11, 14, 19]), (vec![15..16, 16..19], vec![20..24, 24..28]));
    assert_eq!(runs_of([51, 50, 49, 46, 41]), (vec![44..46, 42..44], vec![40..41, 36..40, 33..36]));
}

#[test]
fn a_window_of_two_units_ends_where_a_unit_does() {
    let limits = Limits { unit: 8, ..limits(64, 1000) };
    let mut readahead = Readahead::default();
    let mut runs = |page| readahead.note(on_its_way(page), limits).runs(8).collect::<Vec<_>>();
    let ramp: Vec<_> = [101, 102, 103, 106, 111].map(&mut runs).into_iter().flatten().flatten().collect();
    assert_eq!(ramp, (104..106).chain(107..111).chain(112..120).collect::<Vec<u64>>());
    assert_eq!(runs(120), [121..128, 128..136]);
    // From here on all that is asked for is whole units, wherever in the window the reader is met.
    assert_eq!(runs(136), [137..144, 144..152, 152..160, 160..168]);
    assert_eq!(runs(141), (168..200).step_by(8).map(|at| at..at + 8).collect::<Vec<_>>());
    assert!(runs(142).is_empty());
    assert_eq!(runs(150).into_iter().flatten().collect::<Vec<_>>(), (200..208).collect::<Vec<_>>());

    let mut readahead = Readahead::default();
    let mut runs = |page| readahead.note(on_its_way(page), limits).runs(8).collect::<Vec<_>>();
    let ramp = [910, 909, 908, 905, 900].map(&mut runs);
    assert_eq!(ramp[4].iter().map(|run| run.end - run.start).sum::<u64>(), 8);
    assert_eq!(runs(891), [888..891, 880..888]);
    assert_eq!(runs(887), [872..880, 864..872, 856..864]);
    // The mapping's end ends a window too.
    let mut readahead = Readahead::default();
    readahead.set_advice(Advice::Sequential);
    let asked = readahead.note(on_its_way(961), Limits { end: 990, ..limits });
    assert_eq!(asked.runs(32).flatten().collect::<Vec<_>>(), (962..990).collect::<Vec<_>>());
}

#[test]
fn a_stride_is_confirmed_by_two_equal_distances() {
    let got = faults(&[3, 43, 83, 203], 8, 1000);
    assert_eq!(got, [vec![], vec![], vec![123, 163], vec![243, 283, 323, 363]]);
    let got = faults(&[900, 860, 820, 700], 8, 1000);
    assert_eq!(got, [vec![], vec![], vec![780, 740], vec![660, 620, 580, 540]]);
}

#[test]
fn a_row_across_a_boundary_or_a_jump_opens_nothing() {
    assert!(faults(&[5, 6, 90, 91, 3, 4], 8, 1000).iter().all(Vec::is_empty));
    assert!(faults(&[5, 47, 90, 91, 3], 8, 1000).iter().all(Vec::is_empty));
}

#[test]
fn sequences_that_take_turns_are_each_followed() {
    let turns: Vec<u64> = (0..5).flat_map(|step| [100 + step, 500 + step, 7]).collect();
    let asked: usize = faults(&turns, 8, 1000).iter().map(Vec::len).sum();
    assert_eq!(asked, 2 * (2 + 3 + 5));
}

#[test]
fn the_window_ends_at_the_ends_and_obeys_the_limit() {
    for backwards in [false, true] {
        let mut readahead = Readahead::default();
        let mut asked = HashSet::new();
        for step in 0..100_u64 {
            let page = if backwards { 99 - step } else { step };
            for ahead in readahead.note(on_its_way(page), limits(4, 100)).runs(1).flatten() {
                assert!(ahead != page && ahead.abs_diff(page) <= 4 && ahead < 100);
                assert!(asked.insert(ahead), "{ahead} asked twice");
            }
        }
        assert_eq!(asked.len(), 97);
        assert_eq!(readahead.note(on_its_way(0), limits(0, 100)).runs(1).count(), 0);
    }
}

#[test]
fn a_column_of_rows_of_any_length_is_followed() {
    // Rows of 15.26 granules; a column; slices that lie in one granule or two, or in two or three.
    for (column, len) in [(5000, 8), (30_000, 50_000), (200_000, 100_000)] {
        let mut machine = Machine::new(GRANULE, 15_259, 200);
        (0..999).for_each(|row| machine.read(1, row * 1_000_000 + column, len));
        let touched: u64 = machine.faults + machine.asked;
        assert!(machine.faults < touched / 8, "{} faults of {touched}", machine.faults);
        assert!(machine.wasted < touched / 50, "{} wasted of {touched}", machine.wasted);
    }
}

#[test]
fn granules_in_a_row_at_each_step_are_asked_for_together() {
    let pages: Vec<u64> = (0..5).flat_map(|step| [step * 40, step * 40 + 1]).collect();
    let got = faults(&pages, 16, 1000);
    // The third step opens; the granule behind it is a part of each step from then on.
    assert_eq!(got[4], [120, 160]);
    assert_eq!(got[5], [120, 121, 160, 161]);
    assert_eq!(got[6], [200, 201, 240, 241, 280, 281]);
    assert!(got[7].is_empty());
}

#[test]
fn alternating_columns_are_each_followed() {
    let mut machine = Machine::new(GRANULE, 40_000, 400);
    for row in 0..1000 {
        [0, 7, 19].into_iter().for_each(|column| machine.touch(1, (row * 40 + column) * GRANULE));
    }
    assert!(machine.faults < 3000 / 10, "{} faults", machine.faults);
}

#[test]
fn a_thread_that_jumps_about_leaves_the_others_alone() {
    let mut machine = Machine::new(GRANULE, 1_000_000, 4000);
    let mut place = 12_345_u64;
    for page in 0..2000 {
        machine.touch(1, page * GRANULE);
        // Three in a row, somewhere: each opens a sequence of the other thread.
        place = place.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let row = 10_000 + (place >> 33) % 900_000;
        let faults = machine.faults;
        (row..row + 3).for_each(|page| machine.touch(2, page * GRANULE));
        machine.faults = faults;
    }
    assert!(machine.faults < 2000 / 10, "{} faults of the reader in order", machine.faults);
}

#[test]
fn threads_that_share_out_an_array_read_ahead_together() {
    let mut order = 1_u64;
    for piece in [1, 3, 8] {
        let mut machine = Machine::new(GRANULE, 3000, 400);
        for start in (0..3000).step_by(piece) {
            order = order.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let thread = 1 + (order >> 40) % 2;
            (start..3000.min(start + piece as u64)).for_each(|page| machine.touch(thread, page * GRANULE));
        }
        assert!(machine.faults < 3000 / 10, "{} faults, pieces of {piece}", machine.faults);
    }
}

#[test]
fn what_was_used_is_told_from_what_was_not() {
    let mut machine = Machine::new(GRANULE, 100_000, 400);
    (0..1000).for_each(|page| machine.touch(1, page * GRANULE));
    assert_eq!(machine.wasted, 0);
    assert!(machine.hits <= machine.asked && machine.hits + 16 >= machine.asked);
    // Eight more sequences, broken off where each has two steps left: the first is given up whole.
    for start in (1..9).map(|number| 10_000 + number * number * 1000) {
        (start..start + 3).for_each(|page| machine.touch(1, page * GRANULE));
    }
    assert_eq!(machine.wasted, machine.asked - 2 * 8 - machine.hits);
}

#[test]
fn a_reader_to_the_end_wastes_nothing() {
    let mut machine = Machine::new(GRANULE, 500, 100);
    for _ in 0..20 {
        (0..500).for_each(|page| machine.touch(1, page * GRANULE));
    }
    assert_eq!(machine.wasted, 0);
    assert!(machine.faults < 20 * 60, "{} faults", machine.faults);
}

#[test]
fn a_window_whose_pages_are_gone_collapses() {
    let missing = |page: u64| Fault { missing: true, ..on_its_way(page) };
    let mut readahead = Readahead::default();
    let mut asked = Vec::new();
    for page in 0..12 {
        let ahead = readahead.note(if page < 6 { on_its_way(page) } else { missing(page) }, limits(16, 100));
        asked.push(ahead.runs(1).flatten().collect::<Vec<_>>());
    }
    assert_eq!(asked[6], (7..15).collect::<Vec<_>>());
    assert_eq!(asked[7], (8..12).collect::<Vec<_>>());
    assert_eq!(asked[8], [9, 10]);
    assert_eq!(asked[9], [10]);
    assert!(asked[10].is_empty(), "closed, and the next must show more steps");
    assert!(asked[11].is_empty());
}

#[test]
fn rows_of_three_granules_are_soon_not_followed() {
    let mut machine = Machine::new(GRANULE, 1_000_000, 400);
    let mut place = 99_u64;
    for _ in 0..3000 {
        place = place.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        machine.read(1, (place >> 33) % 999_000 * GRANULE, 3 * GRANULE);
    }
    assert!(machine.asked < 100, "{} asked", machine.asked);
}

#[test]
fn advice_is_followed() {
    let mut readahead = Readahead::default();
    readahead.set_advice(Advice::Sequential);
    let asked = |readahead: &mut Readahead, page| -> Vec<u64> {
        readahead.note(on_its_way(page), limits(8, 1000)).runs(1).flatten().collect()
    };
    assert_eq!(asked(&mut readahead, 100), (101..109).collect::<Vec<_>>());
    assert_eq!(asked(&mut readahead, 109), (110..118).collect::<Vec<_>>());
    readahead.set_advice(Advice::Random);
    assert_eq!(readahead.advice(), Advice::Random);
    assert!((100..200).all(|page| asked(&mut readahead, page).is_empty()));
    readahead.set_advice(Advice::Normal);
    assert!(asked(&mut readahead, 200).is_empty(), "nothing is left of before");
}

/// A column, or a row, of an array: where it starts, its step in bytes and how many steps.
fn walks() -> impl Strategy<Value = (u64, i64, u64)> {
    (0..100_000_u64, 1..40_000_000_i64, any::<bool>(), 400..1500_u64).prop_map(
        |(start, step, back, steps)| {
            if back { (start + step.unsigned_abs() * steps, -step, steps) } else { (start, step, steps) }
        },
    )
}

proptest! {
    /// Random touches by some threads, of granules or of bytes in them.
    #[test]
    fn random_access_asks_for_next_to_nothing(
        places in prop::collection::vec((0..u64::MAX, 1..5_u64), 2000..4000),
        pages in 2000..2_000_000_u64,
        granule in prop::sample::select(vec![4096, GRANULE]),
        exact in any::<bool>(),
        frames in 50..1000_usize,
    ) {
        let mut machine = Machine::new(granule, pages, frames);
        for (place, thread) in places {
            let offset = place % (pages * granule);
            machine.touch(thread, if exact { offset } else { offset / granule * granule });
        }
        prop_assert!(machine.asked * 100 < machine.faults, "{} of {}", machine.asked, machine.faults);
    }

    /// Any constant step is read ahead: few faults for each granule that is touched.
    #[test]
    fn any_walk_is_read_ahead((start, step, steps) in walks()) {
        let mut machine = Machine::new(GRANULE, 1 << 21, 200);
        let position = |at: u64| start.checked_add_signed(step * i64::try_from(at).expect("small"));
        let offsets: Vec<u64> = (0..steps).map(|at| position(at).expect("inside")).collect();
        let touched = offsets.iter().map(|offset| offset / GRANULE).collect::<HashSet<_>>().len() as u64;
        offsets.iter().for_each(|offset| machine.touch(1, *offset));
        prop_assert!(machine.faults <= 12 + touched / 8, "{} faults of {}", machine.faults, touched);
        prop_assert!(machine.asked <= touched + touched / 4 + 32, "{} asked of {}", machine.asked, touched);
        prop_assert!(machine.hits + machine.wasted <= machine.asked);
    }

    /// Whatever comes, nothing beyond the mapping, the limit or the fault's own page is asked for.
    #[test]
    fn any_trace_stays_inside(
        trace in prop::collection::vec((0..300_u64, 0..GRANULE, 0..4_u64, any::<bool>()), 1..400),
        window in 0..20_u64,
        unit in 1..9_u64,
        sequential in any::<bool>(),
    ) {
        let mut readahead = Readahead::default();
        readahead.set_advice(if sequential { Advice::Sequential } else { Advice::Normal });
        for (page, within, thread, missing) in trace {
            let fault = Fault { offset: page * GRANULE + within, thread, missing };
            let runs: Vec<_> = readahead.note(fault, limits(window, 300)).runs(unit).collect();
            prop_assert!(runs.iter().all(|run| run.start < run.end && run.end <= 300));
            prop_assert!(runs.iter().all(|run| run.start / unit == (run.end - 1) / unit));
            prop_assert!(runs.into_iter().flatten().count() as u64 <= 2 * window);
        }
    }
}
