//! Fuzz targets of the qcow2 driver, of what guests write into disks and of what NBD clients send: ordinary functions of bytes that panic where something is wrong.
//!
//! They are built twice from here: by the binaries of this crate, which libFuzzer drives with coverage guidance
//! (`contrib/fuzz`), and by `tests/fuzz_corpus.rs` of the main crate, which replays the seeds and mutations of them on
//! any toolchain.
//!
//! | target | input | what holds |
//! | --- | --- | --- |
//! | [`header`] | length of the file (8 bytes), first cluster | what is accepted keeps every rule and says all that stands there |
//! | [`tables`] | kind (1 byte), geometry (1 byte), bytes of that kind | the same for entries of every table, and compressed streams |
//! | [`image`] | [`input`]: a sparse file, and operations on it | see the head of the module |
//! | [`volumes`] | [`input`] | volumes lie inside of their disks, tables of any bytes are scanned in bounded time and memory |
//! | [`nbd`] | choices (1 byte), what a client sends | see the head of the module |
//!
//! [`limits`] holds for all: no panic, no unbounded work, no allocation beyond what the driver documents.

pub mod header;
pub mod image;
pub mod input;
pub mod limits;
pub mod meter;
pub mod model;
pub mod mutation;
pub mod nbd;
pub mod tables;
pub mod volumes;

pub use mutation::mutate;

/// What is fuzzed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// The header with its extensions.
    Header,
    /// Entries of tables.
    Tables,
    /// A whole image.
    Image,
    /// Disks with tables.
    Volumes,
    /// Clients of the NBD server.
    Nbd,
}

/// Runs a target on an input. Panics where it finds something.
pub fn run(target: Target, input: &[u8]) {
    limits::within(|| match target {
        Target::Header => header::run(input),
        Target::Tables => tables::run(input),
        Target::Image => image::run(input),
        Target::Volumes => volumes::run(input),
        Target::Nbd => nbd::run(input),
    });
}
