//! Names of files: those that lead into the mount itself, and those that stand in images.

use crate::harness::*;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

fn create(options: &str, below: Option<(&Path, &str)>, image: &Path) {
    let mut command = tool("qemu-img");
    command.args(["create", "-q", "-f", "qcow2"]);
    if !options.is_empty() {
        command.args(["-o", options]);
    }
    if let Some((below, format)) = below {
        command.args(["-u", "-F", format, "-b"]).arg(below);
    }
    ok(command.arg(image).arg("1M"));
}

#[test]
fn a_file_in_the_mount_is_never_opened_by_its_daemon() {
    requires!("qemu-img", "root", "losetup");
    let rig = Rig::new();
    let mount = rig.mount([rig.image("vda", 1)]);
    mount.snap("s");
    let (live, view) = (mount.live("vda"), mount.view("s", "vda"));
    let link = rig.path("link.raw");
    symlink("mnt/live/vda.raw", &link).unwrap();
    let through = rig.path("through");
    symlink(&mount.dir, &through).unwrap();
    let elsewhere = rig.mount_point("elsewhere");
    ok(tool("mount").arg("--bind").arg(mount.path("snapshots")).arg(&elsewhere));
    let bind = Fs(elsewhere.clone());
    let device = Loop::new(&view, &["-r"]);
    let mut named = vec![live.clone(), view.clone(), link.clone(), through.join("live/vda.raw"), device.0.clone()];
    named.push(elsewhere.join("s/vda.raw"));
    for (index, file) in [&live, &view, &link, &elsewhere.join("s/vda.raw")].into_iter().enumerate() {
        let [over, middle, far] = ["over", "middle", "far"].map(|name| rig.path(&format!("{name}{index}.qcow2")));
        create("", Some((file, "raw")), &over);
        create("", Some((&over, "qcow2")), &middle);
        // As an image of another mount may have it: qemu-img itself would write to the file.
        let name = "d".repeat(200);
        create(&format!("data_file={}", rig.path(&name).display()), None, &far);
        let stands = rig.path(&name).into_os_string().into_encoded_bytes();
        let mut bytes = fs::read(&far).unwrap();
        let at = bytes.windows(stands.len()).position(|word| word == stands).expect("no name of a data file");
        bytes[at..at + stands.len()].fill(b'/');
        let file = file.as_os_str().as_encoded_bytes();
        bytes[at + stands.len() - file.len()..at + stands.len()].copy_from_slice(file);
        fs::write(&far, bytes).unwrap();
        named.extend([over, middle, far]);
    }
    for file in &named {
        let out = mount.run("disk add", args![format!("new={}", file.display())]);
        refused(&out, 2, &["lies inside the mount point"]);
    }
    drop((bind, device));
    assert_eq!(mount.status()["disks"].as_array().unwrap().len(), 1);
    assert!(fs::read(&live).is_ok(), "it goes on");
}

#[test]
fn a_file_system_that_lies_in_the_mount_holds_no_image() {
    requires!("root", "losetup", "mkfs.ext4");
    let rig = Rig::new();
    let mount = rig.mount([rig.image("vda", 16)]);
    let device = Loop::new(&mount.live("vda"), &[]);
    ok(tool("mkfs.ext4").arg("-q").arg(&device.0));
    let guest = Fs::mount(&device.0, &rig.path("guest"), "defaults");
    let image = guest.0.join("vdb.raw");
    fs::write(&image, [1; 4096]).unwrap();
    let out = mount.run("disk add", args![&image]);
    refused(&out, 2, &["vdb.raw", "loop device", "vda.raw", "lies inside the mount point"]);
    drop(guest);
    drop(device);
    mount.umount();
}

#[test]
fn nothing_of_a_disk_lies_below_the_mount_point() {
    requires!();
    let rig = Rig::new();
    let image = rig.image("vda", 1);
    let state = rig.mount_point("vda.raw.fleece");
    refused(
        &fleecefs(args!["mount", &image, &state]),
        2,
        &["state directory", "inside the mount point", "--state-dir"],
    );
    fs::create_dir(state.join("layers")).unwrap();
    let out = fleecefs(args!["mount", &image, state.join("layers")]);
    refused(&out, 2, &["state directory", "would hide"]);
    fs::remove_dir_all(&state).unwrap();
    let mnt = rig.mount_point("mnt");
    for option in ["--state-dir", "--store-dir", "--qmp", "--pidfile"] {
        let out = fleecefs(args!["mount", option, mnt.join("x"), &image, &mnt]);
        refused(&out, 2, &[option, "inside the mount point"]);
    }
    symlink(mnt.join("state"), &state).unwrap();
    refused(&fleecefs(args!["mount", &image, &mnt]), 2, &["state directory", "inside the mount point"]);
    fs::remove_file(&state).unwrap();
    assert_eq!(fs::read_dir(&mnt).unwrap().count(), 0);
    rig.mount([&image]).umount();
}

/// Two directories with a base of the same name, a chain in the first, and links to its images in the second.
struct Twins {
    rig: Rig,
    link: PathBuf,
}

