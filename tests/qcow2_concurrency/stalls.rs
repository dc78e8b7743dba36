//! Threads that meet at one moment: a call to the medium is held up until the other thread is where it should be.

use crate::driver::{self, Files};
use crate::gate::{Gate, When, let_go_on};
use crate::images::{Prepared, Recipe, has_qemu};
use fleecefs::image::Image;
use fleecefs::storage::faulty::Call;
use std::sync::Arc;

/// The files of an image behind a gate.
fn gated(prepared: &Prepared) -> (Files, Arc<Gate>) {
    let gate = Arc::new(Gate::default());
    let files = prepared.files();
    (Files { image: gate.before(&files.image), data: files.data.map(|data| gate.before(&data)) }, gate)
}

/// The cluster in which the disk ends gets a host cluster with old bytes in it, while the disk grows over what that
/// cluster has behind the end.
#[test]
fn a_growth_beside_a_write_to_the_last_cluster_uncovers_zeros() {
    if !has_qemu("a_growth_beside_a_write_to_the_last_cluster_uncovers_zeros") {
        return;
    }
    for options in ["cluster_size=64k", "cluster_size=64k,extended_l2=on", "compat=0.10,cluster_size=64k"] {
        let prepared = Prepared::make(Recipe::new(options, (1 << 20) + 4096).compressed());
        let (files, gate) = gated(&prepared);
        let image = driver::read_write(&files, &prepared, false).unwrap();
        // Compressed clusters are copied out and freed.
        (0..8).for_each(|cluster| image.write_at(&[0xAA; 1000], cluster << 16).unwrap());
        image.flush().unwrap();
        gate.hold_next(Call::Sync, When::Before);
        std::thread::scope(|scope| {
            let (disk, size) = (&image, image.size());
            let growing = scope.spawn(move || disk.resize(size + 8192).unwrap());
            gate.wait_for(&growing);
            let writing = scope.spawn(move || disk.write_at(&[0xBB; 512], size - 512).unwrap());
            let_go_on(&writing);
            gate.release();
        });
        let mut bytes = vec![0xEE; 512 + 8192];
        image.read_at(&mut bytes, (1 << 20) + 4096 - 512).unwrap();
        assert!(bytes[..512] == [0xBB; 512], "{options}");
        let wrong = bytes[512..].iter().position(|byte| *byte != 0);
        assert_eq!(wrong, None, "{options}: what was added is not zeros");
    }
}

/// While a reader waits for compressed data, the cluster is overwritten, its old place freed and used for another one.
#[test]
fn a_reader_of_compressed_data_that_are_replaced_sees_the_new_ones() {
    if !has_qemu("a_reader_of_compressed_data_that_are_replaced_sees_the_new_ones") {
        return;
    }
    for options in ["cluster_size=64k", "cluster_size=64k,compression_type=zstd", "compat=0.10,cluster_size=64k"] {
        let prepared = Prepared::make(Recipe::new(options, 2 << 20).compressed());
        for cluster in 0..3u64 {
            let (files, gate) = gated(&prepared);
            let image = driver::read_write(&files, &prepared, false).unwrap();
            // The tables are in memory from here on.
            image.block_status(cluster << 16, 1).unwrap();
            gate.hold_next(Call::Read, When::Before);
            std::thread::scope(|scope| {
                let disk = &image;
                let reader = scope.spawn(move || {
                    let mut bytes = vec![0xEE; 4096];
                    disk.read_at(&mut bytes, cluster << 16).map(|()| bytes)
                });
                gate.wait_for(&reader);
                (0..16).for_each(|other| disk.write_at(&[0xAA; 65536], other << 16).unwrap());
                disk.flush().unwrap();
                (16..31).for_each(|other| disk.write_at(&[0xBB; 65536], other << 16).unwrap());
                gate.release();
                let bytes = reader.join().unwrap().unwrap_or_else(|e| panic!("{options}, cluster {cluster}: {e}"));
                let old = &prepared.content[(cluster << 16) as usize..][..4096];
                assert!(bytes == old || bytes == [0xAA; 4096], "{options}, cluster {cluster}: {:x?}", &bytes[..16]);
            });
        }
    }
}

