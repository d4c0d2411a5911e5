//! The subcommands of the airstream binary, one file each.
//!
//! Results go to stdout, everything else to stderr.

mod args;
mod ask;
mod bench;
mod bench_decode;
mod bench_io;
mod bench_ops;
mod bench_serve;
mod board;
mod doctor;
pub mod fetch;
mod inspect;
mod lines;
mod perplexity;
mod plan;
mod plan_board;
mod progress;
mod question;
mod report;
mod run;
mod serve;
mod status;
mod stop;
mod tell;

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use log::{Level, Record};

use crate::error::{Error, Result};

/// Runs language models that are bigger than memory.
///
/// airstream streams quantized GGUF weights from NVMe by direct reads into one fixed
/// arena and computes on them where they land. --memory is a promise: weights, context,
/// buffers and tables together never take more.
#[derive(Parser)]
#[command(name = "airstream", version, max_term_width = 100)]
struct Cli {
    /// Say more on stderr: once for what is done, twice for details.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Answer a prompt, or chat.
    Run(run::Run),
    /// Answer programs and people on sockets, serial ports and HTTP.
    Serve(serve::Serve),
    /// Ask a daemon.
    Ask(ask::Ask),
    /// Show how a daemon is.
    Status(status::StatusArgs),
    /// Tell a daemon to load or unload a model, forget a conversation, or change its budget.
    Tell(tell::Tell),
    /// Show what a model file holds, and what would stream at a given budget.
    Inspect(inspect::Inspect),
    /// Show how a budget would be divided and how fast it would run, without running.
    Plan(plan::PlanArgs),
    /// Measure the speed of prefill (pp) and decode (tg), or of the disk.
    Bench(bench::Bench),
    /// Check whether this machine is set up to run models well.
    Doctor(doctor::Doctor),
    /// Measure how well a model predicts a text, or write its logits.
    Perplexity(perplexity::Perplexity),
}

/// The command line, for what describes it: man pages, completions.
pub fn command() -> clap::Command {
    Cli::command()
}

/// Writes a record as systemd's journal reads it: each line begins with its priority (sd-daemon(3)).
fn journal_line(to: &mut env_logger::fmt::Formatter, record: &Record) -> io::Result<()> {
    let priority = match record.level() {
        Level::Error => 3,
        Level::Warn => 4,
        Level::Info => 6,
        Level::Debug | Level::Trace => 7,
    };
    for line in record.args().to_string().lines() {
        writeln!(to, "<{priority}>{line}")?;
    }
    Ok(())
}

/// Parses the command line and runs it.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let level = match cli.verbose {
        // A daemon has nobody to talk to but its log.
        0 if matches!(cli.command, Command::Serve(_)) => "info",
        0 => "warn",
        1 => "info",
        _ => "debug",
    };
    let mut logger =
        env_logger::Builder::from_env(env_logger::Env::default().default_filter_or(level));
    logger.format_timestamp(None);
    if std::env::var_os("JOURNAL_STREAM").is_some() && !io::stderr().is_terminal() {
        logger.format(journal_line);
    }
    logger.init();
    // The others notice it themselves, and have something left to do then.
    if !matches!(
        cli.command,
        Command::Run(_)
            | Command::Serve(_)
            | Command::Ask(_)
            | Command::Status(_)
            | Command::Tell(_)
    ) {
        stop::with_the_reader();
    }
    let done: Result<()> = match cli.command {
        Command::Run(command) => match command.run() {
            Ok(code) => return code,
            Err(error) => Err(error),
        },
        Command::Serve(command) => return serve::end(command.run()),
        Command::Ask(command) => match command.run() {
            Ok(code) => return code,
            Err(error) => Err(error),
        },
        Command::Status(command) => command.run(),
        Command::Tell(command) => command.run(),
        Command::Inspect(command) => command.run(),
        Command::Plan(command) => command.run(),
        Command::Bench(command) => command.run(),
        Command::Doctor(command) => match command.run() {
            Ok(code) => return code,
            Err(error) => Err(error),
        },
        Command::Perplexity(command) => command.run(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error, ExitCode::FAILURE),
    }
}

/// Tells of an error; the exit status.
fn fail(error: &Error, status: ExitCode) -> ExitCode {
    eprintln!("airstream: {error}");
    status
}
