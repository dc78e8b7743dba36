//! Kinds of images for the matrix: creation options, and what QEMU's tools put into them.
//!
//! Each image is made by `qemu-img create` and filled by `qemu-io` in rounds of random writes, zeroes, discards and
//! compressed writes, with an internal snapshot after each round but the last. What it holds is QEMU's word alone.

use crate::harness::*;
use std::fs;
use std::path::{Path, PathBuf};

const MIB: u64 = 1 << 20;

/// Small numbers that look random and are the same in each run.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5851_f42d_4c95_7f2d)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit.max(1)
    }

    pub fn one_of<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }
}

/// What lies below an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Base {
    None,
    /// A raw file of so many bytes.
    Raw(u64),
    /// A qcow2 image of so many bytes, with these options; its clusters are compressed.
    Qcow2(u64, &'static str),
    /// The same over a raw file of half its size.
    Chain(u64, &'static str),
}

/// One combination of creation options.
#[derive(Debug, Clone, Copy)]
pub struct Cell {
    /// Options of `qemu-img create`; `DATA` stands for the path of the external data file.
    pub options: &'static str,
    pub size: u64,
    pub base: Base,
    /// Some of its clusters are compressed.
    pub compressed: bool,
    /// Internal snapshots.
    pub snapshots: usize,
    /// How it is mounted beside the defaults.
    pub mount: &'static [&'static str],
}

const fn cell(options: &'static str) -> Cell {
    Cell { options, size: 4 * MIB, base: Base::None, compressed: false, snapshots: 0, mount: &[] }
}

impl Cell {
    const fn size(self, size: u64) -> Cell {
        Cell { size, ..self }
    }
    const fn base(self, base: Base) -> Cell {
        Cell { base, ..self }
    }
    const fn compressed(self) -> Cell {
        Cell { compressed: true, ..self }
    }
    const fn snapshots(self, snapshots: usize) -> Cell {
        Cell { snapshots, ..self }
    }
    const fn direct(self) -> Cell {
        Cell { mount: &["--cache", "none"], ..self }
    }

    fn option(&self, key: &str) -> Option<&'static str> {
        self.options.split(',').find_map(|option| option.strip_prefix(key)?.strip_prefix('='))
    }

    pub fn version(&self) -> u32 {
        if self.option("compat") == Some("0.10") { 2 } else { 3 }
    }

    pub fn cluster_size(&self) -> u64 {
        let text = self.option("cluster_size").unwrap_or("64K");
        let (number, unit) = text.split_at(text.trim_end_matches(['K', 'M']).len());
        number.parse::<u64>().unwrap() * [("", 1), ("K", 1 << 10), ("M", MIB)].iter().find(|u| u.0 == unit).unwrap().1
    }

    /// Why the disk keeps its size, where it does.
    pub fn cannot_resize(&self) -> Option<&'static str> {
        (self.version() == 2 && self.snapshots > 0).then_some("a snapshot of version 2 has no size of its own")
    }
}

/// Versions and cluster sizes.
pub const SIZES: &[Cell] = &[
    cell("compat=0.10,cluster_size=512").size(2 * MIB + 512 * 7),
    cell("compat=0.10,cluster_size=4K").snapshots(1),
    cell("compat=0.10"),
    cell("compat=0.10").size(5 * MIB + 512).snapshots(2),
    cell("compat=0.10,cluster_size=2M").size(13 * MIB + 512 * 3),
    cell("compat=1.1,cluster_size=512").size(2 * MIB + 512),
    cell("compat=1.1,cluster_size=1K").snapshots(2),
    cell("compat=1.1,cluster_size=4K").size(4 * MIB - 512 * 3),
    cell("compat=1.1").snapshots(1),
    cell("compat=1.1").direct(),
    cell("compat=1.1,cluster_size=1M").size(9 * MIB),
    cell("compat=1.1,cluster_size=2M").size(14 * MIB - 512).snapshots(1),
];

