//! qcow2 images of every kind, beside a raw twin: a guest of several threads writes, zeroes and discards at random
//! through the live file while snapshots come and go and the disk is resized; afterwards QEMU finds nothing wrong, and
//! nothing but what the guest wrote. And the reverse: what QEMU wrote is served, live and frozen.
//!
//! `FLEECEFS_FULL` takes every kind of image, not some; makes each load longer; kills the daemon under each.

use crate::harness::*;
use crate::load::{Expected, Guest};
use crate::qcow2_cells::*;
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::FileExt;
use std::time::Duration;

/// Threads of the guest.
const THREADS: u64 = 3;

/// A cell under test.
struct Session<'a> {
    rig: &'a Rig,
    cell: &'a Cell,
    made: Made,
    guest: Guest,
    seed: u64,
}

/// A view that is open, with what it holds.
struct View {
    name: String,
    expected: Expected,
}

impl Session<'_> {
    fn arguments(&self) -> Vec<OsString> {
        let mut args: Vec<_> = self.cell.mount.iter().map(OsString::from).collect();
        args.push((&self.made.path).into());
        args
    }

    /// Lets the load run for a while.
    fn wait(&self) {
        let (before, enough) = (self.guest.done(), sized(30, 3000));
        std::thread::sleep(Duration::from_millis(sized(30, 500)));
        eventually("the guest's operations", || self.guest.done() >= before + enough);
    }

    #[track_caller]
    fn snap(&self, mount: &Mount, name: &str) -> View {
        let expected = self.guest.around(|| mount.snap(name));
        let view = View { name: name.to_owned(), expected };
        self.check_view(mount, &view);
        view
    }

    #[track_caller]
    fn check_view(&self, mount: &Mount, view: &View) {
        let got = fs::read(mount.view(&view.name, "vda")).unwrap();
        view.expected.check(&format!("view {} of {:?} seed {}", view.name, self.cell, self.seed), &got);
    }

    #[track_caller]
    fn check_live(&self, mount: &Mount) {
        let got = fs::read(mount.live("vda")).unwrap();
        let expected = self.guest.content();
        assert_same(&got, &expected, &format!("live {:?} seed {}", self.cell, self.seed));
    }

    /// Resizes to `size`, or sees that it is refused where it must be.
    #[track_caller]
    fn resize(&self, mount: &Mount, size: u64) {
        let out = mount.run("disk resize", args!["vda", size.to_string()]);
        match self.cell.cannot_resize() {
            None => {
                assert!(out.status.success(), "{:?} to {size}: {}", self.cell, stderr(&out));
                self.guest.resized(size);
            }
            Some(_) => refused(&out, 2, &["snapshot"]),
        }
    }

    /// One mount's worth of load: two views, of which one goes; a growth under way; a shrinking in a quiet moment.
    fn load(&self, mount: &Mount) {
        std::thread::scope(|scope| {
            let stop = self.guest.start(scope, &mount.live("vda"), THREADS, self.seed);
            self.wait();
            let first = self.snap(mount, "first");
            self.wait();
            let grown = self.cell.size + self.cell.size / 4 / 512 * 512 + 512;
            self.resize(mount, grown);
            let second = self.snap(mount, "second");
            self.check_view(mount, &first);
            mount.drop_snap("first");
            self.wait();
            self.check_view(mount, &second);
            mount.done("snapshot cancel", args!["second"]);
            let shrunk = self.cell.size - self.cell.size / 5 / 512 * 512;
            self.guest.quiet(|| self.resize(mount, shrunk));
            self.wait();
            self.resize(mount, shrunk + self.cell.cluster_size() + 512);
            self.wait();
            drop(stop);
        });
        self.check_live(mount);
    }

    /// Kills the daemon under load and checks that what it had acknowledged is there, in the disk and in a view.
    fn kill(&self, mount: Mount) -> Mount {
        let (dir, view) = std::thread::scope(|scope| {
            let stop = self.guest.start(scope, &mount.live("vda"), THREADS, self.seed + 1);
            self.wait();
            let view = self.snap(&mount, "kept");
            self.wait();
            self.guest.expect_kill();
            let dir = mount.kill();
            drop(stop);
            (dir, view)
        });
        let mount = Mount::at(dir, self.arguments());
        self.check_view(&mount, &view);
        let live = fs::read(mount.live("vda")).unwrap();
        self.guest.recover(&format!("after a kill: {:?} seed {}", self.cell, self.seed), live);
        std::thread::scope(|scope| {
            let _stop = self.guest.start(scope, &mount.live("vda"), THREADS, self.seed + 2);
            self.wait();
            self.check_view(&mount, &view);
        });
        self.check_live(&mount);
        mount
    }

    /// What QEMU says of the image when it is nobody's.
    #[track_caller]
    fn check_image(&self) {
        let what = format!("{:?} seed {}", self.cell, self.seed);
        let path = &self.made.path;
        let twin = self.rig.path("twin.raw");
        fs::write(&twin, self.guest.content()).unwrap();
        let report = check(path);
        for fault in ["leaks", "corruptions", "check-errors"] {
            assert!(report[fault].as_u64().is_none_or(|count| count == 0), "{what}: {report}");
        }
        let text = ok(tool("qemu-img").args(["info", "-f", "qcow2", "--output=json"]).arg(path));
        let info: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(info["virtual-size"].as_u64(), Some(self.guest.size()), "{what}");
        assert_eq!(info["dirty-flag"], false, "{what}");
        assert_eq!(info["format-specific"]["data"]["corrupt"], self.corrupt_flag(), "{what}");
        let same = ok(tool("qemu-img").args(["compare", "-f", "raw", "-F", "qcow2"]).arg(&twin).arg(path));
        assert!(same.contains("identical"), "{what}: {same}");
        if self.cell.options.contains("data_file_raw=on") {
            let raw = self.rig.path("vda.data");
            let same = ok(tool("qemu-img").args(["compare", "-f", "raw", "-F", "raw"]).arg(&twin).arg(raw));
            assert!(same.contains("identical"), "{what}: the raw data file: {same}");
        }
        self.made.assert_the_rest_is_unchanged();
        let own = fleecefs(args!["check", path]);
        assert!(own.status.success(), "{what}: {}{}", stdout(&own), stderr(&own));
    }

    /// What `qemu-img info` says of the corrupt bit of a sound image; version 2 has none.
    fn corrupt_flag(&self) -> serde_json::Value {
        if self.cell.version() == 2 { serde_json::Value::Null } else { false.into() }
    }
}

