//! Asking for memory before it is needed.
//!
//! The weights of a model lie in main memory, far from the caches that the products work in. While one panel is being
//! multiplied, the lines of the next one are requested a few at a time, so that packing it later finds them in L2.

use std::ops::Range;

const LINE: usize = 64;

/// The cache lines of a part of a matrix: `rows` pieces of `row_bytes`, `stride` bytes apart.
#[derive(Clone, Copy)]
pub(super) struct Lines {
    base: *const u8,
    rows: usize,
    row_lines: usize,
    stride: usize,
}

impl Default for Lines {
    fn default() -> Self {
        Self { base: std::ptr::null(), rows: 0, row_lines: 0, stride: 0 }
    }
}

impl Lines {
    /// The lines of `rows` pieces of `row_bytes` from `first` on.
    pub fn new(first: &[u8], rows: usize, row_bytes: usize, stride: usize) -> Self {
        if stride == row_bytes {
            let all = rows * row_bytes;
            return Self { base: first.as_ptr(), rows: 1, row_lines: all.div_ceil(LINE), stride: 0 };
        }
        Self { base: first.as_ptr(), rows, row_lines: row_bytes.div_ceil(LINE), stride }
    }

    /// How many lines there are.
    pub fn count(&self) -> usize {
        self.rows * self.row_lines
    }

    /// Requests some of the lines; numbers beyond the last are ignored.
    #[inline]
    pub fn fetch(&self, lines: Range<usize>) {
        for line in lines.start..lines.end.min(self.count()) {
            let at = line / self.row_lines * self.stride + line % self.row_lines * LINE;
            prefetch(self.base.wrapping_add(at));
        }
    }
}

/// Requests a line for the L2 cache. A hint: any address is allowed.
#[inline(always)]
fn prefetch(address: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: prefetching never faults, whatever the address; SSE is part of x86-64.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T1>(address.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}
