//! Maps as the mount and the command give them, read by the programs they are for.
//!
//! Where a reader is in Python it is in `tests/map_readers`. What each of them read is held against `map.json`, which the
//! harness reads on its own.

use crate::harness::*;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A whole number of granules and a half sector's neighbour: no multiple of a bmap's block.
const SIZE: u64 = (4 << 20) + 512;

/// A mount whose snapshot `next` differs from `base`: data, written zeros, a discard, and the end of the disk.
struct Scene {
    mount: Mount,
    rig: Rig,
}

impl Scene {
    fn new() -> Scene {
        let rig = Rig::new();
        let mount = rig.mount([rig.image_of("vda", SIZE)]);
        mount.snap("base");
        let guest = mount.guest("vda");
        guest.write_all_at(&pattern(7, 70_000), 3 * GRANULE + 5).unwrap();
        guest.write_all_at(&[0; 65536], 8 * GRANULE).unwrap();
        guest.write_all_at(b"z", SIZE - 1).unwrap();
        ok(tool("fallocate").args(["-p", "-o", "1310720", "-l", "131072"]).arg(mount.live("vda")));
        mount.snap("next");
        Scene { mount, rig }
    }

    fn since(&self, file: &str) -> PathBuf {
        self.mount.snapshot_dir("next").join("vda/since/base").join(file)
    }

    fn view(&self, snapshot: &str) -> Vec<u8> {
        fs::read(self.mount.view(snapshot, "vda")).unwrap()
    }

    fn map(&self) -> Map {
        let map = self.mount.map_since("next", "vda", "base");
        assert_eq!(map.granules(), [3, 4, 8, 20, 21, 64]);
        assert!(map.0.iter().any(|e| e.dirty && e.zero) && map.0.iter().any(|e| e.dirty && !e.zero));
        map
    }

    /// A copy of the disk as `base` had it.
    fn older_copy(&self) -> PathBuf {
        let path = self.rig.path(&unique("copy"));
        fs::write(&path, self.view("base")).unwrap();
        path
    }
}

/// The lines that a Python reader gives of a map.
fn read_by(python: &Path, reader: &str, map: &Path) -> Vec<String> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/map_readers/read.py");
    let mut command = tool(python);
    command.arg(script).arg(reader).arg(map).env("IMAGEIO", venv().join("imageio"));
    ok(&mut command).lines().map(str::to_owned).collect()
}

/// Runs of bytes for which `state` is the same, where it says something.
fn runs<S: PartialEq>(map: &Map, state: impl Fn(&MapExtent) -> Option<S>) -> Vec<(u64, u64, S)> {
    let mut runs: Vec<(u64, u64, S)> = Vec::new();
    for e in &map.0 {
        let Some(state) = state(e) else { continue };
        match runs.last_mut() {
            Some((start, length, last)) if *start + *length == e.start && *last == state => *length += e.length,
            _ => runs.push((e.start, e.length, state)),
        }
    }
    runs
}

/// Every file below `since/` and what `fleecefs map` prints.
#[track_caller]
fn check_same(mount: &Mount, snapshot: &str, base: &str, code: i32) {
    for format in ["json", "borg", "rbd", "bmap", "ddrescue", "nbd"] {
        let name = if matches!(format, "rbd" | "nbd") { format!("map.{format}.json") } else { format!("map.{format}") };
        let file = mount.snapshot_dir(snapshot).join("vda/since").join(base).join(&name);
        let size = fs::metadata(&file).unwrap().len();
        let text = fs::read_to_string(&file).unwrap();
        assert_eq!(text.len() as u64, size, "{name}: what stat said before the first read");
        let out = mount.run("map", args![snapshot, "vda", "--since", base, "--output", format]);
        assert_eq!(out.status.code(), Some(code), "{}", stderr(&out));
        assert_eq!(stdout(&out), text, "{name}: the command and the file differ");
    }
}

#[test]
fn files_and_command_give_the_same_bytes_in_every_format() {
    requires!("fallocate");
    let scene = Scene::new();
    check_same(&scene.mount, "next", "base", 0);
    let own = fs::read_to_string(scene.mount.snapshot_dir("base").join("vda.map")).unwrap();
    assert_eq!(scene.mount.done("map", args!["base", "vda", "--output", "json"]), own, "without a base");
    // Names that would end a comment, or be taken for something else in one.
    let odd = "a -- b # <&> ü";
    scene.mount.snap(odd);
    scene.mount.guest("vda").write_all_at(b"x", 0).unwrap();
    scene.mount.snap("c -->");
    check_same(&scene.mount, "c -->", odd, 0);
}

