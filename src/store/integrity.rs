//! Whether the bytes that arrive are those that were there before: checksums, and an eye on the files.
//!
//! A strip's checksum is learnt when it is first read, by whichever run, and every later read of it must agree
//! ([`Sums`]).

use std::path::Path;
use std::sync::Arc;

use super::sidecar::Sidecar;
pub use super::sums::Sums;
use crate::error::{Error, Kind, Result};
use crate::format::checksum::Seen;
use crate::format::tile::{Matrix, Tile};
use crate::io::{Fate, FileId, Files};

/// What the store knows of its tiles' contents.
#[derive(Default)]
pub struct Integrity {
    sums: Arc<Sums>,
    /// Where they are kept between runs.
    sidecar: Option<Sidecar>,
    /// They could not be, which was said.
    unkept: bool,
    /// The files, unless the disk is simulated.
    files: Option<Arc<Files>>,
    /// It was said that another file is at the path.
    told_replaced: bool,
}

impl Integrity {
    /// Verifies `matrices` of `files`, cut into `tiles`, if `verify`, with the checksums of earlier runs from the
    /// folder `cache`, and watches the files in any case. `tensors` are those that were read already.
    ///
    /// # Errors
    /// One of `tensors` is not what an earlier run read.
    pub fn new(
        files: Arc<Files>,
        matrices: &[Matrix],
        tiles: &[Tile],
        tensors: &[Seen],
        verify: bool,
        cache: Option<&Path>,
    ) -> Result<Integrity> {
        let mut integrity = Integrity {
            files: Some(files.clone()),
            ..Integrity::default()
        };
        if !verify {
            return Ok(integrity);
        }
        let sums = Sums::new(matrices, tiles, tensors.len());
        match cache {
            Some(cache) => {
                let sidecar = Sidecar::new(cache, &files, matrices);
                sidecar.load(&sums);
                integrity.sidecar = Some(sidecar);
            }
            None => log::warn!(
                "no cache folder (neither XDG_CACHE_HOME nor HOME is set): checksums are kept for this run only"
            ),
        }
        integrity.sums = Arc::new(sums);
        match integrity.sums.wrong_tensor(tensors) {
            None => Ok(integrity),
            Some(wrong) => Err(Error::new(
                Kind::Io,
                format!(
                    "cannot use {} at offset {} of {}: its checksum is wrong, so these are not the bytes that were there before",
                    wrong.name,
                    wrong.offset,
                    files.get(FileId(wrong.file)).path().display()
                ),
                integrity.remedy(),
            )),
        }
    }

    /// Verifies `tiles` of a simulated disk, with checksums of this run only.
    pub fn simulated(matrices: &[Matrix], tiles: &[Tile]) -> Integrity {
        Integrity {
            sums: Arc::new(Sums::new(matrices, tiles, 0)),
            ..Integrity::default()
        }
    }

    /// The checksums.
    pub(super) fn sums(&self) -> &Arc<Sums> {
        &self.sums
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
        self.sums.forget();
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
            && self.sums.learnt()
            && unchanged
            && !self.unkept
        {
            self.unkept = !sidecar.save(&self.sums);
        }
    }
}
