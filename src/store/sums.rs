//! A checksum for each strip of weights: what every read of it must agree with.
//!
//! A strip is the 16 rows that a kernel takes at a time. So the worker that is about to use them checks them, while
//! they are in its cache, and the engine's thread has nothing to do with it. A strip is also the same in every cut
//! into tiles: what one run learns holds for any budget.
//! Behind the strips come the tensors that are read once and as a whole (norms and biases).

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use crate::format::checksum::{self, Seen, UNKNOWN};
use crate::format::tile::{Matrix, STRIP_ROWS, Tile};

/// The checksums of a model's strips, shared by the threads that compute.
#[derive(Default)]
pub struct Sums {
    /// Of all matrices, one after the other, then of whole tensors; empty if nothing is verified.
    strips: Vec<AtomicU32>,
    /// Which strip each matrix begins with.
    matrices: Vec<u32>,
    tiles: Vec<TileSums>,
    /// There are some that no earlier run knew.
    learnt: AtomicBool,
}

struct TileSums {
    first_strip: u32,
    /// A strip did not agree since the tile was last asked about.
    wrong: AtomicBool,
}

impl Sums {
    /// Nothing is known yet of these matrices and of `tensors` tensors.
    pub(super) fn new(matrices: &[Matrix], tiles: &[Tile], tensors: usize) -> Sums {
        let mut strips = 0;
        let first = |matrix: &Matrix| {
            let first = strips;
            strips += matrix.rows.div_ceil(STRIP_ROWS) as u32;
            first
        };
        let matrices: Vec<u32> = matrices.iter().map(first).collect();
        let of_tile = |tile: &Tile| TileSums {
            first_strip: matrices[tile.matrix as usize] + tile.first_row / STRIP_ROWS as u32,
            wrong: AtomicBool::new(false),
        };
        Sums {
            strips: (0..strips as usize + tensors)
                .map(|_| AtomicU32::new(UNKNOWN))
                .collect(),
            tiles: tiles.iter().map(of_tile).collect(),
            matrices,
            learnt: AtomicBool::new(false),
        }
    }

    /// Bytes of the tables for matrices that are cut into `tiles` tiles.
    pub fn table_bytes(matrices: &[Matrix], tiles: usize) -> usize {
        let strips: usize = matrices.iter().map(|m| m.rows.div_ceil(STRIP_ROWS)).sum();
        (strips + matrices.len()) * size_of::<u32>() + tiles * size_of::<TileSums>()
    }

    /// Looks at a strip of a tile as it was read, before it is used. A wrong one is told of by
    /// [`Store::release`](super::Store::release).
    pub fn inspect(&self, tile: u32, strip: usize, bytes: &[u8]) {
        if let Some(of) = self.tiles.get(tile as usize)
            && !self.strip_agrees(of.first_strip as usize + strip, bytes)
        {
            of.wrong.store(true, Ordering::Relaxed);
        }
    }

    /// Whether all strips of the tile that were looked at since the last time did agree.
    pub(super) fn tile_agrees(&self, tile: u32) -> bool {
        let of = self.tiles.get(tile as usize);
        !of.is_some_and(|of| {
            of.wrong.load(Ordering::Relaxed) && of.wrong.swap(false, Ordering::Relaxed)
        })
    }

    /// Whether the strip that holds row `row` of a matrix agrees, or nothing is verified.
    pub(super) fn row_agrees(&self, matrix: usize, row: u32, strip: &[u8]) -> bool {
        let first = self.matrices.get(matrix);
        first.is_none_or(|&first| {
            self.strip_agrees(first as usize + row as usize / STRIP_ROWS, strip)
        })
    }

