//! Models of different sizes that say the same.

use std::path::Path;

use super::support::gguf_writer::GgufWriter;
use super::support::synth::{SynthSpec, file_of};

/// Writes the model of `spec` to `large`, but so that only its first layer does anything, and to `small` what is left
/// without the other layers.
pub fn write_pair(spec: &SynthSpec, large: &Path, small: &Path) -> std::io::Result<()> {
    let mut file = file_of(spec, |_| ());
    let goes = |name: &str| name.starts_with("blk.") && !name.starts_with("blk.0.");
    for tensor in &mut file.tensors {
        let adds = ["attn_output", "ffn_down"].map(|name| tensor.name.contains(name));
        if goes(&tensor.name) && adds.contains(&true) {
            tensor.data.fill(0);
        }
    }
    std::fs::write(large, file.to_bytes())?;
    let mut first = GgufWriter::new();
    first.entries = file.entries;
    for (key, _, value) in &mut first.entries {
        if key.ends_with(".block_count") {
            *value = 1_u32.to_le_bytes().to_vec();
        }
    }
    for tensor in file.tensors {
        if !goes(&tensor.name) {
            first.push(&tensor.name, &tensor.dims, tensor.ggml_type, tensor.data);
        }
    }
    std::fs::write(small, first.to_bytes())
}
