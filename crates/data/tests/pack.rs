//! Order, packing and resumption of micro-batches.

use engobe_data::{Cursor, Goal, Loader, LoaderOptions, MicroBatch, Place, Sample};
use std::collections::HashSet;
use std::sync::Arc;

fn samples(lengths: &[usize]) -> Arc<Vec<Sample>> {
    let sample = |(i, &n): (usize, &usize)| Sample {
        ids: (0..n).map(|t| (i * 1000 + t) as u32).collect(),
        labels: (0..n).map(|t| (t % 3 != 1).then_some((i * 1000 + t) as u32)).collect(),
        place: Place { file: "x".into(), number: i + 1, unit: "line" },
        truncated: 0,
        goal: Goal::NextTokens,
        second_type_from: None,
    };
    Arc::new(lengths.iter().enumerate().map(sample).collect())
}

/// Lengths from 1 to 64 without a pattern.
fn uneven(n: usize) -> Vec<usize> {
    (0..n).map(|i| (i * i * 7 + i * 13) % 64 + 1).collect()
}

const OPTIONS: LoaderOptions =
    LoaderOptions { batch_size: 2, max_seq_len: 64, packing: true, shuffle: true, seed: 7, lead: 0 };

fn rows(batches: &[MicroBatch]) -> Vec<usize> {
    batches.iter().flat_map(|b| b.rows.clone()).collect()
}

#[test]
fn targets_are_the_next_labels_within_the_row() {
    let samples = samples(&[3, 2]);
    let batch = MicroBatch::of(&samples, &[1, 0]);
    assert_eq!(batch.tokens, [1000, 1001, 0, 1, 2]);
    // labels are [1000, -] and [0, -, 2]; the first of a row is nobody's target
    assert_eq!(batch.targets, [None, None, None, Some(2), None]);
    assert_eq!(batch.segments, [0..2, 2..5]);
    assert_eq!((batch.label_tokens, batch.rows), (1, vec![1, 0]));
}

#[test]
fn without_shuffle_and_packing_the_order_is_the_data_s() {
    let options = LoaderOptions { packing: false, shuffle: false, ..OPTIONS };
    let mut loader = Loader::new(samples(&uneven(7)), options);
    assert_eq!(loader.len_per_epoch(), 4);
    let window = loader.next_window(3);
    assert_eq!(rows(&window), [0, 1, 2, 3, 4, 5]);
    // the rest of the epoch, never rows of the next
    assert_eq!(rows(&loader.next_window(3)), [6]);
    assert_eq!(loader.epochs_done(), 1.0);
    assert_eq!(rows(&loader.next_window(1)), [0, 1]);
}

#[test]
fn packing_without_shuffle_keeps_the_order() {
    let loader = Loader::new(samples(&uneven(50)), LoaderOptions { shuffle: false, ..OPTIONS });
    let batches = loader.epoch();
    assert_eq!(rows(&batches), (0..50).collect::<Vec<_>>());
    assert!(batches.iter().all(|b| b.tokens.len() <= 128));
}

#[test]
fn every_epoch_has_every_row_once_in_another_order_and_as_many_batches() {
    for packing in [true, false] {
        let mut loader = Loader::new(samples(&uneven(200)), LoaderOptions { packing, ..OPTIONS });
        let n = loader.len_per_epoch();
        let mut orders = HashSet::new();
        let mut groupings = HashSet::new();
        for _ in 0..4 {
            assert_eq!(loader.len_per_epoch(), n);
            let batches = loader.next_window(n);
            let order = rows(&batches);
            assert_eq!(order.iter().collect::<HashSet<_>>().len(), 200);
            assert_eq!(order.len(), 200);
            assert!(batches.iter().all(|b| !packing || b.tokens.len() <= 128));
            let mut groups: Vec<Vec<usize>> = batches.iter().map(|b| b.rows.clone()).collect();
            groups.iter_mut().for_each(|g| g.sort_unstable());
            groups.sort();
            orders.insert(order);
            groupings.insert(groups);
        }
        assert_eq!((orders.len(), groupings.len()), (4, 4));
    }
}

