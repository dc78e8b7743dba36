//! Servers under TLS beside clients of the same library, in one process.

mod files;
mod handshakes;
mod rig;
mod streams;
