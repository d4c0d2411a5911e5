//! Writes the man pages and the shells' completions of the `airstream` command, for the package. An example and not a
//! subcommand, so that the generators stay out of the robot's binary:
//!
//! ```text
//! cargo run --example manual -- FOLDER
//! ```

use std::fs;
use std::io;
use std::path::PathBuf;

use clap_complete::Shell;

fn main() -> io::Result<()> {
    let folder = std::env::args_os().nth(1).map(PathBuf::from);
    let folder = folder.ok_or_else(|| io::Error::other("name the folder to write to"))?;
    let command = airstream::cli::command();

    let pages = folder.join("man");
    fs::create_dir_all(&pages)?;
    clap_mangen::generate_to(command.clone(), &pages)?;

    let completions = folder.join("completions");
    fs::create_dir_all(&completions)?;
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        clap_complete::generate_to(shell, &mut command.clone(), "airstream", &completions)?;
    }
    Ok(())
}
