//! NBD by the clients that people have: nbdinfo, nbdcopy, qemu-img, qemu-io, nbdkit, and libnbd's Python binding.
//!
//! What a client reads is held against the files of the mount. Scripts are in `tests/nbd_scripts`.

use crate::harness::*;
use crate::load::{Expected, Guest};
use crate::qmp::Client;
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

const MIB: u64 = 1 << 20;
/// A disk of the tests; big enough for requests of some MiB.
const DISK_MIB: u64 = 12;

/// A Python that has libnbd's binding; else one skip line, or a failure where nothing may be skipped.
pub fn python_with_nbd(test: &str) -> Option<PathBuf> {
    let has = |python: &Path| tool(python).args(["-c", "import nbd"]).output().is_ok_and(|out| out.status.success());
    // Debian's package is for Debian's interpreter alone, which need not be the first one.
    let named = std::env::var_os("FLEECEFS_NBD_PYTHON").map(PathBuf::from);
    let found = named.into_iter().chain(["python3".into(), "/usr/bin/python3".into()]).find(|python| has(python));
    if found.is_none() {
        let text = format!("{test}: without libnbd's Python binding (python3-libnbd)");
        assert!(std::env::var_os("FLEECEFS_REQUIRE_TOOLS").is_none(), "{text}");
        say(&format!("skip {text}"));
    }
    found
}

/// Runs a script and gives what it printed; its last line begins with `done`.
#[track_caller]
pub fn script(python: &Path, name: &str, config: &Value) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/nbd_scripts").join(name);
    let out = ok(tool(python).arg("-B").arg(path).arg(config.to_string()));
    assert!(out.lines().last().is_some_and(|line| line.starts_with("done")), "{name}: {out}");
    out
}

/// A mount whose disks and views are served on a Unix socket.
struct Served {
    mount: Mount,
    socket: PathBuf,
}

impl Served {
    /// One disk `vda`, 12 MiB, in which every other 64 KiB hold data.
    fn new(rig: &Rig, format: &str) -> Served {
        let mut image = rig.image("vda", DISK_MIB);
        if format == "qcow2" {
            let raw = image;
            image = rig.path("vda.qcow2");
            ok(tool("qemu-img").args(["convert", "-O", "qcow2", "-f", "raw"]).arg(&raw).arg(&image));
        }
        let socket = rig.path("nbd");
        let mount = rig.mount(args!["-f", format, "--nbd", format!("unix:{}", socket.display()), image]);
        Served { mount, socket }
    }

    fn uri(&self, export: &str) -> String {
        uri(&self.socket, export)
    }

    fn names(&self) -> Vec<String> {
        let text = ok(tool("nbdinfo").args(["--list", "--json", &self.uri("")]));
        let list: Value = serde_json::from_str(&text).unwrap();
        let name = |row: &Value| row["export-name"].as_str().unwrap().to_owned();
        list["exports"].as_array().unwrap().iter().map(name).collect()
    }

    /// Adds a bitmap that records, without asking for anything.
    fn add_bitmap(&self, name: &str) {
        Client::new(&self.mount).ok("block-dirty-bitmap-add", json!({"node": "vda", "name": name}));
    }
}

fn uri(socket: &Path, export: &str) -> String {
    format!("nbd+unix:///{export}?socket={}", socket.display())
}

/// Offset, length and flags of each extent that nbdinfo tells.
#[track_caller]
fn map(uri: &str, context: &str) -> Vec<(u64, u64, u64)> {
    let text = ok(tool("nbdinfo").args(["--json", &format!("--map={context}"), uri]));
    extents(&serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}")))
}

fn extents(list: &Value) -> Vec<(u64, u64, u64)> {
    let number = |row: &Value, key: &str| row[key].as_u64().unwrap_or_else(|| panic!("{key} in {row}"));
    list.as_array()
        .unwrap()
        .iter()
        .map(|row| (number(row, "offset"), number(row, "length"), number(row, "type")))
        .collect()
}

/// Runs of what `of` says of extents that cover a disk in order, neighbours merged.
fn runs<T: PartialEq>(extents: impl IntoIterator<Item = (u64, T)>) -> Vec<(u64, T)> {
    let mut found: Vec<(u64, T)> = Vec::new();
    for (length, of) in extents {
        match found.last_mut() {
            Some((last, same)) if *same == of => *last += length,
            _ => found.push((length, of)),
        }
    }
    found
}

