//! Compressed clusters: compression, decompression and a small cache of what came out.
//!
//! Readers come in pieces of a cluster, often several at once, so the last few clusters are kept, and of several
//! readers of one cluster one decompresses while the others wait for it. The key is where the compressed data lie: they
//! are never changed in place, a write puts the cluster elsewhere. A place that was freed may get other data later: who
//! publishes these has the cache forget it first ([`Decompressor::forget`]).
//!
//! Input is hostile: what a stream can make us allocate is bounded by the cluster and [`ZSTD_WINDOW_MAX_BYTES`].

use super::header::Compression;
use super::host::HostFile;
use super::tables::{CompressedAt, Geometry};
use crate::error::{Error, Result, errno};
use crate::storage::Storage;
use flate2::{Compress, Decompress, FlushCompress, FlushDecompress, Status};
use parking_lot::Mutex;
use ruzstd::decoding::{FrameDecoder, StreamingDecoder};
use std::io::Read;
use std::sync::{Arc, OnceLock};

/// What the cache holds at most in bytes, but [`CACHE_CLUSTERS_MIN`] clusters in any case.
const CACHE_BYTES: u64 = 4 << 20;
const CACHE_CLUSTERS_MIN: u64 = 4;
const CACHE_CLUSTERS_MAX: u64 = 64;
/// Largest window of a zstd frame: what RFC 8878 asks every decoder to support, four times the largest cluster.
const ZSTD_WINDOW_MAX_BYTES: u64 = 8 << 20;

/// A decompressed cluster, or what somebody is just making it.
#[derive(Debug)]
struct Cached {
    at: CompressedAt,
    cluster: OnceLock<Result<Box<[u8]>>>,
}

/// Reads compressed clusters.
#[derive(Debug)]
pub struct Decompressor {
    compression: Compression,
    cluster_size: usize,
    capacity: usize,
    /// The most recently used first. A leaf lock, never held across I/O or decompression.
    cache: Mutex<Vec<Arc<Cached>>>,
}

impl Decompressor {
    /// With an empty cache.
    pub fn new(compression: Compression, geometry: &Geometry) -> Decompressor {
        let cluster_size = geometry.cluster_size();
        let capacity = (CACHE_BYTES / cluster_size).clamp(CACHE_CLUSTERS_MIN, CACHE_CLUSTERS_MAX) as usize;
        Decompressor {
            compression,
            cluster_size: cluster_size as usize,
            capacity,
            cache: Mutex::new(Vec::with_capacity(capacity + 1)),
        }
    }

    /// Fills `buf` from offset `from` of a compressed cluster; both are within the cluster.
    pub fn read(&self, file: &HostFile, at: CompressedAt, buf: &mut [u8], from: usize) -> Result<()> {
        let cached = self.cached(at);
        let cluster = cached.cluster.get_or_init(|| self.load(file, at));
        match cluster {
            Ok(cluster) => {
                let bytes = cluster.get(from..).and_then(|rest| rest.get(..buf.len())).unwrap_or_default();
                buf.copy_from_slice(bytes);
                Ok(())
            }
            Err(e) => {
                // The next reader tries again: the medium may have recovered.
                self.cache.lock().retain(|other| !Arc::ptr_eq(other, &cached));
                Err(e.clone())
            }
        }
    }

    /// Nothing that was read at `at` until now is kept. Called when new data are there, and before an entry says so.
    pub fn forget(&self, at: CompressedAt) {
        self.cache.lock().retain(|cached| cached.at != at);
    }

    fn cached(&self, at: CompressedAt) -> Arc<Cached> {
        let mut cache = self.cache.lock();
        let cached = match cache.iter().position(|cached| cached.at == at) {
            Some(index) => cache.remove(index),
            None => Arc::new(Cached { at, cluster: OnceLock::new() }),
        };
        cache.truncate(self.capacity - 1);
        cache.insert(0, cached.clone());
        cached
    }

    fn load(&self, file: &HostFile, at: CompressedAt) -> Result<Box<[u8]>> {
        // The last sector may end short at the end of the file.
        let input_bytes = at.max_bytes.min(file.bytes().saturating_sub(at.offset.0));
        let mut input = vec![0; input_bytes as usize];
        file.read_at(&mut input, at.offset.0)?;
        let mut cluster = vec![0; self.cluster_size].into_boxed_slice();
        let done = match self.compression {
            Compression::Zlib => inflate(&input, &mut cluster),
            Compression::Zstd => unzstd(&input, &mut cluster),
        };
        done.map_err(|why| {
            Error::new(errno::EIO, "qcow2 image", format!("compressed data at host offset {}: {why}", at.offset))
                .at_path(file.path())
        })?;
        Ok(cluster)
    }
}

/// What a decoder of QEMU's keeps of a deflate stream's output, as a power of two: 4 KiB.
const DEFLATE_WINDOW_BITS: u8 = 12;

