//! `fleecefs check`: whether a qcow2 image agrees with itself, and its repair. The names in the JSON are those of
//! `qemu-img check`.

use super::local::LocalArgs;
use super::output::{Out, Style, printable};
use super::{Exit, JsonArg};
use crate::error::{Error, Result, errno};
use crate::image::Format;
use crate::image::qcow2::check::{Kind, Repair, Report, check, repair};
use crate::storage::Storage;
use crate::units::human_size;
use clap::{Args, ValueEnum};
use serde_json::{Map, Value, json};

/// Arguments of `check`.
#[derive(Debug, Args)]
pub struct CheckArgs {
    #[command(flatten)]
    image: LocalArgs,
    /// Repair what is found: leaked space only, or everything that can be
    #[arg(long, value_name = "EXTENT", num_args = 0..=1, require_equals = true, default_missing_value = "all")]
    repair: Option<RepairArg>,
    /// Look at the image while it is in use: what is found may be wrong
    #[arg(short = 'U', long, conflicts_with = "repair")]
    force_share: bool,
    #[command(flatten)]
    json: JsonArg,
}

/// How much to repair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum RepairArg {
    /// Space that nothing uses
    Leaks,
    /// Refcounts and flags too
    All,
}

impl CheckArgs {
    /// Runs the command. Exit code 1 where faults are left.
    pub fn run(&self) -> Result<Exit> {
        let local = self.image.open(self.repair.is_some(), self.force_share)?;
        if local.format == Format::Raw {
            return Err(
                Error::new(errno::EOPNOTSUPP, "check", "raw images have nothing to check").at_path(&self.image.image)
            );
        }
        let (before, after) = match self.repair {
            None => {
                let report = check(&local.file)?;
                (report.clone(), report)
            }
            Some(extent) => {
                let extent = if extent == RepairArg::All { Repair::All } else { Repair::Leaks };
                let repaired = repair(&local.file, extent)?;
                (repaired.before, repaired.after)
            }
        };
        self.print(&before, &after, local.file.len()?)?;
        Ok(if after.is_clean() { Exit::Done } else { Exit::Differs })
    }

    fn print(&self, before: &Report, after: &Report, file_bytes: u64) -> Result<()> {
        let mut out = Out::new();
        if self.json.json {
            return out.json(&self.as_json(before, after)?);
        }
        for finding in &before.findings {
            let kind = if finding.kind == Kind::Leak { "leak" } else { "error" };
            out.line(format!("{kind}: {}", printable(&finding.text)))?;
        }
        let unnamed = (before.corruptions + before.leaks).saturating_sub(before.findings.len() as u64);
        if unnamed > 0 {
            out.line(format!("... and {unnamed} more"))?;
        }
        human(before, after, file_bytes, self.repair.is_some()).iter().try_for_each(|line| out.line(line))
    }

    fn as_json(&self, before: &Report, after: &Report) -> Result<Value> {
        let mut object = Map::new();
        object.insert("filename".into(), json!(self.image.image.to_string_lossy()));
        object.insert("format".into(), json!("qcow2"));
        object.insert("check-errors".into(), json!(0));
        object.insert("image-end-offset".into(), json!(after.image_end_offset));
        object.insert("total-clusters".into(), json!(after.total_clusters));
        let where_some = [
            ("corruptions", after.corruptions),
            ("leaks", after.leaks),
            ("corruptions-fixed", before.corruptions.saturating_sub(after.corruptions)),
            ("leaks-fixed", before.leaks.saturating_sub(after.leaks)),
            ("allocated-clusters", after.allocated_clusters),
            ("compressed-clusters", after.compressed_clusters),
            ("fragmented-clusters", after.fragmented_clusters),
            ("stale-bitmap-clusters", after.stale_bitmap_clusters),
        ];
        for (name, count) in where_some.into_iter().filter(|(_, count)| *count > 0) {
            object.insert(name.into(), json!(count));
        }
        object.insert("dirty-flag".into(), json!(after.dirty));
        object.insert("corrupt".into(), json!(after.corrupt));
        let findings: Vec<Value> =
            before.findings.iter().map(|finding| json!({ "kind": finding.kind, "text": finding.text })).collect();
        object.insert("findings".into(), json!(findings));
        serde_json::to_value(object).map_err(|e| Error::new(errno::EIO, "JSON", e.to_string()))
    }
}

/// The lines below the findings.
fn human(before: &Report, after: &Report, file_bytes: u64, repaired: bool) -> Vec<String> {
    let style = Style::of_stdout();
    let mut lines = Vec::new();
    let count = |number: u64, what: &str| format!("{number} {what}{}", if number == 1 { "" } else { "s" });
    if repaired && !before.is_clean() {
        let corruptions = before.corruptions.saturating_sub(after.corruptions);
        let leaks = before.leaks.saturating_sub(after.leaks);
        lines.push(format!("Repaired {} and {}.", count(corruptions, "error"), count(leaks, "leaked cluster")));
    }
    lines.push(if after.is_clean() {
        style.good("No errors were found in the image.")
    } else {
        style.bad(&format!("{} and {}.", count(after.corruptions, "error"), count(after.leaks, "leaked cluster")))
    });
    if after.corruptions > 0 {
        lines.push("Data may be wrong, or become so with the next write.".into());
    }
    if after.dirty {
        lines.push("The image was not closed: its refcounts are rebuilt when it is next opened for writing.".into());
    }
    if after.corrupt {
        lines.push(style.bad("The image is marked as corrupt."));
    }
    if after.stale_bitmap_clusters > 0 {
        let clusters = count(after.stale_bitmap_clusters, "cluster");
        lines.push(format!("{clusters} of bitmaps that a program without support for them made useless."));
    }
    let share = |part: u64, whole: u64| if whole == 0 { 0.0 } else { 100.0 * part as f64 / whole as f64 };
    lines.push(format!(
        "{} of {} clusters are stored ({:.2} %); of these {:.2} % are fragmented and {:.2} % compressed.",
        after.allocated_clusters,
        after.total_clusters,
        share(after.allocated_clusters, after.total_clusters),
        share(after.fragmented_clusters, after.allocated_clusters),
        share(after.compressed_clusters, after.allocated_clusters),
    ));
    let (end, file) = (human_size(after.image_end_offset), human_size(file_bytes));
    lines.push(format!("The image ends at {} ({end}); its file has {file}.", after.image_end_offset));
    lines
}