fn session<'a>(rig: &'a Rig, cell: &'a Cell, made: Made, seed: u64) -> Session<'a> {
    let guest = Guest::new(made.content.clone(), cell.cluster_size());
    Session { rig, cell, made, guest, seed }
}

/// Runs `test` on a fifth of the cells; on all, and twice, where the full sizes are asked for.
fn each(name: &str, cells: &[Cell], test: impl Fn(&Cell, u64)) {
    let chosen: Vec<_> = (0..).zip(cells).step_by(sized(5, 1)).collect();
    for seed in 0..sized(1, 2) {
        chosen.iter().for_each(|(index, cell)| test(cell, seed * 1000 + index));
    }
    say(&format!("qcow2 matrix: {name}: {} of {} kinds of images", chosen.len(), cells.len()));
}

fn guest_writes(name: &str, cells: &[Cell]) {
    requires!("qemu-img", "qemu-io");
    each(name, cells, |cell, seed| {
        let rig = Rig::new();
        let session = session(&rig, cell, make(&rig, cell, seed), seed);
        let mut mount = rig.mount(session.arguments());
        session.load(&mount);
        if full() || seed % 2 == 1 {
            mount = session.kill(mount);
        }
        mount.umount();
        session.check_image();
    });
}

macro_rules! matrix {
    ($($name:ident: $cells:ident,)*) => { $(
        #[test]
        fn $name() {
            guest_writes(stringify!($name), $cells);
        }
    )* };
}

