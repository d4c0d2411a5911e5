//! Reservations of memory, which never grow: one of slots for all models, and one of what each model has for itself.
//!
//! `Reservation::new` maps one, `carve` takes fixed spans from its front, and
//! `seal` turns the rest into equal slots. After `seal` nothing can be carved:
//! the type is gone. Slots hold weight tiles and KV pages ([`crate::store`]).
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::marker::PhantomData;
use std::num::NonZeroUsize;
use std::ops::{Deref, DerefMut, Range};
use std::ptr::NonNull;
use std::sync::Arc;

use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, munmap};

use crate::error::{Error, Kind, Result};

/// The disk's and the processor's page: slots begin and end on it.
pub const PAGE_BYTES: usize = 4096;
/// Spans begin on a cache line, so that vectors do not straddle two and threads do not share one.
const LINE_BYTES: usize = 64;
/// What the system may have a mapping take beyond what of it was touched.
pub const HUGE_PAGE_BYTES: usize = 2 << 20;
/// io_uring registers at most this much as one buffer.
const REGION_BYTES_MAX: usize = 1 << 30;

/// The mapping itself; unmapped when the last span or slot table is gone.
struct Mapping {
    base: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the mapping is plain memory; who may touch which part of it is ruled by `Span` and `Slots`.
unsafe impl Send for Mapping {}
// SAFETY: as above; the struct itself is never changed after it was made.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: base and bytes are those of one mmap, and every view of it holds an `Arc` of this.
        let unmapped = unsafe { munmap(self.base.cast::<c_void>(), self.bytes) };
        debug_assert!(unmapped.is_ok());
    }
}

/// Types for which all-zero memory, and any other bit pattern, is a value.
///
/// # Safety
/// Implementors must be plain numbers: no padding, no invalid patterns, no drop.
pub unsafe trait Plain: Copy + 'static {}
// SAFETY: plain numbers.
unsafe impl Plain for u8 {}
// SAFETY: plain numbers.
unsafe impl Plain for f32 {}
// SAFETY: plain numbers.
unsafe impl Plain for u32 {}
// SAFETY: plain numbers.
unsafe impl Plain for u64 {}

/// The arena while fixed spans are still being carved from it.
pub struct Reservation {
    mapping: Arc<Mapping>,
    carved_bytes: usize,
}

impl Reservation {
    /// Reserves `bytes` (rounded up to whole pages) of zeroed anonymous memory, in huge pages where the system has some.
    pub fn new(bytes: usize) -> Result<Self> {
        let refused = |what: &str, e: nix::Error| {
            Error::new(
                Kind::Budget,
                format!("cannot {what} {} MiB of memory: {e}", bytes >> 20),
                "give a smaller --memory, or free memory on this machine",
            )
        };
        let bytes = bytes.max(1).next_multiple_of(PAGE_BYTES);
        let length = NonZeroUsize::new(bytes).expect("at least one page");
        // SAFETY: a new anonymous mapping at an address of the kernel's choice overlaps nothing.
        let base = unsafe {
            mmap_anonymous(
                None,
                length,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE,
            )
        }
        .map_err(|e| refused("reserve", e))?;
        let mapping = Mapping {
            base: base.cast::<u8>(),
            bytes,
        };
        if bytes >= HUGE_PAGE_BYTES {
            // Huge pages save TLB misses on weights that are read once a sweep; without them all still works.
            // SAFETY: the range is the mapping just made.
            let _ = unsafe { madvise(base, bytes, MmapAdvise::MADV_HUGEPAGE) };
        }
        Ok(Reservation {
            mapping: Arc::new(mapping),
            carved_bytes: 0,
        })
    }

    /// Takes a fixed span of `len` zeroed values.
    pub fn carve<T: Plain>(&mut self, len: usize) -> Result<Span<T>> {
        let start = self.carved_bytes;
        let end = (start + len * size_of::<T>()).next_multiple_of(LINE_BYTES);
        if end > self.mapping.bytes {
            return Err(Error::new(
                Kind::Budget,
                format!(
                    "the reservation of {} bytes has no room for {} more",
                    self.mapping.bytes,
                    end - start
                ),
                "this is a defect in the budget's sum: please report it",
            ));
        }
        self.carved_bytes = end;
        // SAFETY: start is within the mapping.
        let ptr = unsafe { self.mapping.base.add(start) }.cast::<T>();
        Ok(Span {
            ptr,
            len,
            mapping: Arc::clone(&self.mapping),
            marker: PhantomData,
        })
    }

