//! `fleecefs check` and `fleecefs info` beside `qemu-img check` and `qemu-img info`, on images that QEMU made.
//!
//! Where the two disagree on an image, one of them is wrong; where both find a fault, ours repairs it, and QEMU then
//! finds nothing while the guest's bytes, the snapshots and the bitmaps are what they were.

use fleecefs::image::qcow2::bitmaps_format::Directory;
use fleecefs::image::qcow2::read_header;
use fleecefs::storage::OsFile;
use serde_json::Value;
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use tempfile::TempDir;

#[path = "qcow2_check/kinds.rs"]
mod kinds;
mod tools;

/// True where QEMU's tools are there; a skip line else, or a failure where nothing may be skipped.
fn has_qemu() -> bool {
    tools::has_tools(module_path!(), &["qemu-img"])
}

fn run(program: &str, args: &[&str]) -> Output {
    Command::new("timeout").arg("120").arg(program).args(args).output().unwrap()
}

fn qemu(program: &str, args: &[&str]) -> Vec<u8> {
    let out = run(program, args);
    assert!(out.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&out.stderr));
    out.stdout
}

fn fleecefs(args: &[&str]) -> (i32, Output) {
    let out = run(env!("CARGO_BIN_EXE_fleecefs"), args);
    (out.status.code().unwrap(), out)
}

fn json(out: &Output) -> Value {
    serde_json::from_slice(&out.stdout).unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&out.stderr)))
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// What is in an image.
#[derive(Debug, Clone, Copy)]
struct Recipe {
    options: &'static str,
    snapshots: bool,
    bitmaps: bool,
    compressed: bool,
}

const fn recipe(options: &'static str) -> Recipe {
    Recipe { options, snapshots: true, bitmaps: true, compressed: false }
}

const RECIPES: [Recipe; 19] = [
    Recipe { bitmaps: false, ..recipe("compat=0.10") },
    recipe("compat=1.1"),
    recipe("cluster_size=512"),
    recipe("cluster_size=4k"),
    recipe("cluster_size=2M"),
    Recipe { snapshots: false, ..recipe("refcount_bits=1") },
    recipe("refcount_bits=2"),
    recipe("refcount_bits=4"),
    recipe("refcount_bits=8,cluster_size=1k"),
    recipe("refcount_bits=32"),
    recipe("refcount_bits=64,cluster_size=512"),
    recipe("extended_l2=on"),
    recipe("extended_l2=on,cluster_size=2M"),
    recipe("preallocation=metadata"),
    recipe("lazy_refcounts=on"),
    Recipe { snapshots: false, ..recipe("data_file=DATA") },
    Recipe { snapshots: false, ..recipe("data_file=DATA,data_file_raw=on") },
    Recipe { compressed: true, ..recipe("compression_type=zlib,cluster_size=4k") },
    Recipe { compressed: true, ..recipe("compression_type=zstd") },
];

