//! Who gets in, and who does not.

use super::rig::{
    Authority, LATER, accepting, connect, fill, pair, psk_client, psk_server, shake, x509_client, x509_client_with,
    x509_server,
};
use crate::error::errno;
use crate::nbd::tls::server::TlsServer;
use crate::nbd::transport::{Socket, Tls, Transport};
use rustls::crypto::ring;
use rustls::version::{TLS12, TLS13};
use std::fs;
use std::io::{IoSlice, Read, Write};
use std::sync::Arc;

const ALICE: &str = "alice:000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f\n";

fn key() -> [u8; 32] {
    std::array::from_fn(|i| i as u8)
}

#[test]
fn both_versions_carry_data_both_ways() {
    for version in [&TLS12, &TLS13] {
        let (server, mut client) = pair(version);
        client.write_all(b"from the client").unwrap();
        let mut buf = [0; 100];
        let count = server.recv(&mut buf).unwrap();
        assert_eq!(&buf[..count], b"from the client");
        server.send(&[IoSlice::new(b"from "), IoSlice::new(b""), IoSlice::new(b"the server")]).unwrap();
        let mut got = [0; 15];
        client.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"from the server");
    }
}

#[test]
fn tls_1_2_is_not_spoken_with_a_cipher_that_wears_out() {
    let (authority, server) = x509_server(false);
    let mut provider = ring::default_provider();
    provider.cipher_suites.retain(|suite| !format!("{suite:?}").contains("CHACHA20"));
    let config = x509_client_with(provider, &authority, &TLS12, None);
    let (server, client) = connect(server, config);
    assert_eq!(server.err().unwrap().errno(), errno::EACCES);
    assert!(client.unwrap_err().to_string().contains("HandshakeFailure"));
}

#[test]
fn a_client_without_a_good_certificate_is_refused_where_one_is_required() {
    for version in [&TLS12, &TLS13] {
        let (authority, server) = x509_server(true);
        let (server, _) = connect(server, x509_client(&authority, version, None));
        assert!(server.err().unwrap().to_string().contains("peer sent no certificates"));

        let (authority, server) = x509_server(true);
        let stranger = Authority::new("another authority").issue(2, LATER);
        let (server, _) = connect(server, x509_client(&authority, version, Some(&stranger)));
        assert!(server.err().unwrap().to_string().contains("UnknownIssuer"));

        let (authority, server) = x509_server(true);
        let expired = authority.issue(2, 2020);
        let (server, _) = connect(server, x509_client(&authority, version, Some(&expired)));
        assert!(server.err().unwrap().to_string().contains("xpired"));

        let (authority, server) = x509_server(true);
        let good = authority.issue(2, LATER);
        let (server, _) = connect(server, x509_client(&authority, version, Some(&good)));
        server.unwrap();
    }
}

#[test]
fn a_revoked_certificate_is_refused_and_so_is_an_old_list() {
    for (revoked, until, expected) in [(7, LATER, "Revoked"), (8, LATER, ""), (8, 2021, "xpired")] {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::new("authority");
        fill(dir.path(), &authority, &authority.issue(1, LATER));
        fs::write(dir.path().join("ca-crl.pem"), authority.revoke(revoked, until)).unwrap();
        let server = TlsServer::x509(dir.path(), true, true).unwrap();
        let (server, _) = connect(server, x509_client(&authority, &TLS13, Some(&authority.issue(7, LATER))));
        match expected {
            "" => drop(server.unwrap()),
            text => assert!(server.err().unwrap().to_string().contains(text), "{text}"),
        }
    }
}

#[test]
fn a_pre_shared_key_lets_its_user_in() {
    let (server, client) = connect(psk_server(ALICE), psk_client("alice", key()));
    let (server, mut client) = (server.unwrap(), client.unwrap());
    client.write_all(b"hello").unwrap();
    let mut buf = [0; 5];
    assert_eq!(server.recv(&mut buf).unwrap(), 5);
    server.send(&[IoSlice::new(&buf)]).unwrap();
    client.read_exact(&mut [0; 5]).unwrap();
}

#[test]
fn another_key_and_an_unknown_user_are_refused() {
    let mut wrong = key();
    wrong[31] ^= 1;
    let (server, client) = connect(psk_server(ALICE), psk_client("alice", wrong));
    let e = server.err().unwrap();
    assert_eq!((e.errno(), e.to_string().contains("key of user 'alice'")), (errno::EACCES, true), "{e}");
    assert!(client.is_err());

    let (server, client) = connect(psk_server(ALICE), psk_client("bo\x1bb", key()));
    let e = server.err().unwrap();
    assert_eq!(e.to_string(), "TLS handshake: no user 'bo\\x1bb'");
    assert!(client.is_err());
}

#[test]
fn a_client_without_a_key_gets_no_certificate_from_a_server_with_keys() {
    let (authority, _) = x509_server(false);
    for version in [&TLS12, &TLS13] {
        let (server, client) = connect(psk_server(ALICE), x509_client(&authority, version, None));
        assert_eq!(server.err().unwrap().errno(), errno::EACCES);
        assert!(client.is_err());
    }
}

#[test]
fn what_is_no_handshake_is_refused() {
    let (authority, server) = x509_server(false);
    let (server, mut socket) = accepting(server);
    socket.write_all(b"NBDMAGICIHAVEOPT and so on, in the clear").unwrap();
    assert_eq!(server.join().unwrap().err().unwrap().errno(), errno::EACCES);

    // A handshake that ends in the midst of the client's first message, and behind it.
    let mut hello = Vec::new();
    let config = x509_client(&authority, &TLS13, None);
    let mut client = rustls::ClientConnection::new(config.into(), "localhost".try_into().unwrap()).unwrap();
    client.write_tls(&mut hello).unwrap();
    for length in [0, 1, 5, 6, 100, hello.len() - 1, hello.len()] {
        let (_, server) = x509_server(false);
        let (server, mut socket) = accepting(server);
        socket.write_all(&hello[..length]).unwrap();
        socket.shutdown(std::net::Shutdown::Write).unwrap();
        let e = server.join().unwrap().err().unwrap();
        assert_eq!(e.to_string(), "TLS handshake: the client went away", "{length} bytes");
    }
}

#[test]
fn a_handshake_ends_with_its_socket() {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let socket = Arc::new(Socket::Unix(ours));
    let waiting = socket.clone();
    let (_, server) = x509_server(false);
    let server = std::thread::spawn(move || server.accept(waiting));
    (&theirs).write_all(&[22, 3, 1]).unwrap();
    socket.shutdown();
    assert_eq!(server.join().unwrap().err().unwrap().to_string(), "TLS handshake: the client went away");
}

#[test]
fn each_connection_proves_itself_anew() {
    // A client that keeps its sessions gets none to keep.
    let (authority, _) = x509_server(false);
    let dir = tempfile::tempdir().unwrap();
    fill(dir.path(), &authority, &authority.issue(1, LATER));
    for version in [&TLS12, &TLS13] {
        let config = x509_client(&authority, version, None);
        for _ in 0..2 {
            let (server, socket) = accepting(TlsServer::x509(dir.path(), false, true).unwrap());
            let mut client = shake(config.clone(), socket).unwrap();
            let server = server.join().unwrap().unwrap();
            assert_eq!(client.conn.handshake_kind(), Some(rustls::HandshakeKind::Full));
            server.send(&[IoSlice::new(b"x")]).unwrap();
            client.read_exact(&mut [0]).unwrap();
        }
    }
}
