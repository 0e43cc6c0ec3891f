//! The generator behind the order of rows: SplitMix64 (Steele, Lea, Flood 2014). The order of a run must not change
//! with a library's version or the platform, so it is written down here.

pub(super) struct Rng(u64);

impl Rng {
    /// A stream for each pair of seed and epoch.
    pub(super) fn new(seed: u64, epoch: u64) -> Self {
        let mut rng = Self(seed);
        let mixed = rng.next();
        Self(mixed ^ epoch.wrapping_mul(0xd1b5_4a32_d192_ed03))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`, all equally likely (Lemire 2019, with rejection). 0 for `n` = 0.
    pub(super) fn below(&mut self, n: usize) -> usize {
        let n = n as u64;
        if n == 0 {
            return 0;
        }
        let least = n.wrapping_neg() % n;
        loop {
            let product = u128::from(self.next()) * u128::from(n);
            if product as u64 >= least {
                return (product >> 64) as usize;
            }
        }
    }

    /// Fisher and Yates.
    pub(super) fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stream_is_the_published_one() {
        // first outputs of SplitMix64 for the state 1234567, as in Vigna's reference code
        let mut rng = Rng(1234567);
        assert_eq!([rng.next(), rng.next()], [6457827717110365317, 3203168211198807973]);
    }

    #[test]
    fn below_covers_its_range_evenly() {
        let mut rng = Rng::new(1, 2);
        let mut counts = [0; 5];
        for _ in 0..50_000 {
            counts[rng.below(5)] += 1;
        }
        // 10000 expected, standard deviation 90: five of them
        assert!(counts.iter().all(|c| (9550..10450).contains(c)), "{counts:?}");
    }
}
