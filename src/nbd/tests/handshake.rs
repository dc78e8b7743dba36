//! Option haggling.

use super::client::{Ask, Client, info, option_bytes, queries};
use super::export::SIZE;
use super::*;
use crate::error::Result;
use crate::nbd::proto::{Style, command, info as kinds, option, reply};
use crate::nbd::transport::{Socket, Tls, Transport};

#[test]
fn unknown_client_flags_end_the_connection() {
    let rig = Rig::new();
    let mut client = Client::greeted(&rig.path);
    client.put(&4u32.to_be_bytes());
    client.assert_closed();
}

#[test]
fn without_fixed_newstyle_only_export_name_is_taken() {
    let rig = Rig::new();
    let mut client = Client::greeted(&rig.path);
    client.put(&0u32.to_be_bytes());
    client.send_option(option::LIST, b"");
    client.assert_closed();
    let mut client = Client::greeted(&rig.path);
    client.put(&0u32.to_be_bytes());
    client.send_option(option::EXPORT_NAME, b"vda");
    assert_eq!(client.get(8), SIZE.to_be_bytes());
    assert_eq!(client.get(2 + 124)[2..], [0; 124]);
    assert_eq!(client.run(Ask { command: command::READ, len: 9, ..Ask::default() }), (0, vec![0; 9]));
}

#[test]
fn export_name_has_no_zeroes_for_who_wants_none_and_ends_where_there_is_no_export() {
    let rig = Rig::new();
    let mut client = rig.client();
    client.send_option(option::EXPORT_NAME, b"s/vda");
    assert_eq!(client.get(8), SIZE.to_be_bytes());
    // HAS_FLAGS, READ_ONLY, FLUSH, FUA, CAN_MULTI_CONN, CACHE.
    assert_eq!(client.get(2), 0b101_0000_1111u16.to_be_bytes());
    assert_eq!(client.run(Ask { command: command::FLUSH, ..Ask::default() }).0, 0);
    for name in [&b"none"[..], b"\xff", &[b'x'; 70_000]] {
        let mut client = rig.client();
        client.send_option(option::EXPORT_NAME, name);
        client.assert_closed();
    }
}

#[test]
fn unknown_options_are_answered_and_skipped_up_to_their_limits() {
    let rig = Rig::new();
    let mut client = rig.client();
    assert_eq!(client.option(4, b"abc").0, reply::ERR_UNSUP);
    assert_eq!(client.option(4711, &vec![1; 64 << 10]).0, reply::ERR_UNSUP);
    assert_eq!(client.option(4711, &vec![1; (64 << 10) + 1]).0, reply::ERR_TOO_BIG);
    assert_eq!(client.option(4711, &vec![1; 1 << 20]).0, reply::ERR_TOO_BIG);
    assert_eq!(client.option(option::ABORT, b"ignored").0, reply::ACK);
    client.assert_closed();
    let mut client = rig.client();
    client.put(&option_bytes(4711, &[])[..12]);
    client.put(&((1u32 << 20) + 1).to_be_bytes());
    client.assert_closed();
    let mut client = rig.client();
    client.put(b"IHAVEOPX\0\0\0\x03\0\0\0\0");
    client.assert_closed();
}

#[test]
fn names_are_taken_up_to_4096_bytes() {
    let rig = Rig::new();
    let mut client = rig.client();
    let mut go = |name: &[u8]| client.option(option::GO, &info(name, &[])).0;
    assert_eq!(go(&[b'x'; 4096]), reply::ERR_UNKNOWN);
    assert_eq!(go(&[b'x'; 4097]), reply::ERR_TOO_BIG);
    assert_eq!(go(b"a\0b"), reply::ERR_INVALID);
    assert_eq!(go(b"\xff\xfe"), reply::ERR_INVALID);
    assert_eq!(go(b"busy"), reply::ERR_POLICY);
    let whole = info("vda", &[1, 2]);
    for len in 0..whole.len() {
        assert_eq!(client.option(option::INFO, &whole[..len]).0, reply::ERR_INVALID, "{len}");
    }
    assert_eq!(client.option(option::INFO, &[&whole[..], b"x"].concat()).0, reply::ERR_INVALID);
    assert_eq!(client.option(option::GO, &whole).0, reply::ACK);
}

