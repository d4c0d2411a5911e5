//! `airstream bench --ops`: each op of a sweep against its floor.
//!
//! Floors come from the same run: bytes over the bandwidth of DRAM, products over the rate of 8-bit dot products
//! (a 12-bit activation takes two, two rows together three). Buffers are larger than the caches, as a sweep's weights are.
#![allow(unsafe_code)]

use std::path::Path;

use serde::Serialize;

use super::report;
use crate::arena::Reservation;
use crate::device::cpu::{
    Activation, Activations, Added, AttentionRow, AttentionShape, Cpu, Heads, Isa, Kinds, KvLayout,
    KvPlace, Precision, Residual, TileView, fastest,
};
use crate::engine::{Loaded, Options, threads};
use crate::error::Result;
use crate::format::quant::QuantType;
use crate::model::config::Config;
use crate::text::{Sampler, SamplerOptions, SamplerScratch};

/// Larger than any cache.
const BUFFER_BYTES: usize = 192 << 20;
/// Weights for batches: their time is in the products.
const BATCH_BYTES: usize = 4 << 20;
const CONTEXT: usize = 4096;
/// Neither zero nor a subnormal number in any weight type.
const FILL: u8 = 0x11;

#[derive(Serialize)]
struct Op {
    name: String,
    /// Of one call.
    microseconds: f64,
    /// Of one call, by the machine's limits; none where an op is not bound by them but by its overhead.
    floor_microseconds: Option<f64>,
    /// Calls in a decode sweep of this model, where the op is part of one.
    calls_per_sweep: Option<usize>,
}

#[derive(Serialize)]
struct Summary {
    isa: String,
    threads: usize,
    dram_gb_s: f64,
    dot_gmac_s: f64,
    /// A decode sweep's weights over the bandwidth of DRAM.
    sweep_floor_ms: f64,
    ops: Vec<Op>,
    /// Share that all but products and attention have of that floor.
    small_ops_share: f64,
    /// Share that attention at a context of 4096 has of it.
    attention_share: f64,
}

/// Runs the benchmark with the shapes and weight types of a model file.
pub fn run(file: &Path, options: &Options, json: bool) -> Result<()> {
    let loaded = Loaded::read(file)?;
    let config = &loaded.config;
    let row_bytes = QuantType::F32.row_bytes(config.dim.max(config.ff).max(config.q_dim()));
    let isa = options.isa.unwrap_or_else(Isa::detect);
    let precision = options.model.activations;
    let cpu = Cpu::new(threads(options), isa, row_bytes)?;
    // Of huge pages, as the engine's arena is.
    let mut buffer = Reservation::new(BUFFER_BYTES)?.carve::<u64>(BUFFER_BYTES / 8)?;
    buffer.fill(u64::from_le_bytes([FILL; 8]));
    let (read, dot) = (cpu.read_rate(&buffer), cpu.dot_rate());
    let sweep_s = loaded.matrices.sweep_bytes() as f64 / read;
    let layers = config.layers.len();

    let mut ops = Vec::new();
    // Not every width is a whole number of every type's blocks.
    let matrices = loaded.matrices.matrices.iter();
    let mut types: Vec<(QuantType, usize)> = matrices.map(|m| (m.qtype, m.cols)).collect();
    types.sort_unstable();
    types.dedup_by_key(|(qtype, _)| *qtype);
    for (qtype, cols) in types {
        for batch in [1, 8, 512] {
            ops.push(matmul(
                &cpu,
                &mut buffer,
                qtype,
                cols,
                (batch, precision),
                (read, dot),
            ));
        }
    }
    let attention = attention(&cpu, &mut buffer, loaded.config.clone(), read);
    let attention_share = attention.microseconds * 1e-6 * layers as f64 / sweep_s;
    ops.push(attention);
    let small = small_ops(&cpu, &loaded, precision);
    let small_us: f64 = small
        .iter()
        .filter_map(|op| Some(op.microseconds * op.calls_per_sweep? as f64))
        .sum();
    ops.extend(small);
    let summary = Summary {
        isa: isa.to_string(),
        threads: cpu.threads(),
        dram_gb_s: read / 1e9,
        dot_gmac_s: dot / 1e9,
        sweep_floor_ms: sweep_s * 1e3,
        ops,
        small_ops_share: small_us * 1e-6 / sweep_s,
        attention_share,
    };
    if json {
        report::print_json(&summary);
    } else {
        print(&summary);
    }
    Ok(())
}

