//! Strict argument checking with QEMU's texts: a member that is missing, of another type or not known is an error.
//!
//! A command takes its arguments one by one in the order of its schema and calls [`Arguments::finish`] before it acts:
//! so the first missing or mistyped one is told first, then an unknown one, as QEMU's visitors do. Members of objects
//! within objects are told with the whole way to them (`actions[0].data.node`), where QEMU does so: it leaves the way
//! out where a number or a name is of the right type and out of range.

use super::CommandError;
use serde_json::{Map, Value};

type Taken<T> = std::result::Result<T, CommandError>;

/// The arguments of one command, or the members of an object among them, taken away as they are looked at.
#[derive(Debug, Default)]
pub struct Arguments {
    members: Map<String, Value>,
    /// What stands before the names of the members in texts, with its dot; empty for the arguments themselves.
    way: String,
}

/// A list's element that is a string or an object (an alternate of QEMU's schema).
#[derive(Debug)]
pub enum Alternate {
    /// A string.
    String(String),
    /// An object, with its members to be taken.
    Object(Arguments),
}

impl Arguments {
    /// The members of the `arguments` object.
    pub fn new(members: Map<String, Value>) -> Self {
        Arguments { members, way: String::new() }
    }

    fn full(&self, name: &str) -> String {
        format!("{}{name}", self.way)
    }

    fn wrong_type(&self, name: &str, expected: &str) -> CommandError {
        CommandError::generic(format!("Invalid parameter type for '{}', expected: {expected}", self.full(name)))
    }

    fn missing(&self, name: &str) -> CommandError {
        CommandError::generic(format!("Parameter '{}' is missing", self.full(name)))
    }

    fn must<T>(&self, name: &str, value: Option<T>) -> Taken<T> {
        value.ok_or_else(|| self.missing(name))
    }

    /// Whether a member is there and was not taken yet.
    pub fn has(&self, name: &str) -> bool {
        self.members.contains_key(name)
    }

    /// A string that must be there.
    pub fn string(&mut self, name: &str) -> Taken<String> {
        let value = self.optional_string(name)?;
        self.must(name, value)
    }

    /// A string that may be there.
    pub fn optional_string(&mut self, name: &str) -> Taken<Option<String>> {
        match self.members.remove(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(self.wrong_type(name, "string")),
        }
    }

    /// A string that may be there, one of `values`.
    pub fn optional_choice(&mut self, name: &str, values: &[&str]) -> Taken<Option<String>> {
        let value = self.optional_string(name)?;
        match value.as_deref().filter(|value| !values.contains(value)) {
            None => Ok(value),
            Some(other) => Err(not_accepted(name, other)),
        }
    }

    /// A size or an offset in bytes that must be there.
    pub fn uint(&mut self, name: &str) -> Taken<u64> {
        let value = self.optional_uint(name)?;
        self.must(name, value)
    }

    /// A size or an offset in bytes that may be there.
    pub fn optional_uint(&mut self, name: &str) -> Taken<Option<u64>> {
        let Some(value) = self.members.remove(name) else { return Ok(None) };
        let number = value.as_u64();
        let text = || CommandError::generic(format!("Parameter '{}' expects uint64", self.full(name)));
        number.map(Some).ok_or_else(text)
    }

    /// A number of 32 bits that may be there.
    pub fn optional_uint32(&mut self, name: &str) -> Taken<Option<u32>> {
        // QEMU reads 64 bits first, negative ones too, and then looks at the range.
        let negative = self.members.get(name).is_some_and(|value| value.as_i64().is_some_and(|number| number < 0));
        let value = if negative { self.members.remove(name).map(|_| u64::MAX) } else { self.optional_uint(name)? };
        let text = |_| CommandError::generic(format!("Parameter '{name}' expects uint32_t"));
        value.map(|value| u32::try_from(value).map_err(text)).transpose()
    }

    /// A signed number that must be there.
    pub fn int(&mut self, name: &str) -> Taken<i64> {
        let value = self.optional_int(name)?;
        self.must(name, value)
    }

    /// A signed number that may be there.
    pub fn optional_int(&mut self, name: &str) -> Taken<Option<i64>> {
        let Some(value) = self.members.remove(name) else { return Ok(None) };
        value.as_i64().map(Some).ok_or_else(|| self.wrong_type(name, "integer"))
    }

