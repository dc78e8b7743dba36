//! Rules of the house that no compiler checks: layering, where unsafe code may stand, size of files, leftovers.
//!
//! Every finding names file and line. Each rule is a function from a file's path and text to findings, so that the
//! rules themselves are tested on wrong samples below.

use std::fs;
use std::path::{Path, PathBuf};

/// Layers of the crate from the bottom up. A layer uses what stands on rows above its own, never its neighbours.
const LAYERS: [&[&str]; 8] = [
    &["units", "error", "sync"],
    &["storage"],
    &["bitmap"],
    &["image", "volume"],
    &["fleece"],
    &["backup"],
    &["fuse", "nbd", "qmp"],
    &["cli", "daemon"],
];
/// Rows whose members may use each other: the basics, and the composition root with its command line.
const FRIENDLY_ROWS: [usize; 2] = [0, 7];
/// The map formats know nothing of the core whose maps they write, nor of files.
const NARROW: [&str; 4] = ["src/backup/mod.rs", "src/backup/file.rs", "src/backup/format.rs", "src/backup/runs.rs"];
/// What they may use beside their own layer.
const NARROW_USES: [&str; 2] = ["units", "error"];
/// Longest file in lines, not counting its tests.
const MAX_LINES: usize = 600;

/// A file's findings: line (from 1) and what is wrong there.
type Findings = Vec<(usize, String)>;
type Rule = fn(&Path, &str) -> Findings;

const RULES: [(&str, Rule); 8] = [
    ("layering", layering),
    ("globs across layers", globs_across_layers),
    ("unsafe code", unsafe_places),
    ("fuser", fuser_places),
    ("head", head),
    ("size", size),
    ("leftover macros", leftover_macros),
    ("leftover words", leftover_words),
];

#[test]
fn the_tree_keeps_the_rules() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut failures = Vec::new();
    let files = files(root);
    assert!(files.iter().any(|f| f.ends_with("src/lib.rs")), "no sources below {}", root.display());
    for file in files {
        let path = file.strip_prefix(root).unwrap();
        let Ok(text) = fs::read_to_string(&file) else { continue };
        for (name, rule) in RULES {
            for (line, finding) in rule(path, &text) {
                failures.push(format!("{}:{line}: {finding} [{name}]", path.display()));
            }
        }
    }
    assert!(failures.is_empty(), "{} findings\n{}", failures.len(), failures.join("\n"));
}

#[test]
fn each_module_of_the_crate_has_a_layer() {
    let lib = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs")).unwrap();
    for line in lib.lines().filter_map(|line| line.strip_prefix("pub mod ")) {
        let name = line.trim_end_matches(';');
        assert!(row_of(name).is_some(), "src/lib.rs: module {name} is in no row of LAYERS");
    }
}

#[test]
fn each_test_that_the_table_of_tools_names_is_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let is_test = |path: &&PathBuf| path.starts_with(root.join("tests/blackbox"));
    let tests: String = files(root).iter().filter(is_test).map(|path| fs::read_to_string(path).unwrap()).collect();
    let table = fs::read_to_string(root.join("doc/tools.md")).unwrap();
    // A name in backticks; one that ends in dots is the beginning of a longer one.
    let named = table.split('`').skip(1).step_by(2).filter(|code| code.matches('_').count() > 2 || code.ends_with('…'));
    let mut count = 0;
    for name in named.filter(|code| code.chars().all(|c| c.is_ascii_alphanumeric() || "_…".contains(c))) {
        let head = match name.strip_suffix('…') {
            Some(beginning) => format!("fn {beginning}"),
            None => format!("fn {name}("),
        };
        assert!(tests.contains(&head), "doc/tools.md names no test: {name}");
        count += 1;
    }
    assert!(count > 25, "{count} names of tests in doc/tools.md");
}

