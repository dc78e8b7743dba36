//! The weak-memory side of I2 and I3, under loom: every schedule and every value that the C11 rules let a load see.
//!
//! `RUSTFLAGS="--cfg loom" cargo test --no-default-features --test loom`. Three parts:
//! * `protocol`: the rules alone, on a few cells, each with the mutants that break it. A mutant that no execution
//!   exposes fails its test, so that the model is known to tell the rules from their absence.
//! * `bits`: the summary above a bitmap's words, the product's and the rules alone.
//! * `core`: the real core with an image whose bytes are relaxed cells.
//!
//! **The kernel's I/O as relaxed atomics.** A pwrite is plain stores into the page cache by a kernel thread, a pread
//! plain loads; with O_DIRECT the device does both. Of one byte all agree on the order of its values (the page cache is
//! coherent memory, a device has one copy), and a call that has returned has happened. That is what a relaxed atomic
//! gives: coherence of each cell, and no order between two of them. What the kernel gives beyond it (page locks,
//! barriers in system calls) may differ between file systems and machines, so none of it is relied upon: what holds
//! here holds there.

#![cfg(loom)]

#[path = "loom/bits.rs"]
mod bits;
#[path = "loom/core.rs"]
mod core;
#[path = "loom/explore.rs"]
mod explore;
#[path = "loom/protocol.rs"]
mod protocol;
