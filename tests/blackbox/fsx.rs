//! The file system exerciser (the crate of that name) against the live file.

use super::harness::{Rig, full, ok, sized, tool};
use std::fs;

/// Every operation that keeps the size, shared mappings too, at random and checked at every read.
const CONFIG: &str = "
blockmode = true
[opsize]
max = 65536
[weights]
write = 10
read = 10
mapread = 5
mapwrite = 10
invalidate = 1
punch_hole = 3
fsync = 1
fdatasync = 1
truncate = 0
sendfile = 1
copy_file_range = 1
posix_fadvise = 1
";

#[test]
fn fsx_finds_nothing_wrong_with_the_live_file_while_snapshots_come_and_go() {
    requires!("fsx");
    let rig = Rig::new();
    let mount = rig.mount([rig.image("vda", 1)]);
    let config = rig.path("fsx.toml");
    fs::write(&config, CONFIG).unwrap();
    let operations = sized("10000", "100000");
    let seed = if full() { "7" } else { "42" };
    let mut fsx = tool("fsx");
    fsx.args(["-q", "-N", operations, "-S", seed, "-f"])
        .arg(&config)
        .arg("-P")
        .arg(rig.path("."))
        .arg(mount.live("vda"));
    let mut fsx = fsx.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn().unwrap();
    let mut taken = 0;
    while fsx.try_wait().unwrap().is_none() {
        let name = format!("s{taken}");
        mount.snap(&name);
        let hash = || ok(tool("sha256sum").arg(mount.view(&name, "vda")));
        assert_eq!(hash(), hash(), "{name} changed");
        mount.drop_snap(&name);
        taken += 1;
    }
    let out = fsx.wait_with_output().unwrap();
    assert!(out.status.success(), "fsx: {}{}", super::harness::stdout(&out), super::harness::stderr(&out));
    assert!(taken > 0);
}
