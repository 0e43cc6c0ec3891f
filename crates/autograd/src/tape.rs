//! [`Tape`] and the walk back.

use crate::Result;
use crate::host::narrowed;
use crate::param::{Gradients, Param, ParamId};
use crate::var::{Kept, Var};
use candle_core::{CpuStorage, InplaceOp2, Layout, Tensor};
use engobe_kernels::matmul::Activations;
use engobe_kernels::narrow::Half;
use std::collections::HashMap;
use std::sync::Arc;

/// Where the gradient of a value goes: nowhere if nothing trainable is upstream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Slot(Option<(usize, usize)>);

impl Slot {
    /// True if a gradient is wanted here.
    pub fn is_tracked(self) -> bool {
        self.0.is_some()
    }
}

/// A gradient on its way. An exclusive one may be added to in place.
struct Grad {
    tensor: Tensor,
    exclusive: bool,
}

/// The gradients that arrived at an op's outputs.
pub struct OutGrads(Vec<Option<Grad>>);

impl OutGrads {
    /// The gradient of output `i`; `None` if nothing downstream used it.
    pub fn take(&mut self, i: usize) -> Option<Tensor> {
        self.0.get_mut(i)?.take().map(|g| g.tensor)
    }
}

/// Where an op's backward leaves the gradients of its inputs.
pub struct GradSink<'a> {
    pending: &'a mut Vec<Vec<Option<Grad>>>,
    params: &'a mut Gradients,
}

impl GradSink<'_> {
    /// Hands over a gradient that the op made and keeps no copy of.
    pub fn add(&mut self, slot: Slot, tensor: Tensor) -> Result<()> {
        self.put(slot, Grad { tensor, exclusive: true })
    }

    /// Hands over a gradient whose tensor is also handed to, or owned by, somebody else.
    pub fn add_shared(&mut self, slot: Slot, tensor: Tensor) -> Result<()> {
        self.put(slot, Grad { tensor, exclusive: false })
    }

    fn put(&mut self, slot: Slot, new: Grad) -> Result<()> {
        let Some((node, output)) = slot.0 else { return Ok(()) };
        let place = &mut self.pending[node][output];
        *place = Some(match place.take() {
            None => new,
            Some(old) if old.exclusive => {
                add_in_place(&old.tensor, &new.tensor)?;
                old
            }
            Some(old) if new.exclusive => {
                add_in_place(&new.tensor, &old.tensor)?;
                new
            }
            Some(old) => Grad { tensor: (old.tensor + new.tensor)?, exclusive: true },
        });
        Ok(())
    }
}

/// `sum += term`, for tensors of one shape.
pub(crate) fn add_in_place(sum: &Tensor, term: &Tensor) -> Result<()> {
    struct AddAssign;
    impl InplaceOp2 for AddAssign {
        fn name(&self) -> &'static str {
            "add_assign"
        }

        fn cpu_fwd(
            &self,
            s1: &mut CpuStorage,
            l1: &Layout,
            s2: &CpuStorage,
            l2: &Layout,
        ) -> candle_core::Result<()> {
            match (s1, l1.contiguous_offsets(), s2, l2.contiguous_offsets()) {
                (CpuStorage::F32(a), Some((a0, a1)), CpuStorage::F32(b), Some((b0, b1))) => {
                    engobe_kernels::elementwise::add_assign(&mut a[a0..a1], &b[b0..b1]);
                    Ok(())
                }
                _ => candle_core::bail!("add_assign: gradients are contiguous f32"),
            }
        }
    }
    if sum.device().is_cpu() {
        return Ok(sum.inplace_op2(&term.contiguous()?, &AddAssign)?);
    }
    Ok(sum.slice_set(&(sum + term)?.contiguous()?, 0, 0)?)
}

type Backward<'m> = Box<dyn FnOnce(OutGrads, &mut GradSink<'_>) -> Result<()> + 'm>;

enum Node<'m> {
    Leaf,
    Param(ParamId),
    Op(Backward<'m>),
}

