//! What a client sends to the NBD server. Input: a byte of choices, then the client's bytes.
//!
//! Choices: bit 0, TLS is required (there is none, so that little is said); bits 1 to 3, how few bytes arrive at a time.
//!
//! One thread, no sockets. What holds: no panic; the export sees only ranges that lie inside of it, and no change where it
//! is read-only; what the server sends is whole messages in the order of the protocol; no memory is kept.

use fleecefs::error::{Error, Result, errno};
use fleecefs::nbd::export::{Context, Export, Exports, Run, Zeroes};
use fleecefs::nbd::handshake::{Offer, shake};
use fleecefs::nbd::house::House;
use fleecefs::nbd::memory::MEMORY_MAX_BYTES;
use fleecefs::nbd::proto::{self, Style, chunk, reply};
use fleecefs::nbd::session::Session;
use fleecefs::nbd::transport::Transport;
use std::io::{self, IoSlice};
use std::sync::{Arc, Mutex};

const SIZE: u64 = 16 << 10;

/// Runs the target.
pub fn run(input: &[u8]) {
    let [choices, bytes @ ..] = input else { return };
    let at_once = [usize::MAX, 1, 2, 7, 29, 64, 1000, 4096][usize::from(choices >> 1 & 7)];
    let client = Arc::new(Client { state: Mutex::new((bytes.to_vec(), 0)), at_once, sent: Mutex::default() });
    let offer = Offer { exports: &Shelf, tls: None, tls_required: choices & 1 == 1, entering: &|_| () };
    let mut style = None;
    if let Ok(Some(agreed)) = shake(client.clone(), None, offer) {
        style = Some(agreed.style);
        let house = House::new(MEMORY_MAX_BYTES, 1);
        Session::new(agreed, house.clone()).run();
        assert_eq!(house.panics(), 0);
        assert_eq!(house.memory.used(), 0);
    }
    let no_zeroes = bytes.get(3).is_some_and(|flags| flags & 2 != 0);
    check(&client.sent.lock().expect("nobody panicked"), style, no_zeroes);
}

struct Client {
    state: Mutex<(Vec<u8>, usize)>,
    at_once: usize,
    sent: Mutex<Vec<u8>>,
}

impl Transport for Client {
    fn recv(&self, buf: &mut [u8]) -> io::Result<usize> {
        let (bytes, at) = &mut *self.state.lock().expect("nobody panicked");
        assert!(!buf.is_empty());
        let count = buf.len().min(bytes.len() - *at).min(self.at_once);
        buf[..count].copy_from_slice(&bytes[*at..*at + count]);
        *at += count;
        Ok(count)
    }

    fn send(&self, parts: &[IoSlice<'_>]) -> io::Result<()> {
        let mut sent = self.sent.lock().expect("nobody panicked");
        parts.iter().for_each(|part| sent.extend_from_slice(part));
        Ok(())
    }

    fn shutdown(&self) {}
}

/// A cursor that panics where the server sent too little.
struct Sent<'a>(&'a [u8]);

impl Sent<'_> {
    fn take(&mut self, count: usize) -> &[u8] {
        let (taken, rest) = self.0.split_at(count);
        self.0 = rest;
        taken
    }

    fn number(&mut self, bytes: usize) -> u64 {
        self.take(bytes).iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte))
    }
}

fn check(sent: &[u8], style: Option<Style>, no_zeroes: bool) {
    let mut sent = Sent(sent);
    assert_eq!(sent.take(18), b"NBDMAGICIHAVEOPT\0\x03");
    let mut entered = false;
    while !entered && !sent.0.is_empty() {
        if sent.0[..8] != proto::OPTION_REPLY_MAGIC.to_be_bytes() {
            assert_eq!(sent.number(8), SIZE);
            sent.take(if no_zeroes { 2 } else { 2 + 124 });
            entered = true;
            continue;
        }
        let (_, option, kind, len) = (sent.number(8), sent.number(4), sent.number(4) as u32, sent.number(4));
        assert!(len <= 2 * 4096 + 16);
        let data = sent.take(len as usize);
        let known = kind >> 31 == 1 || (reply::ACK..=reply::META_CONTEXT).contains(&kind);
        assert!(known && (kind != reply::ACK || data.is_empty()));
        entered = option == u64::from(proto::option::GO) && kind == reply::ACK;
    }
    assert_eq!(entered, style.is_some());
    match style {
        // Without what was asked nobody can tell how long its data is.
        None | Some(Style::Simple) => (),
        Some(style) => chunks(&mut sent, style),
    }
}

