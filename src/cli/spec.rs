//! How images are named on the command line: `[NAME=]IMAGE` and `--disk OPTIONS`.

use crate::daemon::absolute;
use crate::error::{Error, Result, errno};
use crate::fleece::{BlockDevicePolicy, DiskSpec};
use crate::image::{Format, check_l2_cache};
use crate::units::{check_disk_name, parse_size};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// `[NAME=]IMAGE`. Where a file exists under the whole text, that is the image, so that paths with '=' work; else what
/// stands before the first '=' is the name, if it can be one.
pub fn parse_image(text: &OsStr) -> Result<DiskSpec> {
    let bytes = text.as_bytes();
    let whole = || disk(None, Path::new(text));
    if Path::new(text).exists() {
        return whole();
    }
    let Some(at) = bytes.iter().position(|&b| b == b'=') else { return whole() };
    let (name, file) = (bytes.get(..at).unwrap_or_default(), bytes.get(at + 1..).unwrap_or_default());
    match std::str::from_utf8(name) {
        Ok(name) if check_disk_name(name).is_ok() => disk(Some(name.to_owned()), Path::new(OsStr::from_bytes(file))),
        _ => whole(),
    }
}

/// What `--disk` takes.
pub const DISK_SYNTAX: &str = "name=N,file=F[,format=raw|qcow2][,read-only][,snapshot=S][,force-share][,l2-cache-size=SIZE]\
                               [,block-devices=distrust|trust][,no-mark]";

/// [`DISK_SYNTAX`] as QEMU writes options: a comma inside a value is doubled.
pub fn parse_disk_option(text: &OsStr) -> Result<DiskSpec> {
    let bad = |why: String| {
        Error::new(errno::EINVAL, format!("--disk {}", text.to_string_lossy()), why)
            .hint(format!("write {DISK_SYNTAX}; double commas inside values"))
    };
    let mut spec = DiskSpec::default();
    let mut file = None;
    let mut seen = Vec::new();
    for (key, value) in options(text.as_bytes()) {
        let key = String::from_utf8_lossy(&key).into_owned();
        match (key.as_str(), value) {
            ("name", Some(value)) => spec.name = Some(plain(value).map_err(bad)?),
            ("file", Some(value)) => file = Some(PathBuf::from(OsString::from_vec(value))),
            ("format", Some(value)) => spec.format = Some(parse_format(&plain(value).map_err(bad)?)?),
            ("read-only", value) => spec.read_only = switch(&key, value.as_deref()).map_err(bad)?,
            ("snapshot", Some(value)) => spec.snapshot = Some(plain(value).map_err(bad)?),
            ("force-share", value) => spec.force_share = switch(&key, value.as_deref()).map_err(bad)?,
            ("l2-cache-size", Some(value)) => {
                spec.l2_cache_bytes = Some(l2_cache_size(&plain(value).map_err(bad)?).map_err(|e| bad(e.to_string()))?);
            }
            ("block-devices", Some(value)) => {
                let policy = plain(value).and_then(|name| block_devices_by_name(&name));
                spec.block_devices = Some(policy.map_err(|why| bad(format!("parameter 'block-devices': {why}")))?);
            }
            ("no-mark", value) => spec.no_mark = Some(switch(&key, value.as_deref()).map_err(bad)?),
            ("name" | "file" | "format" | "snapshot" | "l2-cache-size" | "block-devices", None) => {
                return Err(bad(format!("parameter '{key}' needs a value")));
            }
            _ => return Err(bad(format!("invalid parameter '{key}'"))),
        }
        if seen.contains(&key) {
            return Err(bad(format!("parameter '{key}' is given twice")));
        }
        seen.push(key);
    }
    let file = file.ok_or_else(|| bad("parameter 'file' is missing".into()))?;
    let named = disk(spec.name.take(), &file)?;
    Ok(DiskSpec { name: named.name, file: named.file, ..spec })
}

/// A size of the L2 cache.
pub fn l2_cache_size(text: &str) -> Result<u64> {
    let bytes = parse_size(text)?;
    check_l2_cache(bytes).map(|()| bytes)
}

/// A format by its name.
pub fn parse_format(name: &str) -> Result<Format> {
    format_by_name(name).map_err(|why| Error::new(errno::EINVAL, format!("format '{name}'"), why))
}

