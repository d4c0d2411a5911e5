//! Qwen 2 and 2.5: biases on q, k and v.

use super::Architecture;

pub(super) const ARCHITECTURE: Architecture = Architecture {
    name: "qwen2",
    configure: |_, config| {
        config.qkv_bias = true;
        Ok(())
    },
};
