//! Keys and values of tokens already seen, for generation: one slot a sequence.

use crate::TokenBatch;
use candle_core::{DType, Device, Tensor};
use engobe_autograd::{Error, Result, host, tensor_of, uninit, update, update_as};
use engobe_kernels::attention::Segment;
use half::f16;
use half::slice::HalfFloatSliceExt;
use std::ops::Range;

/// Rotated keys and values of one or more sequences, per layer.
///
/// A layer's buffer holds `capacity` rows for each slot. Sequences grow independently; when one outgrows its
/// slot, all slots are widened. A sequence's tokens may come after rows that the model puts before them (the lead:
/// trained prompts and prefixes); these are written with its first tokens, and lengths do not count them.
#[derive(Debug)]
pub struct KvCache {
    layers: Vec<Layer>,
    width: usize,
    capacity: usize,
    lens: Vec<usize>,
    lead: usize,
    dtype: DType,
    device: Device,
}

#[derive(Debug)]
struct Layer {
    keys: Tensor,
    values: Tensor,
}

impl KvCache {
    /// An empty cache for `layers` layers of `kv_heads · head_dim` = `width`, with `slots` sequences and room
    /// for `capacity` tokens in each. `dtype` is f32, or f16 on the CPU.
    pub fn new(
        layers: usize,
        width: usize,
        slots: usize,
        capacity: usize,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let capacity = capacity.max(1);
        let buffer = || buffer(slots * capacity, width, dtype, device);
        let layers =
            (0..layers).map(|_| Ok(Layer { keys: buffer()?, values: buffer()? })).collect::<Result<_>>()?;
        Ok(Self { layers, width, capacity, lens: vec![0; slots], lead: 0, dtype, device: device.clone() })
    }

    /// The cache, empty, of a model that puts `lead` rows before each sequence.
    pub fn with_lead(mut self, lead: usize) -> Self {
        self.lead = lead;
        self
    }

    /// Keys and values of a sequence in one layer, its lead included: `[lead + len, width]` each.
    pub fn rows(&self, layer: usize, slot: usize) -> Result<[Tensor; 2]> {
        let at = &self.layers[layer];
        let rows = |buffer: &Tensor| buffer.narrow(0, slot * self.capacity, self.filled(slot))?.contiguous();
        Ok([rows(&at.keys)?, rows(&at.values)?])
    }

    /// Rows of a slot that are written.
    fn filled(&self, slot: usize) -> usize {
        match self.lens[slot] {
            0 => 0,
            len => self.lead + len,
        }
    }

    /// Tokens of a sequence in the cache.
    pub fn len(&self, slot: usize) -> usize {
        self.lens[slot]
    }

    /// Number of slots.
    pub fn slots(&self) -> usize {
        self.lens.len()
    }

    /// Keeps the first `len` tokens of a sequence.
    pub fn truncate(&mut self, slot: usize, len: usize) {
        self.lens[slot] = self.lens[slot].min(len);
    }

    /// The batch that continues each sequence `(slot, new tokens)`; makes room for it.
    pub fn batch(&mut self, rows: &[(usize, &[u32])]) -> Result<TokenBatch> {
        let needed = rows.iter().map(|(slot, new)| self.lead + self.lens[*slot] + new.len());
        let needed = needed.max().unwrap_or(0);
        if needed > self.capacity {
            self.widen(needed.next_power_of_two())?;
        }
        let (mut ids, mut positions, mut segments, mut slots) = (vec![], vec![], vec![], vec![]);
        let (mut starts, mut incoming) = (vec![], vec![]);
        for (slot, new) in rows {
            let (seen, start) = (self.lens[*slot], slot * self.capacity);
            let q = ids.len()..ids.len() + new.len();
            ids.extend_from_slice(new);
            positions.extend(seen as u32..(seen + new.len()) as u32);
            incoming.push(q.clone());
            segments.push(Segment { q, kv: start..start + self.lead + seen + new.len() });
            slots.push(*slot);
            starts.push(seen == 0);
        }
        Ok(TokenBatch {
            ids: ids.into(),
            positions: positions.into(),
            segments: segments.into(),
            slots,
            starts: starts.into(),
            incoming: incoming.into(),
            lead: self.lead,
            inserted: 0,
            token_types: None,
        })
    }

    fn widen(&mut self, capacity: usize) -> Result<()> {
        let old = std::mem::replace(&mut self.capacity, capacity);
        for layer in &mut self.layers {
            for buffer in [&mut layer.keys, &mut layer.values] {
                let wide = self::buffer(self.lens.len() * capacity, self.width, self.dtype, &self.device)?;
                let filled = self.lens.iter().map(|len| if *len > 0 { self.lead + len } else { 0 });
                for (slot, len) in filled.enumerate().filter(|(_, len)| *len > 0) {
                    let rows = buffer.narrow(0, slot * old, len)?.contiguous()?;
                    wide.slice_set(&rows, 0, slot * capacity)?;
                }
                *buffer = wide;
            }
        }
        Ok(())
    }