matrix! {
    a_guest_writes_to_versions_and_cluster_sizes: SIZES,
    a_guest_writes_to_refcount_widths: REFCOUNTS,
    a_guest_writes_to_compressed_images: COMPRESSED,
    a_guest_writes_to_subclusters: SUBCLUSTERS,
    a_guest_writes_to_external_data_files: DATA_FILES,
    a_guest_writes_to_overlays: BACKING,
    a_guest_writes_to_preallocated_images: PREALLOCATED,
}

/// Without qcow2 in between: what fails here is no matter of the format.
#[test]
fn a_guest_writes_to_a_raw_image() {
    requires!();
    let rig = Rig::new();
    let cell = &SIZES[SIZES.len() - 1];
    let cell = &Cell { snapshots: 0, ..*cell };
    let session = session(&rig, cell, make_raw(&rig, cell), 0);
    let mount = rig.mount(session.arguments());
    session.load(&mount);
    session.kill(mount).umount();
    assert_same(&fs::read(&session.made.path).unwrap(), &session.guest.content(), "the file");
}

#[test]
fn what_qemu_wrote_is_served_live_and_frozen_with_its_internal_snapshots() {
    requires!("qemu-img", "qemu-io");
    let all = [SIZES, REFCOUNTS, COMPRESSED, SUBCLUSTERS, DATA_FILES, BACKING, PREALLOCATED].concat();
    assert!(all.len() >= 40);
    each("what_qemu_wrote", &all, |cell, seed| {
        let rig = Rig::new();
        let made = make(&rig, cell, seed + 500);
        let what = format!("{cell:?} seed {seed}");
        let before = fs::read(&made.path).unwrap();
        serve(&rig, cell, &made, None, &made.content, &what);
        for (name, content) in &made.snapshots {
            serve(&rig, cell, &made, Some(name), content, &format!("{name} in {what}"));
        }
        assert!(fs::read(&made.path).unwrap() == before, "{what}: the image was changed");
        made.assert_the_rest_is_unchanged();
    });
}

/// Serves the disk, or an internal snapshot of it, and reads it live and frozen.
#[track_caller]
fn serve(rig: &Rig, cell: &Cell, made: &Made, snapshot: Option<&str>, content: &[u8], what: &str) {
    let how = snapshot.map_or("read-only".to_owned(), |name| format!("snapshot={name}"));
    let mut args = args!["--disk", format!("name=vda,file={},{how}", made.path.display())];
    args.extend(cell.mount.iter().map(Into::into));
    let mount = rig.mount(args);
    mount.snap("frozen");
    assert_same(&fs::read(mount.view("frozen", "vda")).unwrap(), content, &format!("frozen: {what}"));
    let live = fs::File::open(mount.live("vda")).unwrap();
    let mut random = Random::new(content.len() as u64);
    for _ in 0..50 {
        let len = (1 + random.below(2 * cell.cluster_size())).min(300_000).min(content.len() as u64);
        let at = random.below(content.len() as u64 - len + 1);
        let mut piece = vec![0xee; len as usize];
        live.read_exact_at(&mut piece, at).unwrap();
        assert_same(&piece, &content[at as usize..][..piece.len()], &format!("live at {at}: {what}"));
    }
    let map = mount.map("frozen", "vda");
    assert_eq!(map.size(), content.len() as u64, "{what}");
    map.check_zeros(content);
    drop(live);
    mount.umount();
}

/// Names the first byte that differs.
#[track_caller]
fn assert_same(got: &[u8], expected: &[u8], what: &str) {
    assert_eq!(got.len(), expected.len(), "{what}: size");
    if got != expected {
        let at = (0..got.len()).find(|at| got[*at] != expected[*at]).unwrap();
        panic!("{what}: byte {at} is {:#04x}, not {:#04x}", got[at], expected[at]);
    }
}
