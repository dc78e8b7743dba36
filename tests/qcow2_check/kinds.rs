//! What `info` and `check` tell of images of every kind, beside what qemu-img tells.

use super::{both_checks, fleecefs, has_qemu, json, qemu, run, text};
use serde_json::{Map, Value};
use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// An image and how it comes to be.
struct Kind {
    name: &'static str,
    /// Steps, one a line: `create OPTIONS [SIZE]`, `over BACKING FORMAT [SIZE]`, `io COMMANDS` (between semicolons), `kill
    /// COMMANDS` (qemu-io that ends in mid-session), or a command of qemu-img.
    steps: &'static str,
    /// What is then done to its bytes.
    patch: fn(&Path),
    /// Whether qemu-img can check it.
    checked: bool,
}

const fn kind(name: &'static str, steps: &'static str) -> Kind {
    Kind { name, steps, patch: |_| (), checked: true }
}

const fn patched(name: &'static str, steps: &'static str, patch: fn(&Path)) -> Kind {
    Kind { patch, ..kind(name, steps) }
}

const fn unchecked(name: &'static str, steps: &'static str) -> Kind {
    Kind { checked: false, ..kind(name, steps) }
}

const KINDS: [Kind; 34] = [
    kind("empty", "create compat=1.1 0"),
    kind("a byte more than a sector", "create compat=1.1 513"),
    kind("a tebibyte", "create compat=1.1 1T\nio write 512G 64k"),
    kind("old", "create compat=0.10\nio write 0 100k\nsnapshot -c a IMAGE"),
    unchecked("luks", "create encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"),
    unchecked("aes", "create encrypt.format=aes,encrypt.key-secret=s"),
    unchecked("old aes", "create compat=0.10,encrypt.format=aes,encrypt.key-secret=s"),
    patched("corrupt", "create compat=1.1\nio write 0 100k", |path| or_byte(path, 79, 2)),
    patched("marked as dirty", "create compat=1.1\nio write 0 100k", |path| or_byte(path, 79, 1)),
    kind("dirty", "create lazy_refcounts=on\nkill write 0 300k;flush"),
    kind("dirty, nothing written", "create lazy_refcounts=on\nkill read 0 300k"),
    kind("leaks", "create compat=1.1\nkill write 0 300k;flush"),
    patched("reserved features", "create compat=1.1", |path| or_byte(path, 80, 0x40)),
    kind("data file", "create data_file=data.raw\nio write 0 100k"),
    kind("data file with all of its path", "create data_file=DIR/data.raw"),
    kind("raw data file", "create data_file=DIR/data.raw,data_file_raw=on\nio write 1M 100k"),
    kind("a base", "over base.raw raw"),
    kind("a base by its path", "over DIR/base.raw raw"),
    kind("a base by a protocol", "over file:base.raw raw"),
    unchecked("a base on a server", "over nbd:unix:/nonexistent/socket raw 1M"),
    kind("a base with a colon", "over ./a:b.raw raw"),
    kind(
        "a base in JSON",
        "over json:{\"driver\":\"raw\",\"file\":{\"driver\":\"file\",\"filename\":\"DIR/base.raw\"}} raw 1M",
    ),
    kind("a chain", "over middle.qcow2 qcow2 5M\nio write 0 64k;write -z 1M 64k"),
    kind(
        "snapshots",
        "create compat=1.1\nsnapshot -c a IMAGE\nio write 0 64k\nsnapshot -c b IMAGE\nsnapshot -d a IMAGE",
    ),
    kind(
        "strange names",
        "create compat=1.1\nsnapshot -c ä\"\u{1F600}\\ IMAGE\nsnapshot -c 7 IMAGE\nbitmap --add IMAGE ö\"x",
    ),
    kind("snapshots of other sizes", "create compat=1.1\nsnapshot -c a IMAGE\nresize -q IMAGE 9M\nsnapshot -c b IMAGE"),
    patched("a VM state", "create compat=1.1\nio write 0 64k\nsnapshot -c a IMAGE", |path| put_vm_state(path, 3 << 30)),
    patched("a VM state and its counter", "create compat=1.1\nsnapshot -c a IMAGE", |path| put_counter(path, 77)),
    kind("bitmaps", "create compat=1.1\nbitmap --add IMAGE a\nbitmap --add -g 512 IMAGE b\nbitmap --add -g 2G IMAGE c"),
    kind("disabled bitmaps", "create compat=1.1\nbitmap --add IMAGE a\nbitmap --add --disable IMAGE b\nio write 0 1M"),
    kind("bitmaps in use", "create compat=1.1\nbitmap --add IMAGE a\nbitmap --add --disable IMAGE b\nkill write 0 64k"),
    kind("removed bitmaps", "create compat=1.1\nbitmap --add IMAGE a\nbitmap --remove IMAGE a"),
    kind(
        "all at once",
        "create extended_l2=on,compression_type=zstd,refcount_bits=64,lazy_refcounts=on,cluster_size=16k\n\
         io write 0 1M;write -c 1M 64k\nsnapshot -c a IMAGE\nbitmap --add IMAGE x\nio write -z 0 64k;discard 1M 16k",
    ),
    kind("falloc", "create preallocation=falloc\nio write 0 64k"),
];

