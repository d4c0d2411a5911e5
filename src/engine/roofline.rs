//! The best speed that the machine's limits allow.

use crate::board::config::{Board, Mode};
use crate::engine::plan::Plan;
use crate::model::config::Config;

/// Of DRAM's peak bandwidth, what a good decode kernel reaches on Orin: MLC's published speeds of four models of 3 to 8
/// billion weights on Orin Nano Super come to 76% to 85% (`tests/published.rs`).
const GPU_DRAM_SHARE: f64 = 0.78;
/// The same for the processor's cores together. Assumed: nothing is published, and no board was measured.
const CPU_DRAM_SHARE: f64 = 0.78;
/// Weights that a core of Orin multiplies in a cycle when it decodes: our Q4_0 kernel takes 4.3 bytes of weights a
/// cycle by llvm-mca's model of the Cortex-A78, at 0.5625 bytes a weight.
const CPU_WEIGHTS_PER_CYCLE: f64 = 7.6;
/// Products that it makes in a cycle in sweeps of many rows: our kernels for 8 rows make 11.7 of Q4_0 and 11.3 of Q4_K, by
/// llvm-mca's model of the Neoverse N1, whose vector pipes are much like the Cortex-A78's. (For Thor's cores, by that of
/// the Neoverse V2, it is 30 and 36.)
const CPU_PRODUCTS_PER_CYCLE: f64 = 11.5;
/// Weights that a CUDA core multiplies in a cycle when it decodes: 117 million of Q4_0 (gate and up of an 8B) take our
/// kernel 21.5 us on an H200, which its instructions bound there more than memory does.
const GPU_WEIGHTS_PER_CYCLE: f64 = 0.16;
/// Products that it makes in a cycle in sweeps of many rows: a prompt of 512 tokens of the 8B on the H200, all ops together.
/// The tensor cores could do several times as many; what is done around them is the bound.
const GPU_PRODUCTS_PER_CYCLE: f64 = 1.7;

/// What computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Device {
    /// The processor.
    Cpu,
    /// The GPU.
    Gpu,
}

/// What a machine can do, each alone.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Machine {
    /// Bytes per second from NVMe.
    pub nvme_bytes_per_s: f64,
    /// Bytes per second from DRAM.
    pub dram_bytes_per_s: f64,
    /// Bytes per second into a GPU's own memory; none if it computes in the processor's. With it, DRAM is the GPU's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bus_bytes_per_s: Option<f64>,
    /// Processor time that reading takes, in milliseconds per GB; none if it was not measured.
    pub nvme_cpu_ms_per_gb: Option<f64>,
    /// Products per second; none if that is not known, and then it bounds nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compute: Option<Compute>,
}

/// How fast a device multiplies weights with activations.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Compute {
    /// Products per second in a sweep of one row.
    pub decode_per_s: f64,
    /// Products per second in a sweep of many rows.
    pub prefill_per_s: f64,
}

/// What a sweep has to move and to compute.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Work {
    /// Bytes of all weights that it uses.
    pub weight_bytes: u64,
    /// Bytes of them that stream from NVMe.
    pub streamed_bytes: u64,
    /// Bytes of them that are copied into a GPU's own memory.
    pub copied_bytes: u64,
    /// Bytes of the KV cache that it reads.
    pub kv_bytes: u64,
    /// Products of a weight and an activation.
    pub products: u64,
    /// Rows.
    pub rows: usize,
}

/// The time of one sweep by the roofline, and what bounds it.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Sweep {
    /// Bytes that stream from NVMe.
    pub streamed_bytes: u64,
    /// Bytes that are copied into a GPU's own memory.
    pub copied_bytes: u64,
    /// Bytes that cross the DRAM interface: weights and KV once, what comes from elsewhere once more on its way in.
    pub dram_bytes: u64,
    /// The floor of the sweep's time.
    pub seconds: f64,
    /// The limit that sets it.
    pub bound: &'static str,
}

