//! Certificates made for a test, and clients.

use super::super::server::TlsServer;
use super::super::stream::invalid;
use crate::error::Result;
use crate::nbd::transport::{Socket, Tls, Transport};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SerialNumber,
    date_time_ymd,
};
use rustls::client::{ClientSessionMemoryCache, Resumption};
use rustls::crypto::tls13::{Hkdf, HkdfExpander, OkmBlock, OutputLengthError};
use rustls::crypto::{CryptoProvider, hmac, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::ProducesTickets;
use rustls::{
    CipherSuiteCommon, ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection, StreamOwned,
    SupportedCipherSuite, SupportedProtocolVersion, Tls13CipherSuite,
};
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

/// A client's connection.
pub type Client = StreamOwned<ClientConnection, UnixStream>;

/// An authority.
pub struct Authority(CertifiedIssuer<'static, KeyPair>);

/// A certificate and its key, as PEM.
#[derive(Clone)]
pub struct Identity {
    pub certificate: String,
    pub key: String,
}

impl Authority {
    pub fn new(name: &str) -> Authority {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        Authority(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    pub fn pem(&self) -> String {
        self.0.pem()
    }

    /// A certificate with a serial number, good until the first of January of a year.
    pub fn issue(&self, serial: u64, until: i32) -> Identity {
        let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        params.serial_number = Some(SerialNumber::from(serial));
        params.not_after = date_time_ymd(until, 1, 1);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().unwrap();
        Identity { certificate: params.signed_by(&key, &self.0).unwrap().pem(), key: key.serialize_pem() }
    }

    /// The list of what is revoked.
    pub fn revoke(&self, serial: u64, until: i32) -> String {
        let revoked = RevokedCertParams {
            serial_number: SerialNumber::from(serial),
            revocation_time: date_time_ymd(2020, 1, 1),
            reason_code: None,
            invalidity_date: None,
        };
        let params = CertificateRevocationListParams {
            this_update: date_time_ymd(2020, 1, 1),
            next_update: date_time_ymd(until, 1, 1),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: vec![revoked],
            key_identifier_method: KeyIdMethod::Sha256,
        };
        params.signed_by(&self.0).unwrap().pem().unwrap()
    }
}

/// A year that is far away.
pub const LATER: i32 = 3000;

/// Fills a directory as QEMU has it.
pub fn fill(dir: &Path, authority: &Authority, own: &Identity) {
    fs::write(dir.join("ca-cert.pem"), authority.pem()).unwrap();
    fs::write(dir.join("server-cert.pem"), &own.certificate).unwrap();
    fs::write(dir.join("server-key.pem"), &own.key).unwrap();
}

/// A server with certificates that need no more than the returned authority.
pub fn x509_server(verify_peer: bool) -> (Authority, TlsServer) {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new("authority");
    fill(dir.path(), &authority, &authority.issue(1, LATER));
    let server = TlsServer::x509(dir.path(), verify_peer, true).unwrap();
    (authority, server)
}

/// A server with keys.
pub fn psk_server(lines: &str) -> TlsServer {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("keys.psk");
    fs::write(&file, lines).unwrap();
    TlsServer::psk(&file).unwrap()
}

/// What a client is configured with.
pub fn x509_client(
    authority: &Authority,
    version: &'static SupportedProtocolVersion,
    own: Option<&Identity>,
) -> ClientConfig {
    x509_client_with(ring::default_provider(), authority, version, own)
}

/// The same with certain suites.
pub fn x509_client_with(
    provider: CryptoProvider,
    authority: &Authority,
    version: &'static SupportedProtocolVersion,
    own: Option<&Identity>,
) -> ClientConfig {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(authority.pem().as_bytes()).unwrap()).unwrap();
    let builder = ClientConfig::builder_with_provider(Arc::new(provider));
    let builder = builder.with_protocol_versions(&[version]).unwrap().with_root_certificates(roots);
    match own {
        None => builder.with_no_client_auth(),
        Some(own) => {
            let chain = vec![CertificateDer::from_pem_slice(own.certificate.as_bytes()).unwrap()];
            builder.with_client_auth_cert(chain, PrivateKeyDer::from_pem_slice(own.key.as_bytes()).unwrap()).unwrap()
        }
    }
}

/// A server that shakes hands in its own thread, and the other end of its socket.
pub fn accepting(server: TlsServer) -> (JoinHandle<Result<Arc<dyn Transport>>>, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    (thread::spawn(move || server.accept(Arc::new(Socket::Unix(ours)))), theirs)
}

/// Shakes hands from both sides.
pub fn connect(server: TlsServer, config: ClientConfig) -> (Result<Arc<dyn Transport>>, std::io::Result<Client>) {
    let (server, socket) = accepting(server);
    let client = shake(config, socket);
    (server.join().unwrap(), client)
}

/// The client's side.
pub fn shake(config: ClientConfig, mut socket: UnixStream) -> std::io::Result<Client> {
    let name = ServerName::try_from("localhost").unwrap();
    let mut client = ClientConnection::new(Arc::new(config), name).map_err(invalid)?;
    while client.is_handshaking() || client.wants_write() {
        client.complete_io(&mut socket)?;
    }
    Ok(StreamOwned::new(client, socket))
}

/// A pair that has shaken hands.
pub fn pair(version: &'static SupportedProtocolVersion) -> (Arc<dyn Transport>, Client) {
    let (authority, server) = x509_server(false);
    let (server, client) = connect(server, x509_client(&authority, version, None));
    (server.unwrap(), client.unwrap())
}

/// A client that knows a key of 32 bytes from outside. As rustls has no such thing, it is given a session by another
/// server, whose name for it is the user's, and whose key is replaced by this one.
pub fn psk_client(user: &str, key: [u8; 32]) -> ClientConfig {
    let authority = Authority::new("authority");
    let own = authority.issue(1, LATER);
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(authority.pem().as_bytes()).unwrap()).unwrap();
    let suite = ring::cipher_suite::TLS13_AES_128_GCM_SHA256.tls13().unwrap();
    let suite: &'static Tls13CipherSuite = Box::leak(Box::new(Tls13CipherSuite {
        common: CipherSuiteCommon { ..suite.common },
        hkdf_provider: Box::leak(Box::new(Known(suite.hkdf_provider, key))),
        aead_alg: suite.aead_alg,
        quic: None,
    }));
    let cipher_suites = vec![SupportedCipherSuite::Tls13(suite)];
    let provider = CryptoProvider { cipher_suites, ..ring::default_provider() };
    let mut config = ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.resumption = Resumption::store(Arc::new(ClientSessionMemoryCache::new(4)));

    let chain = vec![CertificateDer::from_pem_slice(own.certificate.as_bytes()).unwrap()];
    let mut other = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, PrivateKeyDer::from_pem_slice(own.key.as_bytes()).unwrap())
        .unwrap();
    other.ticketer = Arc::new(Named(user.to_owned()));
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let server = thread::spawn(move || {
        let mut session = ServerConnection::new(Arc::new(other)).unwrap();
        while session.is_handshaking() || session.wants_write() {
            session.complete_io(&mut ours).unwrap();
        }
    });
    let mut client = shake(config.clone(), theirs).unwrap();
    server.join().unwrap();
    // The ticket comes behind the handshake.
    while client.conn.read_tls(&mut client.sock).unwrap() > 0 {
        client.conn.process_new_packets().unwrap();
    }
    config
}

