//! What a client sends, received ahead: many small requests take one system call.

use super::transport::Transport;
use std::io::{self, ErrorKind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes received ahead.
const AHEAD_BYTES: usize = 64 << 10;

/// A connection's incoming bytes. Whoever holds it is its reader.
pub struct Input {
    transport: Arc<dyn Transport>,
    ahead: Box<[u8]>,
    start: usize,
    end: usize,
    received: Arc<AtomicU64>,
}

impl Input {
    /// Nothing received yet.
    pub fn new(transport: Arc<dyn Transport>) -> Input {
        Input { transport, ahead: vec![0; AHEAD_BYTES].into(), start: 0, end: 0, received: Arc::default() }
    }

    /// Counts what was received, for who looks whether it moves.
    pub fn counter(&self) -> Arc<AtomicU64> {
        self.received.clone()
    }

    /// Where the bytes come from.
    pub fn transport(&self) -> &Arc<dyn Transport> {
        &self.transport
    }

    /// How many bytes were received ahead.
    pub fn buffered(&self) -> usize {
        self.end - self.start
    }

    /// The bytes received ahead.
    pub fn peek(&self) -> &[u8] {
        self.ahead.get(self.start..self.end).unwrap_or_default()
    }

    /// Fills `buf`; `false` where the connection ended before its first byte.
    pub fn fill_or_end(&mut self, buf: &mut [u8]) -> io::Result<bool> {
        if self.start == self.end {
            self.receive()?;
            if self.start == self.end {
                return Ok(false);
            }
        }
        self.fill(buf).map(|()| true)
    }

    /// Fills `buf`.
    pub fn fill(&mut self, buf: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        while let Some(rest) = buf.get_mut(done..)
            && !rest.is_empty()
        {
            let ahead = self.ahead.get(self.start..self.end).unwrap_or_default();
            let count = if !ahead.is_empty() {
                let count = ahead.len().min(rest.len());
                if let (Some(to), Some(from)) = (rest.get_mut(..count), ahead.get(..count)) {
                    to.copy_from_slice(from);
                }
                self.start += count;
                count
            } else if rest.len() >= AHEAD_BYTES {
                let count = self.transport.recv(rest)?;
                self.received.fetch_add(count as u64, Ordering::Relaxed);
                count
            } else {
                self.receive()?;
                if self.start == self.end {
                    return Err(ErrorKind::UnexpectedEof.into());
                }
                continue;
            };
            if count == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            done += count;
        }
        Ok(())
    }

    /// Drops the next `len` bytes.
    pub fn skip(&mut self, mut len: u64) -> io::Result<()> {
        while len > 0 {
            if self.start == self.end {
                self.receive()?;
                if self.start == self.end {
                    return Err(ErrorKind::UnexpectedEof.into());
                }
            }
            let count = (self.buffered() as u64).min(len);
            self.start += count as usize;
            len -= count;
        }
        Ok(())
    }

    /// Receives ahead; nothing is there afterwards where the connection has ended.
    fn receive(&mut self) -> io::Result<()> {
        (self.start, self.end) = (0, 0);
        self.end = self.transport.recv(&mut self.ahead)?.min(self.ahead.len());
        self.received.fetch_add(self.end as u64, Ordering::Relaxed);
        Ok(())
    }
}
