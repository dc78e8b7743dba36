//! A connection's bytes, plain or under TLS.

use crate::error::Result;
use std::io::{self, IoSlice};
use std::net::TcpStream;
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
