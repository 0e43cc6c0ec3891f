//! Rows of relative positions: small distances have one each, larger ones share them in logarithmic steps.

use std::sync::Arc;

/// How distances become rows.
#[derive(Clone, Copy, Debug)]
pub(super) struct RelativePositions {
    /// buckets on each side; `None`: every distance has its own
    pub buckets: Option<usize>,
    /// the longest distance told apart
    pub most: usize,
}

impl RelativePositions {
    /// Half of the rows.
    pub fn span(&self) -> usize {
        self.buckets.unwrap_or(self.most)
    }

    /// False where a distance beyond half of the buckets would be divided by a logarithm of 1, or of none.
    pub fn are_defined(&self) -> bool {
        self.buckets.is_none_or(|buckets| buckets > 1 && self.most != buckets / 2 + 1)
    }

    /// Rows of the distances (query minus key) from `1 - longest` to `longest - 1`.
    pub fn rows(&self, longest: usize) -> Arc<[u32]> {
        let longest = longest as i64;
        (1 - longest..longest).map(|distance| self.row(distance)).collect()
    }

    fn row(&self, distance: i64) -> u32 {
        let span = self.span() as i64;
        let place = self.buckets.map_or(distance, |buckets| self.bucket(distance, buckets as i64));
        (place + span).clamp(0, 2 * span - 1) as u32
    }

    /// transformers' `make_log_bucket_position`; logarithms in f32, as there.
    fn bucket(&self, distance: i64, buckets: i64) -> i64 {
        let middle = buckets / 2;
        let far = if distance < middle && distance > -middle { middle - 1 } else { distance.abs() };
        if far <= middle {
            return distance;
        }
        let whole = (((self.most - 1) as f64 / middle as f64) as f32).ln();
        let part = (far as f32 / middle as f32).ln() / whole * (middle - 1) as f32;
        (part.ceil() as i64 + middle) * distance.signum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Printed by transformers 5.23's `make_log_bucket_position` with 256 buckets up to 512, 6 up to 40, and 16 up to 5.
    #[test]
    fn buckets_are_those_of_transformers() {
        let distances =
            [-600i64, -511, -400, -200, -129, -128, -127, -1, 0, 1, 5, 127, 128, 129, 130, 300, 511];
        let large = RelativePositions { buckets: Some(256), most: 512 };
        let found: Vec<i64> = distances.iter().map(|d| large.bucket(*d, 256)).collect();
        assert_eq!(found, LARGE);
        let small = RelativePositions { buckets: Some(6), most: 40 };
        let found: Vec<i64> = distances.iter().map(|d| small.bucket(*d, 6)).collect();
        assert_eq!(found, SMALL);
        let few = RelativePositions { buckets: Some(16), most: 5 };
        let found: Vec<i64> = distances.iter().map(|d| few.bucket(*d, 16)).collect();
        assert_eq!(found, FEW);
        let defined =
            |buckets: usize, most: usize| RelativePositions { buckets: Some(buckets), most }.are_defined();
        assert!(defined(16, 5) && defined(256, 512) && !defined(16, 9) && !defined(1, 40));
        // rows stay within the table
        assert_eq!((large.row(-600), large.row(0), large.row(600)), (0, 256, 511));
        let own = RelativePositions { buckets: None, most: 9 };
        assert_eq!(&*own.rows(11), [0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 17, 17]);
    }

    const LARGE: [i64; 17] =
        [-270, -255, -233, -169, -129, -128, -127, -1, 0, 1, 5, 127, 128, 129, 130, 207, 255];
    const FEW: [i64; 17] = [35, 33, 31, 24, 20, 20, 19, -1, 0, 1, 5, -19, -20, -20, -20, -28, -33];
    const SMALL: [i64; 17] = [-8, -8, -7, -7, -6, -6, -6, -1, 0, 1, 4, 6, 6, 6, 6, 7, 8];
}
