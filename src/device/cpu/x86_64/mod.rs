//! x86-64: AVX2 and AVX-512.
#![cfg(target_arch = "x86_64")]

mod avx2;
mod avx512;

pub(super) use avx2::KERNELS as AVX2;
pub(super) use avx512::KERNELS as AVX512;

/// Whether the processor has what the AVX2 kernels use.
pub(super) fn avx2_available() -> bool {
    is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
}

/// Whether the processor has what the AVX-512 kernels use.
pub(super) fn avx512_available() -> bool {
    avx2_available()
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512vnni")
}
