//! A bias on the scores that depends on where a key lies relative to its query (Raffel et al. 2020).
//!
//! With a table t of a value for each head and distance, S_ij = s·q_i·k_j + t[j - i], i being the query's place among the
//! keys. A row of scores meets neighbouring distances, so its bias is a slice of the table. In the backward
//! dt[j - i] = Σ P_ij·(dP_ij - D_i), which is what dS is before its factor s.

use super::{AttentionShape, Call, Segment, Share, Task};
use std::ops::Range;

/// A value for each head and distance.
#[derive(Clone, Copy, Debug)]
pub struct RelativeBias<'a> {
    /// `[heads, distances]`, from the smallest (the key long before the query) to the largest
    pub table: &'a [f32],
    /// index of distance 0
    pub zero: usize,
}

impl<'a> RelativeBias<'a> {
    /// Values that `heads` heads of some segments need: how many distances, of which as many as returned second lie
    /// below 0.
    pub fn needed(shape: &AttentionShape, segments: &[Segment]) -> (usize, usize) {
        let last = |s: &Segment| s.q.len().checked_sub(1).map(|row| shape.place(s.q.len(), s.kv.len(), row));
        let before = segments.iter().filter_map(last).max().unwrap_or(0);
        let after = match shape.causal {
            true => 1,
            false => segments.iter().map(|s| s.kv.len()).max().unwrap_or(1),
        };
        (before + after, before)
    }

    /// True if there is a value for all that a head's rows meet.
    pub fn covers(&self, shape: &AttentionShape, segments: &[Segment]) -> bool {
        let (distances, before) = Self::needed(shape, segments);
        let has = self.table.len() / shape.heads.max(1);
        has * shape.heads == self.table.len() && self.zero >= before && has - self.zero >= distances - before
    }

    /// Where the values of `keys` for the query at place `at` lie in a head's part of the table.
    pub(super) fn range(&self, at: usize, keys: &Range<usize>) -> Range<usize> {
        let first = self.zero + keys.start - at;
        first..first + keys.len()
    }

    /// A head's part of the table.
    pub(super) fn head(&self, head: usize, heads: usize) -> &'a [f32] {
        let distances = self.table.len() / heads;
        &self.table[head * distances..][..distances]
    }
}

impl<'a> Call<'a> {
    /// Adds the bias of a row's visible keys, if there is one.
    pub(super) fn add_bias(&self, task: &Task, row: usize, scores: &mut [f32]) {
        if let Some((range, bias)) = self.bias_of(task, row) {
            let values = &bias.head(task.head, self.shape.heads)[range];
            scores.iter_mut().zip(values).for_each(|(s, b)| *s += b);
        }
    }

    /// The bias, and where in its head's part the values of a row's visible keys lie.
    pub(super) fn bias_of(&self, task: &Task, row: usize) -> Option<(Range<usize>, RelativeBias<'a>)> {
        let (bias, s) = (self.bias?, &self.segments[task.segment]);
        let at = self.shape.place(s.q.len(), s.kv.len(), row);
        Some((bias.range(at, &self.visible(task, row)), bias))
    }
}

/// The gradient of the table: what the tasks have for it, added up in their order.
pub(super) fn sum(tasks: &[Task], parts: &[Share], dbias: &mut [f32]) {
    dbias.fill(0.0);
    for (task, part) in tasks.iter().zip(parts) {
        let head = &mut dbias[task.head * part.dbias.len()..][..part.dbias.len()];
        head.iter_mut().zip(&part.dbias).for_each(|(sum, part)| *sum += part);
    }
}
