//! QEMU's tools, and what the tests ask of an open image.

use fleecefs::image::{Image, OpenOptions};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

/// Whether qemu-img and qemu-io are there; one `skip` line where they are not, a failure where nothing may be skipped.
pub fn has_qemu(test: &str) -> bool {
    crate::tools::has_tools(test, &["qemu-img", "qemu-io"])
}

/// The full sizes are asked for.
pub fn full() -> bool {
    std::env::var_os("FLEECEFS_FULL").is_some()
}

/// Runs a tool that must succeed and gives what it printed.
#[track_caller]
pub fn run(tool: &str, args: &[&str]) -> String {
    let out = Command::new("timeout").args(["-k", "5", "120", tool]).args(args).env("LC_ALL", "C").output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(out.status.success(), "{tool} {args:?}: {}{}", text(&out.stdout), text(&out.stderr));
    text(&out.stdout)
}

/// A path as an argument.
pub fn arg(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// What QEMU reads from an image.
pub fn qemu_bytes(image: &Path, options: &[&str]) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("raw");
    run("qemu-img", &[&["convert", "-f", "qcow2", "-O", "raw"], options, &[arg(image), arg(&raw)]].concat());
    std::fs::read(&raw).unwrap()
}

/// Opens an image for reading.
pub fn open(path: &Path) -> fleecefs::error::Result<Arc<dyn Image>> {
    fleecefs::image::open(path, &OpenOptions { read_only: true, ..Default::default() })
}

/// All bytes of a disk, read in pieces of `step`.
#[track_caller]
pub fn bytes(image: &dyn Image, step: usize) -> Vec<u8> {
    let mut all = vec![0xEE; image.size() as usize];
    for (index, piece) in all.chunks_mut(step).enumerate() {
        image.read_at(piece, (index * step) as u64).unwrap();
    }
    all
}

/// The runs of a disk's block status: start, length, zero. Checks that they make progress.
#[track_caller]
pub fn statuses(image: &dyn Image) -> Vec<(u64, u64, bool)> {
    let mut all = Vec::new();
    let mut at = 0;
    while at < image.size() {
        let rest = image.size() - at;
        let status = image.block_status(at, rest).unwrap();
        assert!((1..=rest).contains(&status.len), "{status:?} at {at} of {}", image.size());
        all.push((at, status.len, status.zero));
        at += status.len;
    }
    all
}

/// The first place where two disks differ.
#[track_caller]
pub fn assert_same(ours: &[u8], theirs: &[u8], what: &str) {
    assert_eq!(ours.len(), theirs.len(), "{what}: length");
    if let Some(at) = (0..ours.len()).find(|at| ours[*at] != theirs[*at]) {
        panic!("{what}: byte {at} is {:#x}, QEMU reads {:#x}", ours[at], theirs[at]);
    }
}
