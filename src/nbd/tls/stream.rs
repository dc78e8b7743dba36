//! A connection under TLS.
//!
//! Invariants:
//! - The session's lock is held for crypto alone, never across a call on the socket: who receives and who sends wait for
//!   each other no longer than that takes. What receiving makes the session say (an answer to a key update, a refusal
//!   of a renegotiation) goes with what is sent next, so that receiving never waits for a client that does not read.
//! - Records reach the socket in the order in which they were sealed: sealing and sending are one hold of `sending`.
//! - The end is told from a truncation: without a close_notify alert it is an error (RFC 8446, section 6.1).
//! - Buffers are bounded: one piece that is sealed, one that was read, one record in the session.

use crate::nbd::transport::{Socket, Transport};
use parking_lot::Mutex;
use rustls::server::ServerConnection;
use std::io::{self, IoSlice, Read, Write};
use std::sync::Arc;

/// Bytes that are sealed at once: more saves calls on the socket, and costs each connection memory.
const PIECE_BYTES: usize = 64 << 10;
/// Bytes that are asked of the socket at once: two records.
const READ_BYTES: usize = 33 << 10;

/// See the module.
pub struct Stream {
    socket: Arc<Socket>,
    /// Taken last.
    session: Mutex<ServerConnection>,
    /// Who sends has it, with the records that are on their way.
    sending: Mutex<Sending>,
    /// Who receives has it.
    receiving: Mutex<Unread>,
}

#[derive(Default)]
struct Sending {
    sealed: Vec<u8>,
    /// A record was cut off: what follows would be garbage.
    broken: bool,
}

/// Bytes that came and were not given to the session yet.
pub struct Unread {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Unread {
    pub fn new() -> Unread {
        Unread { bytes: vec![0; READ_BYTES].into_boxed_slice(), start: 0, end: 0 }
    }

    fn rest(&self) -> &[u8] {
        self.bytes.get(self.start..self.end).unwrap_or_default()
    }

    /// Waits for bytes where there are none. False at the end.
    pub fn fill(&mut self, socket: &Socket) -> io::Result<bool> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
            self.end = socket.recv(&mut self.bytes)?;
        }
        Ok(self.end > 0)
    }

    /// Gives some to `take`, which says how many it took.
    pub fn give(&mut self, take: impl FnOnce(&mut dyn Read) -> io::Result<usize>) -> io::Result<()> {
        let taken = take(&mut self.rest())?;
        self.start = self.end.min(self.start + taken);
        Ok(())
    }
}

/// A TLS error as one of the connection.
pub fn invalid(e: rustls::Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, e)
}

/// Moves the records that wait in the session.
pub fn seal(session: &mut ServerConnection, into: &mut Vec<u8>) -> io::Result<()> {
    while session.wants_write() {
        session.write_tls(into)?;
    }
    Ok(())
}

impl Stream {
    /// A connection whose handshake is done. `unread` is what came behind it.
    pub fn new(socket: Arc<Socket>, mut session: ServerConnection, unread: Unread) -> Stream {
        session.set_buffer_limit(Some(PIECE_BYTES));
        Stream {
            socket,
            session: Mutex::new(session),
            sending: Mutex::new(Sending::default()),
            receiving: Mutex::new(unread),
        }
    }

    /// Ends the connection, telling the client why as far as that can be done without waiting.
    fn end(&self, notify: bool) {
        // Who sends at this moment hangs, or is done presently: the end of the socket tells the client.
        if let Some(mut sending) = self.sending.try_lock()
            && !sending.broken
        {
            let mut session = self.session.lock();
            if notify {
                session.send_close_notify();
            }
            let sealed = seal(&mut session, &mut sending.sealed);
            drop(session);
            if sealed.is_ok() && !sending.sealed.is_empty() {
                // A client that does not read is not waited for; it sees a truncated connection.
                let _ = match &*self.socket {
                    Socket::Unix(stream) => {
                        stream.set_nonblocking(true).and_then(|()| (&*stream).write(&sending.sealed))
                    }
                    Socket::Tcp(stream) => {
                        stream.set_nonblocking(true).and_then(|()| (&*stream).write(&sending.sealed))
                    }
                };
            }
            sending.broken = true;
        }
        self.socket.shutdown();
    }

    /// What of `buf` can be filled without the socket; none where that is needed.
    fn opened(&self, unread: &mut Unread, buf: &mut [u8]) -> io::Result<Option<usize>> {
        let mut session = self.session.lock();
        loop {
            match session.reader().read(buf) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => (),
                outcome => return outcome.map(Some),
            }
            if unread.rest().is_empty() {
                return Ok(None);
            }
            unread.give(|from| session.read_tls(from))?;
            session.process_new_packets().map_err(invalid)?;
        }
    }
}

impl Transport for Stream {
    fn recv(&self, buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        let mut unread = self.receiving.lock();
        loop {
            match self.opened(&mut unread, buf) {
                Ok(Some(count)) => return Ok(count),
                Ok(None) => (),
                Err(e) => {
                    self.end(false);
                    return Err(e);
                }
            }
            if !unread.fill(&self.socket)? {
                // The session tells whether that was the end or a truncation.
                self.session.lock().read_tls(&mut io::empty())?;
            }
        }
    }

    fn send(&self, parts: &[IoSlice<'_>]) -> io::Result<()> {
        let mut parts = parts.to_vec();
        let mut left = parts.as_mut_slice();
        IoSlice::advance_slices(&mut left, 0);
        let mut sending = self.sending.lock();
        if sending.broken {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        while !left.is_empty() {
            let mut session = self.session.lock();
            let count = session.writer().write_vectored(left)?;
            seal(&mut session, &mut sending.sealed)?;
            drop(session);
            if count == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            IoSlice::advance_slices(&mut left, count);
            sending.broken = true;
            self.socket.send(&[IoSlice::new(&sending.sealed)])?;
            sending.broken = false;
            sending.sealed.clear();
        }
        Ok(())
    }

    fn shutdown(&self) {
        self.end(true);
    }
}
