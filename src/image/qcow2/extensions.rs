//! Header extensions: what stands between the header and the end of the first cluster ("Header extensions" of QEMU's
//! docs/interop/qcow2).
//!
//! All extensions are kept as they are, in their order, known or not, so that a rewritten header loses nothing. The
//! known ones are checked by [`Extensions::parse`] and read through functions.

use super::header::{be32, be64};
use crate::error::{Error, Result, errno};

/// End of the extensions.
const END: u32 = 0;
/// Format of the backing file.
pub const BACKING_FORMAT: u32 = 0xe279_2aca;
/// Names of feature bits.
pub const FEATURE_NAMES: u32 = 0x6803_f857;
/// Persistent dirty bitmaps.
pub const BITMAPS: u32 = 0x2385_2875;
/// Where a LUKS header lies.
pub const ENCRYPTION: u32 = 0x0537_be77;
/// Name of the external data file.
pub const DATA_FILE: u32 = 0x4441_5441;
/// Our mark: a UUID, see `image::persistent`.
pub const MARK: u32 = 0x666c_6565;
/// Nothing: room that a header was being moved out of when the power failed. Only this program makes it.
pub const FILLER: u32 = 0x666c_6666;

/// Most bytes of the names that extensions hold.
const NAME_MAX_BYTES: usize = 1023;
/// Bytes of an entry in the feature name table: type, bit, 46 bytes of name.
const FEATURE_NAME_BYTES: usize = 48;
/// Bytes of the bitmaps extension.
const BITMAPS_BYTES: usize = 24;

/// One extension as it stands in the file, without its padding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Extension {
    /// Its type.
    pub kind: u32,
    /// Its data.
    pub data: Vec<u8>,
}

/// The bitmaps extension ("Bitmaps extension"), decoded; whoever reads the directory checks it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BitmapsExtension {
    /// Bytes 0-3: `nb_bitmaps`.
    pub count: u32,
    /// Bytes 4-7: reserved, 0 in a good image.
    pub reserved: u32,
    /// Bytes 8-15: `bitmap_directory_size` in bytes.
    pub directory_bytes: u64,
    /// Bytes 16-23: `bitmap_directory_offset` in the file.
    pub directory_offset: u64,
}

/// All extensions of an image.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Extensions {
    /// In the order of the file.
    pub all: Vec<Extension>,
}

fn bad(what: &str, why: impl Into<String>) -> Error {
    Error::new(errno::EINVAL, "qcow2 header", format!("extension: {what}: {}", why.into()))
}

fn name_of(kind: u32) -> String {
    match kind {
        BACKING_FORMAT => "backing file format".into(),
        FEATURE_NAMES => "feature name table".into(),
        BITMAPS => "bitmaps".into(),
        ENCRYPTION => "full disk encryption".into(),
        DATA_FILE => "external data file name".into(),
        _ => format!("{kind:#010x}"),
    }
}

impl Extensions {
    /// Reads the extensions in `area`, which begins behind the header and ends with the first cluster or with the
    /// backing file's name. The end of the area ends them as the end marker does.
    pub fn parse(area: &[u8]) -> Result<Extensions> {
        let mut extensions = Extensions::default();
        let mut rest = area;
        while rest.len() >= 8 {
            let (kind, count) = (be32(rest, 0), be32(rest, 4) as usize);
            if kind == END {
                break;
            }
            let Some(data) = rest.get(8..).and_then(|behind| behind.get(..count)) else {
                let why = format!("{count} bytes are more than the {} left for it", rest.len() - 8);
                return Err(bad(&name_of(kind), why));
            };
            extensions.add(kind, data)?;
            // The padding of the last one may lie behind the area.
            rest = rest.get(8 + count.next_multiple_of(8)..).unwrap_or_default();
        }
        Ok(extensions)
    }

