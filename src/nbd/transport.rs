//! A connection's bytes, plain or under TLS.

use crate::error::Result;
use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

/// A connection. One thread receives at a time, another may send meanwhile.
pub trait Transport: Send + Sync {
    /// Some bytes; 0 at the end.
    fn recv(&self, buf: &mut [u8]) -> io::Result<usize>;
    /// All of these bytes.
    fn send(&self, parts: &[IoSlice<'_>]) -> io::Result<()>;
    /// Ends it for both sides: who waits in one of the calls above comes back.
    fn shutdown(&self);
}

/// A connection as it was accepted.
#[derive(Debug)]
pub enum Socket {
    /// On a Unix socket.
    Unix(UnixStream),
    /// Over TCP.
    Tcp(TcpStream),
}

/// What puts TLS over a connection once a client has sent `NBD_OPT_STARTTLS`.
pub trait Tls: Send + Sync {
    /// Shakes hands as the server.
    fn accept(&self, socket: Arc<Socket>) -> Result<Arc<dyn Transport>>;
}

impl Socket {
    fn send_some(&self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Socket::Unix(stream) => (&*stream).write_vectored(parts),
            Socket::Tcp(stream) => (&*stream).write_vectored(parts),
        }
    }
}

impl Transport for Socket {
    fn recv(&self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            let outcome = match self {
                Socket::Unix(stream) => (&*stream).read(buf),
                Socket::Tcp(stream) => (&*stream).read(buf),
            };
            match outcome {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => (),
                outcome => return outcome,
            }
        }
    }

    fn send(&self, parts: &[IoSlice<'_>]) -> io::Result<()> {
        let mut parts = parts.to_vec();
        let mut left = parts.as_mut_slice();
        IoSlice::advance_slices(&mut left, 0);
        while !left.is_empty() {
            match self.send_some(left) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => IoSlice::advance_slices(&mut left, count),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => (),
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn shutdown(&self) {
        // It fails where the other side has ended it already.
        let _ = match self {
            Socket::Unix(stream) => stream.shutdown(Shutdown::Both),
            Socket::Tcp(stream) => stream.shutdown(Shutdown::Both),
        };
    }
}