/// A packed matrix of `cols` wide rows against `batch` activation rows.
fn matmul(
    cpu: &Cpu,
    buffer: &mut [u64],
    qtype: QuantType,
    cols: usize,
    (batch, precision): (usize, Precision),
    (read, dot): (f64, f64),
) -> Op {
    let bytes = if batch == 1 {
        BUFFER_BYTES
    } else {
        BATCH_BYTES
    };
    let rows = bytes / qtype.row_bytes(cols) / 16 * 16;
    let kinds = Kinds::of(qtype);
    let mut memory = vec![0_u64; Activations::bytes(batch, cols, kinds, precision).div_ceil(8)];
    // SAFETY: the memory lives longer than the view and is used by nothing else.
    let mut x =
        unsafe { Activations::new(memory.as_mut_ptr().cast(), memory.len() * 8, precision) };
    cpu.quantize(&vec![0.5; batch * cols], cols, kinds, &mut x);
    let mut out = vec![0.0_f32; batch * rows];
    let tile = TileView {
        id: 0,
        data: buffer.as_mut_ptr().cast(),
        qtype,
        cols,
        rows,
        packed: true,
        keep: true,
        out: out.as_mut_ptr(),
        out_stride: rows,
    };
    // SAFETY: the rows lie within the buffer, and `out` has room for all outputs.
    let seconds = fastest(|| unsafe { cpu.matmul(&[tile], &x, &|_, _, _| {}, &mut || {}) });
    let weight_bytes = (rows * qtype.row_bytes(cols)) as f64;
    let dots = if qtype.block_values() == 1 {
        0.0
    } else {
        precision.products() * (batch * rows * cols) as f64
    };
    Op {
        name: format!("product {} x {batch} rows ({rows} x {cols})", qtype.name()),
        microseconds: seconds * 1e6,
        // A batch's weights are in the cache here, so only its products count.
        floor_microseconds: Some(
            1e6 * if batch == 1 {
                weight_bytes / read
            } else {
                dots / dot
            },
        )
        .filter(|f| *f > 0.0),
        calls_per_sweep: None,
    }
}

fn layout(config: &Config) -> KvLayout {
    KvLayout {
        kv_heads: config.kv_heads,
        head_dim: config.head_dim,
        page_positions: 256,
    }
}

/// One decode row's attention in one layer over a context of 4096, pages not in any cache.
fn attention(cpu: &Cpu, buffer: &mut [u64], config: Config, read: f64) -> Op {
    let layout = layout(&config);
    let pages_per_layer = CONTEXT / layout.page_positions;
    let layers = (BUFFER_BYTES / (pages_per_layer * layout.page_bytes())).max(1);
    let pages: Vec<*const u8> = (0..layers * pages_per_layer)
        .map(|page| buffer[page * layout.page_bytes() / 8..].as_ptr().cast())
        .collect();
    let q = vec![0.1_f32; config.q_dim()];
    let mut out = vec![0.0_f32; config.q_dim()];
    let out = out.as_mut_ptr();
    let shape = AttentionShape {
        layout,
        heads: config.heads,
        scale: config.attention_scale,
        softcap: None,
    };
    let seconds = fastest(|| {
        for pages in pages.chunks_exact(pages_per_layer) {
            let row = AttentionRow {
                q: q.as_ptr(),
                out,
                pages: pages.as_ptr(),
                position: CONTEXT as u32 - 1,
                start: 0,
            };
            // SAFETY: every page of the context lies within the buffer, and `out` has room for all heads.
            unsafe { cpu.attention(&[row], &shape) };
        }
    }) / layers as f64;
    Op {
        name: format!(
            "attention at {CONTEXT} ({} heads, {} kv, {})",
            config.heads, config.kv_heads, config.head_dim
        ),
        microseconds: seconds * 1e6,
        floor_microseconds: Some(1e6 * (pages_per_layer * layout.page_bytes()) as f64 / read),
        calls_per_sweep: Some(config.layers.len()),
    }
}

