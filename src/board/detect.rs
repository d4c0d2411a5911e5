//! Which board this is, from the device tree, and what the host says of itself.

use std::io::ErrorKind;
use std::path::Path;

use super::config::{self, Board, GENERIC, OVERRIDES};
use super::files;
use crate::error::{Error, Result};

/// Of free memory, a model takes at most this share where nobody says how much: others live here too.
const SHARE_OF_FREE: f64 = 0.8;

/// What a device tree says of the module.
#[derive(Debug, PartialEq)]
struct Identity {
    /// Numbers of modules and carriers: `p3767-0005`.
    numbers: Vec<String>,
    super_clocks: bool,
}

/// The board under `root`, or the one that is named, with the fields that [`OVERRIDES`] overrides, and what is unknown
/// filled in from the host.
///
/// # Errors
/// There is no board of that name, or the override file cannot be read or is unsound.
pub fn board(root: &Path, named: Option<&str>) -> Result<Board> {
    let place = root.join(OVERRIDES);
    let overrides = match std::fs::read_to_string(&place) {
        Ok(text) => Some(text),
        Err(e) if e.kind() == ErrorKind::NotFound => None,
        Err(e) => return Err(Error::file(&place, "read", &e)),
    };
    let base = match &overrides {
        Some(text) => config::base(text, &place)?,
        None => None,
    };
    let name = match named.map(str::to_owned).or(base) {
        Some(name) => name,
        None => recognise(root)?,
    };
    let mut board = match &overrides {
        Some(text) => Board::overridden(&name, text, &place)?,
        None => Board::named(&name)?,
    };
    let total = meminfo(root, "MemTotal:").map(|bytes| bytes as f64 / (1_u64 << 30) as f64);
    board.memory.total_gib = board.memory.total_gib.or(total);
    board.cpu.cores = board.cpu.cores.or_else(|| cores(root));
    Ok(board)
}

/// Memory that a model may take where nobody says how much: of what is free now, `more` counted in, and of what the board
/// has to give.
pub fn memory_default(board: &Board, root: &Path, more: u64) -> u64 {
    let free = memory_available(root);
    let free = free.map(|bytes| ((bytes + more) as f64 * SHARE_OF_FREE) as u64);
    let most = board.memory_for_models();
    match (free, most) {
        (Some(free), Some(most)) => free.min(most),
        // A host that says nothing: be cautious.
        (free, most) => free.or(most).unwrap_or(1 << 30),
    }
}

/// Memory that is free for new work, or would be soon.
pub fn memory_available(root: &Path) -> Option<u64> {
    meminfo(root, "MemAvailable:")
}

/// The model name that the device tree gives.
pub fn model(root: &Path) -> Option<String> {
    files::text(&root.join("proc/device-tree/model")).filter(|text| !text.is_empty())
}

/// A line of `/proc/meminfo`, in bytes.
pub fn meminfo(root: &Path, line: &str) -> Option<u64> {
    let text = files::text(&root.join("proc/meminfo"))?;
    let found = text.lines().find_map(|l| l.strip_prefix(line))?;
    let kib: u64 = found.split_whitespace().next()?.parse().ok()?;
    Some(kib << 10)
}

fn cores(root: &Path) -> Option<u32> {
    let text = files::text(&root.join("proc/cpuinfo"))?;
    let cores = text.lines().filter(|l| l.starts_with("processor")).count();
    (cores > 0).then_some(cores as u32)
}

/// The name of the board under `root`; generic if it is none of the known ones.
fn recognise(root: &Path) -> Result<String> {
    let identity = device_tree(root).or_else(|| boot_control(root));
    let Some(identity) = identity else {
        return Ok(GENERIC.to_owned());
    };
    let boards = Board::all()?;
    let is_module = |board: &&Board| {
        let known = |number: &String| board.identity.modules.contains(number);
        identity.numbers.iter().any(known)
    };
    // A module whose super clocks nobody has described is described by its usual ones.
    let found = boards
        .iter()
        .filter(is_module)
        .min_by_key(|board| board.identity.super_clocks != identity.super_clocks);
    Ok(found.map_or(GENERIC.to_owned(), |board| board.name.clone()))
}

/// From `compatible`, which is NUL-split, and `model`; none if no module's number is among them.
fn device_tree(root: &Path) -> Option<Identity> {
    let compatible = std::fs::read(root.join("proc/device-tree/compatible")).ok()?;
    let compatible = String::from_utf8_lossy(&compatible).into_owned();
    let numbers: Vec<String> = compatible
        .split('\0')
        .flat_map(|entry| entry.rsplit(',').next())
        .flat_map(|entry| entry.split('+'))
        .filter_map(|part| part.get(..10))
        .filter(|part| is_number(part))
        .map(str::to_owned)
        .collect();
    let model = model(root).unwrap_or_default().to_ascii_lowercase();
    (!numbers.is_empty()).then(|| Identity {
        super_clocks: model.ends_with("super")
            || compatible
                .split('\0')
                .any(|entry| entry.ends_with("-super")),
        numbers,
    })
}