/// Makes the image of a recipe.
fn make(dir: &TempDir, recipe: Recipe) -> PathBuf {
    let path = dir.path().join("image.qcow2");
    let data = dir.path().join("data.raw");
    let options = recipe.options.replace("DATA", text(&data));
    qemu("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &options, text(&path), "20999680"]);
    let io = |commands: &[&str]| {
        let mut args = Vec::new();
        commands.iter().for_each(|command| args.extend(["-c", command]));
        args.push(text(&path));
        qemu("qemu-io", &args);
    };
    if recipe.compressed {
        io(&["write -c -P 1 0 256k", "write -c -P 2 1M 128k", "write -c -P 3 5M 64k"]);
    }
    io(&["write -P 4 512k 700k", "write -P 5 3M 100k", "write -z 6M 1M", "write -P 6 10M 64k", "write -P 7 2M 70k"]);
    io(&["discard 3M 64k", "write -z -u 10M 4k"]);
    if recipe.snapshots {
        qemu("qemu-img", &["snapshot", "-c", "first", text(&path)]);
        io(&["write -P 8 600k 200k"]);
        qemu("qemu-img", &["snapshot", "-c", "second", text(&path)]);
        io(&["write -P 9 2M 5k"]);
    }
    if recipe.bitmaps {
        qemu("qemu-img", &["bitmap", "--add", text(&path), "coarse"]);
        qemu("qemu-img", &["bitmap", "--add", "-g", "4096", text(&path), "fine"]);
        io(&["write -P 10 1M 200k", "write -P 11 20M 8k"]);
        qemu("qemu-img", &["bitmap", "--disable", text(&path), "fine"]);
    }
    path
}

/// What a repair must not change: guest content, that of the snapshots, and what the bitmaps say.
fn content(dir: &TempDir, path: &Path, recipe: Recipe) -> Vec<Vec<u8>> {
    let raw = dir.path().join("content.raw");
    let mut all = Vec::new();
    let mut convert = |more: &[&str]| {
        let mut args = vec!["convert", "-f", "qcow2", "-O", "raw"];
        args.extend(more);
        args.extend([text(path), text(&raw)]);
        qemu("qemu-img", &args);
        all.push(std::fs::read(&raw).unwrap());
    };
    convert(&[]);
    if recipe.snapshots {
        convert(&["-l", "first"]);
        convert(&["-l", "second"]);
    }
    if recipe.bitmaps {
        all.extend(["coarse", "fine"].map(|name| dirty_runs(path, name).into_iter().flat_map(run_bytes).collect()));
    }
    all
}

/// Dirty ranges of a bitmap, in bytes, as this crate reads them.
fn dirty_runs(path: &Path, name: &str) -> Vec<(u64, u64)> {
    let file = OsFile::open(path, &Default::default()).unwrap();
    let header = read_header(&file).unwrap();
    let directory = Directory::read(&file, &header).unwrap().unwrap();
    let entry = directory.all.iter().find(|entry| entry.name == name).unwrap();
    // A repair is asked for images whose refcounts are wrong, and the bitmaps are right.
    let bits = entry.load(&file, &header, true).unwrap();
    let granularity = entry.granularity_bytes();
    let runs = bits.runs(0..bits.len()).filter(|(_, set)| *set);
    runs.map(|(run, _)| (run.start * granularity, (run.end * granularity).min(header.size))).collect()
}

fn run_bytes((start, end): (u64, u64)) -> Vec<u8> {
    [start.to_be_bytes(), end.to_be_bytes()].concat()
}

#[test]
fn bitmaps_are_read_as_qemu_reads_them() {
    if !has_qemu() {
        return;
    }
    for recipe in RECIPES.into_iter().filter(|recipe| recipe.bitmaps) {
        let dir = TempDir::new().unwrap();
        let path = make(&dir, recipe);
        for name in ["coarse", "fine"] {
            let socket = dir.path().join(name);
            let mut server = Command::new("timeout")
                .args(["60", "qemu-nbd", "-r", "-B", name, "-k", text(&socket), "-f", "qcow2", text(&path)])
                .spawn()
                .unwrap();
            while !socket.exists() && server.try_wait().unwrap().is_none() {
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
            let client = format!(
                "driver=nbd,server.type=unix,server.path={},x-dirty-bitmap=qemu:dirty-bitmap:{name}",
                text(&socket)
            );
            let map = qemu("qemu-img", &["map", "--output=json", "--image-opts", &client]);
            // The server ends with its last client.
            assert!(server.wait().unwrap().success());
            let map: Vec<Value> = serde_json::from_slice(&map).unwrap();
            // A dirty range shows as one without data.
            let dirty = map.iter().filter(|extent| extent["data"] == false);
            let theirs: Vec<(u64, u64)> = dirty
                .map(|extent| (number(extent, "start"), number(extent, "start") + number(extent, "length")))
                .collect();
            let ours = dirty_runs(&path, name);
            assert!(!ours.is_empty());
            assert_eq!(ours, theirs, "{}: {name}", recipe.options);
        }
    }
}

const TOTALS: [&str; 8] = [
    "image-end-offset",
    "total-clusters",
    "allocated-clusters",
    "compressed-clusters",
    "fragmented-clusters",
    "corruptions",
    "leaks",
    "check-errors",
];

fn number(value: &Value, name: &str) -> u64 {
    value[name].as_u64().unwrap_or(0)
}

/// Both checks of an image, which agree in every number.
fn both_checks(path: &Path, about: &str) -> Value {
    let out = run("qemu-img", &["check", "-f", "qcow2", "--output=json", text(path)]);
    let (theirs, code_of_theirs) = (json(&out), out.status.code());
    let (code, out) = fleecefs(&["check", "--json", text(path)]);
    let ours = json(&out);
    for name in TOTALS {
        assert_eq!(number(&ours, name), number(&theirs, name), "{about}: {name}\nours: {ours}\ntheirs: {theirs}");
    }
    let faults = number(&ours, "corruptions") + number(&ours, "leaks");
    assert_eq!(code, i32::from(faults > 0), "{about}");
    // QEMU tells corruptions (2) from mere leaks (3) by its code.
    let their_code = if number(&ours, "corruptions") > 0 { 2 } else { i32::from(faults > 0) * 3 };
    assert_eq!(code_of_theirs, Some(their_code), "{about}");
    ours
}

#[test]
fn good_images_are_clean_and_counted_as_qemu_counts_them() {
    if !has_qemu() {
        return;
    }
    for recipe in RECIPES {
        let dir = TempDir::new().unwrap();
        let path = make(&dir, recipe);
        let report = both_checks(&path, recipe.options);
        assert_eq!(number(&report, "corruptions") + number(&report, "leaks"), 0, "{}", recipe.options);
    }
}

#[test]
fn info_says_what_qemu_says() {
    if !has_qemu() {
        return;
    }
    for recipe in RECIPES {
        let dir = TempDir::new().unwrap();
        let path = make(&dir, recipe);
        let theirs: Value = serde_json::from_slice(&qemu("qemu-img", &["info", "--output=json", text(&path)])).unwrap();
        let (code, out) = fleecefs(&["info", "--json", text(&path)]);
        assert_eq!(code, 0);
        let ours = json(&out);
        for (name, value) in ours.as_object().unwrap() {
            let mut value = value.clone();
            if name == "snapshots" {
                // QEMU tells of the instruction counter only where the snapshot has one.
                assert_eq!(value.as_array().unwrap().len(), 2);
            }
            if let Some(data) = value.get_mut("data").and_then(Value::as_object_mut) {
                // QEMU leaves out what is not there.
                data.retain(|key, value| theirs[name]["data"].get(key).is_some() || !value.is_array());
            }
            assert_eq!(value, theirs[name], "{}: {name}\nours: {ours}\ntheirs: {theirs}", recipe.options);
        }
        let (code, out) = fleecefs(&["info", text(&path)]);
        let lines = String::from_utf8(out.stdout).unwrap();
        assert_eq!(code, 0);
        assert_eq!(lines.contains("second"), recipe.snapshots, "{lines}");
        assert_eq!(lines.contains("coarse"), recipe.bitmaps, "{lines}");
    }
}

/// Where things lie in an image, read from its own header.
struct Layout {
    file: std::fs::File,
    cluster_bits: u32,
    order: u32,
}

impl Layout {
    fn open(path: &Path) -> Layout {
        let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
        let mut layout = Layout { file, cluster_bits: 0, order: 4 };
        layout.cluster_bits = layout.word(16) as u32;
        if layout.word(0) as u32 == 3 {
            layout.order = (layout.word(96) >> 32) as u32;
        }
        layout
    }

    fn word(&self, offset: u64) -> u64 {
        let mut bytes = [0; 8];
        self.file.read_exact_at(&mut bytes, offset).unwrap();
        u64::from_be_bytes(bytes)
    }

    fn put(&self, offset: u64, word: u64) {
        self.file.write_all_at(&word.to_be_bytes(), offset).unwrap();
    }

    fn refcount_table(&self) -> u64 {
        self.word(48)
    }

    fn first_block(&self) -> u64 {
        self.word(self.refcount_table())
    }

    /// Where the first entry of the active L1 table stands that is not empty.
    fn first_l1_entry(&self) -> u64 {
        let l1 = self.word(40);
        (0..).map(|index| l1 + index * 8).find(|at| self.word(*at) != 0).unwrap()
    }

    /// The first L2 table of the active state.
    fn l2(&self) -> u64 {
        self.word(self.first_l1_entry()) & 0x00ff_ffff_ffff_fe00
    }

    /// Flips the lowest bit of a cluster's refcount, which lies in the first block.
    fn flip_refcount(&self, cluster: u64) {
        let bits = 1 << self.order;
        let bit = cluster * bits;
        let (byte, shift) = if bits < 8 { (bit / 8, bit % 8) } else { ((bit + bits) / 8 - 1, 0) };
        let mut value = [0];
        self.file.read_exact_at(&mut value, self.first_block() + byte).unwrap();
        self.file.write_all_at(&[value[0] ^ 1 << shift], self.first_block() + byte).unwrap();
    }
}

type Damage = (&'static str, fn(&Layout));

/// Damage that both programs count alike.
const ALIKE: [Damage; 3] = [
    ("a lower or higher refcount of the L2 table", |image| image.flip_refcount(image.l2() >> image.cluster_bits)),
    ("a refcount of the header", |image| image.flip_refcount(0)),
    ("a COPIED flag", |image| {
        let at = image.first_l1_entry();
        image.put(at, image.word(at) ^ 1 << 63);
    }),
];

/// Damage that needs new refcount structures, where the programs may count differently.
const STRUCTURAL: [Damage; 4] = [
    ("no refcount block", |image| image.put(image.refcount_table(), 0)),
    ("a refcount block that is not aligned", |image| image.put(image.refcount_table(), image.first_block() | 512 | 1)),
    ("a refcount block on an L2 table", |image| image.put(image.refcount_table(), image.l2())),
    ("zeroed refcounts", |image| {
        image.file.write_all_at(&vec![0; 1 << image.cluster_bits], image.first_block()).unwrap();
    }),
];

fn damaged_and_repaired(recipe: Recipe, damage: Damage, counted_alike: bool) {
    let dir = TempDir::new().unwrap();
    let path = make(&dir, recipe);
    let before = content(&dir, &path, recipe);
    let about = format!("{}: {}", recipe.options, damage.0);
    (damage.1)(&Layout::open(&path));
    if counted_alike {
        both_checks(&path, &about);
    }
    let (code, out) = fleecefs(&["check", "--json", text(&path)]);
    assert_eq!(code, 1, "{about}: {}", String::from_utf8_lossy(&out.stderr));
    let (code, out) = fleecefs(&["check", "--repair", text(&path)]);
    let said = String::from_utf8_lossy(&out.stdout).into_owned();
    assert_eq!(code, 0, "{about}: {said}{}", String::from_utf8_lossy(&out.stderr));
    let report = both_checks(&path, &about);
    assert_eq!(number(&report, "corruptions") + number(&report, "leaks"), 0, "{about}: {report}");
    assert!(content(&dir, &path, recipe) == before, "{about}: the content has changed");
}

/// Some recipes for each damage, so that every one meets several; all with `FLEECEFS_FULL`.
fn recipes_for(index: usize) -> impl Iterator<Item = Recipe> {
    let full = std::env::var_os("FLEECEFS_FULL").is_some();
    RECIPES.into_iter().enumerate().filter(move |(at, _)| full || at % 4 == index % 4).map(|(_, recipe)| recipe)
}

#[test]
fn wrong_refcounts_and_flags_are_repaired() {
    if !has_qemu() {
        return;
    }
    for (index, damage) in ALIKE.into_iter().enumerate() {
        recipes_for(index).for_each(|recipe| damaged_and_repaired(recipe, damage, true));
    }
}

#[test]
fn broken_refcount_structures_are_repaired() {
    if !has_qemu() {
        return;
    }
    for (index, damage) in STRUCTURAL.into_iter().enumerate() {
        recipes_for(index + 1).for_each(|recipe| damaged_and_repaired(recipe, damage, false));
    }
}

#[test]
fn an_image_of_a_killed_qemu_with_lazy_refcounts_is_repaired() {
    if !has_qemu() {
        return;
    }
    let lazy = Recipe { options: "lazy_refcounts=on", snapshots: true, bitmaps: false, compressed: false };
    let dir = TempDir::new().unwrap();
    let path = make(&dir, lazy);
    // `abort` ends qemu-io in mid-session.
    run(
        "qemu-io",
        &["-c", "write -P 12 12M 3M", "-c", "write -P 13 600k 64k", "-c", "flush", "-c", "abort", text(&path)],
    );
    let before = content(&dir, &path, lazy);
    let report = both_checks(&path, "lazy");
    assert_eq!(report["dirty-flag"], true);
    assert!(number(&report, "corruptions") > 0);
    assert_eq!(fleecefs(&["check", "--repair", text(&path)]).0, 0);
    let report = both_checks(&path, "lazy, repaired");
    assert_eq!((number(&report, "corruptions"), number(&report, "leaks")), (0, 0));
    assert_eq!(report["dirty-flag"], false);
    assert!(content(&dir, &path, lazy) == before);
}

#[test]
fn leaked_clusters_are_counted_and_freed() {
    if !has_qemu() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let path = make(&dir, recipe("compat=1.1"));
    let before = content(&dir, &path, recipe("compat=1.1"));
    let end = std::fs::metadata(&path).unwrap().len();
    Layout::open(&path).file.set_len(end + 3 * 65536).unwrap();
    for behind in [1, 2] {
        Layout::open(&path).flip_refcount(end.div_ceil(65536) + behind);
    }
    assert_eq!(number(&both_checks(&path, "leaks"), "leaks"), 2);
    let (code, out) = fleecefs(&["check", "--repair=leaks", "--json", text(&path)]);
    assert_eq!((code, number(&json(&out), "leaks-fixed")), (0, 2));
    both_checks(&path, "leaks freed");
    assert!(content(&dir, &path, recipe("compat=1.1")) == before);
}

#[test]
fn bitmaps_that_a_foreign_writer_made_stale_are_kept_and_named() {
    if !has_qemu() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let path = make(&dir, recipe("compat=1.1"));
    let image = Layout::open(&path);
    image.put(88, image.word(88) & !1);
    let (code, out) = fleecefs(&["check", "--json", text(&path)]);
    assert_eq!((code, number(&json(&out), "leaks")), (0, 0), "their clusters are not leaked");
    assert!(number(&json(&out), "stale-bitmap-clusters") >= 3);
    let (_, out) = fleecefs(&["info", "--json", text(&path)]);
    let bitmaps = json(&out)["format-specific"]["data"]["bitmaps"].as_array().unwrap().clone();
    assert!(bitmaps.len() == 2 && bitmaps.iter().all(|bitmap| bitmap["inconsistent"] == true), "{bitmaps:?}");
    // A rebuild keeps them too.
    image.put(image.refcount_table(), 0);
    assert_eq!(fleecefs(&["check", "--repair", text(&path)]).0, 0);
    image.put(88, image.word(88) | 1);
    both_checks(&path, "bitmaps trusted again");
}

#[test]
fn locks_are_respected_both_ways() {
    if !has_qemu() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let path = make(&dir, recipe("compat=1.1"));
    let write = || {
        let mut command = Command::new("qemu-io");
        command.arg(&path).stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::null()).spawn().unwrap()
    };
    let mut writer = write();
    // It has the lock once qemu-img is refused; where it came while qemu-img had it, it has ended.
    while run("qemu-img", &["info", text(&path)]).status.success() {
        if writer.try_wait().unwrap().is_some() {
            writer = write();
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    for command in ["info", "check"] {
        let (code, out) = fleecefs(&[command, text(&path)]);
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(code == 2 && said.contains("in use") && said.contains("--force-share"), "{code} {said}");
        assert_eq!(fleecefs(&[command, "-U", text(&path)]).0, 0);
    }
    assert_eq!(fleecefs(&["check", "--repair", text(&path)]).0, 2);
    drop(writer.stdin.take());
    writer.wait().unwrap();
    assert_eq!(fleecefs(&["check", "--repair", text(&path)]).0, 0);
}

#[test]
fn errors_have_their_exit_code_and_a_reason() {
    let dir = TempDir::new().unwrap();
    let raw = dir.path().join("a.raw");
    std::fs::write(&raw, vec![0; 1000]).unwrap();
    let (code, out) = fleecefs(&["info", "--json", text(&raw)]);
    assert_eq!((code, json(&out)["virtual-size"].as_u64()), (0, Some(1024)));
    assert_eq!(json(&out)["format"], "raw");
    for (args, why) in [
        (vec!["check", text(&raw)], "nothing to check"),
        (vec!["check", "-f", "qcow2", text(&raw)], "not a qcow2 image"),
        (vec!["info", "-f", "qcow2", text(&raw)], "not a qcow2 image"),
        (vec!["info", "/nonexistent/a"], "No such file"),
        (vec!["check", text(dir.path())], "directory"),
    ] {
        let (code, out) = fleecefs(&args);
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(code == 2 && said.contains(why), "{args:?}: {code} {said}");
    }
}
