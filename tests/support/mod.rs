//! What several test binaries share.

pub mod gguf_writer;
pub mod synth;
pub mod weights;
