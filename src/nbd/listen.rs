//! Where a server listens: addresses, and sockets bound to them.

use super::transport::Socket;
use crate::error::{Error, Result, errno};
use std::fmt;
use std::fs;
use std::io::{self, ErrorKind};
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::SystemTime;

/// The port that IANA has for NBD.
pub const DEFAULT_PORT: u16 = 10809;

/// Where to listen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A Unix socket: `unix:PATH`, or a path with a slash.
    Unix(PathBuf),
    /// TCP: `HOST`, `HOST:PORT`, `[IPV6]`, `[IPV6]:PORT`, `:PORT`. Port 0 is any that is free; no host is all of them.
    Tcp {
        /// Name or address without brackets; empty for all.
        host: String,
        /// Port.
        port: u16,
    },
}

impl FromStr for Address {
    type Err = Error;
    fn from_str(text: &str) -> Result<Address> {
        let wrong = |why: &str| {
            Error::new(errno::EINVAL, format!("NBD address '{text}'"), why)
                .hint("give unix:PATH, tcp:HOST:PORT or tcp:[IPV6]:PORT")
        };
        if let Some(path) = text.strip_prefix("unix:").or_else(|| text.contains('/').then_some(text)) {
            return if path.is_empty() { Err(wrong("no path")) } else { Ok(Address::Unix(path.into())) };
        }
        let tcp = text.strip_prefix("tcp:");
        let text = tcp.unwrap_or(text);
        let (host, port) = match text.strip_prefix('[') {
            Some(rest) => rest.split_once(']').ok_or_else(|| wrong("a bracket is not closed"))?,
            None => text.find(':').map_or((text, ""), |at| text.split_at(at)),
        };
        if tcp.is_none() && !text.contains(':') {
            return Err(wrong("neither a path nor a port"));
        }
        let port = match port.strip_prefix(':') {
            Some(port) => port.parse().map_err(|_| wrong("the port is no number up to 65535"))?,
            None if port.is_empty() && !host.is_empty() => DEFAULT_PORT,
            None => return Err(wrong("no host and no port")),
        };
        Ok(Address::Tcp { host: host.to_owned(), port })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
            Address::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Address::Tcp { host, port } => write!(f, "{host}:{port}"),
        }
    }
}

/// Device, inode and time of birth of a file: inode numbers are used again.
type Identity = (u64, u64, Option<SystemTime>);

fn identity(metadata: &fs::Metadata) -> Identity {
    (metadata.dev(), metadata.ino(), metadata.created().ok())
}

/// A bound socket. Dropping it removes a Unix socket's file.
pub enum Listener {
    /// On a path, with the file's identity, so that nobody else's is removed.
    Unix(UnixListener, PathBuf, Identity),
    /// On an address.
    Tcp(TcpListener),
}

impl Listener {
    /// Binds an address: one socket, or one for each address that a host has. A Unix socket gets `mode`; one that
    /// nobody serves is replaced, one that answers is refused with EBUSY, and what is no socket with EEXIST.
    pub fn bind(address: &Address, mode: u32) -> Result<Vec<Listener>> {
        match address {
            Address::Unix(path) => bind_unix(path, mode).map(|listener| vec![listener]),
            Address::Tcp { host, port } => bind_tcp(host, *port),
        }
    }

    /// The address that it has, with the port that port 0 became.
    pub fn address(&self) -> Result<Address> {
        match self {
            Listener::Unix(_, path, _) => Ok(Address::Unix(path.clone())),
            Listener::Tcp(listener) => {
                let local = listener.local_addr().map_err(|e| Error::io("NBD server", e))?;
                Ok(Address::Tcp { host: local.ip().to_string(), port: local.port() })
            }
        }
    }

