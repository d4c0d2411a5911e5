//! Clocks of the processor, the GPU and the memory controller.

use std::path::{Path, PathBuf};

use crate::board::Reading;
use crate::board::files::{self, Probe};

#[derive(Debug, Default)]
pub struct Clocks {
    cpu_khz: Option<Probe>,
    gpu_hz: Option<Probe>,
    emc_hz: Option<Probe>,
}

impl Clocks {
    pub(super) fn discover(root: &Path) -> Clocks {
        Clocks {
            cpu_khz: cpu(root),
            gpu_hz: gpu(root),
            emc_hz: Probe::open(&root.join("sys/kernel/debug/bpmp/debug/clk/emc/rate")),
        }
    }

    pub(super) fn sample(
        &self,
        number: &mut impl FnMut(&Probe) -> Option<i64>,
        into: &mut Reading,
    ) {
        let mut mhz = |probe: &Option<Probe>, per_mhz: i64| {
            let clock = number(probe.as_ref()?)?;
            u32::try_from(clock / per_mhz).ok()
        };
        into.cpu_mhz = mhz(&self.cpu_khz, 1000);
        into.gpu_mhz = mhz(&self.gpu_hz, 1_000_000);
        into.emc_mhz = mhz(&self.emc_hz, 1_000_000);
    }
}

/// The clock of the last core that is online: what hardware does to it shows in `cpuinfo_cur_freq`, which may be for
/// root only, and not in `scaling_cur_freq`.
fn cpu(root: &Path) -> Option<Probe> {
    let number = |path: &PathBuf| -> Option<u32> {
        path.file_name()?
            .to_str()?
            .strip_prefix("cpu")?
            .parse()
            .ok()
    };
    let mut cores = files::entries(&root.join("sys/devices/system/cpu"));
    cores.retain(|path| number(path).is_some());
    cores.sort_by_key(|path| std::cmp::Reverse(number(path)));
    cores.iter().find_map(|core| {
        let file = |name: &str| Probe::open(&core.join("cpufreq").join(name));
        file("cpuinfo_cur_freq").or_else(|| file("scaling_cur_freq"))
    })
}

/// The GPU among the devices that scale their clocks: by its name in the device tree, on Thor by its own.
fn gpu(root: &Path) -> Option<Probe> {
    let is_gpu = |folder: &&PathBuf| {
        let name = files::text(&folder.join("device/of_node/name"));
        let by_tree = name.is_some_and(|name| name == "gpu" || name == "ga10b");
        let own = folder.file_name().and_then(|name| name.to_str());
        by_tree || own.is_some_and(|name| name.starts_with("gpu-gpc") || name.ends_with(".gpu"))
    };
    let folders = files::entries(&root.join("sys/class/devfreq"));
    let gpu = folders.iter().find(is_gpu)?;
    Probe::open(&gpu.join("cur_freq"))
}
