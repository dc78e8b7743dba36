//! Certificates and keys from files: PEM (RFC 7468) in QEMU's layout, and psktool's key files.
//!
//! A file that is refused is named, with the line where there is one. No text ever holds key material.

use crate::error::{Error, Result, errno};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// Longest file that is read.
const FILE_MAX_BYTES: u64 = 4 << 20;
/// Sizes of a pre-shared key: 128 bits are the least that RFC 9257, section 4.1, finds sound; psktool(1) writes 64 bytes at
/// most.
const KEY_BYTES: std::ops::RangeInclusive<usize> = 16..=64;
/// Longest name of a user.
const USER_MAX_BYTES: usize = 255;

/// Keys by users' names.
pub type Keys = BTreeMap<Vec<u8>, Vec<u8>>;

/// What is read of a directory with certificates.
pub struct Certificates {
    /// The authorities that clients' certificates come from.
    pub authorities: Vec<CertificateDer<'static>>,
    /// The server's certificate, and those between it and an authority.
    pub chain: Vec<CertificateDer<'static>>,
    /// Its key.
    pub key: PrivateKeyDer<'static>,
    /// What the authorities have revoked; empty without a file.
    pub revoked: Vec<CertificateRevocationListDer<'static>>,
}

/// Names of the files, QEMU's (docs/system/tls.rst).
pub mod names {
    pub const AUTHORITY: &str = "ca-cert.pem";
    pub const CERTIFICATE: &str = "server-cert.pem";
    pub const KEY: &str = "server-key.pem";
    pub const REVOKED: &str = "ca-crl.pem";
}

impl Certificates {
    /// Reads a directory.
    pub fn read(dir: &Path) -> Result<Certificates> {
        let key_file = dir.join(names::KEY);
        let authorities = items(&dir.join(names::AUTHORITY), "certificate")?;
        let chain = items(&dir.join(names::CERTIFICATE), "certificate")?;
        let key = PrivateKeyDer::from_pem_slice(&read(&key_file, true)?).map_err(|e| {
            let why = match e {
                pem::Error::NoItemsFound => "no private key without a password in it".to_owned(),
                e => format!("malformed PEM: {}", reason(&e)),
            };
            malformed(&key_file, why)
        })?;
        let revoked = dir.join(names::REVOKED);
        let revoked = if revoked.exists() { items(&revoked, "list of revoked certificates")? } else { Vec::new() };
        Ok(Certificates { authorities, chain, key, revoked })
    }
}

/// All of one kind in a PEM file, at least one.
fn items<T: PemObject>(path: &Path, kind: &str) -> Result<Vec<T>> {
    let bytes = read(path, false)?;
    let read: std::result::Result<Vec<T>, pem::Error> = T::pem_slice_iter(&bytes).collect();
    match read {
        Ok(items) if items.is_empty() => Err(malformed(path, format!("no {kind} in it"))),
        Ok(items) => Ok(items),
        Err(e) => Err(malformed(path, format!("malformed PEM: {}", reason(&e)))),
    }
}

/// Without what the file says.
fn reason(e: &pem::Error) -> &'static str {
    match e {
        pem::Error::MissingSectionEnd { .. } => "a section has no END line",
        pem::Error::IllegalSectionStart { .. } => "a BEGIN line is not complete",
        pem::Error::Base64Decode(_) => "a section is not base64",
        _ => "it cannot be decoded",
    }
}

pub(super) fn malformed(path: &Path, why: impl Into<String>) -> Error {
    Error::new(errno::EINVAL, "credentials", why).at_path(path)
}

/// A file's bytes.
fn read(path: &Path, secret: bool) -> Result<Vec<u8>> {
    let failed = |e| Error::io("Unable to access credentials", e).at_path(path);
    let metadata = std::fs::metadata(path).map_err(failed)?;
    // Opening a FIFO would wait.
    if !metadata.is_file() {
        return Err(malformed(path, "not a regular file"));
    }
    if secret && metadata.permissions().mode() & 0o007 != 0 {
        log::warn!("{}: everybody on this host may read this key; chmod o= {0}", path.display());
    }
    let mut bytes = Vec::new();
    File::open(path).and_then(|file| file.take(FILE_MAX_BYTES + 1).read_to_end(&mut bytes)).map_err(failed)?;
    if bytes.len() as u64 > FILE_MAX_BYTES {
        return Err(malformed(path, format!("longer than {FILE_MAX_BYTES} bytes")));
    }
    Ok(bytes)
}

/// Reads a file of pre-shared keys.
pub fn keys(path: &Path) -> Result<Keys> {
    let mut keys = Keys::new();
    for (index, line) in read(path, true)?.split(|byte| *byte == b'\n').enumerate() {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        if line.is_empty() {
            continue;
        }
        let wrong = |why: &str| malformed(path, format!("line {}: {why}", index + 1));
        let (user, key) = user_and_key(line).map_err(|why| wrong(&why))?;
        if keys.insert(user, key).is_some() {
            return Err(wrong("a user who is there already"));
        }
    }
    if keys.is_empty() {
        let hint = "psktool -u USER -p FILE makes one";
        return Err(malformed(path, "no user in it").hint(hint));
    }
    Ok(keys)
}

fn user_and_key(line: &[u8]) -> std::result::Result<(Vec<u8>, Vec<u8>), String> {
    let mut halves = line.splitn(2, |byte| *byte == b':');
    let (Some(user), Some(key)) = (halves.next(), halves.next()) else {
        return Err("not USER:HEXKEY".into());
    };
    // A name that is not text is written in hexadecimal behind a number sign.
    let user = match user.strip_prefix(b"#") {
        Some(digits) => from_hex(digits).ok_or("a name behind '#' is in hexadecimal")?,
        None => user.to_vec(),
    };
    if !(1..=USER_MAX_BYTES).contains(&user.len()) {
        return Err(format!("a name has 1 to {USER_MAX_BYTES} bytes"));
    }
    let key = from_hex(key).ok_or("the key is not in hexadecimal")?;
    if !KEY_BYTES.contains(&key.len()) {
        return Err(format!("a key has {} to {} bytes", KEY_BYTES.start(), KEY_BYTES.end()));
    }
    Ok((user, key))
}

fn from_hex(digits: &[u8]) -> Option<Vec<u8>> {
    let value = |digit: u8| char::from(digit).to_digit(16);
    let byte = |pair: &[u8]| match pair {
        [high, low] => u8::try_from(value(*high)? << 4 | value(*low)?).ok(),
        _ => None,
    };
    digits.chunks(2).map(byte).collect()
}
