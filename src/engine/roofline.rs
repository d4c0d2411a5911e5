//! The best speed that the machine's limits allow.

use crate::engine::plan::Plan;
use crate::model::config::Config;

/// What a machine can do, each alone.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Machine {
    /// Bytes per second from NVMe.
    pub nvme_bytes_per_s: f64,
    /// Bytes per second from DRAM.
    pub dram_bytes_per_s: f64,
    /// Processor time that reading takes, in milliseconds per GB; none if it was not measured.
    pub nvme_cpu_ms_per_gb: Option<f64>,
}

impl Machine {
    /// What two measurements say together.
    pub fn mean(&self, other: &Machine) -> Machine {
        Machine {
            nvme_bytes_per_s: (self.nvme_bytes_per_s + other.nvme_bytes_per_s) / 2.0,
            dram_bytes_per_s: (self.dram_bytes_per_s + other.dram_bytes_per_s) / 2.0,
            nvme_cpu_ms_per_gb: self
                .nvme_cpu_ms_per_gb
                .zip(other.nvme_cpu_ms_per_gb)
                .map(|(a, b)| (a + b) / 2.0),
        }
    }
}

/// The time of one decode sweep by the roofline, and what bounds it.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Sweep {
    /// Bytes that stream from NVMe.
    pub streamed_bytes: u64,
    /// Bytes that cross the DRAM interface: weights and KV once, streamed bytes once more on their way in.
    pub dram_bytes: u64,
    /// The floor of the sweep's time.
    pub seconds: f64,
    /// The limit that sets it.
    pub bound: &'static str,
}

/// Predicts a decode sweep of one row at a context of `positions`: T = max(S/Bn, (W+S+K)/Bd).
pub fn decode(
    plan: &Plan,
    config: &Config,
    weight_bytes: u64,
    positions: usize,
    machine: &Machine,
) -> Sweep {
    let streamed_bytes = plan.streamed_bytes(plan.pages_at(config, positions));
    let seen: usize = config
        .layers
        .iter()
        .map(|l| l.window.map_or(positions, |w| positions.min(w as usize)))
        .sum();
    let kv_bytes = (seen * config.kv_dim() * 2 * 2) as u64;
    let dram_bytes = weight_bytes + streamed_bytes + kv_bytes;
    let nvme_s = streamed_bytes as f64 / machine.nvme_bytes_per_s;
    let dram_s = dram_bytes as f64 / machine.dram_bytes_per_s;
    let bound = if nvme_s > dram_s { "NVMe" } else { "DRAM" };
    Sweep {
        streamed_bytes,
        dram_bytes,
        seconds: nvme_s.max(dram_s),
        bound,
    }
}
