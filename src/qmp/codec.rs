//! Bytes to JSON values, as they come: several in one packet, one in several, with or without newlines between.
//!
//! Pure: bytes go in with [`Decoder::push`], values come out of [`Decoder::next`]. Framing is lexical (strings and
//! brackets only); what was framed goes through `serde_json` as a whole. Bounds: [`MAX_COMMAND_BYTES`] and
//! [`MAX_NESTING`]; passing one ends the connection, since nobody can tell where such a client's next command begins.
//! Any other error is followed by a fresh start: at the next newline, at a byte 0xFF (QMP's way to get in step again),
//! or right behind the value that was framed but did not parse.

use serde_json::Value;

/// Longest command in bytes.
pub const MAX_COMMAND_BYTES: usize = 1 << 20;
/// Deepest nesting of arrays and objects (`serde_json` ends at 128).
pub const MAX_NESTING: usize = 100;

/// Input that is no JSON value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DecodeError {
    /// QMP's `desc`.
    pub text: String,
    /// The stream cannot be read on.
    pub fatal: bool,
}

impl DecodeError {
    fn parse(why: &str) -> Self {
        DecodeError { text: format!("JSON parse error, {why}"), fatal: false }
    }

    fn limit(why: &str) -> Self {
        DecodeError { text: why.into(), fatal: true }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Between values.
    Idle,
    /// In an array or object, outside its strings.
    Nested,
    /// In a string; `escaped` after a backslash.
    String { escaped: bool },
    /// In a number, a keyword or garbage at top level, up to white space or a bracket.
    Scalar,
    /// After an error, up to a newline.
    Skip,
    /// After a fatal error.
    Dead,
}

/// Streaming decoder of one connection.
#[derive(Debug)]
pub struct Decoder {
    state: State,
    depth: usize,
    /// What is open, innermost in bit 0: set for an object, clear for an array.
    open: u128,
    /// The value being framed.
    value: Vec<u8>,
    /// Bytes not looked at yet, from `at` on.
    input: Vec<u8>,
    at: usize,
}

impl Default for Decoder {
    fn default() -> Self {
        Decoder { state: State::Idle, depth: 0, open: 0, value: Vec::new(), input: Vec::new(), at: 0 }
    }
}

impl Decoder {
    /// Adds bytes as they were received. Take everything with [`Decoder::next`] before the next call: what was pushed
    /// is held until then.
    pub fn push(&mut self, bytes: &[u8]) {
        self.input.drain(..self.at.min(self.input.len()));
        self.at = 0;
        self.input.extend_from_slice(bytes);
    }

    /// The next value or error; `None` where more bytes are needed.
    #[allow(clippy::should_implement_trait)]
    pub fn next(&mut self) -> Option<Result<Value, DecodeError>> {
        while let Some(&byte) = self.input.get(self.at) {
            if self.state == State::Dead {
                return None;
            }
            // A scalar ends before a byte that belongs to what follows.
            if self.state == State::Scalar && ends_scalar(byte) {
                return Some(self.finish());
            }
            self.at += 1;
            match self.step(byte) {
                Ok(false) => {}
                Ok(true) => return Some(self.finish()),
                Err(e) => {
                    self.reset(if e.fatal {
                        State::Dead
                    } else if byte == b'\n' || byte == 0xff {
                        State::Idle
                    } else {
                        State::Skip
                    });
                    return Some(Err(e));
                }
            }
        }
        None
    }

    /// True where the bytes so far end inside a value.
    pub fn is_inside(&self) -> bool {
        !matches!(self.state, State::Idle | State::Skip | State::Dead)
    }

    /// Takes one byte; true where it completed a value.
    fn step(&mut self, byte: u8) -> Result<bool, DecodeError> {
        if byte == 0xff {
            let inside = self.is_inside();
            self.reset(State::Idle);
            return if inside { Err(DecodeError::parse("unexpected end of value")) } else { Ok(false) };
        }
        match self.state {
            State::Idle if byte.is_ascii_whitespace() => return Ok(false),
            State::Idle => self.begin(byte)?,
            State::Nested => self.nested(byte)?,
            State::String { escaped: true } => self.state = State::String { escaped: false },
            State::String { escaped: false } => self.string(byte)?,
            State::Scalar => {}
            State::Skip => {
                if byte == b'\n' {
                    self.state = State::Idle;
                }
                return Ok(false);
            }
            State::Dead => return Ok(false),
        }
        if self.value.len() >= MAX_COMMAND_BYTES {
            return Err(DecodeError::limit("JSON token size limit exceeded"));
        }
        self.value.push(byte);
        Ok(self.state == State::Idle)
    }

    fn begin(&mut self, byte: u8) -> Result<(), DecodeError> {
        self.state = match byte {
            b'{' | b'[' => {
                self.depth = 1;
                self.open = u128::from(byte == b'{');
                State::Nested
            }
            b'"' => State::String { escaped: false },
            b'}' | b']' | b',' | b':' => return Err(DecodeError::parse("expecting value")),
            _ => State::Scalar,
        };
        Ok(())
    }