/// Widths of refcounts, and lazy ones.
pub const REFCOUNTS: &[Cell] = &[
    cell("compat=1.1,refcount_bits=1,cluster_size=4K"),
    cell("compat=1.1,refcount_bits=1,lazy_refcounts=on"),
    cell("compat=1.1,refcount_bits=2,cluster_size=512").size(MIB + 512 * 77).snapshots(2),
    cell("compat=1.1,refcount_bits=4").snapshots(2),
    cell("compat=1.1,refcount_bits=8,cluster_size=8K").snapshots(1),
    cell("compat=1.1,refcount_bits=32,cluster_size=2M").size(11 * MIB),
    cell("compat=1.1,refcount_bits=64,cluster_size=512").size(MIB).snapshots(1),
    cell("compat=1.1,refcount_bits=64,lazy_refcounts=on,cluster_size=16K").snapshots(1),
    cell("compat=1.1,lazy_refcounts=on"),
];

/// Compressed clusters.
pub const COMPRESSED: &[Cell] = &[
    cell("compat=0.10").compressed(),
    cell("compat=0.10,cluster_size=4K").compressed().snapshots(1),
    cell("compat=1.1,cluster_size=512").size(MIB).compressed().snapshots(1),
    cell("compat=1.1,compression_type=zlib").compressed().snapshots(2),
    cell("compat=1.1,compression_type=zlib,cluster_size=2M").size(20 * MIB).compressed(),
    cell("compat=1.1,compression_type=zstd,cluster_size=4K,refcount_bits=8").compressed(),
    cell("compat=1.1,compression_type=zstd").compressed().snapshots(1),
    cell("compat=1.1,compression_type=zstd,cluster_size=2M,lazy_refcounts=on").size(20 * MIB + 512).compressed(),
];

/// Subclusters.
pub const SUBCLUSTERS: &[Cell] = &[
    cell("compat=1.1,extended_l2=on,cluster_size=16K"),
    cell("compat=1.1,extended_l2=on").snapshots(2),
    cell("compat=1.1,extended_l2=on,cluster_size=2M,refcount_bits=4").size(13 * MIB + 512 * 5),
    cell("compat=1.1,extended_l2=on,compression_type=zstd,lazy_refcounts=on").compressed().snapshots(1),
    cell("compat=1.1,extended_l2=on").size(5 * MIB + 512).base(Base::Raw(3 * MIB + 77)),
    cell("compat=1.1,extended_l2=on,cluster_size=128K")
        .base(Base::Qcow2(7 * MIB, "cluster_size=4K"))
        .compressed()
        .snapshots(1),
    cell("compat=1.1,extended_l2=on,preallocation=metadata").base(Base::Raw(4 * MIB)),
    cell("compat=1.1,extended_l2=on,cluster_size=32K,preallocation=falloc").direct(),
];

/// External data files.
pub const DATA_FILES: &[Cell] = &[
    cell("compat=1.1,data_file=DATA"),
    cell("compat=1.1,data_file=DATA,cluster_size=4K,lazy_refcounts=on").size(4 * MIB + 512 * 9),
    cell("compat=1.1,data_file=DATA").base(Base::Raw(3 * MIB + 512)),
    cell("compat=1.1,data_file=DATA,cluster_size=2M,preallocation=metadata").size(11 * MIB),
    cell("compat=1.1,data_file=DATA,extended_l2=on").base(Base::Qcow2(6 * MIB, "cluster_size=16K")),
    cell("compat=1.1,data_file=DATA,data_file_raw=on"),
    cell("compat=1.1,data_file=DATA,data_file_raw=on,cluster_size=512,refcount_bits=1").size(MIB + 512),
    cell("compat=1.1,data_file=DATA,data_file_raw=on,extended_l2=on,preallocation=full").direct(),
];

/// Backing files.
pub const BACKING: &[Cell] = &[
    cell("compat=0.10").base(Base::Raw(2 * MIB + 512 * 3)).snapshots(1),
    cell("compat=0.10,cluster_size=4K").base(Base::Qcow2(7 * MIB, "compat=0.10")),
    cell("compat=1.1").base(Base::Raw(6 * MIB + 5)),
    cell("compat=1.1").size(5 * MIB + 512).base(Base::Raw(MIB + 5)).snapshots(1),
    cell("compat=1.1,cluster_size=512").size(MIB).base(Base::Qcow2(MIB / 2 + 512, "cluster_size=64K")),
    cell("compat=1.1,cluster_size=2M").size(13 * MIB).base(Base::Qcow2(9 * MIB + 512, "cluster_size=512")).compressed(),
    cell("compat=1.1,lazy_refcounts=on").base(Base::Chain(6 * MIB, "cluster_size=4K,compression_type=zstd")),
    cell("compat=1.1").base(Base::Chain(3 * MIB, "extended_l2=on")).compressed().snapshots(2),
];

