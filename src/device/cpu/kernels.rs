//! The table of kernels of an instruction set.
#![allow(unsafe_code)]

use super::attend::AttendFn;
use super::measure::{DotsFn, ReadFn};
use super::pack::PackFn;
use super::quantize::QuantizeFn;
use super::small_ops::{AddFn, GateFn, KvFn, NormFn, RopeFn, UnaryFn, WeighFn};
use super::strip::StripFn;

/// Functions compiled for one instruction set. To call one, the processor must have it.
pub(super) struct Kernels {
    /// By weight type (`QuantType as usize`) and `Precision`, then for panels of 1, 2, 4 and 8 rows.
    pub strips: [[[StripFn; 4]; 2]; 13],
    pub pack_strip: PackFn,
    /// By `Precision`.
    pub quantize_32: [QuantizeFn; 2],
    /// By `Precision`.
    pub quantize_256: [QuantizeFn; 2],
    pub norm: NormFn,
    pub weigh: WeighFn,
    pub add: AddFn,
    pub silu_mul: GateFn,
    pub gelu_tanh_mul: GateFn,
    pub scale: UnaryFn,
    pub softcap: UnaryFn,
    pub rope: RopeFn,
    pub kv_head: KvFn,
    pub attend: AttendFn,
    pub dots: DotsFn,
    pub read: ReadFn,
}

