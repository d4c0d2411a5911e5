//! What is known of each board: one TOML in `board-configs/`, embedded here, and overridden by a file on the board.
//!
//! `board-configs/README.md` explains every field and gives the sources.

use std::path::Path;

use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use crate::error::{Error, Kind, Result};

/// Where a board's owner may override fields, under the root.
pub const OVERRIDES: &str = "etc/airstream/board.toml";
/// The key of that file that says which board this is.
const BASE: &str = "base";
/// The board of a host that is none of the others.
pub const GENERIC: &str = "generic";

macro_rules! embedded {
    ($($name:literal),* $(,)?) => {
        /// Every board: (name, TOML).
        const EMBEDDED: &[(&str, &str)] =
            &[$(($name, include_str!(concat!("../../board-configs/", $name, ".toml")))),*];
    };
}

embedded!(
    "orin-nano-4gb",
    "orin-nano-4gb-super",
    "orin-nano-8gb",
    "orin-nano-8gb-super",
    "orin-nx-8gb",
    "orin-nx-8gb-super",
    "orin-nx-16gb",
    "orin-nx-16gb-super",
    "agx-orin-32gb",
    "agx-orin-64gb",
    "thor-t4000",
    "thor-t5000",
    "generic",
);

/// A board. Everything optional is unknown, to be read from the machine or measured on it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Board {
    /// What `--board` calls it.
    pub name: String,
    /// What people call it.
    pub title: String,
    /// How it is recognised.
    pub identity: Identity,
    /// Its memory.
    pub memory: Memory,
    /// Its drive.
    pub nvme: Nvme,
    /// Its processor.
    pub cpu: Cpu,
    /// Its GPU, if it has one of NVIDIA's.
    #[serde(default)]
    pub gpu: Option<Gpu>,
    /// How its power is measured.
    pub power: Power,
    /// How hot it may get.
    pub thermal: Thermal,
    /// Its nvpmodel power modes.
    #[serde(default, rename = "mode")]
    pub modes: Vec<Mode>,
}

/// How a board is recognised in the device tree.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// Numbers of the modules (`p3767-0005`), as `compatible` ends with them.
    pub modules: Vec<String>,
    /// Whether the device tree asks for super clocks.
    #[serde(default)]
    pub super_clocks: bool,
}

/// Memory, shared by processor and GPU.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Memory {
    /// What the module has.
    pub total_gib: Option<f64>,
    /// What the system and others need of it.
    pub leave_gib: f64,
    /// Bandwidth at the highest memory clock.
    pub dram_gb_s: Option<f64>,
}

/// The drive that holds the models.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nvme {
    /// Sequential read bandwidth.
    pub gb_s: Option<f64>,
    /// Bytes of a read at which it is near its best.
    pub read_kib: u32,
    /// Reads in flight at which it is.
    pub depth: u32,
}

/// The processor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cpu {
    /// Its cores.
    pub cores: Option<u32>,
    /// Their highest clock.
    pub mhz_max: Option<u32>,
    /// Whether interrupts of the drive keep CPU 0 busy, so that compute threads had better stay away.
    pub leave_cpu0: bool,
}

/// Where a GPU computes: on the slots that reads land in, or on copies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Placement {
    /// Reads land where it computes.
    Direct,
    /// It has memory of its own.
    Staged,
}

/// A GPU of NVIDIA's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Gpu {
    /// CUDA compute capability.
    pub compute_capability: String,
    /// Where it computes.
    pub placement: Placement,
    /// CUDA cores.
    pub cores: u32,
    /// Its highest clock.
    pub mhz_max: u32,
}

/// Which rails add up to the power of the whole.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Power {
    /// Sums of rails; the first whose rails are all there counts. A name may end in `*`.
    pub total: Vec<Vec<String>>,
}

/// How hot the board may get.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Thermal {
    /// Types of thermal zones that count (`hwmon:NAME` for a sensor that is none); the hottest is the junction.
    pub zones: Vec<String>,
    /// What the governor holds the junction at.
    pub target_c: f64,
    /// Where the hardware begins to throttle.
    pub limit_c: f64,
}

/// A power mode of nvpmodel. Clocks that are not given are those of the board.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mode {
    /// The number that `nvpmodel -m` takes.
    pub id: u32,
    /// Its name.
    pub name: String,
    /// Whether the board boots in it.
    #[serde(default)]
    pub default: bool,
    /// The watts it is named for; none where it has no limit.
    pub budget_w: Option<f64>,
    /// Cores that are online.
    pub cpu_cores: Option<u32>,
    /// Their highest clock.
    pub cpu_mhz: Option<u32>,
    /// CUDA cores that are powered.
    pub gpu_cores: Option<u32>,
    /// The GPU's highest clock.
    pub gpu_mhz: Option<u32>,
    /// Memory bandwidth at the highest memory clock.
    pub dram_gb_s: Option<f64>,
}

