//! Images that we make, and clusters that we store compressed, as QEMU sees them.

use crate::differential::Random;
use crate::qemu::*;
use crate::writing::open_rw;
use fleecefs::error::errno;
use fleecefs::image::Format;
use fleecefs::image::qcow2::create::{CreateOptions, create};
use fleecefs::image::qcow2::header::Compression;
use std::path::Path;

const K: u64 = 1024;
const M: u64 = 1024 * K;

fn info(path: &Path) -> serde_json::Value {
    serde_json::from_str(&run("qemu-img", &["info", "--output=json", arg(path)])).unwrap()
}

/// Bytes of which some clusters compress well, some badly, some are zeros.
fn mixed(len: usize, random: &mut Random) -> Vec<u8> {
    let mut bytes = vec![0; len];
    for piece in bytes.chunks_mut(4096) {
        match random.below(4) {
            0 => piece.iter_mut().for_each(|byte| *byte = random.below(256) as u8),
            1 => piece.iter_mut().enumerate().for_each(|(i, byte)| *byte = (i / 7) as u8),
            2 => piece.iter_mut().for_each(|byte| *byte = b'a' + random.below(6) as u8),
            _ => (),
        }
    }
    bytes
}

#[test]
fn an_image_of_every_shape_is_one_for_qemu() {
    if !has_qemu("an_image_of_every_shape_is_one_for_qemu") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let sizes = [0, 1, 512, 3 * M + 512, 300 * M, 128 << 30];
    for (number, cluster_bytes) in [512, 4 * K, 64 * K, 2 * M].into_iter().enumerate() {
        for size in sizes {
            let path = dir.path().join(format!("{number}-{size}.qcow2"));
            let compression = if number % 2 == 0 { Compression::Zlib } else { Compression::Zstd };
            create(&path, &CreateOptions { cluster_bytes, compression, ..CreateOptions::new(size) }).unwrap();
            run("qemu-img", &["check", "-q", "-f", "qcow2", arg(&path)]);
            let info = info(&path);
            assert_eq!(info["virtual-size"], size.next_multiple_of(512), "{cluster_bytes} {size}");
            assert_eq!(info["cluster-size"], cluster_bytes);
            let kind = if number % 2 == 0 { "zlib" } else { "zstd" };
            assert_eq!(info["format-specific"]["data"]["compression-type"], kind);
            if size > 0 {
                let image = open_rw(&path);
                let at = size - size.min(700);
                image.write_at(&vec![7; (size - at) as usize], at).unwrap();
                image.close().unwrap();
                drop(image);
                run("qemu-img", &["check", "-q", "-f", "qcow2", arg(&path)]);
            }
            assert_eq!(create(&path, &CreateOptions::new(M)).unwrap_err().errno(), errno::EEXIST);
        }
    }
}

#[test]
fn what_the_format_cannot_say_is_refused_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.qcow2");
    let plain = CreateOptions::new(M);
    let long = Some(("b".repeat(1024), Format::Raw));
    for (options, number) in [
        (CreateOptions { cluster_bytes: 1000, ..plain.clone() }, errno::EINVAL),
        (CreateOptions { cluster_bytes: 256, ..plain.clone() }, errno::EINVAL),
        (CreateOptions { cluster_bytes: 4 * M, ..plain.clone() }, errno::EINVAL),
        (CreateOptions { cluster_bytes: 512, ..CreateOptions::new(1 << 40) }, errno::EFBIG),
        (CreateOptions::new(u64::MAX), errno::EFBIG),
        (CreateOptions { backing: long.clone(), ..plain.clone() }, errno::EINVAL),
        (CreateOptions { backing: long, cluster_bytes: 512, ..plain.clone() }, errno::ENOSPC),
        (CreateOptions { backing: Some((String::new(), Format::Raw)), ..plain.clone() }, errno::EINVAL),
    ] {
        let e = create(&path, &options).unwrap_err();
        assert_eq!(e.errno(), number, "{options:?}: {e}");
        assert!(!path.exists());
    }
    std::os::unix::fs::symlink("nowhere", &path).unwrap();
    assert_eq!(create(&path, &plain).unwrap_err().errno(), errno::EEXIST);
    assert_eq!(create(&dir.path().join("no/x"), &plain).unwrap_err().errno(), errno::ENOENT);
}

#[test]
fn a_chain_of_images_is_one_for_qemu() {
    if !has_qemu("a_chain_of_images_is_one_for_qemu") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut random = Random(5);
    let mut content = mixed(2 * M as usize + 1024, &mut random);
    std::fs::create_dir(dir.path().join("0")).unwrap();
    std::fs::write(dir.path().join("0/base.raw"), &content).unwrap();
    let mut below = ("../0/base.raw".to_owned(), Format::Raw);
    for point in 1..4 {
        std::fs::create_dir(dir.path().join(point.to_string())).unwrap();
        let path = dir.path().join(format!("{point}/vda.qcow2"));
        let size = content.len() as u64;
        create(&path, &CreateOptions { backing: Some(below), ..CreateOptions::new(size) }).unwrap();
        let image = open_rw(&path);
        let at = (point * 3 * 64 * K) as usize;
        let new = mixed(3 * 64 * K as usize, &mut random);
        image.write_compressed(&new, at as u64).unwrap();
        content[at..at + new.len()].copy_from_slice(&new);
        image.write_zeroes(0, 64 * K, true).unwrap();
        content[..64 * K as usize].fill(0);
        image.close().unwrap();
        drop(image);
        run("qemu-img", &["check", "-q", "-f", "qcow2", arg(&path)]);
        assert_same(&qemu_bytes(&path, &[]), &content, "the chain");
        below = (format!("../{point}/vda.qcow2"), Format::Qcow2);
    }
}

