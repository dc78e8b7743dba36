//! What is packaged beside the program: man pages, completions, the systemd unit, the libvirt example, the recipes.

#[path = "tools/mod.rs"]
mod tools;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use tools::has_tools;

const PROGRAM: &str = env!("CARGO_BIN_EXE_fleecefs");

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn fleecefs(args: &[&str]) -> String {
    let out = Command::new(PROGRAM).args(args).output().unwrap();
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

/// What both streams of a command have.
fn said(out: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr))
}

/// The commands below one, by its help.
fn commands(path: &[&str]) -> Vec<String> {
    let help = fleecefs(&[path, &["--help"]].concat());
    let list = help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    // A line that goes on is further to the right.
    let names = list.filter(|line| line.starts_with("  ") && !line.starts_with("   "));
    names.filter_map(|line| line.split_whitespace().next()).filter(|name| *name != "help").map(str::to_owned).collect()
}

/// Every command that does something, with those above it.
fn all_commands() -> Vec<Vec<String>> {
    let mut all = Vec::new();
    for name in commands(&[]) {
        let below = commands(&[&name]);
        all.extend(below.into_iter().map(|sub| vec![name.clone(), sub]));
        all.push(vec![name]);
    }
    assert!(all.len() > 30, "{all:?}");
    all
}

fn man_pages() -> (tempfile::TempDir, Vec<PathBuf>) {
    let dir = tempfile::tempdir().unwrap();
    fleecefs(&["man-pages", dir.path().to_str().unwrap()]);
    let mut pages: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
    pages.sort();
    (dir, pages)
}

#[test]
fn there_is_a_man_page_for_each_command_and_for_nothing_else() {
    let (_dir, pages) = man_pages();
    let names: Vec<_> = pages.iter().map(|page| page.file_name().unwrap().to_str().unwrap().to_owned()).collect();
    let mut expected: Vec<_> = all_commands().iter().map(|path| format!("fleecefs-{}.1", path.join("-"))).collect();
    expected.push("fleecefs.1".to_owned());
    expected.sort();
    assert_eq!(names, expected);
    let run = std::fs::read_to_string(&pages[names.iter().position(|name| name == "fleecefs-run.1").unwrap()]).unwrap();
    for word in ["consumer", "freeze", "125", "{snapshot}"] {
        assert!(run.contains(word), "{word}");
    }
}

#[test]
fn man_and_mandoc_find_nothing_wrong_with_the_pages() {
    let (_dir, pages) = man_pages();
    if has_tools("man pages", &["man"]) {
        for page in &pages {
            let out = Command::new("man")
                .args(["--warnings", "-E", "UTF-8", "-l", "-Tutf8", "-Z"])
                .arg(page)
                .env("LC_ALL", "C.UTF-8")
                .env("MANROFFSEQ", "")
                .output()
                .unwrap();
            // A line with a word as long as itself looks as it looks.
            let text = String::from_utf8_lossy(&out.stderr).into_owned();
            let text: Vec<_> = text.lines().filter(|line| !line.contains("cannot adjust line")).collect();
            assert!(out.status.success() && text.is_empty(), "{}: {text:?}", page.display());
        }
    }
    let there = Command::new("mandoc").arg("/dev/null").output().is_ok();
    assert!(there || std::env::var_os("FLEECEFS_REQUIRE_TOOLS").is_none(), "without mandoc");
    if there {
        let out = Command::new("mandoc").args(["-Tlint", "-Werror"]).args(&pages).output().unwrap();
        assert!(out.status.success(), "{}", said(&out));
    }
}

#[test]
fn completions_know_each_command_and_its_options() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = fleecefs(&["completions", shell]);
        for word in all_commands().into_iter().flatten().chain(["on-freeze-error".to_owned(), "consumer".to_owned()]) {
            assert!(script.contains(&word), "{shell}: {word}");
        }
    }
    if has_tools("completions", &["bash"]) {
        let script = format!(
            "{}\nCOMP_WORDS=(fleecefs snapshot cr) COMP_CWORD=2\n_fleecefs fleecefs cr snapshot\necho \"${{COMPREPLY[@]}}\"",
            fleecefs(&["completions", "bash"])
        );
        let out = Command::new("bash").args(["-uc", &script]).output().unwrap();
        assert_eq!(said(&out).trim(), "create");
    }
}

#[test]
fn systemd_takes_the_unit() {
    if !has_tools("systemd unit", &["systemd-analyze"]) {
        return;
    }
    let unit = std::fs::read_to_string(root().join("contrib/systemd/fleecefs@.service")).unwrap();
    assert!(unit.contains("Before=libvirtd.service virtqemud.service libvirt-guests.service"));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("fleecefs@web.service");
    // Its documentation is not installed here, nor is the program.
    let unit = unit.replace("/usr/bin/fleecefs", PROGRAM).replace("Documentation=man:fleecefs-mount(1)\n", "");
    std::fs::write(&path, unit).unwrap();
    let out = Command::new("systemd-analyze").arg("verify").arg(&path).output().unwrap();
    assert!(out.status.success() && !said(&out).contains("fleecefs@web.service"), "{}", said(&out));
}

#[test]
fn the_libvirt_example_is_well_formed() {
    let script = "import sys, xml.dom.minidom as m; d = m.parse(sys.argv[1]); \
                  print(d.getElementsByTagName('source')[0].getAttribute('file'))";
    if !has_tools("libvirt example", &["python3"]) {
        return;
    }
    let file = root().join("contrib/libvirt/domain.xml");
    let out = Command::new("python3").args(["-c", script]).arg(&file).output().unwrap();
    assert_eq!(said(&out).trim(), "/srv/fleecefs/web/live/vda.raw");
    if Command::new("virt-xml-validate").arg("--version").output().is_ok() {
        let out = Command::new("virt-xml-validate").arg(&file).output().unwrap();
        assert!(out.status.success(), "{}", said(&out));
    }
}
