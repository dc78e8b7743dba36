//! What is decoded is what was encoded; of any bytes nothing panics.

use super::bytes::{Bytes, Malformed, string};
use super::options::{ContextRequest, InfoRequest, OPTION_HEADER_BYTES, OptionHeader, put_reply, put_server};
use super::replies::{Extents, Head};
use super::requests::{Request, header_bytes};
use super::*;
use proptest::prelude::{Just, Strategy, any, prop_assert, prop_assert_eq, prop_oneof, proptest};

fn style() -> impl Strategy<Value = Style> {
    prop_oneof![Just(Style::Simple), Just(Style::Structured), Just(Style::Extended)]
}

fn encoded(request: &Request, style: Style) -> Vec<u8> {
    let mut bytes = Vec::new();
    let extended = style == Style::Extended;
    bytes.extend(if extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC }.to_be_bytes());
    bytes.extend(request.flags.to_be_bytes());
    bytes.extend(request.command.to_be_bytes());
    bytes.extend(request.cookie.to_be_bytes());
    bytes.extend(request.offset.to_be_bytes());
    match extended {
        true => bytes.extend(request.len.to_be_bytes()),
        false => bytes.extend((request.len as u32).to_be_bytes()),
    }
    bytes
}

fn encoded_contexts(name: &str, queries: &[String]) -> Vec<u8> {
    let put = |bytes: &mut Vec<u8>, text: &str| {
        bytes.extend((text.len() as u32).to_be_bytes());
        bytes.extend(text.as_bytes());
    };
    let mut bytes = Vec::new();
    put(&mut bytes, name);
    bytes.extend((queries.len() as u32).to_be_bytes());
    queries.iter().for_each(|query| put(&mut bytes, query));
    bytes
}

proptest! {
    #[test]
    fn requests_are_decoded_as_they_were_encoded(
        (flags, command, cookie, offset, len) in any::<(u16, u16, u64, u64, u64)>(),
        style in style(),
    ) {
        let len = if style == Style::Extended { len } else { len & 0xffff_ffff };
        let request = Request { flags, command, cookie, offset, len };
        let bytes = encoded(&request, style);
        prop_assert_eq!(bytes.len(), header_bytes(style));
        prop_assert_eq!(Request::decode(&bytes, style), Some(request));
        let other = if style == Style::Extended { Style::Simple } else { Style::Extended };
        prop_assert_eq!(Request::decode(&bytes, other), None);
        prop_assert_eq!(request.ends_behind(u64::MAX), offset.checked_add(len).is_none());
    }

    #[test]
    fn any_bytes_are_decoded_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), style in style()) {
        let _ = Request::decode(&bytes, style);
        if let Some(header) = bytes.first_chunk::<OPTION_HEADER_BYTES>() {
            let _ = OptionHeader::decode(header);
        }
        if let Ok(info) = InfoRequest::decode(&bytes) {
            prop_assert!(info.name.len() + 6 <= bytes.len());
        }
        if let Ok(contexts) = ContextRequest::decode(&bytes) {
            prop_assert_eq!(contexts.queries().count(), contexts.count as usize);
        }
    }

    #[test]
    fn queries_are_decoded_as_they_were_encoded(name in ".{0,40}", queries in proptest::collection::vec("[a-z:]{0,12}", 0..9)) {
        let bytes = encoded_contexts(&name, &queries);
        let decoded = ContextRequest::decode(&bytes);
        if name.contains('\0') {
            prop_assert!(decoded.is_err());
            return Ok(());
        }
        let decoded = decoded.unwrap();
        prop_assert_eq!(decoded.name, name);
        prop_assert!(decoded.queries().eq(queries.iter().map(String::as_str)));
        for end in 0..bytes.len() {
            prop_assert!(ContextRequest::decode(&bytes[..end]).is_err());
        }
    }

    #[test]
    fn texts_are_clipped_at_a_character(text in "\\PC{0,3000}") {
        let clipped = clip(&text);
        prop_assert!(clipped.len() <= STRING_MAX_BYTES && text.starts_with(clipped));
        prop_assert!(clipped.len() == text.len() || clipped.len() > STRING_MAX_BYTES - 4);
        let mut out = Vec::new();
        put_reply(&mut out, 3, reply::ERR_UNSUP, &text);
        prop_assert_eq!(out.len(), 20 + clipped.len());
        prop_assert_eq!(&out[16..20], (clipped.len() as u32).to_be_bytes());
        out.clear();
        put_server(&mut out, 3, &text, "x");
        prop_assert_eq!(&out[16..20], (clipped.len() as u32 + 5).to_be_bytes());
    }
}