/// The same, as clap has it.
pub fn format_by_name(name: &str) -> std::result::Result<Format, String> {
    let found = [Format::Raw, Format::Qcow2].into_iter().find(|format| format.to_string() == name);
    found.ok_or_else(|| "neither raw nor qcow2".to_owned())
}

/// What is believed of block devices, by the names of the options.
pub fn block_devices_by_name(name: &str) -> std::result::Result<BlockDevicePolicy, String> {
    match name {
        "distrust" => Ok(BlockDevicePolicy::Distrust),
        "trust" => Ok(BlockDevicePolicy::Trust),
        _ => Err("neither distrust nor trust".to_owned()),
    }
}

fn plain(value: Vec<u8>) -> std::result::Result<String, String> {
    String::from_utf8(value).map_err(|_| "a value is not UTF-8".into())
}

/// QEMU's booleans: alone it means on.
fn switch(key: &str, value: Option<&[u8]>) -> std::result::Result<bool, String> {
    match value {
        None | Some(b"on" | b"yes" | b"true") => Ok(true),
        Some(b"off" | b"no" | b"false") => Ok(false),
        Some(_) => Err(format!("parameter '{key}' expects 'on' or 'off'")),
    }
}

/// Splits at single commas; two in a row are one comma of the value. Then splits each at its first '='.
fn options(text: &[u8]) -> Vec<(Vec<u8>, Option<Vec<u8>>)> {
    let mut parts = vec![Vec::new()];
    let mut bytes = text.iter().copied().peekable();
    while let Some(byte) = bytes.next() {
        if byte == b',' && bytes.next_if_eq(&b',').is_none() {
            parts.push(Vec::new());
        } else if let Some(part) = parts.last_mut() {
            part.push(byte);
        }
    }
    let pair = |part: Vec<u8>| match part.iter().position(|&b| b == b'=') {
        Some(at) => {
            let (key, value) = part.split_at(at);
            (key.to_vec(), Some(value.get(1..).unwrap_or_default().to_vec()))
        }
        None => (part, None),
    };
    parts.into_iter().map(pair).collect()
}

