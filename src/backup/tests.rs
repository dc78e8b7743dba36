//! Each format is read back by a small parser of its own and compared with what the model says it must hold.

use super::file::Points;
use super::*;
use crate::error::{Error, errno};
use proptest::prelude::*;
use sha2::{Digest, Sha256};
use std::collections::BTreeSet;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// A map that lies in memory; neighbours of equal state may stand unmerged in it.
#[derive(Debug, Clone)]
struct List(Vec<Extent>);

impl List {
    fn new(parts: &[(u64, bool, bool)]) -> List {
        let mut start = 0;
        let extent = |&(length, dirty, zero): &(u64, bool, bool)| {
            start += length;
            Extent { start: start - length, length, dirty, zero }
        };
        List(parts.iter().map(extent).collect())
    }

    /// The reference: runs of equal `state`, which `None` leaves out.
    fn runs<S: PartialEq>(&self, state: impl Fn(&Extent) -> Option<S>) -> Vec<(u64, u64, S)> {
        let mut runs: Vec<(u64, u64, S)> = Vec::new();
        for e in &self.0 {
            let Some(s) = state(e) else { continue };
            match runs.last_mut() {
                Some(last) if last.0 + last.1 == e.start && last.2 == s => last.1 += e.length,
                _ => runs.push((e.start, e.length, s)),
            }
        }
        runs
    }
}

impl ExtentSource for List {
    fn disk_size(&self) -> u64 {
        self.0.last().map_or(0, |e| e.start + e.length)
    }
    fn extents_from(&self, offset: u64) -> Result<Extents<'_>> {
        let index = self.0.iter().position(|e| e.start == offset);
        assert!(index.is_some() || self.0.is_empty(), "{offset} is no extent's start");
        Ok(Box::new(self.0[index.unwrap_or(0)..].iter().map(|e| Ok(*e))))
    }
}

fn meta() -> MapMeta {
    let point = |name: &str, n| MapPoint { name: name.into(), uuid: Uuid::from_u128(n) };
    MapMeta {
        disk: "vda".into(),
        disk_uuid: Uuid::from_u128(1),
        image: "/images/a\nb".into(),
        snapshot: "to day".into(),
        base: Some(point("yester day", 2)),
        full_reason: None,
        target: point("to day", 3),
    }
}

fn text_of(file: &MapFile) -> String {
    let mut text = Vec::new();
    file.write_to(&mut text).unwrap();
    assert_eq!(text.len() as u64, file.len());
    String::from_utf8(text).unwrap()
}

fn render(list: &List, format: MapFormat) -> String {
    let text = text_of(&MapFile::new(Arc::new(list.clone()), format, &meta()).unwrap());
    let mut once = Vec::new();
    MapFile::write_once(Arc::new(list.clone()), format, &meta(), &mut once).unwrap();
    assert_eq!(String::from_utf8(once).unwrap(), text, "{format}");
    text
}

fn json(text: &str) -> Vec<serde_json::Value> {
    serde_json::from_str(text).unwrap()
}

/// Between `<TAG>` and `</TAG>`, each one of them, as bmaptool's parser finds them.
fn tags<'a>(text: &'a str, tag: &str) -> Vec<&'a str> {
    let (open, close) = (format!("<{tag}>"), format!("</{tag}>"));
    text.split(&open).skip(1).map(|rest| rest.split(&close).next().unwrap().trim()).collect()
}

fn check_json(list: &List) {
    let got: Vec<Extent> = serde_json::from_str(&render(list, MapFormat::Json)).unwrap();
    let got: Vec<_> = got.into_iter().map(|e| (e.start, e.length, (e.dirty, e.zero))).collect();
    assert_eq!(got, list.runs(|e| Some((e.dirty, e.zero))));
}

