//! The airstream command line.

use std::process::ExitCode;

fn main() -> ExitCode {
    airstream::cli::main()
}
