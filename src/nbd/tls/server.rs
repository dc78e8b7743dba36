//! Handshakes (RFC 8446; RFC 5246 for TLS 1.2). The server that accepts connections ends those that take too long, by ending
//! the socket.
//!
//! TLS 1.2 is spoken with ChaCha20-Poly1305 alone: it cannot change keys within a connection, and with AES-GCM one that
//! serves a disk would reach the number of records after which a key must not be used any more (2^24; RFC 8446, section 5.5),
//! and end.

use super::files::{Certificates, Keys, keys, malformed, names};
use super::psk::{self, Asked};
use super::stream::{Stream, Unread, invalid, seal};
use crate::error::{Error, Result, errno};
use crate::nbd::transport::{Socket, Tls, Transport};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::UnixTime;
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{
    Accepted, Acceptor, NoServerSessionStorage, ParsedCertificate, ServerConnection, WebPkiClientVerifier,
};
use rustls::{HandshakeKind, RootCertStore, ServerConfig};
use std::io::{self, IoSlice};
use std::path::Path;
use std::sync::Arc;

/// What a server proves itself with.
pub enum TlsServer {
    /// Certificates, and who verifies those of clients.
    Certificates(Arc<ServerConfig>),
    /// Pre-shared keys.
    Keys(Arc<Keys>),
}

impl TlsServer {
    /// Reads certificates.
    pub fn x509(dir: &Path, verify_peer: bool, check: bool) -> Result<TlsServer> {
        let certificates = Certificates::read(dir)?;
        let provider = Arc::new(provider());
        let authorities = authorities(&certificates, &dir.join(names::AUTHORITY))?;
        let own = dir.join(names::CERTIFICATE);
        if check {
            check_own(&certificates, &authorities, &provider, &own)?;
        }
        let versions = [&rustls::version::TLS13, &rustls::version::TLS12];
        let refused = |e: rustls::Error| malformed(&own, format!("with {}: {e}", names::KEY));
        let builder = ServerConfig::builder_with_provider(provider.clone()).with_protocol_versions(&versions);
        let builder = builder.map_err(refused)?;
        let builder = if verify_peer {
            builder.with_client_cert_verifier(verifier(&certificates, authorities, provider, dir)?)
        } else {
            builder.with_no_client_auth()
        };
        let mut config = builder.with_single_cert(certificates.chain, certificates.key).map_err(refused)?;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(TlsServer::Certificates(Arc::new(config)))
    }

    /// Reads pre-shared keys.
    pub fn psk(file: &Path) -> Result<TlsServer> {
        Ok(TlsServer::Keys(Arc::new(keys(file)?)))
    }

