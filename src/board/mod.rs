//! The board: what it is, how warm it runs and what it draws, and how much the engine may ask of it.
//!
//! Everything here only reads the system. Paths lie under a root, which is `/` but in tests.
//!
//! | what | where |
//! |---|---|
//! | [`config`] | a TOML per board |
//! | [`cores`] | which processors compute |
//! | [`detect`] | which board this is |
//! | [`sensors`] | power, temperatures, clocks, from sysfs |
//! | [`governor`] | PURE: readings and limits to what the engine may do |
//! | [`monitor`] | the thread that samples, sums up energy and asks the governor |
//! | [`pace`] | how the engine keeps to what that allows |
//!
//! A caller needs little of it: [`detect::board`] for the [`Board`], [`governor::Goals::of_board`] and
//! [`Monitor::start`] for readings, energy and the governor, and [`Monitor::pace`] to hand to the engine.

pub mod config;
pub mod cores;
pub mod detect;
mod files;
pub mod governor;
pub mod monitor;
pub mod pace;
pub mod sensors;

pub use config::Board;
pub use governor::{GiveUp, Limits};
pub use monitor::{Energy, Monitor};
pub use pace::Pace;

/// What the sensors say at one moment. What has no sensor, or whose sensor does not answer, is none.
#[derive(Debug, Clone, Copy, Default, PartialEq, serde::Serialize)]
pub struct Reading {
    /// Power of the whole, in watts.
    pub power_w: Option<f64>,
    /// The hottest zone.
    pub junction_c: Option<f64>,
    /// Over-current events since the last reading.
    pub over_current_events: u32,
    /// Clock of the last core.
    pub cpu_mhz: Option<u32>,
    /// Clock of the GPU.
    pub gpu_mhz: Option<u32>,
    /// Clock of the memory controller (readable by root only).
    pub emc_mhz: Option<u32>,
}