fn check_borg(list: &List) {
    let text = render(list, MapFormat::Borg);
    let got: Vec<_> = text
        .lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| {
            let mut words = line.split(' ');
            let mut next = || words.next().unwrap();
            (next().parse().unwrap(), next().parse().unwrap(), next().to_owned())
        })
        .collect();
    let state = |e: &Extent| match (e.dirty, e.zero) {
        (false, _) => "same",
        (true, true) => "zero",
        (true, false) => "data",
    };
    assert_eq!(got, list.runs(|e| Some(state(e).to_owned())));
}

fn check_rbd(list: &List) {
    let got: Vec<_> = json(&render(list, MapFormat::Rbd))
        .iter()
        .map(|e| (e["offset"].as_u64().unwrap(), e["length"].as_u64().unwrap(), e["exists"] == "true"))
        .collect();
    assert_eq!(got, list.runs(|e| e.dirty.then_some(!e.zero)));
}

fn check_nbd(list: &List) {
    let got: Vec<_> = json(&render(list, MapFormat::Nbd))
        .iter()
        .map(|e| {
            let dirty = e["type"].as_u64().unwrap() == 1;
            assert_eq!(e["description"], if dirty { "dirty" } else { "clean" });
            (e["offset"].as_u64().unwrap(), e["length"].as_u64().unwrap(), dirty)
        })
        .collect();
    assert_eq!(got, list.runs(|e| Some(e.dirty)));
}

fn check_csi(list: &List) {
    let got: serde_json::Value = serde_json::from_str(&render(list, MapFormat::Csi)).unwrap();
    assert_eq!(got["block_metadata_type"], "VARIABLE_LENGTH");
    assert_eq!(got["volume_capacity_bytes"], list.disk_size());
    let got: Vec<_> = got["block_metadata"]
        .as_array()
        .unwrap()
        .iter()
        .map(|e| (e["byte_offset"].as_u64().unwrap(), e["size_bytes"].as_u64().unwrap(), true))
        .collect();
    assert_eq!(got, list.runs(|e| e.dirty.then_some(true)));
}

fn check_ddrescue(list: &List) {
    let text = render(list, MapFormat::Ddrescue);
    let mut lines = text.lines().filter(|line| !line.starts_with('#'));
    let current: Vec<_> = lines.next().unwrap().split_whitespace().collect();
    assert_eq!(current, ["0x00000000", "+", "1"]);
    let hex = |word: &str| u64::from_str_radix(word.strip_prefix("0x").unwrap(), 16).unwrap();
    let got: Vec<_> = lines
        .map(|line| {
            let words: Vec<_> = line.split_whitespace().collect();
            (hex(words[0]), hex(words[1]), words[2].to_owned())
        })
        .collect();
    assert_eq!(got, list.runs(|e| Some(if e.dirty { "+".to_owned() } else { "?".to_owned() })));
}

fn check_bmap(list: &List) {
    let text = render(list, MapFormat::Bmap);
    let number = |tag| tags(&text, tag)[0].parse::<u64>().unwrap();
    let mut blocks = BTreeSet::new();
    let mut last_end = None;
    for range in tags(&text, "Range") {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (u64, u64) = (first.parse().unwrap(), last.parse().unwrap());
        assert!(last_end.is_none_or(|end| first > end + 1), "ranges ascend and are merged: {range}");
        last_end = Some(last);
        blocks.extend(first..=last);
    }
    let expected: BTreeSet<u64> =
        list.0.iter().filter(|e| e.dirty).flat_map(|e| e.start / 4096..=(e.start + e.length - 1) / 4096).collect();
    assert_eq!(blocks, expected);
    assert_eq!(number("ImageSize"), list.disk_size());
    assert_eq!(number("BlockSize"), 4096);
    assert_eq!(number("BlocksCount"), list.disk_size().div_ceil(4096));
    assert_eq!(number("MappedBlocksCount"), expected.len() as u64);
    let checksum = tags(&text, "BmapFileChecksum")[0];
    let zeroed = text.replacen(checksum, &"0".repeat(checksum.len()), 1);
    assert_eq!(checksum, format!("{:x}", Sha256::digest(zeroed)));
}

