//! Opening model files for direct reads.
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, PosixFadviseAdvice, fcntl, posix_fadvise};

use crate::arena::PAGE_BYTES;
use crate::error::{Error, Kind, Result};

use super::FileId;
use super::buffer::Buffer;

/// The alignment that every disk and file system in use accepts.
const ALIGN_DEFAULT: u32 = 4096;

/// How a file's bytes reach memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// From the disk straight into the arena (O_DIRECT), where the file system can.
    Direct,
    /// Through the page cache, which is dropped behind each read.
    Buffered,
}

/// What a file was when it was opened, to notice that it was replaced or changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Identity {
    /// The file system's device number.
    pub device: u64,
    /// The inode on it.
    pub inode: u64,
    /// Bytes.
    pub len: u64,
    /// Last change of the contents: seconds and nanoseconds since 1970.
    pub modified: (i64, i64),
}

impl Identity {
    /// What the system says of a file.
    pub fn of(metadata: &std::fs::Metadata) -> Self {
        Identity {
            device: metadata.dev(),
            inode: metadata.ino(),
            len: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        }
    }
}

/// What became of a file since it was opened.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fate {
    /// Nothing.
    Same,
    /// Another file has its path now (or none); the opened one is as it was and can still be read.
    Replaced,
    /// Its length or time of change is different: what is read now may not fit what was read before.
    Changed,
}

/// One opened file of a model.
#[derive(Debug)]
pub struct ModelFile {
    path: PathBuf,
    file: File,
    access: Access,
    align: u32,
    identity: Identity,
}

impl ModelFile {
    fn open(path: &Path, access: Access) -> Result<Self> {
        let file = open_noatime(path).map_err(|e| Error::file(path, "open", &e))?;
        let metadata = file
            .metadata()
            .map_err(|e| Error::file(path, "examine", &e))?;
        if !metadata.is_file() {
            return Err(Error::new(
                Kind::Usage,
                format!("{} is not a regular file", path.display()),
                "give the path of a GGUF file",
            ));
        }
        let align = match access {
            Access::Direct => {
                make_direct(&file).map_err(|e| Error::file(path, "read", &e.into()))?
            }
            Access::Buffered => None,
        };
        if align.is_none() && access == Access::Direct {
            log::warn!(
                "{}: no direct reads on its file system; reading through the page cache and dropping it behind",
                path.display()
            );
        }
        Ok(ModelFile {
            path: path.to_owned(),
            file,
            access: if align.is_some() {
                Access::Direct
            } else {
                Access::Buffered
            },
            align: align.unwrap_or(ALIGN_DEFAULT),
            identity: Identity::of(&metadata),
        })
    }

    /// Where the file was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes in the file when it was opened.
    pub fn len(&self) -> u64 {
        self.identity.len
    }

    /// Whether the file had no bytes when it was opened.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Reads start at multiples of this, in the file and in memory, and are
    /// multiples of it long. A power of two, 512 or more.
    pub fn align(&self) -> u32 {
        self.align
    }

    /// How its bytes reach memory.
    pub fn access(&self) -> Access {
        self.access
    }

    /// What the file was when it was opened.
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// Looks whether the file was replaced or changed since it was opened.
    pub fn fate(&self) -> Result<Fate> {
        let opened = self
            .file
            .metadata()
            .map_err(|e| Error::file(&self.path, "examine", &e))?;
        if Identity::of(&opened) != self.identity {
            return Ok(Fate::Changed);
        }
        let there_now = std::fs::metadata(&self.path).map(|m| (m.dev(), m.ino()));
        Ok(match there_now {
            Ok(id) if id == (self.identity.device, self.identity.inode) => Fate::Same,
            _ => Fate::Replaced,
        })
    }

    /// One blocking read, in the way that `Io` would do it.
    ///
    /// # Safety
    /// `into..into + len` is valid for writes, and nobody else reads or writes it meanwhile.
    pub(super) unsafe fn read_at(
        &self,
        into: *mut u8,
        len: usize,
        offset: u64,
    ) -> std::result::Result<u32, Errno> {
        // SAFETY: the caller promises that `into` is valid for `len` bytes.
        let got = unsafe { libc::pread64(self.file.as_raw_fd(), into.cast(), len, offset as i64) };
        let got = Errno::result(got)?;
        self.drop_behind(offset, len);
        Ok(got as u32)
    }

    /// Gives the page cache of a finished read back; nothing to do for direct reads.
    pub(super) fn drop_behind(&self, offset: u64, len: usize) {
        if self.access == Access::Buffered {
            // Advice: where it is refused, the kernel reclaims the pages in its own time.
            let _ = posix_fadvise(
                &self.file,
                offset as i64,
                len as i64,
                PosixFadviseAdvice::POSIX_FADV_DONTNEED,
            );
        }
    }
}

