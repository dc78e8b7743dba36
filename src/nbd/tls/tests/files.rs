//! What is read from files, and how what is wrong there is told.

use super::rig::{Authority, LATER, fill};
use crate::error::{Error, errno};
use crate::nbd::tls::files::keys;
use crate::nbd::tls::server::TlsServer;
use crate::nbd::tls::{Credentials, Store};
use std::fs;
use std::path::Path;

const KEY: &str = "000102030405060708090a0b0c0d0e0f";

fn keys_of(text: &[u8]) -> Result<Vec<(Vec<u8>, usize)>, Error> {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("keys.psk");
    fs::write(&file, text).unwrap();
    Ok(keys(&file)?.into_iter().map(|(user, key)| (user, key.len())).collect())
}

#[test]
fn keys_are_read_as_psktool_writes_them() {
    let text = format!("alice:{KEY}\nbob:{KEY}{KEY}{KEY}{KEY}\r\n\n#FF3a:{}\n", KEY.to_uppercase());
    let expected = [(b"alice".to_vec(), 16), (b"bob".to_vec(), 64), (vec![0xff, 0x3a], 16)];
    assert_eq!(keys_of(text.as_bytes()).unwrap(), expected);
}

#[test]
fn malformed_keys_are_told_with_their_line_and_without_the_key() {
    let long = "x".repeat(256);
    for (line, why) in [
        ("alice".to_owned(), "not USER:HEXKEY"),
        ("alice:".to_owned(), "a key has 16 to 64 bytes"),
        ("alice:0011223344".to_owned(), "a key has 16 to 64 bytes"),
        (format!("alice:{KEY}{KEY}{KEY}{KEY}00"), "a key has 16 to 64 bytes"),
        (format!("alice:{KEY}0"), "the key is not in hexadecimal"),
        (format!("alice:{KEY}0g"), "the key is not in hexadecimal"),
        (format!("alice: {KEY}"), "the key is not in hexadecimal"),
        (format!(":{KEY}"), "a name has 1 to 255 bytes"),
        (format!("{long}:{KEY}"), "a name has 1 to 255 bytes"),
        (format!("#xy:{KEY}"), "a name behind '#' is in hexadecimal"),
        (format!("first:{KEY}"), "a user who is there already"),
    ] {
        let e = keys_of(format!("first:{KEY}\n\n{line}\n").as_bytes()).unwrap_err();
        let text = e.to_string();
        assert!(text.contains("keys.psk: line 3: ") && text.contains(why), "{line}: {text}");
        assert!(e.errno() == errno::EINVAL && !text.contains("0011223344") && !text.contains(KEY), "{text}");
    }
    for text in ["", "\n\n"] {
        assert!(keys_of(text.as_bytes()).unwrap_err().to_string().contains("no user in it"));
    }
}

fn refusal(dir: &Path) -> String {
    TlsServer::x509(dir, true, true).err().expect("it was taken").to_string()
}

#[test]
fn a_file_that_is_missing_or_malformed_is_named() {
    let authority = Authority::new("authority");
    let own = authority.issue(1, LATER);
    let other = authority.issue(2, LATER);
    for name in ["ca-cert.pem", "server-cert.pem", "server-key.pem"] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        let at = path.display().to_string();
        fill(dir.path(), &authority, &own);
        fs::remove_file(&path).unwrap();
        assert_eq!(refusal(dir.path()), format!("Unable to access credentials {at}: No such file or directory"));
        fs::write(&path, "no PEM").unwrap();
        assert!(refusal(dir.path()).starts_with(&format!("credentials {at}: no ")));
        fs::write(&path, "-----BEGIN CERTIFICATE-----\n****\n-----END CERTIFICATE-----\n").unwrap();
        let text = refusal(dir.path());
        assert!(text.starts_with(&format!("credentials {at}: ")), "{text}");
        fs::write(&path, "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n").unwrap();
        let text = refusal(dir.path());
        assert!(text.starts_with(&format!("credentials {at}: ")), "{text}");
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        assert!(refusal(dir.path()).contains("not a regular file"));
    }
    let dir = tempfile::tempdir().unwrap();
    fill(dir.path(), &authority, &own);
    fs::write(dir.path().join("ca-crl.pem"), "x").unwrap();
    assert!(refusal(dir.path()).contains("ca-crl.pem: no list of revoked certificates in it"));
    fs::remove_file(dir.path().join("ca-crl.pem")).unwrap();
    fs::write(dir.path().join("server-key.pem"), &other.key).unwrap();
    let text = refusal(dir.path());
    assert!(text.contains("server-cert.pem: with server-key.pem: ") && text.contains("KeyMismatch"), "{text}");
}

#[test]
fn a_certificate_that_clients_would_refuse_is_refused_first() {
    let authority = Authority::new("authority");
    let expired = authority.issue(1, 2020);
    let foreign = Authority::new("another authority").issue(1, LATER);
    for (own, why) in [(expired, "xpired"), (foreign, "UnknownIssuer")] {
        let dir = tempfile::tempdir().unwrap();
        fill(dir.path(), &authority, &own);
        let text = refusal(dir.path());
        assert!(text.contains("server-cert.pem: ") && text.contains(why), "{text}");
        // Unless somebody says that it is right so.
        TlsServer::x509(dir.path(), true, false).unwrap();
    }
}

#[test]
fn a_name_stands_for_its_credentials_until_it_is_removed() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("keys.psk");
    fs::write(&file, format!("alice:{KEY}\n")).unwrap();
    let store = Store::default();
    let credentials = Credentials::Psk { file };
    store.add("tls0", &credentials).unwrap();
    assert_eq!(store.add("tls0", &credentials).unwrap_err().errno(), errno::EEXIST);
    let missing = Credentials::X509 { dir: dir.path().to_owned(), verify_peer: true, check: true };
    assert_eq!(store.add("tls1", &missing).unwrap_err().errno(), errno::ENOENT);
    assert!(store.get("tls1").is_none() && store.get("tls0").is_some());
    assert!(store.remove("tls0") && !store.remove("tls0") && store.get("tls0").is_none());
}