fn check_text(list: &List) {
    let text = render(list, MapFormat::Text);
    let rows: Vec<Vec<&str>> = text
        .lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| line.split("  ").map(str::trim).filter(|cell| !cell.is_empty()).collect())
        .collect();
    let got: Vec<_> = rows
        .iter()
        .map(|row| {
            let state = (row[3].starts_with("changed"), row[3].ends_with("zeros"));
            (row[0].parse().unwrap(), row[1].parse().unwrap(), state)
        })
        .collect();
    assert_eq!(got, list.runs(|e| Some((e.dirty, e.zero))));
    let columns: BTreeSet<usize> = text
        .lines()
        .filter(|line| !line.starts_with('#') || line.ends_with("STATE"))
        .map(|line| line.rfind("  ").unwrap())
        .collect();
    assert!(columns.len() == 1, "columns do not line up in\n{text}");
}

fn parts() -> impl Strategy<Value = Vec<(u64, bool, bool)>> {
    let length = prop_oneof![1..6000_u64, (1..40_u64).prop_map(|n| n * 512), (1..9_u64).prop_map(|n| n * 65536)];
    prop::collection::vec((length, any::<bool>(), any::<bool>()), 0..60)
}

proptest! {
    #[test]
    fn every_format_says_what_its_consumer_must_know(parts in parts()) {
        let list = List::new(&parts);
        check_json(&list);
        check_borg(&list);
        check_rbd(&list);
        check_nbd(&list);
        check_csi(&list);
        check_ddrescue(&list);
        check_bmap(&list);
        check_text(&list);
    }

    #[test]
    fn any_piece_of_a_map_file_reads_as_the_whole(
        parts in parts(),
        spacing in 1..400_u64,
        max_points in 2..12_usize,
        pieces in prop::collection::vec((any::<prop::sample::Index>(), 0..700_usize), 1..20),
    ) {
        let source = Arc::new(List::new(&parts));
        for format in MapFormat::ALL {
            let file = MapFile::with_points(source.clone(), format, &meta(), Points::new(spacing, max_points)).unwrap();
            let text = text_of(&file).into_bytes();
            for (index, length) in &pieces {
                let offset = index.index(text.len() + 2);
                let mut buf = vec![0xee; *length];
                let count = file.read_at(&mut buf, offset as u64).unwrap();
                let expected = &text[offset.min(text.len())..(offset + length).min(text.len())];
                prop_assert_eq!(&buf[..count], expected);
            }
        }
    }

    #[test]
    fn totals_are_those_of_the_model(parts in parts()) {
        let list = List::new(&parts);
        let sum = |pick: fn(&Extent) -> bool| list.0.iter().filter(|e| pick(e)).map(|e| e.length).sum::<u64>();
        let expected = Totals {
            size: list.disk_size(),
            dirty: sum(|e| e.dirty),
            zero: sum(|e| e.dirty && e.zero),
            extents: list.runs(|e| Some((e.dirty, e.zero))).len() as u64,
        };
        prop_assert_eq!(Totals::of(&list).unwrap(), expected);
    }
}

#[test]
fn the_largest_numbers_stand_in_full_in_every_format() {
    let source = List::new(&[(0x7fff_ffff_ffff_0000, true, true), (0xffff, false, false)]);
    for format in MapFormat::ALL {
        let text = render(&source, format);
        let expected = match format {
            MapFormat::Bmap => "<Range> 0-2251799813685231 </Range>",
            MapFormat::Ddrescue => "0x7FFFFFFFFFFF0000  0x0000FFFF  ?",
            _ => "9223372036854710272",
        };
        assert!(text.contains(expected), "{text}");
    }
}

#[test]
fn json_has_the_shape_of_the_manual() {
    let list = List::new(&[(65536, true, false), (1073676288, false, false)]);
    assert_eq!(
        render(&list, MapFormat::Json),
        "[{\"start\": 0, \"length\": 65536, \"dirty\": true, \"zero\": false},\n \
         {\"start\": 65536, \"length\": 1073676288, \"dirty\": false, \"zero\": false}]\n"
    );
}