const REQUEST: Request = Request { flags: 0, command: 7, cookie: 0x0102_0304_0506_0708, offset: 9, len: 10 };
const COOKIE: [u8; 8] = [1, 2, 3, 4, 5, 6, 7, 8];

#[test]
fn heads_are_as_the_specification_draws_them() {
    let simple = [&[0x67, 0x44, 0x66, 0x98, 0, 0, 0, 5][..], &COOKIE].concat();
    assert_eq!(Head::simple(&REQUEST, 5).as_bytes(), simple);
    let chunk = |flags: u8, kind: [u8; 2], len: u8, rest: &[u8]| {
        [&[0x66, 0x8e, 0x33, 0xef, 0, flags][..], &kind, &COOKIE, &[0, 0, 0, len], rest].concat()
    };
    let extended = |flags: u8, kind: [u8; 2], len: u8, rest: &[u8]| {
        let place = [0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, len];
        [&[0x6e, 0x8a, 0x27, 0x8c, 0, flags][..], &kind, &COOKIE, &place, rest].concat()
    };
    let (short, long) = (Style::Structured, Style::Extended);
    assert_eq!(Head::none(short, &REQUEST).as_bytes(), chunk(1, [0, 0], 0, &[]));
    assert_eq!(Head::none(long, &REQUEST).as_bytes(), extended(1, [0, 0], 0, &[]));
    let offset = [0, 0, 0, 0, 0, 0, 0, 11];
    assert_eq!(Head::data(short, &REQUEST, true, 11, 3).as_bytes(), chunk(1, [0, 1], 11, &offset));
    assert_eq!(Head::data(long, &REQUEST, false, 11, 3).as_bytes(), extended(0, [0, 1], 11, &offset));
    assert_eq!(Head::error(short, &REQUEST, 22, "no").as_bytes(), chunk(1, [0x80, 1], 8, &[0, 0, 0, 22, 0, 2]));
    let mut extents = Extents::default();
    extents.push(short, 512, 3);
    assert_eq!(extents.as_bytes(), [0, 0, 2, 0, 0, 0, 0, 3]);
    assert_eq!(Head::status(short, &REQUEST, true, 4, &extents).as_bytes(), chunk(1, [0, 5], 12, &[0, 0, 0, 4]));
    extents.clear();
    extents.push(long, 1 << 40, 3);
    assert_eq!(extents.as_bytes(), [0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3]);
    let status = Head::status(long, &REQUEST, false, 4, &extents);
    assert_eq!(status.as_bytes(), extended(0, [0, 6], 24, &[0, 0, 0, 4, 0, 0, 0, 1]));
}

#[test]
fn strings_and_queries_have_limits() {
    assert!(string(&[b'x'; STRING_MAX_BYTES]).is_ok());
    assert!(matches!(string(&[b'x'; STRING_MAX_BYTES + 1]), Err(Malformed::TooBig(_))));
    assert!(matches!(string(b"\xc3"), Err(Malformed::Invalid(_))));
    let queries = vec![String::new(); QUERIES_MAX as usize];
    assert!(ContextRequest::decode(&encoded_contexts("a", &queries)).is_ok());
    let queries = vec![String::new(); QUERIES_MAX as usize + 1];
    assert!(matches!(ContextRequest::decode(&encoded_contexts("a", &queries)), Err(Malformed::TooBig(_))));
    // A number of theirs is no reason to reserve anything.
    assert!(matches!(Bytes(&[0xff; 8]).string(), Err(Malformed::Invalid(_))));
}

#[test]
fn errors_have_their_values_on_the_wire() {
    let cases = [(1, 1), (13, 1), (30, 1), (5, 5), (2, 5), (110, 5), (12, 12), (22, 22), (28, 28), (122, 28), (75, 75)];
    for (errno, wire) in cases.into_iter().chain([(27, 28), (95, 95), (108, 108)]) {
        assert_eq!(wire_error(errno), wire, "{errno}");
    }
}
