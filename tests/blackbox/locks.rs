//! Images in use: who refuses whom, with which words, on every file of an image.

use crate::harness::*;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Stdio};

/// What QEMU says when it cannot have what it wants.
const NO_WRITE: &str = "Failed to get \"write\" lock";
const NO_SHARED_WRITE: &str = "Failed to get shared \"write\" lock";

/// qemu-io with an image open, until this value goes.
struct Qemu {
    child: Child,
    input: Option<ChildStdin>,
}

impl Qemu {
    #[track_caller]
    fn holds(options: &[&str], image: &Path) -> Qemu {
        let mut command = tool("qemu-io");
        command.args(options).arg(image).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut input = child.stdin.take().unwrap();
        // Its answer to a command proves that the image is open.
        input.write_all(b"length\n").unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        while !line.contains("iB") {
            line.clear();
            assert_ne!(output.read_line(&mut line).unwrap(), 0, "qemu-io ended");
        }
        Qemu { child, input: Some(input) }
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        drop(self.input.take());
        let _ = self.child.wait();
    }
}

/// Runs a QEMU tool; `Ok`, or what it said.
fn qemu(words: &str, images: &[&Path]) -> Result<(), String> {
    let mut words = words.split(' ');
    let mut command = tool(words.next().unwrap());
    for word in words {
        match word.strip_prefix('@') {
            Some(index) => command.arg(images[index.parse::<usize>().unwrap()]),
            None => command.arg(word.replace('_', " ")),
        };
    }
    let out = command.output().unwrap();
    if out.status.success() { Ok(()) } else { Err(stderr(&out)) }
}

#[track_caller]
fn works(words: &str, images: &[&Path]) {
    qemu(words, images).unwrap_or_else(|said| panic!("{words}: {said}"));
}

#[track_caller]
fn fails_with(words: &str, images: &[&Path], text: &str) {
    let said = qemu(words, images).expect_err(words);
    assert!(said.contains(text) && said.contains("Is another process using the image"), "{words}: {said}");
}

/// A chain with a data file: `top.qcow2` over `base.raw`, and `far.qcow2` with its data in `data.raw`. All of 1 MiB.
struct Files {
    rig: Rig,
    base: PathBuf,
    top: PathBuf,
    far: PathBuf,
    data: PathBuf,
}

impl Files {
    fn new() -> Files {
        let rig = Rig::new();
        let base = rig.image("base", 1);
        let [top, far, data] = ["top.qcow2", "far.qcow2", "data.raw"].map(|name| rig.path(name));
        let files = Files { rig, base, top, far, data };
        files.overlay(&files.top);
        let options = format!("data_file={}", files.data.display());
        ok(tool("qemu-img").args(["create", "-q", "-f", "qcow2", "-o", &options]).arg(&files.far).arg("1M"));
        for image in [&files.top, &files.far] {
            ok(tool("qemu-io").args(["-c", "write -q -P 7 0 64k"]).arg(image));
        }
        ok(tool("qemu-img").args(["snapshot", "-c", "s"]).arg(&files.top));
        files
    }

    fn overlay(&self, path: &Path) {
        ok(tool("qemu-img").args(["create", "-q", "-f", "qcow2", "-b"]).arg(&self.base).args(["-F", "raw"]).arg(path));
    }

    /// Nobody holds anything: QEMU may write everywhere.
    #[track_caller]
    fn are_free(&self) {
        for (format, image) in [("raw", &self.base), ("qcow2", &self.top), ("qcow2", &self.far), ("raw", &self.data)] {
            works(&format!("qemu-io -f {format} -c write_-q_0_512 @0"), &[image]);
        }
    }
}

const WRITERS: [&str; 3] = ["qemu-io -c write_-q_0_512 @0", "qemu-img snapshot -c x @0", "qemu-img check -r all @0"];
/// Readers, with where `-U` goes.
const READERS: [&str; 5] = [
    "qemu-io SHARE -r -c read_-q_0_512 @0",
    "qemu-img info SHARE @0",
    "qemu-img check SHARE @0",
    "qemu-img map SHARE @0",
    "qemu-img convert SHARE -O raw @0 @1",
];

fn alone(reader: &str) -> String {
    reader.replace("SHARE ", "")
}

fn sharing(reader: &str) -> String {
    reader.replace("SHARE", "-U")
}

/// What QEMU's tools get to hear of a qcow2 image that is written to.
#[track_caller]
fn qemu_keeps_off_a_writer(image: &Path, out: &Path) {
    for writer in WRITERS {
        fails_with(writer, &[image], NO_WRITE);
    }
    for reader in READERS {
        fails_with(&alone(reader), &[image, out], NO_SHARED_WRITE);
        works(&sharing(reader), &[image, out]);
    }
}

