//! Formats are never guessed from what a guest can write.

use crate::harness::*;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

const SECTOR: usize = 512;

/// The first sectors of images of every format that QEMU knows by its content. LUKS is not among them: see
/// [`a_guest_may_encrypt_its_disk`].
fn beginnings(rig: &Rig) -> Vec<(&'static str, Vec<u8>)> {
    let made = [
        ("qcow", "qcow", ""),
        ("qcow2", "qcow2", ""),
        ("qed", "qed", ""),
        ("vdi", "vdi", ""),
        ("vhdx", "vhdx", ""),
        ("vpc", "vpc", ""),
        ("parallels", "parallels", ""),
        ("vmdk", "vmdk", "subformat=monolithicSparse"),
        ("vmdk text", "vmdk", "subformat=monolithicFlat"),
        ("vmdk stream", "vmdk", "subformat=streamOptimized"),
    ];
    let mut all = Vec::new();
    for (name, format, options) in made {
        let path = rig.path("beginning");
        let mut create = tool("qemu-img");
        create.args(["create", "-q", "-f", format]);
        if !options.is_empty() {
            create.args(["-o", options]);
        }
        ok(create.arg(&path).arg("1M"));
        all.push((name, fs::read(&path).unwrap()));
        fs::remove_file(path).unwrap();
    }
    let cloop = b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n";
    all.push(("cloop", cloop.to_vec()));
    let mut bochs = b"Bochs Virtual HD Image".to_vec();
    for (at, text) in [(32, "Redolog"), (48, "Growing")] {
        bochs.resize(at, 0);
        bochs.extend(text.as_bytes());
    }
    bochs.resize(64, 0);
    bochs.extend(0x20000_u32.to_le_bytes());
    all.push(("bochs", bochs));
    all.push(("old vmdk", b"COWD".to_vec()));
    all.push(("vmdk version", b"# a comment\n   \nversion=1\n".to_vec()));
    all.push(("old parallels", b"WithoutFreeSpace\x02\0\0\0".to_vec()));
    for (_, bytes) in &mut all {
        bytes.resize(SECTOR, 0);
    }
    all
}

/// What QEMU takes a file for: None where it finds no format, and takes it for raw.
fn qemu_probes(image: &Path) -> Option<String> {
    let out = tool("qemu-img").args(["info", "-U", "--output=json"]).arg(image).output().unwrap();
    if !out.status.success() {
        return Some(stderr(&out));
    }
    let info: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    Some(info["format"].as_str().unwrap().to_owned()).filter(|format| format != "raw")
}

fn write(guest: &File, bytes: &[u8], at: usize) -> io::Result<()> {
    guest.write_all_at(bytes, at as u64).and_then(|()| guest.sync_all())
}

/// Each way to bring a beginning to a disk; one step or more must fail. All magics lie in the first 128 bytes.
fn ways(guest: &File, live: &Path, sector: &[u8]) -> Vec<(&'static str, Vec<io::Result<()>>)> {
    let start = &sector[..128];
    let byte = |at: usize| guest.write_all_at(&start[at..=at], at as u64);
    let zero = |at: usize, count: usize| {
        let [at, count] = [at, count].map(|number| number.to_string());
        let out = tool("fallocate").args(["-z", "-o", &at, "-l", &count]).arg(live).output().unwrap();
        assert!(out.status.success() || stderr(&out).contains("not permitted"), "{}", stderr(&out));
        if out.status.success() { Ok(()) } else { Err(io::Error::from_raw_os_error(errno::EPERM)) }
    };
    let mut ways = Vec::new();
    let mut way = |name, act: &dyn Fn() -> Vec<io::Result<()>>| {
        write(guest, &[0xAA; 2 * SECTOR], 0).unwrap();
        let mut steps = act();
        steps.push(guest.sync_all());
        ways.push((name, steps));
    };
    way("one sector", &|| vec![write(guest, sector, 0)]);
    way("a long write", &|| vec![write(guest, &[sector, &[7; 100_000]].concat(), 0)]);
    way("byte by byte", &|| (0..start.len()).map(byte).collect());
    way("byte by byte from the end", &|| (0..start.len()).rev().map(byte).collect());
    way("in two pieces", &|| vec![write(guest, &sector[3..], 3), write(guest, &sector[..3], 0)]);
    way("into zeros", &|| {
        zero(0, SECTOR).unwrap();
        (0..start.len()).filter(|at| start[*at] != 0).map(byte).collect()
    });
    way("zeros into it", &|| {
        let is_zero = |at: &usize| start[*at] == 0;
        let mut steps: Vec<_> = (0..start.len()).filter(|at| !is_zero(at)).map(byte).collect();
        let runs = (0..start.len()).filter(|at| is_zero(at) && (*at == 0 || !is_zero(&(at - 1))));
        steps.extend(runs.map(|at| zero(at, (at..start.len()).take_while(is_zero).count())));
        steps
    });
    ways
}

