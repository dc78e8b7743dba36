//! Mutations that know where the fields of an input are: numbers at the edges of what is allowed, in place of others.

use super::Target;
use super::input::{Input, OPS_MAX, Op};

/// Offset and length in bytes of each field of the header.
const FIELDS: &[(usize, usize)] = &[
    (4, 4),
    (8, 8),
    (16, 4),
    (20, 4),
    (24, 8),
    (32, 4),
    (36, 4),
    (40, 8),
    (48, 8),
    (56, 4),
    (60, 4),
    (64, 8),
    (72, 8),
    (80, 8),
    (88, 8),
    (96, 4),
    (100, 4),
    (104, 4),
    (112, 4),
    (116, 4),
    (120, 4),
    (128, 8),
    (136, 8),
];

/// Numbers without a state of their own (splitmix64).
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// Each seed gives its own row of numbers.
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    /// A number below `count`, 0 where that is 0.
    pub fn below(&mut self, count: usize) -> usize {
        (self.next() % (count.max(1) as u64)) as usize
    }

    fn one_in(&mut self, count: usize) -> bool {
        self.below(count) == 0
    }
}

/// A number at some edge, near `old`, or with other flags.
fn interesting(random: &mut Random, old: u64) -> u64 {
    let bit = 1u64 << random.below(64);
    match random.below(10) {
        0 => random.below(4) as u64,
        1 => u64::MAX - random.below(3) as u64,
        2 => bit,
        3 => bit.wrapping_sub(1),
        4 => old ^ bit,
        5 => old.wrapping_add([1, 8, 512, 4096, 16384, 65536, 2 << 20][random.below(7)]),
        6 => old.wrapping_sub([1, 8, 512, 4096, 16384, 65536, 2 << 20][random.below(7)]),
        7 => old ^ [1 << 63, 1 << 62, 1, 3 << 62][random.below(4)],
        8 => (random.below(64) as u64) << (9 + random.below(8)),
        _ => random.next(),
    }
}

/// Puts an interesting number in place of the `len` bytes at `at`; nothing past the end.
fn change_number(random: &mut Random, bytes: &mut [u8], at: usize, len: usize) {
    if let Some(field) = bytes.get_mut(at..at + len) {
        let old = field.iter().fold(0, |value, byte| value << 8 | u64::from(*byte));
        field.copy_from_slice(&interesting(random, old).to_be_bytes()[8 - len..]);
    }
}

/// Changes bytes that have no form: numbers at places that are multiples of their length behind `start`.
fn change_bytes(random: &mut Random, bytes: &mut Vec<u8>, start: usize) {
    let body = bytes.len().saturating_sub(start);
    match random.below(8) {
        0 => {
            let at = random.below(bytes.len());
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= 1 << random.below(8);
            }
        }
        1 if body > 0 => bytes.truncate(start + random.below(body)),
        2 if body > 0 => {
            let from = start + random.below(body);
            let piece = bytes[from..].iter().take(1 + random.below(64)).copied().collect::<Vec<_>>();
            let to = start + random.below(body);
            bytes.splice(to..to, piece);
        }
        3 => bytes.extend((0..8).map(|_| 0)),
        _ => {
            let len = [1, 2, 4, 8, 8][random.below(5)];
            let at = start + random.below(body / len) * len;
            change_number(random, bytes, at, len);
        }
    }
}