/// Compresses a cluster. None where that makes it no smaller.
pub fn compress(compression: Compression, cluster: &[u8]) -> Option<Vec<u8>> {
    let packed = match compression {
        Compression::Zlib => deflate(cluster)?,
        Compression::Zstd => ruzstd::encoding::compress_to_vec(cluster, ruzstd::encoding::CompressionLevel::Fastest),
    };
    (!packed.is_empty() && packed.len() < cluster.len()).then_some(packed)
}

/// A raw deflate stream of `input`, where it is smaller than that.
fn deflate(input: &[u8]) -> Option<Vec<u8>> {
    let mut stream = Compress::new_with_window_bits(flate2::Compression::default(), false, DEFLATE_WINDOW_BITS);
    let mut output = Vec::with_capacity(input.len());
    match stream.compress_vec(input, &mut output, FlushCompress::Finish) {
        Ok(Status::StreamEnd) => Some(output),
        _ => None,
    }
}

type Decoded = std::result::Result<(), String>;

/// Fills `output` from a raw deflate stream; what follows in `input` is somebody else's.
fn inflate(input: &[u8], output: &mut [u8]) -> Decoded {
    let mut stream = Decompress::new(false);
    stream.decompress(input, output, FlushDecompress::Finish).map_err(|e| format!("not a deflate stream: {e}"))?;
    complete(stream.total_out() as usize, output)
}

/// Fills `output` from zstd frames, of which there may be several; what follows in `input` is somebody else's.
fn unzstd(mut input: &[u8], output: &mut [u8]) -> Decoded {
    let bad = |e: &dyn std::fmt::Display| format!("not a zstd frame: {e}");
    let mut decoder = FrameDecoder::new();
    decoder.set_max_window_size(ZSTD_WINDOW_MAX_BYTES);
    let mut done = 0;
    while done < output.len() && !input.is_empty() {
        let mut frame = StreamingDecoder::new_with_decoder(&mut input, &mut decoder).map_err(|e| bad(&e))?;
        loop {
            let rest = output.get_mut(done..).unwrap_or_default();
            match frame.read(rest).map_err(|e| bad(&e))? {
                0 => break,
                count => done += count,
            }
        }
    }
    complete(done, output)
}

fn complete(done: usize, output: &[u8]) -> Decoded {
    if done == output.len() {
        return Ok(());
    }
    Err(format!("ends after {done} of {} bytes", output.len()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write;

    fn deflated(data: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::default());
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    }

    fn zstd(data: &[u8]) -> Vec<u8> {
        ruzstd::encoding::compress_to_vec(data, ruzstd::encoding::CompressionLevel::Fastest)
    }

    fn sample(len: usize) -> Vec<u8> {
        (0..len).map(|i| (i * i / 97 % 251) as u8).collect()
    }

    #[test]
    fn streams_fill_a_cluster_whatever_follows_them() {
        let data = sample(65536);
        for (stream, decode) in [(deflated(&data), inflate as fn(&[u8], &mut [u8]) -> Decoded), (zstd(&data), unzstd)] {
            let mut output = vec![0; data.len()];
            decode(&stream, &mut output).unwrap();
            assert!(output == data);
            let mut longer = stream.clone();
            longer.extend([0xAA; 700]);
            output.fill(0);
            decode(&longer, &mut output).unwrap();
            assert!(output == data);
            let e = decode(&stream[..stream.len() / 2], &mut output).unwrap_err();
            assert!(!e.is_empty());
            let mut too_much = vec![0; data.len() + 1];
            assert!(decode(&stream, &mut too_much).unwrap_err().contains("ends after"), "short by one byte");
        }
    }

    #[test]
    fn several_zstd_frames_make_one_cluster() {
        let data = sample(8192);
        let mut stream = zstd(&data[..5000]);
        stream.extend(zstd(&data[5000..]));
        let mut output = vec![0; 8192];
        unzstd(&stream, &mut output).unwrap();
        assert!(output == data);
    }

    #[test]
    fn a_zstd_window_of_gigabytes_is_refused() {
        // Magic, a descriptor without content size or single segment, and a window descriptor of 2^41.
        let frame = [0x28, 0xB5, 0x2F, 0xFD, 0x00, 0xF8, 0x01, 0x00, 0x00];
        unzstd(&frame, &mut [0; 4096]).unwrap_err();
    }

    proptest! {
        #[test]
        fn garbage_is_an_error_or_bytes(garbage in proptest::collection::vec(any::<u8>(), 0..2000), at in 0..2000usize, with: u8) {
            let mut output = vec![0; 4096];
            let _ = inflate(&garbage, &mut output);
            let _ = unzstd(&garbage, &mut output);
            for (mut stream, decode) in
                [(deflated(&sample(4096)), inflate as fn(&[u8], &mut [u8]) -> Decoded), (zstd(&sample(4096)), unzstd)]
            {
                let at = at % stream.len();
                stream[at] ^= with;
                let _ = decode(&stream, &mut output);
            }
        }
    }
}
