//! NBD under TLS: libnbd's and QEMU's clients (both with GnuTLS) against the mount's server and that of the commands.

use crate::harness::*;
use crate::qmp::Client;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose,
};
use serde_json::json;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

const KEY: &str = "3c8b6d1de0a4f75512b0c99ae87f6cd2";

/// A directory with certificates of its own authority: of the server, and of a client below `client`. `none` has the
/// authority alone.
fn certificates(rig: &Rig, name: &str) -> PathBuf {
    let dir = rig.path(name);
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.distinguished_name.push(DnType::CommonName, "authority");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let usages = [
        ("", "server", ExtendedKeyUsagePurpose::ServerAuth),
        ("client", "client", ExtendedKeyUsagePurpose::ClientAuth),
    ];
    for (below, role, usage) in usages {
        let mut params = CertificateParams::new(vec!["localhost".to_owned(), "127.0.0.1".to_owned()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, role);
        params.extended_key_usages = vec![usage];
        // QEMU asks for both.
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &authority).unwrap();
        fs::create_dir_all(dir.join(below)).unwrap();
        fs::write(dir.join(below).join("ca-cert.pem"), authority.pem()).unwrap();
        fs::write(dir.join(below).join(format!("{role}-cert.pem")), certificate.pem()).unwrap();
        fs::write(dir.join(below).join(format!("{role}-key.pem")), key.serialize_pem()).unwrap();
    }
    fs::create_dir(dir.join("none")).unwrap();
    fs::write(dir.join("none/ca-cert.pem"), authority.pem()).unwrap();
    dir
}

/// A directory with the keys of `alice` and others as the server has them, and files with one key each.
fn keys(rig: &Rig) -> PathBuf {
    let dir = rig.path("keys");
    fs::create_dir(&dir).unwrap();
    let long = format!("{KEY}{KEY}{KEY}{KEY}");
    fs::write(dir.join("keys.psk"), format!("bob:{long}\nalice:{KEY}\n")).unwrap();
    fs::write(dir.join("wrong.psk"), format!("alice:{}\n", KEY.replace('3', "4"))).unwrap();
    fs::write(dir.join("unknown.psk"), format!("carol:{KEY}\n")).unwrap();
    dir
}

/// The port of the mount's `index`th server.
fn port(mount: &Mount, index: usize) -> u16 {
    let address = mount.status()["nbd"][index]["addresses"][0].as_str().unwrap().to_owned();
    address.rsplit(':').next().unwrap().parse().unwrap()
}

fn psk_uri(user: &str, host: &str, keys: &Path) -> String {
    format!("nbds://{user}@{host}/vda?tls-psk-file={}", keys.display())
}

fn x509_uri(host: &str, dir: &Path) -> String {
    format!("nbds://{host}/vda?tls-certificates={}", dir.display())
}

fn nbdinfo(uri: &str) -> Output {
    tool("nbdinfo").args(["--size", uri]).output().unwrap()
}

#[track_caller]
fn let_in(uri: &str) {
    let out = nbdinfo(uri);
    assert!(out.status.success() && stdout(&out).trim() == (4 << 20).to_string(), "{uri}: {}", stderr(&out));
}

#[track_caller]
fn kept_out(uri: &str) {
    assert!(!nbdinfo(uri).status.success(), "{uri}");
}

/// qemu-img with an object, comparing an export with an image.
fn compare(object: &str, host: &str, port: u16, image: &Path) -> Command {
    let mut command = tool("qemu-img");
    command.args(["compare", "--object", object, "--image-opts"]);
    command.arg(format!("driver=nbd,host={host},port={port},export=vda,tls-creds=t"));
    command.arg(format!("driver=raw,file.driver=file,file.filename={}", image.display()));
    command
}

