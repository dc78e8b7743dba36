//! Images as they are before a session, made by QEMU and kept in memory.

use crate::driver::{self, Files};
use fleecefs::image::Image;
use fleecefs::image::qcow2::bitmaps_format::{Directory, Entry};
use fleecefs::image::qcow2::read_header;
use fleecefs::storage::{MemFile, SharedStorage, Storage};
use std::fs::File;
use std::ops::Range;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

/// Unit of what a medium keeps or loses, and of the oracle.
pub const SECTOR: usize = 512;
/// Names of the files in the directory of an image.
pub const IMAGE: &str = "disk.qcow2";
pub const DATA: &str = "disk.data";
pub const BASE: &str = "base.raw";

/// The bitmap that records what is written, and its granularity.
pub const RECORDING: &str = "recording";
pub const GRANULE: u64 = 4096;

/// How to make an image.
#[derive(Debug, Clone, Copy)]
pub struct Recipe {
    /// Options of `qemu-img create`; `DATA` is the external data file.
    pub options: &'static str,
    /// Size of the disk in bytes.
    pub size: u64,
    /// Bytes from the start that hold data, with holes in them.
    pub filled: u64,
    /// The data are compressed.
    pub compressed: bool,
    /// Size of the raw base, 0 for none.
    pub base: u64,
    /// Internal snapshots, with writes after the first.
    pub snapshots: bool,
    /// Two bitmaps: one records what is written, one does not.
    pub bitmaps: bool,
    /// Size that `qemu-img resize` gives it last, 0 for none.
    pub resized: u64,
    /// The image's file is longer than its clusters reach, as after a crash or on a block device: nothing has to grow.
    pub long: bool,
    /// Whole clusters are written compressed, too.
    pub packs: bool,
    /// The medium takes whole sectors in aligned memory only, as O_DIRECT does.
    pub direct: bool,
}

impl Recipe {
    /// A disk whose first half has data.
    pub const fn new(options: &'static str, size: u64) -> Recipe {
        Recipe {
            options,
            size,
            // Compressed clusters are written whole.
            filled: size / 2 / 16384 * 16384,
            compressed: false,
            base: 0,
            snapshots: false,
            bitmaps: false,
            resized: 0,
            long: false,
            packs: false,
            direct: false,
        }
    }

    pub const fn based(self, base: u64) -> Recipe {
        Recipe { base, ..self }
    }

    pub const fn compressed(self) -> Recipe {
        Recipe { compressed: true, ..self }
    }

    pub const fn snapshots(self) -> Recipe {
        Recipe { snapshots: true, ..self }
    }

    pub const fn bitmaps(self) -> Recipe {
        Recipe { bitmaps: true, ..self }
    }

    pub const fn empty(self) -> Recipe {
        Recipe { filled: 0, ..self }
    }

    /// Data up to the end.
    pub const fn full(self) -> Recipe {
        Recipe { filled: self.size / 16384 * 16384, ..self }
    }

    pub const fn long(self) -> Recipe {
        Recipe { long: true, ..self }
    }

    pub const fn packs(self) -> Recipe {
        Recipe { packs: true, ..self }
    }

    pub const fn resized(self, resized: u64) -> Recipe {
        Recipe { resized, ..self }
    }

    pub const fn direct(self) -> Recipe {
        Recipe { direct: true, ..self }
    }

    /// Version 2 has no dirty bit.
    pub fn is_v2(&self) -> bool {
        self.options.contains("compat=0.10")
    }

    fn has_data_file(&self) -> bool {
        self.options.contains("data_file=")
    }
}

/// An image and what a session must not change, or starts from.
#[derive(Debug)]
pub struct Prepared {
    pub recipe: Recipe,
    pub image: Vec<u8>,
    pub data: Option<Vec<u8>>,
    /// The raw base.
    pub base: Option<Vec<u8>>,
    pub cluster_size: u64,
    /// What the guest sees.
    pub content: Vec<u8>,
    /// Internal snapshots by name.
    pub snapshots: Vec<(String, Vec<u8>)>,
    pub bitmaps: Vec<Bitmap>,
}

/// Whether QEMU's tools are there; one `skip` line where they are not, a failure where nothing may be skipped.
pub fn has_qemu(test: &str) -> bool {
    crate::tools::has_tools(test, &["qemu-img", "qemu-io"])
}

/// Runs a tool in a directory; it must succeed.
#[track_caller]
pub fn run(dir: &Path, tool: &str, args: &[&str]) -> String {
    let out = Command::new("timeout")
        .args(["-k", "5", "120", tool])
        .args(args)
        .current_dir(dir)
        .env("LC_ALL", "C")
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(out.status.success(), "{tool} {args:?}: {}{}", text(&out.stdout), text(&out.stderr));
    text(&out.stdout)
}