#[test]
fn clusters_written_compressed_are_read_by_qemu_and_by_us() {
    if !has_qemu("clusters_written_compressed_are_read_by_qemu_and_by_us") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for (number, (cluster, compression)) in [512, 4 * K, 64 * K, 2 * M]
        .into_iter()
        .flat_map(|cluster| [(cluster, Compression::Zlib), (cluster, Compression::Zstd)])
        .enumerate()
    {
        let path = dir.path().join(format!("{number}.qcow2"));
        let size = (cluster * 40).clamp(300 * K, 10 * M) + 1400;
        let mut random = Random(number as u64 + 1);
        let content = mixed(size as usize, &mut random);
        create(&path, &CreateOptions { cluster_bytes: cluster, compression, ..CreateOptions::new(size) }).unwrap();
        let image = open_rw(&path);
        // Several threads, each with pieces of its own, some of which are written plain.
        let piece = (4 * cluster).max(256 * K);
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let (image, content) = (&image, &content);
                scope.spawn(move || {
                    for at in (0..size).step_by(piece as usize).skip(thread).step_by(4) {
                        let data = &content[at as usize..(at + piece).min(size) as usize];
                        match at / piece % 7 {
                            3 => image.write_at(data, at).unwrap(),
                            _ => image.write_compressed(data, at).unwrap(),
                        }
                    }
                });
            }
        });
        assert_same(&bytes(&*image, 100_000)[..content.len()], &content, "before the close");
        image.close().unwrap();
        drop(image);
        let what = format!("clusters of {cluster}, {compression:?}");
        run("qemu-img", &["check", "-q", "-f", "qcow2", arg(&path)]);
        let mut theirs = qemu_bytes(&path, &[]);
        theirs.truncate(content.len());
        assert_same(&theirs, &content, &what);
        let map = run("qemu-img", &["map", "--output=json", arg(&path)]);
        assert!(map.contains("\"compressed\": true"), "{what}: {map}");
        let file = std::fs::metadata(&path).unwrap().len();
        assert!(!(4 * K..M).contains(&cluster) || file < size, "{what}: {file} bytes for {size}");
        // Over compressed clusters: compressed ones, plain ones and parts of one; then what was freed is used again.
        let mut content = content;
        let image = open_rw(&path);
        for round in 0..40 {
            let at = random.below(size / cluster) * cluster;
            let data = mixed((cluster * (1 + round % 3)).min(size - at) as usize, &mut random);
            content[at as usize..][..data.len()].copy_from_slice(&data);
            match random.below(3) {
                0 => image.write_at(&data, at).unwrap(),
                _ => image.write_compressed(&data, at).unwrap(),
            }
            if round % 5 == 0 {
                image.flush().unwrap();
            }
            let mut now = vec![0; data.len()];
            image.read_at(&mut now, at).unwrap();
            assert_same(&now, &data, "just written");
        }
        assert_same(&bytes(&*image, 100_000)[..content.len()], &content, &what);
        image.close().unwrap();
        drop(image);
        run("qemu-img", &["check", "-q", "-f", "qcow2", arg(&path)]);
        let mut theirs = qemu_bytes(&path, &[]);
        theirs.truncate(content.len());
        assert_same(&theirs, &content, &what);
    }
}

#[test]
fn what_cannot_be_compressed_is_refused_or_written_plain() {
    if !has_qemu("what_cannot_be_compressed_is_refused_or_written_plain") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    create(&path, &CreateOptions::new(M + 512)).unwrap();
    let image = open_rw(&path);
    let data = vec![1; 64 * K as usize];
    for (offset, len) in [(512, 64 * K), (0, 512), (0, 64 * K + 512)] {
        let e = image.write_compressed(&data.repeat(2)[..len as usize], offset).unwrap_err();
        assert_eq!(e.errno(), errno::EINVAL, "{offset} {len}");
    }
    assert_eq!(image.write_compressed(&data, M).unwrap_err().errno(), errno::ENOSPC);
    image.write_compressed(&data[..512], M).unwrap();
    // A cluster of its own keeps it.
    image.write_at(&[2], 5).unwrap();
    image.write_compressed(&data, 0).unwrap();
    image.close().unwrap();
    drop(image);
    let map = run("qemu-img", &["map", "--output=json", arg(&path)]);
    let map: Vec<serde_json::Value> = serde_json::from_str(&map).unwrap();
    let compressed: Vec<u64> =
        map.iter().filter(|run| run["compressed"] == true).map(|run| run["start"].as_u64().unwrap()).collect();
    assert_eq!(compressed, [M]);
    let raw = dir.path().join("raw");
    std::fs::write(&raw, [0; 512]).unwrap();
    let old = dir.path().join("old.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", "compat=0.10", arg(&old), "1M"]);
    let raw = fleecefs::image::open(&raw, &fleecefs::image::OpenOptions::default()).unwrap();
    for image in [raw, open_rw(&old)] {
        assert_eq!(image.write_compressed(&[], 0).unwrap_err().errno(), errno::EOPNOTSUPP);
    }
}
