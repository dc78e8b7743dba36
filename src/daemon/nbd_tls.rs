//! Which clients of an NBD server have to use TLS.
//!
//! Who can connect may read and write disks. A Unix socket has permissions for that; what comes over TCP has to prove itself,
//! unless somebody says in so many words that it need not.

use crate::error::{Error, Result, errno};
use crate::nbd::listen::Address;
use crate::nbd::tls::{Credentials, load};
use crate::nbd::transport::Tls;
use std::sync::Arc;

/// Who uses TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TlsMode {
    /// All; who does not is refused.
    Require,
    /// Who wants to.
    Allow,
    /// Nobody.
    Off,
}

impl TlsMode {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            TlsMode::Require => "require",
            TlsMode::Allow => "allow",
            TlsMode::Off => "off",
        }
    }
}

/// What `fleecefs mount` was told of TLS.
#[derive(Debug, Clone, Default)]
pub struct TlsPlan {
    /// For all addresses; otherwise, with credentials, required over TCP and off on Unix sockets.
    pub mode: Option<TlsMode>,
    /// What the server proves itself with.
    pub credentials: Option<Credentials>,
}

fn wrong(why: &str) -> Error {
    Error::new(errno::EINVAL, "TLS of --nbd", why)
}

impl TlsPlan {
    /// Who uses TLS on an address. EPERM where nobody would who should.
    pub fn mode_of(&self, address: &Address) -> Result<TlsMode> {
        match (self.mode, address) {
            (Some(TlsMode::Require | TlsMode::Allow), _) if self.credentials.is_none() => {
                Err(wrong("there are no credentials").hint("give --nbd-tls-creds DIR or --nbd-tls-psk FILE"))
            }
            (Some(mode), _) => Ok(mode),
            (None, Address::Unix(_)) => Ok(TlsMode::Off),
            (None, Address::Tcp { .. }) if self.credentials.is_some() => Ok(TlsMode::Require),
            (None, Address::Tcp { .. }) => Err(Error::new(
                errno::EPERM,
                format!("NBD server on {address}"),
                "TCP needs TLS",
            )
            .hint(
                "give --nbd-tls-creds or --nbd-tls-psk, or --nbd-tls=off where everybody who can connect may read and \
                     write",
            )),
        }
    }

    /// The plan of a server that has no credentials of its own: whether TCP may go in the clear is said for all.
    pub fn without_credentials(&self) -> TlsPlan {
        TlsPlan { mode: self.mode.filter(|mode| *mode == TlsMode::Off), credentials: None }
    }

    /// Refuses what contradicts itself, and credentials that nothing would use.
    pub fn check(&self, addresses: &[Address]) -> Result<()> {
        let mut used = false;
        for address in addresses {
            used |= self.mode_of(address)? != TlsMode::Off;
        }
        if used || self.credentials.is_none() {
            return Ok(());
        }
        let hint = match (self.mode, addresses) {
            (_, []) => "say where to listen: --nbd HOST:PORT",
            (Some(_), _) => "leave out --nbd-tls=off",
            (None, _) => "--nbd-tls=require puts TLS on Unix sockets too",
        };
        Err(wrong("the credentials would not be used").hint(hint))
    }

    /// Reads the credentials.
    pub fn load(&self) -> Result<Option<Arc<dyn Tls>>> {
        self.credentials.as_ref().map(load).transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(mode: Option<TlsMode>, has_credentials: bool) -> TlsPlan {
        let credentials = Credentials::Psk { file: "/keys.psk".into() };
        TlsPlan { mode, credentials: has_credentials.then_some(credentials) }
    }

    #[test]
    fn tcp_goes_in_the_clear_only_where_somebody_says_so() {
        let tcp: Address = "host:10809".parse().unwrap();
        let unix: Address = "unix:/socket".parse().unwrap();
        let modes = [None, Some(TlsMode::Require), Some(TlsMode::Allow), Some(TlsMode::Off)];
        let found = modes.map(|mode| {
            [(false, &tcp), (false, &unix), (true, &tcp), (true, &unix)].map(|(has, address)| {
                plan(mode, has).mode_of(address).map_or_else(|e| e.errno().to_string(), |m| m.name().into())
            })
        });
        assert_eq!(
            found,
            [
                ["1", "off", "require", "off"],
                ["22", "22", "require", "require"],
                ["22", "22", "allow", "allow"],
                ["off", "off", "off", "off"],
            ]
        );
    }

    #[test]
    fn credentials_that_nothing_would_use_are_refused() {
        let tcp: Address = "host:10809".parse().unwrap();
        let unix: Address = "unix:/socket".parse().unwrap();
        plan(None, true).check(&[unix.clone(), tcp.clone()]).unwrap();
        plan(Some(TlsMode::Allow), true).check(std::slice::from_ref(&unix)).unwrap();
        plan(None, false).check(&[]).unwrap();
        for (mode, addresses) in [(None, vec![]), (None, vec![unix.clone()]), (Some(TlsMode::Off), vec![tcp, unix])] {
            let e = plan(mode, true).check(&addresses).unwrap_err();
            assert_eq!(e.to_string(), "TLS of --nbd: the credentials would not be used");
        }
    }
}
