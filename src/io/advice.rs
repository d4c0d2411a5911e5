//! What `bench --io` found best for a disk, kept in the user's cache folder for the planner.
//!
//! One small JSON file per block device: `disks/MAJOR-MINOR.json`. It is a cache: what is damaged is not used, and
//! measuring again writes it anew.

use std::fs;
use std::path::{Path, PathBuf};

use nix::sys::stat::{major, minor};
use serde::{Deserialize, Serialize};

/// Bounds of what is believed: a read, and all reads in flight.
const READ_BYTES: std::ops::RangeInclusive<u32> = 4096..=16 << 20;
const DEPTH: std::ops::RangeInclusive<u32> = 1..=1024;

/// How a disk is read at its full rate with the fewest bytes in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Advice {
    /// Bytes of each read, at least.
    pub read_bytes: u32,
    /// Reads of that size in flight, at least.
    pub depth: u32,
}

impl Advice {
    /// Bytes in flight that it takes.
    pub fn bytes_in_flight(&self) -> usize {
        self.read_bytes as usize * self.depth as usize
    }

    /// The advice for the block device with this number (`st_dev`), if there is any in the folder `cache`.
    pub fn load(cache: &Path, device: u64) -> Option<Advice> {
        let path = Advice::path(cache, device);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return None,
            Err(e) => {
                log::warn!("{}: cannot read it ({e}); doing without", path.display());
                return None;
            }
        };
        let advice = serde_json::from_slice(&text).ok();
        let sound = advice
            .filter(|a: &Advice| READ_BYTES.contains(&a.read_bytes) && DEPTH.contains(&a.depth));
        if sound.is_none() {
            log::warn!(
                "{}: damaged, so not used; `airstream bench --io FILE` writes it anew",
                path.display()
            );
        }
        sound
    }

    /// Keeps the advice for later runs; where to.
    pub fn save(&self, cache: &Path, device: u64) -> std::io::Result<PathBuf> {
        let path = Advice::path(cache, device);
        fs::create_dir_all(path.parent().unwrap_or(cache))?;
        let part = path.with_extension(format!("{}.part", std::process::id()));
        fs::write(&part, serde_json::to_vec_pretty(self)?)?;
        fs::rename(&part, &path)?;
        Ok(path)
    }

    fn path(cache: &Path, device: u64) -> PathBuf {
        let name = format!("{}-{}.json", major(device), minor(device));
        cache.join("disks").join(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advice_is_kept_for_each_device_and_damage_is_not_believed() {
        let cache = tempfile::tempdir().expect("a scratch folder");
        let advice = Advice {
            read_bytes: 1 << 20,
            depth: 4,
        };
        assert_eq!(Advice::load(cache.path(), 5), None);
        let path = advice.save(cache.path(), 5).expect("our own folder");
        assert_eq!(Advice::load(cache.path(), 5), Some(advice));
        assert_eq!(Advice::load(cache.path(), 6), None);
        for damage in [
            "",
            "{}",
            r#"{"read_bytes": 0, "depth": 4}"#,
            r#"{"read_bytes": 1048576, "depth": 0}"#,
        ] {
            fs::write(&path, damage).expect("our own file");
            assert_eq!(Advice::load(cache.path(), 5), None, "{damage}");
        }
    }
}