/// Names that QEMU takes from the directory that it was started in, and not from the image's: its check fails there.
const FROM_WHERE_IT_RUNS: [&str; 2] = ["data file", "a base by a protocol"];

fn or_byte(path: &Path, at: u64, bits: u8) {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] | bits], at).unwrap();
}

/// The first entry of the snapshot table.
fn first_snapshot(path: &Path) -> (fs::File, u64) {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut word = [0; 8];
    file.read_exact_at(&mut word, 64).unwrap();
    (file, u64::from_be_bytes(word))
}

/// A snapshot as `savevm` makes it: a clock and a size of the VM state.
fn put_vm_state(path: &Path, bytes: u64) {
    let (file, at) = first_snapshot(path);
    file.write_all_at(&3_661_001_000_002_u64.to_be_bytes(), at + 24).unwrap();
    file.write_all_at(&bytes.to_be_bytes(), at + 40).unwrap();
}

fn put_counter(path: &Path, count: u64) {
    put_vm_state(path, 5);
    let (file, at) = first_snapshot(path);
    file.write_all_at(&count.to_be_bytes(), at + 56).unwrap();
}

fn make(dir: &TempDir, kind: &Kind) -> PathBuf {
    let at = |name: &str| dir.path().join(name);
    for name in ["base.raw", "a:b.raw"] {
        fs::write(at(name), vec![9; 3 << 20]).unwrap();
    }
    let in_dir = |program: &str, args: &[&str]| {
        let out = std::process::Command::new("timeout")
            .args(["60", program])
            .args(args)
            .current_dir(dir.path())
            .output()
            .unwrap();
        (out.status.success(), String::from_utf8_lossy(&out.stderr).into_owned())
    };
    let must = |program: &str, args: &[&str]| {
        let (done, said) = in_dir(program, args);
        assert!(done, "{}: {program} {args:?}: {said}", kind.name);
    };
    must("qemu-img", &["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "base.raw", "middle.qcow2"]);
    for step in kind.steps.lines() {
        let step = step.replace("DIR", text(dir.path()));
        let words: Vec<&str> = step.split(' ').map(|word| if word == "IMAGE" { "image.qcow2" } else { word }).collect();
        match words[0] {
            "create" => {
                let size = words.get(2).copied().unwrap_or("4M");
                let secret = ["--object", "secret,id=s,data=x"];
                let create = [&["create", "-q", "-f", "qcow2", "-o", words[1]][..], &secret, &["image.qcow2", size]];
                must("qemu-img", &create.concat());
            }
            "over" => {
                let mut args = vec!["create", "-q", "-f", "qcow2", "-b", words[1], "-F", words[2]];
                args.extend(if words.len() > 3 { vec!["-u", "image.qcow2", words[3]] } else { vec!["image.qcow2"] });
                must("qemu-img", &args);
            }
            "io" | "kill" => {
                let commands = step.split_once(' ').unwrap().1.split(';');
                let mut args: Vec<&str> = commands.flat_map(|command| ["-c", command]).collect();
                if words[0] == "kill" {
                    args.extend(["-c", "abort"]);
                }
                args.push("image.qcow2");
                let (done, said) = in_dir("qemu-io", &args);
                assert_eq!(done, words[0] == "io", "{}: {said}", kind.name);
            }
            _ => must("qemu-img", &words),
        }
    }
    (kind.patch)(&at("image.qcow2"));
    at("image.qcow2")
}

fn theirs(path: &Path) -> Value {
    serde_json::from_slice(&qemu("qemu-img", &["info", "-U", "--output=json", text(path)])).unwrap()
}

/// Ours without what QEMU does not tell, which must make sense.
fn common(kind: &Kind, mut ours: Value) -> Value {
    let Some(data) = ours["format-specific"]["data"].as_object_mut() else { return ours };
    let in_use = kind.name == "bitmaps in use";
    for bitmap in data.get_mut("bitmaps").and_then(Value::as_array_mut).into_iter().flatten() {
        let bitmap = bitmap.as_object_mut().unwrap();
        assert_eq!(bitmap.remove("inconsistent").is_some(), in_use, "{}", kind.name);
        assert_eq!(bitmap.remove("reason").is_some(), in_use, "{}", kind.name);
    }
    ours
}

#[test]
fn info_tells_what_qemu_tells_and_leaves_nothing_out() {
    if !has_qemu() {
        return;
    }
    for kind in KINDS {
        let dir = TempDir::new().unwrap();
        let path = make(&dir, &kind);
        let mut theirs = theirs(&path);
        let (code, out) = fleecefs(&["info", "--json", text(&path)]);
        assert_eq!(code, 0, "{}: {}", kind.name, String::from_utf8_lossy(&out.stderr));
        let ours = common(&kind, json(&out));
        theirs.as_object_mut().unwrap().remove("children");
        if let Some(encrypt) = theirs["format-specific"]["data"].get_mut("encrypt") {
            // What stands in the LUKS header is for who has the key.
            *encrypt = Value::Object(Map::from_iter([("format".to_owned(), encrypt["format"].clone())]));
        }
        assert_eq!(ours, theirs, "{}", kind.name);
    }
}

#[test]
fn info_lists_snapshots_as_qemu_lists_them() {
    if !has_qemu() {
        return;
    }
    for kind in KINDS.into_iter().filter(|kind| kind.steps.contains("snapshot")) {
        let dir = TempDir::new().unwrap();
        let path = make(&dir, &kind);
        let (_, out) = fleecefs(&["info", text(&path)]);
        let lines = String::from_utf8(out.stdout).unwrap();
        let list = String::from_utf8(qemu("env", &["TZ=UTC", "qemu-img", "snapshot", "-l", text(&path)])).unwrap();
        let rows: Vec<&str> = list.lines().filter(|line| line.starts_with(|c: char| c.is_ascii_digit())).collect();
        assert!(!rows.is_empty(), "{list}");
        for row in rows {
            // ID, name, VM size (number and unit), date, time, clock, counter.
            let words: Vec<&str> = row.split_whitespace().collect();
            let [id, name, _, _, date, time, clock, _] = words[..] else { panic!("{row}") };
            let ours = lines.lines().find(|line| line.split_whitespace().next() == Some(id));
            let ours = ours.unwrap_or_else(|| panic!("{}: no line of snapshot {id}: {lines}", kind.name));
            for word in [&format!("{date} {time}"), clock] {
                assert!(ours.contains(word), "{}: '{word}' is not in: {ours}", kind.name);
            }
            assert!(ours.contains(name), "{}: '{name}' is not in: {ours}", kind.name);
        }
    }
}

#[test]
fn check_finds_what_qemu_finds_and_ends_with_the_code_for_it() {
    if !has_qemu() {
        return;
    }
    for kind in KINDS {
        let dir = TempDir::new().unwrap();
        let path = make(&dir, &kind);
        if kind.checked {
            if !FROM_WHERE_IT_RUNS.contains(&kind.name) {
                both_checks(&path, kind.name);
            }
            continue;
        }
        assert_eq!(run("qemu-img", &["check", text(&path)]).status.code(), Some(1), "{}", kind.name);
        let (code, out) = fleecefs(&["check", text(&path)]);
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        // A check needs nothing of what is below.
        let encrypted = !kind.name.contains("base");
        assert_eq!(code, if encrypted { 2 } else { 0 }, "{}: {said}", kind.name);
        assert_eq!(said.contains("encrypted images are not supported"), encrypted, "{said}");
    }
}

#[test]
fn what_cannot_be_checked_has_its_own_code() {
    if !has_qemu() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let (raw, short) = (dir.path().join("a.raw"), dir.path().join("short.qcow2"));
    fs::write(&raw, [0; 4096]).unwrap();
    fs::write(&short, b"QFI\xfb\0\0\0\x03").unwrap();
    for (path, theirs, why) in [(&raw, 63, "nothing to check"), (&short, 1, "fewer than a header")] {
        assert_eq!(run("qemu-img", &["check", text(path)]).status.code(), Some(theirs));
        let (code, out) = fleecefs(&["check", text(path)]);
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(code == 2 && said.contains(why), "{code}: {said}");
    }
}
