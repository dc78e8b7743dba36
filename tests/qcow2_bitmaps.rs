//! Persistent bitmaps beside QEMU's tools: theirs are read bit for bit, ours are read, recorded into, merged, converted
//! and checked by them.

#![cfg(not(feature = "shuttle"))]

use fleecefs::bitmap::Bits;
use fleecefs::image::persistent::{Change, NewBitmap};
use fleecefs::image::qcow2::alloc::{Allocator, set_dirty};
use fleecefs::image::qcow2::bitmaps::{change, mark_in_use, settle};
use fleecefs::image::qcow2::bitmaps_format::Directory;
use fleecefs::image::qcow2::extensions::{FILLER, MARK};
use fleecefs::image::qcow2::header::{Header, autoclear};
use fleecefs::image::qcow2::refcount::{Place, Width};
use fleecefs::image::qcow2::{header_write, read_header};
use fleecefs::storage::faulty::{Call, FaultPlan, Faulty};
use fleecefs::storage::os::OpenOptions;
use fleecefs::storage::{OsFile, SharedStorage};
use serde_json::Value;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;
use tempfile::TempDir;

mod tools;

/// True where QEMU's tools are there; a skip line else, or a failure where nothing may be skipped.
fn has_qemu() -> bool {
    tools::has_tools(module_path!(), &["qemu-img", "qemu-io", "qemu-nbd"])
}

#[track_caller]
fn qemu(program: &str, args: &[&str]) -> Vec<u8> {
    let out = Command::new("timeout").arg("120").arg(program).args(args).output().unwrap();
    let said = [&out.stdout[..], &out.stderr].concat();
    assert!(out.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&said));
    out.stdout
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn io(path: &Path, commands: &[String]) {
    let mut args = vec!["-f", "qcow2"];
    commands.iter().for_each(|command| args.extend(["-c", command]));
    args.push(text(path));
    qemu("qemu-io", &args);
}

#[track_caller]
fn assert_clean(path: &Path) {
    qemu("qemu-img", &["check", "-q", "-f", "qcow2", text(path)]);
}

struct Image {
    dir: TempDir,
    path: PathBuf,
    size: u64,
}

fn create(options: &str, size: u64) -> Image {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("image");
    qemu("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, text(&path), &size.to_string()]);
    Image { dir, path, size }
}

/// Numbers that look random.
fn hash(seed: u64) -> u64 {
    let mixed = (seed ^ seed >> 30).wrapping_add(1).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    (mixed ^ mixed >> 27).wrapping_mul(0x94D0_49BB_1331_11EB) >> 11
}

/// A session as the driver has it: the dirty bit before anything is allocated, refcounts at its end.
fn session<R>(path: &Path, work: impl FnOnce(&SharedStorage, &mut Allocator) -> R) -> R {
    let file = OsFile::open(path, &OpenOptions { write: true, ..OpenOptions::default() }).unwrap();
    let file: SharedStorage = Arc::new(file);
    let header = settle(&*file).unwrap();
    let features = set_dirty(&*file, header.incompatible_features, true).unwrap();
    let mut allocator = Allocator::open(file.clone(), place(&header)).unwrap();
    let done = work(&file, &mut allocator);
    let freed = allocator.begin_flush();
    file.sync().unwrap();
    allocator.end_flush(freed).unwrap();
    allocator.write_refcounts().unwrap();
    set_dirty(&*file, features, false).unwrap();
    done
}

fn place(header: &Header) -> Place {
    Place {
        cluster_bits: header.cluster_bits,
        width: Width::new(header.refcount_order).unwrap(),
        table_offset: header.refcount_table_offset.0,
        table_clusters: u64::from(header.refcount_table_clusters),
    }
}

/// Our names, granularities, states and bits; those in use have none.
fn ours(path: &Path) -> BTreeMap<String, (u64, bool, Option<Vec<u64>>)> {
    let file = OsFile::open(path, &OpenOptions::default()).unwrap();
    let header = read_header(&file).unwrap();
    let Some(directory) = Directory::read(&file, &header).unwrap() else { return BTreeMap::new() };
    let one = |entry: &fleecefs::image::qcow2::bitmaps_format::Entry| {
        let bits = (!entry.in_use()).then(|| words(&entry.load(&file, &header, directory.consistent).unwrap()));
        (entry.name.clone(), (entry.granularity_bytes(), entry.auto(), bits))
    };
    directory.all.iter().map(one).collect()
}

fn words(bits: &Bits) -> Vec<u64> {
    bits.words().collect()
}

/// The bits that writes to these ranges set.
fn touched(size: u64, granularity: u64, writes: &[Range<u64>]) -> Vec<u64> {
    let bits = Bits::heap(size.div_ceil(granularity));
    writes.iter().for_each(|range| bits.set_range(range.start / granularity..range.end.div_ceil(granularity)));
    words(&bits)
}

/// What the bits say of the disk: runs of set ones, in bytes.
fn runs(size: u64, granularity: u64, words: &[u64]) -> Vec<Range<u64>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    for bit in (0..words.len() as u64 * 64).filter(|bit| words[(bit / 64) as usize] >> (bit % 64) & 1 != 0) {
        let (start, end) = (bit * granularity, ((bit + 1) * granularity).min(size));
        match runs.last_mut() {
            Some(run) if run.end == start => run.end = end,
            _ => runs.push(start..end),
        }
    }
    runs
}

