//! What we write into an image, read back by us and by QEMU.

use crate::differential::Random;
use crate::qemu::*;
use fleecefs::image::{Image, OpenOptions};
use std::path::Path;
use std::sync::Arc;

pub fn open_rw(path: &Path) -> Arc<dyn Image> {
    fleecefs::image::open(path, &OpenOptions::default()).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Changes an image that holds `content` at random, with closes, kills and resizes in between; QEMU finds nothing wrong
/// with what is left, and reads the same.
pub fn change_and_compare(path: &Path, mut content: Vec<u8>, ops: usize, random: &mut Random, what: &str) {
    let mut image = open_rw(path);
    for step in 0..ops {
        let len = [1, 511, 512, 1536, 4096, 20_000, 65536, 300_000][random.below(8) as usize].min(content.len() as u64);
        let mut at = random.below(content.len() as u64 - len + 1);
        if random.below(2) == 0 {
            at = at / 4096 * 4096;
        }
        let range = at as usize..(at + len) as usize;
        match random.below(16) {
            0..=7 => {
                let data: Vec<u8> = (0..len).map(|i| (i / 7) as u8 ^ step as u8 | 1).collect();
                image.write_at(&data, at).unwrap();
                content[range].copy_from_slice(&data);
            }
            kind @ 8..=11 => {
                image.write_zeroes(at, len, kind % 2 == 0).unwrap();
                content[range].fill(0);
            }
            12 => image.flush().unwrap(),
            13 => {
                image.close().unwrap();
                drop(image);
                run("qemu-img", &["check", "-q", "-f", "qcow2", arg(path)]);
                image = open_rw(path);
            }
            14 => {
                drop(image);
                image = open_rw(path);
            }
            _ => {
                let size = (content.len() as u64 * (50 + random.below(100)) / 100).clamp(300_000, 20 << 20);
                image.resize(size).unwrap();
                content.resize(size as usize, 0);
            }
        }
        assert_eq!(image.size(), content.len() as u64);
        if step % 8 == 7 {
            assert_same(&bytes(&*image, 1 << 20), &content, &format!("{what} step {step}"));
        }
    }
    assert_same(&bytes(&*image, 65_537), &content, what);
    for (start, len, zero) in statuses(&*image) {
        let range = start as usize..(start + len) as usize;
        assert!(!zero || content[range].iter().all(|byte| *byte == 0), "{what}: no zeros at {start}+{len}");
    }
    image.close().unwrap();
    drop(image);
    let out = std::process::Command::new("qemu-img").args(["check", "-f", "qcow2", arg(path)]).output().unwrap();
    assert!(out.status.success(), "{what}: {}", String::from_utf8_lossy(&out.stdout));
    let expected = qemu_bytes(path, &[]);
    // QEMU knows whole sectors only.
    content.truncate(content.len() / 512 * 512);
    assert_same(&expected, &content, what);
}
