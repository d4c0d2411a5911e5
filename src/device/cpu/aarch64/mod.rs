//! aarch64: NEON with dot products, and with products of matrices.
#![cfg(target_arch = "aarch64")]

mod i8mm;
mod neon;
mod quarter;

pub(super) use i8mm::KERNELS as I8MM;
pub(super) use neon::KERNELS as NEON;

/// Whether the processor has what the NEON kernels use.
pub(super) fn neon_available() -> bool {
    std::arch::is_aarch64_feature_detected!("neon")
        && std::arch::is_aarch64_feature_detected!("dotprod")
}

/// Whether the processor has what the kernels with products of matrices use.
pub(super) fn i8mm_available() -> bool {
    neon_available() && std::arch::is_aarch64_feature_detected!("i8mm")
}
