//! Clients that mean no good.

use super::client::{Ask, info, option_bytes, queries, request_bytes};
use super::*;
use crate::nbd::proto::{Style, command, option};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

fn read(offset: u64, len: u64) -> Ask<'static> {
    Ask { command: command::READ, offset, len, ..Ask::default() }
}

/// Times as many in the full run.
fn rounds(few: usize, many: usize) -> usize {
    if std::env::var_os("FLEECEFS_FULL").is_some() { many } else { few }
}

/// A session with some of everything.
fn session(style: Style) -> Vec<u8> {
    let mut bytes = 3u32.to_be_bytes().to_vec();
    match style {
        Style::Simple => (),
        Style::Structured => bytes.extend(option_bytes(option::STRUCTURED_REPLY, b"")),
        Style::Extended => bytes.extend(option_bytes(option::EXTENDED_HEADERS, b"")),
    }
    bytes.extend(option_bytes(option::LIST, b""));
    bytes.extend(option_bytes(option::LIST_META_CONTEXT, &queries("vda", &["qemu:"])));
    bytes.extend(option_bytes(option::SET_META_CONTEXT, &queries("vda", &["base:allocation", "qemu:other"])));
    bytes.extend(option_bytes(option::GO, &info("vda", &[1, 2, 3])));
    let write = Ask { command: command::WRITE, len: 5, data: b"12345", ..Ask::default() };
    let status = Ask { command: command::BLOCK_STATUS, len: 1 << 20, ..Ask::default() };
    let flush = Ask { command: command::FLUSH, ..Ask::default() };
    let zero = Ask { command: command::WRITE_ZEROES, offset: 512, len: 4096, ..Ask::default() };
    for (ask, cookie) in [read(0, 4096), write, status, flush, zero, read(1, 1)].into_iter().zip(1..) {
        bytes.extend(request_bytes(style, cookie, ask));
    }
    bytes
}

#[test]
fn malformed_and_cut_sessions_end_and_others_go_on() {
    let rig = Rig::new();
    let mut good = rig.client().enter(Style::Structured, "vda", &[]);
    let seeds = [Style::Simple, Style::Structured, Style::Extended].map(session);
    let mut random = 1u64;
    let mut next = |below: usize| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) as usize % below
    };
    for round in 0..rounds(500, 10_000) {
        let mut bytes = seeds[next(3)].clone();
        for _ in 0..next(4) {
            let at = next(bytes.len());
            bytes[at] = [0, 1, 0x7f, 0xff, next(256) as u8][next(5)];
        }
        bytes.truncate(if next(2) == 0 { bytes.len() } else { next(bytes.len()) });
        let mut stream = UnixStream::connect(&rig.path).unwrap();
        // The server may have closed it already.
        let _ = stream.write_all(&bytes);
        if next(2) == 0 {
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
            let mut sink = Vec::new();
            if let Err(e) = stream.read_to_end(&mut sink) {
                assert_eq!(e.kind(), std::io::ErrorKind::ConnectionReset, "round {round}");
            }
        }
        drop(stream);
        if round % 100 == 0 {
            assert_eq!(good.run(read(0, 1)).0, 0);
        }
    }
    assert_eq!(good.run(read(0, 1)).0, 0);
    eventually("all have left", || rig.server.connections("vda") == 1);
    assert_eq!(rig.server.memory_in_use(), 0);
}

fn status_number(key: &str) -> usize {
    let text = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find(|line| line.starts_with(key)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn idle_connections_take_a_thread_each_and_others_go_on() {
    let rig = Rig::with(ServerOptions { max_connections: 0, ..ServerOptions::default() });
    let count = rounds(100, 1000);
    let mut idle: Vec<_> = (0..count).map(|_| rig.client().enter(Style::Structured, "vda", &[])).collect();
    for client in &mut idle {
        assert_eq!(client.run(read(0, 512)).0, 0);
    }
    assert_eq!(rig.server.connections("vda"), count);
    // Other tests have threads, too; two a connection and the pool are the bound.
    assert!(status_number("Threads") < 2 * count + 600);
    let begun = Instant::now();
    for _ in 0..100 {
        assert_eq!(idle[count / 2].run(read(0, 4096)).0, 0);
    }
    assert!(begun.elapsed() < Duration::from_secs(30));
}

#[test]
fn clients_that_never_read_keep_bounded_memory_and_others_go_on() {
    let rig = Rig::new();
    let mut deaf: Vec<_> = (0..8).map(|_| rig.client().enter(Style::Structured, "s/vda", &[])).collect();
    for client in &mut deaf {
        for _ in 0..40 {
            client.ask(read(0, 1 << 20));
        }
    }
    // They fill what views may have, and no more.
    eventually("they hold memory", || rig.server.memory_in_use() >= 8 << 20);
    assert!(rig.server.memory_in_use() <= 128 << 20);
    let mut good = rig.client().enter(Style::Structured, "vda", &[]);
    for _ in 0..10 {
        assert_eq!(good.run(read(0, 1 << 20)).0, 0);
        assert!(rig.server.memory_in_use() <= 129 << 20);
    }
    drop(deaf);
    eventually("all is given back", || rig.server.memory_in_use() == 0);
}

#[test]
fn who_does_not_move_is_disconnected_where_memory_is_wanted() {
    let rig = Rig::new();
    let mut deaf = rig.client().enter(Style::Structured, "vda", &[]);
    deaf.ask(read(0, 1 << 20));
    eventually("it is stuck", || rig.server.stuck_for("vda").is_some());
    let mut half = rig.client().enter(Style::Structured, "s/vda", &[]);
    half.put(&request_bytes(Style::Structured, 1, read(0, 1))[..20]);
    // Half a header keeps nothing.
    assert_eq!(rig.server.stuck_for("s/vda"), None);
    let mut sender = rig.client().enter(Style::Structured, "vda", &[]);
    sender.ask(Ask { command: command::WRITE, len: 1 << 20, ..Ask::default() });
    eventually("it holds memory", || rig.server.memory_in_use() == 2 << 20);
    rig.server.watch_as_if_later(Duration::from_secs(6), false);
    assert_eq!(rig.server.connections("vda"), 2);
    rig.server.watch_as_if_later(Duration::from_secs(6), true);
    eventually("both have left", || rig.server.connections("vda") == 0);
    assert_eq!(rig.server.memory_in_use(), 0);
    assert_eq!(rig.server.connections("s/vda"), 1);
}

#[test]
fn a_handshake_that_takes_too_long_ends() {
    let rig = Rig::new();
    let mut client = rig.client();
    let mut entered = rig.client().enter(Style::Structured, "vda", &[]);
    // Answers come once the handshake is over for the watch, too.
    assert_eq!(entered.run(read(0, 1)).0, 0);
    rig.server.watch_as_if_later(Duration::ZERO, false);
    assert_ne!(client.option(4711, b"").0, 0);
    rig.server.watch_as_if_later(Duration::from_secs(11), false);
    client.assert_closed();
    assert_eq!(entered.run(read(0, 1)).0, 0);
}
