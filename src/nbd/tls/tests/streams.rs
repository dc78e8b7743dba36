//! What a connection keeps to once hands are shaken.

use super::rig::{pair, psk_client, psk_server};
use rustls::version::{TLS12, TLS13};
use std::io::{self, IoSlice, Read, Write};
use std::thread;

/// Bytes that no socket buffers.
const MUCH: usize = 8 << 20;

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i / 7 + i / 1000) as u8).collect()
}

#[test]
fn much_data_comes_through_as_it_was() {
    for version in [&TLS12, &TLS13] {
        let (server, mut client) = pair(version);
        let data = pattern(MUCH + 13);
        thread::scope(|scope| {
            scope.spawn(|| {
                let (head, tail) = data.split_at(28);
                server.send(&[IoSlice::new(head), IoSlice::new(tail)]).unwrap();
            });
            let mut got = vec![0; data.len()];
            client.read_exact(&mut got).unwrap();
            assert!(got == data);
        });
        thread::scope(|scope| {
            scope.spawn(|| client.write_all(&data).unwrap());
            let mut got = vec![0; data.len()];
            let mut have = 0;
            while have < got.len() {
                have += server.recv(&mut got[have..]).unwrap();
            }
            assert!(got == data);
        });
    }
}

#[test]
fn receiving_does_not_wait_for_a_client_that_does_not_read() {
    let (server, mut client) = pair(&TLS13);
    thread::scope(|scope| {
        let sender = scope.spawn(|| server.send(&[IoSlice::new(&pattern(MUCH))]));
        for round in 0..50u8 {
            // It asks for new keys, too: the answer has to wait for what is being sent.
            client.conn.refresh_traffic_keys().unwrap();
            client.conn.writer().write_all(&[round]).unwrap();
            while client.conn.wants_write() {
                client.conn.write_tls(&mut client.sock).unwrap();
            }
            let mut buf = [0; 10];
            assert_eq!((server.recv(&mut buf).unwrap(), buf[0]), (1, round));
        }
        assert!(!sender.is_finished());
        let mut got = vec![0; MUCH];
        client.read_exact(&mut got).unwrap();
        assert!(got == pattern(MUCH));
        sender.join().unwrap().unwrap();
        // The answer to the last request for new keys comes with this.
        server.send(&[IoSlice::new(b"x")]).unwrap();
        client.read_exact(&mut [0]).unwrap();
    });
}

#[test]
fn the_end_is_told_from_a_truncation() {
    for version in [&TLS12, &TLS13] {
        let (server, mut client) = pair(version);
        client.write_all(b"abc").unwrap();
        client.conn.send_close_notify();
        client.flush().unwrap();
        let mut buf = [0; 10];
        assert_eq!(server.recv(&mut buf).unwrap(), 3);
        assert_eq!(server.recv(&mut buf).unwrap(), 0);
        assert_eq!(server.recv(&mut buf).unwrap(), 0);

        let (server, mut client) = pair(version);
        client.write_all(b"abc").unwrap();
        drop(client.into_parts());
        assert_eq!(server.recv(&mut buf).unwrap(), 3);
        assert_eq!(server.recv(&mut buf).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}

#[test]
fn a_record_that_was_tampered_with_ends_the_connection() {
    let (server, mut client) = pair(&TLS13);
    client.conn.writer().write_all(b"abc").unwrap();
    let mut record = Vec::new();
    client.conn.write_tls(&mut record).unwrap();
    *record.last_mut().unwrap() ^= 1;
    client.sock.write_all(&record).unwrap();
    let mut buf = [0; 10];
    assert_eq!(server.recv(&mut buf).unwrap_err().kind(), io::ErrorKind::InvalidData);
    assert!(server.recv(&mut buf).is_err());
    assert!(server.send(&[IoSlice::new(b"x")]).is_err());
    // The client is told.
    assert!(client.read(&mut buf).unwrap_err().to_string().contains("BadRecordMac"));
}

#[test]
fn shutting_down_tells_the_client_and_wakes_who_waits() {
    let (server, mut client) = pair(&TLS13);
    thread::scope(|scope| {
        let waiting = scope.spawn(|| server.recv(&mut [0; 10]));
        server.shutdown();
        server.shutdown();
        // The end of the socket under it, which is no close_notify.
        assert!(waiting.join().unwrap().is_err());
    });
    assert_eq!(client.read(&mut [0; 10]).unwrap(), 0);
    assert!(server.send(&[IoSlice::new(b"x")]).is_err());
}

#[test]
fn shutting_down_waits_for_no_client() {
    // One that does not read, in the midst of a send and between two.
    let (server, client) = pair(&TLS13);
    thread::scope(|scope| {
        let sender = scope.spawn(|| server.send(&[IoSlice::new(&pattern(MUCH))]));
        let mut first = [0; 1];
        (&client.sock).read_exact(&mut first).unwrap();
        server.shutdown();
        assert!(sender.join().unwrap().is_err());
        assert!(server.send(&[IoSlice::new(b"x")]).is_err());
    });
    drop(client);
}

#[test]
fn keys_are_changed_without_end() {
    let key = std::array::from_fn(|i| i as u8);
    let lines = "a:000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f\n";
    let (server, client) = super::rig::connect(psk_server(lines), psk_client("a", key));
    let (server, mut client) = (server.unwrap(), client.unwrap());
    for round in 0..2000u32 {
        client.conn.refresh_traffic_keys().unwrap();
        client.write_all(&round.to_le_bytes()).unwrap();
        let mut buf = [0; 4];
        assert_eq!(server.recv(&mut buf).unwrap(), 4);
        assert_eq!(u32::from_le_bytes(buf), round);
        if round % 100 == 0 {
            server.send(&[IoSlice::new(&buf)]).unwrap();
            client.read_exact(&mut buf).unwrap();
            assert_eq!(u32::from_le_bytes(buf), round);
        }
    }
}
