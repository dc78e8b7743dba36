//! Images on block devices, raw data files longer than their disk, tables that move, files that end early.

use crate::differential::Random;
use crate::qemu::*;
use crate::writing::{change_and_compare, open_rw};
use fleecefs::error::errno;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const MIB: u64 = 1 << 20;

fn create(path: &Path, options: &str, size: u64) {
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, arg(path), &size.to_string()]);
}

fn check(path: &Path) {
    run("qemu-img", &["check", "-q", "-f", "qcow2", arg(path)]);
}

/// A loop device. It goes with this value.
struct Loop(PathBuf);

impl Loop {
    /// None, and a skip line, where there can be none.
    fn over(file: &Path, test: &str) -> Option<Loop> {
        match Command::new("losetup").args(["--find", "--show"]).arg(file).output() {
            Ok(out) if out.status.success() => Some(Loop(String::from_utf8(out.stdout).unwrap().trim().into())),
            _ => {
                assert!(std::env::var_os("FLEECEFS_REQUIRE_TOOLS").is_none(), "{test}: without losetup");
                eprintln!("skip {test}: without losetup, or not as root");
                None
            }
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.0).output();
    }
}

#[test]
fn an_image_fills_a_block_device_of_old_bytes() {
    if !has_qemu("an_image_fills_a_block_device_of_old_bytes") {
        return;
    }
    let all =
        ["cluster_size=64k", "cluster_size=512,compat=0.10", "cluster_size=64k,extended_l2=on", "cluster_size=2M"];
    for (seed, options) in (1..).zip(all) {
        let dir = tempfile::tempdir().unwrap();
        let medium = dir.path().join("medium");
        fs::write(&medium, vec![0xAA; 48 << 20]).unwrap();
        let Some(device) = Loop::over(&medium, "an_image_fills_a_block_device_of_old_bytes") else { return };
        create(&device.0, options, 3 * MIB);
        change_and_compare(&device.0, vec![0; 3 << 20], 40, &mut Random(seed), options);
    }
}

#[test]
fn a_block_device_that_is_full_takes_more_once_it_is_enlarged() {
    if !has_qemu("a_block_device_that_is_full_takes_more_once_it_is_enlarged") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let medium = dir.path().join("medium");
    fs::write(&medium, vec![0; 2 << 20]).unwrap();
    let Some(device) = Loop::over(&medium, "a_block_device_that_is_full_takes_more_once_it_is_enlarged") else {
        return;
    };
    create(&device.0, "cluster_size=64k", 8 * MIB);
    let image = open_rw(&device.0);
    let data = vec![7; 1 << 20];
    image.write_at(&data, 0).unwrap();
    let e = image.write_at(&data, MIB).unwrap_err();
    assert_eq!(e.errno(), errno::ENOSPC);
    assert!(e.to_string().contains("the block device is full: it has 2097152 bytes"), "{e}");
    fs::OpenOptions::new().write(true).open(&medium).unwrap().set_len(4 << 20).unwrap();
    run("losetup", &["-c", arg(&device.0)]);
    image.write_at(&data, MIB).unwrap();
    image.close().unwrap();
    drop(image);
    check(&device.0);
    let expected = [vec![7; 2 << 20], vec![0; 6 << 20]].concat();
    assert_same(&qemu_bytes(&device.0, &[]), &expected, "enlarged");
}

#[test]
fn a_raw_data_file_is_the_disk_by_itself() {
    if !has_qemu("a_raw_data_file_is_the_disk_by_itself") {
        return;
    }
    for (seed, more) in (1..).zip(["", ",extended_l2=on", ",cluster_size=2M"]) {
        let dir = tempfile::tempdir().unwrap();
        let (image, data) = (dir.path().join("image"), dir.path().join("data"));
        create(&image, &format!("data_file={},data_file_raw=on{more}", data.display()), 3 * MIB);
        // What the disk grows over was used by somebody before.
        let file = fs::OpenOptions::new().write(true).open(&data).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &vec![0x55; 20 << 20], 3 * MIB).unwrap();
        change_and_compare(&image, vec![0; 3 << 20], 60, &mut Random(seed), more);
        let expected = qemu_bytes(&image, &[]);
        assert_same(&fs::read(&data).unwrap()[..expected.len()], &expected, "the data file");
    }
}

/// The refcount table grows, and its old place is used for something else, while the image is in use.
#[test]
fn a_refcount_table_moves_while_the_image_is_written() {
    if !has_qemu("a_refcount_table_moves_while_the_image_is_written") {
        return;
    }
    const STEP: usize = 100 << 10;
    for options in ["cluster_size=512,compat=0.10", "cluster_size=512", "cluster_size=512,refcount_bits=64"] {
        for close_between in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("image");
            create(&path, options, 24 * MIB);
            let image = open_rw(&path);
            let mut content = vec![0; 24 << 20];
            for (index, piece) in content.chunks_mut(STEP).take(200).enumerate() {
                piece.fill(index as u8 + 1);
                image.write_at(piece, (index * STEP) as u64).unwrap();
                if index % 50 == 49 {
                    if close_between {
                        image.close().unwrap();
                    } else {
                        // What was freed by then can be used again.
                        image.flush().unwrap();
                    }
                }
            }
            let what = format!("{options}, close {close_between}");
            assert_same(&bytes(&*image, 1 << 20), &content, &what);
            image.close().unwrap();
            drop(image);
            check(&path);
            assert_same(&qemu_bytes(&path, &[]), &content, &what);
        }
    }
}

/// A file may end inside its last cluster: the rest of that reads as zeros, and can be written.
#[test]
fn a_cluster_in_which_the_file_ends_is_written() {
    if !has_qemu("a_cluster_in_which_the_file_ends_is_written") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    create(&path, "cluster_size=64k", MIB);
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 1 0 64k", "-c", "write -z 0 64k", arg(&path)]);
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(file.metadata().unwrap().len() - 60_000).unwrap();
    let image = open_rw(&path);
    image.write_at(&[9; 512], 40_960).unwrap();
    image.close().unwrap();
    drop(image);
    check(&path);
    let mut content = vec![0; 1 << 20];
    content[40_960..41_472].fill(9);
    assert_same(&qemu_bytes(&path, &[]), &content, "written");
}