/// Text files of the project, in order of their paths.
fn files(root: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut pending = vec![root.to_owned()];
    while let Some(dir) = pending.pop() {
        for entry in fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            let hidden = name.starts_with('.') && name != ".ci";
            if hidden || ["target", "corpus", "artifacts", "Cargo.lock"].contains(&name.as_str()) {
                continue;
            }
            if path.is_dir() {
                pending.push(path);
            } else {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

fn is_rust(path: &Path) -> bool {
    path.extension().is_some_and(|e| e == "rs")
}

/// The layer that a file below `src` belongs to; the crate's root files have none.
fn layer_of(path: &Path) -> Option<&str> {
    let rest = path.strip_prefix("src").ok()?;
    let name = rest.components().next()?.as_os_str().to_str()?;
    let name = name.strip_suffix(".rs").unwrap_or(name);
    (!["lib", "main"].contains(&name)).then_some(name)
}

fn row_of(layer: &str) -> Option<usize> {
    LAYERS.iter().position(|row| row.contains(&layer))
}

fn layering(path: &Path, text: &str) -> Findings {
    let (true, Some(own)) = (is_rust(path), layer_of(path)) else { return vec![] };
    let Some(own_row) = row_of(own) else { return vec![(1, format!("module {own} is in no layer"))] };
    let code = code_of(text);
    let mut found = Findings::new();
    for (at, used) in crate_paths(&code) {
        let Some(row) = row_of(&used.first) else { continue };
        let below = row < own_row || (row == own_row && FRIENDLY_ROWS.contains(&row));
        let narrow = NARROW.iter().any(|file| path == Path::new(file));
        let allowed = used.first == own || if narrow { NARROW_USES.contains(&used.first.as_str()) } else { below };
        if !allowed {
            found.push((line_of(&code, at), format!("{own} uses {}, which is not below it", used.first)));
        }
    }
    for (at, name) in super_paths(&code) {
        let child =
            |tail: &str| Path::new(env!("CARGO_MANIFEST_DIR")).join(path).with_file_name(format!("{name}{tail}"));
        if name != own && row_of(&name).is_some() && !child(".rs").exists() && !child("").is_dir() {
            found.push((line_of(&code, at), format!("layer {name} through super: say crate::{name}")));
        }
    }
    found
}

fn globs_across_layers(path: &Path, text: &str) -> Findings {
    let (true, Some(own)) = (is_rust(path), layer_of(path)) else { return vec![] };
    let code = code_of(text);
    crate_paths(&code)
        .into_iter()
        .filter(|(_, used)| used.glob && used.first != own)
        .map(|(at, used)| (line_of(&code, at), format!("everything of {} is imported: name what is used", used.first)))
        .collect()
}

fn unsafe_places(path: &Path, text: &str) -> Findings {
    if !is_rust(path) || !path.starts_with("src") || layer_of(path) == Some("storage") {
        return vec![];
    }
    words(text, &["unsafe", "libc"], |word| format!("'{word}' outside src/storage"))
}

fn fuser_places(path: &Path, text: &str) -> Findings {
    if !is_rust(path) || !path.starts_with("src") || layer_of(path) == Some("fuse") {
        return vec![];
    }
    words(text, &["fuser"], |word| format!("'{word}' outside src/fuse"))
}

fn head(path: &Path, text: &str) -> Findings {
    let wanted = is_rust(path) && !path.starts_with("fuzz");
    if !wanted || text.starts_with("//!") {
        return vec![];
    }
    vec![(1, "no `//!` head that says what the file is for".into())]
}

fn size(path: &Path, text: &str) -> Findings {
    let tests = path.starts_with("tests") || path.ends_with("tests.rs") || path.iter().any(|part| part == "tests");
    if !is_rust(path) || tests {
        return vec![];
    }
    let lines: Vec<&str> = text.lines().collect();
    let inline_tests = |index: &usize| {
        let attribute = lines[*index].starts_with("#[cfg(") && lines[*index].contains("test");
        let module = lines[index + 1..].iter().find(|line| !line.starts_with("#["));
        attribute && module.is_some_and(|line| line.starts_with("mod ") && line.ends_with('{'))
    };
    let count = (0..lines.len()).find(inline_tests).unwrap_or(lines.len());
    if count <= MAX_LINES {
        return vec![];
    }
    vec![(count, format!("{count} lines without tests, more than {MAX_LINES}"))]
}

fn leftover_macros(path: &Path, text: &str) -> Findings {
    if !is_rust(path) || !path.starts_with("src") {
        return vec![];
    }
    let prints = layer_of(path).is_none_or(|layer| layer == "cli");
    let code = code_of(text);
    let mut found = Findings::new();
    for (name, allowed) in
        [("todo", false), ("unimplemented", false), ("dbg", false), ("println", prints), ("print", prints)]
    {
        for at in word_places(&code, name) {
            if !allowed && code[at + name.len()..].starts_with('!') {
                found.push((line_of(&code, at), format!("{name}! left behind")));
            }
        }
    }
    found
}

/// Reminders, numbers of a tracker and paths of one machine mean nothing to whoever reads the product.
fn leftover_words(path: &Path, text: &str) -> Findings {
    if path.file_name().is_some_and(|name| name == "LICENSE-APACHE") {
        return vec![];
    }
    let banned = [
        concat!("TO", "DO"),
        concat!("FIX", "ME"),
        concat!("XX", "X:"),
        concat!("issue", " #"),
        concat!("/ho", "me/"),
        concat!("/ro", "ot/"),
        concat!("/wo", "rk/"),
        concat!("/tmp", "/h/"),
        concat!("../sha", "red"),
        concat!("Cla", "ude"),
        concat!("Anthro", "pic"),
        concat!("Open", "AI"),
    ];
    let mut found = Findings::new();
    for (index, line) in text.lines().enumerate() {
        for word in banned.iter().filter(|word| line.contains(**word)) {
            found.push((index + 1, format!("'{word}' does not belong in the product")));
        }
    }
    found
}

fn words(text: &str, banned: &[&str], say: impl Fn(&str) -> String) -> Findings {
    let code = code_of(text);
    let places = banned.iter().flat_map(|word| word_places(&code, word).into_iter().map(move |at| (at, *word)));
    places.map(|(at, word)| (line_of(&code, at), say(word))).collect()
}

fn line_of(text: &str, at: usize) -> usize {
    text[..at].matches('\n').count() + 1
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Where `word` stands as a word of its own.
fn word_places(code: &str, word: &str) -> Vec<usize> {
    let whole = |at: &usize| {
        !code[..*at].chars().next_back().is_some_and(is_word)
            && !code[at + word.len()..].chars().next().is_some_and(is_word)
    };
    code.match_indices(word).map(|(at, _)| at).filter(whole).collect()
}

/// A path that begins with `crate::`.
struct CratePath {
    /// The name behind `crate::`.
    first: String,
    /// It ends in `*`, by itself or in a group.
    glob: bool,
}

fn ident(text: &str) -> String {
    text.trim_start().chars().take_while(|c| is_word(*c)).collect()
}

/// Every path into the crate, one row for each member of a group `crate::{a, b::c}`.
fn crate_paths(code: &str) -> Vec<(usize, CratePath)> {
    let mut paths = Vec::new();
    for at in word_places(code, "crate") {
        let Some(rest) = code[at + "crate".len()..].strip_prefix("::") else { continue };
        let members = if rest.starts_with('{') { group_members(rest) } else { vec![path_text(rest)] };
        for member in members {
            paths.push((at, CratePath { first: ident(member), glob: member.contains('*') }));
        }
    }
    paths
}

/// The path at the start of `text`, with its group where it ends in one.
fn path_text(text: &str) -> &str {
    let mut depth = 0;
    let end = text.find(|c: char| {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        depth == 0 && !(is_word(c) || c == ':' || c == '*' || c == '}')
    });
    let path = &text[..end.unwrap_or(text.len())];
    // `crate::A * b` is a product, not a glob.
    if path.contains('{') || path.ends_with("::*") { path } else { path.trim_end_matches('*') }
}

/// The members of the group that `text` opens with, at its first level.
fn group_members(text: &str) -> Vec<&str> {
    let (mut depth, mut start, mut members) = (0, 1, Vec::new());
    for (at, c) in text.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 1 => {
                members.push(&text[start..at]);
                break;
            }
            '}' => depth -= 1,
            ',' if depth == 1 => {
                members.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    members
}

/// Names that follow a chain of `super::`.
fn super_paths(code: &str) -> Vec<(usize, String)> {
    word_places(code, "super")
        .into_iter()
        .filter_map(|at| Some((at, ident(code[at + "super".len()..].strip_prefix("::")?))))
        .collect()
}

/// The text with comments and the insides of literals blanked out; lines keep their numbers.
fn code_of(text: &str) -> String {
    let mut code = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let after_word = code.chars().next_back().is_some_and(is_word);
        let skipped = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            block_comment(rest)
        } else if c == '"' {
            string(rest)
        } else if !after_word && (c == 'r' || rest.starts_with("br")) {
            raw_string(rest)
        } else if c == '\'' {
            char_literal(rest)
        } else {
            0
        };
        let taken = if skipped == 0 { c.len_utf8() } else { skipped };
        let piece = &rest[..taken];
        if skipped == 0 {
            code.push_str(piece);
        } else {
            code.extend(piece.chars().map(|c| if c == '\n' { '\n' } else { ' ' }));
        }
        rest = &rest[taken..];
    }
    code
}

fn block_comment(text: &str) -> usize {
    let (mut depth, mut at) = (0, 0);
    while at < text.len() {
        if text[at..].starts_with("/*") {
            depth += 1;
            at += 2;
        } else if text[at..].starts_with("*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                break;
            }
        } else {
            at += text[at..].chars().next().map_or(1, char::len_utf8);
        }
    }
    at
}

fn string(text: &str) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return at + 1,
            _ => {}
        }
    }
    text.len()
}