    /// The first of the whole tensors that does not agree.
    pub(super) fn wrong_tensor<'a>(&self, tensors: &'a [Seen]) -> Option<&'a Seen> {
        let first = self.strips.len().checked_sub(tensors.len())?;
        let mut numbered = tensors.iter().zip(first..);
        let wrong = numbered.find(|(seen, place)| !self.agrees(*place, seen.sum));
        wrong.map(|(seen, _)| seen)
    }

    /// Whether anything is verified.
    pub(super) fn verify(&self) -> bool {
        !self.strips.is_empty()
    }

    /// Whether `bytes` are those of the strip.
    fn strip_agrees(&self, strip: usize, bytes: &[u8]) -> bool {
        self.agrees(strip, checksum::of(bytes))
    }

    /// Whether the checksum is the one that is known; remembers it if none is.
    fn agrees(&self, place: usize, sum: u32) -> bool {
        let place = &self.strips[place];
        match place.load(Ordering::Relaxed) {
            UNKNOWN => {
                place.store(sum, Ordering::Relaxed);
                self.learnt.store(true, Ordering::Relaxed);
                true
            }
            known => known == sum,
        }
    }

    /// Whether some were learnt since [`all`](Self::all) was last taken.
    pub(super) fn learnt(&self) -> bool {
        self.learnt.load(Ordering::Relaxed)
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.strips.len()
    }

    /// All checksums, to be kept; 0 where none is known.
    pub(super) fn all(&self) -> impl Iterator<Item = u32> {
        self.learnt.store(false, Ordering::Relaxed);
        self.strips.iter().map(|s| s.load(Ordering::Relaxed))
    }

    /// Takes over what an earlier run learnt.
    pub(super) fn set_all(&self, sums: impl Iterator<Item = u32>) {
        for (strip, sum) in self.strips.iter().zip(sums) {
            strip.store(sum, Ordering::Relaxed);
        }
    }

    /// Forgets all, since it is not known which of them are of a file as it should be.
    pub(super) fn forget(&self) {
        self.set_all(std::iter::repeat(UNKNOWN));
        self.learnt.store(false, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::quant::QuantType;
    use crate::format::tile::{self, Use};

    #[test]
    fn a_strip_is_the_same_in_every_cut() {
        let matrix = |rows| Matrix {
            name: "m".into(),
            qtype: QuantType::Q4_0,
            rows,
            cols: 512,
            file: 0,
            offset: 0,
            used: Use::EverySweep,
        };
        let matrices = [matrix(40), matrix(1000)];
        let known = |slot_bytes| {
            let (tiles, _) = tile::cut(&matrices, slot_bytes);
            let sums = Sums::new(&matrices, &tiles, 0);
            for (id, tile) in tiles.iter().enumerate() {
                for strip in 0..tile.rows.div_ceil(16) {
                    let row = tile.first_row + strip * 16;
                    let name = format!("{} {row}", tile.matrix);
                    sums.inspect(id as u32, strip as usize, name.as_bytes());
                }
                assert!(sums.tile_agrees(id as u32));
            }
            assert!(sums.learnt());
            sums.all().collect::<Vec<u32>>()
        };
        let (coarse, fine) = (known(256 << 10), known(64 << 10));
        assert_eq!(coarse.len(), 3 + 63);
        assert_eq!(coarse, fine);
        assert!(!coarse.contains(&UNKNOWN));

        let (tiles, _) = tile::cut(&matrices, 64 << 10);
        let sums = Sums::new(&matrices, &tiles, 0);
        sums.set_all(coarse.into_iter());
        assert!(!sums.learnt());
        let (tile, what) = (3, &tiles[3]);
        let name = format!("{} {}", what.matrix, what.first_row);
        assert!(sums.row_agrees(1, what.first_row + 5, name.as_bytes()));
        assert!(!sums.row_agrees(1, what.first_row + 16, name.as_bytes()));
        sums.inspect(tile, 0, name.as_bytes());
        assert!(sums.tile_agrees(tile));
        sums.inspect(tile, 1, name.as_bytes());
        assert!(!sums.tile_agrees(tile), "a wrong strip is told of");
        assert!(sums.tile_agrees(tile), "once");
    }
}
