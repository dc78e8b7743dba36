//! Views over a clean stop (`--keep-snapshots`): the words of their layers, saved beside the stores.
//!
//! `layers/LAYER/PART.words`: the words of the part (see `layer`), 64 bits each, little-endian, then the crc32c of
//! them, 32 bits, little-endian. Written and synced before the sidecar is marked clean, removed after the next open.

use super::layer::{HEAD_WORDS, Layer, LayerWords, PARTS, word_name};
use super::store::{StoreIo, layer_dir};
use crate::bitmap::{Bits, LayerEntry};
use crate::error::{Error, Result, errno};
use crate::storage::{Shm, Words};
use crate::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

fn file_name(layer: uuid::Uuid, part: &str) -> String {
    format!("{}/{part}.words", layer_dir(layer))
}

/// Saves a layer's words durably. They are taken before the store is synced: a copy that is still under way may set a
/// state at any time, and what is saved must not name one that is not durable.
pub(super) fn save(layer: &Layer) -> Result<()> {
    let mut parts = Vec::new();
    for (part, words) in layer.parts() {
        let mut bytes: Vec<u8> = Vec::with_capacity(words.len() * 8 + 4);
        for word in words {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        let crc = crc32c::crc32c(&bytes);
        bytes.extend_from_slice(&crc.to_le_bytes());
        parts.push((part, bytes));
    }
    layer.store.sync()?;
    for (part, bytes) in parts {
        layer.store.io().keep("save a view", file_name(layer.uuid, part), bytes)?;
    }
    Ok(())
}

/// Loads a layer's saved words into new ones.
pub(super) fn load(io: &Arc<StoreIo>, shm: &dyn Shm, entry: &LayerEntry) -> Result<LayerWords> {
    let chunks = entry.size.div_ceil(entry.chunk);
    let copied_words = Bits::words_for(chunks);
    let part = |part: &'static str, count: usize| -> Result<Option<Words>> {
        let name = file_name(entry.uuid, part);
        let bytes = io.run("load a view", move |io| {
            if !io.dir.exists(&name)? {
                return Ok(None);
            }
            let file = io.dir.open(&name)?;
            let mut bytes = vec![0; count * 8 + 4];
            file.read_at(&mut bytes, 0)?;
            Ok(Some(bytes))
        })?;
        let Some(bytes) = bytes else { return Ok(None) };
        let (data, crc) = bytes.split_at(count * 8);
        if crc32c::crc32c(data).to_le_bytes() != crc {
            return Err(Error::new(errno::EIO, "saved view", format!("the checksum of its part '{part}' is wrong")));
        }
        let words = shm.create(&word_name(entry.uuid, part), count)?;
        fill(&words, data.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap_or_default())));
        Ok(Some(words))
    };
    let missing = || Error::new(errno::ENOENT, "saved view", "a part of it is missing");
    Ok(LayerWords {
        head: part("head", HEAD_WORDS)?.ok_or_else(missing)?,
        copied: Bits::new(part("copied", copied_words)?.ok_or_else(missing)?, chunks),
        released: part("released", copied_words)?.map(|words| Bits::new(words, chunks)),
    })
}

/// Removes what was saved of a layer, once it can be recovered from its words.
pub(super) fn forget(io: &Arc<StoreIo>, layer: uuid::Uuid) -> Result<()> {
    io.run("forget a saved view", move |io| PARTS.iter().try_for_each(|part| io.dir.remove(&file_name(layer, part))))
}

/// Copies a layer's words from the namespace of a killed daemon.
pub(super) fn take_over(old: &dyn Shm, new: &dyn Shm, entry: &LayerEntry) -> Result<LayerWords> {
    let part = |part: &str| -> Result<Option<Words>> {
        let name = word_name(entry.uuid, part);
        let Some(words) = old.open(&name)? else { return Ok(None) };
        let copy = new.create(&name, words.len())?;
        fill(&copy, words.iter().map(|word| word.load(Ordering::SeqCst)));
        Ok(Some(copy))
    };
    let chunks = entry.size.div_ceil(entry.chunk);
    let copied_words = Bits::words_for(chunks);
    match (part("head")?, part("copied")?, part("released")?) {
        (Some(head), Some(copied), released) if head.len() == HEAD_WORDS && copied.len() == copied_words => {
            let released = released.filter(|words| words.len() == copied_words);
            let released = released.map(|words| Bits::new(words, chunks));
            Ok(LayerWords { head, copied: Bits::new(copied, chunks), released })
        }
        _ => Err(Error::new(errno::ENOENT, "view", "its states are not there any more")),
    }
}

pub(super) fn fill(words: &[AtomicU64], values: impl Iterator<Item = u64>) {
    for (word, value) in words.iter().zip(values) {
        word.store(value, Ordering::SeqCst);
    }
}
