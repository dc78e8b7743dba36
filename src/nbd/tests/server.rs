//! Connections as a whole: limits, ends, the stop.

use super::client::{Ask, info, option_bytes, request_bytes};
use super::export::HANG;
use super::*;
use crate::error::errno;
use crate::nbd::Address;
use crate::nbd::proto::{Style, command, option, reply};
use std::net::TcpStream;
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;
use std::time::Duration;

fn read(offset: u64, len: u64) -> Ask<'static> {
    Ask { command: command::READ, offset, len, ..Ask::default() }
}

#[test]
fn a_stop_lets_requests_end_and_refuses_new_ones() {
    let rig = Rig::new();
    let disk = &rig.shelf.disk;
    let mut client = rig.client().enter(Style::Structured, "vda", &[]);
    let mut shaking = rig.client();
    disk.set_hang(true);
    client.ask(read(HANG, 512));
    eventually("it hangs", || disk.hanging() == 1);
    thread::scope(|scope| {
        let stop = scope.spawn(|| rig.server.stop());
        // Until the stop is seen, requests are carried out.
        eventually("new ones are refused", || client.run(read(0, 1)).0 == 108);
        assert!(!stop.is_finished());
        disk.set_hang(false);
        assert_eq!(client.answer(0).data.len(), 512 + 8);
        client.assert_closed();
        shaking.assert_closed();
    });
    assert!(!rig.path.exists());
    assert_eq!(rig.server.connections("vda"), 0);
    rig.server.stop();
}

#[test]
fn an_export_can_be_taken_from_its_clients() {
    let rig = Rig::new();
    let mut live = rig.client().enter(Style::Structured, "vda", &[]);
    let mut view = rig.client().enter(Style::Structured, "s/vda", &[]);
    assert_eq!((rig.server.connections("vda"), rig.server.connections("s/vda")), (1, 1));
    rig.server.disconnect("s/vda");
    view.assert_closed();
    eventually("it is gone", || rig.server.connections("s/vda") == 0);
    assert_eq!(live.run(read(0, 1)).0, 0);
    // Clients that leave are counted no more.
    drop(live);
    eventually("it is gone", || rig.server.connections("vda") == 0);
}

#[test]
fn who_is_just_entering_is_taken_away_too() {
    let rig = Rig::new();
    let disk = &rig.shelf.disk;
    disk.set_hang(true);
    let mut client = rig.client();
    let write = Ask { command: command::WRITE, len: 3, data: b"abc", ..Ask::default() };
    client.put(&[option_bytes(option::GO, &info("slow", &[])), request_bytes(Style::Simple, 1, write)].concat());
    eventually("it enters", || rig.server.connections("slow") == 1);
    rig.server.disconnect("slow");
    disk.set_hang(false);
    eventually("it has left", || rig.server.connections("slow") == 0);
    rig.server.stop();
    assert!(disk.bytes.lock().iter().all(|byte| *byte == 0));
    // Without any connection its export is not opened any more.
    assert!(Arc::strong_count(disk) == 1);
}

#[test]
fn who_comes_beyond_the_limit_waits() {
    let rig = Rig::with(ServerOptions { max_connections: 2, ..ServerOptions::default() });
    let first = rig.client().enter(Style::Simple, "vda", &[]);
    let mut second = rig.client().enter(Style::Simple, "vda", &[]);
    let third = UnixStream::connect(&rig.path).unwrap();
    third.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    assert!(std::io::Read::read(&mut &third, &mut [0]).is_err());
    drop(first);
    third.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    assert_eq!(std::io::Read::read(&mut &third, &mut [0]).unwrap(), 1);
    assert_eq!(second.run(read(0, 1)).0, 0);
}

#[test]
fn tcp_is_served_on_the_port_that_it_says() {
    let shelf = Arc::new(Shelf::default());
    let any = Address::Tcp { host: "127.0.0.1".into(), port: 0 };
    let server = Server::start(&[any], shelf, ServerOptions::default()).unwrap();
    let [Address::Tcp { host, port }] = &server.addresses()[..] else { panic!("{:?}", server.addresses()) };
    let mut stream = TcpStream::connect((host.as_str(), *port)).unwrap();
    let mut greeting = [0; 18];
    std::io::Read::read_exact(&mut stream, &mut greeting).unwrap();
    assert_eq!(&greeting[..8], b"NBDMAGIC");
    server.stop();
    assert!(TcpStream::connect((host.as_str(), *port)).is_err());
}

#[test]
fn only_a_socket_that_nobody_serves_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let start = |path: &std::path::Path| {
        Server::start(&[Address::Unix(path.into())], Arc::new(Shelf::default()), ServerOptions::default())
    };
    let path = dir.path().join("s");
    drop(UnixListener::bind(&path).unwrap());
    let server = start(&path).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&path).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
    assert_eq!(start(&path).err().unwrap().errno(), errno::EBUSY);
    assert!(path.exists());
    drop(server);
    assert!(!path.exists());
    std::fs::write(&path, "precious").unwrap();
    assert_eq!(start(&path).err().unwrap().errno(), errno::EEXIST);
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    assert_eq!(start(&dir.path().join("x".repeat(120))).err().unwrap().errno(), errno::ENAMETOOLONG);
}

#[test]
fn addresses_are_read_and_written() {
    let tcp = |host: &str, port| Address::Tcp { host: host.into(), port };
    let cases = [
        ("/a/b", Address::Unix("/a/b".into()), "unix:/a/b"),
        ("unix:b", Address::Unix("b".into()), "unix:b"),
        ("localhost:1", tcp("localhost", 1), "localhost:1"),
        ("tcp:host", tcp("host", 10809), "host:10809"),
        (":7", tcp("", 7), ":7"),
        ("[::1]:10810", tcp("::1", 10810), "[::1]:10810"),
        ("[::1]", tcp("::1", 10809), "[::1]:10809"),
    ];
    for (text, address, shown) in cases {
        assert_eq!(text.parse::<Address>().unwrap(), address);
        assert_eq!(address.to_string(), shown);
    }
    for wrong in ["", "host", "unix:", "[::1", "host:port", "host:65536", ":", "[::1]x"] {
        assert!(wrong.parse::<Address>().is_err(), "{wrong}");
    }
}

#[test]
fn an_export_that_is_not_there_leaves_the_client_in_the_handshake() {
    let rig = Rig::new();
    let mut client = rig.client();
    assert_eq!(client.option(option::GO, &info("none", &[])).0, reply::ERR_UNKNOWN);
    assert_eq!(client.enter(Style::Structured, "vda", &[]).run(read(0, 1)).0, 0);
}
