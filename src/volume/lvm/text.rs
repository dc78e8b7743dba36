//! The text in which LVM2 keeps its metadata: sections of names with numbers, strings, lists and sections.
//!
//! The text is as long as its area in the disk lets it be; what is made of it is bounded by its length, by
//! [`VALUES_MAX`] and by [`DEPTH_MAX`].

use std::borrow::Cow;

/// How deep sections may lie in one another: group, kind, volume, segment, and some to spare.
const DEPTH_MAX: usize = 8;
/// Most values in a text, 64 MiB in memory; ten thousand logical volumes take 300,000.
const VALUES_MAX: usize = 1 << 20;

/// What stands behind a name.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value<'a> {
    Number(u64),
    Text(Cow<'a, str>),
    List(Vec<Value<'a>>),
    Section(Section<'a>),
    /// A number that nobody here needs: negative, or with a point.
    Other,
}

/// Names and values, in their order.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Section<'a> {
    pub entries: Vec<(&'a str, Value<'a>)>,
}

impl<'a> Section<'a> {
    pub fn get(&self, name: &str) -> Option<&Value<'a>> {
        self.entries.iter().find(|(own, _)| *own == name).map(|(_, value)| value)
    }

    pub fn number(&self, name: &str) -> Option<u64> {
        match self.get(name) {
            Some(Value::Number(number)) => Some(*number),
            _ => None,
        }
    }

    pub fn text(&self, name: &str) -> Option<&str> {
        match self.get(name) {
            Some(Value::Text(text)) => Some(text),
            _ => None,
        }
    }

    pub fn list(&self, name: &str) -> &[Value<'a>] {
        match self.get(name) {
            Some(Value::List(list)) => list,
            _ => &[],
        }
    }

    /// Whether a list of this name has the text.
    pub fn lists(&self, name: &str, wanted: &str) -> bool {
        self.list(name).iter().any(|value| matches!(value, Value::Text(text) if text == wanted))
    }

    /// The sections inside of the section of this name.
    pub fn sections_of(&self, name: &str) -> impl Iterator<Item = (&'a str, &Section<'a>)> {
        let entries = match self.get(name) {
            Some(Value::Section(section)) => section.entries.as_slice(),
            _ => &[],
        };
        entries.iter().filter_map(|(name, value)| match value {
            Value::Section(section) => Some((*name, section)),
            _ => None,
        })
    }
}

/// Parses a text up to its end or its first NUL. The error says what is wrong, and at which byte.
pub(super) fn parse(text: &str) -> Result<Section<'_>, String> {
    let end = text.find('\0').unwrap_or(text.len());
    let mut parser = Parser { text: text.get(..end).unwrap_or_default(), at: 0, values: 0 };
    let section = parser.section(0)?;
    match parser.peek() {
        None => Ok(section),
        Some(_) => Err(parser.bad("a '}' too many")),
    }
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
    values: usize,
}

impl<'a> Parser<'a> {
    fn bad(&self, why: &str) -> String {
        format!("{why} at byte {}", self.at)
    }

