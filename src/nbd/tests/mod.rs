//! The server against a client that says what it likes, over Unix sockets.

mod client;
mod export;
mod handshake;
mod hostile;
mod server;
mod transmission;

use super::server::{Server, ServerOptions};
use client::Client;
use export::Shelf;
use std::path::PathBuf;
use std::sync::Arc;

/// A server of in-memory exports.
struct Rig {
    server: Server,
    shelf: Arc<Shelf>,
    path: PathBuf,
    _dir: tempfile::TempDir,
}

impl Rig {
    fn new() -> Rig {
        Rig::with(ServerOptions::default())
    }

    fn with(options: ServerOptions) -> Rig {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let shelf = Arc::new(Shelf::default());
        let server = Server::start(&[super::Address::Unix(path.clone())], shelf.clone(), options).unwrap();
        Rig { server, shelf, path, _dir: dir }
    }

    /// A connection after the greeting.
    fn client(&self) -> Client {
        Client::connect(&self.path)
    }
}

/// Looks until something holds, for half a minute at most.
fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..6000 {
        if holds() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    panic!("never: {what}");
}