impl Board {
    /// The names of all boards.
    pub fn names() -> impl Iterator<Item = &'static str> {
        EMBEDDED.iter().map(|(name, _)| *name)
    }

    /// The board of that name, as shipped.
    ///
    /// # Errors
    /// There is none; the error lists those there are.
    pub fn named(name: &str) -> Result<Board> {
        Board::read(embedded(name)?, name)
    }

    /// All boards, as shipped.
    pub fn all() -> Result<Vec<Board>> {
        Board::names().map(Board::named).collect()
    }

    /// The board of that name with the fields that `text`, found at `place`, overrides.
    ///
    /// # Errors
    /// The text is not TOML, or has a key that no board has.
    pub fn overridden(name: &str, text: &str, place: &Path) -> Result<Board> {
        let mut table = parse(embedded(name)?, name)?;
        let mut overrides = parse(text, &place.display().to_string())?;
        overrides.remove(BASE);
        merge(&mut table, overrides);
        Board::from_table(table, &place.display().to_string())
    }

    fn read(text: &str, place: &str) -> Result<Board> {
        Board::from_table(parse(text, place)?, place)
    }

    fn from_table(table: Table, place: &str) -> Result<Board> {
        let board: Board = table.try_into().map_err(|e| unsound(place, &e))?;
        board.check(place)?;
        Ok(board)
    }

    /// What must hold of every board, whoever wrote it.
    fn check(&self, place: &str) -> Result<()> {
        let positive = |x: Option<f64>| x.is_none_or(|x| x > 0.0 && x.is_finite());
        let fails = [
            (
                !(positive(self.memory.total_gib) && positive(self.memory.dram_gb_s)),
                "memory sizes and rates must be above 0",
            ),
            (
                self.memory.leave_gib < 0.0
                    || self
                        .memory
                        .total_gib
                        .is_some_and(|total| total <= self.memory.leave_gib),
                "memory.leave_gib must be at least 0 and below memory.total_gib",
            ),
            (
                !positive(self.nvme.gb_s) || self.nvme.read_kib == 0 || self.nvme.depth == 0,
                "nvme rates, sizes and depths must be above 0",
            ),
            (self.cpu.cores == Some(0), "cpu.cores must be at least 1"),
            (
                !(self.thermal.target_c > 0.0 && self.thermal.target_c < self.thermal.limit_c),
                "thermal.target_c must lie between 0 and thermal.limit_c",
            ),
            (
                self.modes.iter().any(|mode| !positive(mode.budget_w)),
                "budgets of modes must be above 0",
            ),
            (
                self.modes.iter().filter(|mode| mode.default).count() > 1,
                "only one mode can be the default",
            ),
        ];
        match fails.iter().find(|(fails, _)| *fails) {
            Some((_, what)) => Err(unsound(place, what)),
            None => Ok(()),
        }
    }

    /// The mode it boots in.
    pub fn default_mode(&self) -> Option<&Mode> {
        self.modes.iter().find(|mode| mode.default)
    }

    /// The mode of that name or number.
    ///
    /// # Errors
    /// There is none; the error lists those there are.
    pub fn mode(&self, name: &str) -> Result<&Mode> {
        let matches =
            |mode: &&Mode| mode.name.eq_ignore_ascii_case(name) || name.parse() == Ok(mode.id);
        self.modes.iter().find(matches).ok_or_else(|| {
            let names: Vec<&str> = self.modes.iter().map(|m| m.name.as_str()).collect();
            let remedy = match names.is_empty() {
                true => "leave --mode out".to_owned(),
                false => format!("use one of {}", names.join(", ")),
            };
            Error::new(
                Kind::Usage,
                format!("{} has no power mode {name}", self.name),
                remedy,
            )
        })
    }

    /// What a model may have of the memory if nobody says otherwise and all of it is free.
    pub fn memory_for_models(&self) -> Option<u64> {
        let gib = self.memory.total_gib? - self.memory.leave_gib;
        Some((gib * (1_u64 << 30) as f64) as u64)
    }
}

/// The board that an override file says this is.
pub(super) fn base(text: &str, place: &Path) -> Result<Option<String>> {
    let table = parse(text, &place.display().to_string())?;
    match table.get(BASE) {
        None => Ok(None),
        Some(Value::String(name)) => Ok(Some(name.clone())),
        Some(_) => Err(unsound(
            &place.display().to_string(),
            &"base must be a name",
        )),
    }
}

