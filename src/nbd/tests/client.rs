//! A small client. It checks no more than it is asked to.

use crate::nbd::proto::{self, Style, chunk, option, reply};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// One connection.
pub struct Client {
    pub stream: UnixStream,
    pub style: Style,
    cookie: u64,
}

/// A request as it goes out.
#[derive(Clone, Copy, Default)]
pub struct Ask<'a> {
    pub flags: u16,
    pub command: u16,
    pub offset: u64,
    pub len: u64,
    pub data: &'a [u8],
}

/// One message of a reply.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    pub cookie: u64,
    pub done: bool,
    /// Of a chunk; 0 for a simple reply.
    pub kind: u16,
    pub error: u32,
    /// Without fixed fields of errors; of a simple reply what the caller knows to come.
    pub data: Vec<u8>,
}

impl Client {
    /// Through the greeting, with all client flags.
    pub fn connect(path: &Path) -> Client {
        let mut client = Client::greeted(path);
        client.put(&3u32.to_be_bytes());
        client
    }

    /// The client's flags are still to be sent.
    pub fn greeted(path: &Path) -> Client {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let mut client = Client { stream, style: Style::Simple, cookie: 0 };
        assert_eq!(client.get(18), b"NBDMAGICIHAVEOPT\0\x03");
        client
    }

