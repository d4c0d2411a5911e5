//! Read-only mappings of the metadata at the start of a file.
#![allow(unsafe_code)]

use std::fs::{File, Metadata};
use std::path::Path;

use memmap2::{Mmap, MmapOptions};

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

/// Maps the first `len` bytes of `file` (`path` is for the message).
///
/// A mapping costs memory only for the pages that are touched. As with every mapping of a file,
/// cutting the file shorter while it is in use ends the process by SIGBUS.
pub(super) fn map(file: &File, len: usize, path: &Path) -> Result<Mmap> {
    // SAFETY: the mapping is private and read-only. Another process could still write to the file;
    // every read goes through bounds-checked slices of plain bytes, and text is checked to be UTF-8
    // each time it is handed out, so changed bytes give wrong values or a panic, not a wild access.
    unsafe { MmapOptions::new().len(len).map(file) }
        .map_err(|source| Error::file(path, "map the metadata of", &source))
}
