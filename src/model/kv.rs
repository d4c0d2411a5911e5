//! The keys and values of a session, in pages that take slots from the weights.
#![allow(unsafe_code)]

use std::ptr;

use crate::arena::SlotId;
use crate::device::cpu::KvLayout;
use crate::error::{Error, Kind, Result};
use crate::model::config::{Config, LayerSpec};
use crate::store::Store;

/// Positions of a page are a multiple of this: attention goes through the context in such blocks.
const PAGE_POSITIONS_STEP: usize = 16;

/// The layout of pages in slots of `slot_bytes`: as many positions as fit, but no more than `context`.
///
/// `page_positions` is 0 when a slot is too small for any.
pub fn layout(config: &Config, slot_bytes: usize, context: usize) -> KvLayout {
    let position_bytes = config.kv_dim() * 2 * 2;
    let fitting = slot_bytes / position_bytes / PAGE_POSITIONS_STEP * PAGE_POSITIONS_STEP;
    let page_positions = fitting.min(context.next_multiple_of(PAGE_POSITIONS_STEP));
    KvLayout {
        kv_heads: config.kv_heads,
        head_dim: config.head_dim,
        page_positions,
    }
}

/// Pages that a layer holds at most at once when a session has reached `context` positions.
///
/// A windowed layer gives up the pages that its window has left behind; `batch` rows come in one sweep.
pub fn pages_max(spec: &LayerSpec, layout: &KvLayout, context: usize, batch: usize) -> usize {
    let all = context.div_ceil(layout.page_positions);
    match spec.window {
        // The window and the batch may begin in the middle of a page.
        Some(window) => all.min((window as usize + batch).div_ceil(layout.page_positions) + 1),
        None => all,
    }
}

/// The pages of one layer: a table over the whole context, null where there is none (yet, or any more).
struct LayerPages {
    pages: Vec<*const u8>,
    slots: Vec<SlotId>,
    /// Pages before this one were given up, those from `end` on are not there yet.
    first: usize,
    end: usize,
}

/// One conversation's timeline: how far it is, and where its keys and values are.
pub struct Session {
    layout: KvLayout,
    layers: Vec<LayerPages>,
    context: usize,
    len: usize,
}

// SAFETY: the pointers lead into slots that belong to this session until it gives them back.
unsafe impl Send for Session {}

impl Session {
    /// An empty session of at most `context` positions.
    pub fn new(layers: usize, layout: KvLayout, context: usize) -> Session {
        let table = context.div_ceil(layout.page_positions);
        let layer = || LayerPages {
            pages: vec![ptr::null(); table],
            slots: vec![0; table],
            first: 0,
            end: 0,
        };
        Session {
            layout,
            layers: (0..layers).map(|_| layer()).collect(),
            context,
            len: 0,
        }
    }

    /// Positions so far.
    #[allow(clippy::len_without_is_empty)] // Nobody asks whether a conversation is empty.
    pub fn len(&self) -> usize {
        self.len
    }

    /// The most positions it can have.
    pub fn context(&self) -> usize {
        self.context
    }

    /// Bytes that the page tables of one session take.
    pub fn table_bytes(layers: usize, layout: &KvLayout, context: usize) -> usize {
        layers
            * context.div_ceil(layout.page_positions)
            * (size_of::<*const u8>() + size_of::<SlotId>())
    }

    /// Makes room for `rows` more positions, and gives up pages that no window reaches any more.
    ///
    /// # Errors
    /// The context is full, or memory is.
    pub fn extend(&mut self, specs: &[LayerSpec], rows: usize, store: &mut Store) -> Result<()> {
        if self.len + rows > self.context {
            return Err(Error::new(
                Kind::Budget,
                format!(
                    "the conversation is longer than its context of {} tokens",
                    self.context
                ),
                "give a larger --ctx, or begin a new conversation",
            ));
        }
        for (layer, spec) in self.layers.iter_mut().zip(specs) {
            if let Some(window) = spec.window {
                let first_seen = (self.len + 1).saturating_sub(window as usize);
                while (layer.first + 1) * self.layout.page_positions <= first_seen
                    && layer.first < layer.end
                {
                    layer.pages[layer.first] = ptr::null();
                    store.free_page(layer.slots[layer.first]);
                    layer.first += 1;
                }
            }
            while layer.end * self.layout.page_positions < self.len + rows {
                let slot = store.take_page()?;
                layer.slots[layer.end] = slot;
                layer.pages[layer.end] = store.page(slot).as_ptr();
                layer.end += 1;
            }
        }
        Ok(())
    }

    /// Counts `rows` more positions, whose keys and values every layer has now.
    pub fn advance(&mut self, rows: usize) {
        self.len += rows;
    }

    /// Forgets everything; the pages go back to the weights.
    pub fn clear(&mut self, store: &mut Store) {
        for layer in &mut self.layers {
            for page in layer.first..layer.end {
                layer.pages[page] = ptr::null();
                store.free_page(layer.slots[page]);
            }
            (layer.first, layer.end) = (0, 0);
        }
        self.len = 0;
    }

    /// The page table of a layer, for attention.
    pub fn pages(&self, layer: usize) -> *const *const u8 {
        self.layers[layer].pages.as_ptr()
    }

    /// The page and the place in it of a position.
    pub fn place(&self, layer: usize, position: usize) -> (*mut u8, usize) {
        let page = self.layers[layer].pages[position / self.layout.page_positions];
        assert!(!page.is_null(), "position {position} has no page");
        (page.cast_mut(), position % self.layout.page_positions)
    }
}