#[test]
fn a_raw_disk_takes_no_beginning_of_another_format() {
    requires!("qemu-img", "fallocate");
    let rig = Rig::new();
    let image = rig.image("vda", 1);
    let all = beginnings(&rig);
    let mount = rig.mount([&image]);
    let guest = mount.guest("vda");
    for (name, sector) in &all {
        for (way, steps) in ways(&guest, &mount.live("vda"), sector) {
            let refused = steps.iter().filter(|step| step.is_err()).count();
            assert!(refused > 0, "{name}: {way}: nothing was refused");
            for step in steps {
                assert!(step.is_ok() || step.as_ref().unwrap_err().raw_os_error() == Some(errno::EPERM), "{step:?}");
            }
            assert_eq!(qemu_probes(&image), None, "{name}: {way}");
        }
        // Behind the first sector they are data.
        write(&guest, sector, SECTOR).unwrap();
    }
    drop(guest);
    mount.umount();
    assert_eq!(qemu_probes(&image), None);
    rig.mount([&image]).umount();
}

#[test]
fn a_store_through_a_mapping_gives_no_other_format_either() {
    requires!("qemu-img", "python3");
    let rig = Rig::new();
    let image = rig.image("vda", 1);
    let mount = rig.mount([&image]);
    let script = "import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
m = mmap.mmap(fd, 4096)
m[0:4] = b'QFI\\xfb'
try:
    m.flush()
    os.fsync(fd)
except OSError as e:
    sys.exit(7)
";
    let out = tool("python3").args(["-c", script]).arg(mount.live("vda")).output().unwrap();
    assert_eq!(out.status.code(), Some(7), "{}", stderr(&out));
    assert_eq!(qemu_probes(&image), None);
}

/// Encryption of a disk is the guest's matter, and a LUKS header refers to no file of the host.
#[test]
fn a_guest_may_encrypt_its_disk() {
    requires!("qemu-img");
    let rig = Rig::new();
    let luks = rig.path("luks");
    let mut create = tool("qemu-img");
    create.args(["create", "-q", "-f", "luks", "--object", "secret,id=s,data=x", "-o", "key-secret=s,iter-time=10"]);
    ok(create.arg(&luks).arg("1M"));
    let header = fs::read(&luks).unwrap()[..SECTOR].to_vec();
    let image = rig.image("vda", 1);
    let mount = rig.mount([&image]);
    write(&mount.guest("vda"), &header, 0).unwrap();
    mount.umount();
    let mount = rig.mount([&image]);
    assert_eq!(fs::read(mount.live("vda")).unwrap()[..SECTOR], header);
}

#[test]
fn a_guest_whose_format_was_given_writes_anything() {
    requires!("qemu-img");
    let rig = Rig::new();
    let all = beginnings(&rig);
    let image = rig.path("vda.qcow2");
    ok(tool("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&image).arg("64M"));
    let before = fs::read(&image).unwrap();
    let mount = rig.mount(args!["-f", "raw", &image]);
    assert!(fs::read(mount.live("vda")).unwrap() == before, "the file's own bytes");
    let guest = mount.guest("vda");
    for (name, sector) in &all {
        write(&guest, sector, 0).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(fs::read(&image).unwrap()[..SECTOR], sector[..], "{name}");
    }
    drop(guest);
    mount.umount();
}

#[test]
fn an_image_that_begins_as_what_cannot_be_served_is_named() {
    requires!("qemu-img");
    let rig = Rig::new();
    let mnt = rig.mount_point("mnt");
    for (name, sector) in beginnings(&rig) {
        let image = rig.path("vda.img");
        fs::write(&image, &sector).unwrap();
        let out = fleecefs(args!["mount", &image, &mnt]);
        let format = match name.rsplit(' ').find(|word| ["vmdk", "parallels"].contains(word)) {
            Some(format) => format,
            None => name.split(' ').next().unwrap(),
        };
        refused(&out, 2, &["vda.img", format]);
        assert_eq!(fs::read(&image).unwrap(), sector, "{name}: untouched");
        let mount = rig.mount(args!["-f", "raw", &image]);
        assert_eq!(fs::read(mount.live("vda")).unwrap(), sector, "{name}");
        mount.umount();
    }
}

#[test]
fn a_backing_file_whose_format_is_not_recorded_is_refused() {
    requires!("qemu-img");
    let rig = Rig::new();
    let base = rig.image("base", 1);
    let top = rig.path("top.qcow2");
    ok(tool("qemu-img").args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"]).args([&base, &top]));
    let mnt = rig.mount_point("mnt");
    let file = OpenOptions::new().read(true).write(true).open(&top).unwrap();
    let mut header = [0; 512];
    file.read_exact_at(&mut header, 0).unwrap();
    let at = header.windows(4).position(|word| word == [0xe2, 0x79, 0x2a, 0xca]).expect("no backing format");
    // An extension that nobody knows, of the same length.
    file.write_all_at(b"none", at as u64).unwrap();
    for options in [&[][..], &["-r"]] {
        let mut words = args!["mount"];
        words.extend(options.iter().map(std::ffi::OsString::from));
        words.extend(args![&top, &mnt]);
        refused(&fleecefs(words), 2, &["top.qcow2", "backing file", "doesn't record its format", "qemu-img rebase -u"]);
    }
    let mut rebase = tool("qemu-img");
    ok(rebase.args(["rebase", "-u", "-F", "raw", "-b"]).args([&base, &top]));
    rig.mount(args!["-r", &top]).umount();
}
