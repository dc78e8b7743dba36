//! NBD: live disks and frozen views for any NBD client, after the NBD project's `doc/proto.md`.
//!
//! A surface like `fuse` and `qmp`: it decodes, calls the core, and replies.
//!
//! | module | what it is |
//! | --- | --- |
//! | [`proto`] | the wire format, pure |
//! | [`export`] | what is served, as traits |
//! | [`exports`] | disks and views, and their names |
//! | [`transport`], [`input`] | a connection's bytes |
//! | [`handshake`] | until an export is agreed on |
//! | [`session`], `work` | requests: who receives them, what they do |
//! | [`house`], [`memory`] | what all connections share, with its bounds |
//! | [`server`], [`listen`] | sockets, connections, the watch over them, the stop |

pub mod export;
pub mod exports;
pub mod handshake;
pub mod house;
pub mod input;
pub mod listen;
pub mod memory;
pub mod proto;
pub mod server;
pub mod session;
#[cfg(test)]
mod tests;
pub mod tls;
pub mod transport;
mod work;

pub use listen::Address;
pub use server::{Server, ServerOptions};
