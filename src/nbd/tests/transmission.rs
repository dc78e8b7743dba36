//! Requests and replies.

use super::client::{Ask, info, queries};
use super::export::{BAD, HANG, HUGE, PANIC, SIZE};
use super::*;
use crate::nbd::proto::{Style, chunk, command, command_flags, option, reply};
use std::collections::HashMap;
use std::sync::atomic::Ordering;

const STYLES: [Style; 3] = [Style::Simple, Style::Structured, Style::Extended];

fn read(offset: u64, len: u64) -> Ask<'static> {
    Ask { command: command::READ, offset, len, ..Ask::default() }
}

fn write(offset: u64, data: &[u8]) -> Ask<'_> {
    Ask { command: command::WRITE, offset, len: data.len() as u64, data, flags: 0 }
}

#[test]
fn what_is_written_is_read_in_every_style() {
    let rig = Rig::new();
    for (number, style) in (1..).zip(STYLES) {
        let mut client = rig.client().enter(style, "vda", &[]);
        let data: Vec<u8> = (0..1 << 20).map(|at| (at / 7 * number) as u8).collect();
        let offset = 513 * number;
        assert_eq!(client.run(write(offset, &data)), (0, vec![]));
        assert_eq!(client.run(read(offset, data.len() as u64)), (0, data.clone()));
        assert_eq!(client.run(read(offset + 1, 1)), (0, vec![data[1]]));
        let flagged = Ask { flags: command_flags::PAYLOAD_LEN, ..write(offset, b"abc") };
        assert_eq!(client.run(flagged).0, if style == Style::Extended { 0 } else { 22 });
    }
}

#[test]
fn refused_requests_change_nothing_and_the_connection_goes_on() {
    let rig = Rig::new();
    for style in STYLES {
        let mut client = rig.client().enter(style, "vda", &[]);
        let ask = |command, flags, offset, len| Ask { command, flags, offset, len, data: b"" };
        let big = vec![1; (32 << 20) + 1];
        let df = if style == Style::Simple { 22 } else { 0 };
        let cases = [
            (read(SIZE - 1, 2), 22),
            (read(u64::MAX, 2), 22),
            (read(0, (32 << 20) + 1), 75),
            (read(0, 0), 0),
            (write(SIZE, b""), 0),
            (write(SIZE, b"x"), 28),
            (write(SIZE - 1, b"xy"), 28),
            (write(u64::MAX, b"xy"), 28),
            (write(0, &big), 75),
            (ask(command::WRITE_ZEROES, 0, SIZE - 1, 2), 28),
            (ask(command::TRIM, 0, SIZE - 1, 2), 22),
            (ask(command::CACHE, 0, SIZE - 1, 2), 22),
            (ask(command::CACHE, 0, 0, SIZE), 0),
            (ask(command::BLOCK_STATUS, 0, 0, 512), 22),
            (ask(8, 0, 0, 0), 22),
            (ask(0xffff, 0, 0, 0), 22),
            (ask(command::READ, command_flags::DF, 0, 1), df),
            (ask(command::READ, command_flags::FUA, 0, 1), 0),
            (ask(command::READ, command_flags::NO_HOLE, 0, 1), 22),
            (ask(command::FLUSH, 0x8000, 0, 0), 22),
            (ask(command::TRIM, command_flags::NO_HOLE, 0, 1), 22),
            (Ask { flags: command_flags::DF, ..write(0, b"abc") }, 22),
            (read(BAD, 512), 5),
            (read(512, 512), 0),
        ];
        for (number, (ask, error)) in cases.into_iter().enumerate() {
            assert_eq!(client.run(ask).0, error, "{style:?}, case {number}");
        }
        assert!(rig.shelf.disk.bytes.lock().iter().all(|byte| *byte == 0));
    }
}

#[test]
fn a_read_only_export_is_not_written_to() {
    let rig = Rig::new();
    for style in STYLES {
        let mut client = rig.client().enter(style, "s/vda", &[]);
        assert_eq!(client.run(write(0, b"x")).0, 1);
        for command in [command::WRITE_ZEROES, command::TRIM] {
            assert_eq!(client.run(Ask { command, len: 512, ..Ask::default() }).0, 1);
        }
        assert_eq!(client.run(Ask { command: command::FLUSH, ..Ask::default() }).0, 0);
        assert_eq!(client.run(read(0, 1)), (0, vec![0]));
    }
}

#[test]
fn a_payload_of_an_unknown_kind_is_skipped_under_extended_headers() {
    let rig = Rig::new();
    let mut client = rig.client().enter(Style::Extended, "vda", &["base:allocation"]);
    for command in [command::BLOCK_STATUS, command::TRIM, 99] {
        let flags = command_flags::PAYLOAD_LEN;
        assert_eq!(client.run(Ask { command, flags, len: 12, data: &[7; 12], ..Ask::default() }).0, 22);
    }
    assert_eq!(client.run(read(0, 3)), (0, vec![0; 3]));
    // More than is skipped ends the connection.
    client.ask(Ask { command: command::WRITE, len: (64 << 20) + 1, ..Ask::default() });
    client.assert_closed();
}

