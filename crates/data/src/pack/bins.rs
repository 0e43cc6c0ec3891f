//! Rows into bins of limited length.

use super::rng::Rng;
use std::collections::BTreeMap;

/// Best-fit decreasing: the longest rows first, each into the fullest bin that has room. Rows of equal length keep
/// the order they come in. The number of bins depends on the lengths alone, so every epoch has the same number.
pub(super) fn best_fit(rows: &[usize], length: impl Fn(usize) -> usize, capacity: usize) -> Vec<Vec<usize>> {
    let mut rows = rows.to_vec();
    rows.sort_by_key(|&row| std::cmp::Reverse(length(row)));
    let mut bins: Vec<Vec<usize>> = Vec::new();
    // room left -> bins with that room, the oldest last
    let mut open: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for row in rows {
        let n = length(row);
        let fitting = open.range(n..).next().map(|(&room, _)| room);
        let bin = fitting.and_then(|room| {
            let bins = open.get_mut(&room)?;
            let bin = bins.pop()?;
            if bins.is_empty() {
                open.remove(&room);
            }
            Some((bin, room))
        });
        let (bin, room) = bin.unwrap_or_else(|| {
            bins.push(Vec::new());
            (bins.len() - 1, capacity)
        });
        bins[bin].push(row);
        open.entry(room.saturating_sub(n)).or_default().push(bin);
    }
    bins
}

/// Swaps rows between bins at random where both still fit: best fit alone would put the same rows together in every
/// epoch.
pub(super) fn mix(bins: &mut [Vec<usize>], length: impl Fn(usize) -> usize, capacity: usize, rng: &mut Rng) {
    let mut used: Vec<usize> = bins.iter().map(|bin| bin.iter().map(|&row| length(row)).sum()).collect();
    let rows: usize = bins.iter().map(Vec::len).sum();
    for _ in 0..4 * rows {
        let (a, b) = (rng.below(bins.len()), rng.below(bins.len()));
        if a == b {
            continue;
        }
        let (i, j) = (rng.below(bins[a].len()), rng.below(bins[b].len()));
        let (x, y) = (length(bins[a][i]), length(bins[b][j]));
        let (in_a, in_b) = (used[a] - x + y, used[b] - y + x);
        if in_a <= capacity && in_b <= capacity {
            (bins[a][i], bins[b][j]) = (bins[b][j], bins[a][i]);
            (used[a], used[b]) = (in_a, in_b);
        }
    }
}

/// Rows in their order, a new bin whenever the next one does not fit.
pub(super) fn next_fit(rows: &[usize], length: impl Fn(usize) -> usize, capacity: usize) -> Vec<Vec<usize>> {
    let mut bins: Vec<Vec<usize>> = Vec::new();
    let mut room = 0;
    for &row in rows {
        let n = length(row);
        match bins.last_mut() {
            Some(bin) if n <= room => bin.push(row),
            _ => {
                bins.push(vec![row]);
                room = capacity;
            }
        }
        room = room.saturating_sub(n);
    }
    bins
}
