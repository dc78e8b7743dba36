//! Groups that LVM's own commands made.

use crate::rig::{FileDisk, Loop, scan_files, sh};
use crate::tools::has_tools;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;

/// Runs LVM on these devices alone. There need not be a device-mapper: nothing is activated.
struct Lvm {
    prefix: String,
}

impl Lvm {
    fn new(dir: &Path, devices: &[&str]) -> Lvm {
        let accept: String = devices.iter().map(|device| format!("\"a|^{device}$|\",")).collect();
        let lock = dir.join("lock");
        let config = format!(
            "devices {{ filter=[{accept}\"r|.*|\"] scan=[\"/dev\"] use_devicesfile=0 }}\n\
             activation {{ udev_sync=0 udev_rules=0 verify_udev_operations=0 monitoring=0 }}\n\
             global {{ locking_dir=\"{}\" event_activation=0 use_lvmpolld=0 system_id_source=\"none\" }}\n\
             backup {{ backup=0 archive=0 }}\n",
            lock.display()
        );
        std::fs::write(dir.join("lvm.conf"), config).unwrap();
        Lvm { prefix: format!("LVM_SYSTEM_DIR={} LVM_SUPPRESS_FD_WARNINGS=1 timeout 60 lvm", dir.display()) }
    }

    /// Runs a command of LVM.
    fn run(&self, command: &str) -> String {
        let (name, rest) = command.split_once(' ').unwrap();
        sh(&format!("{} {name} --driverloaded n {rest}", self.prefix))
    }

    fn report(&self, command: &str, key: &str) -> Vec<Value> {
        let json: Value = serde_json::from_str(&self.run(command)).unwrap();
        json["report"][0][key].as_array().unwrap().clone()
    }
}

const MIB: u64 = 1 << 20;

/// Where each stripe of 64 KiB of each volume lies, as LVM's reports have it: device and byte.
fn places_by_lvm(lvm: &Lvm, group: &str) -> BTreeMap<String, Vec<(String, u64)>> {
    const STEP: u64 = 64 << 10;
    let mut pe_starts = BTreeMap::new();
    for pv in lvm.report("pvs -o pv_name,pe_start --units b --nosuffix --reportformat json", "pv") {
        pe_starts.insert(pv["pv_name"].as_str().unwrap().to_owned(), number(&pv["pe_start"]));
    }
    let extent = number(
        &lvm.report(&format!("vgs -o vg_extent_size --units b --nosuffix --reportformat json {group}"), "vg")[0]["vg_extent_size"],
    );
    let fields = "lv_name,seg_start,seg_size,seg_pe_ranges,stripes,stripesize,segtype";
    let report =
        lvm.report(&format!("lvs --segments -o {fields} --units b --nosuffix --reportformat json {group}"), "seg");
    let mut places: BTreeMap<String, BTreeMap<u64, (String, u64)>> = BTreeMap::new();
    for segment in report {
        let columns: Vec<(String, u64)> = segment["seg_pe_ranges"]
            .as_str()
            .unwrap()
            .split(' ')
            .map(|range| {
                let (device, extents) = range.rsplit_once(':').unwrap();
                let first: u64 = extents.split_once('-').unwrap().0.parse().unwrap();
                (device.to_owned(), pe_starts[device] + first * extent)
            })
            .collect();
        let stripe = match number(&segment["stripe_size"]) {
            0 => number(&segment["seg_size"]),
            stripe => stripe,
        };
        for at in (0..number(&segment["seg_size"])).step_by(STEP as usize) {
            let (turn, within) = (at / stripe, at % stripe);
            let (device, start) = &columns[(turn % columns.len() as u64) as usize];
            let place = start + turn / columns.len() as u64 * stripe + within;
            let name = segment["lv_name"].as_str().unwrap().to_owned();
            places.entry(name).or_default().insert(number(&segment["seg_start"]) + at, (device.clone(), place));
        }
    }
    places.into_iter().map(|(name, places)| (name, places.into_values().collect())).collect()
}