#[test]
fn without_its_magic_number_a_request_ends_the_connection() {
    let rig = Rig::new();
    for style in STYLES {
        let mut client = rig.client().enter(style, "vda", &[]);
        client.put(&[7; 64]);
        client.assert_closed();
    }
}

#[test]
fn fua_makes_durable_before_the_answer() {
    let rig = Rig::new();
    let mut client = rig.client().enter(Style::Structured, "vda", &[]);
    let flushes = |count| assert_eq!(rig.shelf.disk.flushes.load(Ordering::SeqCst), count);
    client.run(write(0, b"x"));
    flushes(0);
    let flags = command_flags::FUA;
    client.run(Ask { flags, ..write(0, b"x") });
    flushes(1);
    client.run(Ask { flags, command: command::TRIM, len: 512, ..Ask::default() });
    client.run(Ask { flags, command: command::WRITE_ZEROES, len: 512, ..Ask::default() });
    flushes(3);
    client.run(Ask { command: command::FLUSH, ..Ask::default() });
    flushes(4);
    client.run(Ask { flags, ..read(0, 1) });
    flushes(4);
}

#[test]
fn zeroes_are_written_as_asked_and_only_fast_ones_may_be_unsupported() {
    let rig = Rig::new();
    let mut client = rig.client().enter(Style::Structured, "vda", &[]);
    client.run(write(0, &[1; 4096]));
    let mut zero =
        |flags| client.run(Ask { command: command::WRITE_ZEROES, flags, offset: 512, len: 1024, data: b"" }).0;
    let (no_hole, fast) = (command_flags::NO_HOLE, command_flags::FAST_ZERO);
    assert_eq!((zero(0), zero(no_hole), zero(fast), zero(no_hole | fast)), (0, 0, 0, 95));
    let want = [(false, false), (true, false), (false, true), (true, true)];
    assert_eq!(*rig.shelf.disk.zeroes.lock(), want.map(|(hole, fast)| (512, 1024, hole, fast)));
    assert_eq!(client.run(read(0, 2048)).1, [vec![1; 512], vec![0; 1024], vec![1; 512]].concat());
}

#[test]
fn long_ranges_go_in_pieces() {
    let rig = Rig::new();
    let mut client = rig.client().enter(Style::Extended, "huge", &["base:allocation", "qemu:dirty-bitmap:a"]);
    let len = (5 << 30) + 1;
    let flags = command_flags::FAST_ZERO;
    assert_eq!(client.run(Ask { command: command::WRITE_ZEROES, flags, offset: 1 << 20, len, data: b"" }).0, 0);
    let pieces = rig.shelf.disk.zeroes.lock().clone();
    assert_eq!((pieces.len(), pieces.iter().map(|piece| piece.1).sum::<u64>()), (6, len));
    assert!(pieces.iter().all(|piece| piece.1 <= 1 << 30));
    // What would come too late is not said.
    assert_eq!(pieces.iter().filter(|piece| piece.3).count(), 1);
    // A client that leaves is noticed between them.
    client.ask(Ask { command: command::TRIM, len: HUGE, ..Ask::default() });
    eventually("trims", || rig.shelf.disk.trims.load(Ordering::SeqCst) > 0);
    drop(client);
    eventually("the connection ends", || rig.server.connections("huge") == 0);
}

#[test]
fn status_is_merged_and_bounded() {
    let rig = Rig::new();
    let contexts = ["base:allocation", "qemu:dirty-bitmap:a"];
    for style in [Style::Structured, Style::Extended] {
        let mut client = rig.client().enter(style, "vda", &contexts);
        let stripes = |count: u64| (0..count).map(|at| (1024, at % 2)).collect::<Vec<_>>();
        assert_eq!(client.status(0, 0, 4096), [(0, vec![(4096, 0)]), (1, stripes(4))]);
        assert_eq!(client.status(command_flags::REQ_ONE, 512, 4096), [(0, vec![(4096, 0)]), (1, vec![(512, 0)])]);
        assert_eq!(client.status(0, SIZE - 100, 100), [(0, vec![(100, 0)]), (1, vec![(100, 1)])]);
        assert_eq!(client.status(0, 0, SIZE)[1].1.len() as u64, SIZE / 1024);
        let empty = Ask { command: command::BLOCK_STATUS, ..Ask::default() };
        assert_eq!(client.run(empty).0, 22);
    }
    let mut client = rig.client().enter(Style::Extended, "huge", &contexts);
    let all = client.status(0, 0, HUGE);
    assert_eq!(all[0], (0, vec![(HUGE, 0)]));
    assert!((1..=64 << 10).contains(&all[1].1.len()));
    assert!(all[1].1.iter().zip(0..).all(|(extent, at)| *extent == (1024, at % 2)));
    let mut client = rig.client().enter(Style::Structured, "huge", &contexts);
    assert_eq!(client.status(0, 0, 0xffff_ffff)[0], (0, vec![(0xffff_ffff, 0)]));
}

