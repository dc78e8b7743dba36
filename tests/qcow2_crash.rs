//! qcow2 images whose host loses power, or whose daemon is killed, at any moment of a session.
//!
//! A session of a guest is recorded change by change as it reaches the medium, then cut at every change. Each image
//! that a crash may leave there is opened by us, which repairs it, and some by QEMU; `judge` says what must hold of it.
//! `FLEECEFS_FULL=1` judges more than 20,000 images, and `qemu-img check -r all` repairs 500 of them; each test tells
//! how many it has judged.

#![cfg(not(any(feature = "shuttle", loom)))]

#[path = "qcow2_crash/driver.rs"]
mod driver;
#[path = "qcow2_crash/images.rs"]
mod images;
#[path = "qcow2_crash/judge.rs"]
mod judge;
#[path = "qcow2_crash/oracle.rs"]
mod oracle;
#[path = "qcow2_crash/power.rs"]
mod power;
#[path = "qcow2_crash/qemu.rs"]
mod qemu;
#[path = "qcow2_crash/recorder.rs"]
mod recorder;
#[path = "qcow2_crash/scripts.rs"]
mod scripts;
#[path = "qcow2_crash/session.rs"]
mod session;
mod tools;
