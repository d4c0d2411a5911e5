//! The subcommands of the airstream binary, one file each.

pub mod fetch;
