//! What is left after a kill at every step, a power loss at every moment, a foreign writer, and damage.
//!
//! `FLEECEFS_FULL=1` looks at many more of the states that a power loss may leave.

#![cfg(not(feature = "shuttle"))]

#[path = "core/rig.rs"]
mod rig;

#[path = "recovery/bitmaps.rs"]
mod bitmaps;
#[path = "kill/blank.rs"]
mod blank;
#[path = "recovery/damage.rs"]
mod damage;
#[path = "recovery/foreign.rs"]
mod foreign;
#[path = "recovery/foreign_matrix.rs"]
mod foreign_matrix;
#[path = "recovery/kill.rs"]
mod kill;
#[path = "recovery/lost.rs"]
mod lost;
#[path = "recovery/medium.rs"]
mod medium;
#[path = "recovery/power.rs"]
mod power;
#[path = "recovery/qcow2.rs"]
mod qcow2;
#[path = "recovery/regions.rs"]
mod regions;
#[path = "recovery/seams.rs"]
mod seams;
#[path = "bitmaps/steps.rs"]
mod steps;