#[test]
fn who_has_a_users_key_gets_in_and_nobody_else() {
    requires!("nbdinfo", "nbdcopy", "qemu-img");
    let rig = Rig::new();
    let (keys, image) = (keys(&rig), rig.image("vda", 4));
    let file = keys.join("keys.psk");
    let mount = rig.mount(args!["--nbd", "127.0.0.1:0", "--nbd-tls-psk", &file, &image]);
    assert_eq!(mount.status()["nbd"][0]["tls"], "require");
    let port = port(&mount, 0);
    let host = format!("127.0.0.1:{port}");
    let_in(&psk_uri("alice", &host, &file));
    let_in(&psk_uri("bob", &host, &file));
    // With a server's name in the handshake.
    let_in(&psk_uri("alice", &format!("localhost:{port}"), &file));
    kept_out(&psk_uri("alice", &host, &keys.join("wrong.psk")));
    kept_out(&psk_uri("carol", &host, &keys.join("unknown.psk")));
    kept_out(&format!("nbd://{host}/vda"));
    kept_out(&x509_uri(&host, &certificates(&rig, "certificates").join("client")));

    let copy = rig.path("copy");
    ok(tool("nbdcopy").arg(psk_uri("alice", &host, &file)).arg(&copy));
    assert!(fs::read(&copy).unwrap() == fs::read(&image).unwrap());
    let object = format!("tls-creds-psk,id=t,endpoint=client,username=bob,dir={}", keys.display());
    ok(&mut compare(&object, "127.0.0.1", port, &image));
    // And back, over what is there.
    fs::write(&copy, pattern(3, 4 << 20)).unwrap();
    ok(tool("nbdcopy").arg(&copy).arg(psk_uri("bob", &host, &file)));
    assert!(fs::read(mount.path("live/vda.raw")).unwrap() == pattern(3, 4 << 20));
    mount.umount();
}

#[test]
fn certificates_prove_the_server_and_where_that_is_asked_for_the_client() {
    requires!("nbdinfo", "qemu-img");
    let rig = Rig::new();
    let (dir, other, image) = (certificates(&rig, "a"), certificates(&rig, "b"), rig.image("vda", 4));
    for verify in [false, true] {
        let mut args = args!["--nbd", "127.0.0.1:0", "--nbd-tls-creds", &dir, &image];
        if verify {
            args.insert(0, "--nbd-tls-verify-peer".into());
        }
        let mount = rig.mount(args);
        let port = port(&mount, 0);
        for host in [format!("127.0.0.1:{port}"), format!("localhost:{port}")] {
            let_in(&x509_uri(&host, &dir.join("client")));
            // Of another authority: it refuses the server.
            kept_out(&x509_uri(&host, &other.join("client")));
            match verify {
                false => let_in(&x509_uri(&host, &dir.join("none"))),
                true => kept_out(&x509_uri(&host, &dir.join("none"))),
            }
        }
        let object = format!("tls-creds-x509,id=t,endpoint=client,dir={}", dir.join("client").display());
        ok(&mut compare(&object, "localhost", port, &image));
        mount.umount();
    }
}

#[test]
fn unix_sockets_go_in_the_clear_unless_tls_is_asked_for() {
    requires!("nbdinfo");
    let rig = Rig::new();
    let (keys, image, socket) = (keys(&rig), rig.image("vda", 4), rig.path("nbd"));
    let file = keys.join("keys.psk");
    let unix = format!("unix:{}", socket.display());
    let plain = format!("nbd+unix:///vda?socket={}", socket.display());
    let secure = format!("nbds+unix://alice@/vda?socket={}&tls-psk-file={}", socket.display(), file.display());
    let mount = rig.mount(args!["--nbd", &unix, "--nbd", "127.0.0.1:0", "--nbd-tls-psk", &file, &image]);
    let nbd = mount.status()["nbd"].clone();
    assert_eq!((&nbd[0]["tls"], &nbd[1]["tls"]), (&json!("off"), &json!("require")));
    let_in(&plain);
    kept_out(&secure);
    let_in(&psk_uri("alice", &format!("127.0.0.1:{}", port(&mount, 1)), &file));
    mount.umount();
    for (mode, goes_plain) in [("require", false), ("allow", true)] {
        let mode = format!("--nbd-tls={mode}");
        let mount = rig.mount(args!["--nbd", &unix, "--nbd", "127.0.0.1:0", &mode, "--nbd-tls-psk", &file, &image]);
        let tcp = format!(
            "nbd://127.0.0.1:{}/vda",
            mount.status()["nbd"][0]["addresses"][1].as_str().unwrap().rsplit(':').next().unwrap()
        );
        let_in(&secure);
        for uri in [&plain, &tcp] {
            assert_eq!(nbdinfo(uri).status.success(), goes_plain, "{mode} {uri}");
        }
        mount.umount();
    }
    let mount = rig.mount(args!["--nbd", "127.0.0.1:0", "--nbd-tls=off", &image]);
    let_in(&format!("nbd://127.0.0.1:{}/vda", port(&mount, 0)));
    mount.umount();
}

