//! Memory that the GPU computes in: the processor's as it is, or its own.
#![allow(unsafe_code)]

use std::ptr::NonNull;
use std::sync::Arc;

use super::driver::{Driver, Stream};
use crate::error::Result;

/// A piece of the GPU's own memory.
pub(super) struct Allocation {
    driver: Arc<dyn Driver>,
    address: u64,
}

impl Allocation {
    pub(super) fn new(driver: &Arc<dyn Driver>, bytes: usize) -> Result<Allocation> {
        Ok(Allocation {
            address: driver.allocate(bytes)?,
            driver: Arc::clone(driver),
        })
    }

    /// Where it begins, as a pointer that only the GPU can follow: no memory of the processor's has this address.
    pub(super) fn base(&self) -> NonNull<u8> {
        let base = std::ptr::with_exposed_provenance_mut(self.address as usize);
        NonNull::new(base).expect("the driver gives no memory at 0")
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        // SAFETY: allocated by `new`; whoever drops it has waited for all that uses it.
        unsafe { self.driver.free(self.address) };
    }
}

/// Memory of the processor's that is registered with the driver.
pub(super) struct Registered {
    driver: Arc<dyn Driver>,
    pub(super) base: NonNull<u8>,
    pub(super) bytes: usize,
    /// Where the GPU sees it.
    address: u64,
}

impl Registered {
    /// # Safety
    /// The memory stays mapped until this is dropped.
    pub(super) unsafe fn new(
        driver: &Arc<dyn Driver>,
        (base, bytes): (NonNull<u8>, usize),
    ) -> Result<Registered> {
        Ok(Registered {
            // SAFETY: the caller vouches for it.
            address: unsafe { driver.register(base, bytes)? },
            driver: Arc::clone(driver),
            base,
            bytes,
        })
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        // SAFETY: registered by `new`; whoever drops it has waited for all that uses it.
        unsafe { self.driver.unregister(self.base) };
    }
}

/// Memory that ops name by its address here, and kernels by the GPU's.
pub(super) struct Seen {
    pub(super) base: NonNull<u8>,
    pub(super) bytes: usize,
    /// Where it begins for kernels.
    pub(super) address: u64,
    /// What was taken for it.
    _image: Option<Allocation>,
}

impl Seen {
    /// Registered memory, for kernels to work on where it lies.
    pub(super) fn shared(memory: &Registered) -> Seen {
        Seen {
            base: memory.base,
            bytes: memory.bytes,
            address: memory.address,
            _image: None,
        }
    }

    /// An image of registered memory in the GPU's own, with what is in it now.
    pub(super) fn image(memory: &Registered) -> Result<Seen> {
        let image = Allocation::new(&memory.driver, memory.bytes)?;
        // SAFETY: as many bytes of either, which both stay until the device is finished.
        unsafe {
            let from = memory.base.as_ptr().expose_provenance() as u64;
            let driver = &memory.driver;
            driver.copy(Stream::Compute, image.address, from, memory.bytes)?;
        }
        Ok(Seen {
            base: memory.base,
            bytes: memory.bytes,
            address: image.address,
            _image: Some(image),
        })
    }

    /// The GPU's own memory, which has the same address for both.
    pub(super) fn own(memory: &Allocation, bytes: usize) -> Seen {
        Seen {
            base: memory.base(),
            bytes,
            address: memory.address,
            _image: None,
        }
    }
}