    /// A boolean that may be there.
    pub fn optional_bool(&mut self, name: &str) -> Taken<Option<bool>> {
        match self.members.remove(name) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(value)),
            Some(_) => Err(self.wrong_type(name, "boolean")),
        }
    }

    /// A list of strings that may be there; empty where it is not.
    pub fn strings(&mut self, name: &str) -> Taken<Vec<String>> {
        if !self.has(name) {
            return Ok(Vec::new());
        }
        let list = self.list(name)?;
        let each = |(index, value)| match value {
            Value::String(text) => Ok(text),
            _ => Err(self.wrong_type(&format!("{name}[{index}]"), "string")),
        };
        list.into_iter().enumerate().map(each).collect()
    }

    fn list(&mut self, name: &str) -> Taken<Vec<Value>> {
        match self.members.remove(name) {
            None => Err(self.missing(name)),
            Some(Value::Array(list)) => Ok(list),
            Some(_) => Err(self.wrong_type(name, "array")),
        }
    }

    fn within(&self, name: &str, members: Map<String, Value>) -> Arguments {
        Arguments { members, way: format!("{}.", self.full(name)) }
    }

    /// A list of objects that must be there. `read` takes one apart with [`Arguments::finish`], before the next one.
    pub fn objects<T>(&mut self, name: &str, read: impl Fn(Arguments) -> Taken<T>) -> Taken<Vec<T>> {
        let list = self.list(name)?;
        let each = |(index, value)| {
            let name = format!("{name}[{index}]");
            match value {
                Value::Object(members) => read(self.within(&name, members)),
                _ => Err(self.wrong_type(&name, "object")),
            }
        };
        list.into_iter().enumerate().map(each).collect()
    }

    /// A list of strings and objects that must be there; `kind` is the name of that alternate in QEMU's schema.
    pub fn alternates<T>(&mut self, name: &str, kind: &str, read: impl Fn(Alternate) -> Taken<T>) -> Taken<Vec<T>> {
        let list = self.list(name)?;
        let each = |(index, value)| match value {
            Value::String(text) => read(Alternate::String(text)),
            Value::Object(members) => read(Alternate::Object(self.within(&format!("{name}[{index}]"), members))),
            // QEMU has no name for the element here.
            _ => Err(CommandError::generic(format!("Invalid parameter type for 'null', expected: {kind}"))),
        };
        list.into_iter().enumerate().map(each).collect()
    }

    /// A string or an object that must be there; `kind` as for [`Arguments::alternates`].
    pub fn alternate(&mut self, name: &str, kind: &str) -> Taken<Alternate> {
        match self.members.remove(name) {
            None => Err(self.missing(name)),
            Some(Value::String(text)) => Ok(Alternate::String(text)),
            Some(Value::Object(members)) => Ok(Alternate::Object(self.within(name, members))),
            Some(_) => Err(self.wrong_type(name, kind)),
        }
    }

    /// An object that must be there.
    pub fn object(&mut self, name: &str) -> Taken<Arguments> {
        let value = self.optional_object(name)?;
        self.must(name, value)
    }

    /// An object that may be there.
    pub fn optional_object(&mut self, name: &str) -> Taken<Option<Arguments>> {
        match self.members.remove(name) {
            None => Ok(None),
            Some(Value::Object(members)) => Ok(Some(self.within(name, members))),
            Some(_) => Err(self.wrong_type(name, "object")),
        }
    }

    /// Refuses what no command took.
    pub fn finish(self) -> Taken<()> {
        match self.members.keys().next() {
            None => Ok(()),
            Some(name) => Err(CommandError::generic(format!("Parameter '{}' is unexpected", self.full(name)))),
        }
    }
}