/// What they get to hear of a qcow2 image that is read.
#[track_caller]
fn qemu_reads_beside_a_reader(image: &Path, out: &Path) {
    for writer in WRITERS {
        fails_with(writer, &[image], NO_WRITE);
    }
    for reader in READERS {
        works(&alone(reader), &[image, out]);
    }
}

/// A raw file, on which QEMU's own readers let others write.
#[track_caller]
fn qemu_does_not_write_to_raw(image: &Path) {
    for command in
        ["qemu-io -f raw -c write_-q_0_512 @0", "qemu-img resize -f raw @0 2M", "qemu-img create -f raw @0 1M"]
    {
        fails_with(command, &[image], NO_WRITE);
    }
    for command in ["qemu-io -r -f raw -c read_-q_0_512 @0", "qemu-img info -f raw @0"] {
        works(command, &[image]);
    }
}

#[test]
fn qemu_does_not_touch_a_raw_image_that_is_served() {
    requires!("qemu-img", "qemu-io");
    let files = Files::new();
    let out = files.rig.path("out");
    let mount = files.rig.mount(args!["-f", "raw", &files.base]);
    qemu_does_not_write_to_raw(&files.base);
    fails_with("qemu-img convert -f raw -O raw @0 @1", &[&files.base, &out], NO_SHARED_WRITE);
    works("qemu-img convert -U -f raw -O raw @0 @1", &[&files.base, &out]);
    mount.umount();
    let mount = files.rig.mount(args!["-r", "-f", "raw", &files.base]);
    qemu_does_not_write_to_raw(&files.base);
    works("qemu-img convert -f raw -O raw @0 @1", &[&files.base, &out]);
    mount.umount();
    files.are_free();
}

#[test]
fn qemu_does_not_touch_a_qcow2_image_that_is_served() {
    requires!("qemu-img", "qemu-io");
    let files = Files::new();
    let out = files.rig.path("out");
    for image in [&files.top, &files.far] {
        let mount = files.rig.mount(args![image]);
        qemu_keeps_off_a_writer(image, &out);
        let name = image.file_stem().unwrap().to_str().unwrap();
        mount.guest(name).write_all_at(&[1; 512], 512).unwrap();
        for reader in READERS {
            fails_with(&alone(reader), &[image, &out], NO_SHARED_WRITE);
        }
        mount.umount();
        let mount = files.rig.mount(args!["-r", image]);
        qemu_reads_beside_a_reader(image, &out);
        mount.umount();
    }
    files.are_free();
}

#[test]
fn qemu_does_not_write_to_the_files_below_an_image_that_is_served() {
    requires!("qemu-img", "qemu-io");
    let files = Files::new();
    let second = files.rig.path("second.qcow2");
    files.overlay(&second);
    for options in [&[][..], &["-r"]] {
        let mut with = args![];
        with.extend(options.iter().map(std::ffi::OsString::from));
        with.extend(args![&files.top, &files.far]);
        let mount = files.rig.mount(with);
        qemu_does_not_write_to_raw(&files.base);
        qemu_does_not_write_to_raw(&files.data);
        fails_with("qemu-img commit @0", &[&second], NO_WRITE);
        works("qemu-io -c write_-q_0_512 @0", &[&second]);
        let other = Mount::at(files.rig.mount_point("other"), args![&second]);
        assert!(fs::read(other.live("second")).is_ok());
        other.umount();
        mount.umount();
    }
    files.are_free();
}

/// The program must refuse with EBUSY's exit code, name the file, say who may hold it and how to find out.
#[track_caller]
fn in_use(words: &[&dyn AsRef<std::ffi::OsStr>], file: &Path) -> String {
    let out = fleecefs(words.iter().map(AsRef::as_ref));
    let file = fs::canonicalize(file).unwrap();
    refused(&out, 2, &["in use", "QEMU", "fleecefs", file.to_str().unwrap()]);
    stderr(&out)
}

