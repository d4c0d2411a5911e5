//! A machine that is only arithmetic: the real plan and store on a simulated disk, and a processor that takes its
//! time on the same virtual clock.
#![allow(unsafe_code)]

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use airstream::arena::Reservation;
use airstream::device::cpu::{Activation, Precision, RopePairing};
use airstream::engine::plan::{Plan, Request};
use airstream::format::quant::QuantType;
use airstream::format::tile::{self, Matrix, Use};
use airstream::io::sim::{Clock, Content, Disk, Faults, Jitter, Log, Options, Sim, Timing};
use airstream::model::config::{Config, LayerSpec};
use airstream::model::kv::{self, Session};
use airstream::model::rope::Rope;
use airstream::model::weights::{LayerMatrices, MatrixPlan};
use airstream::store::Store;

/// From the start of a read to its first byte, as NVMe has it.
const LATENCY_NS: u64 = 80_000;
/// The processor looks after the reads this often: in weight bytes, as the CPU's units of work are.
const POLL_BYTES: usize = 64 << 10;

/// A model without its file.
pub struct Shape {
    pub name: &'static str,
    pub config: Config,
    pub matrices: MatrixPlan,
}

/// The numbers that make a Llama.
#[derive(Clone, Copy)]
pub struct Llama {
    pub layers: usize,
    pub dim: usize,
    pub ff: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub vocab: usize,
    pub weights: QuantType,
    /// The embedding table and the head; one table for both if `tied`.
    pub table: QuantType,
    pub tied: bool,
}

impl Shape {
    pub fn llama(name: &'static str, l: Llama) -> Shape {
        let head_dim = if l.dim < 1024 { 64 } else { 128 };
        let config = Config {
            arch: "llama",
            dim: l.dim,
            ff: l.ff,
            heads: l.heads,
            kv_heads: l.kv_heads,
            head_dim,
            vocab: l.vocab,
            context_max: 8192,
            norm_eps: 1e-5,
            pairing: RopePairing::Adjacent,
            rope_dims: head_dim,
            ropes: vec![Rope::unscaled(10000.0)],
            layers: vec![
                LayerSpec {
                    window: None,
                    rope: 0
                };
                l.layers
            ],
            activation: Activation::Silu,
            embed_scale: 1.0,
            attention_scale: 1.0,
            logit_softcap: None,
            qkv_bias: false,
            qk_norm: false,
            post_norms: false,
        };
        let mut list: Vec<Matrix> = Vec::new();
        // Somewhere after the metadata, as in a real file.
        let mut offset = 1_234_592;
        let mut add = |name: String, rows, cols, qtype, used| {
            let matrix = Matrix {
                name,
                qtype,
                rows,
                cols,
                file: 0,
                offset,
                used,
            };
            offset += matrix.bytes().next_multiple_of(32);
            list.push(matrix);
            list.len() - 1
        };
        let (q_dim, kv_dim) = (l.heads * head_dim, l.kv_heads * head_dim);
        let layers = (0..l.layers)
            .map(|layer| {
                let mut part = |name: &str, rows, cols| {
                    add(
                        format!("blk.{layer}.{name}"),
                        rows,
                        cols,
                        l.weights,
                        Use::EverySweep,
                    )
                };
                let q = part("attn_q", q_dim, l.dim);
                part("attn_k", kv_dim, l.dim);
                part("attn_v", kv_dim, l.dim);
                let o = part("attn_output", l.dim, q_dim);
                let gate = part("ffn_gate", l.ff, l.dim);
                part("ffn_up", l.ff, l.dim);
                let down = part("ffn_down", l.dim, l.ff);
                LayerMatrices { q, o, gate, down }
            })
            .collect();
        let head = add("output".into(), l.vocab, l.dim, l.table, Use::EverySweep);
        let embed = match l.tied {
            true => head,
            false => add("token_embd".into(), l.vocab, l.dim, l.table, Use::ByRow),
        };
        let matrices = MatrixPlan {
            matrices: list,
            layers,
            embed,
            head,
        };
        Shape {
            name,
            config,
            matrices,
        }
    }

    /// Bytes of all weights, as in the file.
    pub fn file_bytes(&self) -> u64 {
        self.matrices.matrices.iter().map(Matrix::bytes).sum()
    }

    /// What to plan for in a budget of this share of the file.
    pub fn request(&self, percent: u64, context: usize) -> Request {
        Request {
            memory: self.file_bytes() * percent / 100,
            context: Some(context),
            sessions: 1,
            rows: None,
            logits_rows: 1,
            drafts: Some(0),
            activations: Precision::default(),
            drafted: false,
            resident: false,
            threads: 2,
            clients_bytes: 0,
            gpu: None,
            tokenizer_bytes: 4 << 20,
            disk: None,
        }
    }

