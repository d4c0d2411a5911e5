//! What a device does for the checksums, for tests that have none.

use airstream::format::tile::STRIP_ROWS;
use airstream::store::Store;

/// Shows the strips of all tiles that are handed out to the checksums, as a device that is about to pack them.
pub fn inspect_acquired(store: &Store) {
    let sums = store.sums();
    for &id in store.acquired() {
        let (tile, memory) = (store.tile(id), store.memory(id));
        if memory.packed {
            continue;
        }
        // SAFETY: the tile is handed out, so its rows are in memory and nobody writes them.
        let bytes =
            unsafe { std::slice::from_raw_parts(memory.data.as_ptr(), tile.bytes as usize) };
        let strip_bytes = STRIP_ROWS * (tile.bytes / tile.rows) as usize;
        for (strip, bytes) in bytes.chunks(strip_bytes).enumerate() {
            sums.inspect(id, strip, bytes);
        }
    }
}