    /// Waits for a connection; it, and words for who it is.
    pub fn accept(&self) -> io::Result<(Socket, String)> {
        match self {
            Listener::Unix(listener, path, _) => {
                let (stream, _) = listener.accept()?;
                Ok((Socket::Unix(stream), format!("a client of {}", path.display())))
            }
            Listener::Tcp(listener) => {
                let (stream, peer) = listener.accept()?;
                stream.set_nodelay(true)?;
                Ok((Socket::Tcp(stream), peer.to_string()))
            }
        }
    }

    /// Whoever waits in [`Listener::accept`] comes back with an error.
    pub fn close(&self) {
        // The standard library has this for streams only.
        match self {
            Listener::Unix(listener, ..) => {
                let _ = listener.try_clone().map(|l| UnixStream::from(OwnedFd::from(l)).shutdown(Shutdown::Both));
            }
            Listener::Tcp(listener) => {
                let _ = listener.try_clone().map(|l| TcpStream::from(OwnedFd::from(l)).shutdown(Shutdown::Both));
            }
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.remove();
    }
}

impl Listener {
    /// Removes a Unix socket's file, unless it is gone or another's.
    pub fn remove(&self) {
        let Listener::Unix(_, path, of) = self else { return };
        let ours = fs::symlink_metadata(path).is_ok_and(|m| identity(&m) == *of);
        if ours && let Err(e) = fs::remove_file(path) {
            log::warn!("{}", Error::io("remove NBD socket", e).at_path(path));
        }
    }
}

fn bind_unix(path: &Path, mode: u32) -> Result<Listener> {
    let failed = |e| Error::io("NBD socket", e).at_path(path);
    let listener = match UnixListener::bind(path) {
        Err(e) if e.kind() == ErrorKind::AddrInUse => {
            remove_stale(path)?;
            UnixListener::bind(path).map_err(failed)?
        }
        Err(e) if e.kind() == ErrorKind::InvalidInput => {
            return Err(Error::new(errno::ENAMETOOLONG, "NBD socket", "path is longer than 107 bytes").at_path(path));
        }
        bound => bound.map_err(failed)?,
    };
    let metadata = fs::symlink_metadata(path).map_err(failed)?;
    let listener = Listener::Unix(listener, path.to_owned(), identity(&metadata));
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(failed)?;
    Ok(listener)
}

/// Removes a socket that nobody serves.
fn remove_stale(path: &Path) -> Result<()> {
    let failed = |e| Error::io("NBD socket", e).at_path(path);
    if !fs::symlink_metadata(path).map_err(failed)?.file_type().is_socket() {
        return Err(Error::new(errno::EEXIST, "NBD socket", "something else has this name").at_path(path));
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(Error::new(errno::EBUSY, "NBD socket", "another process serves it").at_path(path)),
        Err(e) if e.kind() == ErrorKind::ConnectionRefused => fs::remove_file(path).map_err(failed),
        Err(e) => Err(failed(e)),
    }
}

fn bind_tcp(host: &str, port: u16) -> Result<Vec<Listener>> {
    let failed = |e| Error::io(format!("NBD server on {}", Address::Tcp { host: host.into(), port }), e);
    // Of no host, and of names like localhost, one family may not be there.
    let addresses: Vec<SocketAddr> = match host {
        "" => vec![(Ipv6Addr::UNSPECIFIED, port).into(), (Ipv4Addr::UNSPECIFIED, port).into()],
        host => (host, port).to_socket_addrs().map_err(failed)?.collect(),
    };
    let mut listeners: Vec<Listener> = Vec::new();
    let (mut port, mut failure) = (port, None);
    for mut address in addresses {
        address.set_port(port);
        match TcpListener::bind(address) {
            Ok(listener) => {
                port = listener.local_addr().map_err(failed)?.port();
                listeners.push(Listener::Tcp(listener));
                // That of IPv6 takes clients of IPv4, too.
                if host.is_empty() {
                    break;
                }
            }
            Err(e) if e.kind() == ErrorKind::AddrInUse => return Err(failed(e)),
            Err(e) => failure = Some(e),
        }
    }
    match failure {
        Some(e) if listeners.is_empty() => Err(failed(e)),
        _ => Ok(listeners),
    }
}