    /// Writes the new tokens' keys and values of one layer (laid out as `batch.incoming` says) behind those of their
    /// sequences, and returns the layer's buffers, which the batch's segments point into. The tokens count once [`KvCache::advance`] is
    /// called, after the last layer.
    pub fn append(
        &mut self,
        layer: usize,
        batch: &TokenBatch,
        keys: &Tensor,
        values: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        let (_, width) = keys.dims2()?;
        if width != self.width || layer >= self.layers.len() || batch.slots.len() != batch.segments.len() {
            let what = format!(
                "layer {layer}, keys of width {width}: the cache has {} of {}",
                self.layers.len(),
                self.width
            );
            return Err(Error::shape("kv cache", what));
        }
        let at = &self.layers[layer];
        for (from, slot) in batch.incoming.iter().zip(&batch.slots) {
            let to = slot * self.capacity + self.filled(*slot);
            for (buffer, rows) in [(&at.keys, keys), (&at.values, values)] {
                put(buffer, rows, from.clone(), to)?;
            }
        }
        Ok((at.keys.clone(), at.values.clone()))
    }

    /// Counts the batch's tokens as seen; it may be the batch that [`Entry::enter`](crate::Entry::enter) returned.
    pub fn advance(&mut self, batch: &TokenBatch) {
        for ((segment, slot), starts) in batch.segments.iter().zip(&batch.slots).zip(batch.starts.iter()) {
            self.lens[*slot] += segment.q.len() - if *starts { batch.inserted } else { 0 };
        }
    }
}

/// Room for `rows` rows, on the CPU without touching it: rows are read only after they were written.
fn buffer(rows: usize, width: usize, dtype: DType, device: &Device) -> Result<Tensor> {
    if device.is_cpu() && dtype == DType::F32 {
        return tensor_of(uninit(rows * width), (rows, width));
    }
    Ok(Tensor::zeros((rows, width), dtype, device)?)
}

/// Copies the rows `from` of `rows`, in f32, to row `to` of `buffer`, in its own type.
fn put(buffer: &Tensor, rows: &Tensor, from: Range<usize>, to: usize) -> Result<()> {
    let (_, width) = rows.dims2()?;
    if !buffer.device().is_cpu() {
        let rows = rows.narrow(0, from.start, from.len())?.contiguous()?;
        return Ok(buffer.slice_set(&rows, 0, to)?);
    }
    let rows = host(rows)?;
    let (rows, to) = (&rows[from.start * width..from.end * width], to * width);
    match buffer.dtype() {
        DType::F16 => update_as(buffer, |b: &mut [f16]| b[to..][..rows.len()].convert_from_f32_slice(rows)),
        _ => update(buffer, |b| b[to..][..rows.len()].copy_from_slice(rows)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(values: &[f32]) -> Tensor {
        let two: Vec<f32> = values.iter().flat_map(|v| [*v, -*v]).collect();
        Tensor::from_vec(two, (values.len(), 2), &Device::Cpu).unwrap()
    }

    fn firsts(t: &Tensor, segment: &Segment) -> Vec<f32> {
        t.to_dtype(DType::F32).unwrap().to_vec2::<f32>().unwrap()[segment.kv.clone()]
            .iter()
            .map(|r| r[0])
            .collect()
    }

    #[test]
    fn sequences_grow_apart_and_survive_widening() -> Result<()> {
        grow_apart(DType::F32)?;
        grow_apart(DType::F16)
    }

    fn grow_apart(dtype: DType) -> Result<()> {
        let mut cache = KvCache::new(1, 2, 2, 2, dtype, &Device::Cpu)?;
        let batch = cache.batch(&[(0, &[7, 8]), (1, &[9])])?;
        cache.append(0, &batch, &rows(&[1.0, 2.0, 10.0]), &rows(&[0.0; 3]))?;
        cache.advance(&batch);
        // the second sequence outgrows its slot; the first must keep its rows
        let batch = cache.batch(&[(1, &[1, 2, 3])])?;
        assert_eq!(&*batch.positions, [1, 2, 3]);
        let (keys, _) = cache.append(0, &batch, &rows(&[11.0, 12.0, 13.0]), &rows(&[0.0; 3]))?;
        cache.advance(&batch);
        assert_eq!(firsts(&keys, &batch.segments[0]), [10.0, 11.0, 12.0, 13.0]);
        let batch = cache.batch(&[(0, &[5])])?;
        let (keys, values) = cache.append(0, &batch, &rows(&[3.0]), &rows(&[4.0]))?;
        assert_eq!(firsts(&keys, &batch.segments[0]), [1.0, 2.0, 3.0]);
        assert_eq!(firsts(&values, &batch.segments[0]), [0.0, 0.0, 4.0]);
        cache.truncate(1, 1);
        assert_eq!((cache.len(0), cache.len(1)), (2, 1));
        Ok(())
    }

    #[test]
    fn refuses_another_width() {
        let mut cache = KvCache::new(1, 2, 1, 4, DType::F32, &Device::Cpu).unwrap();
        let batch = cache.batch(&[(0, &[1])]).unwrap();
        let wrong = Tensor::zeros((1, 3), DType::F32, &Device::Cpu).unwrap();
        assert!(cache.append(0, &batch, &wrong, &wrong).is_err());
    }
}