    pub fn put(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    pub fn get(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.stream.read_exact(&mut bytes).unwrap();
        bytes
    }

    fn u32(&mut self) -> u32 {
        u32::from_be_bytes(self.get(4).try_into().unwrap())
    }

    fn u64(&mut self) -> u64 {
        u64::from_be_bytes(self.get(8).try_into().unwrap())
    }

    /// The server has closed the connection, and sent nothing more.
    pub fn assert_closed(&mut self) {
        let mut byte = [0];
        match self.stream.read(&mut byte) {
            Ok(0) => (),
            Err(e) if e.kind() == ErrorKind::ConnectionReset => (),
            other => panic!("not closed: {other:?} {byte:?}"),
        }
    }

    pub fn send_option(&mut self, option: u32, data: &[u8]) {
        self.put(&option_bytes(option, data));
    }

    /// One reply to an option: its type and data.
    pub fn option_reply(&mut self, option: u32) -> (u32, Vec<u8>) {
        assert_eq!(self.u64(), proto::OPTION_REPLY_MAGIC);
        assert_eq!(self.u32(), option);
        let kind = self.u32();
        let len = self.u32() as usize;
        (kind, self.get(len))
    }

    /// An option with all its replies; the last one's type, and the data of those before.
    pub fn option(&mut self, option: u32, data: &[u8]) -> (u32, Vec<Vec<u8>>) {
        self.send_option(option, data);
        let mut replies = Vec::new();
        loop {
            let (kind, data) = self.option_reply(option);
            if kind == reply::ACK || kind >> 31 == 1 {
                return (kind, replies);
            }
            replies.push(data);
        }
    }

    /// Enters an export.
    pub fn enter(mut self, style: Style, export: &str, contexts: &[&str]) -> Client {
        let options = [(Style::Structured, option::STRUCTURED_REPLY), (Style::Extended, option::EXTENDED_HEADERS)];
        for (_, option) in options.iter().filter(|(of, _)| *of == style) {
            assert_eq!(self.option(*option, b"").0, reply::ACK);
        }
        if !contexts.is_empty() {
            let (kind, chosen) = self.option(option::SET_META_CONTEXT, &queries(export, contexts));
            assert_eq!((kind, chosen.len()), (reply::ACK, contexts.len()));
        }
        assert_eq!(self.option(option::GO, &info(export, &[])).0, reply::ACK);
        self.style = style;
        self
    }

    /// Sends a request; its cookie.
    pub fn ask(&mut self, ask: Ask) -> u64 {
        self.cookie += 1;
        let bytes = request_bytes(self.style, self.cookie, ask);
        self.put(&bytes);
        self.cookie
    }

    /// The next message; `len` bytes of data where it is a good simple reply.
    pub fn answer(&mut self, len: usize) -> Answer {
        let magic = self.u32();
        if magic == proto::SIMPLE_REPLY_MAGIC {
            assert_eq!(self.style, Style::Simple);
            let (error, cookie) = (self.u32(), self.u64());
            let data = self.get(if error == 0 { len } else { 0 });
            return Answer { cookie, done: true, kind: 0, error, data };
        }
        let extended = magic == proto::EXTENDED_REPLY_MAGIC;
        assert_eq!(extended, self.style == Style::Extended);
        assert!(extended || magic == proto::STRUCTURED_REPLY_MAGIC, "{magic:#x}");
        let word = self.u32();
        let (flags, kind, cookie) = ((word >> 16) as u16, word as u16, self.u64());
        let len = if extended { (self.u64(), self.u64()).1 as usize } else { self.u32() as usize };
        let mut data = self.get(len);
        let mut error = 0;
        if kind == chunk::ERROR {
            error = u32::from_be_bytes(data[..4].try_into().unwrap());
            assert_eq!(usize::from(u16::from_be_bytes(data[4..6].try_into().unwrap())), data.len() - 6);
            data.drain(..6);
        }
        Answer { cookie, done: flags & chunk::DONE != 0, kind, error, data }
    }

    /// A request with its only message: the error, and the data without its offset.
    pub fn run(&mut self, ask: Ask) -> (u32, Vec<u8>) {
        let cookie = self.ask(ask);
        let answer = self.answer(if ask.command == proto::command::READ { ask.len as usize } else { 0 });
        assert!(answer.cookie == cookie && answer.done, "{answer:?}");
        let data = if answer.kind == chunk::OFFSET_DATA { answer.data[8..].to_vec() } else { answer.data };
        (answer.error, data)
    }

    /// A status: for each context its number and extents.
    pub fn status(&mut self, flags: u16, offset: u64, len: u64) -> Vec<(u32, Vec<(u64, u64)>)> {
        let cookie = self.ask(Ask { flags, command: proto::command::BLOCK_STATUS, offset, len, data: b"" });
        let mut all = Vec::new();
        loop {
            let answer = self.answer(0);
            assert_eq!((answer.cookie, answer.error), (cookie, 0), "{answer:?}");
            let id = u32::from_be_bytes(answer.data[..4].try_into().unwrap());
            let extended = answer.kind == chunk::BLOCK_STATUS_EXT;
            let number = |bytes: &[u8]| bytes.iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
            let (start, width) = if extended { (8, 8) } else { (4, 4) };
            let extents: Vec<_> = answer.data[start..]
                .chunks_exact(2 * width)
                .map(|e| (number(&e[..width]), number(&e[width..])))
                .collect();
            if extended {
                assert_eq!(number(&answer.data[4..8]), extents.len() as u64);
            }
            all.push((id, extents));
            if answer.done {
                return all;
            }
        }
    }
}

pub fn option_bytes(option: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = b"IHAVEOPT".to_vec();
    bytes.extend(option.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes
}

pub fn request_bytes(style: Style, cookie: u64, ask: Ask) -> Vec<u8> {
    let extended = style == Style::Extended;
    let magic = if extended { proto::EXTENDED_REQUEST_MAGIC } else { proto::REQUEST_MAGIC };
    let mut bytes = magic.to_be_bytes().to_vec();
    bytes.extend(ask.flags.to_be_bytes());
    bytes.extend(ask.command.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(ask.offset.to_be_bytes());
    match extended {
        true => bytes.extend(ask.len.to_be_bytes()),
        false => bytes.extend((ask.len as u32).to_be_bytes()),
    }
    bytes.extend(ask.data);
    bytes
}

fn string(text: &[u8]) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes(), text].concat()
}

/// Data of `NBD_OPT_INFO` and `NBD_OPT_GO`.
pub fn info(name: impl AsRef<[u8]>, wants: &[u16]) -> Vec<u8> {
    let mut bytes = string(name.as_ref());
    bytes.extend((wants.len() as u16).to_be_bytes());
    bytes.extend(wants.iter().flat_map(|kind| kind.to_be_bytes()));
    bytes
}

/// Data of the options about meta contexts.
pub fn queries(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut bytes = string(name.as_bytes());
    bytes.extend((queries.len() as u32).to_be_bytes());
    bytes.extend(queries.iter().flat_map(|query| string(query.as_bytes())));
    bytes
}
