//! Behaviour of the unmounted core on files in memory; each test is named by the promise that it checks.

#![cfg(not(feature = "shuttle"))]

#[path = "core/rig.rs"]
mod rig;

#[path = "core/carry.rs"]
mod carry;
#[path = "core/disks.rs"]
mod disks;
#[path = "core/layers.rs"]
mod layers;
#[path = "core/limits.rs"]
mod limits;
#[path = "core/pace.rs"]
mod pace;
#[path = "core/release.rs"]
mod release;
#[path = "core/skip.rs"]
mod skip;
#[path = "core/tracking.rs"]
mod tracking;
#[path = "core/views.rs"]
mod views;
#[path = "core/volumes.rs"]
mod volumes;
