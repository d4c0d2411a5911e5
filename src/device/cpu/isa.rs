//! Instruction sets: which one runs, detected once.

use super::kernels::Kernels;
use crate::error::{Error, Kind, Result};
use std::fmt;
use std::str::FromStr;

/// An instruction set that the kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isa {
    /// Plain Rust, on any processor.
    Scalar,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ, VL and VNNI.
    Avx512,
    /// aarch64 with NEON and dot products of bytes.
    Neon,
    /// The same with products of matrices of bytes.
    I8mm,
}

impl Isa {
    /// Every instruction set, fastest last.
    pub const ALL: [Isa; 5] = [Isa::Scalar, Isa::Avx2, Isa::Avx512, Isa::Neon, Isa::I8mm];

    /// Whether this processor has it.
    pub fn available(self) -> bool {
        match self {
            Isa::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => super::x86_64::avx2_available(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => super::x86_64::avx512_available(),
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Avx2 | Isa::Avx512 => false,
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => super::aarch64::neon_available(),
            #[cfg(target_arch = "aarch64")]
            Isa::I8mm => super::aarch64::i8mm_available(),
            #[cfg(not(target_arch = "aarch64"))]
            Isa::Neon | Isa::I8mm => false,
        }
    }

    /// The fastest one that this processor has.
    pub fn detect() -> Isa {
        Isa::ALL
            .into_iter()
            .rev()
            .find(|isa| isa.available())
            .unwrap_or(Isa::Scalar)
    }

    /// Its kernels; none where this processor does not have it.
    pub(super) fn kernels(self) -> Option<&'static Kernels> {
        match self {
            Isa::Scalar => Some(&super::portable::KERNELS),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => self.available().then_some(&super::x86_64::AVX2),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => self.available().then_some(&super::x86_64::AVX512),
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Avx2 | Isa::Avx512 => None,
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => self.available().then_some(&super::aarch64::NEON),
            #[cfg(target_arch = "aarch64")]
            Isa::I8mm => self.available().then_some(&super::aarch64::I8MM),
            #[cfg(not(target_arch = "aarch64"))]
            Isa::Neon | Isa::I8mm => None,
        }
    }

    /// Its name on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Neon => "neon",
            Isa::I8mm => "i8mm",
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Isa {
    type Err = Error;
    fn from_str(name: &str) -> Result<Isa> {
        Isa::ALL
            .into_iter()
            .find(|isa| isa.name() == name)
            .ok_or_else(|| {
                let names = Isa::ALL.map(Isa::name).join(", ");
                Error::new(
                    Kind::Usage,
                    format!("no instruction set is named {name:?}"),
                    format!("use one of {names}"),
                )
            })
    }
}
