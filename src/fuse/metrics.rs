//! The core's counters as Prometheus text.

use crate::fleece::Counter;
use std::fmt::Write;

/// The exposition format, version 0.0.4. What only grows is a counter and ends in `_total`; a figure whose help says
/// 'now' is a gauge.
pub fn prometheus(counters: &[Counter]) -> String {
    let mut text = String::new();
    for counter in counters {
        let gauge = counter.help.split(|c: char| !c.is_alphanumeric()).any(|word| word == "now");
        let (suffix, kind) = if gauge { ("", "gauge") } else { ("_total", "counter") };
        let name = format!("fleecefs_{}{suffix}", counter.name);
        let help = counter.help.replace('\\', r"\\").replace('\n', r"\n");
        // Writing to a String cannot fail.
        let _ = write!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {}\n", counter.value);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_end_in_total_and_gauges_do_not() {
        let counters = [
            Counter { name: "guest_writes", help: "Writes known by the guest", value: 3 },
            Counter { name: "store_bytes", help: "Bytes in stores now\nand \\", value: 4096 },
        ];
        assert_eq!(
            prometheus(&counters),
            "# HELP fleecefs_guest_writes_total Writes known by the guest\n\
             # TYPE fleecefs_guest_writes_total counter\n\
             fleecefs_guest_writes_total 3\n\
             # HELP fleecefs_store_bytes Bytes in stores now\\nand \\\\\n\
             # TYPE fleecefs_store_bytes gauge\n\
             fleecefs_store_bytes 4096\n"
        );
    }
}
