//! Free blocks of ext4, frozen in the midst of writing.

use crate::rig::{FileDisk, Mount, sh};
use crate::tools::has_tools;
use fleecefs::volume::{Disk, content, unused};
use std::ops::Range;
use std::path::Path;

const MIB: u64 = 1 << 20;

/// Options of mkfs, of the mount, and whether a mounted one may have free blocks.
const KINDS: [(&str, &str, bool); 11] = [
    ("", "", true),
    ("-b 1024", "", true),
    ("-O ^64bit,^metadata_csum,uninit_bg", "", true),
    ("-O ^metadata_csum,^uninit_bg", "", true),
    ("-O bigalloc -C 16384", "", true),
    ("-O meta_bg,^resize_inode -g 8192", "", true),
    ("-b 4096 -O ^flex_bg,sparse_super2 -g 16384", "", true),
    ("-b 2048 -O metadata_csum_seed -E num_backup_sb=1", ",journal_checksum", true),
    ("-O ^metadata_csum", ",journal_async_commit,data=writeback", true),
    ("-O ^has_journal", "", false),
    ("-O fast_commit", "", false),
];

fn unused_of(disk: &FileDisk) -> Vec<Range<u64>> {
    let content = content::probe(disk).unwrap().unwrap();
    let ranges = unused(disk, &content).unwrap();
    assert!(ranges.windows(2).all(|pair| pair[0].end < pair[1].start));
    ranges
}

fn total(ranges: &[Range<u64>]) -> u64 {
    ranges.iter().map(|range| range.end - range.start).sum()
}

/// Free runs of blocks by dumpe2fs, in bytes, joined where they touch.
fn free_by_dumpe2fs(path: &Path) -> Vec<Range<u64>> {
    let text = sh(&format!("dumpe2fs {} 2>/dev/null", path.display()));
    let size = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<u64>().ok());
    let block = size("Block size:").unwrap();
    // Of clusters the first block is printed.
    let cluster_blocks = size("Cluster size:").unwrap_or(block) / block;
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for list in text.lines().filter_map(|line| line.strip_prefix("  Free blocks: ")) {
        for run in list.split(", ").filter(|run| !run.is_empty()) {
            let (first, last) = run.split_once('-').unwrap_or((run, run));
            let (first, last): (u64, u64) = (first.parse().unwrap(), last.parse::<u64>().unwrap() + cluster_blocks - 1);
            match ranges.last_mut() {
                Some(before) if before.end == first * block => before.end = (last + 1) * block,
                _ => ranges.push(first * block..(last + 1) * block),
            }
        }
    }
    ranges
}

/// Hashes of all files, with their names, modes and sizes, once the journal is replayed.
fn hash_of_tree(path: &Path, at: &Path) -> String {
    let code = sh(&format!("e2fsck -fy {} >&2 && echo 0 || echo $?", path.display()));
    assert!(["0", "1"].contains(&code.trim()), "e2fsck: {code}");
    let _mount = Mount::new("loop,ro", path, at);
    let at = at.display();
    sh(&format!(
        "cd {at}; find . -printf '%p %m %s %l\\n' | sort | sha256sum; find . -type f -print0 | sort -z | xargs -0 sha256sum | sha256sum"
    ))
}

/// Compares with what e2fsck and dumpe2fs make of a copy, and shows that nobody misses what is said to be unused.
fn judge(frozen: &Path, dir: &Path) -> (u64, u64) {
    let ranges = unused_of(&FileDisk::open(frozen));
    let [whole, holed] = ["whole", "holed"].map(|name| dir.join(name));
    for copy in [&whole, &holed] {
        sh(&format!("cp --sparse=always {} {}", frozen.display(), copy.display()));
    }
    let disk = FileDisk::open(&holed);
    for range in &ranges {
        for at in (range.start..range.end).step_by(MIB as usize) {
            disk.write(&vec![0xd5; (range.end - at).min(MIB) as usize], at);
        }
    }
    assert_eq!(hash_of_tree(&holed, &dir.join("at")), hash_of_tree(&whole, &dir.join("at")));
    let free = free_by_dumpe2fs(&whole);
    for range in &ranges {
        let index = free.partition_point(|free| free.end <= range.start);
        let inside = free.get(index).is_some_and(|free| free.start <= range.start && range.end <= free.end);
        assert!(inside, "{range:?} is not free: {:?}", free.get(index));
    }
    let long: Vec<_> = free.into_iter().filter(|range| range.end - range.start >= 64 << 10).collect();
    (total(&ranges), total(&long))
}

