//! The control socket beside qemu-storage-daemon: the same questions, asked by QEMU's own client, get the same answers.
//!
//! The scripts are in `tests/qmp_scripts`. They run once against each, and print a line for each question; lines that
//! differ are a failure, but for the deviations that `doc/qmp.md` names.

use crate::bitmaps::Tmpfs;
use crate::harness::*;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// Python with the package `qemu.qmp`.
pub fn python_with_qmp(test: &str) -> Option<PathBuf> {
    python_with(test, "qemu.qmp")
}

/// qemu-storage-daemon with nodes and NBD exports of their names. It goes with this value.
pub struct StorageDaemon {
    child: Child,
    pub socket: PathBuf,
    nbd: PathBuf,
}

impl StorageDaemon {
    /// Serves images, each as a node of its name and format, all of them read-only or none.
    pub fn start(rig: &Rig, images: &[(&str, &str, PathBuf)], read_only: bool) -> StorageDaemon {
        let (socket, nbd) = (rig.path("qemu.qmp"), rig.path("qemu.nbd"));
        // What the last one left, where it was killed.
        let _ = std::fs::remove_file(&socket);
        let _ = std::fs::remove_file(&nbd);
        let mut command = Command::new("qemu-storage-daemon");
        command
            .arg("--chardev")
            .arg(format!("socket,path={},server=on,wait=off,id=qmp", socket.display()))
            .args(["--monitor", "chardev=qmp", "--nbd-server"])
            .arg(format!("addr.type=unix,addr.path={},max-connections=0", nbd.display()));
        for (node, format, image) in images {
            let file = format!("file.driver=file,file.filename={},file.discard=unmap", image.display());
            let (mode, writable) = if read_only { ("on", "off") } else { ("off", "on") };
            let node_options = format!("driver={format},node-name={node},discard=unmap,read-only={mode}");
            command.arg("--blockdev").arg(format!("{node_options},{file}"));
            let export = format!("type=nbd,id=export-{node},node-name={node},name={node},writable={writable}");
            command.arg("--export").arg(export);
        }
        let quiet = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = quiet.spawn().unwrap();
        let daemon = StorageDaemon { child, socket, nbd };
        eventually("the socket of qemu-storage-daemon", || {
            std::os::unix::net::UnixStream::connect(&daemon.nbd).is_ok() && daemon.socket.exists()
        });
        daemon
    }

    fn guest(&self, node: &str) -> String {
        format!("nbd+unix:///{node}?socket={}", self.nbd.display())
    }

    /// Ends it cleanly: bitmaps are stored.
    pub fn end(mut self) {
        ok(tool("kill").arg(self.child.id().to_string()));
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for StorageDaemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a script and gives the lines that it printed.
#[track_caller]
pub fn script(python: &Path, name: &str, config: &Value) -> Vec<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/qmp_scripts").join(name);
    // No byte code beside the sources.
    let out = ok(tool(python).arg("-B").arg(path).arg(config.to_string()));
    out.lines().map(str::to_owned).collect()
}

/// The images of one side.
struct Images {
    list: Vec<(&'static str, &'static str, PathBuf)>,
}

impl Images {
    /// `(name, format, bytes)` each, in a directory of the side's own.
    fn make(rig: &Rig, side: &str, images: &[(&'static str, &'static str, u64)]) -> Images {
        let dir = rig.mount_point(side);
        let make = |&(name, format, bytes): &(&'static str, &'static str, u64)| {
            let path = dir.join(format!("{name}.{format}"));
            ok(tool("qemu-img").args(["create", "-q", "-f", format]).arg(&path).arg(bytes.to_string()));
            (name, format, path)
        };
        Images { list: images.iter().map(make).collect() }
    }

