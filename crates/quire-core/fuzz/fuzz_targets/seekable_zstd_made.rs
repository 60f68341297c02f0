//! Containers that are right but for a few lies.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use quire_core::store::seek_table::encode_seek_table;
use quire_core::store::zstd::compress_frame;

/// One frame of a container.
#[derive(Arbitrary, Debug)]
enum Frame {
    /// These bytes, stored as they are.
    Packed(Vec<u8>),
    /// These bytes, compressed.
    Data { bytes: Vec<u8>, repeat: u8, level: i8 },
    /// As many bytes as the frames that are decoded in parts have.
    Even { byte: u8, step: u8 },
    /// A skippable frame.
    Skippable(Vec<u8>),
}

/// A change of the finished container.
#[derive(Arbitrary, Debug)]
enum Lie {
    /// The table says other sizes of a frame.
    Sizes { frame: u8, packed: i8, plain: i8 },
    /// One byte anywhere.
    Byte { at: u16, xor: u8 },
}

#[derive(Arbitrary, Debug)]
struct Container {
    frames: Vec<Frame>,
    checksums: bool,
    lies: Vec<Lie>,
    ranges: Vec<(u32, u32)>,
}

fn pack(frame: &Frame) -> Option<(Vec<u8>, u32, u32)> {
    let data = match frame {
        Frame::Packed(bytes) => return Some((bytes.clone(), bytes.len() as u32, 0)),
        Frame::Skippable(bytes) => {
            let head = [0x184D_2A50u32.to_le_bytes(), (bytes.len() as u32).to_le_bytes()].concat();
            return Some(([head.as_slice(), bytes].concat(), 0, 0));
        }
        Frame::Data { bytes, repeat, .. } => bytes.repeat(usize::from(*repeat)),
        Frame::Even { byte, step } => {
            (0..128u32 << 10).map(|i| byte.wrapping_add((i / 97) as u8).wrapping_mul(*step)).collect()
        }
    };
    let level = if let Frame::Data { level, .. } = frame { i32::from(*level % 4) } else { 1 };
    let (packed, checksum) = compress_frame(&data, level).ok()?;
    Some((packed, data.len() as u32, checksum))
}

fuzz_target!(|container: Container| {
    let mut file = Vec::new();
    let mut entries = Vec::new();
    for frame in container.frames.iter().take(20) {
        let Some((packed, plain, checksum)) = pack(frame) else { return };
        entries.push((packed.len() as u32, plain, container.checksums.then_some(checksum)));
        file.extend(packed);
    }
    for lie in &container.lies {
        if let Lie::Sizes { frame, packed, plain } = lie
            && !entries.is_empty()
        {
            let index = usize::from(*frame) % entries.len();
            entries[index].0 = entries[index].0.saturating_add_signed(i32::from(*packed));
            entries[index].1 = entries[index].1.saturating_add_signed(i32::from(*plain));
            // What one frame loses another gets, so that the sums stay right.
            let next = (index + 1) % entries.len();
            entries[next].0 = entries[next].0.saturating_add_signed(-i32::from(*packed));
        }
    }
    file.extend(encode_seek_table(&entries));
    for lie in &container.lies {
        if let Lie::Byte { at, xor } = lie {
            let at = usize::from(*at) % file.len();
            file[at] ^= xor;
        }
    }
    quire_core_fuzz::check(&file, &container.ranges[..container.ranges.len().min(8)]);
});
