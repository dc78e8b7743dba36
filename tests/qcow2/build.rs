//! Images made by hand, byte by byte, so that single bytes of them can be wrong.
//!
//! Layout in clusters: 0 header, 1 refcount table, 2 refcount block, 3 L1 table, 4 L2 table, 5 snapshot table (one entry
//! whose L1 table is cluster 6), 7 and up guest clusters.

use std::io::Write;

/// What a guest cluster is.
#[derive(Debug, Clone, Copy)]
pub enum Cluster {
    Unallocated,
    Zero,
    /// A zero cluster with a host cluster full of this byte.
    ZeroOver(u8),
    Data(u8),
    Compressed(u8),
    /// Subclusters: allocated, zero, and the byte of the host cluster.
    Subclusters(u32, u32, u8),
}

#[derive(Debug, Clone)]
pub struct Build {
    pub version: u32,
    pub cluster_bits: u32,
    pub extended_l2: bool,
    pub size: u64,
    pub clusters: Vec<Cluster>,
    pub extensions: Vec<(u32, Vec<u8>)>,
    pub backing: Option<Vec<u8>>,
    pub snapshot: bool,
}

/// Places in the file, in clusters.
pub const REFCOUNT_BLOCK: u64 = 2;
pub const L1: u64 = 3;
pub const L2: u64 = 4;
pub const SNAPSHOTS: u64 = 5;
pub const SNAPSHOT_L1: u64 = 6;
pub const FIRST_DATA: u64 = 7;

impl Build {
    /// Version 3, 4 KiB clusters, five guest clusters of each kind that has no subclusters, one snapshot.
    pub fn small() -> Build {
        use Cluster::*;
        Build {
            version: 3,
            cluster_bits: 12,
            extended_l2: false,
            size: 6 * 4096 - 512,
            clusters: vec![Data(0x11), Compressed(0x22), Zero, Unallocated, ZeroOver(0x33), Data(0x44)],
            extensions: vec![(0x1234_5678, b"somebody's".to_vec())],
            backing: None,
            snapshot: true,
        }
    }

    /// The same in version 2, without what it lacks.
    pub fn v2() -> Build {
        use Cluster::*;
        let clusters = vec![Data(0x11), Compressed(0x22), Unallocated, Unallocated, Data(0x33), Data(0x44)];
        Build { version: 2, clusters, ..Build::small() }
    }

    /// 16 KiB clusters with subclusters.
    pub fn extended() -> Build {
        use Cluster::*;
        Build {
            cluster_bits: 14,
            extended_l2: true,
            size: 4 * 16384,
            clusters: vec![
                Subclusters(0x0000_00ff, 0xff00_0000, 0x11),
                Compressed(0x22),
                Subclusters(0, u32::MAX, 0),
                Subclusters(u32::MAX, 0, 0x44),
            ],
            ..Build::small()
        }
    }

    /// An overlay that holds nothing of its own.
    pub fn overlay(backing: &str, format: Option<&str>) -> Build {
        Build {
            clusters: vec![Cluster::Unallocated; 6],
            extensions: format.iter().map(|format| (0xE279_2ACA, format.as_bytes().to_vec())).collect(),
            backing: Some(backing.into()),
            snapshot: false,
            ..Build::small()
        }
    }

    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// What the guest sees; `below` is the byte of a base.
    pub fn content(&self, below: u8) -> Vec<u8> {
        let size = self.cluster_size() as usize;
        let mut content = Vec::new();
        for cluster in &self.clusters {
            match *cluster {
                Cluster::Unallocated => content.extend(vec![below; size]),
                Cluster::Zero | Cluster::ZeroOver(_) => content.extend(vec![0; size]),
                Cluster::Data(byte) | Cluster::Compressed(byte) => content.extend(vec![byte; size]),
                Cluster::Subclusters(allocated, zero, byte) => content.extend((0..32).flat_map(|index| {
                    let byte = match (allocated >> index & 1, zero >> index & 1) {
                        (1, _) => byte,
                        (_, 1) => 0,
                        _ => below,
                    };
                    vec![byte; size / 32]
                })),
            }
        }
        content.truncate(self.size as usize);
        content
    }

    pub fn bytes(&self) -> Vec<u8> {
        let cluster_size = self.cluster_size();
        let words = if self.extended_l2 { 2 } else { 1 };
        let mut file = vec![0; (FIRST_DATA * cluster_size) as usize];
        for (index, cluster) in self.clusters.iter().enumerate() {
            let at = file.len() as u64;
            let (entry, bitmap) = match *cluster {
                Cluster::Unallocated => (0, 0),
                Cluster::Zero => (1, 0),
                Cluster::ZeroOver(_) => (at | 1 | 1 << 63, 0),
                Cluster::Data(_) => (at | 1 << 63, 0),
                Cluster::Compressed(_) => (at | 1 << 62 | compressed_sectors(cluster_size, self.cluster_bits), 0),
                Cluster::Subclusters(0, zero, _) => (0, u64::from(zero) << 32),
                Cluster::Subclusters(allocated, zero, _) => {
                    (at | 1 << 63, u64::from(allocated) | u64::from(zero) << 32)
                }
            };
            match *cluster {
                Cluster::Unallocated | Cluster::Zero | Cluster::Subclusters(0, ..) => (),
                Cluster::Compressed(byte) => {
                    file.extend(deflated(&vec![byte; cluster_size as usize]));
                    file.resize(file.len().next_multiple_of(cluster_size as usize), 0);
                }
                Cluster::Data(byte) | Cluster::ZeroOver(byte) | Cluster::Subclusters(_, _, byte) => {
                    file.extend(vec![byte; cluster_size as usize]);
                }
            }
            let at = L2 * cluster_size + index as u64 * 8 * words;
            put64(&mut file, at, entry);
            if self.extended_l2 {
                put64(&mut file, at + 8, bitmap);
            }
        }
        let used = file.len() as u64 / cluster_size;
        put64(&mut file, cluster_size, REFCOUNT_BLOCK * cluster_size);
        for index in 0..used {
            let shared = self.snapshot && (index == L2 || index >= FIRST_DATA);
            let count = if !self.snapshot && (5..7).contains(&index) { 0 } else { 1 + u16::from(shared) };
            let at = (REFCOUNT_BLOCK * cluster_size + index * 2) as usize;
            file[at..at + 2].copy_from_slice(&count.to_be_bytes());
        }
        put64(&mut file, L1 * cluster_size, (L2 * cluster_size) | (1 << 63));
        if self.snapshot {
            self.put_snapshot(&mut file);
        }
        self.put_header(&mut file);
        file
    }

