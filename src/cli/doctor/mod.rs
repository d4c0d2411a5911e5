//! `airstream doctor`: a checklist of the machine, with a remedy on each line that needs one.

mod cuda;
mod disk;
mod service;
mod system;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use serde::Serialize;

use super::args::parse_size;
use super::report;
use crate::board::{Board, detect};
use crate::error::Result;
use crate::serve::config::Config;

/// Check whether this machine is set up to run models well, and say what to change.
///
/// Exits with 0 if nothing is broken (warnings cost speed or convenience only), else with 1.
#[derive(Args)]
pub struct Doctor {
    /// The model file that will be run; its drive is measured.
    #[arg(long, value_name = "FILE")]
    model: Option<PathBuf>,
    /// The memory that it will be given. Default: what the daemon's configuration says, or as `run` takes.
    #[arg(short, long, value_name = "SIZE", value_parser = parse_size)]
    memory: Option<u64>,
    /// The daemon's configuration. Default: /etc/airstream/airstream.toml, if it is there.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The board. Default: recognised.
    #[arg(long, value_name = "NAME")]
    board: Option<String>,
    /// Where /proc, /sys and /etc are, for tests; nothing is tried out under another root than /.
    #[arg(long, hide = true, value_name = "DIR", default_value = "/")]
    root: PathBuf,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// How a check ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    /// As it should be.
    Ok,
    /// Works, but slower or less conveniently than it could.
    Warning,
    /// Does not work.
    Broken,
    /// Not tried, or not there and not needed.
    Skipped,
}

/// One line of the list.
#[derive(Debug, Serialize)]
struct Check {
    name: &'static str,
    status: Status,
    found: String,
    remedy: Option<String>,
}

impl Check {
    fn ok(name: &'static str, found: impl Into<String>) -> Check {
        Check::new(name, Status::Ok, found, None)
    }

    fn skipped(name: &'static str, found: impl Into<String>) -> Check {
        Check::new(name, Status::Skipped, found, None)
    }

    fn warning(name: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Check {
        Check::new(name, Status::Warning, found, Some(remedy.into()))
    }

    fn broken(name: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Check {
        Check::new(name, Status::Broken, found, Some(remedy.into()))
    }

    fn new(
        name: &'static str,
        status: Status,
        found: impl Into<String>,
        remedy: Option<String>,
    ) -> Check {
        Check {
            name,
            status,
            found: found.into(),
            remedy,
        }
    }
}

/// What the checks look at.
struct Host<'a> {
    root: &'a Path,
    board: Board,
    model: Option<&'a Path>,
    /// The budget that a run would have.
    memory: u64,
    memory_asked: bool,
    /// What the daemon will run with; none if there is none, or an unsound one.
    config: Option<Config>,
    /// What the daemon holds, which a run would have in its place; 0 if it does not run.
    daemon_bytes: u64,
}

impl Host<'_> {
    /// Whether this is the running system, on which things can be tried out.
    fn live(&self) -> bool {
        self.root == Path::new("/")
    }

    /// The text of a file under the root.
    fn text(&self, path: &str) -> Option<String> {
        std::fs::read_to_string(self.root.join(path))
            .ok()
            .map(|text| text.trim_matches(['\0', '\n', ' ']).to_owned())
    }
}

#[derive(Serialize)]
struct Summary<'a> {
    board: &'a str,
    title: &'a str,
    memory: u64,
    broken: usize,
    warnings: usize,
    checks: &'a [Check],
}

impl Doctor {
    pub(super) fn run(self) -> Result<ExitCode> {
        let board = detect::board(&self.root, self.board.as_deref())?;
        let daemon_bytes = system::daemon_bytes(&self.root);
        let default = detect::memory_default(&board, &self.root, daemon_bytes);
        let (config, configuration) = service::read(&self.root, self.config.as_deref());
        let configured = config.as_ref().and_then(|config| config.memory);
        let memory = self.memory.or(configured.map(|size| size.0));
        let host = Host {
            config,
            daemon_bytes,
            root: &self.root,
            model: self.model.as_deref(),
            memory: memory.unwrap_or(default),
            memory_asked: memory.is_some(),
            board,
        };
        let mut checks = vec![system::board(&host), system::kernel(&host)];
        checks.extend(disk::checks(&host));
        checks.extend([
            system::locked_memory(&host),
            system::huge_pages(&host),
            system::free_memory(&host),
            system::swap(&host),
            system::desktop(&host),
            service::insist(&host, cuda::check(&host)),
            system::power(&host),
            system::temperature(&host),
            system::mode(&host),
            system::unit(&host),
            system::socket(&host),
            configuration,
        ]);
        checks.extend(service::checks(&host));
        let count = |status| checks.iter().filter(|c| c.status == status).count();
        let summary = Summary {
            board: &host.board.name,
            title: &host.board.title,
            memory: host.memory,
            broken: count(Status::Broken),
            warnings: count(Status::Warning),
            checks: &checks,
        };
        match self.json {
            true => report::print_json(&summary),
            false => print(&summary),
        }
        Ok(match summary.broken {
            0 => ExitCode::SUCCESS,
            _ => ExitCode::FAILURE,
        })
    }
}

fn print(summary: &Summary) {
    for check in summary.checks {
        let mark = match check.status {
            Status::Ok => "ok",
            Status::Warning => "warning",
            Status::Broken => "BROKEN",
            Status::Skipped => "-",
        };
        println!("{mark:<8} {:<14} {}", check.name, check.found);
        if let Some(remedy) = &check.remedy {
            println!("{:<23} -> {remedy}", "");
        }
    }
    println!("{} broken, {} warnings", summary.broken, summary.warnings);
}
