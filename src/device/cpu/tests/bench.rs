//! Quick timings, run by hand: `cargo test --release bench -- --ignored --nocapture --test-threads 1`.
#![allow(unsafe_code)]

use super::oracle::{Weights, weights};
use super::{Cpu, Isa, Random};
use crate::device::cpu::{Activations, AttentionRow, Kinds, KvLayout, TileView};
use crate::format::quant::QuantType;
use std::time::Instant;

/// Seconds of the fastest of some runs of `f`.
fn fastest(runs: usize, mut f: impl FnMut()) -> f64 {
    let timed = (0..runs).map(|_| {
        let began = Instant::now();
        f();
        began.elapsed().as_secs_f64()
    });
    timed.fold(f64::MAX, f64::min)
}

/// Reads all of memory with every thread; bytes per second.
fn read_bandwidth(cpu: &Cpu, memory: &[u64]) -> f64 {
    let units = memory.len() / 8192;
    let seconds = fastest(5, || {
        cpu.pool.run(units, &|_, unit| {
            let mut sums = [0_u64; 32];
            for chunk in memory[unit * 8192..(unit + 1) * 8192].chunks_exact(32) {
                for (sum, x) in sums.iter_mut().zip(chunk) {
                    *sum ^= x;
                }
            }
            std::hint::black_box(sums);
        });
    });
    (units * 65536) as f64 / seconds
}

#[test]
#[ignore = "timings, by hand"]
fn bench_matmul() {
    let mut random = Random(1);
    let isa = std::env::var("BENCH_ISA").map_or(Isa::detect(), |name| {
        name.parse().expect("an instruction set")
    });
    let types = std::env::var("BENCH_TYPES").unwrap_or_default();
    let batches: Vec<usize> =
        std::env::var("BENCH_ROWS").map_or(vec![1, 2, 4, 8, 64, 512], |rows| {
            rows.split(',')
                .map(|n| n.parse().expect("a number"))
                .collect()
        });
    for threads in [1, 2] {
        let cpu = Cpu::new(threads, isa, 1 << 16).expect("the processor has it");
        let big = vec![1_u64; 256 << 17];
        let floor = read_bandwidth(&cpu, &big);
        drop(big);
        println!("{isa} {threads} threads, reads {:.1} GB/s", floor / 1e9);
        for qtype in QuantType::ALL
            .into_iter()
            .filter(|t| types.is_empty() || types.split(',').any(|n| n == t.name()))
        {
            let cols = 4096;
            let megabytes =
                std::env::var("BENCH_MB").map_or(128.0, |n| n.parse().expect("a number"));
            let rows = (megabytes * 1e6) as usize / qtype.row_bytes(cols) / 16 * 16;
            let one = weights(qtype, 64, cols, Weights::Random, &mut random);
            let mut data: Vec<u8> = one
                .iter()
                .copied()
                .cycle()
                .take(rows * qtype.row_bytes(cols))
                .collect();
            print!("{:5}", qtype.name());
            for &batch in &batches {
                // Many batch rows need fewer weight rows for a time that can be measured.
                let rows = if batch < 8 {
                    rows
                } else {
                    rows.min((1 << 26) / batch / 64 / 16 * 16).min(1024)
                };
                let x = random.floats(batch * cols);
                let mut memory = vec![0_u64; Activations::bytes(batch, cols, Kinds::ALL) / 8];
                // SAFETY: the memory outlives the view.
                let mut view =
                    unsafe { Activations::new(memory.as_mut_ptr().cast(), memory.len() * 8) };
                cpu.quantize(&x, cols, Kinds::of(qtype), &mut view);
                let mut out = vec![0.0; batch * rows];
                let tile_rows = 256.min(rows);
                let tiles: Vec<TileView> = (0..rows / tile_rows)
                    .map(|i| TileView {
                        data: data[i * tile_rows * qtype.row_bytes(cols)..].as_mut_ptr(),
                        qtype,
                        cols,
                        rows: tile_rows,
                        packed: true,
                        keep: true,
                        out: out[i * tile_rows..].as_mut_ptr(),
                        out_stride: rows,
                    })
                    .collect();
                let rows = rows / tile_rows * tile_rows;
                // SAFETY: all buffers live and are disjoint.
                let seconds = fastest(5, || unsafe { cpu.matmul(&tiles, &view, &mut || ()) });
                let bytes = (rows * qtype.row_bytes(cols)) as f64;
                let macs = (rows * cols * batch) as f64;
                if batch < 8 {
                    print!(
                        "  {batch}: {:5.1} GB/s {:3.0}%",
                        bytes / seconds / 1e9,
                        100.0 * bytes / seconds / floor
                    );
                } else {
                    print!("  {batch}: {:5.1} GMAC/s", macs / seconds / 1e9);
                }
                if batch == 1 {
                    let streamed: Vec<TileView> = tiles
                        .iter()
                        .map(|t| TileView {
                            packed: false,
                            keep: false,
                            ..*t
                        })
                        .collect();
                    // SAFETY: as above.
                    let seconds =
                        fastest(3, || unsafe { cpu.matmul(&streamed, &view, &mut || ()) });
                    print!(" (streamed {:4.1})", bytes / seconds / 1e9);
                }
            }
            println!();
        }
    }
}