/// What one decode row takes beside products and attention.
fn small_ops(cpu: &Cpu, loaded: &Loaded, precision: Precision) -> Vec<Op> {
    let config = &loaded.config;
    let layers = config.layers.len();
    let (dim, q_dim, kv_dim, ff) = (config.dim, config.q_dim(), config.kv_dim(), config.ff);
    let mut ops = Vec::new();
    let mut time = |name: &str, calls: usize, f: &mut dyn FnMut()| {
        const CALLS: usize = 200;
        let seconds = fastest(|| (0..CALLS).for_each(|_| f())) / CALLS as f64;
        let (name, calls_per_sweep) = (name.to_owned(), Some(calls));
        ops.push(Op {
            name,
            microseconds: seconds * 1e6,
            floor_microseconds: None,
            calls_per_sweep,
        });
    };
    let (mut a, b) = (
        vec![0.5_f32; ff.max(q_dim).max(dim)],
        vec![0.25_f32; ff.max(q_dim).max(dim)],
    );
    let layout = layout(config);
    let mut page = vec![0_u64; layout.page_bytes().div_ceil(8)];
    let place = KvPlace {
        page: page.as_mut_ptr().cast(),
        index: 0,
    };
    let (cos, sin) = (
        vec![1.0; config.rope_dims / 2],
        vec![0.0; config.rope_dims / 2],
    );
    let (mut k, mut v) = (vec![0.5; kv_dim], vec![0.5; kv_dim]);
    time("heads", layers, &mut || {
        let heads = Heads {
            q: &mut a[..q_dim],
            k: &mut k,
            v: &mut v,
            biases: None,
            norms: None,
            eps: 1e-5,
            cos: &cos,
            sin: &sin,
            pairing: config.pairing,
        };
        // SAFETY: the page has the layout's size.
        unsafe { cpu.place_heads(heads, &layout, &[place]) };
    });
    let mut memory = Vec::new();
    let mut activations = |cols: usize| {
        let kinds = if cols.is_multiple_of(256) {
            Kinds::BLOCKS_256
        } else {
            Kinds::BLOCKS_32
        };
        memory = vec![0_u64; Activations::bytes(1, cols, kinds, precision).div_ceil(8)];
        // SAFETY: the memory stays until the next view is made, and is used by nothing else.
        let view =
            unsafe { Activations::new(memory.as_mut_ptr().cast(), memory.len() * 8, precision) };
        (view, kinds)
    };
    let (mut into, kinds) = activations(dim);
    time("add, norm, quantize dim", 2 * layers + 1, &mut || {
        let (x, y) = (&mut a[..dim], &b[..dim]);
        let residual = Residual {
            x,
            added: Some(Added { y, weight: None }),
            weight: y,
            eps: 1e-5,
        };
        cpu.norm_quantize(residual, kinds, &mut into);
    });
    let (mut into, kinds) = activations(q_dim);
    time("quantize q", layers, &mut || {
        cpu.quantize(&b[..q_dim], q_dim, kinds, &mut into)
    });
    let (mut into, kinds) = activations(ff);
    time("gate, quantize ff", layers, &mut || {
        let gate_up = (&b[..ff], &b[..ff]);
        cpu.gate_quantize(Activation::Silu, gate_up, ff, kinds, &mut into)
    });
    let mut sampler = Sampler::new(SamplerOptions::default());
    let mut candidates = SamplerScratch::new(config.vocab);
    let logits: Vec<f32> = (0..config.vocab)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 7 & 0xffff) as f32 / 4096.0)
        .collect();
    let mut scratch = logits.clone();
    time("sample", 1, &mut || {
        scratch.copy_from_slice(&logits);
        std::hint::black_box(sampler.sample(&mut scratch, &mut candidates));
    });
    ops
}

fn print(s: &Summary) {
    println!(
        "{} x {}: DRAM {:.1} GB/s, dot products {:.0} GMAC/s; a decode sweep's floor is {:.2} ms\n",
        s.threads, s.isa, s.dram_gb_s, s.dot_gmac_s, s.sweep_floor_ms
    );
    println!("| op | us | floor us | reached | per sweep |");
    println!("|---|---|---|---|---|");
    for op in &s.ops {
        let floor = op
            .floor_microseconds
            .map_or(String::new(), |f| format!("{f:.1}"));
        let share = op.floor_microseconds.map_or(String::new(), |f| {
            format!("{:.0}%", 100.0 * f / op.microseconds)
        });
        let calls = op.calls_per_sweep.map_or(String::new(), |c| {
            format!(
                "{c} calls, {:.2}%",
                100.0 * op.microseconds * 1e-3 * c as f64 / s.sweep_floor_ms
            )
        });
        println!(
            "| {} | {:.1} | {floor} | {share} | {calls} |",
            op.name, op.microseconds
        );
    }
    println!(
        "\nof a decode sweep's floor: small ops {:.1}%, attention at {CONTEXT} {:.1}%",
        100.0 * s.small_ops_share,
        100.0 * s.attention_share
    );
}
