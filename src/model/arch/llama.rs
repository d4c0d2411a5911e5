//! Llama 2 and 3, Mistral, SmolLM2: the plain case, with adjacent rotary pairs.
//!
//! Llama 3's context scaling comes as a tensor of factors, `rope_freqs.weight`.

use super::Architecture;
use crate::device::cpu::RopePairing;

pub(super) const ARCHITECTURE: Architecture = Architecture {
    name: "llama",
    configure: |_, config| {
        config.pairing = RopePairing::Adjacent;
        Ok(())
    },
};
