//! Memory for the whole program: large buffers from a heap of our own, all else from mimalloc.
//!
//! A training step takes and returns the same few hundred large buffers each time. What general allocators do with
//! them costs either time (glibc and, by default, mimalloc give pages back to the system, and each step takes a
//! hundred thousand page faults to get them again) or room (kept pages are held by size and by thread: 44 of 178 MB
//! in a checkpointed step). Here large blocks lie in one reserved stretch of addresses. A block goes to the lowest free
//! place that it fits into, neighbours that are free become one, and pages are never given back: the stretch stays
//! dense, its end is the peak of what was in use plus a few per cent, and a steady step takes no page fault.

use std::alloc::{GlobalAlloc, Layout};

/// The program's allocator.
pub struct Allocator;

#[cfg(unix)]
static LARGE: large::Heap = large::Heap::new();

// SAFETY: every block is handed out by exactly one of the two heaps, which are allocators themselves; the address
// says which.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        #[cfg(unix)]
        if large::takes(layout)
            && let Some((block, _)) = LARGE.alloc(layout.size())
        {
            return block;
        }
        // SAFETY: passed on.
        unsafe { mimalloc::MiMalloc.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        #[cfg(unix)]
        if large::takes(layout)
            && let Some((block, fresh)) = LARGE.alloc(layout.size())
        {
            if !fresh {
                // SAFETY: the block is `layout.size()` long and ours alone.
                unsafe { block.write_bytes(0, layout.size()) };
            }
            return block;
        }
        // SAFETY: passed on.
        unsafe { mimalloc::MiMalloc.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        #[cfg(unix)]
        if LARGE.holds(block) {
            LARGE.free(block, layout.size());
            return;
        }
        // SAFETY: passed on; the block is mimalloc's.
        unsafe { mimalloc::MiMalloc.dealloc(block, layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        #[cfg(unix)]
        {
            // SAFETY: the caller's size is valid for this alignment.
            let wanted = unsafe { Layout::from_size_align_unchecked(new_size, layout.align()) };
            if LARGE.holds(block) || large::takes(wanted) {
                // SAFETY: a new block, the shorter of the lengths copied, the old block returned.
                unsafe {
                    let new = self.alloc(wanted);
                    if !new.is_null() {
                        new.copy_from_nonoverlapping(block, layout.size().min(new_size));
                        self.dealloc(block, layout);
                    }
                    return new;
                }
            }
        }
        // SAFETY: passed on; the block is mimalloc's.
        unsafe { mimalloc::MiMalloc.realloc(block, layout, new_size) }
    }
}

/// Bytes of large blocks in use: tensors and the like. 0 where there is no heap of our own.
pub fn large_bytes() -> usize {
    counts(|used, _| used)
}

/// The most that [`large_bytes`] was since [`forget_peak`].
pub fn peak_large_bytes() -> usize {
    counts(|_, peak| *peak)
}

/// Lets [`peak_large_bytes`] count from now on.
pub fn forget_peak() {
    counts(|used, peak| *peak = used);
}

#[cfg(unix)]
fn counts<R>(f: impl FnOnce(usize, &mut usize) -> R) -> R {
    LARGE.counts(f)
}

#[cfg(not(unix))]
fn counts<R>(f: impl FnOnce(usize, &mut usize) -> R) -> R {
    f(0, &mut 0)
}

/// Lets mimalloc keep what is freed, for the blocks that are its own.
pub fn keep_freed_pages() {
    /// place of `mi_option_purge_delay` in `mi_option_t`, the same in mimalloc 2 and 3
    const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;
    // SAFETY: sets a number; called before other threads exist.
    unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, -1) };
}

#[cfg(unix)]
mod large {
    use std::alloc::Layout;
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// Blocks from this size on are ours.
    const LEAST: usize = 16 << 10;
    /// Sizes are rounded up to this: a system page, so that every block is aligned to one.
    const PAGE: usize = 4096;
    /// Addresses reserved; memory is taken only where something is written.
    const RESERVED: usize = 1 << 40;
    /// Most separate free places that are remembered; beyond it the smallest are lost until the program ends.
    const MOST_GAPS: usize = 4096;

    /// True if a block of this layout belongs here.
    pub fn takes(layout: Layout) -> bool {
        layout.size() >= LEAST && layout.align() <= PAGE
    }

