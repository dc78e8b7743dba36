//! What the header tells of an image, for people and under the names of QEMU's ImageInfo.

use super::header::{Compression, Encryption, Header, compatible};
use serde_json::{Map, Value, json};
use std::path::Path;

impl Header {
    /// QEMU's name of the version.
    pub fn compat(&self) -> &'static str {
        if self.version == 2 { "0.10" } else { "1.1" }
    }

    /// Whether refcounts may be late.
    pub fn lazy_refcounts(&self) -> bool {
        self.compatible_features & compatible::LAZY_REFCOUNTS != 0
    }

    /// How compressed clusters are compressed.
    pub fn compression_name(&self) -> &'static str {
        match self.compression {
            Compression::Zlib => "zlib",
            Compression::Zstd => "zstd",
        }
    }

    /// How guest data are encrypted, where they are.
    pub fn encryption_name(&self) -> Option<&'static str> {
        self.encryption.map(|encryption| match encryption {
            Encryption::Aes => "aes",
            Encryption::Luks => "luks",
        })
    }

    /// The backing file as the image names it.
    pub fn backing_name(&self) -> Option<String> {
        self.backing.as_ref().map(|backing| String::from_utf8_lossy(&backing.name).into_owned())
    }

    /// The external data file as the image names it.
    pub fn data_file_name(&self) -> Option<String> {
        self.extensions.data_file().map(|name| String::from_utf8_lossy(name).into_owned())
    }
}

/// A relative name is relative to the image's directory, as in QEMU.
fn beside(path: &Path, name: &str) -> String {
    let has_protocol = name.split_once(':').is_some_and(|(before, _)| !before.contains('/'));
    if has_protocol {
        return name.to_owned();
    }
    path.parent().unwrap_or(Path::new("")).join(name).to_string_lossy().into_owned()
}

/// Adds to an ImageInfo of the image at `path` what its header tells.
pub fn describe(header: &Header, path: &Path, object: &mut Map<String, Value>) {
    object.insert("dirty-flag".into(), json!(header.is_dirty()));
    object.insert("cluster-size".into(), json!(header.cluster_size()));
    if let Some(backing) = header.backing_name() {
        object.insert("full-backing-filename".into(), json!(beside(path, &backing)));
        object.insert("backing-filename".into(), json!(backing));
    }
    if let Some(format) = header.extensions.backing_format() {
        object.insert("backing-filename-format".into(), json!(format));
    }
    let mut data = Map::new();
    data.insert("compat".into(), json!(header.compat()));
    data.insert("compression-type".into(), json!(header.compression_name()));
    data.insert("refcount-bits".into(), json!(1u64 << header.refcount_order));
    if header.version >= 3 {
        data.insert("lazy-refcounts".into(), json!(header.lazy_refcounts()));
        data.insert("corrupt".into(), json!(header.is_corrupt()));
        data.insert("extended-l2".into(), json!(header.has_extended_l2()));
    }
    if let Some(name) = header.encryption_name() {
        object.insert("encrypted".into(), json!(true));
        data.insert("encrypt".into(), json!({ "format": name }));
    }
    if let Some(name) = header.data_file_name() {
        data.insert("data-file".into(), json!(name));
    }
    if header.has_data_file() {
        data.insert("data-file-raw".into(), json!(header.has_raw_data_file()));
    }
    object.insert("format-specific".into(), json!({ "type": "qcow2", "data": data }));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_relative_to_the_image_unless_they_say_otherwise() {
        let image = Path::new("/a/b.qcow2");
        assert_eq!(beside(image, "base.raw"), "/a/base.raw");
        assert_eq!(beside(image, "/c/base.raw"), "/c/base.raw");
        assert_eq!(beside(image, "nbd:unix:/s"), "nbd:unix:/s");
        assert_eq!(beside(image, "./x:y"), "/a/./x:y");
    }
}
