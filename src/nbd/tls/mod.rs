//! TLS for NBD, as the server: with certificates, or with pre-shared keys.
//!
//! [`load`] reads credentials and checks them, before anything listens; [`Store`] keeps those that have a name. What
//! comes of them is put over a connection by [`Tls::accept`]: `server` shakes hands, `stream` is the connection then,
//! `files` reads certificates and keys, `psk` has rustls take pre-shared keys.
//!
//! Without the cargo feature `tls` credentials are refused, and nothing of the rest is compiled.
//!
//! Invariants:
//! - A handshake that succeeds has proved what was asked for: knowledge of a key of the file, or, where clients are
//!   verified, a certificate of the authority. There is no session resumption, so each connection proves it anew.
//! - What a client says before it has proved that is bounded, in bytes and in time.

#[cfg(feature = "tls")]
mod files;
#[cfg(feature = "tls")]
mod psk;
#[cfg(feature = "tls")]
mod server;
mod store;
#[cfg(feature = "tls")]
mod stream;
#[cfg(all(test, feature = "tls"))]
mod tests;

pub use store::Store;

use super::transport::Tls;
use crate::error::Result;
use std::path::PathBuf;
use std::sync::Arc;

/// What a server proves itself with, and what it asks of clients.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Credentials {
    /// Certificates, in a directory as QEMU and nbdkit have it.
    X509 {
        /// It holds `ca-cert.pem`, `server-cert.pem`, `server-key.pem`, and `ca-crl.pem` where certificates were revoked.
        dir: PathBuf,
        /// Whether clients must show a certificate of the authority.
        verify_peer: bool,
        /// Whether the server's own certificate is checked against the authority when it is loaded.
        check: bool,
    },
    /// Pre-shared keys.
    Psk {
        /// Lines of `USER:HEXKEY`, as psktool(1) writes them.
        file: PathBuf,
    },
}

/// Reads credentials. ENOENT and the like where a file cannot be read, EINVAL with file and line where it is malformed.
#[cfg(feature = "tls")]
pub fn load(credentials: &Credentials) -> Result<Arc<dyn Tls>> {
    let server = match credentials {
        Credentials::X509 { dir, verify_peer, check } => server::TlsServer::x509(dir, *verify_peer, *check)?,
        Credentials::Psk { file } => server::TlsServer::psk(file)?,
    };
    Ok(Arc::new(server))
}

/// Refuses credentials.
#[cfg(not(feature = "tls"))]
pub fn load(_: &Credentials) -> Result<Arc<dyn Tls>> {
    use crate::error::{Error, errno};
    Err(Error::new(errno::EOPNOTSUPP, "TLS", "this program was built without it").hint("build it with --features tls"))
}
