//! The same batches on copies of the same images, by us and by qemu-storage-daemon: the same answers, the same lists,
//! the same bits by hash.

use crate::rig::GRANULE;
use crate::steps::*;
use crate::tools;
use fleecefs::fleece::{Action, BitmapRef, DiskSpec, Environment, Fleece, Options, Refused};
use fleecefs::storage::shm::HeapShmRoot;
use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A qemu-storage-daemon, and its control socket.
struct Qsd {
    child: Child,
    socket: BufReader<UnixStream>,
}

impl Qsd {
    fn start(dir: &Path) -> Self {
        let path = dir.join("qsd.sock");
        let chardev = format!("socket,id=c,path={},server=on,wait=off", path.display());
        let child = Command::new("qemu-storage-daemon")
            .args(["--chardev", &chardev, "--monitor", "chardev=c,mode=control"])
            .spawn()
            .unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        let socket = loop {
            match UnixStream::connect(&path) {
                Ok(socket) => break socket,
                Err(e) => assert!(Instant::now() < deadline, "{e}"),
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        let mut qsd = Qsd { child, socket: BufReader::new(socket) };
        qsd.socket.read_line(&mut String::new()).unwrap();
        qsd.execute("qmp_capabilities", json!({})).unwrap();
        qsd
    }

    /// The answer, or the text of the error.
    fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, String> {
        let line = json!({ "execute": command, "arguments": arguments }).to_string();
        self.socket.get_mut().write_all(format!("{line}\n").as_bytes()).unwrap();
        loop {
            let mut line = String::new();
            let read = self.socket.read_line(&mut line);
            assert!(read.is_ok_and(|bytes| bytes > 0), "qemu-storage-daemon is gone: {arguments}");
            let answer: Value = serde_json::from_str(&line).unwrap();
            if let Some(done) = answer.get("return") {
                return Ok(done.clone());
            }
            if let Some(error) = answer.get("error") {
                return Err(error["desc"].as_str().unwrap().to_owned());
            }
        }
    }

    fn open(&mut self, node: &str, driver: &str, file: &Path) {
        let file = json!({ "driver": "file", "filename": file });
        self.execute("blockdev-add", json!({ "node-name": node, "driver": driver, "file": file })).unwrap();
    }

    /// Name, count, granularity, recording, busy, persistent and hash of each bitmap, newest first.
    fn state(&mut self, node: &str) -> Vec<Value> {
        let nodes = self.execute("query-named-block-nodes", json!({})).unwrap();
        let found = nodes.as_array().unwrap().iter().find(|found| found["node-name"] == node).unwrap();
        let listed = found.get("dirty-bitmaps").and_then(|list| list.as_array().cloned()).unwrap_or_default();
        let with_hash = |info: Value| {
            let named = json!({ "node": node, "name": info["name"] });
            let hash = self.execute("x-debug-block-dirty-bitmap-sha256", named).unwrap();
            json!([
                info["name"],
                info["count"],
                info["granularity"],
                info["recording"],
                info["busy"],
                info["persistent"],
                hash["sha256"]
            ])
        };
        listed.into_iter().map(with_hash).collect()
    }

    fn quit(mut self) {
        self.execute("quit", json!({})).unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Qsd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn our_state(fleece: &Fleece, disk: &str) -> Vec<Value> {
    let with_hash = |info: fleecefs::fleece::BitmapInfo| {
        let hash = fleece.bitmap_sha256(&BitmapRef::new(disk, &info.name)).unwrap();
        json!([info.name, info.count, info.granularity, info.recording, info.busy, info.persistent, hash])
    };
    fleece.bitmaps(disk).unwrap().into_iter().map(with_hash).collect()
}

fn qmp(action: &Action) -> (&'static str, Value) {
    let named = |bitmap: &BitmapRef| json!({ "node": bitmap.disk, "name": bitmap.name });
    match action {
        Action::Add { disk, name, granularity, persistent, disabled } => {
            let mut data = json!({ "node": disk, "name": name, "persistent": persistent, "disabled": disabled });
            if let Some(granularity) = granularity {
                data["granularity"] = json!(granularity);
            }
            ("block-dirty-bitmap-add", data)
        }
        Action::Remove(bitmap) => ("block-dirty-bitmap-remove", named(bitmap)),
        Action::Clear(bitmap) => ("block-dirty-bitmap-clear", named(bitmap)),
        Action::Enable(bitmap) => ("block-dirty-bitmap-enable", named(bitmap)),
        Action::Disable(bitmap) => ("block-dirty-bitmap-disable", named(bitmap)),
        Action::Merge { target, sources } => {
            let sources: Vec<Value> = sources.iter().map(named).collect();
            ("block-dirty-bitmap-merge", json!({ "node": target.disk, "target": target.name, "bitmaps": sources }))
        }
        Action::Abort => ("abort", json!({})),
        Action::Hold(_) | Action::HoldToRead(_) | Action::Snapshot(_) | Action::Freeze { .. } => unreachable!(),
    }
}

const NODES: [&str; 3] = ["a", "b", "c"];
const BYTES: u64 = 5 * GRANULE + 512;

fn img(args: &[&str], file: &Path, size: u64) {
    let out = Command::new("qemu-img").args(["create", "-q"]).args(args).arg(file).arg(size.to_string()).output();
    assert!(out.unwrap().status.success());
}

fn mount(dir: &Path) -> Arc<Fleece> {
    let env = Environment { shm: Arc::new(HeapShmRoot::new()), background: false };
    let options = Options { state_dir: Some(dir.join("state")), ..Options::default() };
    let fleece = Fleece::with_environment(options, env);
    for node in NODES {
        let format = if node == "c" { fleecefs::image::Format::Raw } else { fleecefs::image::Format::Qcow2 };
        let spec = DiskSpec {
            name: Some(node.to_owned()),
            file: dir.join(format!("{node}.img")),
            format: Some(format),
            ..DiskSpec::default()
        };
        fleece.add_disk(&spec).unwrap();
    }
    fleece
}

fn action() -> impl Strategy<Value = Action> {
    let bitmap = || {
        let disk = proptest::sample::select(&["a", "a", "a", "a", "a", "a", "a", "a", "b", "c", "d"][..]);
        let name =
            proptest::sample::select(&["k512", "k4", "k64", "m1", "x", "k512", "k4", "k64", "m1", "x", "y", ""][..]);
        (disk, name).prop_map(|(disk, name)| BitmapRef::new(disk, name))
    };
    let granularity =
        proptest::sample::select(&[None, Some(512u64), Some(1 << 16), Some(1 << 31), None, Some(4096), Some(100)][..]);
    proptest::prop_oneof![
        4 => (bitmap(), granularity, proptest::bool::ANY, proptest::bool::ANY).prop_map(
            |(BitmapRef { disk, name }, granularity, persistent, disabled)| {
                // QEMU cannot keep a raw disk's bitmaps; we do.
                let persistent = persistent && disk != "c";
                Action::Add { disk, name, granularity, persistent, disabled }
            }
        ),
        1 => bitmap().prop_map(Action::Remove),
        2 => bitmap().prop_map(Action::Clear),
        2 => bitmap().prop_map(Action::Enable),
        2 => bitmap().prop_map(Action::Disable),
        // Without any source QEMU 10.0 crashes.
        5 => (bitmap(), proptest::collection::vec(bitmap(), 1..4))
            .prop_map(|(target, sources)| Action::Merge { target, sources }),
    ]
}

#[test]
fn batches_are_answered_as_by_qemu_and_leave_the_same_bits() {
    if !tools::has_tools(module_path!(), &["qemu-img", "qemu-storage-daemon"]) {
        return;
    }
    let (dir, other) = (tempfile::TempDir::new().unwrap(), tempfile::TempDir::new().unwrap());
    img(&["-f", "qcow2"], &dir.path().join("a.img"), BYTES);
    img(&["-f", "qcow2", "-o", "compat=0.10,cluster_size=512"], &dir.path().join("b.img"), BYTES);
    img(&["-f", "raw"], &dir.path().join("c.img"), BYTES + 512);
    let fleece = mount(dir.path());
    let new = |text: &str, granularity| added(text, Some(granularity), true, false);
    apply(&fleece, &[new("a/k512", 512), new("a/k4", 4096), new("a/k64", GRANULE), new("a/m1", 1 << 20)]);
    let disk = fleece.disk("a").unwrap();
    disk.write(&[1; 700], 70_000).unwrap();
    disk.write(&[1; 1], BYTES - 1).unwrap();
    apply(&fleece, &[disable("a/k4"), clear("a/m1")]);
    disk.write(&[1; 9000], 3 * GRANULE - 1000).unwrap();
    let written = our_state(&fleece, "a");
    drop(disk);
    fleece.close().unwrap();
    drop(fleece);
    for node in NODES {
        let name = format!("{node}.img");
        std::fs::copy(dir.path().join(&name), other.path().join(&name)).unwrap();
    }
    let fleece = mount(dir.path());
    let mut qsd = Qsd::start(other.path());
    for (node, driver) in NODES.into_iter().zip(["qcow2", "qcow2", "raw"]) {
        qsd.open(node, driver, &other.path().join(format!("{node}.img")));
    }
    assert_eq!(qsd.state("a"), written);
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[7; 32]);
    let mut runner = TestRunner::new_with_rng(Config::default(), rng);
    let batch = proptest::collection::vec(action(), 1..4);
    let (mut happened, mut refused) = (0, 0);
    for round in 0..4000 {
        let batch = batch.new_tree(&mut runner).unwrap().current();
        let ours = fleece.apply(&batch);
        // A transaction that fails because QEMU 10.0 refuses to enable a bitmap makes it crash, or disable the bitmap.
        let fatal = |refused: &Refused| matches!(batch[refused.index], Action::Enable(_)) && batch.len() > 1;
        if ours.as_ref().is_err_and(fatal) {
            continue;
        }
        let theirs = match &batch[..] {
            [one] => {
                let (command, arguments) = qmp(one);
                qsd.execute(command, arguments)
            }
            many => {
                let action = |action: &Action| {
                    let (kind, data) = qmp(action);
                    json!({ "type": kind, "data": data })
                };
                let actions: Vec<Value> = many.iter().map(action).collect();
                qsd.execute("transaction", json!({ "actions": actions }))
            }
        };
        match (&ours, &theirs) {
            (Ok(_), Ok(_)) => happened += 1,
            (Err(ours), Err(theirs)) => {
                refused += 1;
                assert_eq!(&ours.text, theirs, "round {round}: {batch:?}");
            }
            _ => panic!("round {round}: {batch:?}: {ours:?}, QEMU: {theirs:?}"),
        }
        for node in NODES {
            assert_eq!(our_state(&fleece, node), qsd.state(node), "round {round}: {node} after {batch:?}");
        }
    }
    assert!(happened > 30 && refused > 30, "{happened} happened, {refused} were refused");
    qsd.quit();
    fleece.close().unwrap();
    // What we stored is the same for QEMU as what it stored itself.
    let mut qsd = Qsd::start(dir.path());
    qsd.open("ours", "qcow2", &dir.path().join("a.img"));
    qsd.open("theirs", "qcow2", &other.path().join("a.img"));
    let sorted = |mut state: Vec<Value>| {
        state.sort_by_key(|info| info[0].to_string());
        state
    };
    assert_eq!(sorted(qsd.state("ours")), sorted(qsd.state("theirs")));
    qsd.quit();
}

#[test]
fn what_an_image_cannot_keep_is_refused_as_by_qemu() {
    if !tools::has_tools(module_path!(), &["qemu-img", "qemu-storage-daemon"]) {
        return;
    }
    let dir = tempfile::TempDir::new().unwrap();
    img(&["-f", "qcow2"], &dir.path().join("a.img"), 40 << 40);
    img(&["-f", "qcow2", "-o", "compat=0.10"], &dir.path().join("b.img"), GRANULE);
    img(&["-f", "raw"], &dir.path().join("c.img"), GRANULE);
    let mut qsd = Qsd::start(dir.path());
    let names = ["x".to_owned(), "n".repeat(1024), "n".repeat(1023)];
    let mut theirs = Vec::new();
    for node in ["a", "b"] {
        qsd.open(node, "qcow2", &dir.path().join(format!("{node}.img")));
        for (name, granularity) in names.iter().flat_map(|name| [(name, 4096u64), (name, 1 << 31)]) {
            let action = added(&format!("{node}/{name}"), Some(granularity), true, false);
            theirs.push((action.clone(), qsd.execute(qmp(&action).0, qmp(&action).1).err()));
        }
    }
    qsd.quit();
    let fleece = mount(dir.path());
    // Those that QEMU made are in the image by now.
    let made: Vec<BitmapRef> =
        fleece.bitmaps("a").unwrap().into_iter().map(|info| BitmapRef::new("a", info.name)).collect();
    made.into_iter().for_each(|bitmap| drop(apply(&fleece, &[Action::Remove(bitmap)])));
    for (action, expected) in theirs {
        assert_eq!(fleece.apply(std::slice::from_ref(&action)).err().map(|e| e.text), expected);
    }
    fleece.close().unwrap();
}
