//! Tests of the mapping: the cache's bound, replacement under load, and that hits take no lock.

use super::super::header::{Header, MAGIC};
use super::*;
use crate::image::raw::RawImage;
use crate::storage::{MemFile, Storage};
use std::sync::mpsc::channel;
use std::time::Duration;

const CLUSTER: u64 = 512;
const ENTRIES: u64 = CLUSTER / 8;

/// A file of 512-byte clusters whose guest clusters are all data, in an order of their own: header, L1 table, refcount
/// table, `tables` L2 tables, data.
fn image(tables: u64) -> (HostFile, Header) {
    let l1_clusters = (tables * 8).div_ceil(CLUSTER);
    let first_table = 1 + l1_clusters + 1;
    let first_data = first_table + tables;
    let mut bytes = vec![0; CLUSTER as usize];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(0, &MAGIC);
    put(4, &3_u32.to_be_bytes());
    put(20, &9_u32.to_be_bytes());
    put(24, &(tables * ENTRIES * CLUSTER).to_be_bytes());
    put(36, &(tables as u32).to_be_bytes());
    put(40, &CLUSTER.to_be_bytes());
    put(48, &((1 + l1_clusters) * CLUSTER).to_be_bytes());
    put(56, &1_u32.to_be_bytes());
    put(96, &4_u32.to_be_bytes());
    put(100, &104_u32.to_be_bytes());
    let clusters = tables * ENTRIES;
    let file = MemFile::new("vda.qcow2", (first_data + clusters) * CLUSTER);
    file.write_at(&bytes, 0).unwrap();
    for table in 0..tables {
        file.write_at(&((first_table + table) * CLUSTER).to_be_bytes(), CLUSTER + table * 8).unwrap();
        let entries: Vec<u8> = (0..ENTRIES)
            .flat_map(|entry| host_of(table * ENTRIES + entry, clusters, first_data).to_be_bytes())
            .collect();
        file.write_at(&entries, (first_table + table) * CLUSTER).unwrap();
    }
    let header = Header::parse(&bytes, file.len().unwrap()).unwrap();
    (HostFile::of_image(RawImage::over(file.shared(), true).unwrap(), &header), header)
}

/// Where a guest cluster lies: no two neighbours are neighbours there.
fn host_of(guest: u64, clusters: u64, first_data: u64) -> u64 {
    (first_data + guest * 2 % clusters + guest * 2 / clusters) * CLUSTER
}

fn mapping(file: &HostFile, header: &Header, cache_bytes: u64) -> Mapping {
    let l1 = (header.l1_table_offset, header.l1_size);
    Mapping::load(file, header.geometry(), l1, header.size, cache_bytes).unwrap()
}

fn loaded(mapping: &Mapping) -> usize {
    mapping.places.iter().filter(|place| place.load().is_some()).count()
}

#[test]
fn a_cache_smaller_than_the_tables_gives_the_same_answers_and_stays_small() {
    let tables = 128;
    let (file, header) = image(tables);
    let clusters = tables * ENTRIES;
    let first_data = file.bytes() / CLUSTER - clusters;
    for cache_bytes in [0, 8 * (CLUSTER + SLICE_OVERHEAD_BYTES), 1 << 20] {
        let mapping = mapping(&file, &header, cache_bytes);
        std::thread::scope(|scope| {
            for seed in 0..4_u64 {
                let (mapping, file) = (&mapping, &file);
                scope.spawn(move || {
                    for step in 0..4000_u64 {
                        let guest = (step * 7919 + seed * 104_729) % clusters;
                        let run = mapping.run(file, file, guest * CLUSTER + step % 512, 1).unwrap();
                        let host = HostOffset(host_of(guest, clusters, first_data) + step % 512);
                        assert_eq!(run, Run { len: 1, source: Source::Data(host) });
                    }
                });
            }
        });
        match cache_bytes {
            1048576 => assert_eq!(loaded(&mapping), tables as usize, "all tables fit"),
            _ => assert_eq!(loaded(&mapping), WAYS),
        }
    }
}

#[test]
fn the_default_cache_of_a_large_disk_takes_at_most_64_mib() {
    let (file, header) = image(4);
    for (cluster_bits, size) in [(9, 1 << 37), (16, 1 << 40), (16, 1 << 60), (21, 1 << 60)] {
        let geometry = Geometry { cluster_bits, ..header.geometry() };
        let mapping = Mapping::load(&file, geometry, (header.l1_table_offset, 0), size, CACHE_BYTES).unwrap();
        let slices = mapping.places.len() as u64;
        assert!(slices * (mapping.slice_bytes + SLICE_OVERHEAD_BYTES) <= CACHE_BYTES);
        assert!(slices * mapping.slice_bytes > CACHE_BYTES / 2, "the budget is used: {slices} slices");
    }
}

#[test]
fn a_hit_takes_no_lock() {
    let (file, header) = image(16);
    let mapping = mapping(&file, &header, 1 << 20);
    mapping.run(&file, &file, 0, header.size).unwrap();
    for table in 0..16 {
        mapping.run(&file, &file, table * ENTRIES * CLUSTER, 1).unwrap();
    }
    assert_eq!(loaded(&mapping), 16);
    let (done, waiting) = channel();
    std::thread::scope(|scope| {
        let locks: Vec<_> = mapping.stripes.iter().map(Mutex::lock).collect();
        let (mapping, file) = (&mapping, &file);
        scope.spawn(move || {
            for table in 0..16 {
                mapping.run(file, file, table * ENTRIES * CLUSTER, 1).unwrap();
            }
            done.send(()).unwrap();
        });
        let answer = waiting.recv_timeout(Duration::from_secs(60));
        drop(locks);
        answer.expect("a look-up waited for a lock");
    });
}

#[test]
fn tables_at_regular_distances_spread_over_the_cache() {
    let (file, header) = image(4);
    let geometry = Geometry { cluster_bits: 16, ..header.geometry() };
    let mapping = Mapping::load(&file, geometry, (header.l1_table_offset, 0), 1 << 40, CACHE_BYTES).unwrap();
    // A table of 64 KiB for each 512 MiB of data behind it.
    let mut counts = std::collections::HashMap::new();
    for table in 0..2048_u64 {
        *counts.entry(mapping.set(table * ((512 << 20) + 65536) + 65536 * 5)).or_insert(0) += 1;
    }
    let crowded: i32 = counts.values().map(|count| (count - WAYS as i32).max(0)).sum();
    assert!(crowded < 50, "{crowded} of 2048 tables have no place");
}

#[test]
fn an_offset_without_an_l1_entry_is_an_error() {
    let (file, header) = image(2);
    let mapping = mapping(&file, &header, 1 << 20);
    assert_eq!(mapping.run(&file, &file, header.size, 1).unwrap_err().errno(), errno::EIO);
}
