//! Products `c (+)= Σ scaleᵢ·aᵢ·bᵢ` with several terms and several outputs, as one parallel job.
//!
//! A linear layer with its LoRA, forward and backward, is a sum of products into one matrix:
//!
//! ```text
//! y  = x·Wᵀ + s·u·Bᵀ          terms (x, Wᵀ), (u, s·Bᵀ)
//! dx = Σᵢ dyᵢ·Wᵢ + du·A       terms (dyᵢ, Wᵢ), (du, A)
//! ```
//!
//! and layers that share their input are several such sums. A task owns a few panels of columns of one output, and
//! a block of its rows. It walks through the terms; of each it takes slices of the inner dimension, packs the
//! panels of b for it (decoding frozen weights on the way) and lets the inner loops add the slice to its tiles of c.
//! The panels stay in the core's L2 cache while the rows of a pass by; a is read where it lies.
//!
//! An element of c is summed in the order of terms, slices and k. Slices depend on the shapes and storages alone;
//! tasks only say who computes an element. So results depend neither on the number of threads nor on who is quick.

use super::disjoint::SharedMat;
use super::micro::{self, Isa, NR, Tile};
use super::pack::{self, Right};
use crate::mat::{MatMut, MatRef};
use rayon::prelude::*;
use std::cell::Cell;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Longest slice of the inner dimension: its panel of [`NR`] columns takes 144 KB.
const DEPTH: usize = 576;
/// Panels that a task packs at once, at most (but for storages whose blocks are longer).
const PANELS: usize = 3;
/// Fewest rows in a block of rows, as packing is repeated for each block.
const LEAST_ROWS: usize = 96;
/// Tasks that each thread gets: the last one to end keeps the others waiting for a small part of the time.
const TASKS_PER_THREAD: usize = 6;
/// Below this many multiply-adds other threads are not woken.
const SERIAL_WORK: usize = 1 << 17;

/// One product.
#[derive(Clone, Copy, Debug)]
pub struct Term<'a> {
    /// `[m, k]`
    pub a: MatRef<'a>,
    /// `[k, n]`
    pub b: Right<'a>,
    /// factor
    pub scale: f32,
}

impl<'a> Term<'a> {
    /// `a·b`.
    pub fn new(a: MatRef<'a>, b: Right<'a>) -> Self {
        Self { a, b, scale: 1.0 }
    }
}

/// An output and what is summed into it.
pub struct Job<'a> {
    c: SharedMat<'a>,
    accumulate: bool,
    terms: Vec<Term<'a>>,
}

impl<'a> Job<'a> {
    /// `c = Σ terms`, or `c += Σ terms` if `accumulate`; otherwise c is not read.
    ///
    /// Panics if the shapes do not fit.
    pub fn new(c: &'a mut MatMut, accumulate: bool, terms: Vec<Term<'a>>) -> Self {
        for Term { a, b, .. } in &terms {
            assert_eq!((a.rows, a.cols, c.cols), (c.rows, b.dims().0, b.dims().1), "product: shapes");
            a.check();
            if let Right::Dense(b) = b {
                b.check();
            }
        }
        Self { c: SharedMat::new(c), accumulate, terms }
    }

    fn work(&self) -> usize {
        let (m, n) = self.c.dims();
        self.terms.iter().map(|t| m * n * t.a.cols).sum()
    }

    /// Columns that a task takes.
    fn columns_per_task(&self) -> usize {
        self.terms.iter().map(|t| t.b.column_step()).max().unwrap_or(NR)
    }
}

/// A task: columns and rows of one job.
struct Task {
    job: usize,
    columns: Range<usize>,
    rows: Range<usize>,
}

/// Runs the jobs on rayon's current pool. Outputs must not overlap inputs, which borrowing sees to.
pub fn run(jobs: &[Job]) {
    let work: usize = jobs.iter().map(Job::work).sum();
    let threads = if work < SERIAL_WORK { 1 } else { rayon::current_num_threads() };
    run_on(jobs, threads);
}

/// Runs the jobs on the calling thread, for use inside parallel loops.
pub fn run_serial(jobs: &[Job]) {
    run_on(jobs, 1);
}

fn run_on(jobs: &[Job], threads: usize) {
    let isa = Isa::best();
    let tasks = tasks(jobs, threads);
    let threads = threads.min(tasks.len());
    if threads <= 1 {
        tasks.iter().for_each(|t| task(isa, &jobs[t.job], t));
        return;
    }
    // threads take the next task when they are done with one: a slow core holds nobody up
    let next = AtomicUsize::new(0);
    (0..threads).into_par_iter().with_max_len(1).for_each(|_| {
        while let Some(t) = tasks.get(next.fetch_add(1, Ordering::Relaxed)) {
            task(isa, &jobs[t.job], t);
        }
    });
}

