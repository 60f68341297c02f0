//! Any bytes as a container; the ranges that are read come from its beginning.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|file: &[u8]| {
    let seed =
        file.iter().take(64).fold(17u32, |sum, byte| sum.wrapping_mul(31).wrapping_add(u32::from(*byte)));
    let ranges: Vec<_> =
        (1..6u32).map(|turn| (seed.wrapping_mul(turn), (seed >> 7) % (turn * 5000))).collect();
    quire_core_fuzz::check(file, &ranges);
});