/// Takes a snapshot beside a guest that writes, after one whose checkpoint is a point that maps count from.
fn two_points(served: &Served, guest: &Guest) -> Expected {
    served.mount.snap("monday");
    served.mount.drop_snap("monday");
    let before = guest.done();
    eventually("some writes", || guest.done() > before + 60);
    let expected = guest.around(|| served.mount.snap("tuesday"));
    // What the view has to keep.
    let before = guest.done();
    eventually("some first touches", || guest.done() > before + 60);
    expected
}

/// A guest's content as the disk begins.
fn content(served: &Served) -> Vec<u8> {
    fs::read(served.mount.live("vda")).unwrap()
}

/// Runs beside a guest of two threads, all of whose writes are recorded by the bitmap `user`.
fn beside_a_guest(served: &Served, work: impl FnOnce(&Guest)) {
    served.add_bitmap("user");
    let guest = Guest::new(content(served), 4096);
    std::thread::scope(|scope| {
        let _stop = guest.start(scope, &served.mount.live("vda"), 2, 5);
        work(&guest);
    });
}

#[test]
fn exports_come_and_go_with_disks_and_views() {
    requires!("nbdinfo", "qemu-img");
    let rig = Rig::new();
    let served = Served::new(&rig, "raw");
    assert_eq!(served.names(), ["vda"]);
    served.mount.snap("monday");
    assert_eq!(served.names(), ["monday/vda", "vda"]);
    let info = |name: &str| -> Value {
        let text = ok(tool("nbdinfo").args(["--json", &served.uri(name)]));
        serde_json::from_str::<Value>(&text).unwrap()["exports"][0].clone()
    };
    let (live, frozen) = (info("vda"), info("monday/vda"));
    assert_eq!((&live["is_read_only"], &frozen["is_read_only"]), (&json!(false), &json!(true)));
    for export in [&live, &frozen] {
        assert_eq!(export["export-size"], DISK_MIB * MIB);
        for can in ["can_multi_conn", "can_df", "can_cache", "can_flush"] {
            assert_eq!(export[can], true, "{can} in {export}");
        }
        assert_eq!(export["block_size_maximum"], 32 * MIB);
        assert_eq!(export["contexts"][0], "base:allocation");
    }
    served.mount.drop_snap("monday");
    assert_eq!(served.names(), ["vda"]);
    let out = tool("nbdinfo").arg(served.uri("monday/vda")).output().unwrap();
    assert!(!out.status.success(), "a view that is gone was opened");
}

#[test]
fn the_empty_name_is_the_only_disk_and_never_another() {
    requires!("nbdinfo", "qemu-img");
    let rig = Rig::new();
    let served = Served::new(&rig, "raw");
    let named = || {
        let map = ok(tool("nbdinfo").args(["--map=base:allocation", &served.uri("")]));
        assert_eq!(map, ok(tool("nbdinfo").args(["--map=base:allocation", &served.uri("vda")])));
        ok(tool("qemu-img").args(["info", &format!("nbd:unix:{}", served.socket.display())]))
    };
    assert!(named().contains("12 MiB"));
    let vdb = rig.image("vdb", 5);
    served.mount.done("disk add", args![&vdb]);
    assert!(named().contains("12 MiB"));
    served.mount.done("disk remove", ["vda"]);
    let refused = |why: &str| {
        let out = tool("qemu-img").args(["info", &format!("nbd:unix:{}", served.socket.display())]).output().unwrap();
        assert!(stderr(&out).contains(why), "{out:?}");
    };
    refused("export 'vda': no such export");
    served.mount.umount();
    let _two = rig.mount(args!["--nbd", format!("unix:{}", served.socket.display()), rig.path("vda.raw"), vdb]);
    refused("there is no default export");
}

