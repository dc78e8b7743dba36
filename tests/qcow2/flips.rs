//! Images with bits turned over anywhere in their metadata: bytes or an error, never a panic, a hang or a write.

use crate::build::*;
use crate::qemu::*;
use fleecefs::image::{Format, OpenOptions};
use proptest::prelude::*;
use std::path::Path;

/// Opens, reads and asks for the status of what may be anything.
fn survive(path: &Path, snapshot: bool) {
    let asked = OpenOptions {
        format: Some(Format::Qcow2),
        read_only: true,
        snapshot: snapshot.then(|| "1".into()),
        ..Default::default()
    };
    let Ok(image) = fleecefs::image::open(path, &asked) else { return };
    let mut buf = vec![0; 64 << 10];
    let ends = [0, image.size().saturating_sub(buf.len() as u64)];
    for start in ends {
        let len = image.size().min(buf.len() as u64) as usize;
        let _ = image.read_at(&mut buf[..len], start);
        for at in (start..start + len as u64).step_by(512) {
            let _ = image.read_at(&mut buf[..512.min((image.size() - at) as usize)], at);
        }
        let mut at = start;
        for _ in 0..100 {
            if at >= image.size() {
                break;
            }
            let Ok(status) = image.block_status(at, image.size() - at) else { break };
            assert!((1..=image.size() - at).contains(&status.len), "{status:?}");
            at += status.len;
        }
    }
}

fn builds() -> Vec<Vec<u8>> {
    let over = Build {
        backing: Some(b"base".to_vec()),
        extensions: vec![(0xE279_2ACA, b"raw".to_vec())],
        ..Build::extended()
    };
    [Build::small(), Build::v2(), Build::extended(), over].map(|build| build.bytes()).to_vec()
}

fn cases() -> ProptestConfig {
    ProptestConfig::with_cases(if full() { 20_000 } else { 600 })
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn turned_bits_never_panic_hang_or_write(
        which in 0..4usize,
        flips in proptest::collection::vec((0..8u64, 0..1200u64, 0..8u32, any::<bool>()), 1..6),
        cut in prop_oneof![4 => Just(None), 1 => (0..80_000usize).prop_map(Some)],
        snapshot: bool,
    ) {
        let mut file = builds()[which].clone();
        let cluster = if which < 2 { 4096 } else { 16384 };
        for (area, at, bit, begin) in flips {
            // Most of what matters stands at the beginning of a cluster.
            let at = (area * cluster + if begin { at % 128 } else { at }) as usize;
            if let Some(byte) = file.get_mut(at) {
                *byte ^= 1 << bit;
            }
        }
        file.truncate(cut.unwrap_or(file.len()));
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("base"), vec![7; 10_000]).unwrap();
        let path = dir.path().join("image");
        std::fs::write(&path, &file).unwrap();
        survive(&path, snapshot);
        prop_assert!(std::fs::read(&path).unwrap() == file);
    }

    #[test]
    fn a_header_of_any_bytes_is_an_error_or_a_header(
        tail in proptest::collection::vec(any::<u8>(), 0..700),
        cluster_bits in 9..12u32,
        file_bytes: u64,
    ) {
        let mut bytes = b"QFI\xfb\0\0\0\x03".to_vec();
        bytes.extend(tail);
        if bytes.len() >= 112 {
            put32(&mut bytes, 20, cluster_bits);
        }
        let _ = fleecefs::image::qcow2::header::Header::parse(&bytes, file_bytes);
    }
}
