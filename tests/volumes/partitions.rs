//! Partition tables of sfdisk and sgdisk.

use crate::rig::{FileDisk, Loop, blkid, scan_files, sh};
use crate::tools::has_tools;
use fleecefs::volume::{Scan, Table};
use serde_json::Value;
use std::collections::BTreeMap;

/// Scans the disk and compares with sfdisk, number by number.
fn compare(disk: &FileDisk, sector: u64) -> Scan {
    let device = Loop::new(&disk.path, sector);
    let json: Value = serde_json::from_str(&sh(&format!("sfdisk --json {}", device.0))).unwrap();
    let table = &json["partitiontable"];
    assert_eq!(table["sectorsize"], sector);
    let mut wanted = BTreeMap::new();
    for partition in table["partitions"].as_array().unwrap() {
        let number = partition["node"].as_str().unwrap().rsplit_once('p').unwrap().1.to_owned();
        let kind = partition["type"].as_str().unwrap().to_lowercase();
        if !["5", "f", "85"].contains(&kind.as_str()) {
            wanted.insert(format!("p{number}"), partition.clone());
        }
    }
    let scan = scan_files(&[disk]);
    assert_eq!(scan.warnings, [] as [&str; 0]);
    let found: BTreeMap<_, _> = scan.volumes.iter().map(|volume| (volume.name.clone(), volume)).collect();
    assert_eq!(found.keys().collect::<Vec<_>>(), wanted.keys().collect::<Vec<_>>());
    for (name, volume) in &found {
        let wanted = &wanted[name];
        assert_eq!(volume.offset().unwrap(), wanted["start"].as_u64().unwrap() * sector, "{name}");
        assert_eq!(volume.size, wanted["size"].as_u64().unwrap() * sector, "{name}");
        assert_eq!(volume.content, blkid(&disk.path, volume.offset().unwrap(), volume.size), "{name}");
        match &volume.table {
            Table::Gpt { kind, uuid, label } => {
                assert_eq!(*kind, wanted["type"].as_str().unwrap().to_lowercase());
                assert_eq!(*uuid, wanted["uuid"].as_str().unwrap().to_lowercase());
                assert_eq!(label.as_deref(), wanted["name"].as_str());
            }
            Table::Mbr { kind, uuid } => {
                assert_eq!(format!("{kind:x}"), wanted["type"].as_str().unwrap());
                let id = table["id"].as_str().unwrap().trim_start_matches("0x");
                assert_eq!(*uuid, format!("{id:0>8}-{:0>2x}", name[1..].parse::<u32>().unwrap()));
            }
            Table::Lvm { .. } => panic!("{name} in LVM"),
        }
    }
    scan
}

#[test]
fn guid_tables_are_those_of_sfdisk_and_sgdisk() {
    if !has_tools(module_path!(), &["sfdisk", "sgdisk", "losetup", "blkid", "mkfs.ext4"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for sector in [512, 4096] {
        let disk = FileDisk::create(&dir.path().join("disk"), 64 << 20);
        {
            let device = Loop::new(&disk.path, sector);
            sh(&format!(
                "printf 'label: gpt\\nsize=8MiB,name=\"boot ü\"\\n,4MiB,S\\n,10MiB,V\\n,,L\\n' | sfdisk --no-reread --no-tell-kernel -q {0}
                 sfdisk --no-reread --no-tell-kernel -q --delete {0} 2
                 sgdisk -a 1 -n 9:0:+1M -t 9:8200 -c 9:swap {0}",
                device.0
            ));
        }
        sh(&format!("mkfs.ext4 -q -L first -E offset={} {} 4M", 1 << 20, disk.text()));
        assert_eq!(compare(&disk, sector).volumes.len(), 4);

        // Without its first megabyte but the protective record, all comes from the backup.
        let before = scan_files(&[&disk]).volumes;
        disk.write(&vec![0; 40960], 512);
        let scan = scan_files(&[&disk]);
        assert_eq!(scan.volumes, before);
        assert!(scan.warnings.len() == 1 && scan.warnings[0].contains("backup is taken"), "{:?}", scan.warnings);
    }
}

#[test]
fn master_boot_records_are_those_of_sfdisk() {
    if !has_tools(module_path!(), &["sfdisk", "losetup", "blkid", "mkfs.ext4"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    // With 5 GiB the extended partition's records lie where 32 bits of bytes do not reach.
    for (sector, size, first) in [(512, 64_u64 << 20, "20MiB"), (4096, 64 << 20, "20MiB"), (512, 6 << 30, "5GiB")] {
        let disk = FileDisk::create(&dir.path().join(format!("disk{sector}")), size);
        let rest = if size > 1 << 30 { 500 } else { 30 };
        let device = Loop::new(&disk.path, sector);
        let lines = [
            "1 : start=1MiB, size=4MiB, type=83, bootable".to_owned(),
            format!("2 : start={first}, size={rest}MiB, type=f"),
            "4 : start=6MiB, size=2MiB, type=7".to_owned(),
            "5 : size=5MiB, type=82".to_owned(),
            "6 : size=6MiB, type=83".to_owned(),
            "7 : type=8e".to_owned(),
        ];
        let script: String = lines.iter().map(|line| format!("{}p{line}\n", device.0)).collect();
        std::fs::write(dir.path().join("script"), format!("label: dos\n{script}")).unwrap();
        let script = dir.path().join("script");
        sh(&format!("sfdisk --no-reread --no-tell-kernel -q {} <{}", device.0, script.display()));
        drop(device);
        // Something at the start tells the size of the sectors.
        sh(&format!("mkfs.ext4 -q -E offset={} {} 4M", 1 << 20, disk.text()));
        assert_eq!(compare(&disk, sector).volumes.len(), 5);
    }
}