fn chunks(sent: &mut Sent<'_>, style: Style) {
    let extended = style == Style::Extended;
    let magic = if extended { proto::EXTENDED_REPLY_MAGIC } else { proto::STRUCTURED_REPLY_MAGIC };
    let mut open = None;
    while !sent.0.is_empty() {
        assert_eq!(sent.number(4), u64::from(magic));
        let (flags, kind, cookie) = (sent.number(2) as u16, sent.number(2) as u16, sent.number(8));
        let len = if extended { (sent.number(8), sent.number(8)).1 } else { sent.number(4) };
        assert!(len <= SIZE + 8, "{len}");
        let data = sent.take(len as usize);
        assert!(flags <= chunk::DONE && open.is_none_or(|open| open == cookie));
        open = (flags != chunk::DONE).then_some(cookie);
        match kind {
            chunk::NONE => assert!(data.is_empty() && flags == chunk::DONE),
            chunk::OFFSET_DATA => assert!(data.len() > 8),
            chunk::BLOCK_STATUS => assert!(!extended && data.len() >= 12 && data.len() % 8 == 4),
            chunk::BLOCK_STATUS_EXT => assert!(extended && data.len() >= 24 && data.len() % 16 == 8),
            chunk::ERROR => assert!(data.len() >= 6 && data[..4] != [0; 4]),
            _ => panic!("chunk of type {kind}"),
        }
    }
    assert_eq!(open, None);
}

struct Shelf;

impl Exports for Shelf {
    fn list(&self) -> Vec<(String, String)> {
        vec![("vda".into(), "live".into()), ("s/vda".into(), "frozen".into())]
    }

    fn open(&self, name: &str) -> Result<Arc<dyn Export>> {
        match name {
            "vda" => Ok(Arc::new(Disk { read_only: false })),
            "s/vda" => Ok(Arc::new(Disk { read_only: true })),
            _ => Err(Error::new(errno::ENOENT, format!("export '{name}'"), "there is none")),
        }
    }
}

struct Disk {
    read_only: bool,
}

impl Disk {
    fn may(&self, changes: bool, offset: u64, len: u64) -> Result<()> {
        assert!(offset.checked_add(len).is_some_and(|end| end <= SIZE), "{offset}+{len}");
        assert!(!(changes && self.read_only));
        Ok(())
    }
}

impl Export for Disk {
    fn size(&self) -> u64 {
        SIZE
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn description(&self) -> String {
        "of nothing".into()
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        buf.fill(7);
        self.may(false, offset, buf.len() as u64)
    }

    fn write(&self, data: &[u8], offset: u64) -> Result<()> {
        self.may(true, offset, data.len() as u64)
    }

    fn write_zeroes(&self, offset: u64, len: u64, how: Zeroes) -> Result<()> {
        self.may(true, offset, len)?;
        if how.only_fast { Err(Error::new(errno::EOPNOTSUPP, "write zeroes", "not fast")) } else { Ok(()) }
    }

    fn trim(&self, offset: u64, len: u64) -> Result<()> {
        self.may(true, offset, len)
    }

    fn cache(&self, offset: u64, len: u64) -> Result<()> {
        self.may(false, offset, len)
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn contexts(&self) -> Vec<String> {
        ["base:allocation", "qemu:dirty-bitmap:a"].map(String::from).into()
    }

    fn context(&self, _: &str) -> Option<Arc<dyn Context>> {
        Some(Arc::new(Stripes))
    }
}

struct Stripes;

impl Context for Stripes {
    fn run(&self, offset: u64, len: u64) -> Result<Run> {
        assert!(len > 0 && offset.checked_add(len).is_some_and(|end| end <= SIZE), "{offset}+{len}");
        Ok(Run { flags: (offset / 4096 % 3) as u32, len: len.min(2048 - offset % 2048) })
    }
}
