//! Qwen 3: q and k normed per head, no biases.

use super::Architecture;

pub(super) const ARCHITECTURE: Architecture = Architecture {
    name: "qwen3",
    configure: |_, config| {
        config.qk_norm = true;
        Ok(())
    },
};