    fn shake(&self, socket: &Socket, asked: &Arc<Asked>) -> io::Result<(ServerConnection, Unread)> {
        let mut unread = Unread::new();
        let (config, accepted) = self.greet(socket, &mut unread, asked)?;
        let mut session = accepted.into_connection(config).map_err(|(e, mut alert)| {
            let mut bytes = Vec::new();
            let told = alert.write_all(&mut bytes).and_then(|()| socket.send(&[IoSlice::new(&bytes)]));
            told.err().unwrap_or_else(|| invalid(e))
        })?;
        loop {
            let outcome = session.process_new_packets().map_err(invalid);
            let mut out = Vec::new();
            seal(&mut session, &mut out)?;
            let sent = socket.send(&[IoSlice::new(&out)]);
            outcome?;
            sent?;
            if !session.is_handshaking() {
                return Ok((session, unread));
            }
            if !unread.fill(socket)? {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            unread.give(|from| session.read_tls(from))?;
        }
    }

    /// Reads the client's first message, on which the configuration depends.
    fn greet(
        &self,
        socket: &Socket,
        unread: &mut Unread,
        asked: &Arc<Asked>,
    ) -> io::Result<(Arc<ServerConfig>, Accepted)> {
        let mut acceptor = Acceptor::default();
        loop {
            if !unread.fill(socket)? {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            unread.give(|from| acceptor.read_tls(from))?;
            match acceptor.accept() {
                Ok(None) => (),
                Ok(Some(accepted)) => {
                    let config = match self {
                        TlsServer::Certificates(config) => config.clone(),
                        TlsServer::Keys(keys) => {
                            Arc::new(psk::config(keys, &accepted.client_hello(), asked).map_err(invalid)?)
                        }
                    };
                    return Ok((config, accepted));
                }
                Err((e, mut alert)) => {
                    let mut bytes = Vec::new();
                    alert.write_all(&mut bytes)?;
                    socket.send(&[IoSlice::new(&bytes)])?;
                    return Err(invalid(e));
                }
            }
        }
    }
}

impl Tls for TlsServer {
    fn accept(&self, socket: Arc<Socket>) -> Result<Arc<dyn Transport>> {
        let asked = Arc::new(Asked::default());
        let (session, unread) = self.shake(&socket, &asked).map_err(|e| failed(e, &asked))?;
        // Nobody gets in by a certificate that proves nothing, nor by a session that we never had.
        let expected = match self {
            TlsServer::Certificates(_) => [HandshakeKind::Full, HandshakeKind::FullWithHelloRetryRequest].as_slice(),
            TlsServer::Keys(_) => &[HandshakeKind::Resumed],
        };
        if !session.handshake_kind().is_some_and(|kind| expected.contains(&kind)) {
            return Err(Error::new(errno::EACCES, "TLS handshake", "the client proved nothing"));
        }
        Ok(Arc::new(Stream::new(socket, session, unread)))
    }
}

fn failed(e: io::Error, asked: &Asked) -> Error {
    let refused = e.kind() == io::ErrorKind::InvalidData;
    match asked.trouble() {
        Some(why) if refused => Error::new(errno::EACCES, "TLS handshake", why),
        _ if refused => Error::new(errno::EACCES, "TLS handshake", e.to_string()),
        _ if e.kind() == io::ErrorKind::UnexpectedEof => {
            Error::new(errno::ENOTCONN, "TLS handshake", "the client went away")
        }
        _ => Error::io("TLS handshake", e),
    }
}

/// TLS 1.3, and of TLS 1.2 what stands in the module's head.
fn provider() -> CryptoProvider {
    use ring::cipher_suite as suite;
    let cipher_suites = vec![
        suite::TLS13_AES_128_GCM_SHA256,
        suite::TLS13_AES_256_GCM_SHA384,
        suite::TLS13_CHACHA20_POLY1305_SHA256,
        suite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
        suite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
    ];
    CryptoProvider { cipher_suites, ..ring::default_provider() }
}

fn authorities(certificates: &Certificates, path: &Path) -> Result<Arc<RootCertStore>> {
    let mut store = RootCertStore::empty();
    for certificate in &certificates.authorities {
        store.add(certificate.clone()).map_err(|e| malformed(path, e.to_string()))?;
    }
    Ok(Arc::new(store))
}

/// Whether the server's certificate comes from the authority and is valid now: clients would refuse it with less to say.
fn check_own(
    certificates: &Certificates,
    authorities: &RootCertStore,
    provider: &CryptoProvider,
    path: &Path,
) -> Result<()> {
    let Some((own, between)) = certificates.chain.split_first() else {
        return Err(malformed(path, "no certificate in it"));
    };
    let algorithms = provider.signature_verification_algorithms.all;
    ParsedCertificate::try_from(own)
        .and_then(|own| {
            verify_server_cert_signed_by_trust_anchor(&own, authorities, between, UnixTime::now(), algorithms)
        })
        .map_err(|e| {
            malformed(path, e.to_string()).hint(format!("openssl verify -CAfile {} shows more", names::AUTHORITY))
        })
}

fn verifier(
    certificates: &Certificates,
    authorities: Arc<RootCertStore>,
    provider: Arc<CryptoProvider>,
    dir: &Path,
) -> Result<Arc<dyn ClientCertVerifier>> {
    let mut builder = WebPkiClientVerifier::builder_with_provider(authorities, provider);
    if !certificates.revoked.is_empty() {
        // Without the word of each authority of a chain, and one that is not out of date, nobody is let in.
        builder = builder.with_crls(certificates.revoked.iter().cloned()).enforce_revocation_expiration();
    }
    builder.build().map_err(|e| malformed(&dir.join(names::REVOKED), e.to_string()))
}
