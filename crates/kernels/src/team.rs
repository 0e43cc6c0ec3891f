//! A small team of threads for regions of a few microseconds.
//!
//! Generating a token runs more than a hundred products, each over in 5 to 50 µs. rayon needs 3 to 20 µs to hand
//! such a piece of work to a sleeping thread and to hear that it is done. Here the helpers of one process spin for
//! [`SPIN`] after their last work, and a region starts with one store that they see:
//!
//! - the caller publishes a job and takes parts of it itself, large ones first, then smaller ones
//!   ([`Job::claim`]), so that the threads end together and a helper that the system has not scheduled is not
//!   waited for: only helpers that have *entered* must leave before the region ends;
//! - helpers that saw nothing for [`SPIN`] sleep, and are woken by the next region;
//! - a region inside a region, or beside one of another thread, runs on its caller alone.
//!
//! Which thread takes which part is left to chance: a job must give the same result for every cut.

use std::any::Any;
use std::cell::UnsafeCell;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// How long a helper waits awake: longer than what lies between two products of a token.
const SPIN: Duration = Duration::from_micros(200);

/// [`Team::control`]: helpers inside the region in the low bits, then [`OPEN`], then the region's number.
const OPEN: u64 = 1 << 16;
const EPOCH: u64 = 1 << 17;

/// What a region runs.
struct Job {
    run: *const (dyn Fn(Range<usize>) + Sync),
    /// items from here on are untaken
    next: AtomicUsize,
    items: usize,
    least: usize,
    /// a part is this fraction of what is left
    share: usize,
    /// most helpers that may enter
    helpers: u64,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

impl Job {
    /// The next part: a share of what is left, so that the last ones are small.
    fn claim(&self) -> Option<Range<usize>> {
        let mut from = self.next.load(Ordering::Relaxed);
        loop {
            let left = self.items.checked_sub(from).filter(|left| *left > 0)?;
            let len =
                (left / self.share).next_multiple_of(self.least).clamp(self.least, left.max(self.least));
            let to = (from + len).min(self.items);
            match self.next.compare_exchange_weak(from, to, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Some(from..to),
                Err(now) => from = now,
            }
        }
    }

    /// Takes parts until none is left.
    fn work(&self) {
        let done = catch_unwind(AssertUnwindSafe(|| {
            while let Some(part) = self.claim() {
                // SAFETY: the closure outlives the region, and only those inside the region get here.
                unsafe { (*self.run)(part) };
            }
        }));
        if let Err(panic) = done {
            self.next.store(self.items, Ordering::Relaxed);
            *self.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
        }
    }
}

/// The helpers, and what they share with the caller.
struct Team {
    /// taken by the caller of the running region
    busy: AtomicBool,
    control: AtomicU64,
    /// the running region's job; written by the caller while no helper is inside
    job: UnsafeCell<*const Job>,
    helpers: AtomicUsize,
    sleepers: AtomicUsize,
    bed: Mutex<()>,
    bell: Condvar,
}

// SAFETY: `job` is written only by the holder of `busy` while the region is closed and nobody is inside, and read
// only by helpers that have entered an open region; `control` orders the two.
unsafe impl Sync for Team {}
// SAFETY: as above; the raw pointer is never used by the thread that drops the team (it lives as long as the process).
unsafe impl Send for Team {}

fn team() -> &'static Team {
    static TEAM: OnceLock<Team> = OnceLock::new();
    TEAM.get_or_init(|| Team {
        busy: AtomicBool::new(false),
        control: AtomicU64::new(0),
        job: UnsafeCell::new(std::ptr::null()),
        helpers: AtomicUsize::new(0),
        sleepers: AtomicUsize::new(0),
        bed: Mutex::new(()),
        bell: Condvar::new(),
    })
}

/// Runs `run` on ranges that cover `0..items` once, in parts of at least `least` items (but for the last), on as
/// many threads as rayon's current pool has. Returns when all parts are done; a panic in one of them is passed on.
pub(crate) fn split(items: usize, least: usize, run: &(dyn Fn(Range<usize>) + Sync)) {
    let threads = rayon::current_num_threads();
    let least = least.max(1);
    if items == 0 {
        return;
    }
    if threads == 1 || items <= least || team().busy.swap(true, Ordering::Acquire) {
        return run(0..items);
    }
    let team = team();
    team.hire(threads - 1);
    // SAFETY: the pointer is used only inside this region, which ends before `run` is given back.
    let run = unsafe {
        std::mem::transmute::<&(dyn Fn(Range<usize>) + Sync), &'static (dyn Fn(Range<usize>) + Sync)>(run)
    };
    let job = Job {
        run,
        next: AtomicUsize::new(0),
        items,
        least,
        share: threads,
        helpers: threads as u64 - 1,
        panic: Mutex::new(None),
    };
    team.open(&job);
    job.work();
    team.close();
    let panic = job.panic.into_inner().unwrap_or_else(PoisonError::into_inner);
    team.busy.store(false, Ordering::Release);
    if let Some(panic) = panic {
        resume_unwind(panic);
    }
}