/// Space that is allocated from the start.
pub const PREALLOCATED: &[Cell] = &[
    cell("compat=0.10,preallocation=metadata"),
    cell("compat=1.1,preallocation=metadata").snapshots(1),
    cell("compat=1.1,preallocation=metadata,cluster_size=512").size(MIB + 512 * 3),
    cell("compat=1.1,preallocation=falloc,cluster_size=4K,refcount_bits=64"),
    cell("compat=1.1,preallocation=full").size(3 * MIB + 512),
    cell("compat=1.1,preallocation=full,cluster_size=2M,lazy_refcounts=on").size(9 * MIB).snapshots(1),
];

/// An image of a kind, and what QEMU says that it holds.
pub struct Made {
    pub path: PathBuf,
    /// The disk.
    pub content: Vec<u8>,
    /// Names and contents of its internal snapshots.
    pub snapshots: Vec<(String, Vec<u8>)>,
    /// Files below it with their bytes: nobody may change them.
    below: Vec<(PathBuf, Vec<u8>)>,
}

fn create(options: &str, below: Option<(&Path, &str)>, path: &Path, size: u64) {
    let mut command = tool("qemu-img");
    command.args(["create", "-q", "-f", "qcow2", "-o", options]);
    if let Some((below, format)) = below {
        command.arg("-b").arg(below).args(["-F", format]);
    }
    ok(command.arg(path).arg(size.to_string()));
}

/// Runs commands of qemu-io. Some may be refused (QEMU compresses into clusters that are free only): what the image holds
/// in the end is asked for afterwards.
fn qemu_io(format: &str, path: &Path, commands: &[String]) {
    let mut command = tool("qemu-io");
    command.args(["-d", "unmap", "-f", format]);
    for text in commands {
        command.args(["-c", text]);
    }
    command.arg(path).output().unwrap();
}

/// The disk, or an internal snapshot of it, as QEMU reads it.
pub fn qemu_bytes(path: &Path, snapshot: Option<&str>) -> Vec<u8> {
    let raw = path.with_extension("converted");
    let mut command = tool("qemu-img");
    command.args(["convert", "-f", "qcow2", "-O", "raw"]);
    if let Some(name) = snapshot {
        command.args(["-l", &format!("snapshot.name={name}")]);
    }
    ok(command.arg(path).arg(&raw));
    let bytes = fs::read(&raw).unwrap();
    fs::remove_file(raw).unwrap();
    bytes
}

/// Random changes for a disk of `size` bytes; `compressible` is a file of a pattern.
fn changes(random: &mut Random, cell: &Cell, compressible: &Path, count: u64) -> Vec<String> {
    let (size, cluster) = (cell.size, cell.cluster_size());
    let change = |_| {
        let len = random.one_of(&[512, 1024, 4096, cluster, cluster * 2, 65536]).min(size / 2);
        let at = random.below((size - len) / 512 + 1) * 512;
        let byte = random.below(255) + 1;
        let aligned = random.below(size / cluster) * cluster;
        match random.below(8) {
            0..3 if cell.compressed => format!("write -q -c -s {} {aligned} {cluster}", compressible.display()),
            0 => format!("write -q -z -u {at} {len}"),
            1 => format!("write -q -z {at} {len}"),
            2 => format!("discard -q {at} {len}"),
            _ => format!("write -q -P {byte} {at} {len}"),
        }
    };
    let mut changes: Vec<String> = (0..count).map(change).collect();
    // QEMU compresses only into what is free, so that these come first.
    changes.sort_by_key(|change| !change.contains(" -c "));
    changes
}

fn make_base(rig: &Rig, cell: &Cell, random: &mut Random, below: &mut Vec<PathBuf>) -> Option<(PathBuf, &'static str)> {
    let raw = |name: &str, size: u64| {
        let path = rig.path(name);
        let whole = size / 2 / GRANULE * GRANULE;
        fs::write(&path, pattern(size, whole as usize)).unwrap();
        let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(size).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &pattern(size + 1, 777), size - 777).unwrap();
        path
    };
    let (size, options, lower) = match cell.base {
        Base::None => return None,
        Base::Raw(size) => {
            below.push(raw("base.raw", size));
            return Some((below[0].clone(), "raw"));
        }
        Base::Qcow2(size, options) => (size, options, None),
        Base::Chain(size, options) => {
            below.push(raw("bottom.raw", size / 2));
            (size, options, Some((below[0].clone(), "raw")))
        }
    };
    let path = rig.path("base.qcow2");
    create(options, lower.as_ref().map(|(path, format)| (path.as_path(), *format)), &path, size);
    let compressible = rig.path("compressible");
    let like = Cell { options, size, compressed: true, ..*cell };
    qemu_io("qcow2", &path, &changes(random, &like, &compressible, 24));
    below.push(path.clone());
    Some((path, "qcow2"))
}

