//! `--nbd`: what is exported as long as there is what, to a client of a few lines. `nbd` asks the real clients.

use crate::harness::*;
use crate::qmp::Client;
use serde_json::json;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// A client of the protocol's baseline: one request at a time, simple replies.
struct Nbd {
    stream: UnixStream,
    size: u64,
    read_only: bool,
}

impl Nbd {
    /// None where the server has no such export.
    fn open(socket: &Path, export: &str) -> Option<Nbd> {
        let mut stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream.read_exact(&mut [0; 18]).unwrap();
        // Fixed newstyle without zeroes; NBD_OPT_EXPORT_NAME, which an unknown name ends.
        let mut hello = [&3u32.to_be_bytes()[..], b"IHAVEOPT", &1u32.to_be_bytes()].concat();
        hello.extend((export.len() as u32).to_be_bytes());
        hello.extend(export.as_bytes());
        stream.write_all(&hello).unwrap();
        let mut answer = [0; 10];
        stream.read_exact(&mut answer).ok()?;
        let size = u64::from_be_bytes(answer[..8].try_into().unwrap());
        Some(Nbd { stream, size, read_only: answer[9] & 2 != 0 })
    }

    /// Sends a request; the errno of the answer, and what follows it.
    fn ask(&mut self, command: u16, offset: u64, len: u32, data: &[u8]) -> std::io::Result<Result<Vec<u8>, u32>> {
        let mut request = [&0x2560_9513_u32.to_be_bytes()[..], &[0, 0], &command.to_be_bytes(), &[7; 8]].concat();
        request.extend(offset.to_be_bytes());
        request.extend(len.to_be_bytes());
        request.extend(data);
        self.stream.write_all(&request)?;
        let mut head = [0; 16];
        self.stream.read_exact(&mut head)?;
        assert_eq!(head[..4], 0x6744_6698_u32.to_be_bytes());
        let error = u32::from_be_bytes(head[4..8].try_into().unwrap());
        let mut answer = vec![0; if command == 0 && error == 0 { len as usize } else { 0 }];
        self.stream.read_exact(&mut answer)?;
        Ok(if error == 0 { Ok(answer) } else { Err(error) })
    }

    #[track_caller]
    fn read(&mut self, offset: u64, len: u64) -> Vec<u8> {
        self.ask(0, offset, len as u32, &[]).unwrap().unwrap()
    }

    #[track_caller]
    fn write(&mut self, offset: u64, data: &[u8]) {
        self.ask(1, offset, data.len() as u32, data).unwrap().unwrap();
    }
}

fn listen(rig: &Rig) -> (std::path::PathBuf, String) {
    let socket = rig.path("nbd");
    let option = format!("unix:{}", socket.display());
    (socket, option)
}

