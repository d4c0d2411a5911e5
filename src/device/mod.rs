//! The ops a sweep needs, on a device.
#![allow(unsafe_code)]

pub mod cpu;
pub mod cuda;

use cpu::{
    Activation, Activations, AttentionRow, AttentionShape, Cpu, Heads, Inspect, Kinds, KvLayout,
    KvPlace, Residual, TileView,
};
use cuda::Cuda;
use cuda::driver::Driver;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use crate::arena::Plain;
use crate::error::{Error, Result};
use crate::format::quant::QuantType;

/// Which device a user asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceChoice {
    /// A GPU if there is one that can be used, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The GPU.
    Cuda,
}

impl DeviceChoice {
    /// The GPU's driver, if that is what computes.
    ///
    /// # Errors
    /// The GPU was asked for by name and cannot be used.
    pub fn open(self) -> Result<Option<Arc<dyn Driver>>> {
        match self {
            DeviceChoice::Cpu => Ok(None),
            DeviceChoice::Cuda => cuda::open().map(Some),
            // What was not built in is not missed.
            DeviceChoice::Auto if !cfg!(feature = "cuda") => Ok(None),
            DeviceChoice::Auto => match cuda::open() {
                Ok(driver) => Ok(Some(driver)),
                Err(error) => {
                    log::info!("the CPU computes: {error}");
                    Ok(None)
                }
            },
        }
    }
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "auto" => Ok(DeviceChoice::Auto),
            "cpu" => Ok(DeviceChoice::Cpu),
            "cuda" => Ok(DeviceChoice::Cuda),
            _ => Err("one of auto, cpu, cuda".into()),
        }
    }
}

/// Where a GPU computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placement {
    /// In the processor's memory, where reads land.
    Direct {
        /// Bytes that the driver has taken of it for itself.
        context: u64,
    },
    /// In its own memory, which tiles are copied to.
    Staged {
        /// Bytes of it that may be taken.
        memory: u64,
    },
}

impl Placement {
    /// What of a GPU's own memory may be taken; none if it computes in the processor's.
    pub fn gpu_memory(self) -> Option<u64> {
        match self {
            Placement::Direct { .. } => None,
            Placement::Staged { memory } => Some(memory),
        }
    }

    /// What of the processor's memory a GPU's driver has taken for itself.
    pub fn context_bytes(self) -> u64 {
        match self {
            Placement::Direct { context } => context,
            Placement::Staged { .. } => 0,
        }
    }
}

/// A token that may come next.
#[derive(Debug, Clone, Copy, PartialEq)]
#[repr(C)]
pub struct Likely {
    /// Its logit.
    pub logit: f32,
    /// The token.
    pub id: u32,
}
// SAFETY: two numbers.
unsafe impl Plain for Likely {}

/// Tokens that [`Device::likeliest`] finds in each row.
pub const LIKELIEST: usize = 64;

/// What computes. Ops on the CPU are done when they return; on a GPU after [`Device::finish`], and until then nobody
/// may touch what they use.
#[derive(Debug)]
pub enum Device {
    /// Threads of the processor.
    Cpu(Cpu),
    /// A GPU, in the same memory or in its own.
    Cuda(Box<Cuda>),
}

