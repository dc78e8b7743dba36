//! fleecefs: a FUSE-mounted fleecing file system.
//!
//! A guest writes to a live disk file; at any instant one `mkdir` freezes what the disk held, and ordinary tools read
//! the frozen view as a file, with a map of what changed since any earlier point.
//!
//! Layers, each depending only on those below it (a test enforces it): [`cli`] and [`daemon`] over the surfaces
//! [`fuse`], [`nbd`] and [`qmp`], over [`backup`] (maps), over [`fleece`] (the core), over [`bitmap`] and [`image`], over
//! [`storage`]; [`volume`] (partitions and logical volumes) stands beside [`image`]; [`units`], [`error`] and [`sync`]
//! are everybody's.

pub mod backup;
pub mod bitmap;
pub mod cli;
pub mod daemon;
pub mod error;
pub mod fleece;
pub mod fuse;
pub mod image;
pub mod nbd;
pub mod qmp;
pub mod storage;
pub mod sync;
pub mod units;
pub mod volume;