    fn rest(&self) -> &'a str {
        self.text.get(self.at..).unwrap_or_default()
    }

    /// The first character behind blanks and comments.
    fn peek(&mut self) -> Option<char> {
        loop {
            let rest = self.rest();
            let skipped = rest.len() - rest.trim_start().len();
            self.at += skipped;
            let first = self.rest().chars().next()?;
            if first != '#' {
                return Some(first);
            }
            self.at += self.rest().find('\n').unwrap_or(self.rest().len());
        }
    }

    fn take(&mut self, wanted: char) -> bool {
        let is_there = self.peek() == Some(wanted);
        if is_there {
            self.at += wanted.len_utf8();
        }
        is_there
    }

    fn count(&mut self) -> Result<(), String> {
        self.values += 1;
        if self.values > VALUES_MAX { Err(self.bad("too many values")) } else { Ok(()) }
    }

    /// A name or number: everything up to what separates.
    fn word(&mut self) -> Result<&'a str, String> {
        self.peek();
        let rest = self.rest();
        let separates = |c: char| c.is_whitespace() || "={}[],#\"".contains(c);
        let word = rest.get(..rest.find(separates).unwrap_or(rest.len())).unwrap_or_default();
        if word.is_empty() {
            return Err(self.bad("a name or number is missing"));
        }
        self.at += word.len();
        Ok(word)
    }

    /// Entries up to the end of the text or a '}', which is left.
    fn section(&mut self, depth: usize) -> Result<Section<'a>, String> {
        if depth > DEPTH_MAX {
            return Err(self.bad("sections too deep"));
        }
        let mut section = Section::default();
        while self.peek().is_some_and(|c| c != '}') {
            let name = self.word()?;
            let value = if self.take('=') {
                self.value()?
            } else if self.take('{') {
                let inner = self.section(depth + 1)?;
                if !self.take('}') {
                    return Err(self.bad("a '}' is missing"));
                }
                Value::Section(inner)
            } else {
                return Err(self.bad("'=' or '{' is missing"));
            };
            self.count()?;
            section.entries.push((name, value));
        }
        Ok(section)
    }

    fn value(&mut self) -> Result<Value<'a>, String> {
        if !self.take('[') {
            return self.scalar();
        }
        let mut list = Vec::new();
        loop {
            if self.take(']') {
                return Ok(Value::List(list));
            }
            list.push(self.scalar()?);
            self.count()?;
            if !self.take(',') && self.peek() != Some(']') {
                return Err(self.bad("',' or ']' is missing"));
            }
        }
    }

    fn scalar(&mut self) -> Result<Value<'a>, String> {
        if self.take('"') {
            return self.string();
        }
        let word = self.word()?;
        match word.parse() {
            Ok(number) => Ok(Value::Number(number)),
            Err(_) if word.parse::<f64>().is_ok() => Ok(Value::Other),
            Err(_) => Err(self.bad("neither a number nor a string")),
        }
    }

    /// The rest of a string behind its first quote.
    fn string(&mut self) -> Result<Value<'a>, String> {
        let rest = self.rest();
        let mut escaped = false;
        for (end, c) in rest.char_indices() {
            match c {
                _ if escaped => escaped = false,
                '\\' => escaped = true,
                '"' => {
                    self.at += end + 1;
                    return Ok(Value::Text(unescape(rest.get(..end).unwrap_or_default())));
                }
                _ => {}
            }
        }
        Err(self.bad("a '\"' is missing"))
    }
}

fn unescape(text: &str) -> Cow<'_, str> {
    if !text.contains('\\') {
        return Cow::Borrowed(text);
    }
    let mut escaped = false;
    let mut plain = String::with_capacity(text.len());
    for c in text.chars() {
        escaped = c == '\\' && !escaped;
        if !escaped {
            plain.push(c);
        }
    }
    Cow::Owned(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lvm_writes_is_understood() {
        let text = "# a comment\nvg-0 {\n\tid = \"abc\"\n\tseqno = 3\n\tflags = []\n\tstatus = [\"READ\", \"WRITE\"]\t# behind\n\
                    pvs { a { n=18446744073709551615 } b{} }\n}\ndescription = \"say \\\"hi\\\" \\\\ {\"\nx = -1\ny = 1.5\n\0 junk {";
        let all = parse(text).unwrap();
        let Some(Value::Section(group)) = all.get("vg-0") else { panic!("{all:?}") };
        assert_eq!((group.text("id"), group.number("seqno")), (Some("abc"), Some(3)));
        assert!(group.lists("status", "WRITE") && !group.lists("status", "VISIBLE") && group.list("flags").is_empty());
        let pvs: Vec<_> = group.sections_of("pvs").map(|(name, pv)| (name, pv.number("n"))).collect();
        assert_eq!(pvs, [("a", Some(u64::MAX)), ("b", None)]);
        assert_eq!(all.text("description"), Some("say \"hi\" \\ {"));
        assert_eq!((all.get("x"), all.get("y")), (Some(&Value::Other), Some(&Value::Other)));
    }

    #[test]
    fn what_is_damaged_is_refused_and_never_recursed_into() {
        for text in
            ["a", "a {", "a }", "}", "a = ", "a = [1", "a = [1 2]", "a = \"x", "= 1", "a = b", "a = [[1]]", "{}"]
        {
            assert!(parse(text).is_err(), "{text}");
        }
        let bomb = "a{".repeat(1 << 20);
        assert!(parse(&bomb).unwrap_err().starts_with("sections too deep"));
        let many = "a=1 ".repeat(VALUES_MAX + 1);
        assert!(parse(&many).unwrap_err().starts_with("too many values"));
        assert!(parse(&format!("a = [{}]", "1,".repeat(VALUES_MAX))).is_err());
    }
}
