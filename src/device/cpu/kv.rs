//! Pages of keys and values: their layout, and appending to them.
//!
//! A page holds a run of positions of one layer of one session, in f16. Keys
//! stand as `[kv_head][block of 16 positions][head_dim][16]`, so that a vector
//! is one dimension of 16 positions; values as `[kv_head][position][head_dim]`,
//! so that a vector is 16 dimensions of one position.

/// The shape of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvLayout {
    /// Heads of keys and values.
    pub kv_heads: usize,
    /// Values per head, a multiple of 16.
    pub head_dim: usize,
    /// Positions in one page, a multiple of 16.
    pub page_positions: usize,
}

impl KvLayout {
    /// Bytes of one page.
    pub const fn page_bytes(&self) -> usize {
        2 * self.values_offset()
    }

    /// Byte offset of the values, behind all the keys.
    pub(super) const fn values_offset(&self) -> usize {
        self.kv_heads * self.head_bytes()
    }

    /// Bytes of one head's keys, or of its values.
    pub(super) const fn head_bytes(&self) -> usize {
        self.page_positions * self.head_dim * 2
    }
}

/// Where a new position's keys and values go.
#[derive(Debug, Clone, Copy)]
pub struct KvPlace {
    /// The page, aligned to 2 bytes.
    pub page: *mut u8,
    /// Position within the page.
    pub index: usize,
}

/// One query row of attention.
#[derive(Debug, Clone, Copy)]
pub struct AttentionRow {
    /// The query: heads x `head_dim`.
    pub q: *const f32,
    /// The output: heads x `head_dim`.
    pub out: *mut f32,
    /// The session's pages of this layer; page i holds the positions from i x `page_positions`.
    /// Pages that hold no position of `start..=position` may be null.
    pub pages: *const *const u8,
    /// The row's own position, the last one it attends to.
    pub position: u32,
    /// The first position it attends to.
    pub start: u32,
}

/// What is the same for all rows of attention in a layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// The pages'.
    pub layout: KvLayout,
    /// Heads of queries: some for each of keys.
    pub heads: usize,
    /// What products of queries and keys are multiplied with.
    pub scale: f32,
    /// The cap that they go softly up to then, if there is one.
    pub softcap: Option<f32>,
}

impl AttentionShape {
    /// Values of a row of queries, or of outputs.
    pub const fn row_values(&self) -> usize {
        self.heads * self.layout.head_dim
    }
}