    fn nested(&mut self, byte: u8) -> Result<(), DecodeError> {
        match byte {
            b'"' => self.state = State::String { escaped: false },
            b'{' | b'[' if self.depth >= MAX_NESTING => {
                return Err(DecodeError::limit("JSON nesting depth limit exceeded"));
            }
            b'{' | b'[' => {
                self.depth += 1;
                self.open = self.open << 1 | u128::from(byte == b'{');
            }
            b'}' | b']' if (self.open & 1 == 1) != (byte == b'}') => {
                return Err(DecodeError::parse("bracket closed by one of the other kind"));
            }
            b'}' | b']' => {
                self.depth -= 1;
                self.open >>= 1;
                if self.depth == 0 {
                    self.state = State::Idle;
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn string(&mut self, byte: u8) -> Result<(), DecodeError> {
        match byte {
            b'\\' => self.state = State::String { escaped: true },
            b'"' => self.state = if self.depth == 0 { State::Idle } else { State::Nested },
            0..0x20 => return Err(DecodeError::parse("control character in string")),
            _ => {}
        }
        Ok(())
    }

    /// Parses what was framed.
    fn finish(&mut self) -> Result<Value, DecodeError> {
        let parsed = serde_json::from_slice(&self.value).map_err(|e| DecodeError::parse(&e.to_string()));
        self.reset(State::Idle);
        parsed
    }

    fn reset(&mut self, state: State) {
        self.state = state;
        self.depth = 0;
        self.value = Vec::new();
    }
}

fn ends_scalar(byte: u8) -> bool {
    byte.is_ascii_whitespace() || matches!(byte, b'{' | b'[' | b'"' | b'}' | b']' | b',' | b':' | 0xff)
}

/// A message as it goes out: QEMU ends each with CR LF.
pub fn encode(message: &Value) -> Vec<u8> {
    let mut bytes = message.to_string().into_bytes();
    bytes.extend_from_slice(b"\r\n");
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn all(bytes: &[u8], piece: usize) -> Vec<Result<Value, DecodeError>> {
        let mut decoder = Decoder::default();
        let mut out = Vec::new();
        for chunk in bytes.chunks(piece.max(1)) {
            decoder.push(chunk);
            while let Some(item) = decoder.next() {
                out.push(item);
            }
        }
        out
    }

    #[test]
    fn values_come_out_without_newlines_and_in_pieces() {
        let text = br#"{"a":"}{\"["}{"b":[1,{}]} {"c":null}"#;
        for piece in 1..text.len() {
            let values: Vec<_> = all(text, piece).into_iter().map(Result::unwrap).collect();
            assert_eq!(values, [json!({"a": "}{\"["}), json!({"b": [1, {}]}), json!({"c": null})], "pieces of {piece}");
        }
    }

    #[test]
    fn scalars_are_values_too() {
        let values: Vec<_> = all(b"42 true\"x y\"[1]\n", 3).into_iter().map(Result::unwrap).collect();
        assert_eq!(values, [json!(42), json!(true), json!("x y"), json!([1])]);
    }

    #[test]
    fn an_error_is_told_once_and_the_next_line_is_read() {
        for bad in ["} } }", "{\"a\":}", "foo", "{\"a\n", "{\"a\": [}", "{\"\u{1}\"} {}", "{]"] {
            let out = all(format!("{bad}\n{{\"ok\":1}}\n").as_bytes(), 5);
            let (last, errors) = out.split_last().unwrap();
            assert_eq!(last, &Ok(json!({"ok": 1})), "{bad}");
            assert!(!errors.is_empty() && errors.iter().all(|e| e.as_ref().is_err_and(|e| !e.fatal)), "{bad}: {out:?}");
            assert_eq!(errors.len(), 1, "{bad}");
        }
    }

    #[test]
    fn byte_ff_brings_both_sides_in_step() {
        let out = all(b"{\"a\": \"half\xff{\"ok\":1}", 4);
        assert!(out[0].is_err());
        assert_eq!(out[1], Ok(json!({"ok": 1})));
        assert_eq!(all(b"\xff\xff{\"ok\":1}", 1), [Ok(json!({"ok": 1}))]);
    }

    #[test]
    fn limits_are_fatal_and_hold_no_memory() {
        let mut deep = vec![b'['; MAX_NESTING];
        deep.extend(vec![b']'; MAX_NESTING]);
        assert!(all(&deep, 7)[0].is_ok());
        let mut decoder = Decoder::default();
        decoder.push(&[b'['; MAX_NESTING + 1]);
        assert!(decoder.next().unwrap().unwrap_err().fatal);
        decoder.push(b"{\"execute\":\"quit\"}");
        assert_eq!(decoder.next(), None);

        let mut long = b"{\"a\":\"".to_vec();
        long.resize(MAX_COMMAND_BYTES - 2, b'x');
        long.extend(b"\"}");
        assert!(all(&long, 65536)[0].is_ok());
        long.insert(6, b'x');
        let out = all(&long, 65536);
        assert!(out[0].as_ref().unwrap_err().fatal);
        assert_eq!(out.len(), 1);
    }

    fn value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            ".*".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 32, 5, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
                prop::collection::btree_map(".*", inner, 0..5).prop_map(|m| m.into_iter().collect()),
            ]
        })
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(values in prop::collection::vec(value(), 1..5), piece in 1usize..50) {
            let bytes: Vec<u8> = values.iter().flat_map(encode).collect();
            let decoded: Result<Vec<_>, _> = all(&bytes, piece).into_iter().collect();
            prop_assert_eq!(decoded.unwrap(), values);
        }

        #[test]
        fn pieces_make_no_difference_and_a_newline_mends(bytes in prop::collection::vec(any::<u8>(), 0..200), piece in 1usize..20) {
            // The tail closes whatever the bytes left open: string, nesting, scalar.
            let mut bytes = bytes;
            bytes.extend(b"\xff\n{\"ok\":1}");
            let out = all(&bytes, piece);
            prop_assert_eq!(&out, &all(&bytes, usize::MAX));
            prop_assert_eq!(out.last(), Some(&Ok(json!({"ok": 1}))));
        }
    }
}
