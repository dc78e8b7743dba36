//! The header with its extensions. Input: length of the file (8 bytes), its first bytes.

use fleecefs::error::errno;
use fleecefs::image::qcow2::header::{Encryption, Header, incompatible};
use fleecefs::image::qcow2::{look_at_header, read_header};
use fleecefs::storage::{MemFile, Storage};
use fleecefs::units::MAX_DISK_BYTES;

/// What an error names.
const FIELDS: &[&str] = &[
    "magic",
    "header_length",
    "version",
    "cluster_bits",
    "backing_file_offset",
    "backing_file_size",
    "backing file name",
    "size",
    "l1_size",
    "l1_table_offset",
    "crypt_method",
    "refcount_table_offset",
    "refcount_table_clusters",
    "nb_snapshots",
    "snapshots_offset",
    "incompatible_features",
    "autoclear_features",
    "compression_type",
    "refcount_order",
    "extension",
];

/// Runs the target.
pub fn run(input: &[u8]) {
    let Some((file_bytes, bytes)) = input.split_first_chunk() else { return };
    let file_bytes = u64::from_be_bytes(*file_bytes) % (i64::MAX as u64);
    let there = (bytes.len() as u64).min(file_bytes) as usize;
    let file = MemFile::new("image", file_bytes);
    file.write_at(&bytes[..there], 0).expect("memory takes it");
    let looked = look_at_header(&file);
    if let Ok(header) = &looked {
        keeps_the_rules(header, file_bytes);
        says_what_stands_there(header, &file);
    }
    match read_header(&file) {
        Ok(header) => {
            assert_eq!(header.encryption, None);
            assert_eq!(looked.ok(), Some(header));
        }
        Err(e) => {
            // Whoever tells what an image is does not mind encryption; all else is refused by both.
            assert!(e.errno() == errno::EOPNOTSUPP || looked.is_err(), "{e:?}, but {looked:?}");
            let text = e.to_string();
            assert!([errno::EINVAL, errno::EOPNOTSUPP].contains(&e.errno()), "{e:?}");
            let named = FIELDS.iter().any(|field| text.starts_with(&format!("qcow2 header image: {field}: ")));
            assert!(named, "names no field: {text}");
        }
    }
}

/// What everything else relies on.
fn keeps_the_rules(header: &Header, file_bytes: u64) {
    let cluster = header.cluster_size();
    assert!([2, 3].contains(&header.version) && (9..=21).contains(&header.cluster_bits));
    assert!(header.size <= MAX_DISK_BYTES && header.refcount_order <= 6);
    assert!(u64::from(header.l1_size) >= header.geometry().l1_entries_for(header.size));
    assert!(header.l1_size <= 4 << 20 && header.nb_snapshots <= 65536);
    assert_eq!(header.incompatible_features & !incompatible::KNOWN, 0);
    assert!(u64::from(header.refcount_table_clusters) * cluster <= 8 << 20);
    assert!(u64::from(header.header_length) <= cluster);
    assert!(!header.has_extended_l2() || header.cluster_bits >= 14);
    assert!(header.extensions.bitmaps().is_some() || header.autoclear_features & 1 == 0);
    let mut areas = header.areas();
    areas.sort_by_key(|(_, area)| area.start);
    for (name, area) in &areas {
        assert!(area.start.is_multiple_of(cluster) && area.start < area.end, "{name}: {area:?}");
        assert!(area.end - file_bytes.min(area.end) < cluster, "{name}: {area:?} in a file of {file_bytes}");
    }
    assert!(areas.windows(2).all(|pair| pair[0].1.end <= pair[1].1.start), "{areas:?}");
    if let Some(backing) = &header.backing {
        assert!((1..=1023).contains(&backing.name.len()) && !backing.name.contains(&0));
        assert!(backing.offset.0 + backing.name.len() as u64 <= cluster);
    }
}

/// The bytes that the decoded header stands for are those of the file, but for paddings.
fn says_what_stands_there(header: &Header, file: &MemFile) {
    let mut bytes = vec![0; header.cluster_size() as usize];
    file.read_at(&mut bytes, 0).expect("memory gives it");
    let be32 = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four"));
    let be64 = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight"));
    let backing = header.backing.as_ref();
    let words = [
        (4, header.version),
        (20, header.cluster_bits),
        (32, header.encryption.map_or(0, |method| if method == Encryption::Aes { 1 } else { 2 })),
        (36, header.l1_size),
        (56, header.refcount_table_clusters),
        (60, header.nb_snapshots),
    ];
    let longs = [
        (8, backing.map_or(0, |backing| backing.offset.0)),
        (24, header.size),
        (40, header.l1_table_offset.0),
        (48, header.refcount_table_offset.0),
        (64, header.snapshots_offset.0),
    ];
    assert!(words.iter().all(|(at, word)| be32(*at) == *word), "{header:?}");
    assert!(longs.iter().all(|(at, word)| be64(*at) == *word), "{header:?}");
    if header.version == 3 {
        assert_eq!(be64(72), header.incompatible_features);
        assert_eq!(be64(80), header.compatible_features);
        assert_eq!(be64(88), header.autoclear_features);
        assert_eq!((be32(96), be32(100)), (header.refcount_order, header.header_length));
        assert_eq!(bytes[104..header.header_length as usize], header.additional);
    }
    let mut at = header.header_length as usize;
    for extension in &header.extensions.all {
        assert_eq!((be32(at), be32(at + 4) as usize), (extension.kind, extension.data.len()));
        assert_eq!(bytes[at + 8..at + 8 + extension.data.len()], extension.data);
        at += 8 + extension.data.len().next_multiple_of(8);
    }
    if let Some(backing) = backing {
        assert_eq!(be32(16) as usize, backing.name.len());
        assert_eq!(bytes[backing.offset.0 as usize..][..backing.name.len()], backing.name);
    }
}
