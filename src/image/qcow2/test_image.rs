//! Small images for tests, laid out by hand so that no driver's habits hide a fault.

use super::refcount::{Place, Width, to_bytes};
use super::tables::COPIED;
use crate::storage::Storage;

/// What an image is made of.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    pub version: u32,
    pub cluster_bits: u32,
    pub order: u32,
    /// Guest clusters that are data.
    pub data_clusters: u64,
    pub incompatible: u64,
}

impl Shape {
    pub fn new(cluster_bits: u32, order: u32, data_clusters: u64) -> Shape {
        Shape { version: 3, cluster_bits, order, data_clusters, incompatible: 0 }
    }

    pub fn place(&self) -> Place {
        let width = Width::new(self.order).unwrap();
        Place { cluster_bits: self.cluster_bits, width, table_offset: self.at(1), table_clusters: 1 }
    }

    pub fn at(&self, cluster: u64) -> u64 {
        cluster << self.cluster_bits
    }

    fn blocks(&self) -> u64 {
        let fixed = 3 + self.l2_tables() + self.data_clusters;
        (1..).find(|blocks| (fixed + blocks).div_ceil(self.place().per_block()) <= *blocks).unwrap()
    }

    fn l2_entries(&self) -> u64 {
        self.at(1) / 8
    }

    fn l2_tables(&self) -> u64 {
        self.data_clusters.div_ceil(self.l2_entries())
    }

    /// Cluster of the L1 table.
    pub fn l1(&self) -> u64 {
        2 + self.blocks()
    }

    /// First cluster of data; the L2 tables lie before it.
    pub fn data(&self) -> u64 {
        self.l1() + 1 + self.l2_tables()
    }

    /// One past the last cluster.
    pub fn end(&self) -> u64 {
        self.data() + self.data_clusters
    }

    /// Writes the image: header, refcount table, its blocks, L1 table, L2 tables, data, and nothing behind it.
    pub fn write(&self, storage: &dyn Storage) {
        let size = self.at(self.data_clusters.max(1));
        let mut header = vec![0; 112];
        let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, b"QFI\xfb");
        put(4, &self.version.to_be_bytes());
        put(20, &self.cluster_bits.to_be_bytes());
        put(24, &size.to_be_bytes());
        put(36, &(self.l2_tables().max(1) as u32).to_be_bytes());
        put(40, &self.at(self.l1()).to_be_bytes());
        put(48, &self.at(1).to_be_bytes());
        put(56, &1u32.to_be_bytes());
        if self.version == 3 {
            put(72, &self.incompatible.to_be_bytes());
            put(96, &self.order.to_be_bytes());
            put(100, &104u32.to_be_bytes());
        }
        storage.set_len(self.at(self.end())).unwrap();
        storage.write_at(&header, 0).unwrap();
        let blocks: Vec<u64> = (0..self.blocks()).map(|index| self.at(2 + index)).collect();
        storage.write_at(&to_bytes(&blocks), self.at(1)).unwrap();
        let place = self.place();
        for (index, offset) in blocks.iter().enumerate() {
            let mut block = vec![0; self.at(1) as usize];
            let first = index as u64 * place.per_block();
            for cluster in first..(first + place.per_block()).min(self.end()) {
                place.width.set(&mut block, cluster - first, 1);
            }
            storage.write_at(&block, *offset).unwrap();
        }
        let l2s: Vec<u64> = (0..self.l2_tables()).map(|index| self.at(self.l1() + 1 + index)).collect();
        storage.write_at(&to_bytes(&l2s.iter().map(|at| at | COPIED).collect::<Vec<_>>()), self.at(self.l1())).unwrap();
        for guest in 0..self.data_clusters {
            let host = self.at(self.data() + guest);
            let entry = l2s[(guest / self.l2_entries()) as usize] + guest % self.l2_entries() * 8;
            storage.write_at(&(host | COPIED).to_be_bytes(), entry).unwrap();
            storage.write_at(&vec![(guest as u8).wrapping_add(1); self.at(1) as usize], host).unwrap();
        }
        storage.sync().unwrap();
    }
}
