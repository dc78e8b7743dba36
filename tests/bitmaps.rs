//! Users' bitmaps and batches of the unmounted core; each test is named by the promise that it checks.

#![cfg(not(feature = "shuttle"))]

#[path = "kill/blank.rs"]
mod blank;
#[path = "core/rig.rs"]
mod rig;

#[path = "bitmaps/batches.rs"]
mod batches;
#[path = "bitmaps/faults.rs"]
mod faults;
#[path = "bitmaps/frozen.rs"]
mod frozen;
#[path = "bitmaps/holds.rs"]
mod holds;
#[path = "recovery/medium.rs"]
mod medium;
#[path = "bitmaps/model.rs"]
mod model;
#[path = "bitmaps/persistence.rs"]
mod persistence;
#[path = "bitmaps/push.rs"]
mod push;
#[path = "bitmaps/qemu.rs"]
mod qemu;
#[path = "bitmaps/rules.rs"]
mod rules;
#[path = "bitmaps/steps.rs"]
mod steps;
mod tools;
