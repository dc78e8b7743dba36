//! Every kind of image that QEMU makes, read by both.

use crate::qemu::*;
use fleecefs::image::Image;
use std::path::Path;

/// Small numbers that look random and are the same in each run.
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

#[derive(Debug, Clone, Copy)]
struct Cell {
    version: u32,
    cluster_size: u64,
    /// "" for none.
    compression: &'static str,
    extended_l2: bool,
    /// "", "qcow2" or "raw".
    data_file: &'static str,
    /// Format of the base, "" for none; and whether it is smaller than the overlay.
    backing: (&'static str, bool),
    /// "" for off.
    preallocation: &'static str,
}

impl Cell {
    /// What the format, or QEMU, has no way to make.
    fn exists(&self) -> bool {
        let external = !self.data_file.is_empty();
        let newer = self.extended_l2 || external || self.compression == "zstd";
        let preallocated = !self.preallocation.is_empty();
        !(newer && self.version == 2
            || self.extended_l2 && self.cluster_size < 16384
            || external && !self.compression.is_empty()
            || self.data_file == "raw" && !self.backing.0.is_empty()
            || preallocated && !self.backing.0.is_empty() && !self.extended_l2
            || preallocated && !self.compression.is_empty())
    }

    fn options(&self) -> String {
        let mut options =
            format!("compat={},cluster_size={}", if self.version == 2 { "0.10" } else { "1.1" }, self.cluster_size);
        if self.extended_l2 {
            options += ",extended_l2=on";
        }
        if self.compression == "zstd" {
            options += ",compression_type=zstd";
        }
        if !self.data_file.is_empty() {
            options += ",data_file=image.data";
        }
        if self.data_file == "raw" {
            options += ",data_file_raw=on";
        }
        if !self.preallocation.is_empty() {
            options += &format!(",preallocation={}", self.preallocation);
        }
        options
    }
}

fn cells() -> Vec<Cell> {
    let mut cells = Vec::new();
    for version in [2, 3] {
        for cluster_size in [512, 4096, 16384, 65536, 2 << 20] {
            for compression in ["", "zlib", "zstd"] {
                for extended_l2 in [false, true] {
                    for data_file in ["", "qcow2", "raw"] {
                        for backing in [("", false), ("raw", true), ("qcow2", true), ("qcow2", false)] {
                            for preallocation in ["", "metadata", "falloc"] {
                                cells.push(Cell {
                                    version,
                                    cluster_size,
                                    compression,
                                    extended_l2,
                                    data_file,
                                    backing,
                                    preallocation,
                                });
                            }
                        }
                    }
                }
            }
        }
    }
    cells.retain(Cell::exists);
    cells
}

/// A pattern that compresses, but not to nothing.
fn pattern() -> Vec<u8> {
    let mut random = Random(7);
    (0..65536).map(|i| if i % 3 == 0 { random.below(256) as u8 } else { (i / 512) as u8 }).collect()
}

fn make_base(dir: &Path, format: &str, size: u64, random: &mut Random) {
    let (raw, base) = (dir.join("base.raw"), dir.join("base"));
    run("qemu-img", &["create", "-q", "-f", "raw", arg(&raw), &size.to_string()]);
    let writes: Vec<String> = (0..12)
        .map(|_| {
            let at = random.below(size - 70_000) / 512 * 512;
            format!("write -q -P {} {at} {}", random.below(255) + 1, 512 + random.below(128) * 512)
        })
        .collect();
    qemu_io(&raw, "raw", &writes);
    // Clusters of another size than the overlay's.
    let options = ["convert", "-f", "raw", "-O", format, "-o", "cluster_size=8192"];
    let options = if format == "raw" { &options[..5] } else { &options[..] };
    run("qemu-img", &[options, &[arg(&raw), arg(&base)]].concat());
}

fn qemu_io(path: &Path, format: &str, commands: &[String]) {
    let mut args = vec!["-f", format];
    for command in commands {
        args.extend(["-c", command]);
    }
    args.push(arg(path));
    run("qemu-io", &args);
}

/// Compressed ones first: QEMU compresses only into clusters that are not allocated yet, so those after it may fail.
fn writes(cell: &Cell, size: u64, random: &mut Random, pattern: &Path) -> Vec<String> {
    let cluster = cell.cluster_size;
    let mut writes: Vec<String> = (0..24)
        .map(|_| {
            let len = [512, 1024, 4096, cluster, cluster * 2, 65536][random.below(6) as usize].min(size / 2);
            let at = random.below(size - len) / 512 * 512;
            let byte = random.below(255) + 1;
            let aligned = random.below(size / cluster) * cluster;
            match random.below(8) {
                0 | 1 if !cell.compression.is_empty() && aligned + cluster <= size => {
                    format!("write -q -c -s {} {aligned} {cluster}", arg(pattern))
                }
                0 if cell.version == 3 => format!("write -q -z -u {at} {len}"),
                1 if cell.version == 3 => format!("write -q -z {at} {len}"),
                2 => format!("discard -q {at} {len}"),
                3 => format!("write -q -s {} {at} {len}", arg(pattern)),
                _ => format!("write -q -P {byte} {at} {len}"),
            }
        })
        .collect();
    writes.sort_by_key(|write| !write.contains(" -c "));
    writes
}

/// Where QEMU knows zeros we know them too; where we say zeros there are some, and QEMU knows of no data but such as
/// its host's file has as a hole.
fn compare_status(image: &dyn Image, path: &Path, content: &[u8], what: &str) {
    let map: serde_json::Value =
        serde_json::from_str(&run("qemu-img", &["map", "-f", "qcow2", "--output=json", arg(path)])).unwrap();
    let ours = statuses(image);
    let mut zero = vec![false; content.len()];
    for (start, len, is_zero) in &ours {
        if *is_zero {
            let range = *start as usize..(start + len) as usize;
            assert!(content[range.clone()].iter().all(|byte| *byte == 0), "{what}: no zeros at {start}+{len}");
            zero[range].fill(true);
        }
    }
    for extent in map.as_array().unwrap() {
        let number = |key: &str| extent[key].as_u64().unwrap() as usize;
        let range = number("start")..(number("start") + number("length")).min(content.len());
        if extent["zero"].as_bool().unwrap() {
            assert!(zero[range.clone()].iter().all(|z| *z), "{what}: QEMU knows zeros at {range:?}: {extent}");
        }
        if extent["compressed"].as_bool() == Some(true) {
            assert!(zero[range.clone()].iter().all(|z| !*z), "{what}: compressed data cannot be known: {extent}");
        }
    }
}

fn check(cell: &Cell, seed: u64) {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let mut random = Random(seed);
    let path = dir.join("image");
    let (size, what) = (cell.cluster_size.max(65536) * 5 / 2 + 512 * 37, format!("{cell:?} seed {seed}"));
    let mut create = vec!["create", "-q", "-f", "qcow2"];
    let options = cell.options().replace("image.data", &format!("{}/image.data", arg(dir)));
    create.extend(["-o", &options]);
    if !cell.backing.0.is_empty() {
        let base_size = if cell.backing.1 { size / 2 / 512 * 512 } else { size * 2 };
        make_base(dir, cell.backing.0, base_size, &mut random);
        create.extend(["-b", "base", "-F", cell.backing.0]);
    }
    let size_text = size.to_string();
    create.extend([arg(&path), &size_text]);
    run("qemu-img", &create);
    let pattern_file = dir.join("pattern");
    std::fs::write(&pattern_file, pattern()).unwrap();
    let commands = writes(cell, size, &mut random, &pattern_file);
    let flat: Vec<&str> = commands.iter().flat_map(|command| ["-c", command]).collect();
    // Whatever fails of it, QEMU says afterwards what the image holds.
    std::process::Command::new("qemu-io").args(["-f", "qcow2"]).args(flat).arg(&path).output().unwrap();
    let before = std::fs::read(&path).unwrap();

    let expected = qemu_bytes(&path, &[]);
    let image = open(&path).unwrap_or_else(|e| panic!("{what}: {e}"));
    assert_eq!((image.size(), image.format().to_string().as_str()), (size, "qcow2"));
    assert_same(&bytes(&*image, 1 << 20), &expected, &what);
    assert_same(&bytes(&*image, 4096), &expected, &what);
    for _ in 0..50 {
        let (at, len) = (random.below(size) as usize, random.below(100_000) as usize);
        let mut piece = vec![0xEE; len.min(size as usize - at)];
        image.read_at(&mut piece, at as u64).unwrap();
        assert!(piece == expected[at..at + piece.len()], "{what}: {len} bytes at {at}");
    }
    compare_status(&*image, &path, &expected, &what);
    drop(image);
    assert!(std::fs::read(&path).unwrap() == before, "{what}: the image was changed");
    crate::writing::change_and_compare(&path, expected, if full() { 48 } else { 24 }, &mut random, &what);
}

#[test]
fn every_kind_of_image_is_read_and_written_as_qemu_does_it() {
    if !has_qemu("every_kind_of_image_is_read_and_written_as_qemu_does_it") {
        return;
    }
    let cells = cells();
    // Each feature meets each other one within a few dozen cells; the full check takes them all.
    let step = if full() { 1 } else { 9 };
    let chosen: Vec<_> = cells.iter().enumerate().skip(3).step_by(step).collect();
    assert!(chosen.len() > 20);
    std::thread::scope(|scope| {
        for part in 0..2 {
            let chosen = &chosen;
            scope.spawn(move || {
                for (seed, cell) in chosen.iter().skip(part).step_by(2) {
                    check(cell, *seed as u64);
                }
            });
        }
    });
}

#[test]
fn an_image_that_was_converted_with_compression_is_read() {
    if !has_qemu("an_image_that_was_converted_with_compression_is_read") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (raw, path) = (dir.path().join("raw"), dir.path().join("image.qcow2"));
    let mut random = Random(3);
    let data: Vec<u8> = pattern()
        .repeat(40)
        .chunks(4096)
        .flat_map(|chunk| {
            let keep = random.below(3);
            chunk.iter().map(move |byte| if keep == 0 { 0 } else { *byte })
        })
        .collect();
    std::fs::write(&raw, &data).unwrap();
    for options in ["compression_type=zlib", "compression_type=zstd", "compression_type=zstd,cluster_size=2M"] {
        run("qemu-img", &["convert", "-q", "-c", "-f", "raw", "-O", "qcow2", "-o", options, arg(&raw), arg(&path)]);
        let image = open(&path).unwrap();
        assert_same(&bytes(&*image, 1 << 20), &data, options);
        assert_same(&bytes(&*image, 3333), &data, options);
        // Many readers of the same few clusters.
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| assert_same(&bytes(&*image, 16384), &data, options));
            }
        });
    }
}