#[test]
fn exports_are_listed() {
    let rig = Rig::new();
    let mut client = rig.client();
    let (kind, list) = client.option(option::LIST, b"");
    assert_eq!((kind, list), (reply::ACK, vec![b"\0\0\0\x03vdalive".to_vec(), b"\0\0\0\x05s/vda".to_vec()]));
    assert_eq!(client.option(option::LIST, b"x").0, reply::ERR_INVALID);
}

#[test]
fn info_says_what_it_is_asked_for() {
    let rig = Rig::new();
    let mut client = rig.client();
    let (kind, replies) = client.option(option::INFO, &info("vda", &[]));
    assert_eq!((kind, replies.len(), replies[0].len()), (reply::ACK, 1, 12));
    assert_eq!(client.option(option::STRUCTURED_REPLY, b"").0, reply::ACK);
    let all = [kinds::NAME, kinds::DESCRIPTION, kinds::BLOCK_SIZE, 99];
    for option in [option::INFO, option::GO] {
        let (kind, replies) = client.option(option, &info("vda", &all));
        assert_eq!((kind, replies.len()), (reply::ACK, 4));
        // All flags but READ_ONLY and ROTATIONAL.
        assert_eq!(replies[0], [&[0, 0], &SIZE.to_be_bytes()[..], &0b1101_1110_1101u16.to_be_bytes()].concat());
        assert_eq!(replies[1], b"\0\x01vda");
        assert_eq!(replies[2], b"\0\x02in memory");
        assert_eq!(replies[3], [0, 3, 0, 0, 0, 1, 0, 0, 16, 0, 2, 0, 0, 0]);
    }
    client.style = Style::Structured;
    assert_eq!(client.run(Ask { command: command::FLUSH, ..Ask::default() }).0, 0);
}

#[test]
fn replies_become_structured_once_and_extended_once() {
    let rig = Rig::new();
    let mut client = rig.client();
    assert_eq!(client.option(option::STRUCTURED_REPLY, b"x").0, reply::ERR_INVALID);
    assert_eq!(client.option(option::STRUCTURED_REPLY, b"").0, reply::ACK);
    assert_eq!(client.option(option::STRUCTURED_REPLY, b"").0, reply::ERR_INVALID);
    assert_eq!(client.option(option::EXTENDED_HEADERS, b"").0, reply::ACK);
    assert_eq!(client.option(option::EXTENDED_HEADERS, b"").0, reply::ERR_INVALID);
    assert_eq!(client.option(option::STRUCTURED_REPLY, b"").0, reply::ERR_EXT_HEADER_REQD);
}

#[test]
fn contexts_are_listed_by_query() {
    let rig = Rig::new();
    let mut client = rig.client();
    let list = option::LIST_META_CONTEXT;
    assert_eq!(client.option(list, &queries("vda", &[])).0, reply::ERR_INVALID);
    assert_eq!(client.option(option::STRUCTURED_REPLY, b"").0, reply::ACK);
    let (base, a, b) = ("base:allocation", "qemu:dirty-bitmap:a", "qemu:dirty-bitmap:b");
    let cases: [(&[&str], &[&str]); 9] = [
        (&[], &[base, a, b, "qemu:other"]),
        (&["base:"], &[base]),
        (&["qemu:"], &[a, b, "qemu:other"]),
        (&["qemu:dirty-bitmap:"], &[a, b]),
        (&[b], &[b]),
        (&[b, "qemu:dirty-bitmap:", "base:"], &[base, a, b]),
        (&["qemu:dirty"], &[]),
        (&["x-other:", "base:none"], &[]),
        (&["qemu:dirty-bitmap:none"], &[]),
    ];
    for (asked, found) in cases {
        let (kind, replies) = client.option(list, &queries("vda", asked));
        let names: Vec<_> = replies.iter().map(|reply| std::str::from_utf8(&reply[4..]).unwrap()).collect();
        assert_eq!((kind, &names[..]), (reply::ACK, found), "{asked:?}");
    }
    assert_eq!(client.option(list, &queries("none", &[])).0, reply::ERR_UNKNOWN);
    assert_eq!(client.option(list, &queries("vda", &["colonless"])).0, reply::ERR_INVALID);
    assert_eq!(client.option(list, &queries("vda", &["a:"; 512])).0, reply::ACK);
    assert_eq!(client.option(list, &queries("vda", &["a:"; 513])).0, reply::ERR_TOO_BIG);
    // A namespace selects nothing.
    let set = client.option(option::SET_META_CONTEXT, &queries("vda", &["base:", "qemu:"]));
    assert_eq!(set, (reply::ACK, vec![]));
}

