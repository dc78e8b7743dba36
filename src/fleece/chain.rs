//! The chain: the layers of a disk, oldest first. Immutable; a new one is published as a whole.
//!
//! I4: old content goes to the newest layer. A view looks in its own layer, then in each newer one in order, then in
//! the image; the first that has the chunk holds the frozen truth.

use super::layer::Layer;
use std::ops::Range;
use std::sync::Arc;

/// The layers of a disk, oldest first.
#[derive(Debug, Default, Clone)]
pub(super) struct Chain {
    pub layers: Vec<Arc<Layer>>,
}

/// Where the content of a run of chunks stands.
#[derive(Debug, Clone)]
pub(super) enum Source {
    Layer(Arc<Layer>),
    Image,
}

impl Chain {
    pub(super) fn newest(&self) -> Option<&Arc<Layer>> {
        self.layers.last()
    }

    /// The layers that a view starting at `seq` looks through, its own first.
    pub(super) fn seen_from(&self, seq: u64) -> &[Arc<Layer>] {
        let start = self.layers.partition_point(|layer| layer.seq < seq);
        &self.layers[start..]
    }

    /// The source of `chunks.start` for a view starting at `seq`, and the end of the run that shares it.
    pub(super) fn source(&self, seq: u64, chunks: Range<u64>) -> (Source, u64) {
        let mut end = chunks.end;
        for layer in self.seen_from(seq) {
            match layer.next_set(chunks.start, end) {
                Some(first) if first == chunks.start => {
                    let end = layer.next_clear(chunks.start, end).unwrap_or(end);
                    return (Source::Layer(layer.clone()), end);
                }
                Some(first) => end = first,
                None => {}
            }
        }
        (Source::Image, end)
    }

    /// The first chunk of `chunks` that some layer from `seq` on holds: from there an answer of the image is void.
    pub(super) fn first_set(&self, seq: u64, chunks: Range<u64>) -> Option<u64> {
        let mut end = chunks.end;
        for layer in self.seen_from(seq) {
            if let Some(first) = layer.next_set(chunks.start, end) {
                end = first;
            }
        }
        (end < chunks.end).then_some(end)
    }

    /// Why views starting at `seq` are broken, if one layer that they look through is.
    pub(super) fn broken(&self, seq: u64) -> Option<String> {
        self.seen_from(seq).iter().find_map(|layer| layer.broken_reason())
    }

    /// Whether a view of the layers up to `seq` needs the old content of `chunk`.
    pub(super) fn needed(&self, seq: u64, chunk: u64) -> bool {
        self.layers.iter().take_while(|layer| layer.seq <= seq).any(|layer| layer.view_needs(chunk))
    }

    /// The end of the run from `chunks.start` whose chunks are all needed (true) or all spared (false).
    pub(super) fn needed_run(&self, chunks: Range<u64>) -> (bool, u64) {
        let seq = u64::MAX;
        let plain = self.layers.iter().filter(|layer| layer.is_viewed() && !layer.has_releases());
        let covered = plain.map(|layer| layer.chunks()).max().unwrap_or(0);
        if chunks.start < covered {
            return (true, chunks.end.min(covered));
        }
        let first = self.needed(seq, chunks.start);
        let end = (chunks.start + 1..chunks.end).find(|&chunk| self.needed(seq, chunk) != first);
        (first, end.unwrap_or(chunks.end))
    }
}