#[test]
fn comments_carry_disk_base_and_target_on_lines_of_their_own() {
    let list = List::new(&[(4096, true, false)]);
    for format in [MapFormat::Borg, MapFormat::Ddrescue, MapFormat::Text] {
        let text = render(&list, format);
        for line in [
            "# disk 00000000-0000-0000-0000-000000000001 vda",
            "# image /images/a\\nb",
            "# size 4096",
            "# base 00000000-0000-0000-0000-000000000002 yester day",
            "# target 00000000-0000-0000-0000-000000000003 to day",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} in {text}");
        }
    }
    let full = MapMeta { base: None, full_reason: Some("first backup".into()), ..meta() };
    let text = text_of(&MapFile::new(Arc::new(list), MapFormat::Borg, &full).unwrap());
    assert!(text.contains("\n# base none\n") && text.contains("\n# everything first backup\n"), "{text}");
}

#[test]
fn a_bmap_names_its_disk_in_a_comment_that_no_name_ends() {
    let list = List::new(&[(4096, true, false)]);
    let name = "a --->    <BmapFileChecksum> # \u{fffe}";
    let meta = MapMeta { snapshot: name.into(), ..meta() };
    let text = text_of(&MapFile::new(Arc::new(list), MapFormat::Bmap, &meta).unwrap());
    let (comment, rest) = text.strip_prefix("<?xml version=\"1.0\" ?>\n<!--").unwrap().split_once("-->").unwrap();
    assert!(comment.contains("\n     disk 00000000-0000-0000-0000-000000000001 vda\n"), "{comment}");
    assert!(comment.contains("\n     snapshot a - - ->    <BmapFileChecksum> # ?\n"), "{comment}");
    assert!(rest.starts_with("\n<bmap version=\"2.0\">\n"), "{rest}");
    let checksum = tags(rest, "BmapFileChecksum")[0];
    let zeroed = text.replacen(checksum, &"0".repeat(checksum.len()), 1);
    assert_eq!(checksum, format!("{:x}", Sha256::digest(zeroed)));
}

#[test]
fn names_of_formats_are_read_back_and_others_refused() {
    for format in MapFormat::ALL {
        assert_eq!(format.to_string().parse::<MapFormat>().unwrap(), format);
    }
    assert_eq!("xml".parse::<MapFormat>().unwrap_err().errno(), errno::EINVAL);
}

#[test]
fn a_source_with_a_gap_an_overlap_or_a_missing_end_is_an_error_in_every_format() {
    struct Wrong(List);
    impl ExtentSource for Wrong {
        fn disk_size(&self) -> u64 {
            16384
        }
        fn extents_from(&self, offset: u64) -> Result<Extents<'_>> {
            self.0.extents_from(offset)
        }
    }
    let extent = |start, length| Extent { start, length, dirty: false, zero: false };
    for wrong in [
        vec![extent(0, 4096), extent(8192, 8192)],
        vec![extent(0, 8192), extent(4096, 12288)],
        vec![extent(0, 8192)],
        vec![extent(0, 16384), extent(16384, 1)],
        vec![extent(0, 0), extent(0, 16384)],
        vec![extent(0, u64::MAX)],
        vec![],
    ] {
        for format in MapFormat::ALL {
            let e = MapFile::new(Arc::new(Wrong(List(wrong.clone()))), format, &meta()).unwrap_err();
            assert_eq!(e.errno(), errno::EIO, "{format}: {wrong:?}");
        }
    }
}