    /// Divides a budget of this share of the file.
    pub fn plan(&self, percent: u64, context: usize) -> Plan {
        Plan::new(
            &self.config,
            &self.matrices,
            &self.request(percent, context),
        )
        .unwrap_or_else(|e| panic!("{} at {percent}%: {e}", self.name))
    }
}

/// How fast the parts are.
#[derive(Clone, Copy)]
pub struct Speed {
    pub disk_bytes_per_s: f64,
    /// Weight bytes per second, for all rows of a sweep together.
    pub compute_bytes_per_s: f64,
    pub jitter: Jitter,
}

/// A model at work.
pub struct Machine {
    pub store: Store,
    pub session: Session,
    pub clock: Clock,
    pub log: Arc<Mutex<Log>>,
    config: Config,
    groups: Vec<(usize, usize)>,
    embed: usize,
    ns_per_byte: f64,
    /// Part of a nanosecond that has passed.
    rest_ns: f64,
}

impl Machine {
    pub fn new(shape: &Shape, plan: &Plan, speed: Speed) -> Machine {
        let slots = Reservation::new(plan.slots * plan.slot_bytes)
            .expect("nothing of it is ever touched")
            .seal(plan.slot_bytes);
        let clock = Clock::default();
        let disk = Disk {
            bytes_per_second: speed.disk_bytes_per_s,
            latency_ns: LATENCY_NS,
            depth: 64,
            jitter: speed.jitter,
        };
        let sim = Sim::new(Options {
            seed: 1,
            depth: plan.depth(),
            content: Content::Nothing,
            timing: Timing::Disk(disk, clock.clone()),
            faults: Faults::default(),
            log_reads_max: 0,
        });
        let log = sim.log();
        let list = shape.matrices.matrices.clone();
        let cut = tile::cut(&list, plan.slot_bytes);
        let paths = vec![PathBuf::from("model.gguf")];
        let store = Store::new(list, cut, paths, slots, Box::new(sim), plan.window);
        let layers = shape.matrices.layers.iter();
        let mut groups: Vec<(usize, usize)> = layers
            .flat_map(|l| [(l.q, 3), (l.o, 1), (l.gate, 2), (l.down, 1)])
            .collect();
        groups.push((shape.matrices.head, 1));
        Machine {
            store,
            session: Session::new(shape.config.layers.len(), plan.layout, plan.context),
            clock,
            log,
            config: shape.config.clone(),
            groups,
            embed: shape.matrices.embed,
            ns_per_byte: 1e9 / speed.compute_bytes_per_s,
            rest_ns: 0.0,
        }
    }

    /// One sweep as `model::forward` makes it; how long it took, in seconds.
    pub fn sweep(&mut self, rows: usize) -> f64 {
        let start = self.clock.now_ns();
        let sessions = std::slice::from_mut(&mut self.session);
        kv::extend(sessions, 0, &self.config.layers, rows, &mut self.store)
            .expect("the plan has room for the context");
        self.store
            .rows(self.embed, &[17], |_, _| {})
            .expect("no faults");
        for index in 0..self.groups.len() {
            let (first, count) = self.groups[index];
            self.group(first, count);
        }
        self.session.advance(rows);
        (self.clock.now_ns() - start) as f64 / 1e9
    }

    /// A group of matrices, as `forward`'s `matmul`.
    fn group(&mut self, first: usize, count: usize) {
        let range = self.store.tiles_of(first).start..self.store.tiles_of(first + count - 1).end;
        self.store.begin(range);
        while self.store.acquire().expect("no faults") > 0 {
            let acquired = self.store.acquired().iter();
            let mut bytes: usize = acquired.map(|&t| self.store.tile(t).bytes as usize).sum();
            while bytes > 0 {
                let step = bytes.min(POLL_BYTES);
                bytes -= step;
                self.compute(step);
                self.store.feed();
            }
            self.store.release().expect("no faults");
        }
    }

    fn compute(&mut self, bytes: usize) {
        self.rest_ns += bytes as f64 * self.ns_per_byte;
        self.clock.advance(self.rest_ns as u64);
        self.rest_ns = self.rest_ns.fract();
    }

    /// Nobody asks for anything until there is nothing left to read; how long that took, in seconds.
    pub fn idle(&mut self) -> f64 {
        let start = self.clock.now_ns();
        while self.store.idle().expect("no faults") {
            self.clock.advance(1_000_000);
        }
        (self.clock.now_ns() - start) as f64 / 1e9
    }

    /// Bytes delivered so far.
    pub fn read_bytes(&self) -> u64 {
        self.log.lock().expect("nobody panicked with it").bytes
    }
}
