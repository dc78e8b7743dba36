//! A long chain of backups under load, with failures on the way: each point is the view that it was taken from.

use crate::harness::*;
use serde_json::Value;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const POINTS: usize = 11;
/// The backups into which failures are injected.
const FULL_TARGET: usize = 3;
const KILLED: usize = 6;

/// Writes, and makes zeros, at random until it is stopped.
fn load(mount: &Mount, mib: u64, stop: &AtomicBool) {
    let guest = mount.guest("vda");
    let mut seed = 1u64;
    while !stop.load(Ordering::Relaxed) {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let (at, length) = ((seed >> 33) % (mib * 256 - 32) * 4096, 4096 * (1 + (seed >> 20) % 16));
        let bytes = if seed >> 60 == 0 { vec![0; length as usize] } else { pattern(seed, length as usize) };
        guest.write_all_at(&bytes, at).unwrap();
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// What the test holds of a point that is being made: the open view stays readable, whatever becomes of its snapshot.
struct Held {
    view: File,
    map: Option<File>,
}

/// Ends the load however the test ends.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn hold(mount: &Mount, name: &str, since: Option<&str>) -> Held {
    let (view, dir) = (mount.view(name, "vda"), mount.snapshot_dir(name));
    for _ in 0..60_000 {
        if let Ok(view) = File::open(&view) {
            let map = since.map(|since| File::open(dir.join("vda/since").join(since).join("map.json")).unwrap());
            return Held { view, map };
        }
        std::thread::sleep(Duration::from_micros(500));
    }
    panic!("snapshot {name} was not taken");
}

fn content(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

fn command(mount: &Mount, dir: &Path, format: &str, name: Option<&str>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
    command.arg("backup").arg(&mount.dir).arg("--to").arg(dir).args(["--consumer", "daily", "--format", format]);
    command.args(name.iter().flat_map(|name| ["--name", name])).args(["--rate", "32M", "--json"]);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// A backup that fails in its midst, and is begun again.
fn with_failure(mount: &Mount, dir: &Path, format: &str, name: &str, number: usize) {
    let mut failing = command(mount, dir, format, Some(name));
    if number == FULL_TARGET {
        // No file may get so large: half of what there is to copy fits.
        let mut limited = tool("prlimit");
        let limit = if format == "raw" { 24 << 20 } else { 700 << 10 };
        limited.arg(format!("--fsize={limit}")).arg("--").arg(failing.get_program()).args(failing.get_args());
        let out = limited.output().unwrap();
        refused(&out, 2, &["too large", "make room"]);
        return;
    }
    let mut child = failing.spawn().unwrap();
    let journal = dir.join(format!("{name}.partial/vda.done"));
    eventually("a partial point", || journal.exists());
    std::thread::sleep(Duration::from_millis(100));
    child.kill().unwrap();
    child.wait().unwrap();
}

fn chain(format: &str) {
    let mib = sized(32, 256);
    let rig = Rig::new();
    let mount = rig.mount([rig.image("vda", mib)]);
    let dir = rig.path("backup");
    let stop = AtomicBool::new(false);
    let mut points: Vec<(String, Vec<u8>)> = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(|| load(&mount, mib, &stop));
        let _stop = Stop(&stop);
        for number in 0..POINTS {
            let name = format!("p{number}");
            let since = number.checked_sub(1).map(|before| format!("p{before}"));
            std::thread::sleep(Duration::from_millis(150));
            let held = std::thread::scope(|inner| {
                let holder = inner.spawn(|| hold(&mount, &name, since.as_deref()));
                let fails = [FULL_TARGET, KILLED].contains(&number);
                if fails {
                    with_failure(&mount, &dir, format, &name, number);
                    let consumer = &mount.status()["consumers"][0];
                    assert_eq!(consumer["checkpoint"].as_str(), since.as_deref(), "it moved");
                    assert!(!dir.join(&name).exists());
                }
                let again = if fails { None } else { Some(name.as_str()) };
                let out = command(&mount, &dir, format, again).output().unwrap();
                let code = if number == 0 { 3 } else { 0 };
                assert_eq!(out.status.code(), Some(code), "{}{}", stdout(&out), stderr(&out));
                holder.join().unwrap()
            });
            check_copied(&held, &dir.join(&name), number);
            points.push((name, content(&held.view)));
        }
    });
    for (name, view) in &points {
        let target: PathBuf = rig.path("restored");
        let _ = fs::remove_file(&target);
        ok(tool(env!("CARGO_BIN_EXE_fleecefs")).arg("restore").arg(dir.join(name)).arg("--to").arg(&target));
        assert!(fs::read(&target).unwrap() == *view, "{format}: point {name} is not the view");
        if format == "qcow2" && number_of(name).is_multiple_of(5) {
            let file = dir.join(name).join("vda.qcow2");
            ok(tool("qemu-img").args(["check", "-q"]).arg(&file));
            ok(tool("qemu-img").args(["compare", "-q", "-f", "qcow2", "-F", "raw"]).args([&file, &target]));
        }
    }
    if format == "qcow2" {
        served(&rig, &dir.join("p10/vda.qcow2"), &points[10].1);
    }
}

fn number_of(name: &str) -> usize {
    name[1..].parse().unwrap()
}

/// The newest point with its chain, mounted read-only.
fn served(rig: &Rig, file: &Path, view: &[u8]) {
    let mount = Mount::at(rig.mount_point("served"), args!["-r", file]);
    assert!(fs::read(mount.live("vda")).unwrap() == view);
    mount.umount();
}

/// What was copied is what changed, by the map.
fn check_copied(held: &Held, point: &Path, number: usize) {
    let manifest: Value = serde_json::from_slice(&fs::read(point.join("manifest.json")).unwrap()).unwrap();
    let disk = &manifest["disks"][0];
    let Some(map) = &held.map else {
        assert!(disk["base"].is_null());
        return;
    };
    assert_eq!(disk["base"]["point"], format!("p{}", number - 1));
    let map = Map::parse(&serde_json::from_slice(&content(map)).unwrap());
    let sum = |zero: bool| map.0.iter().filter(|e| e.dirty && (zero || !e.zero)).map(|e| e.length).sum::<u64>();
    let (changed, data) = (sum(true), sum(false));
    assert_eq!(disk["changed_bytes"], changed);
    // What an interrupted run had not noted is copied twice, and counts twice. Pages of zeros in data are none.
    let copied = disk["copied_bytes"].as_u64().unwrap();
    let most = if number == KILLED || number == FULL_TARGET { 2 * changed } else { changed + changed / 20 };
    assert!(copied <= most && copied >= data - data / 4, "{copied} bytes copied of {changed}, {data} of them data");
}

#[test]
fn each_point_of_a_raw_chain_under_load_and_failures_is_its_view() {
    requires!("prlimit");
    chain("raw");
}

#[test]
fn each_point_of_a_qcow2_chain_under_load_and_failures_is_its_view() {
    requires!("prlimit", "qemu-img");
    chain("qcow2");
}