/// Whether a text is the number of a module or carrier: p3767-0005.
fn is_number(text: &str) -> bool {
    let bytes = text.as_bytes();
    let digits = |range: std::ops::Range<usize>| bytes[range].iter().all(u8::is_ascii_digit);
    bytes.len() == 10 && bytes[0] == b'p' && digits(1..5) && bytes[5] == b'-' && digits(6..10)
}

/// From the boot loader's configuration: `TNSPEC 3834-300-0008-...`.
fn boot_control(root: &Path) -> Option<Identity> {
    let text = files::text(&root.join("etc/nv_boot_control.conf"))?;
    let spec = text.lines().find_map(|line| {
        let (key, spec) = line.split_once(char::is_whitespace)?;
        matches!(key, "TNSPEC" | "COMPATIBLE_SPEC").then(|| spec.trim())
    })?;
    let mut fields = spec.split('-');
    let (board, sku) = (fields.next()?, fields.nth(1)?);
    Some(Identity {
        numbers: vec![format!("p{board}-{sku}")],
        super_clocks: spec.contains("-super"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().expect("a temporary folder");
        for (path, text) in files {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().expect("a folder")).expect("made");
            std::fs::write(path, text).expect("written");
        }
        root
    }

    #[test]
    fn numbers_of_modules_are_told_from_other_words() {
        assert!(is_number("p3767-0005"));
        for other in [
            "p3767-000",
            "tegra234",
            "p3767_0005",
            "x3767-0005",
            "p37a7-0005",
        ] {
            assert!(!is_number(other), "{other}");
        }
    }

    #[test]
    fn an_unknown_module_and_a_plain_host_are_generic() {
        for files in [
            &[(
                "proc/device-tree/compatible",
                "raspberrypi,5-model-b\0brcm,bcm2712\0",
            )][..],
            &[(
                "proc/device-tree/compatible",
                "nvidia,p9999-0001\0nvidia,tegra999\0",
            )],
            &[("etc/nv_boot_control.conf", "TNSPEC")],
            &[],
        ] {
            let root = tree(files);
            let board = board(root.path(), None).expect("generic");
            assert_eq!(board.name, GENERIC, "{files:?}");
        }
    }

    #[test]
    fn a_plain_host_is_filled_in_and_its_memory_shared() {
        let root = tree(&[
            (
                "proc/meminfo",
                "MemTotal: 16777216 kB\nMemFree: 1 kB\nMemAvailable:  8388608 kB\n",
            ),
            (
                "proc/cpuinfo",
                "processor : 0\nmodel name : x\nprocessor : 1\n",
            ),
        ]);
        let board = board(root.path(), None).expect("generic");
        assert_eq!(board.memory.total_gib, Some(16.0));
        assert_eq!(board.cpu.cores, Some(2));
        let expected = 0.8 * (8_u64 << 30) as f64;
        assert_eq!(memory_default(&board, root.path(), 0), expected as u64);
    }

    #[test]
    fn a_board_leaves_memory_to_its_system_even_if_it_is_free() {
        let root = tree(&[(
            "proc/meminfo",
            "MemTotal: 7900000 kB\nMemAvailable: 7800000 kB\n",
        )]);
        let board = board(root.path(), Some("orin-nano-8gb")).expect("named");
        assert_eq!(board.memory.total_gib, Some(8.0));
        assert_eq!(
            Some(memory_default(&board, root.path(), 0)),
            board.memory_for_models()
        );
    }

    #[test]
    fn the_owner_says_which_board_it_is_and_the_command_line_overrules() {
        let root = tree(&[(OVERRIDES, "base = \"agx-orin-32gb\"\n[nvme]\ngb_s = 6.5\n")]);
        let owned = board(root.path(), None).expect("sound");
        assert_eq!(
            (owned.name.as_str(), owned.nvme.gb_s),
            ("agx-orin-32gb", Some(6.5))
        );
        let named = board(root.path(), Some("thor-t5000")).expect("sound");
        assert_eq!(
            (named.name.as_str(), named.nvme.gb_s),
            ("thor-t5000", Some(6.5))
        );
        let root = tree(&[(OVERRIDES, "base = 3")]);
        assert!(board(root.path(), None).is_err());
    }
}
