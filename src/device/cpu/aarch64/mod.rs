//! aarch64: NEON with dot products.
#![cfg(target_arch = "aarch64")]

mod neon;
mod quarter;

pub(super) use neon::KERNELS as NEON;

/// Whether the processor has what the NEON kernels use.
pub(super) fn neon_available() -> bool {
    std::arch::is_aarch64_feature_detected!("neon")
        && std::arch::is_aarch64_feature_detected!("dotprod")
}