/// What a write of number `seq` puts into a sector: no two of them are alike, and none is zeros.
pub fn stamp(sector: u64, seq: u64) -> [u8; SECTOR] {
    let mut bytes = [0; SECTOR];
    let mixed = sector.wrapping_mul(0x9E37_79B9_0000_0001) ^ seq.wrapping_mul(0x85EB_CA6B) | 0x0101_0101_0101_0101;
    bytes.as_chunks_mut().0.fill(mixed.to_be_bytes());
    bytes[..8].copy_from_slice(&sector.to_be_bytes());
    bytes[8..16].copy_from_slice(&seq.to_be_bytes());
    bytes
}

/// The bytes that a write of number `seq` brings.
pub fn stamps(range: Range<u64>, seq: u64) -> Vec<u8> {
    let sector = SECTOR as u64;
    let first = range.start / sector;
    let all: Vec<u8> = (first..range.end.div_ceil(sector)).flat_map(|number| stamp(number, seq)).collect();
    all[(range.start - first * sector) as usize..(range.end - first * sector) as usize].to_vec()
}

/// Stamped sectors up to `bytes`, without every `gap`-th run of 4 KiB. Half of each is noise: compressed, it is not so
/// small that a host cluster holds many guest clusters.
fn stamped(bytes: u64, seq: u64, gap: u64) -> Vec<u8> {
    let mut all = Vec::new();
    let mut noise = 1u64;
    for sector in 0..bytes / SECTOR as u64 {
        if (sector / 8) % gap == gap - 1 {
            all.extend([0; SECTOR]);
            continue;
        }
        let mut piece = stamp(sector, seq);
        for byte in &mut piece[SECTOR / 2..] {
            noise = noise.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            *byte = (noise >> 56) as u8 | 1;
        }
        all.extend(piece);
    }
    all
}

/// A file in memory.
pub fn mem(name: &str, bytes: &[u8]) -> MemFile {
    let file = MemFile::new(name, bytes.len() as u64);
    let (pieces, rest) = bytes.as_chunks::<SECTOR>();
    for (index, piece) in pieces.iter().enumerate().filter(|(_, piece)| piece.iter().any(|byte| *byte != 0)) {
        file.write_at(piece, (index * SECTOR) as u64).unwrap();
    }
    file.write_at(rest, (pieces.len() * SECTOR) as u64).unwrap();
    file
}

/// All bytes of a disk.
pub fn bytes_of(image: &dyn Image) -> fleecefs::error::Result<Vec<u8>> {
    let mut bytes = vec![0xEE; image.size() as usize];
    // In pieces, so that no read covers all borders of clusters at once.
    for (index, piece) in bytes.chunks_mut(100 << 10).enumerate() {
        image.read_at(piece, index as u64 * (100 << 10))?;
    }
    Ok(bytes)
}

/// A bitmap of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bitmap {
    pub name: String,
    /// Whether its bits count.
    pub good: bool,
    /// Words of bits, also where they do not count.
    pub words: Vec<u64>,
}

/// The bitmaps that an image stores.
pub fn bitmaps_of(image: &dyn Storage) -> Vec<Bitmap> {
    let header = read_header(image).unwrap();
    let Some(directory) = Directory::read(image, &header).unwrap() else { return Vec::new() };
    let bitmap = |entry: &Entry| {
        let bits = entry.released().load(image, &header, true).unwrap();
        let words = bits.words().collect();
        Bitmap { name: entry.name.clone(), good: entry.fault(&header, directory.consistent).is_none(), words }
    };
    directory.all.iter().map(bitmap).collect()
}

impl Prepared {
    /// Makes an image; `None` without QEMU's tools.
    pub fn make(recipe: Recipe) -> Prepared {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let options = recipe.options.replace("DATA", DATA);
        let file = |name: &str| std::fs::read(dir.join(name)).unwrap();
        let mut create = vec!["create", "-q", "-f", "qcow2", "-o", &options];
        if recipe.base > 0 {
            std::fs::write(dir.join(BASE), stamped(recipe.base, 1, 5)).unwrap();
            create.extend(["-b", BASE, "-F", "raw"]);
        }
        let size = recipe.size.to_string();
        create.extend([IMAGE, &size]);
        run(dir, "qemu-img", &create);
        if recipe.filled > 0 {
            fill(dir, &recipe);
        }
        if recipe.snapshots {
            take_snapshots(dir, &recipe);
        }
        if recipe.bitmaps {
            run(dir, "qemu-img", &["bitmap", "--add", "-g", &GRANULE.to_string(), IMAGE, RECORDING]);
            run(dir, "qemu-img", &["bitmap", "--add", IMAGE, "sealed"]);
            run(dir, "qemu-io", &["-c", "write -P 201 8k 4k", "-c", "write -P 202 100k 1k", IMAGE]);
            run(dir, "qemu-img", &["bitmap", "--disable", IMAGE, "sealed"]);
        }
        if recipe.resized > 0 {
            run(dir, "qemu-img", &["resize", "-q", IMAGE, &recipe.resized.to_string()]);
        }
        if recipe.long {
            let image = File::options().write(true).open(dir.join(IMAGE)).unwrap();
            image.set_len(image.metadata().unwrap().len() + (4 << 20)).unwrap();
        }
        let data = recipe.has_data_file().then(|| file(DATA));
        let base = (recipe.base > 0).then(|| file(BASE));
        Prepared::of(recipe, file(IMAGE), data, base)
    }