    /// Bytes that `carve` takes for `len` values of `T`.
    pub const fn carved_size<T: Plain>(len: usize) -> usize {
        (len * size_of::<T>()).next_multiple_of(LINE_BYTES)
    }

    /// Ends the carving: what is left becomes slots of `slot_bytes` (a multiple of the page) each.
    pub fn seal(self, slot_bytes: usize) -> Slots {
        assert!(
            slot_bytes > 0 && slot_bytes.is_multiple_of(PAGE_BYTES),
            "slots are whole pages"
        );
        let first = self.carved_bytes.next_multiple_of(PAGE_BYTES);
        let count = self.mapping.bytes.saturating_sub(first) / slot_bytes;
        // SAFETY: at the page after the last span, or at the mapping's end.
        let base = unsafe { self.mapping.base.add(first.min(self.mapping.bytes)) };
        // SAFETY: the rest of the mapping, which has no other view, and lives as long as the slots.
        unsafe { Slots::of(base, slot_bytes, count as u32, self.mapping) }
    }
}

/// A fixed span of the arena, owned by whoever holds it.
pub struct Span<T: Plain> {
    ptr: NonNull<T>,
    len: usize,
    mapping: Arc<Mapping>,
    marker: PhantomData<T>,
}

// SAFETY: a span is the only view of its part of the mapping, like a `Box<[T]>`.
unsafe impl<T: Plain> Send for Span<T> {}
// SAFETY: as above.
unsafe impl<T: Plain> Sync for Span<T> {}

impl<T: Plain> Span<T> {
    /// The whole mapping that the span is part of, as its first byte and its length: for a GPU that is to see it.
    pub fn mapping(&self) -> (NonNull<u8>, usize) {
        (self.mapping.base, self.mapping.bytes)
    }

    /// The bytes that the span takes in the arena's mapping, for the budget.
    pub fn bytes(&self) -> usize {
        debug_assert!(self.len * size_of::<T>() <= self.mapping.bytes);
        self.len * size_of::<T>()
    }
}

impl<T: Plain> Deref for Span<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: ptr..ptr+len was carved for this span alone, is zeroed or written since, and the mapping lives.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }
}

