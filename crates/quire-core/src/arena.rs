//! Arenas, as the interpreter's side holds them: a reservation of addresses in which mappings by pmap `kernel`
//! are placed. See `pmap::kernel::arena`.

use std::sync::Arc;

use crate::errors::MapError;
use crate::kernel_mapping::{KernelMapping, Source};
use crate::pmap::kernel::{Ask, Region, arena};
use crate::space::SPACE;

/// What is placed in an arena.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placed {
    /// Byte of the arena at which the first byte is that was asked for.
    pub offset: u64,
    /// Bytes that were asked for.
    pub size: u64,
    /// Name of what is mapped.
    pub source: Arc<str>,
    /// PROT_ bits.
    pub prot: i32,
    /// MAP_ bits.
    pub flags: i32,
}

/// Reserves addresses; `prot` is what views of all of it are for.
///
/// # Errors
/// `Sys`, `Invalid`.
pub fn reserve(size: u64, prot: i32, source: Arc<str>) -> Result<KernelMapping, MapError> {
    KernelMapping::be_ready();
    Region::reserve(size, prot, source).map(KernelMapping::enter)
}

/// Places a mapping at a byte of an arena, `ask.address`.
///
/// # Errors
/// `Invalid` where it does not fit or overlaps another, `Sys`.
pub fn place(
    within: &KernelMapping,
    from: &Source<'_>,
    size: Option<u64>,
    ask: Ask,
) -> Result<KernelMapping, MapError> {
    let (at, reserve) = (ask.address as u64, ask.reserve);
    let ask = KernelMapping::opened(from, size, Ask { address: 0, reserve: 0, ..ask })?;
    // Elsewhere first: what can be refused is refused before anything changes in the arena.
    let mut region = Region::map(ask)?;
    let mut regions = SPACE.kernel_mut();
    match arena::place(&mut regions, within.start(), &mut region, at, reserve) {
        Ok(()) => {
            let placed = KernelMapping::enter_in(&mut regions, region);
            drop(regions);
            placed.expose(); // to who has the arena's addresses
            Ok(placed)
        }
        Err(error) => {
            drop(regions);
            region.unmap();
            Err(error)
        }
    }
}

/// What is placed in an arena, by its place.
pub fn placed(within: &KernelMapping) -> Vec<Placed> {
    let regions = SPACE.kernel();
    let start = within.start();
    let Some(around) = regions.get(&start) else { return Vec::new() };
    let base = around.range.start + around.slack;
    let inside = regions.range(start + 1..around.range.start + around.reserved);
    let entry = |region: &Region| Placed {
        offset: (region.range.start + region.slack - base) as u64,
        size: region.size,
        source: Arc::clone(&region.source),
        prot: region.prot,
        flags: region.flags,
    };
    inside.map(|(_, region)| entry(region)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::memory::{is_present, page_bytes};

    fn ask(at: usize) -> Ask {
        Ask {
            size: 0,
            offset: 0,
            prot: libc::PROT_READ | libc::PROT_WRITE,
            flags: libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            address: at,
            reserve: 0,
            opened: None,
            source: format!("at {at}").into(),
        }
    }

    fn put(within: &KernelMapping, at: usize, pages: usize) -> Result<KernelMapping, MapError> {
        place(within, &Source::Anonymous, Some((pages * page_bytes()) as u64), ask(at * page_bytes()))
    }

    #[test]
    fn what_is_placed_is_listed_and_overlaps_are_refused() {
        let page = page_bytes();
        let within = reserve((8 * page) as u64, 0, "a".into()).unwrap();
        let first = put(&within, 0, 2).unwrap();
        let _second = put(&within, 4, 4).unwrap();
        let MapError::Invalid(message) = put(&within, 1, 3).map(|_| ()).unwrap_err() else { panic!() };
        assert!(message.contains(&format!("at {page} would take")) && message.contains("at 0 has bytes 0"));
        assert!(put(&within, 7, 2).is_err() && put(&within, 8, 1).is_err());
        let starts: Vec<u64> = placed(&within).iter().map(|entry| entry.offset / page as u64).collect();
        assert_eq!(starts, [0, 4]);
        first.write(5, b"ab").unwrap();
        let mut got = [0; 2];
        within.read(5, &mut got).unwrap();
        assert_eq!(&got, b"ab");
        first.unmap();
        assert!(within.read(5, &mut got).is_err());
        let again = put(&within, 1, 3).unwrap();
        again.read(0, &mut got).unwrap();
        assert_eq!(got, [0; 2]);
    }

    #[test]
    fn an_arena_stays_until_the_last_of_what_is_placed() {
        let page = page_bytes();
        let within = reserve((4 * page) as u64, 0, "a".into()).unwrap();
        let base = within.look(|region| region.range.start + region.slack).unwrap();
        let (first, second) = (put(&within, 0, 1).unwrap(), put(&within, 1, 1).unwrap());
        drop(within);
        drop(first);
        assert!(is_present(base).is_some() && is_present(base + 3 * page).is_some());
        second.write(0, b"x").unwrap();
        drop(second);
        assert!(is_present(base + 3 * page).is_none());
    }
}