#[test]
#[ignore = "timings, by hand"]
fn bench_attention_and_small_ops() {
    let mut random = Random(1);
    for threads in [1, 2] {
        let cpu = Cpu::new(threads, Isa::detect(), 1 << 16).expect("the processor has it");
        for (name, heads, kv_heads, head_dim, position, rows) in [
            ("8B decode at 4k", 32, 8, 128, 4095, 1),
            ("SmolLM2 decode at 512", 9, 3, 64, 511, 1),
            ("SmolLM2 prefill of 512", 9, 3, 64, 511, 512),
            ("Gemma decode at 4k", 4, 1, 256, 4095, 1),
        ] {
            let layout = KvLayout {
                kv_heads,
                head_dim,
                page_positions: 64,
            };
            let pages: Vec<Vec<u16>> = (0..64 * 8)
                .map(|_| vec![0x3400; layout.page_bytes() / 2])
                .collect();
            let row = heads * head_dim;
            let (q, mut out) = (random.floats(rows * row), vec![0.0; rows * row]);
            let mut pointers: Vec<*const u8> = pages.iter().map(|p| p.as_ptr().cast()).collect();
            let mut next = 0;
            let seconds = fastest(8, || {
                // Another part of memory each time, as another layer would be.
                pointers.rotate_left(64);
                next += 1;
                let rows: Vec<AttentionRow> = (0..rows)
                    .map(|i| AttentionRow {
                        q: q[i * row..].as_ptr(),
                        out: out[i * row..].as_mut_ptr(),
                        pages: pointers.as_ptr(),
                        position: (position + 1 - rows + i) as u32,
                        start: 0,
                    })
                    .collect();
                // SAFETY: all buffers live and have the layout's sizes.
                unsafe { cpu.attention(&rows, &layout, heads, 0.1, None) };
            });
            println!("{threads} threads, {name}: {:.0} us a layer", seconds * 1e6);
        }
        for n in [576, 4096, 512 * 576] {
            let cols = n.min(4096) / 576 * 576;
            let cols = if n == 4096 { 4096 } else { cols };
            let cols = if n > 4096 { 576 } else { cols };
            let (x, y) = (random.floats(n), random.floats(n));
            let mut out = vec![0.0; n];
            let mut memory = vec![0_u64; Activations::bytes(n / cols, cols, Kinds::ALL) / 8];
            // SAFETY: the memory outlives the view.
            let mut view =
                unsafe { Activations::new(memory.as_mut_ptr().cast(), memory.len() * 8) };
            let time = |f: &mut dyn FnMut()| fastest(20, || (0..10).for_each(|_| f())) * 1e5;
            println!(
                "{threads} threads, {n} values in us: quantize 32 {:.2}, 256 {:.2}, norm {:.2}, add {:.2}, silu {:.2}",
                time(&mut || cpu.quantize(&x, cols, Kinds::Q12_32, &mut view)),
                time(&mut || cpu.quantize(&x, cols, Kinds::Q12_256, &mut view)),
                time(&mut || cpu.rms_norm(&x, &y[..cols], 1e-5, &mut out)),
                time(&mut || cpu.add(&mut out, &y)),
                time(&mut || cpu.silu_mul(&mut out, &y)),
            );
        }
    }
}
