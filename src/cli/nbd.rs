//! `--nbd-tls…`: which clients of the mount's NBD server have to use TLS, and what it proves itself with.

use crate::daemon::{OwnMount, TlsMode, TlsPlan, absolute};
use crate::error::Result;
use crate::nbd::tls::Credentials;
use clap::{Args, ValueEnum};
use std::path::PathBuf;

/// TLS of `--nbd`.
#[derive(Debug, Clone, Default, Args)]
pub struct NbdTlsArgs {
    /// Certificates of the NBD server: a directory with ca-cert.pem, server-cert.pem, server-key.pem and perhaps ca-crl.pem
    #[arg(long, value_name = "DIR", conflicts_with = "nbd_tls_psk")]
    nbd_tls_creds: Option<PathBuf>,
    /// Pre-shared keys of the NBD server: lines of USER:HEXKEY, as psktool makes them
    #[arg(long, value_name = "FILE")]
    nbd_tls_psk: Option<PathBuf>,
    /// NBD clients must show a certificate of the authority in ca-cert.pem
    #[arg(long, requires = "nbd_tls_creds", conflicts_with = "nbd_tls_psk")]
    nbd_tls_verify_peer: bool,
    /// Whether NBD clients use TLS [default: with credentials require over TCP, off on Unix sockets]
    #[arg(long, value_name = "WHETHER", value_enum)]
    nbd_tls: Option<Mode>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Mode {
    /// Who does not is refused
    Require,
    /// Who wants to; a foe on the wire can keep a client from it, unless the client insists
    Allow,
    /// Nobody: whoever can connect may read and write
    Off,
}

impl NbdTlsArgs {
    /// What the daemon is told; paths are absolute then, and outside of the mount.
    pub fn plan(&self, own_mount: &OwnMount) -> Result<TlsPlan> {
        let outside = |what: &str, path: &PathBuf| {
            own_mount.refuse(what, path)?;
            absolute(path)
        };
        let credentials = match (&self.nbd_tls_creds, &self.nbd_tls_psk) {
            (Some(dir), _) => Some(Credentials::X509 {
                dir: outside("--nbd-tls-creds", dir)?,
                verify_peer: self.nbd_tls_verify_peer,
                check: true,
            }),
            (None, Some(file)) => Some(Credentials::Psk { file: outside("--nbd-tls-psk", file)? }),
            (None, None) => None,
        };
        let mode = self.nbd_tls.map(|mode| match mode {
            Mode::Require => TlsMode::Require,
            Mode::Allow => TlsMode::Allow,
            Mode::Off => TlsMode::Off,
        });
        Ok(TlsPlan { mode, credentials })
    }
}