#[test]
fn what_qemu_writes_to_is_not_served() {
    requires!("qemu-img", "qemu-io");
    let files = Files::new();
    // An open for writing changes the header of an image with bitmaps.
    ok(tool("qemu-img").args(["bitmap", "--add"]).arg(&files.top).arg("b"));
    let mnt = files.rig.mount_point("mnt");
    let cases = [
        (&["-f", "raw"][..], &files.base, &files.base),
        (&["-f", "raw"], &files.base, &files.top),
        (&[], &files.top, &files.top),
        (&[], &files.far, &files.far),
        (&["-f", "raw"], &files.data, &files.far),
    ];
    for (options, held, image) in cases {
        let qemu = Qemu::holds(options, held);
        let before = fs::read(image).unwrap();
        let said = in_use(&[&"mount", image, &mnt], held);
        assert!(fs::read(image).unwrap() == before, "what is refused is not touched");
        assert!(said.contains(&format!("fuser -v {}", fs::canonicalize(held).unwrap().display())), "{said}");
        let said = in_use(&[&"mount", &"-r", image, &mnt], held);
        assert!(said.contains("--force-share"), "{said}");
        if held != image {
            let part = if *held == files.base { "backing file" } else { "data file" };
            assert!(said.contains(part) && said.contains(image.to_str().unwrap()), "{said}");
        }
        let mount = files.rig.mount(args!["-r", "-U", image]);
        assert_eq!(fs::metadata(mount.live(image.file_stem().unwrap().to_str().unwrap())).unwrap().len(), 1 << 20);
        mount.umount();
        drop(qemu);
        files.rig.mount(args!["-r", image]).umount();
    }
    files.are_free();
}

#[test]
fn info_and_check_refuse_what_qemu_writes_to_unless_they_are_told_to_share() {
    requires!("qemu-img", "qemu-io");
    let files = Files::new();
    let qemu = Qemu::holds(&[], &files.top);
    for command in ["info", "check"] {
        let said = in_use(&[&command, &files.top], &files.top);
        assert!(said.contains("--force-share"), "{said}");
        for share in ["-U", "--force-share"] {
            ok(tool(env!("CARGO_BIN_EXE_fleecefs")).args([command, share]).arg(&files.top));
        }
    }
    let said = in_use(&[&"check", &"--repair", &files.top], &files.top);
    assert!(!said.contains("--force-share"), "a repair cannot share: {said}");
    let out = fleecefs(args!["check", "--repair", "--force-share", &files.top]);
    refused(&out, 2, &["--repair", "--force-share", "cannot be used with"]);
    drop(qemu);
    // Beside a reader.
    let qemu = Qemu::holds(&["-r"], &files.top);
    for command in ["info", "check"] {
        ok(tool(env!("CARGO_BIN_EXE_fleecefs")).arg(command).arg(&files.top));
    }
    in_use(&[&"check", &"--repair", &files.top], &files.top);
    drop(qemu);
    // Beside our own.
    let mount = files.rig.mount(args![&files.top]);
    for command in ["info", "check"] {
        in_use(&[&command, &files.top], &files.top);
        ok(tool(env!("CARGO_BIN_EXE_fleecefs")).args([command, "-U"]).arg(&files.top));
    }
    in_use(&[&"check", &"--repair=leaks", &files.top], &files.top);
    mount.umount();
    ok(tool(env!("CARGO_BIN_EXE_fleecefs")).args(["check", "--repair"]).arg(&files.top));
}

#[test]
fn what_qemu_reads_is_served_for_reading() {
    requires!("qemu-img", "qemu-io");
    let files = Files::new();
    let mnt = files.rig.mount_point("mnt");
    let qemu = Qemu::holds(&["-r"], &files.top);
    in_use(&[&"mount", &files.top, &mnt], &files.top);
    files.rig.mount(args!["-r", &files.top]).umount();
    drop(qemu);
    files.rig.mount(args![&files.top]).umount();
}

#[test]
fn locks_end_with_the_mount_and_with_the_daemon() {
    requires!("qemu-img", "qemu-io");
    let files = Files::new();
    let all = || args!["-f", "raw", &files.base, "--disk", format!("file={},format=qcow2", files.far.display())];
    files.rig.mount(all()).umount();
    files.are_free();
    let mount = files.rig.mount(all());
    mount.guest("far").write_all_at(&[3; 4096], 0).unwrap();
    let dir = mount.kill();
    files.are_free();
    let mount = Mount::at(dir, all());
    for disk in ["base", "far"] {
        mount.done("disk remove", args![disk]);
    }
    files.are_free();
    mount.umount();
}

#[test]
fn what_is_shared_is_for_reading_only_and_never_frozen() {
    requires!("qemu-img", "qemu-io");
    let files = Files::new();
    let mnt = files.rig.mount_point("mnt");
    let said = "force-share=on can only be used with read-only images";
    refused(&fleecefs(args!["mount", "--force-share", &files.base, &mnt]), 2, &[said, "-r"]);
    let disk = |more: &str| format!("name=d,file={},{more}", files.top.display());
    refused(&fleecefs(args!["mount", "--disk", disk("force-share"), &mnt]), 2, &[said, "top.qcow2"]);
    let qemu = Qemu::holds(&[], &files.top);
    let mount = files.rig.mount(args!["--disk", disk("force-share,read-only"), "--disk", {
        let text = disk("force-share,snapshot=s");
        text.replace("name=d", "name=old")
    }]);
    assert_eq!(fs::read(mount.live("d")).unwrap()[..512], [7; 512]);
    fails(fs::create_dir(mount.snapshot_dir("x")), &[95]);
    refused(&mount.run("snapshot create", ["x"]), 2, &["disk 'd'", "force-share", "cannot be frozen"]);
    mount.umount();
    drop(qemu);
    let mount = files.rig.mount(args!["--disk", disk("read-only")]);
    mount.snap("x");
}