impl Team {
    /// Starts helpers up to `wanted`; if the system refuses one, there are fewer.
    fn hire(&'static self, wanted: usize) {
        let have = self.helpers.load(Ordering::Relaxed);
        for i in have..wanted.min(OPEN as usize - 1) {
            let helper = std::thread::Builder::new().name(format!("team-{i}"));
            if helper.spawn(move || self.help()).is_err() {
                return;
            }
            self.helpers.store(i + 1, Ordering::Relaxed);
        }
    }

    fn open(&self, job: &Job) {
        // SAFETY: the region is closed, nobody is inside, and the caller holds `busy`.
        unsafe { *self.job.get() = job };
        let epoch = self.control.load(Ordering::Relaxed) & !(EPOCH - 1);
        // SeqCst, as in `sleep`: either we see the sleeper or it sees the region
        self.control.store(epoch.wrapping_add(EPOCH) | OPEN, Ordering::SeqCst);
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            drop(self.bed.lock());
            self.bell.notify_all();
        }
    }

    /// Lets nobody in any more and waits for those inside.
    fn close(&self) {
        self.control.fetch_and(!OPEN, Ordering::Relaxed);
        let mut spins = 0u32;
        while self.control.load(Ordering::Acquire) & (OPEN - 1) > 0 {
            spins += 1;
            if spins.is_multiple_of(1 << 12) {
                std::thread::yield_now(); // a helper may have been put off its core
            }
            std::hint::spin_loop();
        }
    }

    /// A helper's life.
    fn help(&self) {
        let mut seen = 0;
        loop {
            let control = self.wait(seen);
            seen = control & !(EPOCH - 1);
            if let Some(job) = self.enter(seen) {
                job.work();
                self.control.fetch_sub(1, Ordering::Release);
            }
        }
    }

    /// Waits for a region after `seen`: awake at first, then asleep.
    fn wait(&self, seen: u64) -> u64 {
        let is_new = |control: u64| control & !(EPOCH - 1) != seen;
        let start = Instant::now();
        loop {
            for _ in 0..64 {
                let control = self.control.load(Ordering::Acquire);
                if is_new(control) {
                    return control;
                }
                std::hint::spin_loop();
            }
            if start.elapsed() > SPIN {
                break;
            }
        }
        let mut bed = self.bed.lock().unwrap_or_else(PoisonError::into_inner);
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        let control = loop {
            let control = self.control.load(Ordering::SeqCst);
            if is_new(control) {
                break control;
            }
            bed = self.bell.wait(bed).unwrap_or_else(PoisonError::into_inner);
        };
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
        control
    }

    /// The job of region `epoch`, if that is still open and has room.
    fn enter(&self, epoch: u64) -> Option<&Job> {
        let mut control = self.control.load(Ordering::Acquire);
        loop {
            if control & !(EPOCH - 1) != epoch || control & OPEN == 0 {
                return None;
            }
            let next = control + 1;
            match self.control.compare_exchange_weak(control, next, Ordering::Acquire, Ordering::Acquire) {
                Ok(_) => break,
                Err(now) => control = now,
            }
        }
        // SAFETY: we are inside an open region: its job was written before it opened, and its caller waits for us.
        let job = unsafe { &**self.job.get() };
        if control & (OPEN - 1) >= job.helpers {
            self.control.fetch_sub(1, Ordering::Release);
            return None;
        }
        Some(job)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;

    fn pool(threads: usize) -> rayon::ThreadPool {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap()
    }

    /// Every item once, whatever the sizes, and however many regions run at once.
    #[test]
    fn every_item_is_run_once() {
        let round = |n: usize, least: usize| {
            let hits: Vec<AtomicU32> = (0..n).map(|_| AtomicU32::new(0)).collect();
            split(n, least, &|range| {
                assert!(range.end == n || range.len() >= least);
                for i in range {
                    hits[i].fetch_add(1, Ordering::Relaxed);
                }
            });
            assert!(hits.iter().all(|h| h.load(Ordering::Relaxed) == 1), "{n} by {least}");
        };
        std::thread::scope(|scope| {
            for threads in [1, 2, 3, 8] {
                scope.spawn(move || {
                    pool(threads).install(|| {
                        for i in 0..2000 {
                            round(i % 97, 1 + i % 5);
                            if i % 500 == 0 {
                                std::thread::sleep(2 * SPIN); // the helpers fall asleep
                            }
                        }
                    });
                });
            }
        });
    }

    #[test]
    fn regions_may_be_nested() {
        let total = AtomicU32::new(0);
        pool(3).install(|| {
            split(10, 1, &|outer| {
                for _ in outer {
                    split(10, 1, &|inner| {
                        total.fetch_add(inner.len() as u32, Ordering::Relaxed);
                    });
                }
            });
        });
        assert_eq!(total.into_inner(), 100);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_team_lives_on() {
        pool(2).install(|| {
            for bad in 0..50 {
                let run = || split(50, 1, &|range| assert!(!range.contains(&bad), "item {bad}"));
                assert!(catch_unwind(AssertUnwindSafe(run)).is_err());
            }
            let sum = AtomicU32::new(0);
            split(100, 1, &|range| {
                sum.fetch_add(range.sum::<usize>() as u32, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 4950);
        });
    }
}