impl<T: Plain> DerefMut for Span<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`, and `&mut self` makes it the only reference.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }
}

/// The number of a slot.
pub type SlotId = u32;

/// Equal slots of some memory, addressed by number. Who may touch which is the store's business.
pub struct Slots {
    base: NonNull<u8>,
    slot_bytes: usize,
    count: u32,
    /// Has the memory go with the last that needs it.
    _memory: Arc<dyn Send + Sync>,
}

// SAFETY: the base is an address to count from; the slots behind it are touched by whoever the store hands them to.
unsafe impl Send for Slots {}

impl Slots {
    /// Slots in memory that begins at `base` and lives as long as `memory`: a device's own, which the processor cannot
    /// touch, or what is left of a [`Reservation`].
    ///
    /// # Safety
    /// From `base` on there are `count * slot_bytes` bytes that nobody else uses.
    pub unsafe fn of(
        base: NonNull<u8>,
        slot_bytes: usize,
        count: u32,
        memory: Arc<dyn Send + Sync>,
    ) -> Slots {
        Slots {
            base,
            slot_bytes,
            count,
            _memory: memory,
        }
    }

    /// How many slots there are.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// Bytes of each slot.
    pub fn slot_bytes(&self) -> usize {
        self.slot_bytes
    }

    /// The first byte of a slot.
    pub fn ptr(&self, slot: SlotId) -> NonNull<u8> {
        assert!(slot < self.count, "slot {slot} of {}", self.count);
        // SAFETY: slot < count, so the offset is within the memory.
        unsafe { self.base.add(slot as usize * self.slot_bytes) }
    }

    /// Gives the memory of some slots of a [`Reservation`] back to the system, until they are [taken
    /// back](Self::take_back).
    ///
    /// Nobody may use them meanwhile, the kernel's registered buffers included (those keep the memory).
    pub fn discard(&self, slots: Range<SlotId>) {
        // Zapping part of a huge page frees none of it before the system is short of memory; freeing lazily splits it.
        // The part that stays must not be made whole again either.
        for advice in [MmapAdvise::MADV_FREE, MmapAdvise::MADV_NOHUGEPAGE] {
            // A kernel without it has no huge pages to split.
            let _ = self.advise(&slots, advice);
        }
        if let Err(error) = self.advise(&slots, MmapAdvise::MADV_DONTNEED) {
            log::warn!("the system does not take memory back ({error})");
        }
    }

    /// Has slots whose memory was [given back](Self::discard) be as they were in the beginning: they read as zeros.
    pub fn take_back(&self, slots: Range<SlotId>) {
        // As of the whole reservation: without huge pages all still works.
        let _ = self.advise(&slots, MmapAdvise::MADV_HUGEPAGE);
    }

    fn advise(&self, slots: &Range<SlotId>, advice: MmapAdvise) -> nix::Result<()> {
        if slots.is_empty() {
            return Ok(());
        }
        assert!(slots.end <= self.count, "slots {slots:?} of {}", self.count);
        let start = self.ptr(slots.start).cast::<c_void>();
        // SAFETY: the range is part of the mapping, and nobody uses what lies there.
        unsafe { madvise(start, slots.len() * self.slot_bytes, advice) }
    }

    /// Copies the first `bytes` of one slot into another.
    ///
    /// # Safety
    /// The processor can touch both, and nobody else uses either meanwhile.
    pub unsafe fn copy(&self, from: SlotId, to: SlotId, bytes: usize) {
        assert!(from != to && bytes <= self.slot_bytes);
        let (from, to) = (self.ptr(from), self.ptr(to));
        // SAFETY: both lie within the memory, and apart.
        unsafe { from.copy_to_nonoverlapping(to, bytes) };
    }

    /// The first `count` slots as regions, none longer than io_uring takes as one buffer.
    pub fn regions(&self, count: u32) -> impl Iterator<Item = (NonNull<u8>, usize)> {
        self.pieces(count, REGION_BYTES_MAX)
    }

    /// The same as pieces of whole slots, of at most `bytes_max` unless a slot is larger. Where one ends does not depend
    /// on how many there are.
    pub fn pieces(
        &self,
        count: u32,
        bytes_max: usize,
    ) -> impl Iterator<Item = (NonNull<u8>, usize)> {
        let per_piece = (bytes_max / self.slot_bytes).max(1) as u32;
        (0..count).step_by(per_piece as usize).map(move |first| {
            let len = per_piece.min(count - first) as usize;
            (self.ptr(first), len * self.slot_bytes)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn carves_then_seals() {
        let mut reservation = Reservation::new(64 << 10).expect("64 KiB");
        let mut a = reservation.carve::<f32>(100).expect("fits");
        let b = reservation.carve::<u8>(1).expect("fits");
        a.fill(1.0);
        assert_eq!(b[0], 0);
        assert_eq!(a.bytes(), 400);
        assert!(reservation.carve::<u8>(1 << 20).is_err());
        let slots = reservation.seal(8192);
        assert_eq!(slots.count(), 7);
        assert_eq!(
            slots.ptr(1).as_ptr() as usize - slots.ptr(0).as_ptr() as usize,
            8192
        );
        let pieces = slots.pieces(6, 3 * 8192 + 1);
        assert!(pieces.eq([(0, 3), (3, 3)].map(|(slot, n)| (slots.ptr(slot), n * 8192))));
        assert_eq!(slots.pieces(7, 1).count(), 7, "a slot is never cut");
        assert!(slots.regions(7).eq([(slots.ptr(0), 7 * 8192)]));
        assert!(slots.regions(5).eq([(slots.ptr(0), 5 * 8192)]));
        assert_eq!(slots.regions(0).count(), 0);
        assert_eq!(a[99], 1.0);
    }

    #[test]
    fn a_region_is_no_longer_than_io_uring_takes() {
        let slots = Reservation::new(5 << 30)
            .expect("address space")
            .seal(384 << 20);
        let lens: Vec<usize> = slots.regions(13).map(|(_, len)| len >> 20).collect();
        assert_eq!(lens, [768, 768, 768, 768, 768, 768, 384]);
    }

    #[test]
    fn discarded_slots_read_as_zeros() {
        let slots = Reservation::new(64 << 10).expect("64 KiB").seal(8192);
        // SAFETY: slots of this test alone.
        let byte = |slot| unsafe { &mut *slots.ptr(slot).as_ptr() };
        for slot in 0..slots.count() {
            *byte(slot) = slot as u8 + 1;
        }
        slots.discard(3..8);
        slots.take_back(3..8);
        let bytes: Vec<u8> = (0..8).map(|slot| *byte(slot)).collect();
        assert_eq!(bytes, [1, 2, 3, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn spans_outlive_the_slot_table() {
        let mut reservation = Reservation::new(8192).expect("two pages");
        let mut span = reservation.carve::<u32>(4).expect("fits");
        drop(reservation.seal(PAGE_BYTES));
        span[3] = 7;
        assert_eq!(&span[..], &[0, 0, 0, 7]);
    }
}