/// Cuts the outputs into tasks that `threads` threads can share out evenly: about [`TASKS_PER_THREAD`] for each, at
/// most [`PANELS`] panels wide (more panels: rows of a are read fewer times), at least [`LEAST_ROWS`] high.
fn tasks(jobs: &[Job], threads: usize) -> Vec<Task> {
    let share = match threads {
        1 => usize::MAX,
        _ => jobs.iter().map(Job::work).sum::<usize>() / (threads * TASKS_PER_THREAD),
    };
    let mut tasks = Vec::new();
    for (job, j) in jobs.iter().enumerate() {
        let (rows, cols) = j.c.dims();
        let step = j.columns_per_task();
        let step_work = (j.work() / cols.div_ceil(step).max(1)).max(1);
        let steps = if step > NR { 1 } else { (share / step_work).clamp(1, PANELS) };
        let blocks = (step_work * steps).div_ceil(share.max(1)).clamp(1, (rows / LEAST_ROWS).max(1));
        // a multiple of every height of a tile
        let height = rows.div_ceil(blocks).next_multiple_of(24).max(1);
        for left in (0..cols).step_by(steps * step) {
            let columns = left..cols.min(left + steps * step);
            for top in (0..rows).step_by(height) {
                tasks.push(Task { job, columns: columns.clone(), rows: top..rows.min(top + height) });
            }
        }
    }
    tasks
}

thread_local! {
    /// Panels and decoded rows, kept between calls.
    static SCRATCH: Cell<[Vec<f32>; 2]> = const { Cell::new([Vec::new(), Vec::new()]) };
}

/// The slices into which an inner dimension is cut: equal but for the last, whole blocks.
fn slice_len(inner: usize, step: usize, columns: usize) -> usize {
    // long blocks make a task wide: a shorter slice keeps its panels in the cache
    let most = if columns > NR * PANELS { DEPTH * 2 / 3 } else { DEPTH };
    let slices = inner.div_ceil(most).max(1);
    inner.div_ceil(slices).next_multiple_of(step.max(16)).clamp(1, most.next_multiple_of(step))
}

fn task(isa: Isa, job: &Job, task: &Task) {
    let mut accumulate = job.accumulate;
    let [mut panels, mut rows] = SCRATCH.take();
    let width = task.columns.len();
    for term in &job.terms {
        let inner = term.a.cols;
        let depth = slice_len(inner, term.b.inner_step(), job.columns_per_task());
        for start in (0..inner).step_by(depth) {
            let slice = start..inner.min(start + depth);
            let needed = width.div_ceil(NR) * NR * slice.len();
            grow(&mut panels, needed);
            grow(&mut rows, pack::scratch_len(depth, width));
            let panels = &mut panels[..needed];
            pack::pack(isa, &term.b, term.scale, slice.clone(), task.columns.clone(), panels, &mut rows);
            tiles(isa, job, task, term, slice, panels, accumulate);
            accumulate = true;
        }
    }
    if !accumulate {
        // no term, or terms without an inner dimension: the sum is zero
        // SAFETY: the tasks' parts of c do not overlap.
        unsafe { job.c.fill(task.rows.clone(), task.columns.clone(), 0.0) };
    }
    SCRATCH.set([panels, rows]);
}

fn grow(buffer: &mut Vec<f32>, len: usize) {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
}

/// Adds one slice of a term to the task's part of c.
fn tiles(
    isa: Isa,
    job: &Job,
    task: &Task,
    term: &Term,
    slice: Range<usize>,
    panels: &[f32],
    accumulate: bool,
) {
    /// Rows that pass by all panels before the next ones do: a multiple of every tile's height.
    const ROWS: usize = 24;
    let a = &term.a;
    let k = slice.len();
    for top in task.rows.clone().step_by(ROWS) {
        let bottom = task.rows.end.min(top + ROWS);
        for (panel, left) in panels.chunks_exact(k * NR).zip(task.columns.clone().step_by(NR)) {
            let tile = Tile {
                a: a.data.as_ptr().wrapping_add(top * a.row_stride + slice.start * a.col_stride),
                a_row: a.row_stride,
                a_col: a.col_stride,
                b: panel.as_ptr(),
                b_row: NR,
                k,
                c: job.c.pointer(top, left),
                c_row: job.c.row_stride(),
                rows: bottom - top,
                width: task.columns.end.min(left + NR) - left,
                accumulate,
            };
            // SAFETY: a, the panel and c hold these rows and columns ([`Job::new`] checked them); no two tasks
            // share an element of c.
            unsafe { micro::run(isa, &tile) };
        }
    }
}
