//! The formats against the tools that read them, with maps made by hand.

use crate::harness::*;
use fleecefs::backup::{Extent, ExtentSource, Extents, MapFile, MapFormat, MapMeta, MapPoint};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;

struct List(Vec<Extent>);

impl ExtentSource for List {
    fn disk_size(&self) -> u64 {
        self.0.last().map_or(0, |e| e.start + e.length)
    }
    fn extents_from(&self, offset: u64) -> fleecefs::error::Result<Extents<'_>> {
        Ok(Box::new(self.0.iter().filter(move |e| e.start >= offset).map(|e| Ok(*e))))
    }
}

/// 1000 bytes past a whole number of blocks; changes that touch blocks in part, and zeros that are changes.
fn extents() -> Vec<Extent> {
    let rows =
        [(0, 4096, true, false), (4096, 61440, false, true), (65536, 512, true, false), (66048, 65024, false, false)];
    let rest = [(131072, 65536, true, true), (196608, 65536, false, false), (262144, 1000, true, false)];
    rows.iter().chain(&rest).map(|&(start, length, dirty, zero)| Extent { start, length, dirty, zero }).collect()
}

const SIZE: usize = 263144;

fn write_map(rig: &Rig, format: MapFormat) -> PathBuf {
    let uuid = "6f1f6f0e-1d1b-4f3c-9a45-000000000001".parse().unwrap();
    let point = |name: &str| MapPoint { name: name.into(), uuid };
    let meta = MapMeta {
        disk: "vda".into(),
        disk_uuid: uuid,
        image: "/images/vda.raw".into(),
        snapshot: "today".into(),
        base: Some(point("yesterday")),
        full_reason: None,
        target: point("today"),
    };
    let path = rig.path(&format!("map.{format}"));
    let map = MapFile::new(Arc::new(List(extents())), format, &meta).unwrap();
    map.write_to(&mut File::create_new(&path).unwrap()).unwrap();
    path
}

/// An old copy and a new one that differs in what the map calls changed.
fn old_and_new() -> (Vec<u8>, Vec<u8>) {
    let old = pattern(1, SIZE);
    let mut new = old.clone();
    for e in extents().iter().filter(|e| e.dirty) {
        let bytes = if e.zero { vec![0; e.length as usize] } else { pattern(2, e.length as usize) };
        new[e.start as usize..][..bytes.len()].copy_from_slice(&bytes);
    }
    (old, new)
}

#[test]
fn bmaptool_takes_the_bmap_and_its_checksum() {
    requires!("bmaptool");
    let rig = Rig::new();
    let map = write_map(&rig, MapFormat::Bmap);
    let (old, new) = old_and_new();
    fs::write(rig.path("new"), &new).unwrap();
    fs::write(rig.path("target"), &old).unwrap();
    let copy = |map: &Path| {
        tool("bmaptool")
            .args(["copy", "--bmap"])
            .arg(map)
            .arg(rig.path("new"))
            .arg(rig.path("target"))
            .output()
            .unwrap()
    };
    let out = copy(&map);
    assert!(out.status.success(), "{}", stderr(&out));
    let got = fs::read(rig.path("target")).unwrap();
    assert!(got.len() >= SIZE);
    for e in extents().iter().filter(|e| e.dirty) {
        let range = e.start as usize..(e.start + e.length) as usize;
        assert!(got[range.clone()] == new[range], "{e:?} was not copied");
    }
    let text = fs::read_to_string(&map).unwrap();
    fs::write(rig.path("forged"), text.replace("<Range> 0 </Range>", "<Range> 1 </Range>")).unwrap();
    let out = copy(&rig.path("forged"));
    assert!(!out.status.success() && stderr(&out).contains("checksum"), "{}", stderr(&out));
}

#[test]
fn ddrescue_copies_what_the_mapfile_calls_changed() {
    requires!("ddrescue", "ddrescuelog");
    let rig = Rig::new();
    let map = write_map(&rig, MapFormat::Ddrescue);
    let (old, new) = old_and_new();
    fs::write(rig.path("new"), &new).unwrap();
    fs::write(rig.path("target"), &old).unwrap();
    ok(tool("ddrescue").args(["--force", "--domain-mapfile"]).arg(&map).arg(rig.path("new")).arg(rig.path("target")));
    assert!(fs::read(rig.path("target")).unwrap() == new);
    let blocks = ok(tool("ddrescuelog").args(["--list-blocks=+", "--block-size=512"]).arg(&map));
    assert!(blocks.lines().any(|l| l == "128") && !blocks.lines().any(|l| l == "129"), "{blocks}");
    let shown = ok(tool("ddrescuelog").arg("--show-status").arg(&map));
    assert!(shown.contains("71144 B"), "all that changed is finished: {shown}");
}

#[test]
fn json_formats_are_json_to_another_parser() {
    requires!("jq");
    let rig = Rig::new();
    for (format, filter, sum) in [
        (MapFormat::Json, "map(select(.dirty) | .length) | add", 71144),
        (MapFormat::Rbd, "map(.length) | add", 71144),
        (MapFormat::Nbd, "map(select(.type == 1) | .length) | add", 71144),
        (MapFormat::Csi, ".block_metadata | map(.size_bytes) | add", 71144),
    ] {
        let text = ok(tool("jq").arg(filter).arg(write_map(&rig, format)));
        assert_eq!(text.trim(), sum.to_string(), "{format}");
    }
}
