//! The power mode that nvpmodel has set.

use std::path::Path;

use crate::board::config::Board;
use crate::board::files;

/// A power mode of the running system.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct CurrentMode {
    /// Its number.
    pub id: u32,
    /// Its name, as `/etc/nvpmodel.conf` has it.
    pub name: String,
    /// The watts it is named for, if the board's description knows it and it has a limit.
    pub budget_w: Option<f64>,
}

/// The mode that is set, or that the board boots in; none if there is no nvpmodel.
pub fn current_mode(root: &Path, board: &Board) -> Option<CurrentMode> {
    let text = files::text(&root.join("etc/nvpmodel.conf"))?;
    let status = files::text(&root.join("var/lib/nvpmodel/status")).unwrap_or_default();
    // The file says `pmode:0002`.
    let set = status
        .split_whitespace()
        .find_map(|word| word.strip_prefix("pmode:")?.parse::<u32>().ok());
    let id = set
        .or_else(|| section(&text, "PM_CONFIG").find_map(|s| field(s, "DEFAULT")?.parse().ok()))?;
    let name = section(&text, "POWER_MODEL")
        .find(|s| field(s, "ID").and_then(|id| id.parse().ok()) == Some(id))
        .and_then(|s| field(s, "NAME"))?;
    Some(CurrentMode {
        id,
        name: name.to_owned(),
        budget_w: board.mode(name).ok().and_then(|mode| mode.budget_w),
    })
}

/// The headers of one kind: `< POWER_MODEL ID=2 NAME=15W >`. Comments show examples of them, after a `#`.
fn section<'a>(text: &'a str, kind: &'a str) -> impl Iterator<Item = &'a str> {
    text.lines().filter_map(move |line| {
        let inside = line.trim().strip_prefix('<')?.strip_suffix('>')?.trim();
        inside.strip_prefix(kind)
    })
}

fn field<'a>(section: &'a str, name: &str) -> Option<&'a str> {
    section
        .split_whitespace()
        .find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
}
