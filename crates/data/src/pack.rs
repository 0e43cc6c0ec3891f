//! Samples to micro-batches, in an order that seed and epoch alone decide.
//!
//! A micro-batch is a flat stream of tokens without padding; each row is a segment of it, and attention and positions
//! stay within segments. Without packing a micro-batch is `batch_size` rows. With packing it is `batch_size` bins of
//! up to `max_seq_len` tokens. What a model puts before each row counts in a bin, so that a bin of many short rows takes
//! no more room than one long row.

mod bins;
mod rng;

use crate::encode::{Goal, Sample};
use rng::Rng;
use std::ops::Range;
use std::sync::Arc;

/// Rows laid out for one forward pass.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MicroBatch {
    /// all tokens
    pub tokens: Vec<u32>,
    /// what each position shall predict: the label of the next one in its row; its own where rows are tagged
    pub targets: Vec<Option<u32>>,
    /// where each row lies; positions restart in each
    pub segments: Vec<Range<usize>>,
    /// labels: positions with a target, and what rows have beside them
    pub label_tokens: usize,
    /// what each row teaches
    pub goals: Vec<Goal>,
    /// which text of a pair each token is of, if some are of the second
    pub types: Option<Vec<u32>>,
    /// index of each segment's sample
    pub rows: Vec<usize>,
}

impl MicroBatch {
    /// Lays out the samples with these indices.
    pub fn of(samples: &[Sample], rows: &[usize]) -> Self {
        let mut batch = Self { rows: rows.to_vec(), ..Self::default() };
        for &row in rows {
            let sample = &samples[row];
            let start = batch.tokens.len();
            batch.tokens.extend(&sample.ids);
            batch.targets.extend(sample.labels.iter().skip(usize::from(sample.goal != Goal::Tags)));
            // the last token of a row has no next one
            batch.targets.resize(batch.tokens.len(), None);
            batch.segments.push(start..batch.tokens.len());
            batch.goals.push(sample.goal.clone());
            if let Some(from) = sample.second_type_from {
                let types = batch.types.get_or_insert_default();
                types.resize(start + from, 0);
                types.resize(batch.tokens.len(), 1);
            }
        }
        if let Some(types) = &mut batch.types {
            types.resize(batch.tokens.len(), 0);
        }
        let beside: usize = batch.goals.iter().map(Goal::count).sum();
        batch.label_tokens = batch.targets.iter().flatten().count() + beside;
        batch
    }
}

/// How rows are grouped and ordered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoaderOptions {
    /// rows a micro-batch, or bins with packing
    pub batch_size: usize,
    /// tokens a bin
    pub max_seq_len: usize,
    /// several rows a bin
    pub packing: bool,
    /// a new order each epoch; without, the data's order
    pub shuffle: bool,
    /// decides the order
    pub seed: u64,
    /// rows that the model puts before each sample (prompts)
    pub lead: usize,
}

/// Where a run stands in its data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Cursor {
    /// epochs begun before this one
    pub epoch: u64,
    /// micro-batches of this epoch already used
    pub micro_batch: usize,
}

/// Gives out micro-batches, epoch after epoch, without end.
#[derive(Clone, Debug)]
pub struct Loader {
    samples: Arc<Vec<Sample>>,
    options: LoaderOptions,
    cursor: Cursor,
    /// rows of each micro-batch of the epoch
    groups: Vec<Vec<usize>>,
}

impl Loader {
    /// A loader at the beginning of the first epoch. A `batch_size` of 0 counts as 1. Samples without tokens are
    /// left out.
    pub fn new(samples: Arc<Vec<Sample>>, options: LoaderOptions) -> Self {
        let groups = groups(&samples, &options, 0);
        Self { samples, options, cursor: Cursor::default(), groups }
    }

    /// Micro-batches an epoch; the same for every epoch.
    pub fn len_per_epoch(&self) -> usize {
        self.groups.len()
    }

    /// Where the next micro-batch stands.
    pub fn cursor(&self) -> Cursor {
        self.cursor
    }

    /// Goes to a place that [`Self::cursor`] gave, of a loader of the same samples and options.
    pub fn seek(&mut self, cursor: &Cursor) {
        let epoch_changes = cursor.epoch != self.cursor.epoch;
        self.cursor = *cursor;
        if epoch_changes {
            self.groups = groups(&self.samples, &self.options, cursor.epoch);
        }
        self.turn_over();
    }

    /// Epochs done, with the part of the current one.
    pub fn epochs_done(&self) -> f64 {
        self.cursor.epoch as f64 + self.cursor.micro_batch as f64 / self.groups.len().max(1) as f64
    }

    /// The samples.
    pub fn samples(&self) -> &[Sample] {
        &self.samples
    }

    /// The next micro-batch; `None` only if there are no rows at all.
    pub fn next_micro_batch(&mut self) -> Option<MicroBatch> {
        let batch = MicroBatch::of(&self.samples, self.groups.get(self.cursor.micro_batch)?);
        self.cursor.micro_batch += 1;
        self.turn_over();
        Some(batch)
    }

    /// The next `n` micro-batches, or fewer at the end of the epoch: a window never holds rows of two epochs.
    pub fn next_window(&mut self, n: usize) -> Vec<MicroBatch> {
        let left = self.groups.len() - self.cursor.micro_batch.min(self.groups.len());
        (0..n.min(left)).filter_map(|_| self.next_micro_batch()).collect()
    }

    /// All micro-batches of the current epoch, from its beginning, without moving. For evaluation.
    pub fn epoch(&self) -> Vec<MicroBatch> {
        self.groups.iter().map(|rows| MicroBatch::of(&self.samples, rows)).collect()
    }

    /// At the end of an epoch, the next begins.
    fn turn_over(&mut self) {
        if self.cursor.micro_batch >= self.groups.len() && !self.groups.is_empty() {
            self.cursor = Cursor { epoch: self.cursor.epoch.wrapping_add(1), micro_batch: 0 };
            self.groups = groups(&self.samples, &self.options, self.cursor.epoch);
        }
    }
}

/// Rows of each micro-batch of an epoch.
fn groups(samples: &[Sample], options: &LoaderOptions, epoch: u64) -> Vec<Vec<usize>> {
    let mut rng = Rng::new(options.seed, epoch);
    let mut rows: Vec<usize> = (0..samples.len()).filter(|&row| !samples[row].ids.is_empty()).collect();
    if options.shuffle {
        rng.shuffle(&mut rows);
    }
    let batch_size = options.batch_size.max(1);
    if !options.packing {
        return rows.chunks(batch_size).map(<[usize]>::to_vec).collect();
    }
    let length = |row: usize| samples[row].ids.len() + options.lead;
    let room = options.max_seq_len + options.lead;
    let bins = if options.shuffle {
        let mut bins = bins::best_fit(&rows, length, room);
        bins::mix(&mut bins, length, room, &mut rng);
        rng.shuffle(&mut bins);
        bins
    } else {
        bins::next_fit(&rows, length, room)
    };
    bins.chunks(batch_size).map(<[Vec<usize>]>::concat).collect()
}