/// The runs that QEMU sees in a bitmap.
fn theirs(image: &Image, name: &str) -> Vec<Range<u64>> {
    let socket = image.dir.path().join("socket");
    let mut server = Command::new("timeout")
        .args(["60", "qemu-nbd", "-r", "-B", name, "-k", text(&socket), "-f", "qcow2", text(&image.path)])
        .spawn()
        .unwrap();
    while !socket.exists() && server.try_wait().unwrap().is_none() {
        std::thread::sleep(Duration::from_millis(2));
    }
    let server_at = format!("driver=nbd,server.type=unix,server.path={}", text(&socket));
    let client = format!("{server_at},x-dirty-bitmap=qemu:dirty-bitmap:{name}");
    let map = qemu("qemu-img", &["map", "--output=json", "--image-opts", &client]);
    // The server ends with its last client.
    assert!(server.wait().unwrap().success());
    let map: Vec<Value> = serde_json::from_slice(&map).unwrap();
    // A dirty range shows as one without data.
    let mut runs: Vec<Range<u64>> = Vec::new();
    for extent in map.iter().filter(|extent| extent["data"] == false) {
        let (start, len) = (extent["start"].as_u64().unwrap(), extent["length"].as_u64().unwrap());
        match runs.last_mut() {
            Some(run) if run.end == start => run.end += len,
            _ => runs.push(start..start + len),
        }
    }
    runs
}

/// Name, granularity and flags as `qemu-img info` tells them.
fn listed(path: &Path) -> BTreeMap<String, (u64, Vec<String>)> {
    let info: Value =
        serde_json::from_slice(&qemu("qemu-img", &["info", "--output=json", "-f", "qcow2", text(path)])).unwrap();
    let bitmaps = info["format-specific"]["data"]["bitmaps"].as_array().cloned().unwrap_or_default();
    let one = |bitmap: &Value| {
        let flags = bitmap["flags"].as_array().unwrap().iter().map(|flag| flag.as_str().unwrap().to_owned());
        (bitmap["name"].as_str().unwrap().to_owned(), (bitmap["granularity"].as_u64().unwrap(), flags.collect()))
    };
    bitmaps.iter().map(one).collect()
}

/// Writes at random, as commands for qemu-io and as ranges.
fn writes(seed: u64, count: u64, size: u64) -> (Vec<String>, Vec<Range<u64>>) {
    let one = |index: u64| {
        let start = hash(seed * 1000 + index) % (size / 512) * 512;
        let len = (512 << (hash(seed * 7777 + index) % 9)).min(size - start);
        (format!("write -P {} {start} {len}", index % 255), start..start + len)
    };
    (0..count).map(one).unzip()
}

/// Creation options and sizes of the disk.
const SHAPES: [(&str, u64); 6] = [
    ("cluster_size=64k", 20999680),
    ("cluster_size=512,refcount_bits=64", (3 << 20) + 512),
    ("cluster_size=4k,extended_l2=off", 4_567_040),
    ("cluster_size=2M", 1_234_567_168),
    ("extended_l2=on", (100 << 20) - 1536),
    ("cluster_size=1k,refcount_bits=1", 7 << 20),
];