#[test]
fn credentials_that_are_no_good_cost_nothing() {
    requires!();
    let rig = Rig::new();
    let (image, mnt) = (rig.image("vda", 1), rig.mount_point("mnt"));
    let (dir, keys) = (certificates(&rig, "certificates"), keys(&rig));
    let file = keys.join("keys.psk");
    let socket = rig.path("nbd");
    let unix = format!("unix:{}", socket.display());
    let (empty, broken) = (rig.path("empty"), rig.path("broken.psk"));
    fs::create_dir(&empty).unwrap();
    fs::write(&broken, format!("alice:{KEY}\nbob:12345\n")).unwrap();
    let tcp = "127.0.0.1:0";
    for (args, words) in [
        (args!["--nbd", tcp], vec!["TCP needs TLS", "--nbd-tls-creds or --nbd-tls-psk"]),
        (args!["--nbd", tcp, "--nbd-tls=require"], vec!["no credentials"]),
        (args!["--nbd", &unix, "--nbd-tls=allow"], vec!["no credentials"]),
        (args!["--nbd", &unix, "--nbd-tls-psk", &file], vec!["would not be used", "--nbd-tls=require"]),
        (args!["--nbd", tcp, "--nbd-tls=off", "--nbd-tls-psk", &file], vec!["would not be used"]),
        (args!["--nbd-tls-psk", &file], vec!["would not be used", "--nbd HOST:PORT"]),
        (
            args!["--nbd", &unix, "--nbd", tcp, "--nbd-tls-psk", &broken],
            vec!["broken.psk: line 2: the key is not in hex"],
        ),
        (args!["--nbd", &unix, "--nbd", tcp, "--nbd-tls-creds", &empty], vec!["empty/ca-cert.pem: No such file"]),
        (args!["--nbd", tcp, "--nbd-tls-creds", mnt.join("x")], vec!["inside the mount point"]),
        (args!["--nbd", tcp, "--nbd-tls-creds", dir.join("none")], vec!["server-cert.pem: No such file"]),
    ] {
        let all = args!["mount"].into_iter().chain(args.clone()).chain(args![&image, &mnt]);
        let out = fleecefs(all);
        refused(&out, 2, &words);
        assert!(!stderr(&out).contains("12345"));
        assert!(!is_mounted(&mnt) && !socket.exists() && !rig.path("vda.raw.fleece").exists(), "{args:?}");
    }
    for args in [
        args!["mount", "--nbd", tcp, "--nbd-tls-psk", &file, "--nbd-tls-creds", &dir],
        args!["mount", "--nbd", tcp, "--nbd-tls-psk", &file, "--nbd-tls-verify-peer"],
        args!["mount", "--nbd", tcp, "--nbd-tls=perhaps"],
    ] {
        assert_eq!(fleecefs(args.into_iter().chain(args![&image, &mnt])).status.code(), Some(2));
    }
}

