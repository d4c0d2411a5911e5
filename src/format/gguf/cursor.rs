//! A bounded little-endian reader over the metadata of one file.
//!
//! Nothing is believed before it is compared with the bytes that are really
//! there, so a hostile length costs a comparison and no allocation.

use std::fmt::Display;
use std::path::Path;

use crate::error::{Error, Kind, Result};

/// Metadata larger than this is refused. The largest vocabularies in use take
/// about 20 MB, and the limit bounds both the time and the memory of a load.
pub(super) const METADATA_BYTES_MAX: u64 = 64 << 20;

/// The remedy for damage that a fresh copy repairs.
pub(super) const COPY_AGAIN: &str = "download or copy the file again and compare its checksum";

/// A reading position in the first bytes of a GGUF file.
pub(super) struct Cursor<'a> {
    /// The file from its start, at most [`METADATA_BYTES_MAX`] bytes of it.
    bytes: &'a [u8],
    at: usize,
    file: &'a Path,
    file_bytes: u64,
    /// More was wanted than there is.
    short: bool,
}

impl<'a> Cursor<'a> {
    /// A cursor at the start of `bytes`, the first bytes of `file`, which has `file_bytes` in all.
    pub fn new(bytes: &'a [u8], file: &'a Path, file_bytes: u64) -> Self {
        Cursor {
            bytes,
            at: 0,
            file,
            file_bytes,
            short: false,
        }
    }

    /// All bytes, from the start of the file.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// The file.
    pub fn file(&self) -> &'a Path {
        self.file
    }

    /// Size of the whole file.
    pub fn file_bytes(&self) -> u64 {
        self.file_bytes
    }

    /// Whether more was wanted than there is.
    pub fn is_short(&self) -> bool {
        self.short
    }

    /// Offset of the next byte from the start of the file.
    pub fn at(&self) -> usize {
        self.at
    }

    /// Bytes of the file that come next.
    pub fn left(&self) -> u64 {
        self.file_bytes - self.at as u64
    }

    /// A format error in this file.
    pub fn damaged(&self, what: impl Display) -> Error {
        damaged(self.file, what)
    }

    /// The next `len` bytes, which hold `what`.
    pub fn take(&mut self, len: u64, what: impl Display) -> Result<&'a [u8]> {
        if len > (self.bytes.len() - self.at) as u64 {
            self.short = true;
            return Err(self.ends_inside(len, what));
        }
        // `len` is at most the length of a slice, so it fits.
        let start = self.at;
        self.at += len as usize;
        Ok(&self.bytes[start..self.at])
    }

    /// Steps over `count` values of `size` bytes each, which hold `what`.
    pub fn skip(&mut self, count: u64, size: u64, what: impl Display) -> Result<&'a [u8]> {
        // A product beyond u64 is beyond every file, and so is the largest u64.
        self.take(count.saturating_mul(size), what)
    }

    /// The next four bytes as a number.
    pub fn u32(&mut self, what: impl Display) -> Result<u32> {
        let bytes = self.take(4, what)?;
        Ok(u32::from_le_bytes(
            bytes.try_into().expect("four bytes were taken"),
        ))
    }

    /// The next eight bytes as a number.
    pub fn u64(&mut self, what: impl Display) -> Result<u64> {
        let bytes = self.take(8, what)?;
        Ok(u64::from_le_bytes(
            bytes.try_into().expect("eight bytes were taken"),
        ))
    }

    /// A string: its length as u64, then its bytes, without a terminator.
    pub fn string(&mut self, what: impl Display) -> Result<&'a [u8]> {
        let len = self.u64(format_args!("the length of {what}"))?;
        self.take(len, what)
    }

    fn ends_inside(&self, len: u64, what: impl Display) -> Error {
        if self.file_bytes > self.bytes.len() as u64 {
            return self.damaged(format_args!(
                "{what} would end beyond the first {} MiB, the most that metadata may take",
                METADATA_BYTES_MAX >> 20
            ));
        }
        self.damaged(format_args!(
            "the file ends inside {what}: it takes {len} bytes at offset {}, the file has {}",
            self.at, self.file_bytes
        ))
    }
}

/// A format error in `file` that a fresh copy would repair.
pub(super) fn damaged(file: &Path, what: impl Display) -> Error {
    Error::new(
        Kind::Format,
        format!("{}: {what}", file.display()),
        COPY_AGAIN,
    )
}