#[test]
fn a_frozen_export_is_what_the_frozen_file_is_beside_a_guest() {
    requires!("nbdinfo", "nbdcopy", "qemu-img");
    for format in ["raw", "qcow2"] {
        let rig = Rig::new();
        let served = Served::new(&rig, format);
        beside_a_guest(&served, |guest| {
            let expected = two_points(&served, guest);
            let uri = served.uri("tuesday/vda");
            for (name, flags) in [
                ("one", &["--connections=1"][..]),
                ("four", &["--connections=4", "--requests=4", "--request-size=4194304"]),
            ] {
                let copy = rig.path(name);
                ok(tool("nbdcopy").args(flags).arg(&uri).arg(&copy));
                expected.check(&format!("{format}: nbdcopy"), &fs::read(copy).unwrap());
            }
            let converted = rig.path("converted");
            ok(tool("qemu-img").args(["convert", "-f", "raw", "-O", "raw", &uri]).arg(&converted));
            let file = fs::read(served.mount.view("tuesday", "vda")).unwrap();
            assert!(fs::read(converted).unwrap() == file, "{format}: qemu-img convert");
            expected.check("the file", &file);
            ok(tool("qemu-img")
                .args(["compare", "-f", "raw", "-F", "raw", &uri])
                .arg(served.mount.view("tuesday", "vda")));
            let out = tool("qemu-io").args(["-f", "raw", "-c", "write 0 4k", &uri]).output().unwrap();
            assert!(!out.status.success(), "a frozen export was written to");
        });
    }
}

#[test]
fn contexts_of_a_frozen_export_are_the_maps_of_its_files() {
    requires!("nbdinfo", "qemu-img");
    for format in ["raw", "qcow2"] {
        let rig = Rig::new();
        let served = Served::new(&rig, format);
        beside_a_guest(&served, |guest| {
            two_points(&served, guest);
            let uri = served.uri("tuesday/vda");
            let dirty = map(&uri, "qemu:dirty-bitmap:monday");
            let of_file = served.mount.json("snapshots/tuesday/vda/since/monday/map.nbd.json");
            assert_eq!(dirty, extents(&of_file), "{format}");
            assert!(dirty.iter().any(|(_, _, flags)| flags & 1 == 1), "{format}: nothing is dirty");
            // QEMU's hack: where the context says 1, its map says 'no data'.
            let options = format!(
                "driver=nbd,server.type=unix,server.path={},export=tuesday/vda,x-dirty-bitmap=qemu:dirty-bitmap:monday",
                served.socket.display()
            );
            let text = ok(tool("qemu-img").args(["map", "--output=json", "--image-opts", &options]));
            let rows: Value = serde_json::from_str(&text).unwrap();
            let of_qemu =
                rows.as_array().unwrap().iter().map(|row| (row["length"].as_u64().unwrap(), row["data"] == false));
            assert_eq!(
                runs(of_qemu),
                runs(dirty.iter().map(|(_, length, flags)| (*length, flags & 1 == 1))),
                "{format}"
            );

            let view = fs::read(served.mount.view("tuesday", "vda")).unwrap();
            let is_zero = |start: u64, length: u64| view[start as usize..][..length as usize].iter().all(|b| *b == 0);
            let mut told = 0;
            for (start, length, flags) in map(&uri, "base:allocation") {
                assert!(flags & 2 == 0 || is_zero(start, length), "{format}: data at {start}+{length} is called zeros");
                told += length * u64::from(flags & 2 == 2);
            }
            let of_map = served.mount.map_since("tuesday", "vda", "monday").0;
            let of_map: u64 = of_map.iter().filter(|e| e.zero).map(|e| e.length).sum();
            assert!(told > 0 && told >= of_map / 2, "{format}: {told} bytes of zeros are told, the map has {of_map}");
            let depth = map(&uri, "qemu:allocation-depth");
            assert_eq!(depth.iter().map(|(_, length, _)| length).sum::<u64>(), DISK_MIB * MIB, "{format}");
            // What has no depth is nowhere, so it reads as zeros.
            for (start, length, _) in depth.iter().filter(|(_, _, depth)| *depth == 0) {
                assert!(is_zero(*start, *length), "{format}: {start}");
            }
        });
    }
}