#[test]
fn bitmaps_made_by_qemu_are_read_bit_for_bit() {
    if !has_qemu() {
        return;
    }
    for ((options, size), seed) in SHAPES.into_iter().zip(1..) {
        let image = create(options, size);
        let path = text(&image.path);
        let grains = [512u64, 4096, 65536, 1 << 20, 2 << 30];
        for granularity in grains {
            let name = format!("g{granularity}");
            qemu("qemu-img", &["bitmap", "--add", "-g", &granularity.to_string(), path, &name]);
        }
        let (commands, first) = writes(seed, 12, size);
        io(&image.path, &commands);
        for granularity in [512u64, 65536] {
            qemu("qemu-img", &["bitmap", "--disable", path, &format!("g{granularity}")]);
        }
        let (commands, second) = writes(seed + 50, 12, size);
        io(&image.path, &commands);
        qemu("qemu-img", &["bitmap", "--add", "-g", "8192", path, "merged"]);
        qemu("qemu-img", &["bitmap", "--merge", "g512", "--disable", path, "merged"]);
        let both = [first.clone(), second].concat();
        let mut expected = BTreeMap::new();
        for granularity in grains {
            let disabled = [512, 65536].contains(&granularity);
            let bits = touched(size, granularity, if disabled { &first } else { &both });
            expected.insert(format!("g{granularity}"), (granularity, !disabled, Some(bits)));
        }
        expected.insert("merged".to_owned(), (8192, false, Some(touched(size, 8192, &first))));
        assert_eq!(ours(&image.path), expected, "{options}");
    }
}

/// Bits of which some pieces are all clear, all set, or mixed.
fn pattern(size: u64, granularity: u64, seed: u64) -> Vec<u64> {
    let bits = Bits::heap(size.div_ceil(granularity));
    let len = bits.len();
    match seed % 6 {
        0 => (),
        1 => bits.set_range(0..len),
        2 => bits.set_range(len / 2..len),
        3 => bits.set_range(len - 1..len),
        4 => bits.set_range(0..len / 3),
        _ => (0..len).filter(|bit| hash(bit ^ seed << 32).is_multiple_of(5)).for_each(|bit| {
            bits.set(bit);
        }),
    }
    words(&bits)
}

#[test]
fn bitmaps_stored_by_us_are_read_by_qemu() {
    if !has_qemu() {
        return;
    }
    for ((options, size), shape) in SHAPES.into_iter().zip(1..) {
        let image = create(options, size);
        let (commands, _) = writes(shape, 9, size);
        io(&image.path, &commands);
        let least = if size > 1 << 30 { 14 } else { 9 };
        let all: Vec<(String, u8, bool, Vec<u64>)> = (least..=31u8)
            .map(|bits| {
                let words = pattern(size, 1 << bits, shape * 3 + u64::from(bits));
                (format!("b{bits}"), bits, bits % 2 == 0, words)
            })
            .collect();
        let store: Vec<Change<'_>> = all
            .iter()
            .map(|(name, granularity_bits, auto, words)| {
                Change::Store(NewBitmap { name, granularity_bits: *granularity_bits, auto: *auto, words })
            })
            .collect();
        session(&image.path, |file, allocator| change(&**file, allocator, &store).unwrap());
        assert_clean(&image.path);
        let flags = |auto: bool| if auto { vec!["auto".to_owned()] } else { vec![] };
        let expected: BTreeMap<_, _> =
            all.iter().map(|(name, bits, auto, _)| (name.clone(), (1 << bits, flags(*auto)))).collect();
        assert_eq!(listed(&image.path), expected, "{options}");
        for (name, bits, _, words) in all.iter().filter(|(_, bits, ..)| [least, 11, 15, 16, 20, 31].contains(bits)) {
            assert_eq!(theirs(&image, name), runs(size, 1 << bits, words), "{options}: {name}");
        }
        // Into another bitmap, and into another image.
        let path = text(&image.path);
        let (name, bits, _, source) = &all[2];
        qemu("qemu-img", &["bitmap", "--add", "-g", &(1u64 << bits).to_string(), path, "merged"]);
        qemu("qemu-img", &["bitmap", "--merge", name, path, "merged"]);
        assert_clean(&image.path);
        assert_eq!(ours(&image.path)["merged"].2.as_ref(), Some(source), "{options}");
        let copy = image.dir.path().join("copy");
        qemu("qemu-img", &["convert", "--bitmaps", "-f", "qcow2", "-O", "qcow2", path, text(&copy)]);
        let copied = ours(&copy);
        for (name, bits, auto, words) in &all {
            assert_eq!(copied[name], (1 << bits, *auto, Some(words.clone())), "{options}: {name} of the copy");
        }
        session(&image.path, |file, allocator| {
            let all: Vec<Change<'_>> = all.iter().map(|(name, ..)| Change::Remove(name)).collect();
            change(&**file, allocator, &all).unwrap()
        });
        assert_clean(&image.path);
        assert_eq!(listed(&image.path).into_keys().collect::<Vec<_>>(), ["merged"]);
        session(&image.path, |file, allocator| change(&**file, allocator, &[Change::Remove("merged")]).unwrap());
        assert_clean(&image.path);
        assert!(listed(&image.path).is_empty());
    }
}

