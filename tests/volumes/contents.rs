//! What volumes hold, against blkid.

use crate::rig::{FileDisk, blkid, sh};
use crate::tools::has_tools;
use fleecefs::volume::{content, unused};

/// Name of a case, bytes, and the command that fills `$f`.
const CASES: [(&str, u64, &str); 27] = [
    ("ext2", 8 << 20, "mkfs.ext2 -q -F -L two $f"),
    ("ext3", 16 << 20, "mkfs.ext3 -q -F $f"),
    ("ext4", 16 << 20, "mkfs.ext4 -q -F -L sixteen-letters. $f"),
    ("ext4 without journal", 16 << 20, "mkfs.ext4 -q -F -O ^has_journal $f"),
    ("ext4 with blocks of 1 KiB", 16 << 20, "mkfs.ext4 -q -F -b 1024 $f"),
    ("xfs", 300 << 20, "mkfs.xfs -q -L data $f"),
    ("xfs without label", 300 << 20, "mkfs.xfs -q -m crc=0 $f"),
    ("btrfs", 128 << 20, "mkfs.btrfs -q -L roots $f"),
    ("vfat 12", 2 << 20, "mkfs.vfat -F 12 -n TWELVE $f"),
    ("vfat 16", 20 << 20, "mkfs.vfat -F 16 -n SIXTEEN $f"),
    ("vfat 32", 64 << 20, "mkfs.vfat -F 32 -n 'THIRTY TWO' $f"),
    ("vfat without label", 64 << 20, "mkfs.vfat -F 32 -s 1 $f"),
    ("vfat with sectors of 4 KiB", 300 << 20, "mkfs.vfat -F 32 -S 4096 -n LARGE $f"),
    ("exfat", 16 << 20, "mkfs.exfat -n extended $f"),
    ("exfat without label", 16 << 20, "mkfs.exfat $f"),
    ("ntfs", 16 << 20, "mkntfs -F -q -L windows $f"),
    ("ntfs with large clusters", 64 << 20, "mkntfs -F -q -c 65536 $f"),
    ("swap", 4 << 20, "mkswap -L pages $f"),
    ("swap of 8 KiB", 4 << 20, "mkswap -p 8192 $f"),
    ("swap of 16 KiB", 4 << 20, "mkswap -p 16384 $f"),
    ("swap of 64 KiB", 4 << 20, "mkswap -p 65536 -L pages $f"),
    ("hibernated", 4 << 20, "mkswap $f; printf 'S1SUSPEND\\0' | dd of=$f bs=1 seek=4086 conv=notrunc"),
    ("luks1", 8 << 20, "printf x | cryptsetup -q luksFormat --type luks1 --pbkdf-force-iterations 1000 $f -"),
    (
        "luks2",
        20 << 20,
        "printf x | cryptsetup -q luksFormat --type luks2 --label vault --pbkdf pbkdf2 --pbkdf-force-iterations 1000 $f -",
    ),
    ("nothing", 4 << 20, "true"),
    ("zeros and text", 1 << 20, "head -c 500000 /dev/zero | tr '\\0' t | dd of=$f conv=notrunc seek=1"),
    ("tiny", 700, "printf 'LABELONE' | dd of=$f conv=notrunc"),
];

#[test]
fn contents_are_those_of_blkid() {
    let tools =
        ["blkid", "mkfs.ext4", "mkfs.xfs", "mkfs.btrfs", "mkfs.vfat", "mkfs.exfat", "mkntfs", "mkswap", "cryptsetup"];
    if !has_tools(module_path!(), &tools) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes, make) in CASES {
        let disk = FileDisk::create(&dir.path().join("volume"), bytes);
        sh(&format!("f={}; {{ {make}; }} >&2", disk.text()));
        let found = content::probe(&disk).unwrap();
        assert_eq!(found, blkid(&disk.path, 0, bytes), "{name}");
        let kind = found.map_or(String::new(), |content| content.kind);
        let wanted = name.split(' ').next().unwrap();
        let wanted = match wanted {
            "luks1" | "luks2" => "crypto_LUKS",
            "hibernated" => "swsuspend",
            "nothing" | "zeros" | "tiny" => "",
            "ext4" if name == "ext4 without journal" => "ext4",
            other => other,
        };
        assert_eq!(kind, wanted, "{name}");
    }
}

#[test]
fn swap_is_unused_but_for_its_header() {
    if !has_tools(module_path!(), &["mkswap", "blkid"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for page in [4096, 65536] {
        let disk = FileDisk::create(&dir.path().join("swap"), 8 << 20);
        sh(&format!("mkswap -p {page} -L label {}", disk.text()));
        let before = blkid(&disk.path, 0, 8 << 20).unwrap();
        let ranges = unused(&disk, &before).unwrap();
        assert_eq!(ranges.iter().map(|range| range.end - range.start).sum::<u64>(), (8 << 20) - page);
        for range in ranges {
            disk.write(&vec![0; (range.end - range.start) as usize], range.start);
        }
        assert_eq!(blkid(&disk.path, 0, 8 << 20).unwrap(), before);
        for magic in ["S1SUSPEND", "S2SUSPEND", "ULSUSPEND", "LINHIB0001"] {
            disk.write(&[0; 10], page - 10);
            disk.write(magic.as_bytes(), page - 10);
            assert_eq!(unused(&disk, &before).unwrap(), [], "{magic}");
        }
    }
}
