//! A global allocator that counts the allocations of all threads while it is told to.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

struct Counting;

static COUNTING: AtomicBool = AtomicBool::new(false);
static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is passed on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if COUNTING.load(Ordering::Relaxed) {
            ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        }
        // SAFETY: the caller keeps `GlobalAlloc`'s promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Counts from now on.
pub fn begin() {
    COUNTING.store(true, Ordering::SeqCst);
    drop(std::hint::black_box(Box::new(1)));
    assert!(
        ALLOCATIONS.swap(0, Ordering::SeqCst) > 0,
        "the counter does not count"
    );
}

/// Allocations since then.
///
/// The test harness's own threads allocate now and then: of some rounds of the same work one must be without any, and if the
/// work took an allocation, none would be.
pub fn end() -> usize {
    COUNTING.store(false, Ordering::SeqCst);
    ALLOCATIONS.load(Ordering::SeqCst)
}