    fn put_snapshot(&self, file: &mut [u8]) {
        let (at, l1) = (SNAPSHOTS * self.cluster_size(), SNAPSHOT_L1 * self.cluster_size());
        put64(file, at, l1);
        put32(file, at + 8, 1);
        put32(file, at + 12, 1 << 16 | 4);
        put32(file, at + 36, 16);
        put64(file, at + 48, self.size);
        file[at as usize + 56..][..5].copy_from_slice(b"1snap");
        put64(file, l1, L2 * self.cluster_size());
        // Copied bits are not for what is shared.
        put64(file, L1 * self.cluster_size(), L2 * self.cluster_size());
        for index in 0..self.clusters.len() as u64 {
            let at = L2 * self.cluster_size() + index * 8 * if self.extended_l2 { 2 } else { 1 };
            file[at as usize] &= 0x7f;
        }
    }

    fn put_header(&self, file: &mut [u8]) {
        file[..4].copy_from_slice(b"QFI\xfb");
        put32(file, 4, self.version);
        put32(file, 20, self.cluster_bits);
        put64(file, 24, self.size);
        put32(file, 36, 1);
        put64(file, 40, L1 * self.cluster_size());
        put64(file, 48, self.cluster_size());
        put32(file, 56, 1);
        if self.snapshot {
            put32(file, 60, 1);
            put64(file, 64, SNAPSHOTS * self.cluster_size());
        }
        let mut at = 72;
        if self.version == 3 {
            put64(file, 72, if self.extended_l2 { 1 << 4 } else { 0 });
            put32(file, 96, 4);
            put32(file, 100, 112);
            at = 112;
        }
        for (kind, data) in &self.extensions {
            put32(file, at, *kind);
            put32(file, at + 4, data.len() as u32);
            file[at as usize + 8..][..data.len()].copy_from_slice(data);
            at += 8 + data.len().next_multiple_of(8) as u64;
        }
        at += 8;
        if let Some(name) = &self.backing {
            put64(file, 8, at);
            put32(file, 16, name.len() as u32);
            file[at as usize..][..name.len()].copy_from_slice(name);
        }
    }
}

/// Bits of a compressed descriptor that say: as many sectors as a cluster has.
fn compressed_sectors(cluster_size: u64, cluster_bits: u32) -> u64 {
    (cluster_size / 512 - 1) << (62 - (cluster_bits - 8))
}

fn deflated(data: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

pub fn put32(file: &mut [u8], at: u64, value: u32) {
    file[at as usize..at as usize + 4].copy_from_slice(&value.to_be_bytes());
}

pub fn put64(file: &mut [u8], at: u64, value: u64) {
    file[at as usize..at as usize + 8].copy_from_slice(&value.to_be_bytes());
}

pub fn get64(file: &[u8], at: u64) -> u64 {
    u64::from_be_bytes(file[at as usize..at as usize + 8].try_into().unwrap())
}

#[test]
fn qemu_finds_nothing_wrong_with_what_is_made_here() {
    use crate::qemu::*;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let base = dir.path().join("base");
    std::fs::write(&base, vec![0x77; 1 << 20]).unwrap();
    let mut builds = vec![(Build::small(), 0), (Build::v2(), 0), (Build::extended(), 0)];
    let over = |build: Build| Build {
        backing: Some(b"base".to_vec()),
        extensions: vec![(0xE279_2ACA, b"raw".to_vec())],
        ..build
    };
    builds.extend([Build::small(), Build::v2(), Build::extended()].map(|build| (over(build), 0x77)));
    for (build, below) in builds {
        std::fs::write(&path, build.bytes()).unwrap();
        let image = open(&path).unwrap();
        let content = build.content(below);
        assert_same(&bytes(&*image, 1000), &content, &format!("{build:?}"));
        for (start, len, zero) in statuses(&*image) {
            let zeros = content[start as usize..(start + len) as usize].iter().all(|byte| *byte == 0);
            assert_eq!(zero, zeros, "{build:?}: {len} bytes at {start}");
        }
        if has_qemu("qemu_finds_nothing_wrong_with_what_is_made_here") {
            run("qemu-img", &["check", "-q", "-f", "qcow2", arg(&path)]);
            assert_same(&build.content(below), &qemu_bytes(&path, &[]), &format!("{build:?}"));
        }
    }
}