/// Length of the raw string at the start, 0 where there is none.
fn raw_string(text: &str) -> usize {
    let body = text.trim_start_matches('b');
    let Some(body) = body.strip_prefix('r') else { return 0 };
    let hashes = body.len() - body.trim_start_matches('#').len();
    if !body[hashes..].starts_with('"') {
        return 0;
    }
    let close = format!("\"{}", "#".repeat(hashes));
    let open_len = text.len() - body.len() + hashes + 1;
    text[open_len..].find(&close).map_or(text.len(), |at| open_len + at + close.len())
}

/// Length of the character literal at the start, 0 for a lifetime.
fn char_literal(text: &str) -> usize {
    let mut chars = text.char_indices().skip(1);
    match (chars.next(), chars.next()) {
        (Some((_, '\\')), Some(_)) => chars.find(|(_, c)| *c == '\'').map_or(0, |(at, _)| at + 1),
        (Some(_), Some((at, '\''))) => at + 1,
        _ => 0,
    }
}

#[test]
fn the_rules_find_what_they_are_for() {
    let check =
        |rule: Rule, path: &str, text: &str| rule(Path::new(path), text).into_iter().map(|f| f.0).collect::<Vec<_>>();
    let ok = Vec::<usize>::new();

    assert_eq!(check(layering, "src/storage/os.rs", "\nuse crate::fleece::Disk;"), [2]);
    assert_eq!(check(layering, "src/storage/os.rs", "use crate::{\n  error::Error,\n  image::{A, B}};"), [1]);
    assert_eq!(check(layering, "src/fuse/mod.rs", "fn f() { crate::qmp::run() }"), [1]);
    assert_eq!(check(layering, "src/bitmap/mod.rs", "use crate::image::Image;"), [1]);
    assert_eq!(check(layering, "src/backup/runs.rs", "use crate::fleece::ViewMap;"), [1]);
    assert_eq!(check(layering, "src/backup/view.rs", "use crate::fleece::ViewMap;"), ok);
    assert_eq!(check(layering, "src/fleece/map.rs", "use crate::backup::Extent;"), [1]);
    assert_eq!(check(layering, "src/qmp/mod.rs", "use super::fuse::Tree;"), [1]);
    assert_eq!(check(layering, "src/units.rs", "use crate::error::Error;"), ok);
    assert_eq!(check(layering, "src/cli/mod.rs", "use crate::daemon::run; use crate::fleece::{A, B};"), ok);
    assert_eq!(
        check(layering, "src/storage/os.rs", "// crate::fleece\nlet a = \"crate::fleece\"; pub(crate) fn f() {}"),
        ok
    );

    assert_eq!(check(globs_across_layers, "src/fuse/mod.rs", "use crate::fleece::*;"), [1]);
    assert_eq!(check(globs_across_layers, "src/fuse/mod.rs", "use crate::{error::Error, fleece::{view::*}};"), [1]);
    assert_eq!(
        check(globs_across_layers, "src/fuse/mod.rs", "use crate::fuse::*; use super::*; crate::units::K * 2"),
        ok
    );

    assert_eq!(check(unsafe_places, "src/image/raw.rs", "\n\nunsafe { f() }"), [3]);
    assert_eq!(check(unsafe_places, "src/main.rs", "libc::getpid()"), [1]);
    assert_eq!(check(unsafe_places, "src/storage/os.rs", "unsafe { libc::getpid() }"), ok);
    assert_eq!(check(unsafe_places, "src/image/raw.rs", "// unsafe\n#![deny(unsafe_op_in_unsafe_fn)]"), ok);
    assert_eq!(check(fuser_places, "src/daemon.rs", "use fuser::Session;"), [1]);
    assert_eq!(check(fuser_places, "src/fuse/mod.rs", "use fuser::Session;"), ok);

    assert_eq!(check(head, "src/image/raw.rs", "use a;"), [1]);
    assert_eq!(check(head, "src/image/raw.rs", "//! Raw."), ok);

    let long = "x\n".repeat(MAX_LINES + 1);
    assert_eq!(check(size, "src/image/raw.rs", &long), [MAX_LINES + 1]);
    assert_eq!(check(size, "src/image/raw.rs", &format!("x\n#[cfg(test)]\nmod tests {{\n{long}")), ok);
    let all = "#[cfg(all(test, unix))]\n#[allow(a)]\nmod tests {\n";
    assert_eq!(check(size, "src/image/raw.rs", &format!("{all}{long}")), ok);
    assert_eq!(check(size, "src/image/raw.rs", &format!("#[cfg(test)]\nmod tests;\n{long}")), [MAX_LINES + 3]);

    assert_eq!(check(leftover_macros, "src/fleece/disk.rs", "fn f() {\n todo!() }"), [2]);
    assert_eq!(check(leftover_macros, "src/fleece/disk.rs", "println!(\"a\"); dbg!(1)").len(), 2);
    assert_eq!(check(leftover_macros, "src/cli/mod.rs", "println!(\"a\")"), ok);
    assert_eq!(check(leftover_macros, "src/fleece/disk.rs", "eprintln!(\"todo!\"); // println!"), ok);

    assert_eq!(check(leftover_words, "doc/a.md", concat!("a\nb TO", "DO c")), [2]);
    assert_eq!(check(leftover_words, "contrib/run", concat!("cd /wo", "rk/x")), [1]);
}

#[test]
fn literals_and_comments_are_blanked_and_code_is_not() {
    let code =
        code_of("let a = r#\"x\" unsafe\"#; /* a /* b */ unsafe */ f('\"', 'x', b'\\''); fn g<'a>(b: &'a str) {} // c");
    assert!(!code.contains("unsafe") && !code.contains('"') && !code.contains("// c"), "{code}");
    assert!(code.contains("fn g<'a>(b: &'a str) {}"), "{code}");
    assert_eq!(code_of("a\n\"b\nc\"\nd").lines().count(), 4);
}
