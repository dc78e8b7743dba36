//! What the commands of NBD exports ask for, and who does it: this surface knows QMP alone.

use crate::fleece::{BitmapRef, Refused};
use std::path::PathBuf;

/// Where a server is to listen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ServerAddress {
    /// A Unix socket.
    Unix(PathBuf),
    /// TCP.
    Tcp {
        /// Name or address; empty: all.
        host: String,
        /// Number of the port.
        port: u16,
    },
}

/// A `nbd-server-start`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerRequest {
    /// Where it listens.
    pub address: ServerAddress,
    /// Seconds that a client may take to negotiate; 0: no limit.
    pub handshake_seconds: u32,
    /// The credentials object.
    pub tls_creds: Option<String>,
    /// Clients at a time; 0: as many as the server takes.
    pub max_connections: u32,
}

/// An `object-add` of TLS credentials.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsObject {
    /// Where the files are.
    pub dir: PathBuf,
    /// Which files.
    pub kind: TlsKind,
}

/// Kinds of credentials.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TlsKind {
    /// `tls-creds-x509`.
    X509 {
        /// Clients must show a certificate.
        verify_peer: bool,
        /// The server's own certificate is checked.
        check: bool,
    },
    /// `tls-creds-psk`.
    Psk,
}

/// A bitmap of an export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExportBitmap {
    /// Of the exported node.
    Own(String),
    /// Of the node that is named.
    Of(BitmapRef),
}

/// A `block-export-add` of type `nbd`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportRequest {
    /// Its identity.
    pub id: String,
    /// A disk, or `NAME/DISK`.
    pub node: String,
    /// What clients call it; None: as the node.
    pub name: Option<String>,
    /// What clients are told.
    pub description: Option<String>,
    /// Whether clients may write; None: they may not. A node that is read-only may be exported so all the same where
    /// `downgrade` says so.
    pub writable: bool,
    /// Of a node that is read-only, `writable` means nothing.
    pub downgrade: bool,
    /// Whether each write is durable when it is answered.
    pub writethrough: bool,
    /// Bitmaps that clients see.
    pub bitmaps: Vec<ExportBitmap>,
    /// Whether clients see where content comes from.
    pub allocation_depth: bool,
}

/// A row of `query-block-exports`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportRow {
    /// Its identity.
    pub id: String,
    /// The node.
    pub node: String,
    /// No new client comes.
    pub shutting_down: bool,
}

/// Who serves exports.
pub trait ExportHost: Send + Sync {
    /// Begins to listen.
    fn start(&self, request: &ServerRequest) -> Result<(), Refused>;
    /// Ends the server, its clients and its exports.
    fn stop(&self) -> Result<(), Refused>;
    /// Adds an export.
    fn add(&self, request: &ExportRequest) -> Result<(), Refused>;
    /// Takes one away; `hard` though it has clients.
    fn remove(&self, id: &str, hard: bool) -> Result<(), Refused>;
    /// Reads credentials and gives them a name.
    fn add_credentials(&self, id: &str, object: &TlsObject) -> Result<(), Refused>;
    /// Forgets a name; whether there was one. A server that was started with it keeps them.
    fn remove_credentials(&self, id: &str) -> bool;
    /// The exports, newest first.
    fn list(&self) -> Vec<ExportRow>;
}
