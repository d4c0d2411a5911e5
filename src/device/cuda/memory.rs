//! Memory that the GPU computes in: the processor's as it is, or its own.
#![allow(unsafe_code)]

use std::ptr::NonNull;
use std::sync::Arc;

use super::driver::{Driver, Stream};
use crate::error::Result;

/// A piece of the GPU's own memory.
pub(super) struct Allocation {
    driver: Arc<dyn Driver>,
    pub(super) address: u64,
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

/// Buffers that ops name by addresses here, and that lie in the GPU's memory: the processor only touches the front.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Buffers {
    /// Where they begin here.
    pub base: NonNull<u8>,
    /// Bytes of all.
    pub bytes: usize,
    /// Bytes at the front that go to the GPU and back: as they are at first, and whenever a part is uploaded or
    /// downloaded. What lies behind them is never touched here, so it takes addresses alone.
    pub front: usize,
}

/// Memory that ops name by its address here, and kernels by the GPU's.
pub(super) struct Seen {
    pub(super) base: NonNull<u8>,
    pub(super) bytes: usize,
    /// Where it begins for kernels.
    pub(super) address: u64,
    /// What was taken for it.
    image: Option<Allocation>,
    registered: Option<Registered>,
}

impl Seen {
    /// Registered memory, for kernels to work on where it lies.
    pub(super) fn shared(memory: Registered) -> Seen {
        Seen {
            base: memory.base,
            bytes: memory.bytes,
            address: memory.address,
            image: None,
            registered: Some(memory),
        }
    }

    /// Registered memory, for kernels to work on what was copied of it to `address`.
    pub(super) fn copied(memory: Registered, address: u64) -> Seen {
        Seen {
            address,
            ..Seen::shared(memory)
        }
    }

    /// Buffers in the GPU's memory, with what is in their front now.
    ///
    /// # Safety
    /// The front stays mapped until this is dropped.
    pub(super) unsafe fn image(driver: &Arc<dyn Driver>, buffers: &Buffers) -> Result<Seen> {
        let image = Allocation::new(driver, buffers.bytes)?;
        // SAFETY: the caller vouches for it.
        let front = unsafe { Registered::new(driver, (buffers.base, buffers.front))? };
        // SAFETY: as many bytes of either, which both stay until the device is finished.
        unsafe {
            let from = buffers.base.as_ptr().expose_provenance() as u64;
            driver.copy(Stream::Compute, image.address, from, buffers.front)?;
        }
        Ok(Seen {
            base: buffers.base,
            bytes: buffers.bytes,
            address: image.address,
            image: Some(image),
            registered: Some(front),
        })
    }

    /// The GPU's own memory, which has the same address for both.
    pub(super) fn own(memory: &Allocation, bytes: usize) -> Seen {
        Seen {
            base: memory.base(),
            bytes,
            address: memory.address,
            image: None,
            registered: None,
        }
    }

    /// Whether these are buffers.
    pub(super) fn is_image(&self) -> bool {
        self.image.is_some()
    }

    /// Whether nothing here lies behind it.
    pub(super) fn is_own(&self) -> bool {
        self.registered.is_none()
    }
}
