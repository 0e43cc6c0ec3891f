//! Where an optimizer's moments lie: in memory or in a mapped file, in f32 or in 8 bits.

use crate::plan::OptimizerKind;
use crate::{Error, Result};
use engobe_formats::mmap::ScratchFile;
use engobe_formats::tensor::{Dtype, TensorView};
use engobe_kernels::adamw8::{self, Moment8};
use engobe_kernels::storage::StorageType;
use std::fmt;
use std::ops::Range;
use std::path::Path;

/// Parameters begin at multiples of this many bytes: cache lines in memory; in a file pages, so that those that are let
/// go are theirs alone.
fn alignment(kind: OptimizerKind) -> usize {
    if kind.is_paged() { 4096 } else { 64 }
}

/// Bytes of all parameters' moments.
#[derive(Debug)]
enum Store {
    Memory(Vec<f32>),
    File(ScratchFile),
}

impl Store {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Memory(data) => bytemuck::cast_slice(data),
            Self::File(file) => file.bytes(),
        }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Self::Memory(data) => bytemuck::cast_slice_mut(data),
            Self::File(file) => file.bytes_mut(),
        }
    }

    fn release(&self, range: Range<usize>) {
        if let Self::File(file) = self {
            file.release(range);
        }
    }
}

/// How the moments of a parameter are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Layout {
    elements: usize,
    eight_bit: bool,
    moments: usize,
}

impl Layout {
    fn new(kind: OptimizerKind, elements: usize) -> Self {
        let eight_bit = kind.is_8bit() && elements >= adamw8::LEAST_ELEMENTS;
        Self { elements, eight_bit, moments: kind.moments() }
    }

    /// Bytes of a moment's elements, whole numbers of f32.
    fn data_bytes(self) -> usize {
        if self.eight_bit { self.elements.next_multiple_of(4) } else { 4 * self.elements }
    }

    fn absmax_bytes(self) -> usize {
        if self.eight_bit { 4 * adamw8::blocks(self.elements) } else { 0 }
    }

    fn bytes(self) -> usize {
        self.moments * (self.data_bytes() + self.absmax_bytes())
    }
}

/// Bytes that the moments of parameters of these sizes take.
pub fn moments_bytes(kind: OptimizerKind, sizes: impl IntoIterator<Item = usize>) -> usize {
    sizes.into_iter().map(|n| Layout::new(kind, n).bytes().next_multiple_of(alignment(kind))).sum()
}

/// A moment of one parameter.
pub enum Moment<'a> {
    /// in f32
    Full(&'a mut [f32]),
    /// in 8 bits
    Eight(Moment8<'a>),
}

/// The moments of all parameters.
#[derive(Debug)]
pub struct Moments {
    store: Store,
    places: Vec<(Range<usize>, Layout)>,
}

impl Moments {
    /// Zeros for parameters of these sizes; in `file` if the optimizer is a paged one.
    pub fn new(kind: OptimizerKind, sizes: &[usize], file: &Path) -> Result<Self> {
        let mut end = 0;
        let mut places = Vec::with_capacity(sizes.len());
        for n in sizes {
            let layout = Layout::new(kind, *n);
            places.push((end..end + layout.bytes(), layout));
            end += layout.bytes().next_multiple_of(alignment(kind));
        }
        let store = match kind.is_paged() {
            true => Store::File(ScratchFile::create(file, end)?),
            false => Store::Memory(vec![0.0; end / 4]),
        };
        Ok(Self { store, places })
    }

    /// Runs `f` on the moments of parameter `i`.
    pub fn with<R>(&mut self, i: usize, f: impl FnOnce(Vec<Moment<'_>>) -> R) -> R {
        let (range, layout) = self.places[i].clone();
        let mut rest = &mut self.store.bytes_mut()[range.clone()];
        let mut take = |len: usize| {
            let (head, tail) = std::mem::take(&mut rest).split_at_mut(len);
            rest = tail;
            head
        };
        let moments = (0..layout.moments).map(|_| {
            let (data, absmax) = (take(layout.data_bytes()), take(layout.absmax_bytes()));
            match layout.eight_bit {
                true => Moment::Eight(Moment8 {
                    codes: &mut data[..layout.elements],
                    absmax: bytemuck::cast_slice_mut(absmax),
                }),
                false => Moment::Full(bytemuck::cast_slice_mut(data)),
            }
        });
        let moments = moments.collect();
        let done = f(moments);
        self.store.release(range);
        done
    }

    /// The moments of parameter `i`, whose name and shape are given, for a checkpoint: `first.<name>`, `second.<name>`;
    /// in 8 bits beside them `first_absmax.<name>`, `second_absmax.<name>`.
    pub fn saved(&self, i: usize, name: &str, shape: &[usize]) -> Vec<Saved<'_>> {
        let (range, layout) = self.places[i].clone();
        let mut at = range.start;
        let mut saved = Vec::new();
        for kind in &["first", "second"][..layout.moments] {
            let dtype = if layout.eight_bit { Dtype::U8 } else { Dtype::Storage(StorageType::F32) };
            let len = dtype.bytes_of(shape).unwrap_or(0);
            saved.push(Saved {
                name: format!("{kind}.{name}"),
                dtype,
                shape: shape.to_vec(),
                bytes: StateBytes { moments: self, range: at..at + len },
            });
            at += layout.data_bytes();
            if layout.eight_bit {
                saved.push(Saved {
                    name: format!("{kind}_absmax.{name}"),
                    dtype: Dtype::Storage(StorageType::F32),
                    shape: vec![adamw8::blocks(layout.elements)],
                    bytes: StateBytes { moments: self, range: at..at + layout.absmax_bytes() },
                });
                at += layout.absmax_bytes();
            }
        }
        saved
    }

    /// Takes back what [`Moments::saved`] gave; `find` looks a tensor up by its name.
    pub fn restore<'a>(
        &mut self,
        i: usize,
        name: &str,
        shape: &[usize],
        find: impl Fn(&str) -> Option<&'a TensorView>,
    ) -> Result<()> {
        let mut copies = Vec::new();
        for saved in self.saved(i, name, shape) {
            let view = find(&saved.name).filter(|v| v.dtype == saved.dtype && v.shape == saved.shape);
            let view = view.ok_or_else(|| Error::Resume {
                what: format!("optimizer state {} is missing or misshapen", saved.name),
            })?;
            copies.push((saved.bytes.range.clone(), view));
        }
        for (range, view) in copies {
            self.store.bytes_mut()[range].copy_from_slice(view.bytes());
        }
        self.store.release(self.places[i].0.clone());
        Ok(())
    }
}

/// A tensor of an optimizer's state, borrowed.
#[derive(Debug)]
pub struct Saved<'a> {
    /// name in the checkpoint
    pub name: String,
    /// type
    pub dtype: Dtype,
    /// shape
    pub shape: Vec<usize>,
    /// the elements; where they lie in a file, that is let go when this is dropped
    pub bytes: StateBytes<'a>,
}

/// Part of the state.
pub struct StateBytes<'a> {
    moments: &'a Moments,
    range: Range<usize>,
}

impl fmt::Debug for StateBytes<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.range)
    }
}

impl AsRef<[u8]> for StateBytes<'_> {
    fn as_ref(&self) -> &[u8] {
        &self.moments.store.bytes()[self.range.clone()]
    }
}

impl Drop for StateBytes<'_> {
    fn drop(&mut self) {
        self.moments.store.release(self.range.clone());
    }
}
