//! Models: what they are (config, architectures, weights), and the forward pass, written once.

pub mod arch;
pub mod config;
pub mod forward;
pub mod kv;
pub mod rope;
pub mod weights;