/// Compiles one function with some attributes: its body is a generic one, inlined.
macro_rules! compiled {
    (
        $(#[$attribute:meta])*
        fn $name:ident[$($generics:tt)*]($($arg:ident: $type:ty),*) $(-> $result:ty)? = $body:expr
    ) => {
        // SAFETY: this function asks of its caller what the generic one asks.
        $(#[$attribute])*
        unsafe fn $name<$($generics)*>($($arg: $type),*) $(-> $result)? {
            // SAFETY: as above.
            unsafe { $body($($arg),*) }
        }
    };
}

/// Compiles one kernel for strips with some attributes. A vector of several parts takes some columns
/// with each part in turn, then the next columns.
macro_rules! compiled_strip {
    (
        $(#[$attribute:meta])*
        fn $name:ident[$codec:ident; $first:ty $(, $part:ty)*]
    ) => {
        // SAFETY: this function asks of its caller what `StripFn` asks.
        $(#[$attribute])*
        unsafe fn $name<
            C: $codec<$first> $(+ $codec<$part>)*,
            const R: usize,
            const BITS: u32
        >(
            p: *const u8,
            cols: usize,
            panel: *const u8,
            out: *mut f32,
            stride: usize,
            resume: bool,
        ) {
            let parts = 1 $(+ { let _: Option<$part>; 1 })*;
            let run = if parts == 1 { cols } else { strip::RUN_COLS };
            let mut place = (p, panel);
            let mut sums: strip::Sums<R> = [[0.0; 16]; R];
            if resume {
                // SAFETY: as above.
                sums = unsafe { strip::load(out, stride) };
            }
            let mut left = cols;
            while left > 0 {
                let cols = run.min(left);
                // SAFETY: as above; the runs are one behind the other.
                unsafe {
                    let behind = strip::$name::<$first, C, R, BITS>(place, cols, &mut sums);
                    $(strip::$name::<$part, C, R, BITS>(place, cols, &mut sums);)*
                    place = behind;
                }
                left -= cols;
            }
            // SAFETY: as above.
            unsafe { strip::store(&sums, out, stride) }
        }
    };
}

/// Compiles every kernel for one [`Vector`](super::vector::Vector), with the attributes that its
/// instruction set needs, and collects them in `KERNELS`. Where panels of several rows ask for more
/// registers than there are, strips are taken by vectors that hold a part of the lanes each.
macro_rules! kernels {
    ($(#[$attribute:meta])* $vector:ty) => {
        $crate::device::cpu::kernels::kernels!($(#[$attribute])* $vector, strips by $vector);
    };
    ($(#[$attribute:meta])* $vector:ty, strips by $($part:ty),+) => {
        mod table {
            use super::*;
            use crate::device::cpu::attend::{self, Query, Shared};
            use crate::device::cpu::codec_32::{self as c32, Codec32};
            use crate::device::cpu::codec_256::{self as c256, Codec256};
            use crate::device::cpu::kernels::{Kernels, compiled, compiled_strip};
            use crate::device::cpu::precision::{BITS_8, BITS_12};
            use crate::device::cpu::strip::{self, CodecFloat};
            use crate::device::cpu::{measure, pack, quantize, small_ops};
            use crate::format::quant::QuantType;

            compiled_strip! { $(#[$attribute])* fn blocks_32[Codec32; $($part),+] }
            compiled_strip! { $(#[$attribute])* fn blocks_256[Codec256; $($part),+] }
            compiled_strip! { $(#[$attribute])* fn floats[CodecFloat; $($part),+] }
            compiled! {
                $(#[$attribute])*
                fn pack_strip[](
                    qtype: QuantType, row_bytes: usize, rows: usize, from: *const u8, to: *mut u8
                ) = pack::pack_strip::<$vector>
            }
            compiled! {
                $(#[$attribute])*
                fn quantize_32[const BITS: u32](
                    x: *const f32, stride: usize, cols: usize, panel: *mut u8, rows: usize, row: usize
                ) = quantize::quantize_32::<$vector, BITS>
            }
            compiled! {
                $(#[$attribute])*
                fn quantize_256[const BITS: u32](
                    x: *const f32, stride: usize, cols: usize, panel: *mut u8, rows: usize, row: usize
                ) = quantize::quantize_256::<$vector, BITS>
            }
            compiled! {
                $(#[$attribute])*
                fn norm[](x: *const f32, n: usize, eps: f32) -> f32 = small_ops::norm::<$vector>
            }
            compiled! {
                $(#[$attribute])*
                fn weigh[](
                    x: *const f32, factor: f32, weight: *const f32, out: *mut f32, n: usize
                ) = small_ops::weigh::<$vector>
            }
            compiled! {
                $(#[$attribute])*
                fn add[](x: *mut f32, y: *const f32, n: usize) = small_ops::add::<$vector>
            }
            compiled! {
                $(#[$attribute])*
                fn silu_mul[](
                    gate: *const f32, up: *const f32, out: *mut f32, n: usize
                ) = small_ops::silu_mul::<$vector>
            }
            compiled! {
                $(#[$attribute])*
                fn gelu_tanh_mul[](
                    gate: *const f32, up: *const f32, out: *mut f32, n: usize
                ) = small_ops::gelu_tanh_mul::<$vector>
            }
            compiled! {
                $(#[$attribute])*
                fn scale[](x: *mut f32, n: usize, c: f32) = small_ops::scale::<$vector>
            }
            compiled! {
                $(#[$attribute])*
                fn softcap[](x: *mut f32, n: usize, c: f32) = small_ops::softcap::<$vector>
            }
            compiled! {
                $(#[$attribute])*
                fn rope[](
                    x: *mut f32, cos: *const f32, sin: *const f32, n: usize, adjacent: bool
                ) = small_ops::rope
            }
            compiled! {
                $(#[$attribute])*
                fn kv_head[](
                    k: *const f32, v: *const f32, head_dim: usize, to_k: *mut u8, to_v: *mut u8
                ) = small_ops::kv_head::<$vector>
            }
            compiled! {
                $(#[$attribute])*
                fn attend[](queries: &[Query], shared: &Shared) = attend::attend::<$vector>
            }

            compiled! {
                $(#[$attribute])*
                fn dots[](rounds: usize, a: *const i8, out: *mut u8) = measure::dots::<$vector>
            }
            compiled! {
                $(#[$attribute])*
                fn read[](bytes: usize, p: *const u8, out: *mut u8) = measure::read::<$vector>
            }

            /// The kernels of one codec for 1, 2, 4 and 8 rows, of each precision. Floats have but one.
            macro_rules! rows {
                (floats, $codec:ty) => { [rows!(floats, $codec, BITS_12); 2] };
                ($kernel:ident, $codec:ty) => {
                    [rows!($kernel, $codec, BITS_8), rows!($kernel, $codec, BITS_12)]
                };
                ($kernel:ident, $codec:ty, $bits:ident) => {
                    [
                        $kernel::<$codec, 1, $bits> as strip::StripFn,
                        $kernel::<$codec, 2, $bits>,
                        $kernel::<$codec, 4, $bits>,
                        $kernel::<$codec, 8, $bits>,
                    ]
                };
            }

            /// In the order of `QuantType`.
            pub(in crate::device::cpu) static KERNELS: Kernels = Kernels {
                strips: [
                    rows!(floats, strip::F32),
                    rows!(floats, strip::F16),
                    rows!(floats, strip::BF16),
                    rows!(blocks_32, c32::Q4_0),
                    rows!(blocks_32, c32::Q4_1),
                    rows!(blocks_32, c32::Q5_0),
                    rows!(blocks_32, c32::Q5_1),
                    rows!(blocks_32, c32::Q8_0),
                    rows!(blocks_256, c256::Q2K),
                    rows!(blocks_256, c256::Q3K),
                    rows!(blocks_256, c256::Q4K),
                    rows!(blocks_256, c256::Q5K),
                    rows!(blocks_256, c256::Q6K),
                ],
                pack_strip,
                quantize_32: [quantize_32::<BITS_8>, quantize_32::<BITS_12>],
                quantize_256: [quantize_256::<BITS_8>, quantize_256::<BITS_12>],
                norm,
                weigh,
                add,
                silu_mul,
                gelu_tanh_mul,
                scale,
                softcap,
                rope,
                kv_head,
                attend,
                dots,
                read,
            };
        }
        pub(in crate::device::cpu) use table::KERNELS;
    };
}
pub(super) use {compiled, compiled_strip, kernels};
