//! Model files: GGUF metadata, quant block layouts, and how matrices become tiles.

pub mod checksum;
pub mod gguf;
pub mod quant;
pub mod tile;
