//! What this GPU can do at best, for the engine's speeds to be compared with.

use std::sync::Arc;
use std::time::{Duration, Instant};

use airstream::device::cuda::Cuda;
use airstream::device::cuda::driver::{Args, Stream};
use cudarc::driver::sys::{self, CUresult};

use crate::checks::Gpu;
use crate::kernels::launch::Memory;
use crate::support::weights::Rng;
use crate::{figure, gpu, runner};

/// How often a rate is measured: the fastest time counts.
const TIMES: usize = 5;

/// The shortest time of some work, in seconds.
fn fastest(work: impl Fn()) -> f64 {
    work();
    let seconds = |_| {
        let begun = Instant::now();
        work();
        begun.elapsed().as_secs_f64()
    };
    (0..TIMES).map(seconds).fold(f64::INFINITY, f64::min)
}

/// Waits for all that was launched and copied.
fn finish(gpu: &Gpu) {
    gpu.record(Stream::Compute, 0).expect("it marks");
    while !gpu.done(0).unwrap_or_else(|e| panic!("{e}")) {
        std::thread::sleep(Duration::from_micros(20));
    }
}

/// Bytes per second that a copy within the GPU's memory reads and writes.
fn copy_rate(gpu: &Gpu) -> f64 {
    const COPIES: usize = 16;
    let bytes = (gpu.free_bytes().expect("it tells") / 8).min(1 << 30) as usize;
    let [from, to] = [(); 2].map(|()| gpu.allocate(bytes).unwrap_or_else(|e| panic!("{e}")));
    let seconds = fastest(|| {
        for _ in 0..COPIES {
            // SAFETY: both were allocated, and are as large.
            let copied = unsafe { gpu.copy(Stream::Compute, to, from, bytes) };
            copied.unwrap_or_else(|e| panic!("{e}"));
        }
        finish(gpu);
    });
    for memory in [from, to] {
        // SAFETY: nothing uses it any more.
        unsafe { gpu.free(memory) };
    }
    (2 * COPIES * bytes) as f64 / seconds
}

#[test]
fn memory() {
    let Some((gpu, _alone)) = gpu() else { return };
    let copied = copy_rate(&gpu);
    figure("copy_gb_s", copied / 1e9);
    let mut device = Cuda::new(Arc::clone(&gpu)).unwrap_or_else(|e| panic!("{e}"));
    let slots = device.take_slots(4 << 20, 128);
    let _slots = slots.unwrap_or_else(|e| panic!("{e}"));
    let read = device.read_rate().unwrap_or_else(|e| panic!("{e}"));
    figure("read_gb_s", read / 1e9);
}

/// What the likeliest tokens of rows of the largest vocabulary take.
#[test]
fn likely_tokens() {
    const VOCAB: usize = 262_144;
    const TIMES: usize = 64;
    let (Some((gpu, _alone)), Some(runner)) = (gpu(), runner()) else {
        return;
    };
    let kernel = |name| gpu.kernel(name).unwrap_or_else(|e| panic!("{e}"));
    let (leaders, top_k) = (kernel("leaders"), kernel("top_k"));
    for rows in [1, 8] {
        let mut random = Rng(1);
        let values = (0..rows * VOCAB).map(|_| random.range(-9.0, 9.0));
        let logits = Memory::of(runner, &values.collect::<Vec<f32>>());
        let found = Memory::of(runner, &vec![0_u64; rows * 2048]);
        let out = Memory::of(runner, &vec![0_u64; rows * 64]);
        let args = Args::new().with(logits.at(0)).with(VOCAB as u32);
        let args = args.with(found.at(0));
        let with_out = args.clone().with(out.at(0));
        let seconds = fastest(|| {
            for _ in 0..TIMES {
                // SAFETY: as `kernels/top_k.cu` has it; the memory stays until all is done.
                let launched = unsafe {
                    let led = gpu.launch(leaders, [32, rows as u32, 1], 64, &args);
                    led.and_then(|()| gpu.launch(top_k, [1, rows as u32, 1], 1024, &with_out))
                };
                launched.unwrap_or_else(|e| panic!("{e}"));
            }
            finish(&gpu);
        });
        figure(
            &format!("likely_tokens_of_{rows}_rows_us"),
            seconds / TIMES as f64 * 1e6,
        );
    }
}

