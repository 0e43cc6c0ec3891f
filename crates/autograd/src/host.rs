//! CPU tensors as slices, and slices as CPU tensors, without a copy.

use crate::{Error, Result};
use candle_core::{CpuStorage, Device, InplaceOp1, Layout, Shape, Storage, StorageRef, Tensor};
use std::cell::RefCell;
use std::ops::Deref;

/// The f32 elements of a contiguous CPU tensor, borrowed.
pub struct Host<'a> {
    storage: StorageRef<'a>,
    start: usize,
    len: usize,
}

impl Deref for Host<'_> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &*self.storage {
            Storage::Cpu(CpuStorage::F32(data)) => &data[self.start..self.start + self.len],
            _ => unreachable!("checked by host()"),
        }
    }
}

impl AsRef<[u8]> for Host<'_> {
    /// The elements' bytes, in the machine's order.
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(self)
    }
}

/// Borrows the elements of a contiguous f32 CPU tensor.
pub fn host(tensor: &Tensor) -> Result<Host<'_>> {
    let (storage, layout) = tensor.storage_and_layout();
    let fits = matches!(&*storage, Storage::Cpu(CpuStorage::F32(_))) && layout.is_contiguous();
    if !fits {
        return Err(Error::NotHost(format!(
            "{:?} {:?} on {:?}",
            tensor.dtype(),
            tensor.shape(),
            tensor.device().location()
        )));
    }
    Ok(Host { start: layout.start_offset(), len: tensor.elem_count(), storage })
}

/// A CPU tensor that owns `data`.
pub fn tensor_of(data: Vec<f32>, shape: impl Into<Shape>) -> Result<Tensor> {
    Ok(Tensor::from_vec(data, shape.into(), &Device::Cpu)?)
}

/// A buffer of `len` elements whose content is whatever the allocator left there.
///
/// Every kernel that receives such a buffer overwrites all of it before anything reads it. Zeroing them
/// instead would cost several per cent of a step (hundreds of megabytes written for nothing).
#[allow(clippy::uninit_vec)]
pub fn uninit(len: usize) -> Vec<f32> {
    let mut data = Vec::with_capacity(len);
    // SAFETY: the capacity is `len`, any bit pattern is an f32, and the callers (ops of this workspace) hand
    // the buffer only to kernels that are documented to overwrite all of it.
    unsafe { data.set_len(len) };
    data
}

/// Runs `f` on the elements of a contiguous f32 CPU tensor, in place: every clone of the tensor sees it.
pub fn update<R>(tensor: &Tensor, f: impl FnOnce(&mut [f32]) -> R) -> Result<R> {
    struct Update<F, R>(RefCell<Option<F>>, RefCell<Option<R>>);
    impl<R, F: FnOnce(&mut [f32]) -> R> InplaceOp1 for Update<F, R> {
        fn name(&self) -> &'static str {
            "update"
        }

        fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
            let (CpuStorage::F32(data), Some((start, end))) = (storage, layout.contiguous_offsets()) else {
                candle_core::bail!("expected a contiguous f32 tensor")
            };
            if let Some(f) = self.0.borrow_mut().take() {
                *self.1.borrow_mut() = Some(f(&mut data[start..end]));
            }
            Ok(())
        }
    }
    let op = Update(RefCell::new(Some(f)), RefCell::new(None));
    tensor.inplace_op1(&op)?;
    op.1.into_inner().ok_or_else(|| Error::NotHost("a tensor that is not on the CPU".to_string()))
}