impl AsFd for ModelFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// The opened files of one model or several, each model's in the order of their paths.
#[derive(Debug)]
pub struct Files(Vec<Arc<ModelFile>>);

impl Files {
    /// The file with this number; panics if there is none, since ids are only made here.
    pub fn get(&self, id: FileId) -> &ModelFile {
        &self.0[usize::from(id.0)]
    }

    /// All of them with their ids.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (FileId, &ModelFile)> {
        self.0
            .iter()
            .enumerate()
            .map(|(i, file)| (FileId(i as u16), &**file))
    }

    /// The files of several models, one model's after the other's.
    pub fn together<'a>(models: impl IntoIterator<Item = &'a Arc<Files>>) -> Files {
        let files = models.into_iter().flat_map(|files| files.0.iter());
        Files(files.cloned().collect())
    }

    /// How many files there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is no file.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The alignment that suits all files; a power of two, 512 or more.
    pub fn align(&self) -> u32 {
        self.0
            .iter()
            .map(|file| file.align())
            .max()
            .unwrap_or(ALIGN_DEFAULT)
    }

    /// Whether every file is read directly.
    pub fn all_direct(&self) -> bool {
        self.0.iter().all(|file| file.access == Access::Direct)
    }
}

/// Opens the files of a model for reading, `FileId(0)` first.
///
/// Where a file system has no direct reads, says so in the log and reads
/// through the page cache.
pub fn open_model(paths: &[PathBuf], access: Access) -> Result<Files> {
    if paths.len() > usize::from(u16::MAX) {
        return Err(Error::new(
            Kind::Unsupported,
            format!("the model is split into {} files", paths.len()),
            "merge it into fewer files (llama-gguf-split --merge)",
        ));
    }
    let files: Result<Vec<_>> = paths
        .iter()
        .map(|path| ModelFile::open(path, access).map(Arc::new))
        .collect();
    Ok(Files(files?))
}

/// Opens for reading without touching the access time, which only the owner may ask for.
fn open_noatime(path: &Path) -> std::io::Result<File> {
    let with_flags = |flags| {
        OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_CLOEXEC | flags)
            .open(path)
    };
    match with_flags(libc::O_NOATIME) {
        Err(e) if e.raw_os_error() == Some(libc::EPERM) => with_flags(0),
        result => result,
    }
}

/// Switches `file` to direct reads and returns their alignment; `None` if its file system has none.
fn make_direct(file: &File) -> std::result::Result<Option<u32>, Errno> {
    let flags = OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL)?);
    let Some(align) = usable_alignment(direct_alignment(file)) else {
        return Ok(None);
    };
    match fcntl(file, FcntlArg::F_SETFL(flags | OFlag::O_DIRECT)) {
        Err(Errno::EINVAL) => return Ok(None),
        result => result?,
    };
    // Some file systems accept the flag and refuse the read.
    let mut probe = Buffer::new(align as usize);
    match file.read_at(probe.bytes_mut(), 0) {
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
            fcntl(file, FcntlArg::F_SETFL(flags))?;
            Ok(None)
        }
        _ => Ok(Some(align)),
    }
}

/// The alignment of direct reads, given what the kernel says of it; none if reads in whole pages would not do.
fn usable_alignment(told: Option<u32>) -> Option<u32> {
    let align = told.unwrap_or(ALIGN_DEFAULT);
    (1..=PAGE_BYTES as u32).contains(&align).then_some(align)
}

/// What the kernel says (since 6.1) direct reads of `file` are to be aligned to; `Some(0)`: there are none.
fn direct_alignment(file: &File) -> Option<u32> {
    // SAFETY: `statx` is plain integers, for which zero is a value.
    let mut answer: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the path is a C string, and `answer` is a `statx` to be written.
    let rc = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            &mut answer,
        )
    };
    if rc != 0 || answer.stx_mask & libc::STATX_DIOALIGN == 0 {
        return None;
    }
    match answer.stx_dio_offset_align {
        0 => Some(0),
        offset => Some(
            offset
                .max(answer.stx_dio_mem_align)
                .max(512)
                .next_power_of_two(),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_aligned_to_more_than_a_page_is_read_buffered() {
        let told = [None, Some(0), Some(512), Some(4096), Some(8192)];
        let usable = [Some(4096), None, Some(512), Some(4096), None];
        assert_eq!(told.map(usable_alignment), usable);
    }
}
