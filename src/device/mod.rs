//! The ops a sweep needs, on a device.

pub mod cpu;
