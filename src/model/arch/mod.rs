//! The architectures: one file each, and its line in [`ALL`].

mod gemma3;
mod llama;
mod qwen2;
mod qwen3;

use crate::error::Result;
use crate::format::gguf::Gguf;
use crate::model::config::Config;

/// How one architecture differs from what all share.
pub struct Architecture {
    /// Its name in `general.architecture`.
    pub name: &'static str,
    /// Sets what differs, in a configuration that holds what all share.
    pub configure: fn(&Gguf, &mut Config) -> Result<()>,
}

/// Every architecture that airstream runs.
pub const ALL: [Architecture; 4] = [
    llama::ARCHITECTURE,
    qwen2::ARCHITECTURE,
    qwen3::ARCHITECTURE,
    gemma3::ARCHITECTURE,
];
