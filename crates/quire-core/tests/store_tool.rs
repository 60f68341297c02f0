//! Side by side with the `zstd` command: what quire writes it reads, and what it writes that is not
//! seekable is refused with the command that helps.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;

use quire_core::errors::OpenError;
use quire_core::store::Store;
use quire_core::store::file::FileStore;
use quire_core::store::seek_table::encode_seek_table;
use quire_core::store::zstd::{ZstdStore, compress_frame};
use quire_core::units::ByteOffset;

fn zstd(arguments: &[&str], file: &Path) -> Output {
    let output = Command::new("zstd").args(arguments).arg(file).output();
    let output = output.expect("the zstd command: install it with `apt-get install zstd`");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output
}

fn open(path: &Path) -> Result<ZstdStore, OpenError> {
    ZstdStore::open(Arc::new(FileStore::open(path).unwrap()))
}

#[test]
fn the_zstd_command_reads_what_quire_writes() {
    let folder = tempfile::tempdir().unwrap();
    let plain: Vec<u8> = (0..700_000u32).flat_map(|i| (i / 3).to_le_bytes()).collect();
    for (frame_bytes, checksums) in [(64 << 10, true), (1 << 20, false), (4 << 20, true)] {
        let (mut file, mut entries) = (Vec::new(), Vec::new());
        for data in plain.chunks(frame_bytes) {
            let (frame, checksum) = compress_frame(data, 3).unwrap();
            entries.push((frame.len() as u32, data.len() as u32, checksums.then_some(checksum)));
            file.extend(frame);
        }
        file.extend(encode_seek_table(&entries));
        let path = folder.path().join(format!("{frame_bytes}.zst"));
        fs::write(&path, file).unwrap();
        assert!(zstd(&["-dcq"], &path).stdout == plain, "{frame_bytes}");
        zstd(&["-tq"], &path);
        let store = open(&path).unwrap();
        let mut bytes = vec![0; plain.len()];
        store.read_at(ByteOffset(0), &mut bytes).unwrap();
        assert!(bytes == plain, "{frame_bytes}");
    }
}

#[test]
fn what_the_zstd_command_writes_is_refused_with_the_command_that_repacks_it() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("rows.npy");
    fs::write(&source, vec![7; 300_000]).unwrap();
    for options in [&["-q", "-f"][..], &["-q", "-f", "-T2", "-B65536"], &["-q", "-f", "--no-check"]] {
        zstd(options, &source);
        let packed = folder.path().join("rows.npy.zst");
        let Err(OpenError::Format(message)) = open(&packed) else { panic!("{options:?} opened") };
        assert!(message.contains(&format!("quire pack {} -o", packed.display())), "{message}");
    }
}
