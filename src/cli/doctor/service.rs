//! What the daemon will run with: its configuration, looked at as `airstream serve --check` does.

use std::fs::File;
use std::io::ErrorKind;
use std::path::Path;

use nix::unistd::{Uid, User};

use super::system::unit_file;
use super::{Check, Host, Status};
use crate::board::detect;
use crate::cli::report;
use crate::engine::DeviceChoice;
use crate::error::Error;
use crate::serve::check::{self, Outcome};
use crate::serve::config::Config;
use crate::serve::{engine, in_keys, serial};

/// Where the package puts the configuration.
const CONFIG: &str = "etc/airstream/airstream.toml";
const NAME: &str = "configuration";
/// What `ProtectHome=yes` of its unit hides from the daemon.
const HIDDEN: [&str; 3] = ["/home", "/root", "/run/user"];

/// The configuration at `path`, or where the package puts it, and a line that says how it is.
pub(super) fn read(root: &Path, path: Option<&Path>) -> (Option<Config>, Check) {
    let usual = root.join(CONFIG);
    let path = path.unwrap_or(&usual);
    match File::open(path) {
        Err(e) if e.kind() == ErrorKind::NotFound && path == usual => {
            return (None, Check::skipped(NAME, format!("no /{CONFIG}")));
        }
        Err(e) if e.kind() == ErrorKind::PermissionDenied => {
            let found = format!("{} is not for this user", path.display());
            let remedy = "sudo -u airstream airstream doctor looks at it as the daemon does";
            return (None, Check::warning(NAME, found, remedy));
        }
        _ => {}
    }
    match Config::read(path) {
        Ok(config) if path == usual => (Some(config), Check::ok(NAME, format!("/{CONFIG}"))),
        Ok(config) => (Some(config), Check::ok(NAME, path.display().to_string())),
        Err(error) => (None, broken(NAME, &error)),
    }
}

/// What of it would not work.
pub(super) fn checks(host: &Host) -> Vec<Check> {
    let Some(config) = &host.config else {
        return Vec::new();
    };
    if !host.live() {
        // Files and devices are not those of this system; who uses a port can be read.
        let ports = config.serials.iter().map(|serial| serial.as_ref());
        let used = ports.filter_map(|port| serial::other_user(host.root, &port.device));
        return used.map(|error| warning("serial", &error)).collect();
    }
    let mut checks: Vec<Check> = check::findings(config, host.root)
        .into_iter()
        .map(|finding| match finding.outcome {
            Outcome::Fine(found) => Check::ok(finding.about, found),
            Outcome::Doubtful(error) => warning(finding.about, &error),
            Outcome::Wrong(error) => broken(finding.about, &error),
        })
        .collect();
    checks.extend(hidden(host, config));
    let sound = checks.iter().all(|check| check.status != Status::Broken);
    if let Some(user) = other_user(host) {
        // What this user may not do the daemon may be allowed to.
        for remedy in checks.iter_mut().filter_map(|check| check.remedy.as_mut()) {
            *remedy += &format!(" (looked at as another user than the daemon's: sudo -u {user})");
        }
    }
    if sound {
        checks.extend(budget(host, config));
    }
    checks
}

/// Models that the unit hides from the daemon.
fn hidden(host: &Host, config: &Config) -> Option<Check> {
    unit_file(host).filter(|text| text.contains("ProtectHome=yes"))?;
    let paths = config.models.iter().map(|model| &model.as_ref().path);
    let mut paths = paths.map(|path| std::fs::canonicalize(path).unwrap_or_else(|_| path.clone()));
    let path = paths.find(|path| HIDDEN.iter().any(|folder| path.starts_with(folder)))?;
    Some(Check::warning(
        "model",
        format!("the unit hides {} from the daemon", path.display()),
        "move it to /var/lib/airstream/models, or write `ProtectHome=read-only` in a drop-in (systemctl edit airstream)",
    ))
}

/// How the budget is divided among the models of the start.
fn budget(host: &Host, config: &Config) -> Vec<Check> {
    let name = "budget";
    let mut options = engine::options(config);
    options.memory_most = Some(detect::memory_default(
        &host.board,
        host.root,
        host.daemon_bytes,
    ));
    match engine::plan(config, &options) {
        Err(error) => vec![broken(name, &error)],
        Ok(budget) => {
            let used = budget.lines.iter().map(|line| line.bytes).sum();
            let found = format!(
                "{} of {}, for the models of the start",
                report::bytes(used),
                report::bytes(budget.bytes)
            );
            let warnings = budget.warnings.into_iter().map(|beyond| {
                Check::warning("context", beyond, "give the model a smaller `context`")
            });
            [Check::ok(name, found)]
                .into_iter()
                .chain(warnings)
                .collect()
        }
    }
}

/// A GPU that the configuration insists on has to be there, where others can do without.
pub(super) fn insist(host: &Host, cuda: Check) -> Check {
    let insists = |config: &Config| config.device == DeviceChoice::Cuda;
    if !host.live() || !host.config.as_ref().is_some_and(insists) {
        return cuda;
    }
    if !cfg!(feature = "cuda") {
        return Check::broken(
            cuda.name,
            "`device = \"cuda\"`, and this airstream was built without",
            "write `device = \"auto\"`, or install one that was built with CUDA",
        );
    }
    match cuda.status {
        Status::Ok => cuda,
        _ => Check::broken(
            cuda.name,
            cuda.found + ", and `device` is \"cuda\"",
            cuda.remedy
                .unwrap_or_else(|| "write `device = \"auto\"`".into()),
        ),
    }
}

/// The daemon's user by its unit, if this is another one who is not root.
fn other_user(host: &Host) -> Option<String> {
    let unit = unit_file(host)?;
    let user = unit.lines().find_map(|line| line.strip_prefix("User="))?;
    let own = User::from_uid(Uid::effective()).ok().flatten();
    (own.is_none_or(|own| own.name != user && !own.uid.is_root())).then(|| user.to_owned())
}

fn broken(name: &'static str, error: &Error) -> Check {
    Check::broken(name, error.what(), in_keys(error.remedy()))
}

fn warning(name: &'static str, error: &Error) -> Check {
    Check::warning(name, error.what(), in_keys(error.remedy()))
}
