//! `contrib/bench/compare` works: a few cases, measured for moments, give tables, records and a picture.

use crate::harness::{Rig, ok, tool};
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_owned()
}

fn forwarder() -> String {
    let program = Path::new(env!("CARGO_BIN_EXE_fleecefs"));
    program.with_file_name("examples").join("forwarder").to_string_lossy().into_owned()
}

#[test]
fn compare_measures_and_draws() {
    let forwarder = forwarder();
    // An example: built with all the rest, not by `--test blackbox` alone.
    let limits = usize::from(Path::new(&forwarder).exists());
    requires!("root", "python3", "fio", "qemu-storage-daemon", "qemu-img", "qemu-io");
    let rig = Rig::new();
    let (json, svg) = (rig.path("compare.json"), rig.path("compare.svg"));
    let mut compare = tool(root().join("contrib/bench/compare"));
    compare.env("FLEECEFS", env!("CARGO_BIN_EXE_fleecefs")).env("FORWARDER", &forwarder);
    compare.args(["--quick", "--mib", "32", "--seconds", "0.2", "--format", "raw", "--cache", "writeback"]);
    compare.args(["--only", "live-write-d1$|touch-4k-d16|view-psync"]);
    compare.arg("--dir").arg(rig.mount_point("disks")).arg("--json").arg(&json).arg("--svg").arg(&svg);
    let tables = ok(&mut compare);

    for line in [
        "| live 4k random write, depth 1 | qemu ",
        "| first touch 4k, depth 16 | p99, QEMU |",
        "| view 1M read, psync, MB/s | ours ",
    ] {
        assert!(tables.contains(line), "'{line}' is not in\n{tables}");
    }
    let records = fs::read_to_string(&json).unwrap();
    let lines: Vec<serde_json::Value> = records.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines[0]["meta"], true, "{records}");
    let measured = |name: &str| lines.iter().filter(|line| line["line"] == name && line["case"] != "").count();
    assert_eq!((measured("ours"), measured("forwarder"), measured("bare")), (3, 2 * limits, 2), "{records}");
    let picture = fs::read_to_string(&svg).unwrap();
    assert!(picture.starts_with("<svg ") && picture.ends_with("</svg>\n") && picture.contains("<rect "), "{picture}");

    // The same tables from what was written.
    let again = ok(tool(root().join("contrib/bench/compare")).arg("--from").arg(&json));
    assert_eq!(again.trim(), tables.trim());
}
