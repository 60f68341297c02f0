//! Hostile containers: the files of `tests/hostile`, and every cut and every flipped bit of them.
//! The reader gives the right bytes or an error; it never panics and never gives other bytes.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use quire_core::errors::{FaultCode, OpenError, StoreError};
use quire_core::store::Store;
use quire_core::store::memory::MemoryStore;
use quire_core::store::zstd::ZstdStore;
use quire_core::units::ByteOffset;

/// Name and bytes of the files whose names begin with `kind`.
fn files(kind: &str) -> Vec<(String, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/hostile");
    let mut found: Vec<_> = fs::read_dir(folder)
        .expect("tests/hostile is part of the repository")
        .map(|entry| entry.unwrap())
        .map(|entry| (entry.file_name().into_string().unwrap(), entry.path()))
        .filter(|(name, _)| name.starts_with(kind) && name.ends_with(".zst"))
        .map(|(name, path)| (name, fs::read(path).unwrap()))
        .collect();
    found.sort();
    assert!(found.len() > 10, "{kind}: {} files", found.len());
    found
}

fn open(file: Vec<u8>) -> Result<ZstdStore, OpenError> {
    ZstdStore::open(Arc::new(MemoryStore::new("hostile.zst", file)))
}

fn read(store: &ZstdStore, start: u64, end: u64) -> Result<Vec<u8>, StoreError> {
    let mut bytes = vec![0xAA; (end - start) as usize];
    store.read_at(ByteOffset(start), &mut bytes).map(|()| bytes)
}

fn read_all(store: &ZstdStore) -> Result<Vec<u8>, StoreError> {
    read(store, 0, store.size().0)
}

fn pattern(len: u64) -> Vec<u8> {
    (0..len).map(|i| (i % 251) as u8).collect()
}

#[test]
fn odd_files_read_right() {
    for (name, file) in files("reads") {
        let store = open(file).unwrap_or_else(|error| panic!("{name}: {error}"));
        let size = store.size().0;
        let bytes = read_all(&store).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(bytes == pattern(size), "{name}");
        for start in (0..size).step_by(7) {
            for end in [start + 1, start + 10, start + 75, size] {
                let end = end.min(size);
                assert_eq!(read(&store, start, end).unwrap(), bytes[start as usize..end as usize], "{name}");
            }
        }
    }
}

#[test]
fn what_is_refused_says_what_to_do_or_what_is_wrong() {
    for (name, file) in files("refused") {
        let Err(OpenError::Format(message)) = open(file) else { panic!("{name} opened") };
        let words = ["repack it", "no seek table at its end", "damaged seek table"];
        assert!(words.iter().any(|word| message.contains(word)), "{name}: {message}");
        assert!(message.contains("hostile.zst"), "{name}: {message}");
    }
}

#[test]
fn wrong_frames_fail_by_name() {
    for (name, file) in files("fails") {
        let store = open(file).unwrap_or_else(|error| panic!("{name}: {error}"));
        let error = read_all(&store).expect_err(&name);
        let code = if name.contains("fails-checksum") { FaultCode::Checksum } else { FaultCode::Corrupt };
        assert_eq!(error.code, code, "{name}: {error}");
        assert!(error.message.contains("hostile.zst: frame "), "{name}: {error}");
        // A frame that is wrong spoils neither the context nor the frames beside it.
        let again = read_all(&store).expect_err(&name);
        assert_eq!(again, error, "{name}");
    }
}

#[test]
fn frames_beside_a_wrong_one_still_read() {
    for (name, file) in files("fails") {
        let spoiled_first = match name.as_str() {
            "fails-second-frame-damaged.zst" => 100,
            "fails-checksum-of-the-last.zst" => 300,
            _ => continue,
        };
        let store = open(file).unwrap();
        assert!(read_all(&store).is_err());
        assert_eq!(read(&store, 0, spoiled_first).unwrap(), pattern(spoiled_first), "{name}");
        assert!(read(&store, spoiled_first, spoiled_first + 1).is_err(), "{name}");
    }
}

#[test]
fn no_cut_file_opens() {
    for (name, file) in files("reads") {
        for len in 0..file.len() {
            assert!(open(file[..len].to_vec()).is_err(), "{name} cut to {len} bytes");
        }
    }
}

#[test]
fn no_flipped_bit_makes_a_panic_or_other_bytes_where_there_are_checksums() {
    for (name, file) in ["reads", "refused", "fails"].into_iter().flat_map(files) {
        if file.len() > 1000 {
            continue;
        }
        for bit in 0..file.len() * 8 {
            let mut flipped = file.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            let Ok(store) = open(flipped) else { continue };
            let Ok(bytes) = read_all(&store) else { continue };
            if name == "reads-checksums.zst" {
                assert!(bytes == pattern(536), "{name}: bit {bit} made other bytes");
            }
        }
    }
}