/// An op that both have with the same arguments.
macro_rules! ops {
    ($($(#[$doc:meta])* fn $name:ident($($arg:ident: $type:ty),* $(,)?);)*) => {
        $(
            $(#[$doc])*
            pub fn $name(&self, $($arg: $type),*) {
                match self {
                    Device::Cpu(cpu) => cpu.$name($($arg),*),
                    Device::Cuda(cuda) => cuda.$name($($arg),*),
                }
            }
        )*
    };
}

impl Device {
    ops! {
        /// `x *= factor`.
        fn scale(x: &mut [f32], factor: f32);
        /// `x = cap * tanh(x / cap)`.
        fn softcap(x: &mut [f32], cap: f32);
    }

    /// Has what the processor has written to a buffer be what ops see of it.
    pub fn upload(&self, written: &[f32]) {
        if let Device::Cuda(cuda) = self {
            cuda.upload(written);
        }
    }

    /// Decodes rows of weights that lie in a GPU's own memory, as rows of `out`; null ones are left as they are. The CPU
    /// has no such rows.
    ///
    /// # Safety
    /// Rows that are not null hold as many values as one of `out`, and stay as they are until this is done.
    pub unsafe fn embed(&self, rows: &[*const u8], qtype: QuantType, out: &mut [f32]) {
        if let Device::Cuda(cuda) = self {
            // SAFETY: what this function asks for.
            unsafe { cuda.embed(rows, qtype, out) };
        }
    }

    /// Has what ops have made of a buffer be there for the processor, after [`Device::finish`].
    pub fn download<T: Plain>(&self, wanted: &mut [T]) {
        if let Device::Cuda(cuda) = self {
            cuda.download(wanted);
        }
    }

    /// Finds the [`LIKELIEST`] likeliest tokens of each row of `vocab` logits, likeliest first and of equals the lowest id
    /// first, for rows of `out`; what is not a number, or minus infinity, is none of them, and where there are fewer the
    /// rest has minus infinity. False on the CPU, which does nothing: all logits are at hand there.
    pub fn likeliest(&self, logits: &[f32], vocab: usize, out: &mut [Likely]) -> bool {
        match self {
            Device::Cpu(_) => false,
            Device::Cuda(cuda) => {
                cuda.likeliest(logits, vocab, out);
                true
            }
        }
    }

    /// Copies a KV page of `bytes`, between sweeps.
    ///
    /// # Safety
    /// Both are pages of so many bytes, of which nobody writes the one or uses the other.
    pub unsafe fn copy_page(&self, from: *const u8, to: *mut u8, bytes: usize) {
        // SAFETY: what this function asks for; the processor can touch pages unless the GPU has memory of its own.
        unsafe {
            match self {
                Device::Cuda(cuda) if cuda.is_staged() => cuda.copy_page(from, to, bytes),
                _ => std::ptr::copy_nonoverlapping(from, to, bytes),
            }
        }
    }

    /// `to = from`.
    pub fn copy(&self, from: &[f32], to: &mut [f32]) {
        match self {
            Device::Cpu(_) => to.copy_from_slice(from),
            Device::Cuda(cuda) => cuda.copy(from, to),
        }
    }

    /// Adds to the residual stream, norms it and quantizes what that gives into `kinds`, for the products that follow
    /// ([`Cpu::norm_quantize`]).
    pub fn norm_quantize(&self, residual: Residual<'_>, kinds: Kinds, into: &mut Activations) {
        match self {
            Device::Cpu(cpu) => cpu.norm_quantize(residual, kinds, into),
            // It has memory of its own for them.
            Device::Cuda(cuda) => cuda.norm_quantize(residual, kinds),
        }
    }

    /// Quantizes `activation(gate) * up` (rows x `cols`) into `kinds`, for the products that follow.
    pub fn gate_quantize(
        &self,
        activation: Activation,
        gate_up: (&[f32], &[f32]),
        cols: usize,
        kinds: Kinds,
        into: &mut Activations,
    ) {
        match self {
            Device::Cpu(cpu) => cpu.gate_quantize(activation, gate_up, cols, kinds, into),
            Device::Cuda(cuda) => cuda.gate_quantize(activation, gate_up, cols, kinds),
        }
    }

    /// Multiplies every row that was quantized last, into `x`, with every tile ([`Cpu::matmul`]). Tiles that do not
    /// stay are done with when this returns.
    ///
    /// # Safety
    /// Tiles' data and outputs are valid, disjoint, and used by nobody else until they are done with.
    pub unsafe fn matmul(
        &self,
        tiles: &[TileView],
        x: &Activations,
        inspect: &Inspect<'_>,
        poll: &mut dyn FnMut(),
    ) {
        // SAFETY: what this function asks for.
        unsafe {
            match self {
                Device::Cpu(cpu) => cpu.matmul(tiles, x, inspect, poll),
                Device::Cuda(cuda) => cuda.matmul(tiles, inspect, poll),
            }
        }
    }

    /// Makes queries ready for attention, and writes keys and values to their places ([`Cpu::place_heads`]).
    ///
    /// # Safety
    /// Pages have the layout's size; no two rows have the same place.
    pub unsafe fn place_heads(&self, heads: Heads<'_>, layout: &KvLayout, places: &[KvPlace]) {
        // SAFETY: what this function asks for.
        unsafe {
            match self {
                Device::Cpu(cpu) => cpu.place_heads(heads, layout, places),
                Device::Cuda(cuda) => cuda.place_heads(heads, layout, places),
            }
        }
    }

    /// Attention of every row over its pages, quantized into `kinds` for the products that follow
    /// ([`Cpu::attention_quantize`]); the rows' queries, and their outputs, lie one behind the other, and rows of one
    /// session stand in the order of their positions. Outputs are memory to work in.
    ///
    /// # Safety
    /// As for [`Cpu::attention`].
    pub unsafe fn attention_quantize(
        &self,
        rows: &[AttentionRow],
        shape: &AttentionShape,
        kinds: Kinds,
        into: &mut Activations,
    ) {
        // SAFETY: what this function asks for.
        unsafe {
            match self {
                Device::Cpu(cpu) => cpu.attention_quantize(rows, shape, kinds, into),
                Device::Cuda(cuda) => cuda.attention_quantize(rows, shape, kinds),
            }
        }
    }

    /// Waits until all is done; `poll` is called meanwhile.
    ///
    /// # Errors
    /// The GPU failed at something; it does nothing any more.
    pub fn finish(&self, poll: &mut dyn FnMut()) -> Result<()> {
        match self {
            Device::Cpu(_) => Ok(()),
            Device::Cuda(cuda) => cuda.finish(poll),
        }
    }

    /// Why a GPU does nothing any more; none while it works.
    pub fn failure(&self) -> Option<Error> {
        match self {
            Device::Cpu(_) => None,
            Device::Cuda(cuda) => cuda.failure(),
        }
    }

    /// Its instruction set, or the GPU's name.
    pub fn name(&self) -> String {
        match self {
            Device::Cpu(cpu) => cpu.isa().to_string(),
            Device::Cuda(cuda) => cuda.facts().name.clone(),
        }
    }

    /// Threads of the processor that compute; the engine's own is one of them.
    pub fn threads(&self) -> usize {
        match self {
            Device::Cpu(cpu) => cpu.threads(),
            Device::Cuda(_) => 1,
        }
    }

    /// Lets at most as many of its threads compute as `allowed` says at any time ([`Cpu::follow_threads`]); nothing to a
    /// GPU.
    pub fn follow_threads(&mut self, allowed: Arc<AtomicU32>) {
        if let Device::Cpu(cpu) = self {
            cpu.follow_threads(allowed);
        }
    }

    /// What computes, in a few words.
    pub fn describe(&self) -> String {
        match self {
            Device::Cpu(cpu) => format!("{} threads, {}", cpu.threads(), cpu.isa()),
            Device::Cuda(cuda) => {
                let facts = cuda.facts();
                let memory = match facts.integrated {
                    true => "shared memory",
                    false => "memory of its own",
                };
                let (major, minor) = facts.capability;
                format!(
                    "{} (compute capability {major}.{minor}), {memory}",
                    facts.name
                )
            }
        }
    }

    /// Bytes per second that a GPU reads of the memory it computes in, as measured now; none on the CPU.
    ///
    /// # Errors
    /// The GPU fails.
    pub fn gpu_read_rate(&self) -> Result<Option<f64>> {
        match self {
            Device::Cpu(_) => Ok(None),
            Device::Cuda(cuda) => cuda.read_rate().map(Some),
        }
    }

    /// Bytes per second that go into a GPU's own memory, as measured now; none if there is none.
    ///
    /// # Errors
    /// The GPU fails.
    pub fn gpu_copy_rate(&self) -> Result<Option<f64>> {
        match self {
            Device::Cpu(_) => Ok(None),
            Device::Cuda(cuda) => cuda.copy_rate(),
        }
    }

    /// Whether tiles that stay are packed where they lie.
    pub fn packs(&self) -> bool {
        matches!(self, Device::Cpu(_))
    }
}
