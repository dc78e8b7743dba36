//! qcow2 images: what QEMU wrote is read byte for byte, and what breaks a rule is refused untouched.

#![cfg(not(feature = "shuttle"))]

#[path = "qcow2/build.rs"]
mod build;
#[path = "qcow2/chains.rs"]
mod chains;
#[path = "qcow2/creating.rs"]
mod creating;
#[path = "qcow2/differential.rs"]
mod differential;
#[path = "qcow2/flips.rs"]
mod flips;
#[path = "qcow2/malformed.rs"]
mod malformed;
#[path = "qcow2/media.rs"]
mod media;
#[path = "qcow2/qemu.rs"]
mod qemu;
mod tools;
#[path = "qcow2/writing.rs"]
mod writing;
