//! The airstream command line.

fn main() {}