#[test]
fn disks_and_snapshots_are_exported_as_long_as_they_are_there() {
    requires!();
    let rig = Rig::new();
    let (socket, option) = listen(&rig);
    let mount = rig.mount(args!["--nbd", &option, rig.image("vda", 4), rig.image("vdb", 2)]);
    assert_eq!(fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
    let exports = |mount: &Mount| {
        let server = mount.status()["nbd"][0].clone();
        assert_eq!((&server["by"], &server["addresses"]), (&json!("mount"), &json!([option])));
        let names = server["exports"].as_array().unwrap().iter().map(|row| row["name"].as_str().unwrap().to_owned());
        names.collect::<Vec<_>>()
    };
    assert_eq!(exports(&mount), ["vda", "vdb"]);
    assert_eq!(Nbd::open(&socket, "vdb").unwrap().size, 2 << 20);
    assert!(Nbd::open(&socket, "s/vda").is_none() && Nbd::open(&socket, "vdc").is_none());
    mount.snap("s");
    assert_eq!(exports(&mount), ["s/vda", "s/vdb", "vda", "vdb"]);
    let mut view = Nbd::open(&socket, "s/vda").unwrap();
    assert!(view.read_only);
    assert_eq!(mount.status()["nbd"][0]["exports"][0]["connections"], 1);
    let line = format!("nbd: {option}, 4 export(s), 1 client(s)");
    assert!(mount.done("status", args![]).contains(&line), "{line}");
    let frozen = fs::read(mount.view("s", "vda")).unwrap();
    mount.guest("vda").write_all_at(&[9; 1 << 20], 0).unwrap();
    mount.drop_snap("s");
    assert_eq!(exports(&mount), ["vda", "vdb"]);
    assert!(Nbd::open(&socket, "s/vda").is_none());
    assert!(view.read(0, 4 << 20) == frozen, "a client keeps the view that it has");
    assert_eq!(view.ask(1, 0, 1, &[1]).unwrap(), Err(1), "EPERM");
    drop(view);
    let mut client = Nbd::open(&socket, "vdb").unwrap();
    client.read(0, 1);
    let out = mount.run("disk remove", args!["vdb"]);
    refused(&out, 2, &["vdb", "its files are open"]);
    drop(client);
    eventually("the end of the client", || mount.run("disk remove", args!["vdb"]).status.success());
    assert_eq!(exports(&mount), ["vda"]);
    mount.umount();
    assert!(!socket.exists());
}

#[test]
fn an_export_and_the_file_of_a_disk_are_coherent() {
    requires!();
    let rig = Rig::new();
    let (socket, option) = listen(&rig);
    let mount = rig.mount(args!["--nbd", &option, rig.image("vda", 4)]);
    let (guest, mut client) = (mount.guest("vda"), Nbd::open(&socket, "vda").unwrap());
    assert!(!client.read_only);
    mount.snap("before");
    let mut buf = [0; 8192];
    for round in 0..20u64 {
        let (here, there) = (pattern(round, 8192), pattern(100 + round, 8192));
        client.write(round * 12_000, &here);
        guest.read_exact_at(&mut buf, round * 12_000).unwrap();
        assert!(buf[..] == here);
        guest.write_all_at(&there, round * 12_000 + 100).unwrap();
        assert!(client.read(round * 12_000 + 100, 8192) == there);
    }
    // Zeroes, and a discard.
    client.ask(6, 0, 65536, &[]).unwrap().unwrap();
    client.ask(4, 131_072, 65536, &[]).unwrap().unwrap();
    for offset in [0, 131_072] {
        guest.read_exact_at(&mut buf, offset).unwrap();
        assert_eq!(buf, [0; 8192]);
    }
    mount.snap("after");
    let map = mount.map_since("after", "vda", "before").granules();
    assert!([0, 1, 2, 3].iter().all(|granule| map.contains(granule)) && !map.contains(&20), "{map:?}");
    drop(client);
    drop(guest);
    mount.umount();
}

#[test]
fn what_was_answered_is_in_the_image_when_the_mount_has_ended() {
    requires!();
    let rig = Rig::new();
    let (socket, option) = listen(&rig);
    let image = rig.image("vda", 4);
    let mount = rig.mount(args!["--nbd", &option, &image]);
    let mut client = Nbd::open(&socket, "vda").unwrap();
    let data = pattern(5, 1 << 20);
    client.write(1 << 20, &data);
    // A client counts as an open file does.
    refused(&mount.run("umount", args![]), 2, &["a client of NBD has 'vda' open", "--lazy"]);
    assert!(client.read(1 << 20, 1 << 20) == data);
    // The client stays: it is disconnected.
    assert!(mount.run("umount", args!["--lazy"]).status.success());
    assert!(client.ask(0, 0, 512, &[]).map_or(true, |answer| answer.is_err()));
    assert!(fs::read(&image).unwrap()[1 << 20..2 << 20] == data);
    assert!(UnixStream::connect(&socket).is_err());
}

#[test]
fn an_address_that_cannot_be_had_costs_nothing() {
    requires!();
    let rig = Rig::new();
    let (image, mnt) = (rig.image("vda", 1), rig.mount_point("mnt"));
    let (socket, option) = listen(&rig);
    let _busy = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let file = rig.path("file");
    fs::write(&file, "precious").unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    for (address, words) in [
        (option, vec!["another process serves it"]),
        (format!("unix:{}", file.display()), vec!["something else has this name"]),
        (format!("unix:{}", rig.path("no/such").display()), vec!["No such file"]),
        (format!("unix:{}", mnt.join("nbd").display()), vec!["inside the mount point"]),
        (format!("tcp:127.0.0.1:{port}"), vec!["TCP needs TLS", "--nbd-tls"]),
        ("tcp:127.0.0.1:x".to_owned(), vec!["no number up to 65535"]),
        ("unix:".to_owned(), vec!["no path"]),
    ] {
        let out = fleecefs(args!["mount", "--nbd", &address, &image, &mnt]);
        refused(&out, 2, &words);
        assert!(!is_mounted(&mnt) && !rig.path("vda.raw.fleece").exists(), "{address}");
    }
    assert_eq!(fs::read(&file).unwrap(), b"precious");
    // Of several, those that were bound are given back.
    let free = rig.path("free");
    let both =
        args!["mount", "--nbd", format!("unix:{}", free.display()), "--nbd", format!("unix:{}", socket.display())];
    let out = fleecefs(both.into_iter().chain(args![&image, &mnt]));
    refused(&out, 2, &["another process serves it"]);
    assert!(!free.exists());
}

#[test]
fn the_server_of_the_commands_is_not_the_mounts() {
    requires!();
    let rig = Rig::new();
    let (socket, option) = listen(&rig);
    let mount = rig.mount(args!["--nbd", &option, rig.image("vda", 4)]);
    let mut guest = Nbd::open(&socket, "vda").unwrap();
    let mut qmp = Client::new(&mount);
    let other = rig.path("other");
    let address = json!({"type": "unix", "data": {"path": other}});
    qmp.ok("nbd-server-start", json!({ "addr": address }));
    qmp.ok("block-export-add", json!({"type": "nbd", "id": "e", "node-name": "vda", "name": "x"}));
    assert!(Nbd::open(&other, "vda").is_none() && Nbd::open(&socket, "x").is_none());
    assert!(Nbd::open(&other, "x").unwrap().read_only);
    assert_eq!(mount.status()["nbd"][1]["by"], "qmp");
    qmp.ok("nbd-server-stop", json!({}));
    assert!(!other.exists());
    guest.write(0, &[1; 4096]);
    assert_eq!(guest.read(0, 4096), [1; 4096]);
    drop(guest);
    mount.umount();
}