#[test]
fn qemu_records_into_our_bitmaps_and_leaves_what_is_disabled() {
    if !has_qemu() {
        return;
    }
    let image = create("cluster_size=64k", 50 << 20);
    let (on, off) = (pattern(image.size, 65536, 5), pattern(image.size, 4096, 11));
    let new = |name, granularity_bits, auto, words| Change::Store(NewBitmap { name, granularity_bits, auto, words });
    session(&image.path, |file, allocator| {
        change(&**file, allocator, &[new("on", 16, true, &on), new("off", 12, false, &off)]).unwrap();
    });
    let (commands, ranges) = writes(9, 20, image.size);
    io(&image.path, &commands);
    let mut expected = touched(image.size, 65536, &ranges);
    expected.iter_mut().zip(&on).for_each(|(word, more)| *word |= more);
    let found = ours(&image.path);
    assert_eq!(found["on"], (65536, true, Some(expected)));
    assert_eq!(found["off"], (4096, false, Some(off)));
    assert_clean(&image.path);
}

#[test]
fn many_bitmaps_come_and_go() {
    if !has_qemu() {
        return;
    }
    let image = create("cluster_size=4k", 64 << 20);
    let mut expected: BTreeMap<String, (u64, bool, Option<Vec<u64>>)> = BTreeMap::new();
    for round in 0..12u64 {
        let named = |index: u64| format!("bitmap-{:03}{}", index, "x".repeat((index % 60) as usize));
        let changes: Vec<(String, Option<Vec<u64>>)> = (0..300)
            .filter(|index| hash(round * 300 + index).is_multiple_of(2))
            .map(|index| {
                let keep = round == 0 || !hash(round * 299 + index).is_multiple_of(3);
                (named(index), keep.then(|| pattern(image.size, 32768, hash(round + index))))
            })
            .collect();
        let known: Vec<Change<'_>> = changes
            .iter()
            .filter(|(name, words)| words.is_some() || expected.contains_key(name))
            .map(|(name, words)| match words {
                Some(words) => Change::Store(NewBitmap { name, granularity_bits: 15, auto: false, words }),
                None => Change::Remove(name),
            })
            .collect();
        session(&image.path, |file, allocator| change(&**file, allocator, &known).unwrap());
        for (name, words) in &changes {
            match words {
                Some(words) => drop(expected.insert(name.clone(), (32768, false, Some(words.clone())))),
                None => drop(expected.remove(name)),
            }
        }
        assert_eq!(ours(&image.path), expected);
        assert_clean(&image.path);
    }
}

#[test]
fn an_image_does_not_grow_with_each_store() {
    if !has_qemu() {
        return;
    }
    let image = create("cluster_size=4k", 64 << 20);
    session(&image.path, |file, allocator| {
        let mut lengths = Vec::new();
        for round in 0..10 {
            let words = pattern(image.size, 512, 5 + 6 * round);
            let new = NewBitmap { name: "one", granularity_bits: 9, auto: true, words: &words };
            change(&**file, allocator, &[Change::Store(new)]).unwrap();
            let freed = allocator.begin_flush();
            file.sync().unwrap();
            allocator.end_flush(freed).unwrap();
            lengths.push(file.len().unwrap());
        }
        assert_eq!(lengths[1], lengths[9], "{lengths:?}");
    });
    assert_clean(&image.path);
}

#[test]
fn what_we_use_is_inconsistent_for_qemu_and_can_be_removed() {
    if !has_qemu() {
        return;
    }
    let image = create("cluster_size=64k", 50 << 20);
    let path = text(&image.path);
    for (name, more) in [("a", "--enable"), ("b", "--disable"), ("c", "--enable")] {
        qemu("qemu-img", &["bitmap", "--add", more, path, name]);
    }
    io(&image.path, &["write 0 1M".to_owned()]);
    session(&image.path, |file, _| {
        let directory = mark_in_use(&**file).unwrap().unwrap();
        assert!(directory.consistent && directory.all.iter().all(|entry| entry.in_use()));
    });
    assert_clean(&image.path);
    let flags: Vec<Vec<String>> = listed(&image.path).into_values().map(|(_, flags)| flags).collect();
    let strings = |flags: &[&str]| flags.iter().map(|flag| flag.to_string()).collect::<Vec<_>>();
    assert_eq!(flags, [strings(&["in-use", "auto"]), strings(&["in-use"]), strings(&["in-use", "auto"])]);
    qemu("qemu-img", &["bitmap", "--remove", path, "a"]);
    session(&image.path, |file, allocator| {
        change(&**file, allocator, &[Change::Remove("c"), Change::Trust("b")]).unwrap();
    });
    assert_clean(&image.path);
    let zeros = vec![0; pattern(image.size, 65536, 0).len()];
    assert_eq!(ours(&image.path), BTreeMap::from([("b".to_owned(), (65536, false, Some(zeros)))]));
}

