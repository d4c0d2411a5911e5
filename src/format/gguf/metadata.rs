//! Reading the metadata at the start of a file.

use std::fs::{File, Metadata};
use std::os::unix::fs::FileExt;
use std::path::Path;

use memmap2::{Mmap, MmapMut};

use super::cursor::{Cursor, METADATA_BYTES_MAX};
use super::header::Header;
use crate::error::{Error, Kind, Result};

/// Opens `path` for reading, if it is a plain file; returns what it is like now, too.
pub(super) fn open(path: &Path) -> Result<(File, Metadata)> {
    let fail = |source| Error::file(path, "open", &source);
    // Asked before opening, because opening a named pipe would wait for a writer.
    let metadata = std::fs::metadata(path).map_err(fail)?;
    if !metadata.is_file() {
        return Err(Error::new(
            Kind::Usage,
            format!("{} is not a regular file", path.display()),
            "give the path of a GGUF file",
        ));
    }
    let file = File::open(path).map_err(fail)?;
    let metadata = file.metadata().map_err(fail)?;
    Ok((file, metadata))
}

/// Bytes that are read first, and added at least. Most vocabularies take a few MiB; of what nobody needs, little is read.
const FIRST_BYTES: usize = 1 << 20;

/// Reads and parses the metadata of `file`, the `index`-th of its model, which has `file_bytes` in all; its bytes, and
/// few beyond them, come with it.
///
/// They are a copy: whatever becomes of the file, what was checked stays as it was. It lies in memory of its own, which
/// goes back to the system at once when the model is ready; the part that nothing was read into is never there.
pub(super) fn read(
    file: &File,
    path: &Path,
    file_bytes: u64,
    index: usize,
) -> Result<(Header, Mmap)> {
    let fail = |source| Error::file(path, "read the metadata of", &source);
    // The limit is far below usize::MAX on every target.
    let most = file_bytes.min(METADATA_BYTES_MAX) as usize;
    let mut memory = MmapMut::map_anon(most).map_err(fail)?;
    let (mut have, mut wanted) = (0, FIRST_BYTES.min(most));
    loop {
        file.read_exact_at(&mut memory[have..wanted], have as u64)
            .map_err(fail)?;
        have = wanted;
        let mut cursor = Cursor::new(&memory[..have], path, file_bytes);
        match Header::parse(&mut cursor, index) {
            // Only the piece that was read ends there.
            Err(_) if cursor.is_short() && have < most => {
                wanted = (have + (have / 4).max(FIRST_BYTES)).min(most);
            }
            parsed => return Ok((parsed?, memory.make_read_only().map_err(fail)?)),
        }
    }
}
