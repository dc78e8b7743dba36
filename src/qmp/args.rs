//! Strict argument checking with QEMU's texts: a member that is missing, of another type or not known is an error.
//!
//! A command takes its arguments one by one in the order of its schema and calls [`Arguments::finish`] before it acts:
//! so the first missing or mistyped one is told first, then an unknown one, as QEMU's visitors do.

use super::CommandError;
use serde_json::{Map, Value};

type Taken<T> = std::result::Result<T, CommandError>;

/// The arguments of one command, taken away as they are looked at.
#[derive(Debug, Default)]
pub struct Arguments {
    members: Map<String, Value>,
}

fn wrong_type(name: &str, expected: &str) -> CommandError {
    CommandError::generic(format!("Invalid parameter type for '{name}', expected: {expected}"))
}

fn missing(name: &str) -> CommandError {
    CommandError::generic(format!("Parameter '{name}' is missing"))
}

impl Arguments {
    /// The members of the `arguments` object.
    pub fn new(members: Map<String, Value>) -> Self {
        Arguments { members }
    }

    /// A string that must be there.
    pub fn string(&mut self, name: &str) -> Taken<String> {
        self.optional_string(name)?.ok_or_else(|| missing(name))
    }

    /// A string that may be there.
    pub fn optional_string(&mut self, name: &str) -> Taken<Option<String>> {
        match self.members.remove(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(wrong_type(name, "string")),
        }
    }

    /// A size or an offset in bytes that must be there.
    pub fn uint(&mut self, name: &str) -> Taken<u64> {
        self.optional_uint(name)?.ok_or_else(|| missing(name))
    }

    /// A size or an offset in bytes that may be there.
    pub fn optional_uint(&mut self, name: &str) -> Taken<Option<u64>> {
        let number = |value: Value| {
            value.as_u64().ok_or_else(|| CommandError::generic(format!("Parameter '{name}' expects uint64")))
        };
        self.members.remove(name).map(number).transpose()
    }

    /// A boolean that may be there.
    pub fn optional_bool(&mut self, name: &str) -> Taken<Option<bool>> {
        match self.members.remove(name) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(value)),
            Some(_) => Err(wrong_type(name, "boolean")),
        }
    }

    /// A list of strings that may be there; empty where it is not.
    pub fn strings(&mut self, name: &str) -> Taken<Vec<String>> {
        let list = match self.members.remove(name) {
            None => return Ok(Vec::new()),
            Some(Value::Array(list)) => list,
            Some(_) => return Err(wrong_type(name, "array")),
        };
        let each = |(index, value)| match value {
            Value::String(text) => Ok(text),
            _ => Err(wrong_type(&format!("{name}[{index}]"), "string")),
        };
        list.into_iter().enumerate().map(each).collect()
    }

    /// Refuses what no command took.
    pub fn finish(self) -> Taken<()> {
        match self.members.keys().next() {
            None => Ok(()),
            Some(name) => Err(CommandError::generic(format!("Parameter '{name}' is unexpected"))),
        }
    }
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
        let mut a = arguments(json!({"n": 1, "s": "x", "l": ["a", 2], "m": "a", "b": 1, "u": -1, "f": 1.5}));
        assert_eq!(a.string("name").unwrap_err().desc, "Parameter 'name' is missing");
        assert_eq!(a.string("n").unwrap_err().desc, "Invalid parameter type for 'n', expected: string");
        assert_eq!(a.strings("l").unwrap_err().desc, "Invalid parameter type for 'l[1]', expected: string");
        assert_eq!(a.strings("m").unwrap_err().desc, "Invalid parameter type for 'm', expected: array");
        assert_eq!(a.optional_bool("b").unwrap_err().desc, "Invalid parameter type for 'b', expected: boolean");
        assert_eq!(a.uint("u").unwrap_err().desc, "Parameter 'u' expects uint64");
        assert_eq!(a.uint("f").unwrap_err().desc, "Parameter 'f' expects uint64");
        assert_eq!(a.uint("size").unwrap_err().desc, "Parameter 'size' is missing");
        assert_eq!(a.finish().unwrap_err().desc, "Parameter 's' is unexpected");
    }

    #[test]
    fn what_is_right_is_taken() {
        let mut a = arguments(json!({"s": "x", "l": ["a", "b"], "b": false, "u": u64::MAX}));
        assert_eq!(a.string("s").unwrap(), "x");
        assert_eq!(a.optional_string("t").unwrap(), None);
        assert_eq!(a.strings("l").unwrap(), ["a", "b"]);
        assert_eq!(a.strings("k").unwrap(), Vec::<String>::new());
        assert_eq!(a.optional_bool("b").unwrap(), Some(false));
        assert_eq!(a.uint("u").unwrap(), u64::MAX);
        a.finish().unwrap();
    }
}
