//! Small files of sysfs and procfs: read whole once, or kept open and read again and again.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

/// The text of a small file, without white space and NULs around it; none if it cannot be read.
pub fn text(path: &Path) -> Option<String> {
    let bytes = std::fs::read(path).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    Some(
        text.trim_matches(|c: char| c.is_whitespace() || c == '\0')
            .to_owned(),
    )
}

/// The entries of a folder, sorted; none if it cannot be read.
pub fn entries(folder: &Path) -> Vec<PathBuf> {
    let Ok(read) = std::fs::read_dir(folder) else {
        return Vec::new();
    };
    let mut paths: Vec<PathBuf> = read.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    paths
}

/// What a [`Probe`] found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Found {
    /// The number in the file.
    Number(i64),
    /// Nothing now (a power-gated sensor says EAGAIN), perhaps next time.
    Silent,
    /// The file is no more.
    Gone,
}

/// A file with one number, kept open: sysfs makes its content anew for each read from the start.
#[derive(Debug)]
pub struct Probe(File);

impl Probe {
    /// Opens the file; none if it is not there or not for this user.
    pub fn open(path: &Path) -> Option<Probe> {
        File::open(path).ok().map(Probe)
    }

    /// Reads the number; allocates nothing.
    pub fn read(&self) -> Found {
        let mut buffer = [0; 32];
        let read = match self.0.read_at(&mut buffer, 0) {
            Ok(read) => &buffer[..read],
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENODEV | libc::ENXIO)) => {
                return Found::Gone;
            }
            Err(_) => return Found::Silent,
        };
        // A device that is unplugged takes its files with it, which an open file of sysfs tells by an error and one
        // of another file system by its links.
        if self.0.metadata().is_ok_and(|meta| meta.nlink() == 0) {
            return Found::Gone;
        }
        let number = std::str::from_utf8(read)
            .ok()
            .and_then(|text| text.trim().parse().ok());
        number.map_or(Found::Silent, Found::Number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_probe_follows_its_file_until_that_is_gone() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("temp");
        assert!(Probe::open(&path).is_none());
        std::fs::write(&path, "41000\n").expect("written");
        let probe = Probe::open(&path).expect("there");
        assert_eq!(probe.read(), Found::Number(41000));
        std::fs::write(&path, "-7\n").expect("written");
        assert_eq!(probe.read(), Found::Number(-7));
        for nothing in ["", "unknown\n", "99999999999999999999999999"] {
            std::fs::write(&path, nothing).expect("written");
            assert_eq!(probe.read(), Found::Silent, "{nothing:?}");
        }
        std::fs::remove_file(&path).expect("removed");
        assert_eq!(probe.read(), Found::Gone);
    }
}