/// Products of 16 x 16 and 16 x 8 that a warp has under way, so that none waits for the last one.
const CHAINS: usize = 8;
const ROUNDS: u32 = 20_000;

/// A kernel that only multiplies: `mma.sync` of bf16, the fastest there is on every GPU that the engine's kernels run on.
/// (A Hopper's `wgmma` is faster by half.)
fn tensor_ptx() -> String {
    let sums: Vec<String> = (0..4 * CHAINS).map(|i| format!("%c{i}")).collect();
    let mut text = String::from(
        ".version 7.4\n.target sm_80\n.address_size 64\n\
         .visible .entry tensor_rate(.param .u64 out, .param .u32 rounds) .maxntid 256, 1, 1\n{\n\
         .reg .pred %p; .reg .f32 %c<32>; .reg .b32 %v<6>; .reg .u32 %t, %n; .reg .u64 %o, %at;\n\
         ld.param.u64 %o, [out]; ld.param.u32 %n, [rounds]; cvta.to.global.u64 %o, %o;\n\
         mov.u32 %t, %tid.x; mul.wide.u32 %at, %t, 4; add.u64 %o, %o, %at;\n",
    );
    // Values from 0.5 to 1 of either sign: with zeros a GPU takes less power, and is faster than with weights.
    for i in 0..6 {
        text += &format!(
            "mad.lo.u32 %v{i}, %t, 0x9e3779b1, {}; and.b32 %v{i}, %v{i}, 0x807f807f; or.b32 %v{i}, %v{i}, 0x3f003f00;\n",
            0x2545_f491_u32.wrapping_mul(i + 1)
        );
    }
    for sum in &sums {
        text += &format!("mov.f32 {sum}, 0f00000000;\n");
    }
    text += "again:\n";
    for chain in sums.chunks(4) {
        let c = chain.join(", ");
        text += &format!(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{{c}}}, {{%v0, %v1, %v2, %v3}}, {{%v4, %v5}}, {{{c}}};\n"
        );
    }
    text += "sub.u32 %n, %n, 1; setp.ne.u32 %p, %n, 0; @%p bra again;\n";
    for sum in &sums[1..] {
        text += &format!("add.f32 %c0, %c0, {sum};\n");
    }
    text += "st.global.f32 [%o], %c0;\nret;\n}\n\0";
    text
}

fn ok(result: CUresult) {
    assert_eq!(result, CUresult::CUDA_SUCCESS);
}

#[test]
fn tensor_cores() {
    let Some((gpu, _alone)) = gpu() else { return };
    let out = gpu.allocate(1 << 20).unwrap_or_else(|e| panic!("{e}"));
    let ptx = tensor_ptx();
    // SAFETY: plain calls with places for what they answer, in the context that the driver has made this thread's when
    // it allocated. The kernel takes an address and a number, and writes 256 floats.
    unsafe {
        let (mut device, mut processors) = (0, 0);
        ok(sys::cuCtxGetDevice(&mut device));
        let count = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        ok(sys::cuDeviceGetAttribute(&mut processors, count, device));
        let (mut module, mut function) = (std::ptr::null_mut(), std::ptr::null_mut());
        ok(sys::cuModuleLoadData(&mut module, ptx.as_ptr().cast()));
        ok(sys::cuModuleGetFunction(
            &mut function,
            module,
            c"tensor_rate".as_ptr(),
        ));
        let (mut out_argument, mut rounds) = (out, ROUNDS);
        let mut arguments = [
            std::ptr::from_mut(&mut out_argument).cast(),
            std::ptr::from_mut(&mut rounds).cast(),
        ];
        let (blocks, arguments) = (4 * processors as u32, arguments.as_mut_ptr());
        let none = std::ptr::null_mut();
        let seconds = fastest(|| {
            for _ in 0..8 {
                ok(sys::cuLaunchKernel(
                    function,
                    blocks,
                    1,
                    1,
                    256,
                    1,
                    1,
                    0,
                    none,
                    arguments,
                    std::ptr::null_mut(),
                ));
            }
            ok(sys::cuCtxSynchronize());
        });
        let products = f64::from(blocks) * 8.0 * f64::from(ROUNDS) * CHAINS as f64 * 8.0;
        figure(
            "bf16_mma_tflop_s",
            products * 2.0 * (16 * 8 * 16) as f64 / seconds / 1e12,
        );
        ok(sys::cuModuleUnload(module));
        gpu.free(out);
    }
}