fn embedded(name: &str) -> Result<&'static str> {
    let found = EMBEDDED.iter().find(|(known, _)| *known == name);
    found.map(|(_, text)| *text).ok_or_else(|| {
        let names: Vec<&str> = Board::names().collect();
        Error::new(
            Kind::Usage,
            format!("there is no board {name}"),
            format!("use one of {}", names.join(", ")),
        )
    })
}

fn parse(text: &str, place: &str) -> Result<Table> {
    text.parse().map_err(|e| unsound(place, &e))
}

fn unsound(place: &str, what: &dyn std::fmt::Display) -> Error {
    let what = what.to_string();
    Error::new(
        Kind::Format,
        format!("the board in {place} is unsound: {}", what.trim_end()),
        "correct the file; board-configs/README.md explains every field",
    )
}

/// Puts the values of `over` into `base`, tables field by field, everything else whole.
fn merge(base: &mut Table, over: Table) {
    for (key, value) in over {
        match (base.get_mut(&key), value) {
            (Some(Value::Table(base)), Value::Table(over)) => merge(base, over),
            (_, value) => {
                base.insert(key, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_board_is_sound_and_named_like_its_file() {
        for name in Board::names() {
            let board = Board::named(name).expect(name);
            assert_eq!(board.name, name);
            assert_eq!(board.modes.is_empty(), name == GENERIC);
            for mode in &board.modes {
                assert!(mode.cpu_cores.unwrap_or(1) <= board.cpu.cores.expect(name));
                assert!(mode.cpu_mhz.unwrap_or(1) <= board.cpu.mhz_max.expect(name));
                assert!(mode.dram_gb_s.unwrap_or(1.0) <= board.memory.dram_gb_s.expect(name));
                let gpu = board.gpu.as_ref().expect(name);
                assert!(mode.gpu_cores.unwrap_or(1) <= gpu.cores);
                assert!(mode.gpu_mhz.unwrap_or(1) <= gpu.mhz_max);
            }
            if name != GENERIC {
                assert!(board.default_mode().is_some(), "{name}");
                assert!(
                    board
                        .memory_for_models()
                        .is_some_and(|bytes| bytes > 1 << 30)
                );
            }
        }
    }

    #[test]
    fn every_file_of_the_folder_is_embedded() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("board-configs");
        let mut files: Vec<String> = std::fs::read_dir(folder)
            .expect("the folder")
            .filter_map(|entry| {
                let name = entry.expect("an entry").file_name();
                Some(name.to_str()?.strip_suffix(".toml")?.to_owned())
            })
            .collect();
        files.sort();
        let mut names: Vec<&str> = Board::names().collect();
        names.sort_unstable();
        assert_eq!(files, names);
    }

    #[test]
    fn no_two_boards_answer_to_the_same_module() {
        let boards = Board::all().expect("sound");
        for (i, a) in boards.iter().enumerate() {
            for b in &boards[i + 1..] {
                let same = a.identity.super_clocks == b.identity.super_clocks;
                let shared = |m: &&String| b.identity.modules.contains(m);
                assert!(
                    !same || a.identity.modules.iter().find(shared).is_none(),
                    "{} and {}",
                    a.name,
                    b.name
                );
            }
        }
    }

    #[test]
    fn a_file_overrides_fields_and_unknown_keys_are_errors() {
        let place = Path::new("board.toml");
        let text = "[nvme]\ngb_s = 2.0\n[thermal]\ntarget_c = 70.0";
        let board = Board::overridden("orin-nx-16gb", text, place).expect("sound");
        assert_eq!(board.nvme.gb_s, Some(2.0));
        assert_eq!(board.nvme.depth, 16);
        assert_eq!(board.thermal.target_c, 70.0);
        for wrong in [
            "[nvme]\nspeed = 2",
            "colour = 'red'",
            "[nvme",
            "[thermal]\ntarget_c = 200.0",
            "[memory]\nleave_gib = 99.0",
            "[[mode]]\nid = 0\nname = 'x'\nbudget_w = -1.0",
        ] {
            let error = Board::overridden("orin-nx-16gb", wrong, place).expect_err(wrong);
            assert!(error.to_string().contains("board.toml"), "{error}");
        }
    }

    #[test]
    fn modes_go_by_name_or_number() {
        let board = Board::named("agx-orin-64gb").expect("sound");
        assert_eq!(board.mode("MODE_30W").expect("there").id, 2);
        assert_eq!(board.mode("3").expect("there").name, "MODE_50W");
        let error = board.mode("fast").expect_err("no such mode");
        assert!(error.remedy().contains("MAXN"));
        assert!(Board::named("toaster").is_err());
    }
}