#[test]
fn an_error_of_the_source_reaches_the_reader() {
    struct Failing(List, AtomicU64);
    impl ExtentSource for Failing {
        fn disk_size(&self) -> u64 {
            self.0.disk_size()
        }
        fn extents_from(&self, offset: u64) -> Result<Extents<'_>> {
            let all = self.0.extents_from(offset)?;
            if self.1.load(Relaxed) == 0 {
                return Ok(all);
            }
            let gone = Err(Error::new(errno::ESTALE, "view", "gone"));
            Ok(Box::new(all.take(1).chain(std::iter::once(gone))))
        }
    }
    let source = Arc::new(Failing(List::new(&[(512, true, false), (512, false, false)]), AtomicU64::new(0)));
    for format in MapFormat::ALL {
        source.1.store(0, Relaxed);
        let file = MapFile::new(source.clone(), format, &meta()).unwrap();
        source.1.store(1, Relaxed);
        assert_eq!(file.write_to(&mut Vec::new()).unwrap_err().errno(), errno::ESTALE);
        let mut buf = vec![0; file.len() as usize];
        assert_eq!(file.read_at(&mut buf, 0).unwrap_err().errno(), errno::ESTALE);
    }
}

/// Many extents that nobody holds: changed and unchanged granules in turn. Counts what was taken from it.
struct Endless {
    count: u64,
    taken: AtomicU64,
}

const GRANULE: u64 = 65536;

impl ExtentSource for Endless {
    fn disk_size(&self) -> u64 {
        self.count * GRANULE
    }
    fn extents_from(&self, offset: u64) -> Result<Extents<'_>> {
        Ok(Box::new((offset / GRANULE..self.count).map(|index| {
            self.taken.fetch_add(1, Relaxed);
            Ok(Extent { start: index * GRANULE, length: GRANULE, dirty: index % 2 == 0, zero: false })
        })))
    }
}

/// Counts lines, and by how much the source ran ahead of them.
struct Ahead {
    source: Arc<Endless>,
    lines: u64,
    worst: u64,
}

impl Write for Ahead {
    fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
        self.worst = self.worst.max(self.source.taken.load(Relaxed) - self.lines);
        self.lines += buf.iter().filter(|b| **b == b'\n').count() as u64;
        Ok(buf.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn sixteen_million_extents_are_a_map_of_bounded_memory() {
    let source = Arc::new(Endless { count: 16 << 20, taken: AtomicU64::new(0) });
    let file = MapFile::new(source.clone(), MapFormat::Ddrescue, &meta()).unwrap();
    assert!(file.len() > 16 << 24, "a text of {} bytes", file.len());
    assert!(file.held_bytes() < 512 << 10, "{} bytes held", file.held_bytes());

    source.taken.store(0, Relaxed);
    let mut piece = vec![0; 128 << 10];
    let offset = file.len() - piece.len() as u64;
    assert_eq!(file.read_at(&mut piece, offset).unwrap(), 128 << 10);
    assert!(piece.ends_with(b"?\n"));
    let walked = source.taken.load(Relaxed);
    assert!(walked < 40_000, "{walked} extents walked for the last 128 KiB");
}

#[test]
fn writing_a_map_out_holds_a_few_thousand_entries_at_most() {
    let source = Arc::new(Endless { count: 1 << 18, taken: AtomicU64::new(0) });
    let file = MapFile::new(source.clone(), MapFormat::Json, &meta()).unwrap();
    source.taken.store(0, Relaxed);
    let mut out = Ahead { source, lines: 0, worst: 0 };
    file.write_to(&mut out).unwrap();
    assert_eq!(out.lines, 1 << 18);
    assert!(out.worst < 8192, "{} extents were taken but not written", out.worst);
}

#[test]
fn resume_points_stay_few_and_keep_the_start() {
    let source = Arc::new(Endless { count: 5000, taken: AtomicU64::new(0) });
    let few = MapFile::with_points(source.clone(), MapFormat::Json, &meta(), Points::new(1, 8)).unwrap();
    assert!(few.held_bytes() < 1024, "{} bytes held", few.held_bytes());
    let mut first = [0; 14];
    assert_eq!(few.read_at(&mut first, 0).unwrap(), first.len());
    assert_eq!(&first, b"[{\"start\": 0, ");
}
