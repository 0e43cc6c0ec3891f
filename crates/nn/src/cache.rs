//! Keys and values of tokens already seen, for generation.

use candle_core::{DType, Device, Tensor};
use engobe_autograd::{Error, Result};

/// Rotated keys and values of one sequence, per layer, in buffers that grow by doubling.
#[derive(Debug)]
pub struct KvCache {
    layers: Vec<Layer>,
    width: usize,
    device: Device,
    len: usize,
}

#[derive(Debug)]
struct Layer {
    keys: Tensor,
    values: Tensor,
}

impl KvCache {
    /// An empty cache for `layers` layers of `kv_heads · head_dim` = `width`, with room for `capacity` tokens.
    pub fn new(layers: usize, width: usize, capacity: usize, device: &Device) -> Result<Self> {
        let zeros = || Tensor::zeros((capacity.max(1), width), DType::F32, device);
        let layers = (0..layers)
            .map(|_| Ok(Layer { keys: zeros()?, values: zeros()? }))
            .collect::<candle_core::Result<_>>()?;
        Ok(Self { layers, width, device: device.clone(), len: 0 })
    }

    /// Tokens in the cache.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True before the first token.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Keeps the first `len` tokens.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Writes the new tokens' keys and values of one layer behind those already there, and returns all of
    /// them. The tokens count once [`KvCache::advance`] is called, after the last layer.
    pub fn append(&mut self, layer: usize, keys: &Tensor, values: &Tensor) -> Result<(Tensor, Tensor)> {
        let (new, width) = keys.dims2()?;
        if width != self.width || layer >= self.layers.len() {
            return Err(Error::shape(
                "kv cache",
                format!("layer {layer} with keys of width {width}; the cache has {} of {}", self.layers.len(), self.width),
            ));
        }
        let total = self.len + new;
        let at = &mut self.layers[layer];
        for (buffer, rows) in [(&mut at.keys, keys), (&mut at.values, values)] {
            if buffer.dim(0)? < total {
                let grown =
                    Tensor::zeros((total.next_power_of_two(), width), DType::F32, &self.device)?;
                grown.slice_set(&buffer.narrow(0, 0, self.len)?.contiguous()?, 0, 0)?;
                *buffer = grown;
            }
            buffer.slice_set(&rows.contiguous()?, 0, self.len)?;
        }
        Ok((at.keys.narrow(0, 0, total)?, at.values.narrow(0, 0, total)?))
    }

    /// Counts `tokens` more tokens as seen.
    pub fn advance(&mut self, tokens: usize) {
        self.len += tokens;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grows_and_keeps_what_was_there() -> Result<()> {
        let mut cache = KvCache::new(1, 2, 1, &Device::Cpu)?;
        let row = |v: f32| Tensor::full(v, (1, 2), &Device::Cpu);
        for i in 0..5 {
            let (k, v) = cache.append(0, &row(i as f32)?, &row(10.0 + i as f32)?)?;
            cache.advance(1);
            assert_eq!(k.dims(), [i + 1, 2]);
            let firsts: Vec<f32> = v.to_vec2::<f32>()?.iter().map(|r| r[0]).collect();
            assert_eq!(firsts, (0..=i).map(|j| 10.0 + j as f32).collect::<Vec<_>>());
        }
        cache.truncate(2);
        let (k, _) = cache.append(0, &row(9.0)?, &row(9.0)?)?;
        assert_eq!(k.to_vec2::<f32>()?, vec![vec![0.0; 2], vec![1.0; 2], vec![9.0; 2]]);
        Ok(())
    }

    #[test]
    fn refuses_another_width() {
        let mut cache = KvCache::new(1, 2, 1, &Device::Cpu).unwrap();
        let wrong = Tensor::zeros((1, 3), DType::F32, &Device::Cpu).unwrap();
        assert!(cache.append(0, &wrong, &wrong).is_err());
    }
}