#[test]
fn internal_snapshots_are_served_as_they_were() {
    if !has_qemu("internal_snapshots_are_served_as_they_were") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for options in ["compat=0.10", "compat=1.1,cluster_size=4096", "compat=1.1,extended_l2=on"] {
        let path = dir.path().join("image");
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, arg(&path), "5M"]);
        let mut frozen = Vec::new();
        for (index, name) in ["first", "2", "first of all"].into_iter().enumerate() {
            let write = |at: u64, len: u64| format!("write -q -P {} {at} {len}", index + 1);
            qemu_io(&path, "qcow2", &[write(0, 100 * 512), write((index as u64 + 1) << 20, 70_144)]);
            run("qemu-img", &["snapshot", "-c", name, arg(&path)]);
            frozen.push((name, (index + 1).to_string()));
        }
        // QEMU resizes no v2 image that has snapshots.
        let resized = options.contains("1.1");
        if resized {
            run("qemu-img", &["resize", "-q", "-f", "qcow2", arg(&path), "9M"]);
        }
        qemu_io(&path, "qcow2", &["write -q -P 9 0 2M".into()]);
        let image = open(&path).unwrap();
        assert_same(&bytes(&*image, 1 << 20), &qemu_bytes(&path, &[]), options);
        for (name, id) in frozen {
            let mut expected = qemu_bytes(&path, &["-l", &format!("snapshot.id={id}")]);
            // The size of now, not the snapshot's: QEMU's tool knows no other.
            expected.truncate(5 << 20);
            // "2" is the ID of the second snapshot and its name: the ID decides.
            for spelled in [name, &id] {
                let asked = fleecefs::image::OpenOptions { snapshot: Some(spelled.into()), ..Default::default() };
                let image = fleecefs::image::open(&path, &asked).unwrap();
                assert!(image.read_only());
                assert_same(&bytes(&*image, 1 << 20), &expected, &format!("{options} {spelled}"));
                compare_zeros(&*image, &expected);
            }
        }
        let asked = fleecefs::image::OpenOptions { snapshot: Some("fourth".into()), ..Default::default() };
        let e = fleecefs::image::open(&path, &asked).unwrap_err();
        assert!(e.to_string().contains("internal snapshot 'fourth'"), "{e}");
    }
}