#[test]
fn a_live_export_is_the_disk_and_says_no_hole_where_data_are() {
    requires!("nbdinfo", "nbdcopy", "qemu-img");
    for format in ["raw", "qcow2"] {
        let rig = Rig::new();
        let served = Served::new(&rig, format);
        beside_a_guest(&served, |guest| {
            two_points(&served, guest);
            // Beside writes: nothing to compare with, but every client gets through.
            ok(tool("nbdcopy").arg(served.uri("vda")).arg("null:"));
            guest.quiet(|| {
                let (uri, copy) = (served.uri("vda"), rig.path("copy"));
                ok(tool("nbdcopy").arg(&uri).arg(&copy));
                assert!(fs::read(&copy).unwrap() == guest.content(), "{format}: the copy is not what the guest wrote");
                let (disk, mut holes) = (guest.content(), 0);
                for (start, length, flags) in map(&uri, "base:allocation") {
                    let zero = disk[start as usize..][..length as usize].iter().all(|byte| *byte == 0);
                    assert!(flags & 2 == 0 || zero, "{format}: data at {start}+{length} is called zeros");
                    holes += u64::from(flags & 2 == 2);
                }
                assert!(holes > 0, "{format}: no hole is told");
                // What the bitmap says covers what was written since it was made, and its count is the command's.
                let dirty = map(&uri, "qemu:dirty-bitmap:user");
                let nodes = Client::new(&served.mount).ok("query-named-block-nodes", json!({"flat": true}));
                let node = nodes.as_array().unwrap().iter().find(|node| node["node-name"] == "vda").unwrap();
                let bitmaps = node["dirty-bitmaps"].as_array().unwrap();
                let count = bitmaps.iter().find(|bitmap| bitmap["name"] == "user").unwrap()["count"].as_u64();
                let told: u64 = dirty.iter().filter(|(_, _, flags)| flags & 1 == 1).map(|(_, length, _)| length).sum();
                assert_eq!(Some(told), count, "{format}");
                let first = fs::read(rig.path("vda.raw")).unwrap();
                if format == "qcow2" {
                    // The raw file is what the disk held at the beginning.
                    for (start, length, _) in dirty.iter().filter(|(_, _, flags)| flags & 1 == 0) {
                        let range = *start as usize..(start + length) as usize;
                        assert!(first[range.clone()] == disk[range], "{start}+{length} changed and is clean");
                    }
                }
            });
        });
    }
}

#[test]
fn a_copy_into_a_live_export_is_on_the_disk_and_not_in_the_view() {
    requires!("nbdcopy", "qemu-img");
    for format in ["raw", "qcow2"] {
        let rig = Rig::new();
        let served = Served::new(&rig, format);
        let before = content(&served);
        served.mount.snap("monday");
        let source = rig.image("source", DISK_MIB);
        fs::OpenOptions::new().write(true).open(&source).unwrap().write_all_at(&[3; 5000], 100).unwrap();
        let uri = served.uri("vda");
        // Holes of the source must be zeros in the target, whatever it held.
        fs::write(rig.path("noise"), pattern(3, (DISK_MIB * MIB) as usize)).unwrap();
        ok(tool("nbdcopy").arg(rig.path("noise")).arg(&uri));
        assert!(content(&served) == fs::read(rig.path("noise")).unwrap(), "{format}: noise");
        ok(tool("nbdcopy").args(["--flush", "--connections=4"]).arg(&source).arg(&uri));
        assert!(content(&served) == fs::read(&source).unwrap(), "{format}: the copy");
        assert!(fs::read(served.mount.view("monday", "vda")).unwrap() == before, "{format}: the view changed");
        ok(tool("qemu-img").args(["convert", "-n", "-f", "raw", "-O", "raw"]).arg(rig.path("noise")).arg(&uri));
        assert!(content(&served) == fs::read(rig.path("noise")).unwrap(), "{format}: qemu-img convert");
        ok(tool("nbdcopy").arg(served.uri("monday/vda")).arg(&uri));
        assert!(content(&served) == before, "{format}: the view put back onto its disk");
    }
}

#[test]
fn qemu_io_writes_zeroes_discards_and_flushes() {
    requires!("qemu-io", "qemu-img");
    for format in ["raw", "qcow2"] {
        let rig = Rig::new();
        let served = Served::new(&rig, format);
        let uri = served.uri("vda");
        let io = |commands: &[&str]| {
            let words = commands.iter().flat_map(|command| ["-c", command]);
            tool("qemu-io").args(["-f", "raw"]).args(words).arg(&uri).output().unwrap()
        };
        #[rustfmt::skip]
        let out = io(&[
            "write -P 1 100 1000", "write -f -P 2 65536 4M", "write -z 1M 1M", "write -z -u 2M 64k", "write -z -u -n 3M 64k",
            "discard 4M 64k", "flush", "aio_write -P 9 8M 1M", "aio_write -P 8 9M 1M", "aio_flush",
            "read -P 1 100 1000", "read -P 2 65536 512k", "read -P 0 1M 1M", "read -P 0 2M 64k", "read -P 0 3M 64k",
            "read -P 9 8M 1M", "read -P 8 9M 1M",
        ]);
        let text = stdout(&out) + &stderr(&out);
        assert!(out.status.success() && !text.contains("failed"), "{format}: {text}");
        assert!(!text.contains("Pattern verification"), "{format}: {text}");
        let live = content(&served);
        assert!(live[100..1100].iter().all(|b| *b == 1) && live[8 << 20..9 << 20].iter().all(|b| *b == 9), "{format}");
        assert!(live[1 << 20..2 << 20].iter().all(|b| *b == 0), "{format}");
        let size = DISK_MIB * MIB;
        for command in [format!("write {size} 512"), format!("read {size} 512")] {
            let out = io(&[&command]);
            assert!(!out.status.success() || (stdout(&out) + &stderr(&out)).contains("failed"), "{format}: {command}");
        }
        assert!(content(&served) == live, "{format}: a refused write changed the disk");
    }
}