#[test]
fn nothing_that_was_said_in_the_clear_counts_behind_starttls() {
    requires!();
    let rig = Rig::new();
    let keys = keys(&rig);
    fs::set_permissions(keys.join("keys.psk"), fs::Permissions::from_mode(0o600)).unwrap();
    let mount = rig.mount(args!["--nbd", "127.0.0.1:0", "--nbd-tls-psk", keys.join("keys.psk"), rig.image("vda", 4)]);
    let option = |number: u32| [&b"IHAVEOPT"[..], &number.to_be_bytes(), &[0; 4]].concat();
    let connect = || {
        let mut stream = TcpStream::connect(("127.0.0.1", port(&mount, 0))).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream.read_exact(&mut [0; 18]).unwrap();
        stream.write_all(&3u32.to_be_bytes()).unwrap();
        stream
    };
    let rest = |stream: &mut TcpStream| {
        let mut rest = Vec::new();
        // A reset ends it, too: what it did not read was thrown away.
        let _ = stream.read_to_end(&mut rest);
        rest
    };
    let (list, start_tls) = (3, 5);
    // Everything else is refused, and the connection goes on.
    let mut stream = connect();
    stream.write_all(&option(list)).unwrap();
    let mut reply = [0; 20];
    stream.read_exact(&mut reply).unwrap();
    assert_eq!(reply[12..16], 0x8000_0005_u32.to_be_bytes(), "NBD_REP_ERR_TLS_REQD");
    let mut text = vec![0; u32::from_be_bytes(reply[16..20].try_into().unwrap()) as usize];
    stream.read_exact(&mut text).unwrap();
    // An option behind the one that begins TLS, in one packet with it: no answer to either.
    stream.write_all(&[option(start_tls), option(list)].concat()).unwrap();
    assert_eq!(rest(&mut stream), b"");
    // And one where TLS should begin: an alert at the most.
    let mut stream = connect();
    stream.write_all(&option(start_tls)).unwrap();
    stream.read_exact(&mut reply).unwrap();
    assert_eq!(reply[12..16], 1u32.to_be_bytes(), "NBD_REP_ACK");
    stream.write_all(&option(list)).unwrap();
    let rest = rest(&mut stream);
    assert!(rest.is_empty() || rest[0] == 21, "{rest:?}");
    drop(stream);
    mount.umount();
}

#[test]
fn an_object_is_what_the_server_of_the_commands_proves_itself_with() {
    requires!("nbdinfo");
    let rig = Rig::new();
    let (dir, keys) = (certificates(&rig, "certificates"), keys(&rig));
    let mount = rig.mount(args![rig.image("vda", 4)]);
    let mut qmp = Client::new(&mount);
    let addr = json!({"type": "inet", "data": {"host": "127.0.0.1", "port": "0"}});
    let uris = [
        (json!({"qom-type": "tls-creds-x509", "dir": dir}), x509_uri("HOST", &dir.join("client"))),
        (json!({"qom-type": "tls-creds-psk", "dir": keys}), psk_uri("alice", "HOST", &keys.join("keys.psk"))),
    ];
    for (mut object, uri) in uris {
        object["id"] = json!("tls0");
        object["endpoint"] = json!("server");
        qmp.ok("object-add", object);
        qmp.ok("nbd-server-start", json!({"addr": addr, "tls-creds": "tls0"}));
        qmp.ok("block-export-add", json!({"type": "nbd", "id": "e", "node-name": "vda"}));
        let host = format!("127.0.0.1:{}", port(&mount, 0));
        let uri = uri.replace("HOST", &host);
        let_in(&uri);
        kept_out(&format!("nbd://{host}/vda"));
        // verify-peer is on by default, as in QEMU.
        kept_out(&x509_uri(&host, &dir.join("none")));
        // The server keeps what it was started with.
        qmp.ok("object-del", json!({"id": "tls0"}));
        let_in(&uri);
        qmp.ok("nbd-server-stop", json!({}));
    }
    mount.umount();
}