/// Looks at something before each block and each op of the backward; an error ends the pass.
pub type Watch = Arc<dyn Fn() -> Result<(), Box<dyn std::error::Error + Send + Sync>> + Send + Sync>;

/// The record of one forward pass, and how to walk it back.
///
/// `'m` is the life of the model whose weights the recorded ops borrow.
pub struct Tape<'m> {
    nodes: Vec<Node<'m>>,
    outputs: Vec<usize>,
    params: HashMap<ParamId, Slot>,
    options: Options,
    /// random draws so far: two runs of the same forward see the same dropout masks
    draws: u64,
    touched_param: bool,
    watch: Option<Watch>,
}

#[derive(Clone, Copy, Default)]
struct Options {
    recording: bool,
    composed: bool,
    checkpointing: bool,
    dropout_seed: Option<u64>,
    second_run: bool,
    generating: Option<Activations>,
    half: Option<Half>,
}

impl<'m> Tape<'m> {
    fn with(options: Options) -> Self {
        Self {
            nodes: Vec::new(),
            outputs: Vec::new(),
            params: HashMap::new(),
            options,
            draws: 0,
            touched_param: false,
            watch: None,
        }
    }

    /// Calls `watch` before each block and each op of the backward.
    pub fn watch(mut self, watch: Option<Watch>) -> Self {
        self.watch = watch;
        self
    }

    fn look(&self) -> Result<()> {
        match &self.watch {
            Some(watch) => watch().map_err(crate::Error::Stopped),
            None => Ok(()),
        }
    }

    /// A tape that records, for training.
    pub fn new() -> Self {
        Self::with(Options { recording: true, ..Options::default() })
    }

    /// A tape that records nothing, for evaluation: its numbers are those of training.
    pub fn inference() -> Self {
        Self::with(Options::default())
    }

    /// A tape that records nothing, for generation. Ops may take forms that are faster for few tokens, and
    /// products with quantized weights take activations as `activations` says.
    pub fn generation(activations: Activations) -> Self {
        Self::with(Options { generating: Some(activations), ..Options::default() })
    }

    /// How activations go into products, on a tape for generation.
    pub fn generating(&self) -> Option<Activations> {
        self.options.generating
    }

    /// Turns dropout on; `seed` fixes all masks of this forward pass.
    pub fn dropout_seed(mut self, seed: u64) -> Self {
        self.options.dropout_seed = Some(seed);
        self
    }

    /// Lets [`Tape::block`] keep the block's input alone and run its forward again in the backward.
    pub fn checkpointing(mut self, on: bool) -> Self {
        self.options.checkpointing = on;
        self
    }

    /// Keeps what the backward needs in 16 bits, and rounds the factors of low-rank deltas to them. Arithmetic, what flows
    /// from op to op, and gradients stay f32.
    pub fn half(mut self, half: Option<Half>) -> Self {
        self.options.half = half;
        self
    }

    /// The 16-bit type of what is kept, if it is not kept in f32.
    pub(crate) fn half_type(&self) -> Option<Half> {
        self.options.half
    }

    /// The value, for an op's backward or a recipe. An op that keeps clones of f32 tensors instead would hold twice the
    /// memory on a tape that keeps 16 bits.
    ///
    /// # Errors
    /// A number that has no place in f16.
    pub(crate) fn keep(&self, value: &Var) -> Result<Kept> {
        match &value.recipe {
            Some(recipe) => Ok(Kept::Again(recipe.clone())),
            None => self.keep_as_it_is(value),
        }
    }

    fn keep_as_it_is(&self, value: &Var) -> Result<Kept> {
        // a tape that records nothing will never ask
        let Some(half) = self.options.half.filter(|_| self.options.recording) else {
            return Ok(Kept::Tensor(value.tensor.clone()));
        };
        if let Some(narrow) = value.narrow.get() {
            return Ok(Kept::Narrow(narrow.clone()));
        }
        let narrow = narrowed(&value.tensor, half)?;
        Ok(Kept::Narrow(value.narrow.get_or_init(|| narrow).clone()))
    }