#[test]
fn one_file_is_not_written_by_one_disk_and_used_by_another() {
    requires!("qemu-img", "qemu-io", "root");
    let files = Files::new();
    let mnt = files.rig.mount_point("mnt");
    let link = files.rig.path("link.raw");
    std::os::unix::fs::symlink(&files.base, &link).unwrap();
    let hard = files.rig.path("hard.raw");
    fs::hard_link(&files.base, &hard).unwrap();
    let elsewhere = files.rig.mount_point("elsewhere");
    let dir = files.rig.path("");
    ok(tool("mount").arg("--bind").arg(&dir).arg(&elsewhere));
    let bind = Fs(elsewhere.clone());
    for same in [&link, &hard, &elsewhere.join("base.raw")] {
        let named = |name: &str, file: &Path| format!("{name}={}", file.display());
        let both = args!["mount", "-f", "raw", named("a", &files.base), named("b", same), &mnt];
        refused(&fleecefs(both), 2, &["already served as disk 'a'"]);
        let raw = format!("name=b,file={},format=raw", same.display());
        refused(
            &fleecefs(args!["mount", "--disk", &raw, &files.top, &mnt]),
            2,
            &["base.raw", "disk 'top': backing file", "already served as disk 'b', which writes to it", "read-only"],
        );
        let raw = |more: &str| format!("name=b,file={}{more},format=raw", same.display());
        refused(
            &fleecefs(args!["mount", &files.top, "--disk", raw(""), "--disk", raw("").replace("=b", "=c"), &mnt]),
            2,
            &["already served as disk 'b'"],
        );
        files.rig.mount(args!["--disk", raw(",read-only"), &files.top]).umount();
    }
    drop(bind);
    let data = format!("name=b,file={},format=raw", files.data.display());
    refused(
        &fleecefs(args!["mount", "--disk", &data, &files.far, &mnt]),
        2,
        &["already served as disk 'b'", "data file"],
    );
    // Two overlays share their base.
    let second = files.rig.path("second.qcow2");
    files.overlay(&second);
    let mount = files.rig.mount(args![&files.top, &second]);
    refused(&mount.run("disk add", args![&files.base]), 2, &["disk 'second' is based on it", "must not be written to"]);
    refused(&mount.run("disk add", args![format!("x={}", second.display())]), 2, &["already served as disk 'second'"]);
}

#[test]
fn a_disk_and_its_internal_snapshot_are_served_together() {
    requires!("qemu-img", "qemu-io");
    let files = Files::new();
    let mnt = files.rig.mount_point("mnt");
    let disk = |more: &str| format!("name=old,file={},{more}", files.top.display());
    refused(
        &fleecefs(args!["mount", "--disk", disk("snapshot=s"), &files.top, &mnt]),
        2,
        &["already served as disk 'old', and must not be written to", "read-only"],
    );
    let writer = format!("file={}", files.top.display());
    refused(
        &fleecefs(args!["mount", "--disk", writer, "--disk", disk("snapshot=s"), &mnt]),
        2,
        &[
            "already served as disk 'top', which writes to it",
            "serve the internal snapshot in another mount, with force-share",
        ],
    );
    let top = format!("file={},read-only", files.top.display());
    let mount = files.rig.mount(args!["--disk", disk("snapshot=s"), "--disk", top]);
    mount.snap("both");
    let frozen = fs::read(mount.view("both", "old")).unwrap();
    assert!(frozen == fs::read(mount.view("both", "top")).unwrap());
    mount.umount();
    let mount = files.rig.mount([&files.top]);
    let beside = Mount::at(files.rig.mount_point("beside"), args!["--disk", disk("snapshot=s,force-share")]);
    let guest = mount.guest("top");
    for at in (0..frozen.len() as u64).step_by(32 << 10) {
        guest.write_all_at(b"of the guest", at).unwrap();
    }
    guest.sync_all().unwrap();
    assert!(fs::read(beside.live("old")).unwrap() == frozen, "the snapshot is what it was");
    assert!(fs::read(mount.live("top")).unwrap() != frozen);
    beside.umount();
    drop(guest);
    mount.umount();
    files.are_free();
}