/// The daemon's working directory is another one, so paths become absolute, with links to directories resolved. The
/// last part stays as the user gave it: a block device keeps its name, and relative names in an image are taken from
/// the directory of the name that it was opened by.
fn disk(name: Option<String>, file: &Path) -> Result<DiskSpec> {
    let name = name.unwrap_or_else(|| file.file_stem().unwrap_or_default().to_string_lossy().into_owned());
    let file = match (file.parent(), file.file_name()) {
        (Some(parent), Some(last)) if parent.as_os_str().is_empty() => absolute(Path::new("."))?.join(last),
        (Some(parent), Some(last)) => absolute(parent)?.join(last),
        _ => absolute(file)?,
    };
    Ok(DiskSpec { name: Some(name), file, ..DiskSpec::default() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn option(text: &str) -> Result<(String, PathBuf, Option<Format>, bool)> {
        parse_disk_option(OsStr::new(text)).map(|d| (d.name.unwrap(), d.file, d.format, d.read_only))
    }

    #[test]
    fn disk_options_are_qemus() {
        assert_eq!(option("name=a,file=/x").unwrap(), ("a".into(), "/x".into(), None, false));
        assert_eq!(
            option("file=/no/such/a,,b=c,format=raw,read-only,name=d").unwrap(),
            ("d".into(), "/no/such/a,b=c".into(), Some(Format::Raw), true)
        );
        assert_eq!(option("file=/no/such/vda.raw,read-only=off").unwrap().0, "vda");
        let spec = parse_disk_option(OsStr::new("file=/no/such/a.qcow2,format=qcow2,snapshot=a,,b")).unwrap();
        assert_eq!((spec.format, spec.snapshot.as_deref()), (Some(Format::Qcow2), Some("a,b")));
        let spec = parse_disk_option(OsStr::new("file=/no/such/a,read-only,force-share=on,l2-cache-size=1M")).unwrap();
        assert_eq!((spec.force_share, spec.read_only, spec.l2_cache_bytes), (true, true, Some(1 << 20)));
        let spec = parse_disk_option(OsStr::new("file=/no/such/a,block-devices=trust,no-mark")).unwrap();
        assert_eq!((spec.block_devices, spec.no_mark), (Some(BlockDevicePolicy::Trust), Some(true)));
        let spec = parse_disk_option(OsStr::new("file=/no/such/a,block-devices=distrust,no-mark=off")).unwrap();
        assert_eq!((spec.block_devices, spec.no_mark), (Some(BlockDevicePolicy::Distrust), Some(false)));
        for (text, why) in [
            ("file=/x,block-devices", "'block-devices' needs a value"),
            ("file=/x,block-devices=hope", "'block-devices': neither distrust nor trust"),
            ("file=/x,no-mark=maybe", "'no-mark' expects 'on' or 'off'"),
            ("file=/x,force-share=maybe", "'force-share' expects 'on' or 'off'"),
            ("file=/x,l2-cache-size", "'l2-cache-size' needs a value"),
            ("file=/x,l2-cache-size=1", "l2-cache-size 1: not from 128K to 64G"),
            ("file=/x,l2-cache-size=1T", "not from 128K to 64G"),
            ("file=/x,l2-cache-size=many", "size 'many'"),
            ("name=a", "'file' is missing"),
            ("file=/x,snapshots=s", "invalid parameter 'snapshots'"),
            ("file=/x,snapshot", "'snapshot' needs a value"),
            ("file=/x,", "invalid parameter ''"),
            ("file=/x,file=/y", "'file' is given twice"),
            ("file=/x,read-only=maybe", "'on' or 'off'"),
            ("file=/x,format=vhd", "format 'vhd'"),
            ("file", "'file' needs a value"),
            ("", "invalid parameter ''"),
        ] {
            let e = option(text).unwrap_err().to_string();
            assert!(e.contains(why), "{text}: {e}");
        }
    }

    #[test]
    fn a_file_under_the_whole_text_wins_over_a_name() {
        let dir = tempfile::tempdir().unwrap();
        let dir = absolute(dir.path()).unwrap();
        std::fs::write(dir.join("vda=x.raw"), "").unwrap();
        std::fs::write(dir.join("x.raw"), "").unwrap();
        let parse = |text: String| {
            let spec = parse_image(OsStr::new(&text)).unwrap();
            (spec.name.unwrap(), spec.file)
        };
        let d = dir.display();
        assert_eq!(parse(format!("{d}/vda=x.raw")), ("vda=x".into(), dir.join("vda=x.raw")));
        assert_eq!(parse(format!("vda={d}/x.raw")), ("vda".into(), dir.join("x.raw")));
        assert_eq!(parse(format!("{d}/x.raw")), ("x".into(), dir.join("x.raw")));
        // No name can hold a slash: the whole text is a path, though there is no such file.
        assert_eq!(parse(format!("{d}/none=x")), ("none=x".into(), dir.join("none=x")));
    }

    #[test]
    fn an_image_keeps_the_name_that_it_was_given_by() {
        let dir = tempfile::tempdir().unwrap();
        let real = absolute(dir.path()).unwrap();
        for sub in ["a", "b"] {
            std::fs::create_dir(real.join(sub)).unwrap();
        }
        std::fs::write(real.join("a/disk"), "").unwrap();
        std::os::unix::fs::symlink("../a/disk", real.join("b/link")).unwrap();
        std::os::unix::fs::symlink("b", real.join("dir")).unwrap();
        let parse = |path: &str| parse_image(real.join(path).as_os_str()).unwrap().file;
        assert_eq!(parse("b/link"), real.join("b/link"));
        assert_eq!(parse("dir/link"), real.join("b/link"));
        assert_eq!(parse("dir/../a/disk"), real.join("a/disk"));
        assert_eq!(parse_image(OsStr::new("none")).unwrap().file, absolute(Path::new(".")).unwrap().join("none"));
    }

    proptest! {
        #[test]
        fn any_path_survives_doubled_commas(file in "/no/[a-z,=]{0,20}") {
            let text = format!("read-only,file={},name=n", file.replace(',', ",,"));
            let (name, parsed, _, read_only) = option(&text).unwrap();
            prop_assert_eq!(parsed, absolute(Path::new(&file)).unwrap());
            prop_assert!(name == "n" && read_only);
        }

        #[test]
        fn no_option_text_panics(text in ".*") {
            let _ = option(&text);
        }
    }
}