    /// Uses the composed form of every op, also on the CPU.
    pub fn composed(mut self, on: bool) -> Self {
        self.options.composed = on;
        self
    }

    /// True if ops on `tensor` shall take the kernels' form.
    pub fn fast(&self, tensor: &Tensor) -> bool {
        !self.options.composed && tensor.device().is_cpu()
    }

    /// True while [`Tape::block`] runs a block again in the backward: nobody will read the block's output, so the op
    /// that makes it need not compute it.
    pub fn is_second_run(&self) -> bool {
        self.options.second_run
    }

    /// The seed of the next dropout mask, if dropout is on.
    pub fn next_dropout_seed(&mut self) -> Option<u64> {
        let seed = self.options.dropout_seed?;
        self.draws += 1;
        Some(engobe_kernels::dropout::mix(seed, self.draws))
    }

    /// The parameter as a value on this tape; its gradient goes to [`Gradients`].
    pub fn param(&mut self, param: &Param) -> Var {
        self.touched_param = true;
        let tensor = param.tensor().clone();
        if !self.options.recording {
            return Var::constant(tensor);
        }
        if let Some(slot) = self.params.get(&param.id()) {
            return Var::new(tensor, *slot);
        }
        let slot = self.push(Node::Param(param.id()), 1);
        self.params.insert(param.id(), slot);
        Var::new(tensor, slot)
    }

    /// A value whose gradient [`Tape::backward_to`] hands out.
    pub fn leaf(&mut self, tensor: Tensor) -> Var {
        let slot = if self.options.recording { self.push(Node::Leaf, 1) } else { Slot(None) };
        Var::new(tensor, slot)
    }

    fn push(&mut self, node: Node<'m>, outputs: usize) -> Slot {
        self.nodes.push(node);
        self.outputs.push(outputs);
        Slot(Some((self.nodes.len() - 1, 0)))
    }