/// The refusal of a value that is none of an enumeration's.
pub fn not_accepted(name: &str, value: &str) -> CommandError {
    CommandError::generic(format!("Parameter '{name}' does not accept value '{value}'"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn arguments(value: Value) -> Arguments {
        Arguments::new(value.as_object().cloned().unwrap())
    }

    #[test]
    fn texts_are_qemus() {
        let mut a = arguments(json!({
            "n": 1, "s": "x", "l": ["a", 2], "m": "a", "b": 1, "u": -1, "f": 1.5, "c": "x", "i": "x", "o": 1,
            "w": 1u64 << 32, "v": -1, "t": "1",
        }));
        assert_eq!(a.string("name").unwrap_err().desc, "Parameter 'name' is missing");
        assert_eq!(a.string("n").unwrap_err().desc, "Invalid parameter type for 'n', expected: string");
        assert_eq!(a.strings("l").unwrap_err().desc, "Invalid parameter type for 'l[1]', expected: string");
        assert_eq!(a.strings("m").unwrap_err().desc, "Invalid parameter type for 'm', expected: array");
        assert_eq!(a.optional_bool("b").unwrap_err().desc, "Invalid parameter type for 'b', expected: boolean");
        assert_eq!(a.uint("u").unwrap_err().desc, "Parameter 'u' expects uint64");
        assert_eq!(a.uint("f").unwrap_err().desc, "Parameter 'f' expects uint64");
        assert_eq!(a.uint("size").unwrap_err().desc, "Parameter 'size' is missing");
        assert_eq!(a.optional_uint32("w").unwrap_err().desc, "Parameter 'w' expects uint32_t");
        assert_eq!(a.optional_uint32("v").unwrap_err().desc, "Parameter 'v' expects uint32_t");
        assert_eq!(a.optional_uint32("t").unwrap_err().desc, "Parameter 't' expects uint64");
        assert_eq!(a.optional_choice("c", &["y"]).unwrap_err().desc, "Parameter 'c' does not accept value 'x'");
        assert_eq!(a.int("i").unwrap_err().desc, "Invalid parameter type for 'i', expected: integer");
        assert_eq!(a.optional_object("o").unwrap_err().desc, "Invalid parameter type for 'o', expected: object");
        assert_eq!(a.object("p").unwrap_err().desc, "Parameter 'p' is missing");
        assert_eq!(a.finish().unwrap_err().desc, "Parameter 's' is unexpected");
    }

    #[test]
    fn what_lies_deep_is_told_with_its_way() {
        let mut a = arguments(json!({
            "actions": [{"data": {"node": 1, "granularity": "1", "zoo": 1, "bitmaps": ["x", {"name": 1}, 1]}}, 1],
            "mixed": ["x", 1],
        }));
        let read = |mut action: Arguments| {
            let mut data = action.object("data")?;
            let node = data.string("node").unwrap_err();
            assert_eq!(node.desc, "Invalid parameter type for 'actions[0].data.node', expected: string");
            let granularity = data.optional_uint32("granularity").unwrap_err();
            assert_eq!(granularity.desc, "Parameter 'actions[0].data.granularity' expects uint64");
            let bitmaps = data.alternates("bitmaps", "Kind", |bitmap| match bitmap {
                Alternate::String(text) => Ok(text),
                Alternate::Object(mut members) => members.string("name"),
            });
            let text = "Invalid parameter type for 'actions[0].data.bitmaps[1].name', expected: string";
            assert_eq!(bitmaps.unwrap_err().desc, text);
            assert_eq!(data.finish().unwrap_err().desc, "Parameter 'actions[0].data.zoo' is unexpected");
            action.finish()
        };
        let actions = a.objects("actions", read).unwrap_err();
        assert_eq!(actions.desc, "Invalid parameter type for 'actions[1]', expected: object");
        let mixed = a.alternates("mixed", "Kind", |_| Ok(())).unwrap_err();
        assert_eq!(mixed.desc, "Invalid parameter type for 'null', expected: Kind");
        assert_eq!(a.alternate("file", "Kind").unwrap_err().desc, "Parameter 'file' is missing");
        a.finish().unwrap();
    }

    #[test]
    fn what_is_right_is_taken() {
        let mut a = arguments(json!({"s": "x", "l": ["a", "b"], "b": false, "u": u64::MAX, "w": u32::MAX, "i": -1}));
        assert_eq!(a.string("s").unwrap(), "x");
        assert_eq!(a.optional_string("t").unwrap(), None);
        assert_eq!(a.strings("l").unwrap(), ["a", "b"]);
        assert_eq!(a.strings("k").unwrap(), Vec::<String>::new());
        assert_eq!(a.optional_bool("b").unwrap(), Some(false));
        assert_eq!(a.uint("u").unwrap(), u64::MAX);
        assert_eq!(a.optional_uint32("w").unwrap(), Some(u32::MAX));
        assert_eq!(a.int("i").unwrap(), -1);
        a.finish().unwrap();
    }
}