#[test]
fn free_blocks_are_free_after_a_replay_of_the_journal() {
    if !has_tools(module_path!(), &["mkfs.ext4", "e2fsck", "dumpe2fs", "mkfs.xfs", "losetup", "mount"]) {
        return;
    }
    let full = std::env::var_os("FLEECEFS_FULL").is_some();
    let dir = tempfile::tempdir().unwrap();
    // On xfs a clone of a file is made between two writes to it: an instant, as after a power failure.
    let host = FileDisk::create(&dir.path().join("host"), 4 << 30);
    sh(&format!("mkfs.xfs -q {}", host.text()));
    let host = Mount::new("loop", &host.path, &dir.path().join("h"));
    let mut dirty = 0;
    for (number, (mkfs, mount, works)) in KINDS.into_iter().enumerate().filter(|(number, _)| full || number % 2 == 0) {
        let image = FileDisk::create(&host.0.join("image"), 300 * MIB);
        sh(&format!("mkfs.ext4 -q -F {mkfs} {} 2>&1", image.text()));
        assert!(total(&unused_of(&image)) > 200 * MIB, "{mkfs}: {} bytes of a new one", total(&unused_of(&image)));
        let mounted = Mount::new(&format!("loop{mount}"), &image.path, &dir.path().join("m"));
        let at = mounted.0.display();
        let work = format!(
            "cd {at}; end=$((SECONDS + 2)); i=0; while [ $SECONDS -lt $end ]; do i=$((i + 1)); d=d$((i % 7)); mkdir -p $d
             head -c $((RANDOM * 40)) /dev/urandom >$d/$((i % 50)); [ $((i % 3)) -ne 0 ] || sync $d/$((i % 50))
             [ $((i % 11)) -ne 0 ] || rm -rf d$(((i + 3) % 7)); [ $((i % 17)) -ne 0 ] || sync -f .; done"
        );
        let mut writer = std::process::Command::new("bash").args(["-c", &work]).spawn().unwrap();
        let clones = if full { 12 } else { 1 };
        for clone in 0..clones {
            std::thread::sleep(std::time::Duration::from_millis(1500 / clones));
            let frozen = host.0.join(format!("frozen{clone}"));
            sh(&format!("cp --reflink=always {} {}", image.text(), frozen.display()));
        }
        writer.wait().unwrap();
        for clone in 0..clones {
            let frozen = host.0.join(format!("frozen{clone}"));
            dirty +=
                usize::from(sh(&format!("dumpe2fs -h {} 2>/dev/null", frozen.display())).contains("needs_recovery"));
            if works {
                let (found, free) = judge(&frozen, dir.path());
                eprintln!("kind {number} ({mkfs}{mount}): {} of {} MiB", found / MIB, free / MIB);
                assert!(found > free / 2, "{mkfs}: {found} of {free} bytes");
            } else {
                // Nor is e2fsck always able to replay fast commits.
                assert_eq!(unused_of(&FileDisk::open(&frozen)), [], "{mkfs}");
            }
            std::fs::remove_file(frozen).unwrap();
        }
        drop(mounted);
        let (found, free) = judge(&image.path, dir.path());
        assert!(found > free * 9 / 10, "{mkfs}: {found} of {free} bytes after a clean unmount");
    }
    assert!(dirty >= 4, "{dirty} journals were dirty");
}

/// Numbers of the blocks of 1 KiB in which two files differ.
fn differing(one: &Path, other: &Path) -> Vec<usize> {
    let [one, other] = [one, other].map(|path| std::fs::read(path).unwrap());
    let pairs = one.chunks(1024).zip(other.chunks(1024)).enumerate();
    pairs.filter(|(_, (one, other))| one != other).map(|(number, _)| number).collect()
}

