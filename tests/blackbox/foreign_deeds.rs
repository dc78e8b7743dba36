//! What ordinary tools do to an image file while nobody serves it, after a clean stop and after a kill, each with what the
//! next mount makes of it. `doc/foreign.md` has the table.

use crate::harness::*;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// More than the slack by which a clock of files may lag.
const PAST_SLACK: Duration = Duration::from_millis(1200);
/// What the guest writes before each deed.
const OURS: u64 = 5;

/// What the next map says.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Says {
    /// Everything, for a reason with this word.
    Everything(&'static str),
    /// Just these granules.
    Granules(&'static [u64]),
}

const NOTHING: Says = Says::Granules(&[OURS]);

type Deed<'a> = (&'a str, Box<dyn Fn() + 'a>, Says);

fn dd(arguments: &[&str], from: &str, to: &Path) {
    let mut dd = tool("dd");
    dd.args([format!("if={from}"), format!("of={}", to.display())]);
    ok(dd.args(["conv=notrunc", "status=none", "bs=512", "count=1"]).args(arguments));
}

fn on(name: &str, flags: &[&str], image: &Path) {
    ok(tool(name).args(flags).arg(image));
}

/// Runs the deeds one after the other, each after a stop.
fn run(rig: &Rig, image: &Path, options: &[&str], killed: bool, deeds: &[Deed<'_>]) {
    let disk = image.file_stem().unwrap().to_str().unwrap();
    let mount_at = |dir: PathBuf| {
        let mut all = args![];
        all.extend(options.iter().map(Into::into));
        all.push(image.into());
        Mount::at(dir, all)
    };
    let mut mount = mount_at(rig.mount_point("mnt"));
    mount.snap("s0");
    mount.drop_snap("s0");
    for (round, (name, deed, says)) in deeds.iter().enumerate() {
        let what = format!("{name}, killed {killed}, {options:?}");
        mount.guest(disk).write_all_at(&[round as u8 + 1; 100], OURS * GRANULE + 777).unwrap();
        let dir = if killed {
            std::thread::sleep(PAST_SLACK);
            mount.kill()
        } else {
            let dir = mount.dir.clone();
            mount.umount();
            dir
        };
        deed();
        mount = mount_at(dir);
        let (point, next) = (format!("s{round}"), format!("s{}", round + 1));
        let status = mount.status();
        let lost = &status["disks"][0]["tracking_lost"];
        let code = mount.run("status", args![]).status.code();
        if let Says::Everything(word) = says {
            assert!(lost["reason"].as_str().is_some_and(|reason| reason.contains(word)), "{what}: {lost}");
            assert!(lost["since"].as_str().is_some_and(|since| since.ends_with('Z')), "{what}: {lost}");
            assert_eq!(status["counters"]["tracking_lost"], 1, "{what}");
            has_problem(&mount, "maps say everything");
        } else {
            assert!(lost.is_null(), "{what}: {lost}");
            // A kill is for an operator to see, and that another program wrote, too.
            assert!(code == Some(i32::from(killed)) || status["disks"][0]["tracking"] != "exact", "{what}: {code:?}");
        }
        mount.snap(&next);
        let map = mount.map_since(&next, disk, &point);
        let reason = mount.manifest(&next, disk)["full_reason"].clone();
        match says {
            Says::Everything(word) => {
                assert!(map.all_dirty(), "{what}: {map:?}");
                assert!(reason.as_str().is_some_and(|reason| reason.contains(word)), "{what}: {reason}");
            }
            Says::Granules(granules) => {
                assert_eq!(map.granules(), *granules, "{what}");
                assert!(reason.is_null(), "{what}: {reason}");
            }
        }
        mount.drop_snap(&next);
        assert!(mount.status()["disks"][0]["tracking_lost"].is_null(), "{what}: right again from here on");
    }
    mount.umount();
}

/// Deeds that a file of any format may suffer. `older` is an older copy, `at` the offset of a 64 KiB piece of guest data.
fn deeds_to_files<'a>(image: &'a Path, older: &'a Path, at: u64) -> Vec<Deed<'a>> {
    let changed = Says::Everything("another program");
    let (seek, granule) = (format!("seek={}", at / 512), at.to_string());
    let same = format!("skip={}", at / 512);
    let write = move || dd(&[&seek], "/dev/zero", image);
    let write_again = write.clone();
    let touch_back = move || {
        let before = image.with_extension("before");
        ok(tool("touch").args(["-r"]).arg(image).arg(&before));
        write_again();
        ok(tool("touch").arg("-r").arg(&before).arg(image));
    };
    let offset = granule.clone();
    vec![
        ("nothing", Box::new(move || ()), NOTHING),
        ("read", Box::new(move || drop(fs::read(image).unwrap())), NOTHING),
        ("dd", Box::new(write), changed),
        (
            "dd of what is there",
            Box::new(move || dd(&[&same.replace("skip", "seek"), &same], image.to_str().unwrap(), image)),
            changed,
        ),
        ("a write, and the time put back", Box::new(touch_back), changed),
        ("touch", Box::new(move || on("touch", &[], image)), changed),
        ("touch -d", Box::new(move || on("touch", &["-d", "2001-01-01"], image)), changed),
        ("chmod", Box::new(move || on("chmod", &["0640"], image)), changed),
        ("a hole", Box::new(move || on("fallocate", &["-p", "-o", &granule, "-l", "65536"], image)), changed),
        (
            "through a loop device",
            Box::new(move || {
                let device = Loop::new(image, &[]);
                dd(
                    &[&format!("seek={}", offset.parse::<u64>().unwrap() / 512), "oflag=direct"],
                    "/dev/zero",
                    &device.0,
                );
            }),
            changed,
        ),
        (
            "an older copy by cp -a",
            Box::new(move || {
                ok(tool("cp").args(["-a", "--sparse=never"]).arg(older).arg(image));
            }),
            changed,
        ),
        (
            "an older copy by rsync --inplace",
            Box::new(move || {
                ok(tool("rsync").args(["-tI", "--inplace"]).arg(older).arg(image));
            }),
            changed,
        ),
        (
            "an older copy by rsync, which is another file",
            Box::new(move || {
                ok(tool("rsync").args(["-tI"]).arg(older).arg(image));
            }),
            Says::Everything("another"),
        ),
        (
            "a note",
            Box::new(move || on("setfattr", &["-n", "user.fleecefs.lost", "-v", "the disk was full"], image)),
            Says::Everything("tracking was lost while the disk was served: the disk was full"),
        ),
        ("nothing once more", Box::new(move || ()), NOTHING),
    ]
}

fn raw(killed: bool) {
    requires!("root", "losetup", "rsync", "setfattr", "fallocate");
    let rig = Rig::new();
    let image = rig.image("vda", 2);
    let older = rig.path("older");
    ok(tool("cp").arg("-a").args([&image, &older]));
    ok(tool("touch").args(["-d", "2001-01-01"]).arg(&older));
    let mut deeds = deeds_to_files(&image, &older, 2 * GRANULE);
    let longer = || on("truncate", &["-s", "+64K"], &image);
    deeds.push(("longer", Box::new(longer), Says::Everything("another program")));
    deeds.push(("shorter", Box::new(|| on("truncate", &["-s", "-64K"], &image)), Says::Everything("another program")));
    run(&rig, &image, &[], killed, &deeds);
}

#[test]
fn what_befalls_a_raw_image_after_a_clean_stop() {
    raw(false);
}

#[test]
fn what_befalls_a_raw_image_after_a_kill() {
    raw(true);
}

/// A qcow2 image over a raw one; the offset in its file of 64 KiB of guest data.
fn overlay(rig: &Rig) -> (PathBuf, PathBuf, u64) {
    let (base, image) = (rig.image("base", 4), rig.path("vda.qcow2"));
    let options = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b"];
    ok(tool("qemu-img").args(options).arg(&base).arg(&image).arg("4M"));
    ok(tool("qemu-io").args(["-f", "qcow2", "-c", "write -P 0x5a 128k 64k"]).arg(&image));
    let content = fs::read(&image).unwrap();
    let at = content.chunks(GRANULE as usize).position(|cluster| cluster.iter().all(|byte| *byte == 0x5a)).unwrap();
    (image, base, at as u64 * GRANULE)
}

fn qemu_io(image: &Path, command: &str) {
    ok(tool("qemu-io").args(["-f", "qcow2", "-c", command]).arg(image));
}

fn qcow2(killed: bool, no_mark: bool) {
    requires!("root", "qemu-img", "qemu-io", "losetup", "rsync", "setfattr", "fallocate");
    let rig = Rig::new();
    let (image, base, at) = overlay(&rig);
    let older = rig.path("older");
    ok(tool("cp").arg("-a").args([&image, &older]));
    ok(tool("touch").args(["-d", "2001-01-01"]).arg(&older));
    let mut deeds = deeds_to_files(&image, &older, at);
    // What an older copy by cp or rsync has is an image without our mark; the reason is the same.
    let changed = Says::Everything("another program");
    // After a clean close QEMU records in the checkpoint's bitmap, which is in the image then.
    let recorded = if killed || no_mark { changed } else { Says::Granules(&[OURS, 9]) };
    deeds.push(("qemu-io", Box::new(|| qemu_io(&image, "write -P 0x77 576k 4k")), recorded));
    deeds.push(("qemu-io that only reads", Box::new(|| ok_quiet(read_only_io(&image))), NOTHING));
    deeds.push(("backing file", Box::new(|| dd(&[], "/dev/zero", &base)), changed));
    let rename = || {
        ok(tool("cp").arg("-a").arg(&base).arg(base.with_extension("copy")));
        fs::rename(base.with_extension("copy"), &base).unwrap();
    };
    deeds.push(("another backing file", Box::new(rename), changed));
    let resize = || ok_quiet(tool("qemu-img").args(["resize", "-q", "-f", "qcow2"]).arg(&image).arg("5M"));
    // QEMU records in it then, too; what lies behind the old end counts as changed.
    const GROWN: [u64; 17] = [OURS, 64, 65, 66, 67, 68, 69, 70, 71, 72, 73, 74, 75, 76, 77, 78, 79];
    let resized = if killed || no_mark { changed } else { Says::Granules(&GROWN) };
    deeds.push(("qemu-img resize", Box::new(resize), resized));
    let options: &[&str] = if no_mark { &["--no-mark"] } else { &[] };
    run(&rig, &image, options, killed, &deeds);
    assert!(ok(tool("qemu-img").args(["check", "-f", "qcow2"]).arg(&image)).contains("No errors"));
    assert_eq!(marked(&image), !no_mark);
}

fn read_only_io(image: &Path) -> &mut Command {
    let command = Box::leak(Box::new(tool("qemu-io")));
    command.args(["-r", "-f", "qcow2", "-c", "read 0 64k"]).arg(image)
}

fn ok_quiet(command: &mut Command) {
    ok(command);
}

/// Whether an image has our autoclear bit.
fn marked(image: &Path) -> bool {
    let mut byte = [0];
    fs::File::open(image).unwrap().read_exact_at(&mut byte, 88).unwrap();
    byte[0] & 0x80 != 0
}

#[test]
fn what_befalls_a_qcow2_image_after_a_clean_stop() {
    qcow2(false, false);
}

#[test]
fn what_befalls_a_qcow2_image_after_a_kill() {
    qcow2(true, false);
}

#[test]
fn what_befalls_a_qcow2_image_without_our_mark_after_a_clean_stop() {
    qcow2(false, true);
}

#[test]
fn what_befalls_a_qcow2_image_without_our_mark_after_a_kill() {
    qcow2(true, true);
}

#[test]
fn a_mark_goes_with_the_next_mount_that_wants_none_and_comes_back() {
    requires!("qemu-img", "qemu-io");
    let rig = Rig::new();
    let (image, ..) = overlay(&rig);
    let disk = format!("file={}", image.display());
    let mount = rig.mount([&image]);
    assert_eq!(mount.status()["disks"][0]["guards"], serde_json::json!(["stamp", "mark"]));
    mount.snap("s");
    mount.drop_snap("s");
    mount.umount();
    assert!(marked(&image));
    // The disk's own option counts before the mount's.
    for (options, has) in [
        (args!["--disk", format!("{disk},no-mark")], false),
        (args!["--no-mark", "--disk", format!("{disk},no-mark=off")], true),
        (args!["--no-mark", "-f", "qcow2", &image], false),
        (args![&image], true),
    ] {
        let mount = rig.mount(options);
        assert_eq!(mount.status()["disks"][0]["tracking"], "exact");
        assert_eq!(marked(&image), has);
        let guards = if has { serde_json::json!(["stamp", "mark"]) } else { serde_json::json!(["stamp"]) };
        assert_eq!(mount.status()["disks"][0]["guards"], guards);
        mount.umount();
        assert_eq!(marked(&image), has);
    }
    let other = rig.image("other", 1);
    let mount = rig.mount([&other]);
    mount.done("disk add", args!["--no-mark", &image]);
    assert!(!marked(&image));
    let shown = stdout(&mount.run("status", args![]));
    assert!(shown.contains("GUARDS") && shown.contains("stamp"), "{shown}");
    mount.umount();
    assert!(!marked(&image));
}

/// Image and state, copied or moved.
#[test]
fn a_copy_of_image_and_state_is_another_image_and_a_moved_one_says_why() {
    requires!("qemu-img");
    for killed in [false, true] {
        let rig = Rig::new();
        for image in [rig.image("vda", 1), overlay(&rig).0] {
            let name = image.file_name().unwrap().to_str().unwrap().to_owned();
            let state = rig.path(&format!("{name}.fleece"));
            let keep = || args!["--keep-snapshots"];
            let with = |image: &Path| keep().into_iter().chain([image.into()]).collect::<Vec<std::ffi::OsString>>();
            let mount = rig.mount(with(&image));
            mount.snap("s");
            mount.drop_snap("s");
            mount.guest("vda").write_all_at(&[1; 100], OURS * GRANULE).unwrap();
            mount.snap("kept");
            mount.guest("vda").write_all_at(&[2; 100], 0).unwrap();
            if killed {
                std::thread::sleep(PAST_SLACK);
                // The next mount elsewhere must not find a dead one in the way.
                let dir = mount.kill();
                ok(tool("umount").arg("-l").arg(dir));
            } else {
                mount.umount();
            }
            for sub in ["copy", "moved"] {
                fs::create_dir_all(rig.path(sub)).unwrap();
            }
            ok(tool("cp").args(["-a"]).arg(&image).arg(&state).arg(rig.path("copy")));
            let everything = |image: &Path, word: &str| {
                let mount = rig.mount(with(image));
                let reason = mount.status()["disks"][0]["tracking_lost"]["reason"].clone();
                assert!(reason.as_str().is_some_and(|reason| reason.contains(word)), "killed {killed}: {reason}");
                mount.snap("probe");
                assert!(mount.map_since("probe", "vda", "s").all_dirty());
                mount.drop_snap("probe");
                mount.umount();
            };
            everything(&rig.path("copy").join(&name), "another");
            // The original has all that it had, the frozen view too.
            let mount = rig.mount(with(&image));
            assert!(mount.status()["disks"][0]["tracking_lost"].is_null(), "killed {killed}");
            assert!(direct_read(&mount.view("kept", "vda"), 0).unwrap()[..100] != [2; 100]);
            mount.snap("probe");
            assert_eq!(mount.map_since("probe", "vda", "s").granules(), [0, OURS]);
            for name in ["probe", "kept"] {
                mount.drop_snap(name);
            }
            mount.umount();
            ok(tool("mv").arg(&image).arg(&state).arg(rig.path("moved")));
            let word = if name.ends_with("raw") { "renamed" } else { "another program" };
            everything_since(&rig, &rig.path("moved").join(&name), word);
            for sub in ["copy", "moved"] {
                fs::remove_dir_all(rig.path(sub)).unwrap();
            }
        }
    }
}

fn everything_since(rig: &Rig, image: &Path, word: &str) {
    let mount = rig.mount([image]);
    let reason = mount.status()["disks"][0]["tracking_lost"]["reason"].clone();
    assert!(reason.as_str().is_some_and(|reason| reason.contains(word)), "{reason}");
    mount.umount();
}