#[test]
fn bins_are_filled_well() {
    let lengths = uneven(500);
    let tokens: usize = lengths.iter().sum();
    let loader = Loader::new(samples(&lengths), LoaderOptions { batch_size: 1, ..OPTIONS });
    // best-fit decreasing needs at most 11/9 of the best number of bins; these lengths pack to 99 %
    let fill = tokens as f64 / (64 * loader.len_per_epoch()) as f64;
    assert!(fill > 0.97, "{fill}");
}

#[test]
fn a_cursor_goes_on_exactly() {
    for packing in [true, false] {
        let options = LoaderOptions { packing, ..OPTIONS };
        let mut whole = Loader::new(samples(&uneven(60)), options);
        let all: Vec<MicroBatch> =
            (0..whole.len_per_epoch() * 3).filter_map(|_| whole.next_micro_batch()).collect();
        for (stop, next) in all.iter().enumerate() {
            let mut first = Loader::new(samples(&uneven(60)), options);
            (0..stop).for_each(|_| drop(first.next_micro_batch()));
            let text = serde_json::to_string(&first.cursor()).unwrap();
            let cursor: Cursor = serde_json::from_str(&text).unwrap();
            let mut second = Loader::new(samples(&uneven(60)), options);
            second.seek(&cursor);
            assert_eq!(&second.next_micro_batch().unwrap(), next, "after {stop}");
        }
    }
}

#[test]
fn the_order_depends_on_seed_alone_and_is_known() {
    let order = |seed| {
        rows(&Loader::new(samples(&[2; 8]), LoaderOptions { packing: false, seed, ..OPTIONS }).epoch())
    };
    assert_eq!(order(7), order(7));
    assert_ne!(order(7), order(8));
    // written down: a change here changes everybody's resumed runs
    assert_eq!(order(0), KNOWN_ORDER);
}

const KNOWN_ORDER: [usize; 8] = [7, 1, 0, 6, 3, 2, 4, 5];

#[test]
fn odd_inputs_do_no_harm() {
    let mut empty = Loader::new(samples(&[]), OPTIONS);
    assert_eq!((empty.len_per_epoch(), empty.next_micro_batch()), (0, None));
    assert!(empty.next_window(3).is_empty());
    empty.seek(&Cursor { epoch: 3, micro_batch: 9 });
    // a row longer than a bin gets its own; rows without tokens are left out; a batch of 0 is one of 1
    let options = LoaderOptions { batch_size: 0, max_seq_len: 4, ..OPTIONS };
    let mut loader = Loader::new(samples(&[9, 0, 2, 2]), options);
    assert_eq!(loader.len_per_epoch(), 2);
    loader.seek(&Cursor { epoch: 0, micro_batch: usize::MAX });
    assert_eq!(loader.cursor(), Cursor { epoch: 1, micro_batch: 0 });
}

/// What a model puts before each row takes room as its tokens do.
#[test]
fn rows_before_each_sample_count_in_bins() {
    let lead = 20;
    for shuffle in [false, true] {
        let options = LoaderOptions { batch_size: 1, shuffle, lead, ..OPTIONS };
        let epoch = Loader::new(samples(&uneven(200)), options).epoch();
        for batch in &epoch {
            let taken = batch.tokens.len() + lead * batch.rows.len();
            assert!(taken <= options.max_seq_len + lead, "{taken} in {:?}", batch.segments);
        }
        assert!(epoch.iter().any(|b| b.rows.len() > 1), "no bin has two rows");
        let mut all: Vec<usize> = epoch.into_iter().flat_map(|b| b.rows).collect();
        all.sort_unstable();
        assert_eq!(all, (0..200).collect::<Vec<_>>());
    }
}