/// nbdkit with its nbd plugin before an export. It goes with this value.
struct Proxy(Child);

impl Proxy {
    fn start(socket: &Path, of: &str) -> Proxy {
        let mut command = Command::new("nbdkit");
        command.args(["-f", "--exit-with-parent", "-U"]).arg(socket).arg("nbd").arg(format!("uri={of}"));
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        eventually("nbdkit's socket", || std::os::unix::net::UnixStream::connect(socket).is_ok());
        Proxy(child)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn nbdkit_passes_exports_on() {
    requires!("nbdkit", "nbdinfo", "nbdcopy", "qemu-img");
    let rig = Rig::new();
    let served = Served::new(&rig, "qcow2");
    let before = content(&served);
    served.mount.snap("monday");
    for export in ["vda", "monday/vda"] {
        let socket = rig.path(&unique("nbdkit"));
        let _proxy = Proxy::start(&socket, &served.uri(export));
        let through = uri(&socket, "");
        let copy = rig.path("copy");
        ok(tool("nbdcopy").arg(&through).arg(&copy));
        assert!(fs::read(&copy).unwrap() == before, "{export}");
        let zeros = |uri: &str| {
            let extents = map(uri, "base:allocation").into_iter();
            runs(extents.map(|(_, length, flags)| (length, flags & 2 == 2)))
        };
        assert_eq!(zeros(&through), zeros(&served.uri(export)), "{export}");
        if export == "vda" {
            fs::write(rig.path("noise"), pattern(4, (DISK_MIB * MIB) as usize)).unwrap();
            ok(tool("nbdcopy").arg(rig.path("noise")).arg(&through));
            assert!(content(&served) == fs::read(rig.path("noise")).unwrap());
        }
    }
}

#[test]
fn every_command_is_answered_as_the_protocol_says() {
    requires!("python3", "qemu-img");
    let Some(python) = python_with_nbd("commands") else { return };
    for format in ["raw", "qcow2"] {
        let rig = Rig::new();
        let served = Served::new(&rig, format);
        served.mount.snap("monday");
        let before = fs::read(served.mount.view("monday", "vda")).unwrap();
        let config = json!({ "socket": served.socket, "live": "vda", "frozen": "monday/vda" });
        script(&python, "commands.py", &config);
        assert!(fs::read(served.mount.view("monday", "vda")).unwrap() == before, "{format}: the view changed");
    }
}

#[test]
fn connections_and_the_live_file_are_one_disk() {
    requires!("python3", "qemu-img");
    let Some(python) = python_with_nbd("coherent") else { return };
    for (format, seed) in [("raw", 1), ("qcow2", 2)] {
        let rig = Rig::new();
        let served = Served::new(&rig, format);
        // With a view below, writes go the other way through the core.
        served.mount.snap("monday");
        let before = fs::read(served.mount.view("monday", "vda")).unwrap();
        let config = json!({
            "socket": served.socket, "name": "vda", "live": served.mount.live("vda"), "rounds": sized(150, 3000),
            "seed": seed,
        });
        script(&python, "coherent.py", &config);
        assert!(fs::read(served.mount.view("monday", "vda")).unwrap() == before, "{format}: the view changed");
    }
}

#[test]
fn a_flush_on_any_connection_reaches_the_image() {
    requires!("root", "strace", "python3", "qemu-img");
    let Some(python) = python_with_nbd("flush") else { return };
    let rig = Rig::new();
    let served = Served::new(&rig, "raw");
    let log = rig.path("strace.log");
    let mut strace = Command::new("strace");
    strace.args(["-f", "-y", "-e", "trace=fdatasync,fsync,sync_file_range", "-o"]).arg(&log);
    strace.args(["-p", &served.mount.pid.to_string()]);
    let mut strace = strace.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let attached = || {
        let tasks = fs::read_dir(format!("/proc/{}/task", served.mount.pid)).unwrap().flatten();
        tasks.map(|task| fs::read_to_string(task.path().join("status")).unwrap_or_default()).all(|status| {
            !status.lines().any(|line| line.starts_with("TracerPid:") && line.trim_end().ends_with("\t0"))
        })
    };
    eventually("strace", attached);
    let syncs = || {
        let log = fs::read_to_string(&log).unwrap_or_default();
        // The state beside the image is synced for reasons of its own.
        log.lines().filter(|line| line.contains("vda.raw>")).count()
    };
    let act = |code: &str| {
        let connect = "import nbd, sys\nones = [nbd.NBD() for _ in range(2)]\nfor one in ones:\n one.set_export_name('vda')\n one.connect_unix(sys.argv[1])\n";
        ok(tool(&python).args(["-c", &format!("{connect}{code}")]).arg(&served.socket));
    };
    for code in [
        "ones[0].pwrite(b'x' * 4096, 0)\nones[1].flush()\n",
        "ones[0].pwrite(b'y' * 4096, 0, flags=nbd.CMD_FLAG_FUA)\n",
        "ones[0].zero(4096, 0, flags=nbd.CMD_FLAG_FUA)\n",
        "ones[0].trim(65536, 0, flags=nbd.CMD_FLAG_FUA)\n",
    ] {
        let before = syncs();
        act(code);
        // strace writes a call down before it lets the caller go on, so before the reply. Rounds of disarming sync the
        // image, too, but not at each of these moments.
        assert!(syncs() > before, "no sync of the image before the reply to {code}");
    }
    ok(tool("kill").arg(strace.id().to_string()));
    strace.wait().unwrap();
}

#[test]
fn hostile_clients_cost_nobody_else_anything() {
    requires!("python3");
    let rig = Rig::new();
    let served = Served::new(&rig, "raw");
    let config = json!({
        "socket": served.socket, "pid": served.mount.pid, "name": "vda", "live": served.mount.live("vda"),
        "malformed": sized(500, 10_000), "idle": sized(100, 1000), "rss_mib": 400, "threads": sized(400, 1400),
    });
    let report = script(Path::new("python3"), "hostile.py", &config);
    if full() {
        say(&report);
    }
}

#[test]
fn a_backup_from_outside_makes_points_that_are_what_was_frozen() {
    requires!("python3");
    let Some(python) = python_with_nbd("external_backup") else { return };
    for (format, seed) in [("raw", 1), ("qcow2", 2)] {
        let rig = Rig::new();
        let image = rig.path(&format!("vda.{format}"));
        ok(tool("qemu-img").args(["create", "-q", "-f", format]).arg(&image).arg("16M"));
        let mount = rig.mount(args!["-f", format, image]);
        let config = json!({
            "side": "fleecefs", "qmp": mount.status()["qmp"], "nbd": rig.path("nbd"), "node": "vda",
            "dir": rig.mount_point("chain"), "points": sized(4, 12), "seed": seed,
        });
        script(&python, "external_backup_rounds.py", &config);
    }
}

#[test]
fn the_same_backup_from_outside_works_with_qemu() {
    requires!("python3", "qemu-storage-daemon");
    let Some(python) = python_with_nbd("external_backup") else { return };
    let rig = Rig::new();
    let (image, qmp, nbd) = (rig.path("vda.raw"), rig.path("qmp"), rig.path("nbd"));
    fs::File::create_new(&image).unwrap().set_len(16 * MIB).unwrap();
    let mut command = Command::new("qemu-storage-daemon");
    command.arg("--chardev").arg(format!("socket,path={},server=on,wait=off,id=qmp", qmp.display()));
    command.args(["--monitor", "chardev=qmp", "--blockdev"]);
    command.arg(format!("driver=file,node-name=vda-disk,filename={},discard=unmap", image.display()));
    command.args(["--blockdev", "driver=raw,node-name=vda,file=vda-disk,discard=unmap"]);
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let _daemon = Proxy(child);
    eventually("the socket of qemu-storage-daemon", || std::os::unix::net::UnixStream::connect(&qmp).is_ok());
    let config = json!({
        "side": "qemu", "qmp": qmp, "nbd": nbd, "node": "vda", "dir": rig.mount_point("chain"),
        "points": sized(3, 12), "seed": 3,
    });
    script(&python, "external_backup_rounds.py", &config);
}
