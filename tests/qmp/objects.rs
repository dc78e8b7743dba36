//! `object-add` and `object-del`: QEMU's texts, in its order.

use super::exports::run;
use super::*;
use std::fs;

#[test]
fn objects_are_refused_in_qemus_words() {
    let f = Fixture::new();
    let mut c = f.raw().negotiated();
    let dir = f.dir.path().join("keys");
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("keys.psk"), "alice:000102030405060708090a0b0c0d0e0f\n").unwrap();
    let missing = format!("Unable to access credentials {}/ca-cert.pem: No such file or directory", dir.display());
    let psk = |more: Value| {
        let mut object = json!({"qom-type": "tls-creds-psk", "id": "p", "dir": dir, "endpoint": "server"});
        object.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        object
    };
    for (object, text) in [
        (json!({"qom-type": "nonsense", "id": "a"}), "Parameter 'qom-type' does not accept value 'nonsense'"),
        (json!({"qom-type": "tls-creds-psk"}), "Parameter 'id' is missing"),
        (json!({"id": "x"}), "Parameter 'qom-type' is missing"),
        (psk(json!({"id": "1a"})), "Parameter 'id' expects an identifier"),
        (psk(json!({"id": "a b"})), "Parameter 'id' expects an identifier"),
        (psk(json!({"id": ""})), "Parameter 'id' expects an identifier"),
        (psk(json!({"endpoint": "serve"})), "Parameter 'endpoint' does not accept value 'serve'"),
        (psk(json!({"foo": 1})), "Parameter 'foo' is unexpected"),
        (psk(json!({"sanity-check": true})), "Parameter 'sanity-check' is unexpected"),
        (psk(json!({"dir": 1})), "Invalid parameter type for 'dir', expected: string"),
        (psk(json!({"verify-peer": "yes"})), "Invalid parameter type for 'verify-peer', expected: boolean"),
        (psk(json!({"username": "x"})), "username should not be set when endpoint=server"),
        (json!({"qom-type": "tls-creds-psk", "id": "p", "endpoint": "server"}), "Missing 'dir' property value"),
        (psk(json!({"qom-type": "tls-creds-x509"})), &*missing),
        (psk(json!({"qom-type": "tls-creds-x509", "username": "x"})), "Parameter 'username' is unexpected"),
        // Ours.
        (psk(json!({"priority": "NORMAL"})), "priority is not supported by fleecefs"),
        (psk(json!({"endpoint": "client"})), "endpoint=client is not supported by fleecefs"),
        (json!({"qom-type": "tls-creds-psk", "id": "p", "dir": dir}), "endpoint=client is not supported by fleecefs"),
        (psk(json!({"qom-type": "tls-creds-x509", "passwordid": "s"})), "passwordid is not supported by fleecefs"),
        (psk(json!({"dir": "keys"})), "Parameter 'dir' is not an absolute path"),
        (psk(json!({"dir": f.dir.path().join("mnt/keys")})), "lies inside the mount point"),
    ] {
        let got = run(&mut c, "object-add", &object);
        assert!(got.as_str().is_some_and(|got| got.contains(text)), "{object}: {got}");
    }
    assert_eq!(run(&mut c, "object-add", &psk(json!({}))), json!({}));
    let duplicate = "attempt to add duplicate property 'p' to object (type 'container')";
    assert_eq!(run(&mut c, "object-add", &psk(json!({}))), duplicate);
    assert_eq!(run(&mut c, "object-del", &json!({"id": "p", "b": 1})), "Parameter 'b' is unexpected");
    assert_eq!(run(&mut c, "object-del", &json!({})), "Parameter 'id' is missing");
    assert_eq!(run(&mut c, "object-del", &json!({"id": "p"})), json!({}));
    assert_eq!(run(&mut c, "object-del", &json!({"id": "p"})), "object 'p' not found");
}

#[test]
fn a_server_over_tcp_starts_with_credentials_alone() {
    let f = Fixture::new();
    let mut c = f.raw().negotiated();
    fs::write(f.dir.path().join("keys.psk"), "alice:000102030405060708090a0b0c0d0e0f\n").unwrap();
    let object = json!({"qom-type": "tls-creds-psk", "id": "tls0", "dir": f.dir.path(), "endpoint": "server"});
    let addr = json!({"type": "inet", "data": {"host": "127.0.0.1", "port": "0"}});
    let start = json!({"addr": addr, "tls-creds": "tls0"});
    assert_eq!(run(&mut c, "nbd-server-start", &start), "No TLS credentials with id 'tls0'");
    assert_eq!(run(&mut c, "object-add", &object), json!({}));
    let text = run(&mut c, "nbd-server-start", &json!({ "addr": addr }));
    assert!(text.as_str().unwrap().contains("TCP needs TLS"), "{text}");
    assert_eq!(run(&mut c, "nbd-server-start", &start), json!({}));
}