#[test]
fn files_and_command_give_the_same_bytes_where_everything_counts_as_changed() {
    requires!();
    let rig = Rig::new();
    let image = rig.image("vda", 1);
    let mount = rig.mount([&image]);
    for name in ["one", "two"] {
        mount.snap(name);
        mount.drop_snap(name);
    }
    mount.umount();
    fs::OpenOptions::new().write(true).open(&image).unwrap().write_all_at(b"foreign", 500_000).unwrap();
    let mount = rig.mount([&image]);
    mount.snap("three");
    mount.snap("four");
    for base in ["one", "two"] {
        assert!(mount.map_since("three", "vda", base).all_dirty(), "{base}");
        check_same(&mount, "three", base, 3);
        check_same(&mount, "four", base, 3);
    }
    check_same(&mount, "four", "three", 0);
}

#[test]
fn a_map_names_its_disk_base_and_target_where_its_format_has_comments() {
    requires!("fallocate");
    let scene = Scene::new();
    let status = scene.mount.status();
    let uuid = |list: &str, name: &str| {
        let row = status[list].as_array().unwrap().iter().find(|row| row["name"] == name).unwrap();
        row["uuid"].as_str().unwrap().to_owned()
    };
    for file in ["map.borg", "map.ddrescue", "map.bmap"] {
        let text = fs::read_to_string(scene.since(file)).unwrap();
        for line in [
            format!("disk {} vda", uuid("disks", "vda")),
            format!("base {} base", uuid("checkpoints", "base")),
            format!("target {} next", uuid("checkpoints", "next")),
            format!("size {SIZE}"),
        ] {
            assert!(text.lines().any(|l| l.trim_start_matches(['#', ' ']) == line), "no '{line}' in {file}: {text}");
        }
    }
}

#[test]
fn imageio_reads_map_json_as_its_own_extents() {
    requires!("fallocate");
    let Some(python) = python_with("imageio_reads_map_json_as_its_own_extents", "json") else { return };
    if !venv().join("imageio").exists() {
        let text = "imageio_reads_map_json_as_its_own_extents: without imageio (contrib/venv fetches it)";
        assert!(std::env::var_os("FLEECEFS_REQUIRE_TOOLS").is_none(), "{text}");
        return say(&format!("skip {text}"));
    }
    let scene = Scene::new();
    let python_flag = |flag: bool| if flag { "True" } else { "False" };
    let expected: Vec<_> = scene
        .map()
        .0
        .iter()
        .map(|e| format!("{} {} {} {}", e.start, e.length, python_flag(e.dirty), python_flag(e.zero)))
        .collect();
    assert_eq!(read_by(&python, "imageio", &scene.since("map.json")), expected);
}

#[test]
fn map_csi_is_a_message_of_the_csi_specification() {
    requires!("fallocate");
    let test = "map_csi_is_a_message_of_the_csi_specification";
    let Some(python) = python_with(test, "google.protobuf") else { return };
    let scene = Scene::new();
    let path = scene.rig.path("csi.json");
    fs::write(&path, scene.mount.done("map", args!["next", "vda", "--since", "base", "--output", "csi"])).unwrap();
    let changed = runs(&scene.map(), |e| e.dirty.then_some(()));
    let mut expected: Vec<_> = changed.iter().map(|(start, length, ())| format!("{start} {length}")).collect();
    expected.push(format!("capacity {SIZE}"));
    assert_eq!(read_by(&python, "csi", &path), expected);
}

#[test]
fn map_borg_keeps_the_grammar_of_borg() {
    requires!("python3", "fallocate");
    let scene = Scene::new();
    let state = |e: &MapExtent| {
        Some(match (e.dirty, e.zero) {
            (false, _) => "same",
            (true, false) => "data",
            (true, true) => "zero",
        })
    };
    let mut expected: Vec<_> =
        runs(&scene.map(), state).iter().map(|(start, length, state)| format!("{start} {length} {state}")).collect();
    expected.push(format!("size {SIZE}"));
    assert_eq!(read_by(Path::new("python3"), "borg", &scene.since("map.borg")), expected);
}

#[test]
fn map_rbd_is_what_rbd_diff_prints() {
    requires!("python3", "fallocate");
    let scene = Scene::new();
    let expected: Vec<_> = runs(&scene.map(), |e| e.dirty.then_some(!e.zero))
        .iter()
        .map(|(start, length, exists)| format!("{start} {length} {exists}"))
        .collect();
    assert_eq!(read_by(Path::new("python3"), "rbd", &scene.since("map.rbd.json")), expected);
}