    fn of(recipe: Recipe, image: Vec<u8>, data: Option<Vec<u8>>, base: Option<Vec<u8>>) -> Prepared {
        let storage = mem(IMAGE, &image);
        let cluster_size = read_header(&storage).unwrap().cluster_size();
        let bitmaps = bitmaps_of(&storage);
        let mut prepared =
            Prepared { recipe, image, data, base, cluster_size, content: Vec::new(), snapshots: Vec::new(), bitmaps };
        let files = prepared.files();
        prepared.content = bytes_of(&driver::read_only(&files, &prepared, None).unwrap()).unwrap();
        if recipe.snapshots {
            for name in ["first", "second"] {
                let snapshot = driver::read_only(&files, &prepared, Some(name)).unwrap();
                prepared.snapshots.push((name.to_owned(), bytes_of(&snapshot).unwrap()));
            }
        }
        prepared
    }

    /// Its files, in memory.
    pub fn files(&self) -> Files {
        let shared = |name: &str, bytes: &[u8]| -> SharedStorage { mem(name, bytes).shared() };
        Files { image: shared(IMAGE, &self.image), data: self.data.as_ref().map(|bytes| shared(DATA, bytes)) }
    }

    /// The base, open for reading.
    pub fn backing(&self) -> Option<Arc<dyn Image>> {
        let base = mem(BASE, self.base.as_ref()?).shared();
        Some(Arc::new(fleecefs::image::raw::RawImage::over(base, true).unwrap()))
    }
}

/// Writes the first data, and some of each other kind of cluster among them.
fn fill(dir: &Path, recipe: &Recipe) {
    std::fs::write(dir.join("twin.raw"), stamped(recipe.filled, 2, 7)).unwrap();
    // Compressed or not, only what differs from the base, into the image as it was created.
    let mut convert = vec!["convert", "-n", "-f", "raw", "-O", "qcow2", "-S", "4k"];
    if recipe.compressed {
        convert.push("-c");
    }
    let filled = recipe.filled.to_string();
    let size = recipe.size.to_string();
    run(dir, "qemu-img", &["resize", "-q", "-f", "raw", "twin.raw", &size]);
    convert.extend(["twin.raw", IMAGE]);
    if recipe.base > 0 {
        // The rest stays what the base is.
        let write = format!("write -q -s twin.raw 0 {filled}");
        let compressed = format!("write -q -c -s twin.raw 0 {filled}");
        run(dir, "qemu-io", &["-c", if recipe.compressed { &compressed } else { &write }, IMAGE]);
    } else {
        run(dir, "qemu-img", &convert);
    }
    let at = |part: u64| recipe.filled / 16 * part / SECTOR as u64 * SECTOR as u64;
    let commands = [
        format!("write -q -P 211 {} 3k", at(3)),
        format!("write -q -z {} {}", at(5), at(1)),
        format!("discard -q {} {}", at(9), at(1)),
        format!("write -q -P 212 {} 512", at(11)),
    ];
    let mut args = Vec::new();
    commands.iter().for_each(|command| args.extend(["-c", command]));
    args.push(IMAGE);
    run(dir, "qemu-io", &args);
}

fn take_snapshots(dir: &Path, recipe: &Recipe) {
    let at = |part: u64| recipe.size / 16 * part / SECTOR as u64 * SECTOR as u64;
    run(dir, "qemu-img", &["snapshot", "-c", "first", IMAGE]);
    let commands = [format!("write -q -P 221 {} 5k", at(2)), format!("write -q -P 222 {} 2k", at(6))];
    run(dir, "qemu-io", &["-c", &commands[0], "-c", &commands[1], IMAGE]);
    run(dir, "qemu-img", &["snapshot", "-c", "second", IMAGE]);
    run(dir, "qemu-io", &["-c", &format!("write -q -P 223 {} 1k", at(6)), IMAGE]);
}