    /// Wraps an op's outputs; if one of `inputs` is tracked, `backward` is kept and will receive the
    /// gradients of the outputs once.
    pub fn record(
        &mut self,
        inputs: &[Slot],
        outputs: Vec<Tensor>,
        backward: impl FnOnce(OutGrads, &mut GradSink<'_>) -> Result<()> + 'm,
    ) -> Vec<Var> {
        let tracked = self.options.recording && inputs.iter().any(|s| s.is_tracked());
        if !tracked {
            return outputs.into_iter().map(Var::constant).collect();
        }
        let slot = self.push(Node::Op(Box::new(backward)), outputs.len());
        let Slot(Some((node, _))) = slot else { unreachable!("push gives a place") };
        outputs.into_iter().enumerate().map(|(i, tensor)| Var::new(tensor, Slot(Some((node, i))))).collect()
    }

    /// [`Tape::record`] for an op with one output.
    pub fn record1(
        &mut self,
        inputs: &[Slot],
        output: Tensor,
        backward: impl FnOnce(Tensor, &mut GradSink<'_>) -> Result<()> + 'm,
    ) -> Var {
        let keep = output.clone();
        let outs = self.record(inputs, vec![output], |mut grads, sink| match grads.take(0) {
            Some(dy) => backward(dy, sink),
            None => Ok(()),
        });
        outs.into_iter().next().unwrap_or_else(|| Var::constant(keep))
    }

    /// [`Tape::record1`] for an op whose backward needs its own output: kept once, also where the next op keeps it as well.
    pub(crate) fn record_keeping(
        &mut self,
        inputs: &[Slot],
        output: Tensor,
        backward: impl FnOnce(Kept, Tensor, &mut GradSink<'_>) -> Result<()> + 'm,
    ) -> Result<Var> {
        let made = Var::constant(output);
        let kept = self.keep_as_it_is(&made)?;
        let recorded = self.record1(inputs, made.tensor, move |dy, sink| backward(kept, dy, sink));
        Ok(Var { narrow: made.narrow, ..recorded })
    }

    /// Runs `f`, a stretch of the model with one output. With checkpointing on, nothing inside it is kept
    /// but its tracked inputs; the backward runs `f` again (Chen et al. 2016) with the same dropout masks.
    pub fn block<F>(&mut self, inputs: &[Var], f: F) -> Result<Var>
    where
        F: Fn(&mut Tape<'m>, &[Var]) -> Result<Var> + 'm,
    {
        self.look()?;
        if !(self.options.recording && self.options.checkpointing) {
            return f(self, inputs);
        }
        let mut first = Tape::with(Options { recording: false, ..self.options });
        first.draws = self.draws;
        let watch = self.watch.clone();
        let plain: Vec<Var> = inputs.iter().map(|v| Var::constant(v.tensor.clone())).collect();
        let output = f(&mut first, &plain)?.into_tensor();
        drop(plain);
        let draws_before = std::mem::replace(&mut self.draws, first.draws);
        let options = Options { checkpointing: false, second_run: true, ..self.options };
        let slots: Vec<Slot> = inputs.iter().map(Var::slot).collect();
        let kept: Vec<Kept> = inputs.iter().map(|v| self.keep_as_it_is(v)).collect::<Result<_>>()?;
        let mut upstream = slots.clone();
        if first.touched_param {
            // the block's own parameters are reached through the second run, not through a slot of this tape
            upstream.push(self.push(Node::Leaf, 1));
        }
        Ok(self.record1(&upstream, output, move |dy, sink| {
            let mut tape = Tape::with(options).watch(watch);
            tape.draws = draws_before;
            let mut vars = Vec::with_capacity(kept.len());
            for (kept, slot) in kept.into_iter().zip(&slots) {
                let value = kept.take()?;
                vars.push(if slot.is_tracked() { tape.leaf(value) } else { Var::constant(value) });
            }
            let y = f(&mut tape, &vars)?;
            let grads = tape.backward_to(&y, dy, &vars, sink.params)?;
            for (slot, grad) in slots.iter().zip(grads) {
                if let Some(grad) = grad {
                    sink.add(*slot, grad)?;
                }
            }
            Ok(())
        }))
    }

    /// Walks back from `y` with the gradient `dy`, adding to `params`.
    pub fn backward(self, y: &Var, dy: Tensor, params: &mut Gradients) -> Result<()> {
        self.backward_to(y, dy, &[], params).map(|_| ())
    }

    /// [`Tape::backward`] that also returns the gradients of `leaves`.
    pub fn backward_to(
        mut self,
        y: &Var,
        dy: Tensor,
        leaves: &[Var],
        params: &mut Gradients,
    ) -> Result<Vec<Option<Tensor>>> {
        let mut pending: Vec<Vec<Option<Grad>>> =
            self.outputs.iter().map(|n| (0..*n).map(|_| None).collect()).collect();
        // an op may keep the tensor it was handed, so the first gradient counts as shared
        GradSink { pending: &mut pending, params }.add_shared(y.slot(), dy)?;
        while let Some(node) = self.nodes.pop() {
            let i = self.nodes.len();
            let grads = OutGrads(std::mem::take(&mut pending[i]));
            if grads.0.iter().all(Option::is_none) {
                continue;
            }
            match node {
                Node::Leaf => pending[i] = grads.0,
                Node::Param(id) => {
                    for grad in grads.0.into_iter().flatten() {
                        params.add(id, grad.tensor)?;
                    }
                }
                Node::Op(backward) => {
                    self.look()?;
                    backward(grads, &mut GradSink { pending: &mut pending, params })?;
                }
            }
        }
        let take = |v: &Var| {
            let (node, output) = v.slot.0?;
            pending.get_mut(node)?.get_mut(output)?.take().map(|g| g.tensor)
        };
        Ok(leaves.iter().map(take).collect())
    }
}

impl Default for Tape<'_> {
    fn default() -> Self {
        Self::new()
    }
}