/// While the host's file is punched for a discard, another write to the cluster arrives.
#[test]
fn a_write_beside_the_punch_of_a_discard_stays() {
    if !has_qemu("a_write_beside_the_punch_of_a_discard_stays") {
        return;
    }
    for options in ["cluster_size=4k", "cluster_size=16k,extended_l2=on", "cluster_size=4k,data_file=DATA"] {
        let prepared = Prepared::make(Recipe::new(options, 256 << 10));
        let cluster = prepared.cluster_size as usize;
        for part in [0..cluster, cluster / 4..cluster / 2] {
            let (files, gate) = gated(&prepared);
            let image = driver::read_write(&files, &prepared, false).unwrap();
            image.write_at(&vec![0xAA; cluster], 0).unwrap();
            gate.hold_next(Call::Punch, When::Before);
            std::thread::scope(|scope| {
                let (disk, part) = (&image, part.clone());
                let discarding = scope.spawn(move || disk.write_zeroes(0, cluster as u64, true).unwrap());
                gate.wait_for(&discarding);
                let writing = scope.spawn(move || disk.write_at(&vec![0xBB; part.len()], part.start as u64).unwrap());
                let_go_on(&writing);
                gate.release();
            });
            let mut bytes = vec![0xEE; cluster];
            image.read_at(&mut bytes, 0).unwrap();
            // Either came first.
            assert!(bytes[part.clone()].iter().all(|byte| *byte == 0xBB), "{options}, {part:?}: the write is gone");
            let others = bytes[..part.start].iter().chain(&bytes[part.end..]);
            assert!(others.into_iter().all(|byte| *byte == 0), "{options}, {part:?}");
        }
    }
}

/// Bytes that were written while a sync ran are not what it saved: a flush after them takes another one.
#[test]
fn a_flush_does_not_rely_on_a_sync_that_began_before_the_write() {
    if !has_qemu("a_flush_does_not_rely_on_a_sync_that_began_before_the_write") {
        return;
    }
    for options in ["cluster_size=4k", "compat=0.10,cluster_size=4k"] {
        let prepared = Prepared::make(Recipe::new(options, 256 << 10));
        let (files, gate) = gated(&prepared);
        let image = driver::read_write(&files, &prepared, false).unwrap();
        image.write_at(&[0xAA; 4096], 0).unwrap();
        image.flush().unwrap();
        gate.hold_next(Call::Sync, When::After);
        std::thread::scope(|scope| {
            let disk = &image;
            let first = scope.spawn(move || disk.flush().unwrap());
            gate.wait_for(&first);
            disk.write_at(&[0xBB; 4096], 0).unwrap();
            let before = gate.calls(Call::Sync);
            let second = scope.spawn(move || disk.flush().unwrap());
            let_go_on(&second);
            gate.release();
            second.join().unwrap();
            assert!(gate.calls(Call::Sync) > before, "{options}: no sync of what was written");
        });
    }
}

/// A reader has looked at a table in the file and not put it into the cache yet, when an entry of it changes; the
/// changed table is out of the cache again before the reader goes on.
#[test]
fn a_table_that_was_read_before_a_change_is_not_believed_after_it() {
    if !has_qemu("a_table_that_was_read_before_a_change_is_not_believed_after_it") {
        return;
    }
    // Many tables, and a cache of few.
    let prepared = Prepared::make(Recipe::new("cluster_size=512", 1 << 20).full());
    let (files, gate) = gated(&prepared);
    let image = driver::read_write(&files, &prepared, true).unwrap();
    gate.hold_next(Call::Read, When::After);
    std::thread::scope(|scope| {
        let disk = &image;
        let reading = scope.spawn(move || disk.read_at(&mut [0xEE; 512], 512).unwrap());
        gate.wait_for(&reading);
        let changing = scope.spawn(move || {
            disk.write_zeroes(0, 512, false).unwrap();
            (1..32).for_each(|table| disk.read_at(&mut [0xEE; 512], table << 15).unwrap());
        });
        let_go_on(&changing);
        gate.release();
    });
    let mut bytes = [0xEE; 512];
    image.read_at(&mut bytes, 0).unwrap();
    assert!(bytes == [0; 512], "the change is gone");
}