/// A file was written; its bitmap, descriptor and data are in the journal alone.
#[test]
fn what_is_in_use_by_the_journal_alone_is_not_free() {
    if !has_tools(module_path!(), &["mkfs.ext4", "debugfs", "e2fsck", "dumpe2fs"]) {
        return;
    }
    for features in ["^metadata_csum,^uninit_bg", "^metadata_csum,uninit_bg", "metadata_csum"] {
        let dir = tempfile::tempdir().unwrap();
        let [old, new, data, blocks] = ["old", "new", "data", "blocks"].map(|name| dir.path().join(name));
        let (old_text, new_text) = (old.display(), new.display());
        let image = FileDisk::create(&old, 32 * MIB);
        sh(&format!("mkfs.ext4 -q -F -b 1024 -J size=4 -O {features} {old_text}; cp {old_text} {new_text}"));
        std::fs::write(&data, vec![7; 700 << 10]).unwrap();
        sh(&format!("debugfs -w -R 'write {} data' {new_text} 2>&1", data.display()));
        let numbers = differing(&old, &new);
        let whole = std::fs::read(&new).unwrap();
        let content: Vec<u8> = numbers.iter().flat_map(|n| whole[n * 1024..][..1024].to_vec()).collect();
        let is_data = |n: &usize| whole[n * 1024..][..1024] == [7; 1024];
        let places: Vec<u64> = numbers.iter().copied().filter(is_data).map(|n| n as u64 * 1024).collect();
        assert_eq!(places.len(), 700);
        std::fs::write(&blocks, content).unwrap();
        let holds = |ranges: &[Range<u64>], at: u64| ranges.iter().any(|range| range.contains(&at));
        let before = unused_of(&image);
        assert!(places.iter().all(|at| holds(&before, *at)), "{features}");

        let list = numbers.iter().map(usize::to_string).collect::<Vec<_>>().join(",");
        let checksum = if features == "metadata_csum" { "-c -v 3" } else { "" };
        let journal = |options: &str| {
            let script = format!("jo {checksum}\njw {options} -b {list} {}\njc\n", blocks.display());
            std::fs::write(dir.path().join("script"), script).unwrap();
            sh(&format!("debugfs -w -f {} {old_text} 2>&1", dir.path().join("script").display()));
        };
        journal("-c");
        let uncommitted = unused_of(&image);
        assert!(places.iter().all(|at| holds(&uncommitted, *at)), "{features}: nobody committed them");
        journal("");
        let committed = unused_of(&image);
        assert!(!places.iter().any(|at| holds(&committed, *at)), "{features}");
        assert!(total(&committed) + (2 << 20) > total(&before), "{features}: {} bytes", total(&committed));
        judge(&old, dir.path());
        sh(&format!(
            "e2fsck -fy {old_text} || [ $? = 1 ]; debugfs -R 'stat data' {old_text} 2>&1 | grep -q 'Size: 716800'"
        ));
    }
}

/// Whatever bit turns over in the structures that the answer comes from: at worst less is free.
#[test]
fn a_damaged_file_system_never_has_more_free_blocks() {
    if !has_tools(module_path!(), &["mkfs.ext4", "debugfs"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let disk = FileDisk::create(&dir.path().join("image"), 64 * MIB);
    let data = dir.path().join("data");
    std::fs::write(&data, vec![7; 20 << 20]).unwrap();
    sh(&format!("mkfs.ext4 -q -F -b 1024 {0}; debugfs -w -R 'write {1} data' {0} 2>&1", disk.text(), data.display()));
    let before = unused_of(&disk);
    let is_inside = |range: &Range<u64>| before.iter().any(|own| own.start <= range.start && range.end <= own.end);
    assert!(total(&before) > 30 * MIB);
    let mut bytes = vec![0; 400 << 10];
    disk.read_at(&mut bytes, 0).unwrap();
    let mut refused = 0;
    for at in (1024..bytes.len()).filter(|at| bytes[*at] != 0 || at % 61 == 0).step_by(7).take(6000) {
        let byte = bytes[at];
        for flipped in [byte ^ 1 << (at % 8), byte ^ 0xff] {
            disk.write(&[flipped], at as u64);
            let content = content::probe(&disk).unwrap();
            let ranges = content.map(|content| unused(&disk, &content).unwrap()).unwrap_or_default();
            assert!(ranges.iter().all(is_inside), "byte {at}");
            refused += usize::from(total(&ranges) < total(&before));
        }
        disk.write(&[byte], at as u64);
    }
    assert!(refused > 100, "{refused}");
}
