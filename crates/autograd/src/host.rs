//! CPU tensors as slices, and slices as CPU tensors, without a copy.

use crate::{Error, Result};
use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Shape, Storage, StorageRef, Tensor};
use engobe_kernels::narrow::{self, Half};
use half::{bf16, f16};
use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::Deref;

/// A type of elements that CPU tensors are borrowed as.
pub trait Element: Copy + Sized + 'static {
    /// The elements of a CPU tensor of this type.
    fn slice(storage: &CpuStorage) -> Option<&[Self]>;
    /// The same, to be changed.
    fn slice_mut(storage: &mut CpuStorage) -> Option<&mut [Self]>;
}

macro_rules! element {
    ($ty:ty, $variant:ident) => {
        impl Element for $ty {
            fn slice(storage: &CpuStorage) -> Option<&[Self]> {
                if let CpuStorage::$variant(data) = storage { Some(data) } else { None }
            }

            fn slice_mut(storage: &mut CpuStorage) -> Option<&mut [Self]> {
                if let CpuStorage::$variant(data) = storage { Some(data) } else { None }
            }
        }
    };
}
element!(f32, F32);
element!(f16, F16);
element!(bf16, BF16);

/// The elements of a contiguous CPU tensor, borrowed.
pub struct Host<'a, T = f32> {
    storage: StorageRef<'a>,
    start: usize,
    len: usize,
    element: PhantomData<T>,
}

impl<T: Element> Deref for Host<'_, T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match &*self.storage {
            Storage::Cpu(storage) => match T::slice(storage) {
                Some(data) => &data[self.start..self.start + self.len],
                None => unreachable!("checked by host_as()"),
            },
            _ => unreachable!("checked by host_as()"),
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
    host_as(tensor)
}

/// Borrows the elements of a contiguous CPU tensor of type T.
pub fn host_as<T: Element>(tensor: &Tensor) -> Result<Host<'_, T>> {
    let (storage, layout) = tensor.storage_and_layout();
    let fits = matches!(&*storage, Storage::Cpu(storage) if T::slice(storage).is_some());
    if !fits || !layout.is_contiguous() {
        return Err(Error::NotHost(format!(
            "{:?} {:?} on {:?}",
            tensor.dtype(),
            tensor.shape(),
            tensor.device().location()
        )));
    }
    Ok(Host { start: layout.start_offset(), len: tensor.elem_count(), storage, element: PhantomData })
}

/// A CPU tensor that owns `data`.
pub fn tensor_of(data: Vec<f32>, shape: impl Into<Shape>) -> Result<Tensor> {
    Ok(Tensor::from_vec(data, shape.into(), &Device::Cpu)?)
}

/// A buffer of `len` elements whose content is whatever the allocator left there.
///
/// Every kernel that receives such a buffer overwrites all of it before anything reads it. Zeroing them
/// instead would cost several per cent of a step (hundreds of megabytes written for nothing).
pub fn uninit(len: usize) -> Vec<f32> {
    uninit_as(len)
}

/// [`uninit`] of elements of type T.
#[allow(clippy::uninit_vec)]
fn uninit_as<T: Element>(len: usize) -> Vec<T> {
    let mut data = Vec::with_capacity(len);
    // SAFETY: the capacity is `len`, any bit pattern is an element (all are plain floats), and the callers (ops of
    // this workspace) hand the buffer only to kernels that are documented to overwrite all of it.
    unsafe { data.set_len(len) };
    data
}

/// `x`, f32, rounded to 16 bits.
///
/// # Errors
/// A number that has no place in f16.
pub fn narrowed(x: &Tensor, to: Half) -> Result<Tensor> {
    let dtype = match to {
        Half::BF16 => DType::BF16,
        Half::F16 => DType::F16,
    };
    if !x.device().is_cpu() {
        // infinity only where something had no place, or was infinite before
        let largest = x.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
        if to == Half::F16 && largest.is_finite() && largest >= narrow::F16_END {
            return Err(narrow::OutOfRange(largest).into());
        }
        return Ok(x.to_dtype(dtype)?);
    }
    let x = x.contiguous()?;
    let values = host(&x)?;
    Ok(match to {
        Half::BF16 => {
            let mut out = uninit_as::<bf16>(values.len());
            narrow::to_bf16(&values, &mut out);
            Tensor::from_vec(out, x.shape(), &Device::Cpu)?
        }
        Half::F16 => {
            let mut out = uninit_as::<f16>(values.len());
            narrow::to_f16(&values, &mut out)?;
            Tensor::from_vec(out, x.shape(), &Device::Cpu)?
        }
    })
}

/// `x` of [`narrowed`], in f32.
pub fn widened(x: &Tensor) -> Result<Tensor> {
    if !x.device().is_cpu() {
        return Ok(x.to_dtype(DType::F32)?);
    }
    let mut out = uninit(x.elem_count());
    match x.dtype() {
        DType::BF16 => narrow::from_bf16(&host_as::<bf16>(x)?, &mut out),
        DType::F16 => narrow::from_f16(&host_as::<f16>(x)?, &mut out),
        _ => return Ok(x.clone()),
    }
    tensor_of(out, x.shape())
}

/// Runs `f` on the elements of a contiguous f32 CPU tensor, in place: every clone of the tensor sees it.
pub fn update<R>(tensor: &Tensor, f: impl FnOnce(&mut [f32]) -> R) -> Result<R> {
    update_as(tensor, f)
}

/// [`update`] of a tensor of type T.
pub fn update_as<T: Element, R>(tensor: &Tensor, f: impl FnOnce(&mut [T]) -> R) -> Result<R> {
    struct Update<F, T, R>(RefCell<Option<F>>, RefCell<Option<R>>, PhantomData<T>);
    impl<T: Element, R, F: FnOnce(&mut [T]) -> R> InplaceOp1 for Update<F, T, R> {
        fn name(&self) -> &'static str {
            "update"
        }

        fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
            let (Some(data), Some((start, end))) = (T::slice_mut(storage), layout.contiguous_offsets())
            else {
                candle_core::bail!("expected a contiguous tensor of the type that is written")
            };
            if let Some(f) = self.0.borrow_mut().take() {
                *self.1.borrow_mut() = Some(f(&mut data[start..end]));
            }
            Ok(())
        }
    }
    if tensor.elem_count() == 0 {
        // candle takes the strides of an empty tensor for those of a broadcast one
        return Ok(f(&mut []));
    }
    let op = Update(RefCell::new(Some(f)), RefCell::new(None), PhantomData);
    tensor.inplace_op1(&op)?;
    op.1.into_inner().ok_or_else(|| Error::NotHost("a tensor that is not on the CPU".to_string()))
}
