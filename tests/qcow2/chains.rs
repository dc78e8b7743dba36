//! Backing files: sizes, formats, loops, depth.

use crate::build::*;
use crate::qemu::*;
use fleecefs::error::errno::{EINVAL, ELOOP, ENOENT, EOPNOTSUPP};

fn dir_with(files: &[(&str, Vec<u8>)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        std::fs::write(dir.path().join(name), bytes).unwrap();
    }
    dir
}

#[test]
fn what_an_overlay_lacks_is_the_bases_and_zeros_behind_its_end() {
    for base_len in [0, 1, 5000, 4096 * 3, 4096 * 6 - 512, 4096 * 100] {
        let build = Build { clusters: vec![Cluster::Unallocated; 6], ..Build::overlay("base", Some("raw")) };
        let base: Vec<u8> = (0..base_len).map(|i: usize| (i % 255) as u8 + 1).collect();
        let dir = dir_with(&[("base", base.clone()), ("image", build.bytes())]);
        let image = open(&dir.path().join("image")).unwrap();
        let mut expected = base;
        expected.resize(build.size as usize, 0);
        assert_same(&bytes(&*image, 1 << 20), &expected, "whole");
        assert_same(&bytes(&*image, 511), &expected, "in pieces");
        for (start, len, zero) in statuses(&*image) {
            let range = start as usize..(start + len) as usize;
            assert!(!zero || expected[range].iter().all(|byte| *byte == 0));
            assert!(zero || start < base_len as u64, "zeros behind a base of {base_len} are known");
        }
    }
}

#[test]
fn subclusters_fall_through_one_by_one() {
    let build = Build {
        backing: Some(b"base".to_vec()),
        extensions: vec![(0xE279_2ACA, b"qcow2".to_vec())],
        ..Build::extended()
    };
    let base = Build { clusters: vec![Cluster::Data(0x99); 6], size: 6 * 4096, ..Build::small() };
    let dir = dir_with(&[("base", base.bytes()), ("image", build.bytes())]);
    let image = open(&dir.path().join("image")).unwrap();
    let mut expected = build.content(0x99);
    // Subcluster 0..8 are data, 24..32 zeros, and the base ends in guest cluster 1, which is compressed.
    assert_eq!((expected[0], expected[8 * 512], expected[24 * 512]), (0x11, 0x99, 0));
    for byte in expected.iter_mut().skip(6 * 4096) {
        if *byte == 0x99 {
            *byte = 0;
        }
    }
    assert_same(&bytes(&*image, 700), &expected, "subclusters");
}

#[test]
fn a_chain_of_200_is_read_and_one_more_is_refused() {
    let mut files = vec![("0".to_string(), vec![0x5A; 6 * 4096])];
    for index in 1..=200 {
        let format = if index == 1 { "raw" } else { "qcow2" };
        files.push((index.to_string(), Build::overlay(&(index - 1).to_string(), Some(format)).bytes()));
    }
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes) in &files {
        std::fs::write(dir.path().join(name), bytes).unwrap();
    }
    let path = dir.path().join("199");
    // On a small stack, as threads that serve requests have.
    let reader = std::thread::Builder::new().stack_size(2 << 20).spawn(move || {
        let image = open(&path).unwrap();
        assert_eq!(bytes(&*image, 4096), vec![0x5A; image.size() as usize]);
        assert!(!image.block_status(0, 4096).unwrap().zero);
    });
    reader.unwrap().join().unwrap();
    let e = open(&dir.path().join("200")).unwrap_err();
    assert!(e.to_string().contains("longer than 200"), "{e}");
    assert_eq!(e.errno(), ELOOP);
}

#[test]
fn a_loop_is_refused_however_it_is_named() {
    let files = [
        ("self", Build::overlay("self", Some("qcow2")).bytes()),
        ("a", Build::overlay("b", Some("qcow2")).bytes()),
        ("b", Build::overlay("./sub/../a", Some("qcow2")).bytes()),
        ("hard", Build::overlay("link", Some("qcow2")).bytes()),
        ("raw", Build::overlay("raw", Some("raw")).bytes()),
    ];
    let dir = dir_with(&files);
    std::fs::create_dir(dir.path().join("sub")).unwrap();
    std::fs::hard_link(dir.path().join("hard"), dir.path().join("other")).unwrap();
    std::os::unix::fs::symlink("other", dir.path().join("link")).unwrap();
    for name in ["self", "a", "b", "hard", "raw"] {
        let e = open(&dir.path().join(name)).unwrap_err();
        assert_eq!(e.errno(), ELOOP, "{name}: {e}");
        assert!(e.to_string().contains("is in its own backing chain"), "{name}: {e}");
    }
}

#[test]
fn a_backing_file_is_never_probed() {
    let base = Build::small().bytes();
    let files = [
        ("base", base.clone()),
        ("none", Build::overlay("base", None).bytes()),
        ("vmdk", Build::overlay("base", Some("vmdk")).bytes()),
        ("nbd", Build::overlay("nbd:localhost:1", Some("raw")).bytes()),
        ("json", Build::overlay("json:{\"driver\":\"file\"}", Some("raw")).bytes()),
        ("gone", Build::overlay("no-such", Some("raw")).bytes()),
        ("raw", Build::overlay("base", Some("raw")).bytes()),
        ("wrong", Build::overlay("gone2", Some("qcow2")).bytes()),
        ("gone2", vec![0; 4096]),
        ("named", Build::overlay("file:base", Some("qcow2")).bytes()),
    ];
    let dir = dir_with(&files);
    for (name, errno, why) in [
        ("none", EINVAL, "doesn't record its format"),
        ("vmdk", EOPNOTSUPP, "'vmdk'"),
        ("nbd", EOPNOTSUPP, "'nbd:localhost:1' is not a path"),
        ("json", EOPNOTSUPP, "is not a path"),
        ("gone", ENOENT, "no-such"),
        ("wrong", EINVAL, "magic"),
    ] {
        let e = open(&dir.path().join(name)).unwrap_err();
        assert!(e.to_string().contains(why) && e.errno() == errno, "{name}: {e}");
        assert!(e.to_string().contains("backing file"), "{name}: {e}");
    }
    // A raw base that looks like an image is its bytes.
    let image = open(&dir.path().join("raw")).unwrap();
    assert_eq!(bytes(&*image, 4096), base[..image.size() as usize]);
    let image = open(&dir.path().join("named")).unwrap();
    assert_eq!(bytes(&*image, 4096), Build::small().content(0));
}

#[test]
fn an_error_below_is_an_error_above() {
    let mut base = Build::small().bytes();
    put64(&mut base, L2 * 4096, 2);
    let dir = dir_with(&[("base", base), ("image", Build::overlay("base", Some("qcow2")).bytes())]);
    let image = open(&dir.path().join("image")).unwrap();
    let e = image.read_at(&mut [0; 512], 0).unwrap_err();
    assert!(e.to_string().contains("base") && e.to_string().contains("reserved bits"), "{e}");
    image.read_at(&mut [0; 512], 4096).unwrap();
}
