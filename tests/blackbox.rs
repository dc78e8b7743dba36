//! One test per promise of the manual, driving the real program on real mounts.
//!
//! A test needs nothing but a directory of its own and the tools it names: a tool that is absent gives one `skip` line,
//! or a failure where `FLEECEFS_REQUIRE_TOOLS` is set. `FLEECEFS_FULL` asks for the full sizes.

#[path = "blackbox/harness.rs"]
#[macro_use]
mod harness;

#[path = "blackbox/backup_chain.rs"]
mod backup_chain;
#[path = "blackbox/backups.rs"]
mod backups;
#[path = "blackbox/bitmaps.rs"]
mod bitmaps;
#[path = "blackbox/carry.rs"]
mod carry;
#[path = "blackbox/compare.rs"]
mod compare;
#[path = "blackbox/consumers.rs"]
mod consumers;
#[path = "blackbox/crash.rs"]
mod crash;
#[path = "blackbox/faults.rs"]
mod faults;
#[path = "blackbox/foreign.rs"]
mod foreign;
#[path = "blackbox/foreign_deeds.rs"]
mod foreign_deeds;
#[path = "blackbox/foreign_devices.rs"]
mod foreign_devices;
#[path = "blackbox/formats.rs"]
mod formats;
#[path = "blackbox/freeze.rs"]
mod freeze;
#[path = "blackbox/freeze_rig.rs"]
mod freeze_rig;
#[path = "blackbox/fsx.rs"]
mod fsx;
#[path = "blackbox/increments.rs"]
mod increments;
#[path = "blackbox/kill_rounds.rs"]
mod kill_rounds;
#[path = "blackbox/live.rs"]
mod live;
#[path = "blackbox/load.rs"]
mod load;
#[path = "blackbox/locks.rs"]
mod locks;
#[path = "blackbox/loops.rs"]
mod loops;
#[path = "blackbox/map_readers.rs"]
mod map_readers;
#[path = "blackbox/maps.rs"]
mod maps;
#[path = "blackbox/mounting.rs"]
mod mounting;
#[path = "blackbox/nbd.rs"]
mod nbd;
#[path = "blackbox/nbd_exports.rs"]
mod nbd_exports;
#[cfg(feature = "tls")]
#[path = "blackbox/nbd_tls.rs"]
mod nbd_tls;
#[path = "blackbox/older_copies.rs"]
mod older_copies;
#[path = "blackbox/pace.rs"]
mod pace;
#[path = "blackbox/paths.rs"]
mod paths;
#[path = "blackbox/power_loss.rs"]
mod power_loss;
#[path = "blackbox/probing.rs"]
mod probing;
#[path = "blackbox/push.rs"]
mod push;
#[path = "blackbox/qcow2.rs"]
mod qcow2;
#[path = "blackbox/qcow2_bitmaps.rs"]
mod qcow2_bitmaps;
#[path = "blackbox/qcow2_cells.rs"]
mod qcow2_cells;
#[path = "blackbox/qcow2_matrix.rs"]
mod qcow2_matrix;
#[path = "blackbox/qmp.rs"]
mod qmp;
#[path = "blackbox/qmp_peer.rs"]
mod qmp_peer;
#[path = "blackbox/recipes.rs"]
mod recipes;
#[path = "blackbox/run.rs"]
mod run;
#[path = "blackbox/skip.rs"]
mod skip;
#[path = "blackbox/snapshots.rs"]
mod snapshots;
#[path = "blackbox/sparse.rs"]
mod sparse;
#[path = "blackbox/stress.rs"]
mod stress;
#[path = "blackbox/tree.rs"]
mod tree;
#[path = "blackbox/volumes.rs"]
mod volumes;