    fn add(&mut self, kind: u32, data: &[u8]) -> Result<()> {
        let name = name_of(kind);
        let known = [BACKING_FORMAT, FEATURE_NAMES, BITMAPS, ENCRYPTION, DATA_FILE].contains(&kind);
        if known && self.find(kind).is_some() {
            return Err(bad(&name, "stands there twice"));
        }
        match kind {
            BACKING_FORMAT | DATA_FILE if !(1..=NAME_MAX_BYTES).contains(&data.len()) => {
                return Err(bad(&name, format!("length {} is not from 1 to {NAME_MAX_BYTES}", data.len())));
            }
            DATA_FILE if data.contains(&0) => return Err(bad(&name, "has a NUL byte")),
            BACKING_FORMAT if !data.iter().all(u8::is_ascii_graphic) => {
                return Err(bad(&name, "has other than printable ASCII characters"));
            }
            FEATURE_NAMES if !data.len().is_multiple_of(FEATURE_NAME_BYTES) => {
                return Err(bad(&name, format!("length {} is no multiple of {FEATURE_NAME_BYTES}", data.len())));
            }
            BITMAPS if data.len() != BITMAPS_BYTES => {
                return Err(bad(&name, format!("length {} is not {BITMAPS_BYTES}", data.len())));
            }
            _ => (),
        }
        self.all.push(Extension { kind, data: data.to_vec() });
        Ok(())
    }

    /// Bytes that the extensions take, without an end marker.
    pub fn len_bytes(&self) -> usize {
        self.all.iter().map(|extension| 8 + extension.data.len().next_multiple_of(8)).sum()
    }

    /// The extensions as they stand in the file, each with its padding, without an end marker.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.len_bytes());
        for extension in &self.all {
            bytes.extend_from_slice(&extension.kind.to_be_bytes());
            bytes.extend_from_slice(&(extension.data.len() as u32).to_be_bytes());
            bytes.extend_from_slice(&extension.data);
            bytes.resize(bytes.len().next_multiple_of(8), 0);
        }
        bytes
    }

    /// Gives the extension of a type this data, in its place where it stands already.
    pub fn set(&mut self, kind: u32, data: Vec<u8>) {
        match self.all.iter_mut().find(|extension| extension.kind == kind) {
            Some(extension) => extension.data = data,
            None => self.all.push(Extension { kind, data }),
        }
    }

    /// Removes all extensions of a type.
    pub fn remove(&mut self, kind: u32) {
        self.all.retain(|extension| extension.kind != kind);
    }

    /// The data of the first extension of a type.
    pub fn find(&self, kind: u32) -> Option<&[u8]> {
        self.all.iter().find(|extension| extension.kind == kind).map(|extension| extension.data.as_slice())
    }

    /// The backing file's format.
    pub fn backing_format(&self) -> Option<&str> {
        self.find(BACKING_FORMAT).and_then(|name| std::str::from_utf8(name).ok())
    }

    /// The external data file's name.
    pub fn data_file(&self) -> Option<&[u8]> {
        self.find(DATA_FILE)
    }

    /// The bitmaps extension.
    pub fn bitmaps(&self) -> Option<BitmapsExtension> {
        self.find(BITMAPS).map(|data| BitmapsExtension {
            count: be32(data, 0),
            reserved: be32(data, 4),
            directory_bytes: be64(data, 8),
            directory_offset: be64(data, 16),
        })
    }

    /// Makes this the bitmaps extension.
    pub fn set_bitmaps(&mut self, bitmaps: BitmapsExtension) {
        let mut data = bitmaps.count.to_be_bytes().to_vec();
        data.extend_from_slice(&bitmaps.reserved.to_be_bytes());
        data.extend_from_slice(&bitmaps.directory_bytes.to_be_bytes());
        data.extend_from_slice(&bitmaps.directory_offset.to_be_bytes());
        self.set(BITMAPS, data);
    }

    /// What the feature name table calls a bit of `incompatible_features`.
    pub fn incompatible_name(&self, bit: u8) -> Option<String> {
        let mut entries = self.find(FEATURE_NAMES)?.chunks_exact(FEATURE_NAME_BYTES);
        let name = entries.find(|entry| entry.starts_with(&[0, bit]))?.get(2..)?;
        let end = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
        Some(String::from_utf8_lossy(name.get(..end)?).into_owned())
    }
}