fn number(value: &Value) -> u64 {
    value.as_str().unwrap().trim_end_matches('B').parse().unwrap()
}

#[test]
fn volumes_lie_where_lvm_says() {
    if !has_tools(module_path!(), &["lvm", "losetup", "sfdisk"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    // One on the bare disk, and two in partitions of one disk.
    let bare = FileDisk::create(&dir.path().join("bare"), 64 * MIB);
    let parts = FileDisk::create(&dir.path().join("parts"), 128 * MIB);
    sh(&format!("printf 'label: gpt\\nsize=60MiB,type=V\\nsize=64MiB,type=V\\n' | sfdisk -q {}", parts.text()));
    let starts = scan_files(&[&parts]).volumes.iter().map(|v| (v.offset().unwrap(), v.size)).collect::<Vec<_>>();
    let devices = {
        let mut devices = vec![(Loop::new(&bare.path, 512), 0_usize, 0_u64)];
        for (start, size) in &starts {
            let line = format!("losetup -f --show --offset {start} --sizelimit {size} {}", parts.text());
            devices.push((Loop(sh(&line).trim().to_owned()), 1, *start));
        }
        devices
    };
    let names: Vec<&str> = devices.iter().map(|(device, ..)| device.0.as_str()).collect();
    let lvm = Lvm::new(dir.path(), &names);
    let all = names.join(" ");
    lvm.run(&format!("pvcreate -qq -y {all}"));
    lvm.run(&format!("vgcreate -qq -y -s 1M vg-t {all}"));
    let create = |rest: &str| lvm.run(&format!("lvcreate -qq -y -an -Zn -Wn {rest}"));
    create("-l 5 -n root vg-t");
    create("-l 12 -i 3 -I 64 -n str-ipe vg-t");
    create(&format!("-l 8 -i 2 -I 128 -n two vg-t {} {}", names[1], names[2]));
    create("-l 70 -n over vg-t");
    lvm.run("lvextend -qq -y -l +7 vg-t/root");
    // The text goes round its area of a megabyte in less than 700 changes of it: enough of them for some wraps.
    for round in 0..5 {
        lvm.run(&format!("lvchange -qq -y --addtag tag{round} vg-t/root"));
    }

    let wanted = places_by_lvm(&lvm, "vg-t");
    let scan = scan_files(&[&bare, &parts]);
    assert_eq!(scan.warnings, [] as [&str; 0]);
    let logical: Vec<_> = scan.volumes.iter().filter(|volume| volume.table.scheme() == "lvm").collect();
    assert_eq!(logical.len(), wanted.len());
    for volume in logical {
        let name = volume.table.label().unwrap();
        assert_eq!(volume.name, format!("vg--t-{}", name.replace('-', "--")));
        let wanted = &wanted[name];
        assert_eq!(volume.size, wanted.len() as u64 * (64 << 10));
        for (index, (device, byte)) in (0..).zip(wanted) {
            let (_, disk, start) = devices.iter().find(|(own, ..)| own.0 == *device).unwrap();
            let (found_disk, offset, _) = volume.locate(index * (64 << 10), 1).next().unwrap();
            assert_eq!((found_disk, offset), (*disk, start + byte), "{name} at {index}");
        }
    }
    let partitions: Vec<_> = scan.volumes.iter().filter(|volume| volume.table.scheme() == "gpt").collect();
    assert!(partitions.iter().all(|volume| volume.content.as_ref().unwrap().kind == "LVM2_member"), "{partitions:?}");
    assert_eq!(scan.contents[0].as_ref().unwrap().kind, "LVM2_member");

    // One disk alone: what does not need the other is still there, and the rest is named.
    let alone = scan_files(&[&bare]);
    assert_eq!(alone.volumes.iter().map(|volume| volume.name.as_str()).collect::<Vec<_>>(), ["vg--t-root"]);
    assert!(alone.warnings.len() == 1 && alone.warnings[0].contains("vg-t/over (its physical volume"), "{alone:?}");
}
