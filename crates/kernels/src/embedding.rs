//! Rows of a matrix by index, and their gradient.

use crate::storage::WeightView;
use rayon::prelude::*;

/// `out[i] = weight[ids[i]]`, `[n, d]`. Panics if an id is no row or `out` has another size.
pub fn gather(weight: WeightView<'_>, ids: &[u32], out: &mut [f32]) {
    let d = weight.cols();
    assert_eq!(out.len(), ids.len() * d);
    out.par_chunks_mut(d.max(1)).zip(ids).for_each(|(out, id)| {
        weight.decode_row(*id as usize, 0, out);
    });
}

/// `dweight[ids[i]] += dy[i]` in the order of i, so that repeated ids always sum alike.
pub fn scatter_add(ids: &[u32], dy: &[f32], dweight: &mut [f32], d: usize) {
    assert_eq!(dy.len(), ids.len() * d);
    for (row, id) in dy.chunks_exact(d.max(1)).zip(ids) {
        let dst = &mut dweight[*id as usize * d..][..d];
        for (dst, v) in dst.iter_mut().zip(row) {
            *dst += v;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scatter_is_the_transpose_of_gather() {
        let w: Vec<f32> = (0..12).map(|i| i as f32).collect();
        let mut out = vec![0.0; 9];
        gather(WeightView::f32(&w, 4, 3), &[2, 0, 2], &mut out);
        assert_eq!(out, [6.0, 7.0, 8.0, 0.0, 1.0, 2.0, 6.0, 7.0, 8.0]);
        let mut dw = vec![0.0; 12];
        scatter_add(&[2, 0, 2], &[1.0; 9], &mut dw, 3);
        assert_eq!(dw, [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 2.0, 2.0, 2.0, 0.0, 0.0, 0.0]);
    }
}