    fn config(&self, side: &str, socket: &Path, guest: impl Fn(&str) -> String, more: &Value) -> Value {
        let disk = |(name, _, image): &(&'static str, &'static str, PathBuf)| {
            ((*name).to_owned(), json!({ "image": image, "guest": guest(name) }))
        };
        let disks: serde_json::Map<String, Value> = self.list.iter().map(disk).collect();
        let mut config = json!({ "side": side, "socket": socket, "disks": disks });
        let more = more.as_object().cloned().unwrap_or_default();
        config.as_object_mut().unwrap().extend(more);
        config
    }
}

/// A script's config for one side and phase; `read-only` in it is told to both servers.
type More<'a> = &'a dyn Fn(&str, u64) -> Value;

/// Runs a script on both sides in as many phases, each with the servers started anew, and compares line by line.
#[track_caller]
fn compare(name: &str, images: &[(&'static str, &'static str, u64)], phases: u64, more: More) {
    compare_images(name, images, phases, more, None);
}

/// The same; the images are copies of `template`, where there is one.
#[track_caller]
fn compare_images(
    name: &str,
    images: &[(&'static str, &'static str, u64)],
    phases: u64,
    more: More,
    template: Option<&Path>,
) {
    requires!("python3", "qemu-storage-daemon", "qemu-io", "qemu-img");
    let Some(python) = python_with_qmp(name) else { return };
    let rig = Rig::new();
    let (ours, qemus) = (Images::make(&rig, "ours", images), Images::make(&rig, "qemus", images));
    for (template, (_, _, image)) in
        template.into_iter().flat_map(|t| ours.list.iter().chain(&qemus.list).map(move |i| (t, i)))
    {
        std::fs::copy(template, image).unwrap();
    }
    for phase in 0..phases {
        let read_only = more("", phase)["read-only"] == true;
        let mut specs = Vec::new();
        for (disk, format, image) in &ours.list {
            let mode = if read_only { ",read-only" } else { "" };
            let spec = format!("name={disk},file={},format={format}{mode}", image.display());
            specs.extend(["--disk".to_owned(), spec]);
        }
        let mount = rig.mount(specs);
        let socket = PathBuf::from(mount.status()["qmp"].as_str().unwrap());
        let live = |disk: &str| mount.live(disk).display().to_string();
        let our_lines = script(&python, name, &ours.config("fleecefs", &socket, live, &more("ours", phase)));
        mount.umount();
        let daemon = StorageDaemon::start(&rig, &qemus.list, read_only);
        let config = qemus.config("qemu", &daemon.socket, |disk| daemon.guest(disk), &more("qemus", phase));
        let qemus_lines = script(&python, name, &config);
        daemon.end();
        same(name, phase, &our_lines, &qemus_lines);
    }
}

#[track_caller]
fn same(name: &str, phase: u64, ours: &[String], qemus: &[String]) {
    assert!(!qemus.is_empty(), "{name}: nothing was asked");
    let differ: Vec<String> = (0..ours.len().max(qemus.len()))
        .filter(|&line| ours.get(line) != qemus.get(line))
        .map(|line| format!("ours {:?}\nQEMU {:?}", ours.get(line), qemus.get(line)))
        .collect();
    let count = differ.len();
    assert!(differ.is_empty(), "{name}, phase {phase}: {count} answers differ\n{}", differ[..count.min(20)].join("\n"));
}

const MIB: u64 = 1 << 20;

#[test]
fn what_is_refused_is_refused_in_qemus_words() {
    let images = [("a", "raw", 64 * MIB), ("b", "raw", 64 * MIB), ("c", "raw", 32 * MIB), ("q", "qcow2", 64 * MIB)];
    compare("texts.py", &images, 1, &|_, _| json!({}));
}

#[test]
fn bits_counts_hashes_and_rollbacks_are_qemus() {
    let images = [("a", "raw", 64 * MIB), ("b", "raw", 64 * MIB), ("q", "qcow2", 64 * MIB)];
    compare("counts.py", &images, 1, &|_, _| json!({}));
}

#[test]
fn bitmaps_go_through_resizes_and_closes_as_in_qemu() {
    let more = |_: &str, phase| json!({ "phase": phase, "read-only": phase == 2 });
    compare("sizes.py", &[("q", "qcow2", 64 << 30)], 4, &more);
}

#[test]
fn nodes_come_and_go_as_in_qemu() {
    requires!("qemu-img");
    let rig = Rig::new();
    for side in ["ours", "qemus"] {
        let dir = rig.mount_point(side);
        std::fs::create_dir(dir.join("sub")).unwrap();
        std::fs::write(dir.join("n.raw"), vec![0; MIB as usize]).unwrap();
        ok(tool("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(dir.join("n.qcow2")).arg("2M"));
    }
    let dir = |side: &str, _| json!({ "dir": rig.path(if side.is_empty() { "ours" } else { side }) });
    compare("nodes.py", &[("a", "raw", MIB)], 1, &dir);
}

#[test]
fn exports_come_and_go_as_in_qemu() {
    let rig = Rig::new();
    for side in ["ours", "qemus"] {
        std::fs::write(rig.mount_point(&format!("exports-{side}")).join("r.raw"), vec![0; MIB as usize]).unwrap();
    }
    let dir = |side: &str, _| json!({ "dir": rig.path(&format!("exports-{side}")) });
    compare("exports.py", &[("a", "raw", 64 * MIB), ("q", "qcow2", 64 * MIB)], 1, &dir);
}

#[test]
fn answers_are_what_qemus_schema_says() {
    requires!("python3", "qemu-storage-daemon", "qemu-img");
    let Some(python) = python_with_qmp("schema") else { return };
    let rig = Rig::new();
    let images = Images::make(&rig, "images", &[("a", "raw", MIB), ("q", "qcow2", MIB)]);
    let base = images.list[1].2.clone();
    let top = base.with_file_name("top.qcow2");
    ok(tool("qemu-img").args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"]).arg(&base).arg(&top));
    let mount = rig.mount(args![&images.list[0].2, &top]);
    for disk in ["a", "top"] {
        mount.done("bitmap add", args![disk, "b"]);
        mount.done("bitmap add", args![disk, "c", "--persistent", "false"]);
    }
    mount.snap("monday");
    mount.drop_snap("monday");
    let daemon = StorageDaemon::start(&rig, &[], false);
    let config = json!({
        "side": "fleecefs",
        "socket": mount.status()["qmp"],
        "qemu": daemon.socket,
        "target": rig.path("target.raw"),
        "disks": {"a": {}, "top": {}},
    });
    script(&python, "schema.py", &config);
}

#[test]
fn bitmaps_whose_bits_are_lost_can_only_be_removed_as_in_qemu() {
    requires!("qemu-storage-daemon", "qemu-img");
    let rig = Rig::new();
    // QEMU is killed with bitmaps in use.
    let template = rig.path("template.qcow2");
    ok(tool("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&template).arg("64M"));
    for name in ["lost", "gone"] {
        ok(tool("qemu-img").args(["bitmap", "--add"]).arg(&template).arg(name));
    }
    drop(StorageDaemon::start(&rig, &[("q", "qcow2", template.clone())], false));
    compare_images("inconsistent.py", &[("q", "qcow2", 64 * MIB)], 1, &|_, _| json!({}), Some(&template));
}

/// A file system that is full; `full.raw` in it has room for its first MiB alone, `full2.raw` for nothing.
fn full_directory(dir: &Path) -> Tmpfs {
    std::fs::create_dir(dir).unwrap();
    let full = Tmpfs::new(dir.to_owned(), 4 * MIB);
    for (name, there) in [("full.raw", MIB as usize), ("full2.raw", 0)] {
        let path = dir.join(name);
        std::fs::write(&path, vec![1; there]).unwrap();
        std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(16 * MIB).unwrap();
    }
    full.fill();
    full
}

#[test]
fn backups_end_as_in_qemu() {
    requires!("qemu-storage-daemon", "qemu-img", "qemu-io");
    let rig = Rig::new();
    let _full = ["ours", "qemus"].map(|side| {
        let dir = rig.mount_point(&format!("targets-{side}"));
        std::fs::write(dir.join("ro"), vec![0; 16 * MIB as usize]).unwrap();
        full_directory(&dir.join("full"))
    });
    let dir = |side: &str, _| {
        let side = if side.is_empty() { "ours" } else { side };
        let dir = rig.path(&format!("targets-{side}"));
        json!({ "dir": dir, "full": dir.join("full") })
    };
    compare("backup.py", &[("a", "raw", 16 * MIB), ("b", "raw", 16 * MIB)], 1, &dir);
}
