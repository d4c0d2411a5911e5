//! The CUDA driver, asked without linking to it.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_char, c_int, c_void};

use super::{Check, Host};
use crate::device::cuda::driver::{CAPABILITY_MIN, VERSION_MIN, version_name};

/// Where JetPack keeps the driver, where the loader does not look by itself: JetPack 6 and later, then 5.
const PLACES: [&CStr; 3] = [
    c"libcuda.so.1",
    c"/usr/lib/aarch64-linux-gnu/nvidia/libcuda.so.1",
    c"/usr/lib/aarch64-linux-gnu/tegra/libcuda.so.1",
];
/// `CUdevice_attribute` of cuda.h.
const CAPABILITY_MAJOR: c_int = 75;
const CAPABILITY_MINOR: c_int = 76;
const HOST_REGISTER_SUPPORTED: c_int = 99;

/// What the driver says of the first device.
struct Found {
    driver: u32,
    capability: (u32, u32),
    registers_host_memory: bool,
}

impl Found {
    /// What the device would be refused for, and what helps.
    fn lacks(&self) -> Option<(String, String)> {
        let (major, minor) = CAPABILITY_MIN;
        if self.driver < VERSION_MIN {
            let least = version_name(VERSION_MIN);
            return Some((
                format!("too old for the kernels, which need {least}"),
                "update the driver (JetPack 5.1 has 11.4); until then the processor computes"
                    .into(),
            ));
        }
        if self.capability < CAPABILITY_MIN {
            return Some((
                format!("less than the {major}.{minor} of the kernels"),
                "the processor computes; nothing is to be done on this GPU".into(),
            ));
        }
        (!self.registers_host_memory).then(|| {
            (
                "does not register host memory".into(),
                "update the driver (JetPack 5.1 or newer); until then the processor computes"
                    .into(),
            )
        })
    }
}

pub(super) fn check(host: &Host) -> Check {
    let name = "CUDA";
    if !host.live() {
        return Check::skipped(name, "not tried under another root");
    }
    match (ask(), &host.board.gpu) {
        (Ok(found), _) => {
            let (major, minor) = found.capability;
            let what = format!(
                "driver {}, compute capability {major}.{minor}",
                version_name(found.driver)
            );
            match found.lacks() {
                None => Check::ok(name, format!("{what}, registers host memory")),
                Some((lack, remedy)) => Check::warning(name, format!("{what}, {lack}"), remedy),
            }
        }
        (Err(why), None) => Check::skipped(name, why),
        (Err(why), Some(_)) => Check::warning(
            name,
            why,
            "install JetPack's driver (nvidia-l4t-cuda), and add the user to the group video; the processor computes",
        ),
    }
}

/// Asks the driver, or says why it cannot be asked.
fn ask() -> Result<Found, String> {
    let library = PLACES
        .iter()
        // SAFETY: the driver's library may be loaded by any process; its names are NUL-terminated.
        .map(|place| unsafe { libc::dlopen(place.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) })
        .find(|library| !library.is_null())
        .ok_or("no driver (libcuda.so.1 is not found)")?;
    let symbol = |name: &CStr| -> Result<*mut c_void, String> {
        // SAFETY: the library stays loaded for the life of the process, the name is NUL-terminated.
        let symbol = unsafe { libc::dlsym(library, name.as_ptr() as *const c_char) };
        match symbol.is_null() {
            true => Err(format!("the driver lacks {}", name.to_string_lossy())),
            false => Ok(symbol),
        }
    };
    let (init, count, version, get, attribute) = (
        symbol(c"cuInit")?,
        symbol(c"cuDeviceGetCount")?,
        symbol(c"cuDriverGetVersion")?,
        symbol(c"cuDeviceGet")?,
        symbol(c"cuDeviceGetAttribute")?,
    );
    // SAFETY: these are the signatures that cuda.h gives these functions; CUresult and CUdevice are ints.
    let (init, count, version, get, attribute) = unsafe {
        type One<T> = unsafe extern "C" fn(T) -> c_int;
        (
            std::mem::transmute::<*mut c_void, One<u32>>(init),
            std::mem::transmute::<*mut c_void, One<*mut c_int>>(count),
            std::mem::transmute::<*mut c_void, One<*mut c_int>>(version),
            std::mem::transmute::<*mut c_void, unsafe extern "C" fn(*mut c_int, c_int) -> c_int>(
                get,
            ),
            std::mem::transmute::<
                *mut c_void,
                unsafe extern "C" fn(*mut c_int, c_int, c_int) -> c_int,
            >(attribute),
        )
    };
    let done = |what: &str, code: c_int| match code {
        0 => Ok(()),
        code => Err(format!("the driver's {what} fails with {code}")),
    };
    let (mut devices, mut driver, mut device) = (0, 0, 0);
    // SAFETY: every pointer is to an int on this stack, and cuInit comes first.
    unsafe {
        done("cuInit", init(0))?;
        done("cuDriverGetVersion", version(&mut driver))?;
        done("cuDeviceGetCount", count(&mut devices))?;
        if devices == 0 {
            return Err("a driver, but no device".into());
        }
        done("cuDeviceGet", get(&mut device, 0))?;
    }
    let value = |which: c_int| -> Result<c_int, String> {
        let mut value = 0;
        // SAFETY: as above; an attribute that the driver does not know is an error code.
        done("cuDeviceGetAttribute", unsafe {
            attribute(&mut value, which, device)
        })?;
        Ok(value)
    };
    Ok(Found {
        driver: driver as u32,
        capability: (
            value(CAPABILITY_MAJOR)? as u32,
            value(CAPABILITY_MINOR)? as u32,
        ),
        registers_host_memory: value(HOST_REGISTER_SUPPORTED).unwrap_or(0) != 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_device_would_be_refused_for_is_told() {
        let found = |driver, capability, registers_host_memory| Found {
            driver,
            capability,
            registers_host_memory,
        };
        let told = |found: Found| found.lacks().map(|(lack, _)| lack);
        assert_eq!(told(found(VERSION_MIN, (8, 7), true)), None, "Orin");
        assert_eq!(told(found(VERSION_MIN + 1000, (8, 0), true)), None, "A100");
        let old = told(found(10_020, (8, 7), true)).expect("JetPack 4");
        assert!(old.contains(&version_name(VERSION_MIN)), "{old}");
        let xavier = told(found(VERSION_MIN, (7, 2), true)).expect("Xavier");
        assert!(xavier.contains("8.0"), "{xavier}");
        assert!(told(found(VERSION_MIN, (8, 7), false)).is_some());
    }
}