#[test]
fn contexts_count_for_the_export_they_were_set_for_and_until_the_next_set() {
    let rig = Rig::new();
    let set = |client: &mut Client, export, asked: &[&str]| {
        client.option(option::SET_META_CONTEXT, &queries(export, asked)).0
    };
    let status = |mut client: Client| {
        assert_eq!(client.option(option::GO, &info("vda", &[])).0, reply::ACK);
        client.style = Style::Structured;
        client.run(Ask { command: command::BLOCK_STATUS, len: 512, ..Ask::default() }).0
    };
    let fresh = || {
        let mut client = rig.client();
        assert_eq!(client.option(option::STRUCTURED_REPLY, b"").0, reply::ACK);
        client
    };
    let mut client = fresh();
    assert_eq!(set(&mut client, "vda", &["base:allocation"]), reply::ACK);
    assert_eq!(status(client), 0);
    let mut client = fresh();
    assert_eq!(set(&mut client, "s/vda", &["base:allocation"]), reply::ACK);
    assert_eq!(status(client), 22);
    let mut client = fresh();
    assert_eq!(set(&mut client, "vda", &["base:allocation"]), reply::ACK);
    assert_eq!(set(&mut client, "vda", &["colonless"]), reply::ERR_INVALID);
    assert_eq!(status(client), 22);
}

/// No secrets: the bytes go on as they were.
struct Mask;

impl Tls for Mask {
    fn accept(&self, socket: Arc<Socket>) -> Result<Arc<dyn Transport>> {
        Ok(socket)
    }
}

#[test]
fn without_tls_starttls_is_refused() {
    let rig = Rig::new();
    let mut client = rig.client();
    assert_eq!(client.option(option::STARTTLS, b"").0, reply::ERR_POLICY);
    assert_eq!(client.option(option::LIST, b"").0, reply::ACK);
}

#[test]
fn where_tls_is_required_nothing_is_said_before() {
    let rig = Rig::with(ServerOptions { tls: Some(Arc::new(Mask)), tls_required: true, ..ServerOptions::default() });
    let mut client = rig.client();
    for option in [option::LIST, option::INFO, option::GO, option::STRUCTURED_REPLY, option::SET_META_CONTEXT, 4711] {
        assert_eq!(client.option(option, &info("vda", &[])).0, reply::ERR_TLS_REQD, "{option}");
    }
    assert_eq!(client.option(option::STARTTLS, b"x").0, reply::ERR_INVALID);
    assert_eq!(client.option(option::STARTTLS, b"").0, reply::ACK);
    assert_eq!(client.option(option::STARTTLS, b"").0, reply::ERR_INVALID);
    assert_eq!(client.option(option::LIST, b"").0, reply::ACK);
    assert_eq!(client.option(option::GO, &info("vda", &[])).0, reply::ACK);
    let mut client = rig.client();
    client.send_option(option::EXPORT_NAME, b"vda");
    client.assert_closed();
    assert_eq!(rig.client().option(option::ABORT, b"").0, reply::ACK);
}

#[test]
fn starttls_forgets_what_was_agreed_and_takes_no_data_in_the_clear() {
    let rig = Rig::with(ServerOptions { tls: Some(Arc::new(Mask)), ..ServerOptions::default() });
    let mut client = rig.client();
    assert_eq!(client.option(option::STRUCTURED_REPLY, b"").0, reply::ACK);
    assert_eq!(client.option(option::STARTTLS, b"").0, reply::ACK);
    let set = client.option(option::SET_META_CONTEXT, &queries("vda", &["base:allocation"]));
    assert_eq!(set.0, reply::ERR_INVALID);
    let mut client = rig.client();
    client.put(&[option_bytes(option::STARTTLS, b""), option_bytes(option::LIST, b"")].concat());
    client.assert_closed();
}

#[test]
fn options_are_counted() {
    let rig = Rig::new();
    let mut client = rig.client();
    for _ in 0..4096 {
        assert_eq!(client.option(4711, b"").0, reply::ERR_UNSUP);
    }
    client.assert_closed();
}
