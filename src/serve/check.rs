//! What of a configuration would fail when the daemon starts, or as soon as somebody asks, as far as that can be told
//! without starting it: `serve --check` and `systemctl reload` refuse it then, and `doctor` lists it.

use std::fs::File;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;

use nix::unistd::{AccessFlags, access};

use super::config::{Config, Http, Listen, Load, Serial};
use super::serial::other_user;
use super::sockets::token;
use super::unix::listen;
use crate::error::{Error, Kind, Result};

/// How one thing is that the configuration names.
#[derive(Debug)]
pub struct Finding {
    /// What kind of thing: socket, http, serial or model.
    pub about: &'static str,
    /// How it is.
    pub outcome: Outcome,
}

/// How a thing is.
#[derive(Debug)]
pub enum Outcome {
    /// As it should be.
    Fine(String),
    /// The daemon starts, but this may not work.
    Doubtful(Error),
    /// The daemon does not start.
    Wrong(Error),
}

/// Looks at everything that the configuration names, beside the content of models. Processes are those under `root`.
pub fn findings(config: &Config, root: &Path) -> Vec<Finding> {
    let mut findings = Vec::new();
    for socket in config.sockets.iter().map(|socket| socket.as_ref()) {
        findings.push(Finding {
            about: "socket",
            outcome: unix(&socket.path, socket.group.as_deref()),
        });
    }
    findings.extend(config.http.as_ref().map(|spanned| Finding {
        about: "http",
        outcome: http(spanned.as_ref()),
    }));
    for serial in config.serials.iter().map(|serial| serial.as_ref()) {
        findings.push(Finding {
            about: "serial",
            outcome: port(serial, root),
        });
    }
    for model in config.models.iter().map(|model| model.as_ref()) {
        for path in [&model.path].into_iter().chain(&model.draft_model) {
            let opened = File::open(path).map_err(|e| Error::file(path, "open", &e));
            findings.push(Finding {
                about: "model",
                outcome: match (opened, model.load) {
                    (Ok(_), _) => Outcome::Fine(path.display().to_string()),
                    // A drive that comes later is in time for it.
                    (Err(error), Load::Demand) => Outcome::Doubtful(error),
                    (Err(error), Load::Start) => Outcome::Wrong(error),
                },
            });
        }
    }
    findings
}

/// The first thing that would keep the daemon from its start is an error; what is doubtful is logged.
///
/// # Errors
/// As of the findings.
pub fn refuse(findings: Vec<Finding>) -> Result<()> {
    for finding in findings {
        match finding.outcome {
            Outcome::Fine(_) => {}
            Outcome::Doubtful(error) => log::warn!("{error}"),
            Outcome::Wrong(error) => return Err(error),
        }
    }
    Ok(())
}

fn unix(path: &Path, group: Option<&str>) -> Outcome {
    let folder = path.parent().unwrap_or(path);
    match listen::check(path, group) {
        Err(error) => Outcome::Wrong(error),
        // The service manager makes a folder in /run when it starts the daemon.
        Ok(()) if !folder.is_dir() => Outcome::Doubtful(Error::new(
            Kind::Io,
            format!("{} is not there now", folder.display()),
            "start the unit, which makes it",
        )),
        Ok(()) => Outcome::Fine(path.display().to_string()),
    }
}

fn http(http: &Http) -> Outcome {
    if let Err(error) = token(http) {
        return Outcome::Wrong(error);
    }
    match &http.listen {
        Listen::Unix(path) => unix(path, None),
        Listen::Tcp(address) => tcp(*address),
    }
}

/// Whether the daemon could listen there. It may be doing so already.
fn tcp(address: SocketAddr) -> Outcome {
    match TcpListener::bind(address) {
        Ok(_) => Outcome::Fine(address.to_string()),
        Err(e) if e.kind() == std::io::ErrorKind::AddrInUse => {
            Outcome::Fine(format!("{address}, which is in use now"))
        }
        Err(e) => Outcome::Wrong(Error::new(
            Kind::Io,
            format!("cannot listen on {address}: {e}"),
            "give an address of this machine and a port above 1023 as `listen` under [http]",
        )),
    }
}

/// A port that comes later, or is given back, is waited for.
fn port(serial: &Serial, root: &Path) -> Outcome {
    let device = serial.device.as_path();
    if !device.exists() {
        return Outcome::Doubtful(Error::new(
            Kind::Io,
            format!("{} is not there: it is waited for", device.display()),
            "plug it in, or change `device` under [[serial]]",
        ));
    }
    if let Err(errno) = access(device, AccessFlags::R_OK | AccessFlags::W_OK) {
        return Outcome::Doubtful(Error::new(
            Kind::Io,
            format!("cannot use {}: {errno}", device.display()),
            "add this user to the group of the device (dialout, most often)",
        ));
    }
    match other_user(root, device) {
        Some(error) => Outcome::Doubtful(error),
        None => Outcome::Fine(format!("{}, {} baud", device.display(), serial.baud)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_would_fail_is_wrong_and_what_may_come_is_doubtful() {
        let folder = tempfile::tempdir().expect("a folder");
        let here = folder.path().display();
        let found = |text: &str| {
            let config = Config::parse(text, Path::new("a.toml")).expect("sound");
            let told = findings(&config, folder.path()).into_iter().map(|finding| {
                let how = match finding.outcome {
                    Outcome::Fine(_) => "fine",
                    Outcome::Doubtful(_) => "doubtful",
                    Outcome::Wrong(_) => "wrong",
                };
                (finding.about, how)
            });
            told.collect::<Vec<_>>()
        };
        std::fs::write(folder.path().join("m"), "").expect("a file");
        let sound = found(&format!(
            "[[model]]\nname = \"m\"\npath = \"{here}/m\"\n[[socket]]\npath = \"{here}/s\"\n\
             [http]\nlisten = \"127.0.0.1:0\"\n[[serial]]\ndevice = \"/dev/null\"\n"
        ));
        let all = ["socket", "http", "serial", "model"];
        assert_eq!(sound, all.map(|about| (about, "fine")));
        // An address that is for examples only.
        let wrong = found(&format!(
            "[[model]]\nname = \"m\"\npath = \"{here}/none\"\n\
             [[model]]\nname = \"n\"\npath = \"{here}/none\"\nload = \"demand\"\n\
             [[socket]]\npath = \"{here}/none/s\"\n\
             [http]\nlisten = \"192.0.2.1:80\"\ntoken = \"t\"\n[[serial]]\ndevice = \"{here}/none\"\n"
        ));
        let expected = [
            ("socket", "wrong"),
            ("http", "wrong"),
            ("serial", "doubtful"),
            ("model", "wrong"),
            ("model", "doubtful"),
        ];
        assert_eq!(wrong, expected);
        let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = taken.local_addr().expect("an address");
        assert!(matches!(tcp(address), Outcome::Fine(told) if told.contains("in use")));
    }
}
