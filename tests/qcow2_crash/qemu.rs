//! What QEMU says of an image that a crash has left.

use crate::driver::{self, Files};
use crate::images::{BASE, DATA, IMAGE, Prepared, bytes_of, run};
use crate::recorder::Medium;
use fleecefs::image::Image;
use fleecefs::storage::Storage;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

const TWIN: &str = "twin.raw";

/// Lets QEMU check the image as our repair leaves it, or repair it itself, in turns by `number`; its bytes are then
/// those of `content`. Whether `qemu-img check -r all` repaired it.
pub fn judge(prepared: &Prepared, left: &Medium, content: &[u8], number: usize) -> bool {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let medium = left.kill();
    let files = medium.files();
    let recipe = &prepared.recipe;
    let ours = number % 4 == 2;
    // `qemu-img check -r` (10.0) loses the internal snapshots of any image in which a bitmap records.
    let opened = !recipe.is_v2() && (number.is_multiple_of(4) || recipe.snapshots && recipe.bitmaps);
    if ours {
        let image = driver::read_write(&files, prepared, false).unwrap();
        assert!(bytes_of(&image).unwrap() == content);
        image.close().unwrap();
    }
    write_out(prepared, &files, dir);
    std::fs::write(dir.join(TWIN), content).unwrap();
    if !ours {
        // It can be read before anybody repairs it.
        compare(dir);
        if opened {
            // An open for writing is a repair.
            run(dir, "qemu-io", &["-f", "qcow2", "-c", "read -q 0 512", IMAGE]);
        } else {
            run(dir, "qemu-img", &["check", "-q", "-r", "all", "-f", "qcow2", IMAGE]);
        }
    }
    run(dir, "qemu-img", &["check", "-q", "-f", "qcow2", IMAGE]);
    compare(dir);
    for (name, content) in &prepared.snapshots {
        run(dir, "qemu-img", &["convert", "-f", "qcow2", "-O", "raw", "-l", name, IMAGE, "snapshot.raw"]);
        // QEMU shows as much of it as the disk is large now.
        let found = std::fs::read(dir.join("snapshot.raw")).unwrap();
        let both = found.len().min(content.len());
        assert!(found[..both] == content[..both], "internal snapshot {name}");
    }
    !ours && !opened
}

fn compare(dir: &Path) {
    run(dir, "qemu-img", &["compare", "-q", "-f", "qcow2", "-F", "raw", IMAGE, TWIN]);
}

/// Puts the files of an image into a directory.
fn write_out(prepared: &Prepared, files: &Files, dir: &Path) {
    let copy = |storage: &dyn Storage, name: &str| {
        let file = File::create(dir.join(name)).unwrap();
        let len = storage.len().unwrap();
        file.set_len(len).unwrap();
        let mut bytes = vec![0; len as usize];
        storage.read_at(&mut bytes, 0).unwrap();
        file.write_all_at(&bytes, 0).unwrap();
    };
    copy(&*files.image, IMAGE);
    if let Some(data) = &files.data {
        copy(&**data, DATA);
    }
    if let Some(base) = &prepared.base {
        std::fs::write(dir.join(BASE), base).unwrap();
    }
}