#[test]
fn requests_that_hang_keep_no_later_ones_unread() {
    let rig = Rig::new();
    let disk = &rig.shelf.disk;
    let mut client = rig.client().enter(Style::Structured, "vda", &[]);
    disk.set_hang(true);
    // Threads of the connection but one.
    for count in 1..16 {
        client.ask(read(HANG, 512));
        eventually("it hangs", || disk.hanging() == count);
        assert_eq!(client.run(read(0, 1)), (0, vec![0]), "beside {count}");
    }
    disk.set_hang(false);
    for _ in 1..16 {
        assert_eq!(client.answer(0).error, 0);
    }
    assert_eq!(client.run(read(0, 1)).0, 0);
}

#[test]
fn answers_do_not_wait_for_a_later_request_that_hangs() {
    let rig = Rig::new();
    let mut client = rig.client().enter(Style::Structured, "vda", &[]);
    rig.shelf.disk.set_hang(true);
    // In one message: the first ones' answers may travel together, but wait for none, though no thread is left to read.
    let offsets = [0, 512, 1024].into_iter().chain([HANG; 20]);
    let bytes: Vec<u8> = offsets
        .zip(100..)
        .flat_map(|(at, cookie)| super::client::request_bytes(Style::Structured, cookie, read(at, 512)))
        .collect();
    client.put(&bytes);
    for cookie in 100..103 {
        assert_eq!(client.answer(0).cookie, cookie);
    }
    eventually("all threads hang", || rig.shelf.disk.hanging() == 16);
    rig.shelf.disk.set_hang(false);
    let mut cookies: Vec<u64> = (0..20).map(|_| client.answer(0).cookie).collect();
    cookies.sort_unstable();
    assert!(cookies.into_iter().eq(103..123));
}

#[test]
fn many_requests_at_once_are_each_answered_whole_and_once() {
    let rig = Rig::new();
    {
        let _open = rig.client().enter(Style::Simple, "vda", &[]);
        let mut bytes = rig.shelf.disk.bytes.lock();
        bytes.iter_mut().enumerate().for_each(|(at, byte)| *byte = (at / 3 + at / 4096) as u8);
    }
    let content = rig.shelf.disk.bytes.lock().clone();
    let mut threads = Vec::new();
    for seed in 0..4u64 {
        let mut client = rig.client().enter(STYLES[1 + seed as usize % 2], "vda", &[]);
        let content = content.clone();
        threads.push(std::thread::spawn(move || {
            let mut random = seed + 1;
            let mut next = |below: u64| {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (random >> 33) % below
            };
            let mut asked: HashMap<u64, (u64, u64)> = HashMap::new();
            for _ in 0..400 {
                while asked.len() < 16 {
                    let len = 1 + if next(4) == 0 { next(400_000) } else { next(8192) };
                    let offset = next(BAD - len);
                    asked.insert(client.ask(read(offset, len)), (offset, len));
                }
                let answer = client.answer(0);
                assert_eq!((answer.kind, answer.error, answer.done), (chunk::OFFSET_DATA, 0, true));
                let (offset, len) = asked.remove(&answer.cookie).expect("it was asked");
                assert!(answer.data[8..] == content[offset as usize..(offset + len) as usize]);
            }
        }));
    }
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

#[test]
fn a_panic_ends_its_connection_alone() {
    let rig = Rig::new();
    let mut other = rig.client().enter(Style::Structured, "vda", &[]);
    let mut client = rig.client().enter(Style::Structured, "vda", &[]);
    client.ask(read(PANIC, 512));
    client.assert_closed();
    assert_eq!(other.run(read(0, 1)).0, 0);
    eventually("it has left", || rig.server.connections("vda") == 1);
}

#[test]
fn what_was_asked_before_the_disconnect_is_answered() {
    let rig = Rig::new();
    let disk = &rig.shelf.disk;
    let mut client = rig.client().enter(Style::Structured, "vda", &[]);
    disk.set_hang(true);
    client.ask(read(HANG, 512));
    eventually("it hangs", || disk.hanging() == 1);
    client.ask(Ask { command: command::DISC, ..Ask::default() });
    disk.set_hang(false);
    assert_eq!(client.answer(0).data.len(), 512 + 8);
    client.assert_closed();
}

#[test]
fn an_error_of_a_read_has_a_text() {
    let rig = Rig::new();
    let mut client = rig.client();
    assert_eq!(client.option(option::STRUCTURED_REPLY, b"").0, reply::ACK);
    assert_eq!(client.option(option::SET_META_CONTEXT, &queries("vda", &["base:allocation"])).0, reply::ACK);
    assert_eq!(client.option(option::GO, &info("vda", &[])).0, reply::ACK);
    client.style = Style::Structured;
    let (error, text) = client.run(read(BAD, 512));
    assert_eq!((error, String::from_utf8(text).unwrap()), (5, "read at offset 3145728: bad medium".into()));
}
