//! Numbers beside numbers: correlations as scipy has them, and the mean squared error.

/// Mean of squared differences; 0 without items.
pub fn mean_squared_error(labels: &[f64], predicted: &[f64]) -> f64 {
    let n = labels.len().min(predicted.len());
    labels.iter().zip(predicted).map(|(a, b)| (a - b).powi(2)).sum::<f64>() / n.max(1) as f64
}

/// Pearson's correlation; `None` for fewer than two items, or where one side is constant or no number.
pub fn pearson(labels: &[f64], predicted: &[f64]) -> Option<f64> {
    let n = labels.len().min(predicted.len());
    let (x, y) = (&labels[..n], &predicted[..n]);
    let centred = |v: &[f64]| {
        let mean = v.iter().sum::<f64>() / n as f64;
        v.iter().map(|x| x - mean).collect::<Vec<f64>>()
    };
    let constant = |v: &[f64]| v.iter().all(|x| *x == v[0]);
    if n < 2 || constant(x) || constant(y) || !x.iter().chain(y).all(|v| v.is_finite()) {
        return None;
    }
    let (x, y) = (centred(x), centred(y));
    let norm = |v: &[f64]| v.iter().map(|x| x * x).sum::<f64>().sqrt();
    let size = norm(&x) * norm(&y);
    let product: f64 = x.iter().zip(&y).map(|(a, b)| a * b).sum();
    (size > 0.0).then(|| (product / size).clamp(-1.0, 1.0))
}

/// Spearman's correlation: Pearson's of the ranks, ties sharing the mean of theirs. `None` as in [`pearson`].
pub fn spearman(labels: &[f64], predicted: &[f64]) -> Option<f64> {
    let n = labels.len().min(predicted.len());
    let (x, y) = (&labels[..n], &predicted[..n]);
    if !x.iter().chain(y).all(|v| v.is_finite()) {
        return None;
    }
    pearson(&ranks(x), &ranks(y))
}

/// Ranks from 1.
fn ranks(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|a, b| values[*a].total_cmp(&values[*b]));
    let mut ranks = vec![0.0; values.len()];
    let mut start = 0;
    for group in order.chunk_by(|a, b| values[*a] == values[*b]) {
        let rank = start as f64 + (group.len() as f64 + 1.0) / 2.0;
        group.iter().for_each(|i| ranks[*i] = rank);
        start += group.len();
    }
    ranks
}
