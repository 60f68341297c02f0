//! The rule that chooses a granule.

use super::*;

const PAGE: u64 = 4096;

/// Has a size, a grain and a pace, and no bytes.
struct Facts(u64, u64, bool);

impl Store for Facts {
    fn size(&self) -> ByteCount {
        ByteCount(self.0)
    }

    fn label(&self) -> &str {
        "facts"
    }

    fn read_at(&self, _: ByteOffset, _: &mut [u8]) -> Result<(), StoreError> {
        unreachable!("a granule is chosen without a read")
    }

    fn grain(&self) -> ByteCount {
        ByteCount(self.1)
    }

    fn is_slow(&self) -> bool {
        self.2
    }

    fn bytes_fetched(&self) -> u64 {
        0
    }
}

fn chosen(facts: &Facts, budget: u64, most: Option<u64>) -> u64 {
    granule(facts, None, ByteCount(budget), most).unwrap().0
}

#[test]
fn a_granule_by_default_is_of_the_store_and_a_part_of_the_budget() {
    assert_eq!(page_bytes() as u64, PAGE);
    let (gib, kib) = (1 << 30, 1 << 10);
    let (fast, slow) = (Facts(gib, 1, false), Facts(gib, 1, true));
    assert_eq!([chosen(&fast, gib, None), chosen(&slow, gib, None)], [64 * kib, 256 * kib]);
    assert_eq!([chosen(&fast, 512 * kib, None), chosen(&slow, 512 * kib, None)], [32 * kib; 2]);
    assert_eq!([0, 1, 65_552].map(|budget| chosen(&fast, budget, None)), [PAGE, PAGE, 2 * PAGE]);
    let frames = |grain| chosen(&Facts(gib, grain, false), gib, None);
    assert_eq!([frames(PAGE), frames(24 * kib), frames(kib << 10)], [64 * kib, 48 * kib, kib << 10]);
    assert_eq!([2, 1000, 4097, 100_001].map(frames), [PAGE, PAGE, 2 * PAGE, 102_400], "one each");
}

#[test]
fn a_granule_by_default_grows_until_few_enough_are_resident() {
    let store = Facts(1 << 30, 1, false);
    let most = |most| chosen(&store, 1 << 28, Some(most));
    assert_eq!([1 << 12, (1 << 12) - 1, 1 << 10, 1].map(most), [1 << 16, 1 << 17, 1 << 18, 1 << 28]);
    assert_eq!(chosen(&Facts(100, 1, false), 1 << 28, Some(1)), 1 << 16, "a small store has few");
    assert_eq!(chosen(&Facts(0, 1, false), 1 << 28, Some(1)), 1 << 16);
    assert_eq!(chosen(&Facts(1 << 30, 100_001, false), 1 << 30, Some(1 << 13)), 2 * 102_400);
}

#[test]
fn a_granule_that_is_asked_for_is_taken_or_refused() {
    let asked = |size, bytes| {
        let store = Facts(size, 1 << 20, true);
        granule(&store, Some(ByteCount(bytes)), ByteCount(1), Some(1)).map(|granule| granule.0)
    };
    assert_eq!(asked(1 << 30, 3 * PAGE), Ok(3 * PAGE), "whatever the store, the budget, the pmap");
    assert_eq!([asked(5000, 1 << 20), asked(0, 1 << 20)], [Ok(2 * PAGE), Ok(PAGE)]);
    for bytes in [0, 1, PAGE + 1] {
        assert!(matches!(asked(1 << 30, bytes), Err(MapError::Invalid(_))), "{bytes}");
    }
}
