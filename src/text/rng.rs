//! A small generator of random numbers, the same on every machine.

/// xoshiro256++ (Blackman and Vigna, 2019), seeded through SplitMix64.
#[derive(Debug, Clone)]
pub(super) struct Rng([u64; 4]);

impl Rng {
    pub(super) fn new(seed: u64) -> Self {
        let mut state = seed;
        Rng(std::array::from_fn(|_| {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            mixed ^ (mixed >> 31)
        }))
    }

    /// A number from 0 to below 1.
    pub(super) fn next(&mut self) -> f64 {
        let s = &mut self.0;
        let bits = s[0].wrapping_add(s[3]).rotate_left(23).wrapping_add(s[0]);
        let shifted = s[1] << 17;
        s[2] ^= s[0];
        s[3] ^= s[1];
        s[1] ^= s[2];
        s[0] ^= s[3];
        s[2] ^= shifted;
        s[3] = s[3].rotate_left(45);
        // The upper 53 bits are as many as an f64 holds.
        (bits >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::Rng;

    #[test]
    fn follows_the_published_generator() {
        // First output of xoshiro256++ from the state 1, 2, 3, 4 is 41943041.
        assert_eq!(
            Rng([1, 2, 3, 4]).next(),
            (41943041u64 >> 11) as f64 / (1u64 << 53) as f64
        );
        // First output of SplitMix64 from the seed 1234567.
        assert_eq!(Rng::new(1234567).0[0], 6457827717110365317);
    }

    #[test]
    fn is_even() {
        let mut rng = Rng::new(1);
        let mean = (0..100_000).map(|_| rng.next()).sum::<f64>() / 1e5;
        assert!((mean - 0.5).abs() < 0.005, "{mean}");
    }
}
