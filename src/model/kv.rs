//! The keys and values of a session, in pages that take slots from the weights.
#![allow(unsafe_code)]

use std::ptr;

use crate::arena::SlotId;
use crate::device::Device;
use crate::device::cpu::KvLayout;
use crate::error::{Error, Kind, Result};
use crate::model::config::{Config, LayerSpec};
use crate::store::{Moved, Store};

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

/// Bytes of the smallest page there is.
pub fn page_bytes_min(config: &Config) -> usize {
    PAGE_POSITIONS_STEP * config.kv_dim() * 2 * 2
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
    /// Positions behind the window that stay for it to be taken back there.
    behind: usize,
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
            behind: 0,
        }
    }

    /// The same, but it can be [truncated](truncate) by so many positions at any time, as far as sweeps have up to so many
    /// rows of it: windows keep what they leave behind for as long. That takes no more than sweeps of so many rows.
    pub fn keeping(self, behind: usize) -> Session {
        Session { behind, ..self }
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

    /// Counts `rows` more positions, whose keys and values every layer has now.
    pub fn advance(&mut self, rows: usize) {
        self.len += rows;
    }

    /// Uncounts the last `rows` positions, which a sweep has just computed for tokens that did not come. Their pages stay:
    /// other positions come there soon, and the last page is the session's own.
    pub fn retreat(&mut self, rows: usize) {
        self.len -= rows;
    }

    /// Whether the session has this page of a layer, in this slot.
    fn holds(&self, layer: usize, page: usize, slot: SlotId) -> bool {
        let layer = &self.layers[layer];
        (layer.first..layer.end).contains(&page) && layer.slots[page] == slot
    }

    /// Pages that a sweep with `rows` more positions would take.
    pub fn pages_wanted(&self, rows: usize) -> usize {
        let end = (self.len + rows).div_ceil(self.layout.page_positions);
        let wanted = |layer: &LayerPages| end.saturating_sub(layer.end);
        self.layers.iter().map(wanted).sum()
    }

    /// Pages that `rows` more positions take at most at a time, if they come in sweeps of up to `batch` rows and no page
    /// is another session's too.
    pub fn pages_wanted_in_all(&self, specs: &[LayerSpec], rows: usize, batch: usize) -> usize {
        let len = self.len + rows;
        let end = len.div_ceil(self.layout.page_positions);
        let wanted = |(layer, spec): (&LayerPages, &LayerSpec)| {
            let most = pages_max(spec, &self.layout, len, batch);
            let held = layer.end - layer.first;
            end.saturating_sub(layer.end).min(most.saturating_sub(held))
        };
        self.layers.iter().zip(specs).map(wanted).sum()
    }

    /// Whether every layer still has all that a row at position `len` attends to.
    fn reaches_back_to(&self, specs: &[LayerSpec], len: usize) -> bool {
        let mut layers = self.layers.iter().zip(specs);
        layers.all(|(layer, spec)| layer.first <= first_page(spec, &self.layout, len))
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

/// The first page that a row at position `len` attends to.
fn first_page(spec: &LayerSpec, layout: &KvLayout, len: usize) -> usize {
    let first_seen = spec
        .window
        .map_or(0, |window| (len + 1).saturating_sub(window as usize));
    first_seen / layout.page_positions
}

/// Makes room for `rows` more positions of a session, and gives up pages that no window reaches any more.
///
/// # Errors
/// The context is full, or memory is.
pub fn extend(
    sessions: &mut [Session],
    index: usize,
    specs: &[LayerSpec],
    rows: usize,
    store: &mut Store,
) -> Result<()> {
    let Session {
        layout,
        context,
        len,
        behind,
        ..
    } = sessions[index];
    if len + rows > context {
        return Err(Error::new(
            Kind::Budget,
            format!("the conversation is longer than its context of {context} tokens"),
            "give a larger --ctx, or begin a new conversation",
        ));
    }
    let from = len.saturating_sub(behind.saturating_sub(rows));
    for (layer, spec) in specs.iter().enumerate() {
        let first = first_page(spec, &layout, from).min(sessions[index].layers[layer].end);
        for page in sessions[index].layers[layer].first..first {
            give_up(sessions, index, layer, page, store);
            sessions[index].layers[layer].first = page + 1;
        }
        let pages = &mut sessions[index].layers[layer];
        while pages.end * layout.page_positions < len + rows {
            let slot = store.take_page()?;
            pages.slots[pages.end] = slot;
            pages.pages[pages.end] = store.page(slot).as_ptr();
            pages.end += 1;
        }
    }
    Ok(())
}

/// Forgets everything of a session; pages that no other session has go back to the weights.
pub fn clear(sessions: &mut [Session], index: usize, store: &mut Store) {
    for layer in 0..sessions[index].layers.len() {
        for page in sessions[index].layers[layer].first..sessions[index].layers[layer].end {
            give_up(sessions, index, layer, page, store);
        }
        let pages = &mut sessions[index].layers[layer];
        (pages.first, pages.end) = (0, 0);
    }
    sessions[index].len = 0;
}

/// Forgets what came after the first `len` positions, and answers how many are left.
///
/// It may be fewer: nothing if a window has left positions behind that would be seen again, and whole pages only
/// if the last one is another session's too and there is no memory for a copy.
pub fn truncate(
    sessions: &mut [Session],
    index: usize,
    specs: &[LayerSpec],
    len: usize,
    (store, device): (&mut Store, &Device),
) -> usize {
    if len >= sessions[index].len {
        return sessions[index].len;
    }
    if len == 0 || !sessions[index].reaches_back_to(specs, len) {
        clear(sessions, index, store);
        return 0;
    }
    let page_positions = sessions[index].layout.page_positions;
    cut(sessions, index, len.div_ceil(page_positions), store);
    sessions[index].len = len;
    own_the_end(sessions, index, specs, (store, device));
    sessions[index].len
}

/// Lets the empty session `to` begin with the first `len` positions of `from`, and answers how many it has now.
///
/// Whole pages are shared, what is left is copied. It may be fewer positions than `len`: none if a window of `from` has
/// left them behind, and whole pages only if there is no memory for the copy.
pub fn share(
    sessions: &mut [Session],
    (from, to): (usize, usize),
    specs: &[LayerSpec],
    len: usize,
    (store, device): (&mut Store, &Device),
) -> usize {
    assert!(
        from != to && sessions[to].len == 0,
        "only an empty session can begin with another's pages"
    );
    let len = len.min(sessions[from].len);
    if len == 0 || !sessions[from].reaches_back_to(specs, len) {
        return 0;
    }
    clear(sessions, to, store);
    let layout = sessions[from].layout;
    let end = len.div_ceil(layout.page_positions);
    for (layer, spec) in specs.iter().enumerate() {
        let first = first_page(spec, &layout, len).min(end);
        for page in first..end {
            let LayerPages { pages, slots, .. } = &sessions[from].layers[layer];
            let (memory, slot) = (pages[page], slots[page]);
            sessions[to].layers[layer].pages[page] = memory;
            sessions[to].layers[layer].slots[page] = slot;
        }
        let pages = &mut sessions[to].layers[layer];
        (pages.first, pages.end) = (first, end);
    }
    sessions[to].len = len;
    own_the_end(sessions, to, specs, (store, device));
    sessions[to].len
}

/// Sees to it that no other session sees what is appended next: a last page that is not full becomes a copy.
///
/// Without memory for it the session ends with its last full page.
fn own_the_end(
    sessions: &mut [Session],
    index: usize,
    specs: &[LayerSpec],
    (store, device): (&mut Store, &Device),
) {
    let Session { layout, len, .. } = sessions[index];
    let whole = len / layout.page_positions;
    if whole * layout.page_positions == len || own_last_page(sessions, index, store, device) {
        return;
    }
    cut(sessions, index, whole, store);
    sessions[index].len = whole * layout.page_positions;
    if !sessions[index].reaches_back_to(specs, sessions[index].len) {
        clear(sessions, index, store);
    }
}

/// Copies the last page of every layer that other sessions have too; false if there is no memory for one.
fn own_last_page(
    sessions: &mut [Session],
    index: usize,
    store: &mut Store,
    device: &Device,
) -> bool {
    let bytes = sessions[index].layout.page_bytes();
    for layer in 0..sessions[index].layers.len() {
        let page = sessions[index].layers[layer].end - 1;
        let slot = sessions[index].layers[layer].slots[page];
        if !is_shared(sessions, index, layer, page, slot) {
            continue;
        }
        let Ok(own) = store.take_page() else {
            return false;
        };
        let memory = store.page(own).as_ptr();
        // SAFETY: a page is `page_bytes` of its slot; the new slot is this session's alone, and nobody writes into the
        // old one meanwhile, because that happens in sweeps only.
        unsafe { device.copy_page(sessions[index].layers[layer].pages[page], memory, bytes) };
        let pages = &mut sessions[index].layers[layer];
        (pages.pages[page], pages.slots[page]) = (memory, own);
    }
    true
}

/// Gives up all pages from `end` on.
fn cut(sessions: &mut [Session], index: usize, end: usize, store: &mut Store) {
    for layer in 0..sessions[index].layers.len() {
        let LayerPages {
            first, end: before, ..
        } = sessions[index].layers[layer];
        for page in end.max(first)..before {
            give_up(sessions, index, layer, page, store);
        }
        let pages = &mut sessions[index].layers[layer];
        (pages.first, pages.end) = (first.min(end), before.min(end));
    }
}

/// Has sessions find their pages where these lie now; `moved` is in the order of the slots where they were.
pub fn follow(sessions: &mut [Session], moved: &[Moved], store: &Store) {
    for layer in sessions.iter_mut().flat_map(|session| &mut session.layers) {
        for page in layer.first..layer.end {
            if let Ok(at) = moved.binary_search_by_key(&layer.slots[page], |moved| moved.from) {
                let slot = moved[at].to;
                (layer.slots[page], layer.pages[page]) = (slot, store.page(slot).as_ptr());
            }
        }
    }
}

/// Takes a page away from a session; its slot goes back to the weights unless another session has it too.
///
/// Shared pages stand at the same place in every table that has them, so the tables themselves are the count of
/// references, and none can be wrong.
fn give_up(sessions: &mut [Session], index: usize, layer: usize, page: usize, store: &mut Store) {
    let pages = &mut sessions[index].layers[layer];
    let slot = pages.slots[page];
    pages.pages[page] = ptr::null();
    if !is_shared(sessions, index, layer, page, slot) {
        store.free_page(slot);
    }
}

/// Whether a session other than `index` has this page.
fn is_shared(sessions: &[Session], index: usize, layer: usize, page: usize, slot: SlotId) -> bool {
    let mut others = sessions
        .iter()
        .enumerate()
        .filter(|(other, _)| *other != index);
    others.any(|(_, session)| session.holds(layer, page, slot))
}