/// Makes an image of a kind named `vda.qcow2`.
pub fn make(rig: &Rig, cell: &Cell, seed: u64) -> Made {
    let mut random = Random::new(seed);
    let compressible = rig.path("compressible");
    let bytes: Vec<u8> =
        (0..65536_u64).map(|i| if i % 3 == 0 { random.below(256) as u8 } else { (i / 512) as u8 }).collect();
    fs::write(&compressible, bytes).unwrap();
    let path = rig.path("vda.qcow2");
    let mut below = Vec::new();
    let base = make_base(rig, cell, &mut random, &mut below);
    let options = cell.options.replace("DATA", rig.path("vda.data").to_str().unwrap());
    create(&options, base.as_ref().map(|(path, format)| (path.as_path(), *format)), &path, cell.size);
    let mut names = Vec::new();
    for round in 0..=cell.snapshots {
        qemu_io("qcow2", &path, &changes(&mut random, cell, &compressible, (cell.size / cell.cluster_size()).min(16)));
        if round < cell.snapshots {
            names.push(format!("internal-{round}"));
            ok(tool("qemu-img").args(["snapshot", "-c", &names[round]]).arg(&path));
        }
    }
    if cell.compressed {
        // Whatever became of the others, one is left.
        let at = random.below(cell.size / cell.cluster_size()) * cell.cluster_size();
        let write = format!("write -q -c -s {} {at} {}", compressible.display(), cell.cluster_size());
        qemu_io("qcow2", &path, &[format!("discard -q {at} {}", cell.cluster_size()), write]);
    }
    let report = check(&path);
    assert!(!cell.compressed || report["compressed-clusters"].as_u64() > Some(0), "{cell:?}: {report}");
    Made {
        content: qemu_bytes(&path, None),
        snapshots: names.into_iter().map(|name| (name.clone(), qemu_bytes(&path, Some(&name)))).collect(),
        below: below.into_iter().map(|path| (path.clone(), fs::read(path).unwrap())).collect(),
        path,
    }
}

/// A raw image of the same size, named `vda.raw`.
pub fn make_raw(rig: &Rig, cell: &Cell) -> Made {
    let path = rig.image_of("vda", cell.size);
    Made { content: fs::read(&path).unwrap(), path, snapshots: Vec::new(), below: Vec::new() }
}

/// What `qemu-img check` says; it must find nothing wrong, nothing leaked either.
#[track_caller]
pub fn check(path: &Path) -> serde_json::Value {
    let out = tool("qemu-img").args(["check", "-f", "qcow2", "--output=json"]).arg(path).output().unwrap();
    assert!(out.status.success(), "{}: {}{}", path.display(), stdout(&out), stderr(&out));
    serde_json::from_str(&stdout(&out)).unwrap()
}

impl Made {
    /// What nobody may have changed: files below, and internal snapshots.
    #[track_caller]
    pub fn assert_the_rest_is_unchanged(&self) {
        for (path, bytes) in &self.below {
            assert!(fs::read(path).unwrap() == *bytes, "{} was changed", path.display());
        }
        for (name, content) in &self.snapshots {
            let now = qemu_bytes(&self.path, Some(name));
            // QEMU's tool gives a snapshot the size that the disk has now.
            let len = now.len().min(content.len());
            assert!(now[..len] == content[..len], "internal snapshot {name} was changed");
            let options = fleecefs::image::OpenOptions { snapshot: Some(name.clone()), ..Default::default() };
            let image = fleecefs::image::open(&self.path, &options).unwrap();
            let mut whole = vec![0xee; image.size() as usize];
            image.read_at(&mut whole, 0).unwrap();
            assert!(whole == *content, "internal snapshot {name} was changed behind the end of the disk");
        }
    }
}