fn compare_zeros(image: &dyn Image, content: &[u8]) {
    for (start, len, zero) in statuses(image) {
        let range = start as usize..(start + len) as usize;
        assert!(!zero || content[range].iter().all(|byte| *byte == 0), "no zeros at {start}+{len}");
    }
}

#[test]
fn direct_io_reads_the_same() {
    if !has_qemu("direct_io_reads_the_same") {
        return;
    }
    let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let path = dir.path().join("image");
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", "cluster_size=512", arg(&path), "1000448"]);
    qemu_io(&path, "qcow2", &["write -q -P 3 512 5120".into(), "write -q -P 4 500224 500224".into()]);
    let asked =
        fleecefs::image::OpenOptions { read_only: true, cache: fleecefs::image::Cache::None, ..Default::default() };
    match fleecefs::image::open(&path, &asked) {
        Ok(image) => {
            let expected = qemu_bytes(&path, &[]);
            assert_same(&bytes(&*image, 1 << 20), &expected, "O_DIRECT");
            assert_same(&bytes(&*image, 777), &expected, "O_DIRECT");
        }
        Err(e) => eprintln!("skip direct_io_reads_the_same: {e}"),
    }
}

#[test]
fn locks_are_qemus_on_every_file_of_a_chain() {
    if !has_qemu("locks_are_qemus_on_every_file_of_a_chain") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (base, path, data) = (dir.path().join("base"), dir.path().join("image"), dir.path().join("data"));
    run("qemu-img", &["create", "-q", "-f", "raw", arg(&base), "1M"]);
    let options = format!("data_file={}", arg(&data));
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &options, "-b", "base", "-F", "raw", arg(&path)]);
    let image = open(&path).unwrap();
    for (file, format) in [(&base, "raw"), (&data, "raw"), (&path, "qcow2")] {
        let out = std::process::Command::new("qemu-io")
            .args(["-f", format, "-c", "write -P 1 0 512", arg(file)])
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(text.contains("lock"), "{}: {text}", file.display());
    }
    // Others may read with us.
    run("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", arg(&path), arg(&dir.path().join("copy"))]);
    drop(open(&path).unwrap());
    drop(image);
    qemu_io(&path, "qcow2", &["write -q -P 1 0 512".into()]);
}
