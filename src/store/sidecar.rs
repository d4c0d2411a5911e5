//! Checksums between runs: a small file in the user's cache folder for each model file.
//!
//! The file holds, little-endian: eight bytes that say what it is, the key, the number of checksums, these of four
//! bytes each (0 where one is not known) and the checksum of all that. It is a cache: what is damaged is ignored, what
//! cannot be written is said once, and either way the checksums are learnt again.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use twox_hash::XxHash3_64;

use super::sums::Sums;
use crate::format::tile::Matrix;
use crate::io::Files;

const MAGIC: &[u8; 8] = b"airsums2";
/// Magic, key and number of checksums.
const HEAD_BYTES: usize = 24;
/// Sidecars kept; the oldest go first: models come and go.
const KEPT_MAX: usize = 64;

/// `$XDG_CACHE_HOME/airstream`, or `~/.cache/airstream`; none where neither variable has an absolute path.
pub fn cache_folder() -> Option<PathBuf> {
    // The XDG base directory specification tells programs to ignore relative paths.
    let absolute = |name| {
        std::env::var_os(name)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    let base =
        absolute("XDG_CACHE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".cache")))?;
    Some(base.join("airstream"))
}

/// Where the checksums of one model are kept.
pub(super) struct Sidecar {
    path: PathBuf,
    key: u64,
}

impl Sidecar {
    /// The place for `matrices` of `files`, in the folder `checksums` of `cache`.
    pub(super) fn new(cache: &Path, files: &Files, matrices: &[Matrix]) -> Sidecar {
        let key = key(files, matrices);
        Sidecar {
            path: cache.join("checksums").join(format!("{key:016x}")),
            key,
        }
    }

    /// The file's path, for error messages.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Fills `sums` with what an earlier run learnt; leaves it alone if there is nothing sound.
    pub(super) fn load(&self, sums: &Sums) {
        let bytes = match fs::read(&self.path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return,
            Err(e) => {
                log::warn!(
                    "{}: cannot read the checksums of earlier runs ({e}); learning them again",
                    self.path.display()
                );
                return;
            }
        };
        let sound = bytes.len() == HEAD_BYTES + 4 * sums.len() + 8
            && bytes[..HEAD_BYTES] == self.head(sums.len())
            && word(&bytes, bytes.len() - 8) == XxHash3_64::oneshot(&bytes[..bytes.len() - 8]);
        if !sound {
            log::warn!(
                "{}: the checksums of earlier runs are damaged; learning them again",
                self.path.display()
            );
            return;
        }
        let known = bytes[HEAD_BYTES..].chunks_exact(4).take(sums.len());
        sums.set_all(known.map(|sum| u32::from_le_bytes([sum[0], sum[1], sum[2], sum[3]])));
    }

    /// Writes `sums` for later runs, whole or not at all; a failure is one line in the log, and false.
    pub(super) fn save(&self, sums: &Sums) -> bool {
        let mut bytes = self.head(sums.len()).to_vec();
        bytes.extend(sums.all().flat_map(u32::to_le_bytes));
        let whole = XxHash3_64::oneshot(&bytes);
        bytes.extend(whole.to_le_bytes());
        let written = self.write(&bytes);
        if let Err(e) = &written {
            log::warn!(
                "{}: cannot keep checksums ({e}); the next run learns them again",
                self.path.display()
            );
        }
        written.is_ok()
    }

    fn write(&self, bytes: &[u8]) -> std::io::Result<()> {
        let folder = self.path.parent().unwrap_or(Path::new("/"));
        fs::create_dir_all(folder)?;
        make_room(folder)?;
        let part = self
            .path
            .with_extension(format!("{}.part", std::process::id()));
        // No sync: a file that a power cut left incomplete is noticed by its checksum.
        let written = fs::File::create(&part)
            .and_then(|mut file| file.write_all(bytes))
            .and_then(|()| fs::rename(&part, &self.path));
        if written.is_err() {
            // Where it could not even be made there is nothing to remove.
            let _ = fs::remove_file(&part);
        }
        written
    }

    fn head(&self, strips: usize) -> [u8; HEAD_BYTES] {
        let mut head = [0; HEAD_BYTES];
        head[..8].copy_from_slice(MAGIC);
        head[8..16].copy_from_slice(&self.key.to_le_bytes());
        head[16..].copy_from_slice(&(strips as u64).to_le_bytes());
        head
    }
}

/// What tells one model file and its matrices from all others: never the path, which may lead to another file by now.
fn key(files: &Files, matrices: &[Matrix]) -> u64 {
    let mut bytes = Vec::with_capacity(files.len() * 40 + matrices.len() * 32);
    for (_, file) in files.iter() {
        let of = file.identity();
        for number in [
            of.device,
            of.inode,
            of.len,
            of.modified.0 as u64,
            of.modified.1 as u64,
        ] {
            bytes.extend(number.to_le_bytes());
        }
    }
    for matrix in matrices {
        bytes.extend(matrix.offset.to_le_bytes());
        bytes.extend((matrix.rows as u64).to_le_bytes());
        bytes.extend((matrix.row_bytes() as u64).to_le_bytes());
        bytes.extend(u64::from(matrix.file).to_le_bytes());
    }
    XxHash3_64::oneshot(&bytes)
}

fn word(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

/// Removes the oldest sidecars until one more may come.
fn make_room(folder: &Path) -> std::io::Result<()> {
    let mut found: Vec<(SystemTime, PathBuf)> = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        // Another process may have removed it just now.
        if let Ok(modified) = entry.metadata().and_then(|m| m.modified()) {
            found.push((modified, entry.path()));
        }
    }
    found.sort();
    let too_many = (found.len() + 1).saturating_sub(KEPT_MAX);
    for (_, path) in &found[..too_many] {
        // As above; and where it may not be removed, writing fails just after and says so.
        let _ = fs::remove_file(path);
    }
    Ok(())
}