    /// A free stretch, in bytes from the start of the heap.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Gap {
        start: usize,
        len: usize,
    }

    /// Which parts of the heap are free. An array, as an allocator can't allocate.
    pub struct Map {
        /// ascending, never touching each other
        gaps: [Gap; MOST_GAPS],
        count: usize,
        /// nothing was ever used from here on
        top: usize,
        end: usize,
        /// bytes in use, and the most of them since that was last forgotten
        pub used: usize,
        pub peak: usize,
    }

    impl Map {
        pub const fn new() -> Self {
            Self { gaps: [Gap { start: 0, len: 0 }; MOST_GAPS], count: 0, top: 0, end: 0, used: 0, peak: 0 }
        }

        /// Takes the lowest place for `len` bytes. Also says whether nothing was ever written there.
        pub fn take(&mut self, len: usize) -> Option<(usize, bool)> {
            if let Some(at) = self.gaps[..self.count].iter().position(|g| g.len >= len) {
                let start = self.gaps[at].start;
                self.gaps[at].start += len;
                self.gaps[at].len -= len;
                if self.gaps[at].len == 0 {
                    self.remove(at);
                }
                return Some((start, false));
            }
            // a last gap at the top is used up first
            let mut start = self.top;
            let last = self.count.checked_sub(1).map(|i| self.gaps[i]);
            let reaches_top = last.filter(|g| g.start + g.len == self.top);
            if let Some(gap) = reaches_top {
                start = gap.start;
            }
            let end = start.checked_add(len).filter(|end| *end <= self.end)?;
            if reaches_top.is_some() {
                self.count -= 1;
            }
            self.top = end;
            Some((start, reaches_top.is_none()))
        }

        /// Gives back `len` bytes at `start`.
        pub fn give(&mut self, start: usize, len: usize) {
            let at = self.gaps[..self.count].partition_point(|g| g.start < start);
            let joins_before = at > 0 && self.gaps[at - 1].start + self.gaps[at - 1].len == start;
            let joins_behind = at < self.count && start + len == self.gaps[at].start;
            match (joins_before, joins_behind) {
                (true, true) => {
                    self.gaps[at - 1].len += len + self.gaps[at].len;
                    self.remove(at);
                }
                (true, false) => self.gaps[at - 1].len += len,
                (false, true) => {
                    self.gaps[at].start = start;
                    self.gaps[at].len += len;
                }
                (false, false) => self.insert(at, Gap { start, len }),
            }
        }

        fn insert(&mut self, mut at: usize, gap: Gap) {
            if self.count == MOST_GAPS {
                let smallest = (0..MOST_GAPS).min_by_key(|i| self.gaps[*i].len).unwrap_or(0);
                if self.gaps[smallest].len >= gap.len {
                    return;
                }
                self.remove(smallest);
                at -= usize::from(smallest < at);
            }
            self.gaps.copy_within(at..self.count, at + 1);
            self.gaps[at] = gap;
            self.count += 1;
        }

        fn remove(&mut self, at: usize) {
            self.gaps.copy_within(at + 1..self.count, at);
            self.count -= 1;
        }
    }

    /// The heap of large blocks.
    pub struct Heap {
        map: Mutex<Map>,
        /// 0: not reserved yet; 1: could not be
        base: AtomicUsize,
        len: AtomicUsize,
    }

    impl Heap {
        pub const fn new() -> Self {
            Self { map: Mutex::new(Map::new()), base: AtomicUsize::new(0), len: AtomicUsize::new(0) }
        }

        /// A block of `size` bytes, and whether it is zero already. `None`: ask somebody else.
        pub fn alloc(&self, size: usize) -> Option<(*mut u8, bool)> {
            // a panic can't happen while the lock is held; a poisoned lock would still be a sound map
            let mut map = self.map.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            if self.base.load(Ordering::Relaxed) == 0 {
                let (base, len) = reserve().unwrap_or((1, 0));
                map.end = len;
                self.len.store(len, Ordering::Relaxed);
                self.base.store(base, Ordering::Release);
            }
            let len = size.checked_next_multiple_of(PAGE)?;
            let (start, fresh) = map.take(len)?;
            map.used += len;
            map.peak = map.peak.max(map.used);
            let base = self.base.load(Ordering::Relaxed);
            Some((std::ptr::with_exposed_provenance_mut(base + start), fresh))
        }

        /// Runs `f` on the bytes in use and the most of them.
        pub fn counts<R>(&self, f: impl FnOnce(usize, &mut usize) -> R) -> R {
            let mut map = self.map.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            f(map.used, &mut map.peak)
        }

        /// True if the block came from here.
        pub fn holds(&self, block: *mut u8) -> bool {
            let base = self.base.load(Ordering::Acquire);
            base > 1 && block.addr().wrapping_sub(base) < self.len.load(Ordering::Relaxed)
        }

        /// Takes a block back.
        pub fn free(&self, block: *mut u8, size: usize) {
            let start = block.addr() - self.base.load(Ordering::Relaxed);
            let mut map = self.map.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            let len = size.next_multiple_of(PAGE);
            map.used -= len;
            map.give(start, len);
        }
    }

    /// A stretch of addresses, as long as the system gives it: there may be limits on a process' address space.
    fn reserve() -> Option<(usize, usize)> {
        // the mapping of a whole heap is below what memmap2 offers
        let mut len = RESERVED;
        while len >= 1 << 30 {
            // SAFETY: a new private mapping; nothing else is touched.
            let base = unsafe {
                libc::mmap(
                    std::ptr::null_mut(),
                    len,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                    -1,
                    0,
                )
            };
            if base != libc::MAP_FAILED {
                // large pages: fewer misses of the address cache. A wish; a refusal changes nothing.
                #[cfg(target_os = "linux")]
                // SAFETY: the mapping made above.
                unsafe {
                    libc::madvise(base, len, libc::MADV_HUGEPAGE)
                };
                return Some((base.expose_provenance(), len));
            }
            len /= 4;
        }
        None
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        fn map(end: usize) -> Box<Map> {
            let mut map = Box::new(Map::new());
            map.end = end;
            map
        }

        #[test]
        fn lowest_place_first_and_neighbours_join() {
            let mut m = map(1000);
            let [a, b, c, d] = [100, 50, 100, 50].map(|len| m.take(len).unwrap());
            assert_eq!([a.0, b.0, c.0, d.0], [0, 100, 150, 250]);
            assert!(a.1 && d.1, "fresh");
            m.give(0, 100);
            m.give(150, 100);
            assert_eq!(m.take(60), Some((0, false)), "the lowest, not the best");
            m.give(100, 50);
            // 60..250 is one gap now
            assert_eq!(m.count, 1);
            assert_eq!(m.take(190), Some((60, false)));
            assert_eq!(m.count, 0);
            m.give(250, 50);
            assert_eq!(m.take(80), Some((250, false)), "a gap at the top grows");
            assert_eq!(m.top, 330);
            assert_eq!(m.take(1000), None);
            assert_eq!(m.take(670), Some((330, true)));
        }

        #[test]
        fn blocks_never_overlap_and_everything_comes_back() {
            let mut m = map(1 << 30);
            let mut alive: Vec<(usize, usize)> = Vec::new();
            let mut seed = 1u64;
            let mut next = |n: u64| {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (seed >> 33) % n
            };
            for _ in 0..20_000 {
                if alive.len() > 200 || (next(2) == 0 && !alive.is_empty()) {
                    let (start, len) = alive.swap_remove(next(alive.len() as u64) as usize);
                    m.give(start, len);
                } else {
                    let len = 1 + next(5000) as usize;
                    let (start, _) = m.take(len).unwrap();
                    assert!(alive.iter().all(|(s, l)| start + len <= *s || s + l <= start));
                    alive.push((start, len));
                }
            }
            alive.into_iter().for_each(|(start, len)| m.give(start, len));
            assert_eq!((m.count, m.gaps[0].start, m.gaps[0].len), (1, 0, m.top));
        }

        #[test]
        fn a_full_list_of_gaps_loses_the_smallest() {
            let mut m = map(usize::MAX);
            let len = |i: usize| 10 + (i % 7);
            let starts: Vec<usize> = (0..2 * MOST_GAPS + 20).map(|i| m.take(len(i)).unwrap().0).collect();
            for i in (0..starts.len()).step_by(2) {
                m.give(starts[i], len(i));
            }
            assert_eq!(m.count, MOST_GAPS);
            assert!(m.gaps.windows(2).all(|w| w[0].start + w[0].len < w[1].start));
        }

        #[test]
        fn memory_is_there_zeroed_and_aligned() {
            let heap = Heap::new();
            let (block, fresh) = heap.alloc(1 << 20).unwrap();
            assert!(fresh && heap.holds(block) && block.addr().is_multiple_of(PAGE));
            // SAFETY: the block is a megabyte long.
            let bytes = unsafe { std::slice::from_raw_parts_mut(block, 1 << 20) };
            assert!(bytes.iter().all(|b| *b == 0));
            bytes.fill(7);
            heap.free(block, 1 << 20);
            let (again, fresh) = heap.alloc(200 << 10).unwrap();
            assert!(again == block && !fresh);
            assert!(!heap.holds((&raw const heap).cast_mut().cast()));
        }
    }
}