impl Twins {
    fn new() -> Twins {
        let rig = Rig::new();
        for (index, dir) in ["one", "two"].into_iter().enumerate() {
            fs::create_dir(rig.path(dir)).unwrap();
            fs::write(rig.path(dir).join("base.raw"), vec![index as u8 + 1; 1 << 20]).unwrap();
        }
        create("", Some((Path::new("base.raw"), "raw")), &rig.path("one/vda.qcow2"));
        let link = rig.path("two/vda.qcow2");
        symlink("../one/vda.qcow2", &link).unwrap();
        Twins { rig, link }
    }
}

#[test]
fn relative_names_are_taken_from_the_directory_of_the_name_that_was_given() {
    requires!("qemu-img");
    let Twins { rig, link } = Twins::new();
    let raw = rig.path("raw");
    ok(tool("qemu-img").args(["convert", "-O", "raw"]).args([&link, &raw]));
    let expected = fs::read(&raw).unwrap();
    assert_eq!(expected[0], 2, "as QEMU has it");
    // However the directory is named, from wherever.
    symlink("two", rig.path("dir")).unwrap();
    let given = [link.clone(), rig.path("dir/vda.qcow2"), rig.path("one/../two/vda.qcow2")];
    for name in &given {
        let mount = rig.mount(args!["-r", name]);
        assert!(fs::read(mount.live("vda")).unwrap() == expected, "{}", name.display());
        mount.umount();
        let info = ok(tool(env!("CARGO_BIN_EXE_fleecefs")).args(["info", "--json"]).arg(name));
        let theirs = ok(tool("qemu-img").args(["info", "--output=json"]).arg(name));
        let below = |text: &str| {
            serde_json::from_str::<serde_json::Value>(text).unwrap()["full-backing-filename"]
                .as_str()
                .unwrap()
                .to_owned()
        };
        assert_eq!(below(&info), below(&theirs));
    }
    let out = tool(env!("CARGO_BIN_EXE_fleecefs"))
        .args(args!["mount", "-r", "vda.qcow2", rig.mount_point("mnt")])
        .current_dir(rig.path("two"))
        .output()
        .unwrap();
    assert!(out.status.success(), "{}", stderr(&out));
    let status = fs::read_to_string(rig.path("mnt/status.json")).unwrap();
    let pid = serde_json::from_str::<serde_json::Value>(&status).unwrap()["pid"].as_u64().unwrap();
    let mount = Mount::of(rig.path("mnt"), pid as u32);
    assert!(fs::read(mount.live("vda")).unwrap() == expected);
}

#[test]
fn an_image_has_one_state_whatever_it_is_called() {
    requires!();
    let rig = Rig::new();
    let image = rig.image("vda", 1);
    fs::create_dir(rig.path("links")).unwrap();
    let link = rig.path("links/vda.raw");
    symlink(&image, &link).unwrap();
    let mount = rig.mount([&image]);
    mount.snap("first");
    mount.drop_snap("first");
    mount.umount();
    let mount = rig.mount([&link]);
    mount.snap("second");
    assert_eq!(name_of(&mount.manifest("second", "vda")["reference"]), Some("first"));
    mount.drop_snap("second");
    // The name may lead elsewhere by now: the guest's writes go to a file that still has its own.
    fs::remove_file(&link).unwrap();
    mount.snap("third");
    mount.umount();
    assert!(rig.path("vda.raw.fleece/dirty.log").exists());
    assert_eq!(fs::read_dir(rig.path("links")).unwrap().count(), 0);
}

#[test]
fn a_file_that_is_not_where_its_image_says_is_named_with_what_to_do() {
    requires!("qemu-img");
    let rig = Rig::new();
    let mnt = rig.mount_point("mnt");
    let [top, over, far] = ["top.qcow2", "over.qcow2", "far.qcow2"].map(|name| rig.path(name));
    create("", Some((Path::new("gone.raw"), "raw")), &top);
    create("", Some((Path::new("top.qcow2"), "qcow2")), &over);
    // QEMU makes and finds it where it runs; from anywhere else the name leads nowhere.
    let elsewhere = rig.mount_point("elsewhere");
    let mut command = tool("qemu-img");
    command.args(["create", "-q", "-f", "qcow2", "-o", "data_file=data.raw"]).arg(&far).arg("1M");
    ok(command.current_dir(&elsewhere));
    for (image, at_fault, file, cure) in [
        (&top, &top, "gone.raw", "qemu-img rebase -u"),
        (&over, &top, "gone.raw", "qemu-img rebase -u"),
        (&far, &far, "data.raw", "qemu-img amend -o data_file="),
    ] {
        let out = fleecefs(args!["mount", image, &mnt]);
        refused(&out, 2, &[at_fault.to_str().unwrap(), rig.path(file).to_str().unwrap(), "No such file", cure]);
    }
    let whole = format!("data_file={}", elsewhere.join("data.raw").display());
    ok(tool("qemu-img").args(["amend", "-f", "qcow2", "-o", &whole]).arg(&far).current_dir(&elsewhere));
    rig.mount([&far]).umount();
}
