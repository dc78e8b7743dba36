//! External pre-shared keys (RFC 8446, section 4.2.11) by rustls, which knows those of resumed sessions alone.
//!
//! TLS 1.3 has one mechanism for both: the client names a key and proves by a binder that it has it, the key enters the key
//! schedule, and a Diffie-Hellman exchange gives forward secrecy. They differ in one place, the label from which the
//! binder's key is derived: `ext binder` for a key from outside, `res binder` for a session's (section 7.1). So here
//! - the keys are rustls' store of sessions, which is only asked and never filled: no ticket is ever issued;
//! - HKDF-Expand takes the one label for the other, in the suites of these servers alone.
//!
//! A key belongs to one hash, SHA-256 where nothing else was agreed on (section 4.2.11): suites with others are left out.
//!
//! How rustls writes sessions down is its own business, so `Cargo.toml` names one release of it, and tests shake hands
//! with other programs. Where the two did not fit any more, nobody would get in.

use super::files::Keys;
use parking_lot::Mutex;
use rustls::crypto::tls13::{Hkdf, HkdfExpander, OkmBlock, OutputLengthError};
use rustls::crypto::{CryptoProvider, hmac, ring};
use rustls::server::{ClientHello, ResolvesServerCert, StoresServerSessions};
use rustls::sign::{CertifiedKey, Signer, SigningKey};
use rustls::{
    CipherSuite, CipherSuiteCommon, ServerConfig, SignatureAlgorithm, SignatureScheme, SupportedCipherSuite,
    Tls13CipherSuite,
};
use std::fmt;
use std::sync::{Arc, LazyLock};

/// Version and labels as the standard writes them.
const TLS13: u16 = 0x0304;
const LABEL_PREFIX: &[u8] = b"tls13 ";
const LABEL_OF_SESSIONS: &[u8] = b"res binder";
const LABEL_OF_KEYS: &[u8] = b"ext binder";

/// The suites with SHA-256, for keys from outside.
static SUITES: LazyLock<Vec<Tls13CipherSuite>> = LazyLock::new(|| {
    let suites = [ring::cipher_suite::TLS13_AES_128_GCM_SHA256, ring::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256];
    let external = |suite: &'static Tls13CipherSuite| Tls13CipherSuite {
        common: CipherSuiteCommon { ..suite.common },
        hkdf_provider: Box::leak(Box::new(External(suite.hkdf_provider))),
        aead_alg: suite.aead_alg,
        quic: None,
    };
    suites.iter().filter_map(SupportedCipherSuite::tls13).map(external).collect()
});

/// What one connection's handshake is made with, whose client has said `hello`. `asked` notes what it asked for.
pub fn config(keys: &Arc<Keys>, hello: &ClientHello<'_>, asked: &Arc<Asked>) -> Result<ServerConfig, rustls::Error> {
    // A session is taken up again with the suite and the server's name that it had; the client's first suite is taken.
    let offered = |suite: &&CipherSuite| SUITES.iter().any(|ours| ours.common.suite == **suite);
    let chosen = hello.cipher_suites().iter().find(offered).unwrap_or(&CipherSuite::TLS13_AES_128_GCM_SHA256);
    let suites = SUITES.iter().filter(|ours| ours.common.suite == *chosen).map(SupportedCipherSuite::Tls13).collect();
    let provider = CryptoProvider { cipher_suites: suites, ..ring::default_provider() };
    let mut config = ServerConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(NoCertificate));
    config.session_storage = Arc::new(Session {
        keys: keys.clone(),
        suite: u16::from(*chosen),
        server_name: hello.server_name().map(str::to_owned),
        asked: asked.clone(),
    });
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// Whom a client said that it was, last.
#[derive(Debug, Default)]
pub struct Asked(Mutex<Option<(Vec<u8>, bool)>>);

impl Asked {
    /// Why a handshake failed, as far as that lies with users.
    pub fn trouble(&self) -> Option<String> {
        self.0.lock().as_ref().map(|(user, known)| {
            let user: String = user.escape_ascii().to_string().chars().take(80).collect();
            if *known { format!("the key of user '{user}' is another one") } else { format!("no user '{user}'") }
        })
    }
}

