//! Operating errors. Each says what went wrong and what to do about it.

use std::fmt;
use std::path::Path;

/// The result of everything that can fail in operation.
pub type Result<T> = std::result::Result<T, Error>;

/// What kind of thing went wrong, for callers that act on it and for clients, who are told it by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// The model file is damaged, truncated or hostile.
    Format,
    /// The file is sound, but asks for something airstream does not do.
    Unsupported,
    /// The memory budget cannot hold the minimum.
    Budget,
    /// The operating system or the disk refused or failed.
    Io,
    /// The caller asked for something that makes no sense.
    Usage,
    /// There is more to do already than may wait.
    Busy,
    /// The client did not take what it was told for too long.
    Stalled,
}

/// An operating error: what happened, and the remedy.
#[derive(Debug, Clone)]
pub struct Error {
    kind: Kind,
    what: String,
    remedy: String,
}

impl Error {
    /// An error of `kind`; `what` is a sentence without a full stop, `remedy` an imperative one.
    pub fn new(kind: Kind, what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Error {
            kind,
            what: what.into(),
            remedy: remedy.into(),
        }
    }

    /// A system call on `path` failed.
    pub fn file(path: &Path, doing: &str, source: &std::io::Error) -> Self {
        use std::io::ErrorKind as Why;
        let remedy = match (source.kind(), source.raw_os_error()) {
            (Why::NotFound, _) => "check the path".to_owned(),
            (Why::PermissionDenied, _) => format!("give this user permission to {doing} it"),
            (Why::StorageFull | Why::QuotaExceeded, _) => {
                "make room on its file system, or give another path".to_owned()
            }
            (Why::ReadOnlyFilesystem, _) => "give a path that can be written to".to_owned(),
            (_, Some(libc::EMFILE | libc::ENFILE)) => {
                "raise the limit of open files (ulimit -n)".to_owned()
            }
            _ => "check the disk and its file system (dmesg shows hardware errors)".to_owned(),
        };
        Error::new(
            Kind::Io,
            format!("cannot {doing} {}: {source}", path.display()),
            remedy,
        )
    }

    /// What kind of error this is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// What went wrong, a sentence without a full stop.
    pub fn what(&self) -> &str {
        &self.what
    }

    /// What the user can do about it.
    pub fn remedy(&self) -> &str {
        &self.remedy
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}\n  remedy: {}", self.what, self.remedy)
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_call_has_the_remedy_that_helps() {
        let remedy = |doing, errno| {
            let source = std::io::Error::from_raw_os_error(errno);
            Error::file(Path::new("f"), doing, &source)
                .remedy()
                .to_owned()
        };
        for (doing, errno, helps) in [
            ("open", libc::ENOENT, "check the path"),
            ("listen on", libc::EACCES, "permission to listen on it"),
            ("write", libc::ENOSPC, "make room"),
            ("create", libc::EROFS, "can be written to"),
            ("open", libc::EMFILE, "ulimit -n"),
            ("read", libc::EIO, "dmesg"),
        ] {
            let remedy = remedy(doing, errno);
            assert!(remedy.contains(helps), "{errno}: {remedy}");
        }
    }
}