impl Machine {
    /// What two measurements say together.
    pub fn mean(&self, other: &Machine) -> Machine {
        Machine {
            nvme_bytes_per_s: (self.nvme_bytes_per_s + other.nvme_bytes_per_s) / 2.0,
            dram_bytes_per_s: (self.dram_bytes_per_s + other.dram_bytes_per_s) / 2.0,
            bus_bytes_per_s: self.bus_bytes_per_s,
            nvme_cpu_ms_per_gb: self
                .nvme_cpu_ms_per_gb
                .zip(other.nvme_cpu_ms_per_gb)
                .map(|(a, b)| (a + b) / 2.0),
            compute: self.compute,
        }
    }

    /// What `board` can do in `mode` (at its highest clocks if none); none if its description does not say, or it has
    /// no such device.
    pub fn of_board(board: &Board, mode: Option<&Mode>, device: Device) -> Option<Machine> {
        let dram_gb_s = mode.and_then(|m| m.dram_gb_s).or(board.memory.dram_gb_s)?;
        let (share, compute) = match device {
            Device::Cpu => {
                let cores = mode.and_then(|m| m.cpu_cores).or(board.cpu.cores)?;
                let mhz = mode.and_then(|m| m.cpu_mhz).or(board.cpu.mhz_max)?;
                let computing = (cores - u32::from(board.cpu.leave_cpu0)).max(1);
                let cycles_per_s = f64::from(computing) * f64::from(mhz) * 1e6;
                let compute = Compute {
                    decode_per_s: cycles_per_s * CPU_WEIGHTS_PER_CYCLE,
                    prefill_per_s: cycles_per_s * CPU_PRODUCTS_PER_CYCLE,
                };
                (CPU_DRAM_SHARE, compute)
            }
            Device::Gpu => {
                let gpu = board.gpu.as_ref()?;
                let cores = mode.and_then(|m| m.gpu_cores).unwrap_or(gpu.cores);
                let mhz = mode.and_then(|m| m.gpu_mhz).unwrap_or(gpu.mhz_max);
                let cycles_per_s = f64::from(cores) * f64::from(mhz) * 1e6;
                let compute = Compute {
                    decode_per_s: cycles_per_s * GPU_WEIGHTS_PER_CYCLE,
                    prefill_per_s: cycles_per_s * GPU_PRODUCTS_PER_CYCLE,
                };
                (GPU_DRAM_SHARE, compute)
            }
        };
        Some(Machine {
            nvme_bytes_per_s: board.nvme.gb_s? * 1e9,
            dram_bytes_per_s: dram_gb_s * 1e9 * share,
            bus_bytes_per_s: None,
            nvme_cpu_ms_per_gb: None,
            compute: Some(compute),
        })
    }

    /// The floor of a sweep: T = max(S/Bn, C/Bb, (W+I+K)/Bd, rows * P/C), where I is what comes into the memory that
    /// computes: S, or C over the bus.
    pub fn sweep(&self, work: &Work) -> Sweep {
        let incoming = match self.bus_bytes_per_s {
            Some(_) => work.copied_bytes,
            None => work.streamed_bytes,
        };
        let dram_bytes = work.weight_bytes + incoming + work.kv_bytes;
        let bus_s = self
            .bus_bytes_per_s
            .map_or(0.0, |rate| work.copied_bytes as f64 / rate);
        let compute_s = self.compute.map_or(0.0, |compute| {
            let per_s = match work.rows {
                1 => compute.decode_per_s,
                _ => compute.prefill_per_s,
            };
            work.products as f64 / per_s
        });
        let limits = [
            (work.streamed_bytes as f64 / self.nvme_bytes_per_s, "NVMe"),
            (bus_s, "bus"),
            (dram_bytes as f64 / self.dram_bytes_per_s, "DRAM"),
            (compute_s, "compute"),
        ];
        let (seconds, bound) = limits
            .into_iter()
            .max_by(|a, b| a.0.total_cmp(&b.0))
            .expect("there are some limits");
        Sweep {
            streamed_bytes: work.streamed_bytes,
            copied_bytes: work.copied_bytes,
            dram_bytes,
            seconds,
            bound,
        }
    }
}