#[test]
fn map_nbd_is_what_nbdinfo_prints_of_a_bitmap_of_qemu() {
    requires!("fallocate", "nbdinfo", "qemu-img", "qemu-io", "qemu-nbd");
    let scene = Scene::new();
    let image = scene.rig.path("same.qcow2");
    ok(tool("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&image).arg(SIZE.to_string()));
    ok(tool("qemu-img").args(["bitmap", "--add", "-g", "64k"]).arg(&image).arg("b"));
    let mut io = tool("qemu-io");
    io.args(["-f", "qcow2"]);
    for command in ["196613 70000", "524288 65536", "1310720 131072"] {
        io.args(["-c", &format!("write {command}")]);
    }
    ok(io.arg("-c").arg(format!("write {} 1", SIZE - 1)).arg(&image));
    let server = ["qemu-nbd", "-r", "-f", "qcow2", "-B", "b"];
    let mut info = tool("nbdinfo");
    info.args(["--json", "--map=qemu:dirty-bitmap:b", "--", "["]).args(server).arg(&image).arg("]");
    assert_eq!(fs::read_to_string(scene.since("map.nbd.json")).unwrap(), ok(&mut info));
}

/// A loop device as large as `file`.
fn written_through(file: &Path, write: impl FnOnce(&Path)) -> Vec<u8> {
    let device = Loop::new(file, &[]);
    write(&device.0);
    drop(device);
    fs::read(file).unwrap()
}

fn bmaptool(map: &Path, source: &Path, target: &Path) -> Command {
    let mut command = tool("bmaptool");
    command.args(["copy", "--bmap"]).arg(map).arg(source).arg(target);
    command
}

#[test]
fn bmaptool_brings_a_block_device_up_to_date_and_a_file_of_its_own() {
    requires!("fallocate", "bmaptool", "root", "losetup");
    let scene = Scene::new();
    let (map, new) = (scene.since("map.bmap"), scene.view("next"));
    for source in [scene.mount.view("next", "vda"), scene.since("changed.raw")] {
        let got = written_through(&scene.older_copy(), |device| drop(ok(&mut bmaptool(&map, &source, device))));
        assert!(got == new, "{}", source.display());
        let file = scene.rig.path(&unique("file"));
        ok(&mut bmaptool(&map, &source, &file));
        assert!(fs::read(&file).unwrap() == fs::read(scene.since("changed.raw")).unwrap(), "an increment of its own");
    }
    // Its checksum is looked at, and so is the size of what is copied.
    let forged = scene.rig.path("forged.bmap");
    fs::write(&forged, fs::read_to_string(&map).unwrap().replacen("<Range> 3", "<Range> 2", 1)).unwrap();
    let out = bmaptool(&forged, &scene.since("changed.raw"), &scene.rig.path("x")).output().unwrap();
    assert!(!out.status.success() && stderr(&out).contains("checksum"), "{}", stderr(&out));
}

#[test]
fn ddrescue_brings_a_file_and_a_block_device_up_to_date() {
    requires!("fallocate", "ddrescue", "ddrescuelog", "root", "losetup");
    let scene = Scene::new();
    let (map, new) = (scene.since("map.ddrescue"), scene.view("next"));
    let ddrescue = |source: &Path, target: &Path, log: &Path| {
        ok(tool("ddrescue").args(["--force", "--domain-mapfile"]).arg(&map).arg(source).arg(target).arg(log));
        ok(tool("ddrescuelog").arg("--domain-mapfile").arg(&map).arg("--done-status").arg(log));
        let shown = ok(tool("ddrescuelog").arg("--show-status").arg(log));
        let bytes: u64 = scene.map().0.iter().filter(|e| e.dirty).map(|e| e.length).sum();
        assert!(shown.contains(&format!("{bytes} B")), "{bytes} bytes are rescued: {shown}");
    };
    for source in [scene.mount.view("next", "vda"), scene.since("changed.raw")] {
        let file = scene.older_copy();
        ddrescue(&source, &file, &scene.rig.path(&unique("log")));
        assert!(fs::read(&file).unwrap() == new, "{}", source.display());
        let log = scene.rig.path(&unique("log"));
        let got = written_through(&scene.older_copy(), |device| ddrescue(&source, device, &log));
        assert!(got == new, "{}", source.display());
    }
}

#[test]
fn bmaptool_looks_at_the_size_of_the_disk_and_ddrescue_at_nothing() {
    requires!("fallocate", "bmaptool", "ddrescue");
    let scene = Scene::new();
    let (other, target) = (scene.rig.path("other"), scene.rig.path("target"));
    fs::write(&other, pattern(1, 2 << 20)).unwrap();
    let out = bmaptool(&scene.since("map.bmap"), &other, &target).output().unwrap();
    assert!(!out.status.success() && stderr(&out).contains("size"), "{}", stderr(&out));
    ok(tool("ddrescue").arg("--domain-mapfile").arg(scene.since("map.ddrescue")).arg(&other).arg(&target));
}

#[test]
fn dd_of_each_extent_brings_an_older_copy_up_to_date() {
    requires!("fallocate", "jq");
    let scene = Scene::new();
    let copy = scene.older_copy();
    let script = r#"set -e
        "$FLEECEFS" map "$MNT" next vda --since base --output json |
        jq -r '.[] | select(.dirty) | "\(.start) \(.length)"' |
        while read -r start length; do
            dd if="$MNT/snapshots/next/vda.raw" of="$COPY" bs=1M conv=notrunc status=none \
               iflag=skip_bytes,count_bytes oflag=seek_bytes skip="$start" seek="$start" count="$length"
        done"#;
    let mut bash = tool("bash");
    bash.args(["-c", script]).env("FLEECEFS", env!("CARGO_BIN_EXE_fleecefs"));
    ok(bash.env("MNT", &scene.mount.dir).env("COPY", &copy));
    assert!(fs::read(&copy).unwrap() == scene.view("next"));
}

/// borg 2 that knows `create --map`: FLEECEFS_BORG2, or of the virtual environment (`contrib/venv borg`).
fn borg2() -> Option<PathBuf> {
    let borg = std::env::var_os("FLEECEFS_BORG2").map_or_else(|| venv().join("bin/borg"), PathBuf::from);
    let help = tool(&borg).args(["create", "--help"]).output().ok()?;
    stdout(&help).contains("--reuse-from").then_some(borg)
}

#[test]
fn borg_2_makes_an_archive_from_a_map_and_the_one_before() {
    requires!("fallocate");
    let Some(borg) = borg2() else {
        let text =
            "borg_2_makes_an_archive_from_a_map_and_the_one_before: without borg 2 (contrib/venv borg builds it)";
        assert!(!full() || std::env::var_os("FLEECEFS_REQUIRE_TOOLS").is_none(), "{text}");
        return say(&format!("skip {text}"));
    };
    let scene = Scene::new();
    let run = |args: &[&str], input: Option<&Path>| {
        let mut command = tool(&borg);
        command.args(["--repo".as_ref(), scene.rig.path("repository").as_os_str()]).args(args).args(input);
        command.env("BORG_BASE_DIR", scene.rig.path("borg")).env("BORG_PASSPHRASE", "x");
        command.env("BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK", "yes");
        command.current_dir(scene.rig.mount_point("out"));
        command
    };
    let content = |archive: &str| {
        let out = run(&["extract", "--stdout", archive], None).output().unwrap();
        assert!(out.status.success(), "{}", stderr(&out));
        out.stdout
    };
    let fixed = ["--chunker-params", "fixed,131072"];
    ok(&mut run(&["repo-create", "--encryption", "none-sha256"], None));
    let full_map = scene.rig.path("full.map");
    fs::write(&full_map, scene.mount.done("map", args!["base", "vda", "--output", "borg"])).unwrap();
    let create = |archive: &str, map: &Path, more: &[&str], input: &Path| {
        let map = map.to_str().unwrap();
        ok(&mut run(&[&["create", "--map", map], &fixed[..], more, &[archive]].concat(), Some(input)));
    };
    create("base", &full_map, &[], &scene.mount.view("base", "vda"));
    assert!(content("base") == scene.view("base"), "a full map: data and zero");
    let map = scene.since("map.borg");
    create("next", &map, &["--reuse-from", "base"], &scene.mount.view("next", "vda"));
    assert!(content("next") == scene.view("next"), "data, zero and same");
    // A chunk that changed in part is read whole, and 'changed.raw' has zeros for the rest of it.
    create("wrong", &map, &["--reuse-from", "base"], &scene.since("changed.raw"));
    assert!(content("wrong") != scene.view("next"), "borg reads the view, not changed.raw");
    let other = scene.rig.path("other");
    fs::write(&other, pattern(1, 2 << 20)).unwrap();
    let args = ["create", "--map", map.to_str().unwrap(), "--reuse-from", "base", "other"];
    let out = run(&args, Some(&other)).output().unwrap();
    assert!(!out.status.success() && stderr(&out).contains("bytes"), "another size: {}", stderr(&out));
}
