//! A store that must give up a tile which stays by the plan, in the middle of a sweep, while the GPU has yet to read it.

use std::path::PathBuf;
use std::sync::Arc;

use airstream::arena::Reservation;
use airstream::device::Device;
use airstream::device::cpu::{Activation, Activations, Kinds, Precision, TileView};
use airstream::device::cuda::{Buffers, Cuda, Sizes};
use airstream::format::quant::QuantType;
use airstream::format::tile::{self, Use};
use airstream::io::sim::{Content, Faults, Options, Sim, Timing};
use airstream::store::integrity::Integrity;
use airstream::store::{ModelId, Store, Weights};

use super::fake_gpu::FakeGpu;
use super::store_support as support;

const SLOT_BYTES: usize = 64 << 10;
const ROWS: usize = 64;
const COLS: usize = 512;
/// The first one holds embeddings, and no sweep goes over it.
const MATRICES: usize = 9;

/// A store in which the tiles that stay fill all slots: nobody has said that the model is swept, so there is no window
/// for others.
fn store() -> Store {
    let mut matrices = support::matrices(MATRICES, &[ROWS], COLS);
    matrices[0].used = Use::ByRow;
    let (tiles, ranges) = tile::cut(&matrices, SLOT_BYTES);
    assert_eq!(tiles.len(), MATRICES, "a tile each");
    let sim = Sim::new(Options {
        seed: 1,
        depth: 8,
        // No scale of a block is infinite, wherever blocks begin.
        content: Content::Serve(Box::new(|_, offset, into| {
            let byte = |i: usize| support::byte_at(offset + i as u64) & 0x3f;
            into.iter_mut().enumerate().for_each(|(i, b)| *b = byte(i));
            into.len()
        })),
        timing: Timing::Reaps(2),
        faults: Faults::default(),
        log_reads_max: 0,
    });
    let slots = support::slots(MATRICES, SLOT_BYTES);
    let count = slots.count();
    let mut store = Store::empty(slots, count, Box::new(sim), 2);
    store.set_plain(true);
    store.add(Weights {
        integrity: Integrity::simulated(&matrices, &tiles),
        matrices,
        tiles,
        ranges,
        paths: vec![PathBuf::from("model.gguf")],
        resident: false,
    });
    store
}

#[test]
fn a_kept_tile_is_given_up_only_when_the_gpu_has_read_it() {
    let Some(gpu) = FakeGpu::new(8) else { return };
    let mut store = store();
    let mut memory = Reservation::new(64 << 10).expect("a small one");
    let mut x = memory.carve::<f32>(COLS).expect("there is room");
    let mut y = memory.carve::<f32>(MATRICES * ROWS).expect("there is room");
    x.iter_mut()
        .enumerate()
        .for_each(|(i, x)| *x = (i % 7) as f32);
    let sizes = Sizes {
        rows: 1,
        cols: COLS,
        kinds: Kinds::of(QuantType::Q4_0),
        heads: 1,
        head_dim: 16,
        context: 16,
        sessions: 1,
    };
    let mut cuda = Cuda::new(Arc::new(gpu)).expect("it opens");
    store.set_fence(cuda.fence());
    let (base, bytes) = x.mapping();
    let buffers = Buffers {
        base,
        bytes,
        front: bytes,
    };
    let slots = store.pieces(2 * SLOT_BYTES);
    assert!(slots.len() > 2, "products take tiles of several pieces");
    // SAFETY: the slots, and the memory behind `x` and `y`, are there for longer than the device.
    unsafe { cuda.fit(sizes, vec![buffers], slots) };
    let device = Device::Cuda(Box::new(cuda));
    // SAFETY: no bytes, which nobody looks at.
    let mut unused = unsafe { Activations::new(std::ptr::dangling_mut(), 0, Precision::default()) };
    device.upload(&x);

    let mut first: Option<Vec<f32>> = None;
    for sweep in 0..4 {
        store.begin_sweep(ModelId::FIRST, None);
        if sweep == 2 {
            // The plan has no place for a tile in the middle any more; those before it have been launched by then.
            store.take_page().expect("there is a slot");
        }
        let kinds = Kinds::of(QuantType::Q4_0);
        device.gate_quantize(Activation::Silu, (&x, &x), COLS, kinds, &mut unused);
        for matrix in 1..MATRICES {
            let sums = store.sums();
            let inspect = &|id: u32, strip, bytes: &[u8]| sums.inspect(id, strip, bytes);
            store.begin(store.tiles_of(matrix));
            while store.acquire().expect("the disk is well") > 0 {
                let view = |&id: &u32| TileView {
                    id,
                    data: store.memory(id).data.as_ptr(),
                    qtype: QuantType::Q4_0,
                    cols: COLS,
                    rows: ROWS,
                    packed: store.memory(id).packed,
                    keep: store.memory(id).keep,
                    out: y[matrix * ROWS..].as_mut_ptr(),
                    out_stride: ROWS,
                };
                let tiles: Vec<TileView> = store.acquired().iter().map(view).collect();
                // SAFETY: the tiles are the device's until they are released, and each has its own outputs.
                unsafe { device.matmul(&tiles, &unused, inspect, &mut || store.feed()) };
                store.release().expect("the bytes are right");
            }
        }
        device.download(&mut y);
        device
            .finish(&mut || store.feed())
            .expect("the GPU is well");
        store.finish_sweep().expect("no file to change");
        assert!(y[ROWS..].iter().all(|y| *y != 0.0), "each row was written");
        let expected = first.get_or_insert_with(|| y.to_vec());
        super::assert_same(&y, expected, &format!("sweep {sweep}"));
        y.fill(0.0);
    }
}