/// The keys, as the sessions that one client could take up.
struct Session {
    keys: Arc<Keys>,
    suite: u16,
    server_name: Option<String>,
    asked: Arc<Asked>,
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session").finish_non_exhaustive()
    }
}

impl Session {
    /// A key as rustls writes a session down.
    fn encoded(&self, key: &[u8]) -> Option<Vec<u8>> {
        let mut out = Vec::new();
        match &self.server_name {
            Some(name) => {
                out.push(1);
                out.push(u8::try_from(name.len()).ok()?);
                out.extend_from_slice(name.as_bytes());
            }
            None => out.push(0),
        }
        out.extend_from_slice(&TLS13.to_be_bytes());
        out.extend_from_slice(&self.suite.to_be_bytes());
        out.push(u8::try_from(key.len()).ok()?);
        out.extend_from_slice(key);
        // Neither extended master secret, nor certificates, nor a protocol; no data (2), made long ago (8), no offset of
        // its age (4).
        out.extend_from_slice(&[0; 3 + 2 + 8 + 4]);
        Some(out)
    }
}

impl StoresServerSessions for Session {
    fn put(&self, _: Vec<u8>, _: Vec<u8>) -> bool {
        false
    }

    fn get(&self, user: &[u8]) -> Option<Vec<u8>> {
        let key = self.keys.get(user);
        *self.asked.0.lock() = Some((user.to_owned(), key.is_some()));
        self.encoded(key?)
    }

    fn take(&self, user: &[u8]) -> Option<Vec<u8>> {
        self.get(user)
    }

    fn can_cache(&self) -> bool {
        false
    }
}

/// rustls asks for a certificate before it looks at keys. This one proves nothing and signs nothing: a handshake that
/// needs it fails.
#[derive(Debug)]
struct NoCertificate;

impl ResolvesServerCert for NoCertificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::new(CertifiedKey::new(Vec::new(), Arc::new(NoCertificate))))
    }
}

impl SigningKey for NoCertificate {
    fn choose_scheme(&self, _: &[SignatureScheme]) -> Option<Box<dyn Signer>> {
        None
    }

    fn algorithm(&self) -> SignatureAlgorithm {
        SignatureAlgorithm::ED25519
    }
}

/// HKDF in which the binder of a session is that of a key from outside.
struct External(&'static dyn Hkdf);

impl Hkdf for External {
    fn extract_from_zero_ikm(&self, salt: Option<&[u8]>) -> Box<dyn HkdfExpander> {
        Box::new(ExternalExpander(self.0.extract_from_zero_ikm(salt)))
    }

    fn extract_from_secret(&self, salt: Option<&[u8]>, secret: &[u8]) -> Box<dyn HkdfExpander> {
        Box::new(ExternalExpander(self.0.extract_from_secret(salt, secret)))
    }

    fn expander_for_okm(&self, okm: &OkmBlock) -> Box<dyn HkdfExpander> {
        Box::new(ExternalExpander(self.0.expander_for_okm(okm)))
    }

    fn hmac_sign(&self, key: &OkmBlock, message: &[u8]) -> hmac::Tag {
        self.0.hmac_sign(key, message)
    }
}

struct ExternalExpander(Box<dyn HkdfExpander>);

/// The parts of an `HkdfLabel` (section 7.1): two lengths, then the label in two parts, then the context.
fn relabelled<'a>(info: &[&'a [u8]]) -> Vec<&'a [u8]> {
    let mut parts = info.to_vec();
    if let [_, _, LABEL_PREFIX, label, ..] = parts.as_mut_slice()
        && *label == LABEL_OF_SESSIONS
    {
        *label = LABEL_OF_KEYS;
    }
    parts
}

impl HkdfExpander for ExternalExpander {
    fn expand_slice(&self, info: &[&[u8]], output: &mut [u8]) -> Result<(), OutputLengthError> {
        self.0.expand_slice(&relabelled(info), output)
    }

    fn expand_block(&self, info: &[&[u8]]) -> OkmBlock {
        self.0.expand_block(&relabelled(info))
    }

    fn hash_len(&self) -> usize {
        self.0.hash_len()
    }
}