#[derive(Debug)]
struct Named(String);

impl ProducesTickets for Named {
    fn enabled(&self) -> bool {
        true
    }
    fn lifetime(&self) -> u32 {
        86400
    }
    fn encrypt(&self, _: &[u8]) -> Option<Vec<u8>> {
        Some(self.0.clone().into_bytes())
    }
    fn decrypt(&self, _: &[u8]) -> Option<Vec<u8>> {
        None
    }
}

/// HKDF that gives sessions one key, and has binders of keys from outside.
struct Known(&'static dyn Hkdf, [u8; 32]);

impl Known {
    fn expander(&self, inner: Box<dyn HkdfExpander>) -> Box<dyn HkdfExpander> {
        Box::new(KnownExpander(inner, self.1))
    }
}

impl Hkdf for Known {
    fn extract_from_zero_ikm(&self, salt: Option<&[u8]>) -> Box<dyn HkdfExpander> {
        self.expander(self.0.extract_from_zero_ikm(salt))
    }
    fn extract_from_secret(&self, salt: Option<&[u8]>, secret: &[u8]) -> Box<dyn HkdfExpander> {
        self.expander(self.0.extract_from_secret(salt, secret))
    }
    fn expander_for_okm(&self, okm: &OkmBlock) -> Box<dyn HkdfExpander> {
        self.expander(self.0.expander_for_okm(okm))
    }
    fn hmac_sign(&self, key: &OkmBlock, message: &[u8]) -> hmac::Tag {
        self.0.hmac_sign(key, message)
    }
}

struct KnownExpander(Box<dyn HkdfExpander>, [u8; 32]);

impl HkdfExpander for KnownExpander {
    fn expand_slice(&self, info: &[&[u8]], output: &mut [u8]) -> std::result::Result<(), OutputLengthError> {
        self.0.expand_slice(info, output)
    }
    fn expand_block(&self, info: &[&[u8]]) -> OkmBlock {
        let mut info = info.to_vec();
        match info[3] {
            b"resumption" => return OkmBlock::new(&self.1),
            b"res binder" => info[3] = b"ext binder",
            _ => (),
        }
        self.0.expand_block(&info)
    }
    fn hash_len(&self) -> usize {
        self.0.hash_len()
    }
}