fn change_image(random: &mut Random, input: &mut Input) {
    let run = random.below(input.runs.len());
    match random.below(12) {
        0 => {
            let near = input.file_bytes;
            input.file_bytes = interesting(random, near) % (super::input::FILE_MAX_BYTES + 1);
        }
        1 | 2 => {
            let op = Op {
                kind: random.next() as u8,
                len: random.below(256) as u8,
                fill: random.next() as u8,
                shift: if random.one_in(2) { 0 } else { random.next() as u8 },
                place: random.next() as u32 >> random.below(32),
            };
            let at = random.below(input.ops.len() + 1);
            if input.ops.len() < OPS_MAX {
                input.ops.insert(at, op);
            } else if let Some(old) = input.ops.get_mut(at) {
                *old = op;
            }
        }
        3 if !input.ops.is_empty() => {
            let at = random.below(input.ops.len());
            input.ops.remove(at);
        }
        4 if input.runs.len() > 1 => {
            input.runs.remove(run);
        }
        5 => {
            let (offset, data) = input.runs.get(run).cloned().unwrap_or_default();
            let data = data.into_iter().take(1 + random.below(64)).collect();
            let offset = if random.one_in(2) { interesting(random, offset.into()) } else { random.next() };
            input.runs.push(((offset % input.file_bytes.max(1)) as u32, data));
        }
        6 | 7 => {
            let (at, len) = FIELDS[random.below(FIELDS.len())];
            if let Some((_, data)) = input.runs.iter_mut().find(|(offset, _)| *offset == 0) {
                change_number(random, data, at, len);
            }
        }
        8 if !input.runs.is_empty() => {
            let other = random.below(input.runs.len());
            let from = input.runs[other].1.clone();
            let words: Vec<_> = from.chunks_exact(8).collect();
            let data = &mut input.runs[run].1;
            let at = random.below(data.len() / 8) * 8;
            if let (Some(word), Some(slot)) = (words.get(random.below(words.len())), data.get_mut(at..at + 8)) {
                slot.copy_from_slice(word);
            }
        }
        _ => {
            if let Some((_, data)) = input.runs.get_mut(run) {
                change_bytes(random, data, 0);
            }
        }
    }
}

/// Puts an interesting number, low byte first, somewhere in a run; or another digit into a text.
fn change_little(random: &mut Random, input: &mut Input) {
    let run = random.below(input.runs.len());
    let Some((_, data)) = input.runs.get_mut(run) else { return };
    let len = [1, 2, 4, 8][random.below(4)];
    let at = random.below(data.len() / len) * len;
    let is_text = data.get(at).is_some_and(|byte| byte.is_ascii_digit());
    let Some(field) = data.get_mut(at..at + len) else { return };
    if is_text && random.below(4) > 0 {
        field[0] = b"0123456789[]{}\"/-#"[random.below(18)];
        return;
    }
    let old = field.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte));
    field.copy_from_slice(&interesting(random, old).to_le_bytes()[..len]);
}

/// A mutation of `input` for `target`, the same for the same seed.
pub fn mutate(target: Target, input: &[u8], seed: u64) -> Vec<u8> {
    let random = &mut Random::new(seed);
    let mut bytes = input.to_vec();
    for _ in 0..=random.below(4) {
        match target {
            Target::Header if random.one_in(3) => change_bytes(random, &mut bytes, 0),
            Target::Header => {
                let (at, len) = FIELDS[random.below(FIELDS.len())];
                change_number(random, &mut bytes, at + 8, len);
            }
            Target::Tables => change_bytes(random, &mut bytes, 2),
            Target::Nbd => change_bytes(random, &mut bytes, 1),
            Target::Image => {
                let mut image = Input::decode(&bytes);
                change_image(random, &mut image);
                bytes = image.encode();
            }
            Target::Volumes => {
                let mut image = Input::decode(&bytes);
                if random.one_in(4) {
                    change_image(random, &mut image);
                } else {
                    change_little(random, &mut image);
                }
                bytes = image.encode();
            }
        }
    }
    bytes
}

/// A new input of parts of two others.
pub fn splice(target: Target, one: &[u8], other: &[u8], seed: u64) -> Vec<u8> {
    let random = &mut Random::new(seed);
    if matches!(target, Target::Image | Target::Volumes) {
        let (mut first, second) = (Input::decode(one), Input::decode(other));
        first.runs.extend(second.runs.into_iter().filter(|_| random.one_in(3)));
        first.ops.extend(second.ops);
        first.ops.truncate(OPS_MAX);
        return first.encode();
    }
    let at = random.below(one.len());
    one[..at].iter().chain(other.iter().skip(at)).copied().collect()
}
