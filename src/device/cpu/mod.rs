//! The CPU device: a pool of threads and kernels for its instruction set.
//!
//! # How a matrix is multiplied
//!
//! Activations are quantized once per row (`quantize`, laid out by
//! `activations`). A tile is cut into strips of 16 rows, and a strip is
//! transposed (`pack`) so that a vector of 16 lanes holds the same dword of 16
//! rows: a tile that stays is packed in its slot the first time it is used, a
//! streamed one into scratch each time. A kernel (`strip`) takes one packed
//! strip and up to 8 activation rows through the whole width of the matrix,
//! reading the weights through a codec (`codec_32`, `codec_256`); with AVX-512 and
//! on aarch64 the dot products are taken in another order (`groups_first`,
//! `weights_first`). Threads (`pool`) share out runs of strips (`matmul`).
//!
//! Kernels are written once over the trait in `vector`; `portable`,
//! `x86_64` and `aarch64` implement it, and the results of all are the same bit for bit.

mod aarch64;
mod activations;
mod attend;
mod codec_256;
mod codec_32;
mod groups_first;
mod heads;
mod isa;
mod kernels;
mod kv;
mod matmul;
mod measure;
mod ops;
mod pack;
mod pool;
mod portable;
mod precision;
mod quantize;
mod row_ops;
mod small_ops;
mod strip;
mod vector;
mod weights_first;
mod x86_64;

#[cfg(test)]
mod tests;

pub use activations::{Activations, Kinds};
pub use heads::{Heads, RopePairing};
pub use isa::Isa;
pub use kv::{AttentionRow, AttentionShape, KvLayout, KvPlace};
pub use matmul::{Inspect, TileView};
pub use measure::fastest;
pub use pack::unpack_row;
pub use pool::THREADS_MAX;
pub use precision::Precision;
pub use row_ops::{Activation, Added, Residual};

use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use crate::error::{Error, Kind, Result};
use kernels::Kernels;
use matmul::Scratch;
use pool::Pool;

/// The CPU: a pool of threads and the kernels for its instruction set.
///
/// One thread at a time gives it work (it is `Send`, not `Sync`). No op
/// allocates or fails; sizes that disagree are a bug of the caller and panic.
pub struct Cpu {
    isa: Isa,
    kernels: &'static Kernels,
    pool: Pool,
    scratch: Scratch,
}

impl std::fmt::Debug for Cpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cpu")
            .field("isa", &self.isa)
            .field("threads", &self.threads())
            .finish_non_exhaustive()
    }
}

impl Cpu {
    /// A device with `threads` threads (the caller is one of them), for weight rows of at most
    /// `row_bytes_max` bytes. Allocates [`Cpu::scratch_bytes`].
    pub fn new(threads: usize, isa: Isa, row_bytes_max: usize) -> Result<Cpu> {
        let Some(kernels) = isa.kernels() else {
            let what = format!("this processor does not have {isa}");
            return Err(Error::new(
                Kind::Usage,
                what,
                format!("leave the choice out, or use {}", Isa::detect()),
            ));
        };
        Ok(Cpu {
            isa,
            kernels,
            pool: Pool::new(threads)?,
            scratch: Scratch::new(threads, row_bytes_max),
        })
    }

    /// Takes scratch for other models from now on, whose weight rows have at most `row_bytes_max` bytes.
    pub fn set_row_bytes_max(&mut self, row_bytes_max: usize) {
        self.scratch = Scratch::new(self.pool.workers(), row_bytes_max);
    }

    /// Bytes that [`Cpu::new`] allocates for scratch: one strip of 16 rows per thread.
    pub const fn scratch_bytes(threads: usize, row_bytes_max: usize) -> usize {
        Scratch::bytes(threads, row_bytes_max)
    }

    /// Threads that work, the caller among them.
    pub fn threads(&self) -> usize {
        self.pool.workers()
    }

    /// Lets only so many threads take part from now on as `allowed` says when a part of an op begins, at least one;
    /// results stay the same.
    pub fn follow_threads(&mut self, allowed: Arc<AtomicU32>) {
        self.pool.follow(allowed);
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }
}