/// Predicts a sweep of `rows` rows at a context of `positions`.
pub fn sweep(
    plan: &Plan,
    config: &Config,
    weight_bytes: u64,
    (rows, positions): (usize, usize),
    machine: &Machine,
) -> Sweep {
    let seen: usize = config
        .layers
        .iter()
        .map(|l| l.window.map_or(positions, |w| positions.min(w as usize)))
        .sum();
    let pages = plan.pages_at(config, positions);
    machine.sweep(&Work {
        weight_bytes,
        streamed_bytes: plan.streamed_bytes(pages),
        copied_bytes: plan.copied_bytes(pages),
        kv_bytes: (seen * config.kv_dim() * 2 * 2) as u64,
        // Only the last row of a prompt has logits.
        products: config.products(rows as u64, 1),
        rows,
    })
}

/// Predicts a decode sweep of one row at a context of `positions`.
pub fn decode(
    plan: &Plan,
    config: &Config,
    weight_bytes: u64,
    positions: usize,
    machine: &Machine,
) -> Sweep {
    sweep(plan, config, weight_bytes, (1, positions), machine)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_limit_can_bind_and_is_named() {
        let machine = Machine {
            nvme_bytes_per_s: 2e9,
            dram_bytes_per_s: 20e9,
            bus_bytes_per_s: None,
            nvme_cpu_ms_per_gb: None,
            compute: Some(Compute {
                decode_per_s: 10e9,
                prefill_per_s: 100e9,
            }),
        };
        let resident = Work {
            weight_bytes: 4_000_000_000,
            streamed_bytes: 0,
            copied_bytes: 0,
            kv_bytes: 0,
            products: 1_000_000_000,
            rows: 1,
        };
        let dram = machine.sweep(&resident);
        assert_eq!((dram.bound, dram.seconds), ("DRAM", 0.2));
        let streamed = Work {
            streamed_bytes: 1_000_000_000,
            ..resident
        };
        let nvme = machine.sweep(&streamed);
        assert_eq!(
            (nvme.bound, nvme.seconds, nvme.dram_bytes),
            ("NVMe", 0.5, 5_000_000_000)
        );
        // What a GPU's own memory does not hold comes over the bus, wherever it was.
        let discrete = Machine {
            bus_bytes_per_s: Some(10e9),
            dram_bytes_per_s: 200e9,
            ..machine
        };
        let copied = Work {
            copied_bytes: 3_000_000_000,
            products: 0,
            ..resident
        };
        let bus = discrete.sweep(&copied);
        assert_eq!(
            (bus.bound, bus.seconds, bus.dram_bytes),
            ("bus", 0.3, 7_000_000_000)
        );
        let heavy = Work {
            products: 8_000_000_000,
            ..resident
        };
        assert_eq!(
            (machine.sweep(&heavy).bound, machine.sweep(&heavy).seconds),
            ("compute", 0.8)
        );
        let many = Work {
            rows: 100,
            products: 100_000_000_000,
            ..resident
        };
        assert_eq!(
            (machine.sweep(&many).bound, machine.sweep(&many).seconds),
            ("compute", 1.0)
        );
        let unknown = Machine {
            compute: None,
            ..machine
        };
        assert_eq!(unknown.sweep(&heavy).bound, "DRAM");
    }

    #[test]
    fn a_slower_mode_is_never_faster() {
        for board in Board::all().expect("sound") {
            for device in [Device::Cpu, Device::Gpu] {
                let Some(most) = Machine::of_board(&board, None, device) else {
                    assert!(board.gpu.is_none(), "{}", board.name);
                    continue;
                };
                let rates = |machine: &Machine| {
                    let compute = machine.compute.expect("known of a board");
                    [
                        machine.dram_bytes_per_s,
                        compute.decode_per_s,
                        compute.prefill_per_s,
                    ]
                };
                for mode in &board.modes {
                    let machine =
                        Machine::of_board(&board, Some(mode), device).expect("as the board");
                    for (rate, most) in rates(&machine).into_iter().zip(rates(&most)) {
                        assert!(rate > 0.0 && rate <= most, "{} {}", board.name, mode.name);
                    }
                }
            }
        }
    }
}
