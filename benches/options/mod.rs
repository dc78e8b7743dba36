//! Options of a benchmark's command line.

/// Gives each `--NAME VALUE` to `set`, which panics at one that it does not know.
pub fn each(mut set: impl FnMut(&str, String)) {
    let mut args = std::env::args().skip(1).filter(|arg| arg != "--bench");
    while let Some(option) = args.next() {
        let value = args.next().unwrap_or_else(|| panic!("{option} needs a value"));
        set(&option, value);
    }
}
