//! A page-aligned buffer for the few reads that do not go to the arena.
#![allow(unsafe_code)]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;

use super::Region;

/// Zeroed memory that direct reads can land in, freed on drop.
pub struct Buffer {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: the buffer owns its memory, as a `Vec<u8>` does.
unsafe impl Send for Buffer {}

impl Buffer {
    /// Allocates `len` bytes (at least one), aligned to 4 KiB.
    pub fn new(len: usize) -> Self {
        let layout = Layout::from_size_align(len.max(1), 4096)
            .expect("4096 is a power of two and no length is near isize::MAX");
        // SAFETY: the layout's size is not zero.
        let start = unsafe { alloc_zeroed(layout) };
        let start = NonNull::new(start).unwrap_or_else(|| handle_alloc_error(layout));
        Buffer { start, layout }
    }

    /// The whole buffer, for registration and as the target of reads.
    pub fn region(&self) -> Region {
        Region {
            start: self.start,
            len: self.layout.size(),
        }
    }

    /// Where a read to byte `at` lands.
    pub fn at(&self, at: usize) -> NonNull<u8> {
        assert!(at < self.layout.size(), "outside of the buffer");
        // SAFETY: inside of the allocation, as just checked.
        unsafe { self.start.add(at) }
    }

    /// The bytes; no read into them may be in flight.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the buffer owns `size` initialised bytes.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.layout.size()) }
    }

    /// The bytes, for writing; no read into them may be in flight.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: the buffer owns `size` initialised bytes, and `&mut self` is the only way to them.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.layout.size()) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout, and freed once.
        unsafe { dealloc(self.start.as_ptr(), self.layout) }
    }
}