#[test]
fn our_marks_survive_readers_and_tell_of_writers() {
    if !has_qemu() {
        return;
    }
    let image = create("cluster_size=64k", 50 << 20);
    let base = image.dir.path().join("base");
    qemu("qemu-img", &["create", "-q", "-f", "raw", text(&base), "50M"]);
    qemu("qemu-img", &["rebase", "-u", "-b", text(&base), "-F", "raw", text(&image.path)]);
    let words = pattern(image.size, 65536, 5);
    session(&image.path, |file, allocator| {
        let new = NewBitmap { name: "one", granularity_bits: 16, auto: true, words: &words };
        change(&**file, allocator, &[Change::Store(new)]).unwrap();
        header_write::update(&**file, |header| {
            header.autoclear_features |= autoclear::FLEECEFS;
            header.extensions.set(MARK, vec![0xab; 16]);
        })
        .unwrap();
    });
    let header = || read_header(&OsFile::open(&image.path, &OpenOptions::default()).unwrap()).unwrap();
    let path = text(&image.path);
    assert_clean(&image.path);
    qemu("qemu-img", &["info", path]);
    qemu("qemu-io", &["-r", "-f", "qcow2", "-c", "read 0 1M", path]);
    assert_eq!(header().autoclear_features, autoclear::FLEECEFS | autoclear::BITMAPS);
    qemu("qemu-io", &["-f", "qcow2", "-c", "read 0 1M", path]);
    assert_eq!(header().autoclear_features, autoclear::BITMAPS, "opened for writing");
    assert_eq!(header().extensions.find(MARK), Some(&[0xab; 16][..]));
    assert_eq!(header().backing.unwrap().name, text(&base).as_bytes());
    assert_eq!(ours(&image.path)["one"].2, Some(words));
}

#[test]
fn qemu_opens_an_image_whose_header_was_being_moved() {
    if !has_qemu() {
        return;
    }
    for written in 0..5 {
        let image = create("cluster_size=64k", 50 << 20);
        let base = image.dir.path().join("base");
        qemu("qemu-img", &["create", "-q", "-f", "raw", text(&base), "50M"]);
        qemu("qemu-img", &["rebase", "-u", "-b", text(&base), "-F", "raw", text(&image.path)]);
        let file: SharedStorage =
            Arc::new(OsFile::open(&image.path, &OpenOptions { write: true, ..OpenOptions::default() }).unwrap());
        let plan = Arc::new(FaultPlan::new());
        plan.fail_nth(Call::Write, written + 1, 5);
        let faulty = Faulty { inner: file.clone(), plan };
        let change = |header: &mut Header| {
            header.compatible_features |= 1;
            header.extensions.set(MARK, vec![0xab; 16]);
        };
        header_write::update(&faulty, change).unwrap_err();
        let changed = written >= 2;
        let moving = read_header(&*file).unwrap().extensions.find(FILLER).is_some();
        assert_eq!(moving, (2..4).contains(&written), "{written} writes done");
        assert_clean(&image.path);
        let info: Value =
            serde_json::from_slice(&qemu("qemu-img", &["info", "--output=json", text(&image.path)])).unwrap();
        assert_eq!(info["backing-filename"], text(&base));
        assert_eq!(info["format-specific"]["data"]["lazy-refcounts"], changed);
        io(&image.path, &["write -P 7 1M 1M".to_owned(), "read -P 7 1M 1M".to_owned(), "read -P 0 0 1M".to_owned()]);
        assert_clean(&image.path);
        let header = header_write::update(&*file, |_| ()).unwrap();
        assert_eq!(header.extensions.find(FILLER), None);
        assert_eq!(header.extensions.find(MARK).is_some(), changed);
        assert_eq!(header.backing.unwrap().name, text(&base).as_bytes());
        assert_clean(&image.path);
    }
}
