//! Whether the bytes that arrive are those that were there before: a checksum for each tile, and an eye on the files.
//!
//! A tile's checksum is learnt when it is first read, by whichever run, and
//! every later read of it must agree. The checksum is XXH3 (64 bits) over the
//! tile's own bytes: not a defence against forgers, but against disks, cables
//! and files that change.

use std::path::Path;
use std::sync::Arc;

use twox_hash::XxHash3_64;

use super::sidecar::Sidecar;
use crate::error::{Error, Kind, Result};
use crate::format::tile::Tile;
use crate::io::{Fate, FileId, Files};

/// No tile was read yet that would have this checksum; one that really has it gets [`ZERO_STANDS_FOR`].
const UNKNOWN: u64 = 0;
const ZERO_STANDS_FOR: u64 = 1;

/// What the store knows of its tiles' contents.
#[derive(Default)]
pub struct Integrity {
    /// For each tile its checksum or [`UNKNOWN`]; empty if nothing is verified.
    sums: Vec<u64>,
    /// Where they are kept between runs.
    sidecar: Option<Sidecar>,
    /// Some are not in the sidecar yet.
    learnt: bool,
    /// The files, unless the disk is simulated.
    files: Option<Arc<Files>>,
    /// It was said that another file is at the path.
    told_replaced: bool,
}

impl Integrity {
    /// Verifies `tiles` of `files` if `verify`, with the checksums of earlier runs from the folder `cache`, and
    /// watches the files in any case.
    pub fn new(files: Arc<Files>, tiles: &[Tile], verify: bool, cache: Option<&Path>) -> Integrity {
        let mut integrity = Integrity {
            files: Some(files.clone()),
            ..Integrity::default()
        };
        if !verify {
            return integrity;
        }
        integrity.sums = vec![UNKNOWN; tiles.len()];
        match cache {
            Some(cache) => {
                let sidecar = Sidecar::new(cache, &files, tiles);
                sidecar.load(&mut integrity.sums);
                integrity.sidecar = Some(sidecar);
            }
            None => log::warn!(
                "no cache folder (neither XDG_CACHE_HOME nor HOME is set): checksums are kept for this run only"
            ),
        }
        integrity
    }

    /// Verifies `tiles` tiles of a simulated disk, with checksums of this run only.
    pub fn simulated(tiles: usize) -> Integrity {
        Integrity {
            sums: vec![UNKNOWN; tiles],
            ..Integrity::default()
        }
    }

    /// Bytes that the table takes for each tile.
    pub(super) const TILE_BYTES: usize = size_of::<u64>();

    /// Whether `bytes` are those of the tile; remembers them if it was never read before.
    pub(super) fn agrees(&mut self, tile: u32, bytes: &[u8]) -> bool {
        let Some(known) = self.sums.get_mut(tile as usize) else {
            return true;
        };
        let sum = match XxHash3_64::oneshot(bytes) {
            UNKNOWN => ZERO_STANDS_FOR,
            sum => sum,
        };
        if *known == UNKNOWN {
            *known = sum;
            self.learnt = true;
        }
        *known == sum
    }

    /// Why a file can no longer be relied on, if so.
    pub(super) fn changed(&self, file: u16) -> Option<&'static str> {
        let files = self.files.as_ref()?;
        match files.get(FileId(file)).fate() {
            Ok(Fate::Changed) => Some("it was changed after it was opened"),
            Ok(Fate::Same | Fate::Replaced) => None,
            Err(_) => Some("it can no longer be examined"),
        }
    }

    /// Looks whether any file was changed; says once if one was replaced, which does no harm.
    ///
    /// # Errors
    /// One was changed: what was read of it before and what is read now may not fit together.
    pub(super) fn look(&mut self) -> Result<()> {
        let Some(files) = &self.files else {
            return Ok(());
        };
        for (_, file) in files.iter() {
            match file.fate()? {
                Fate::Same => {}
                Fate::Replaced if self.told_replaced => {}
                Fate::Replaced => {
                    self.told_replaced = true;
                    log::warn!(
                        "{}: another file or none has its place now; going on with the one that was opened",
                        file.path().display()
                    );
                }
                Fate::Changed => {
                    return Err(Error::new(
                        Kind::Io,
                        format!("{} was changed after it was opened", file.path().display()),
                        "put the file back as it was, or start again to use it as it is now",
                    ));
                }
            }
        }
        Ok(())
    }

    /// Forgets all checksums, since it is not known which of them are of a file as it should be.
    pub(super) fn forget(&mut self) {
        self.sums.fill(UNKNOWN);
        self.learnt = false;
        self.sidecar = None;
    }

    /// What to do about a tile that does not agree.
    pub(super) fn remedy(&self) -> String {
        let checksums = self.sidecar.as_ref().map_or(String::new(), |sidecar| {
            format!(
                "; if the file is sound, remove {}",
                sidecar.path().display()
            )
        });
        format!("check the disk (dmesg) and compare the file with its source{checksums}")
    }

    /// Writes checksums that were learnt into the sidecar; not for the hot path.
    pub(super) fn save(&mut self) {
        let files = self.files.as_ref();
        let unchanged = files
            .is_some_and(|files| (0..files.len() as u16).all(|file| self.changed(file).is_none()));
        if let Some(sidecar) = &self.sidecar
            && self.learnt
            && unchanged
        {
            sidecar.save(&self.sums);
            self.learnt = false;
        }
    }
}
