//! The recurrence of a bidirectional LSTM layer (Hochreiter & Schmidhuber 1997), with PyTorch's order of gates.
//!
//! The input's part of the gates, `G = x·W_ihᵀ + b`, is a linear layer's output `[T, 4h]` for each direction. With U
//! `[4h, h]`, a = G_t + U·h_{t-1} split into i, f, g, o:
//!
//! ```text
//! i, f, o = σ(a_i), σ(a_f), σ(a_o)     g = tanh(a_g)     c_t = f·c_{t-1} + i·g     h_t = o·tanh(c_t)
//! dc = dh·o·(1 - tanh²c) + dc'         dh = dy + Uᵀ·da'   (primes: from the next step)
//! da = (dc·g·i(1-i), dc·c_{t-1}·f(1-f), dc·i·(1-g²), dh·tanh(c)·o(1-o))      dc_{t-1} = dc·f
//! dG_t = da      dU += da ⊗ h_{t-1}
//! ```
//!
//! Sequences are a prompt's rows, tens of them: plain loops on the host, whatever the device.

use crate::{Error, Result, Tape, Var, host, ops::dims2, tensor_of};
use candle_core::{Device, Tensor};

/// What a direction keeps for its backward.
struct Scan {
    /// activated gates `[T, 4h]`
    gates: Vec<f32>,
    /// cells `[T, h]`
    cells: Vec<f32>,
    /// outputs `[T, h]`
    hidden: Vec<f32>,
}

/// Steps of one direction, first to last, with the step before each.
fn order(steps: usize, backwards: bool) -> impl DoubleEndedIterator<Item = (usize, Option<usize>)> {
    (0..steps).map(move |s| match backwards {
        false => (s, s.checked_sub(1)),
        true => (steps - 1 - s, (s > 0).then(|| steps - s)),
    })
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

fn scan(input: &[f32], u: &[f32], h: usize, backwards: bool) -> Scan {
    let steps = input.len() / (4 * h).max(1);
    let mut s = Scan { gates: input.to_vec(), cells: vec![0.0; steps * h], hidden: vec![0.0; steps * h] };
    for (t, before) in order(steps, backwards) {
        let a = &mut s.gates[t * 4 * h..][..4 * h];
        if let Some(before) = before {
            let last = &s.hidden[before * h..][..h];
            for (a, row) in a.iter_mut().zip(u.chunks_exact(h)) {
                *a += row.iter().zip(last).map(|(u, h)| u * h).sum::<f32>();
            }
        }
        for (k, a) in a.iter_mut().enumerate() {
            *a = if k / h == 2 { a.tanh() } else { sigmoid(*a) };
        }
        for j in 0..h {
            let old = before.map_or(0.0, |before| s.cells[before * h + j]);
            let cell = a[h + j] * old + a[j] * a[2 * h + j];
            s.cells[t * h + j] = cell;
            s.hidden[t * h + j] = a[3 * h + j] * cell.tanh();
        }
    }
    s
}

/// Gradients of the input's part of the gates and of U. `dy` `[T, 2h]` holds this direction's columns from `column`.
fn scan_backward(
    s: &Scan,
    u: &[f32],
    dy: &[f32],
    column: usize,
    h: usize,
    backwards: bool,
) -> (Vec<f32>, Vec<f32>) {
    let steps = s.cells.len() / h.max(1);
    let (mut dg, mut du) = (vec![0f32; steps * 4 * h], vec![0f32; 4 * h * h]);
    let (mut dh, mut dc) = (vec![0f32; h], vec![0f32; h]);
    for (t, before) in order(steps, backwards).rev() {
        let gates = &s.gates[t * 4 * h..][..4 * h];
        let da = &mut dg[t * 4 * h..][..4 * h];
        for j in 0..h {
            let (i, f, g, o) = (gates[j], gates[h + j], gates[2 * h + j], gates[3 * h + j]);
            let cell = s.cells[t * h + j].tanh();
            let old = before.map_or(0.0, |before| s.cells[before * h + j]);
            let d = dh[j] + dy[t * 2 * h + column + j];
            let c = dc[j] + d * o * (1.0 - cell * cell);
            da[j] = c * g * i * (1.0 - i);
            da[h + j] = c * old * f * (1.0 - f);
            da[2 * h + j] = c * i * (1.0 - g * g);
            da[3 * h + j] = d * cell * o * (1.0 - o);
            dc[j] = c * f;
        }
        dh.fill(0.0);
        for (k, da) in da.iter().enumerate() {
            dh.iter_mut().zip(&u[k * h..][..h]).for_each(|(dh, u)| *dh += da * u);
            if let Some(before) = before {
                let last = &s.hidden[before * h..][..h];
                du[k * h..][..h].iter_mut().zip(last).for_each(|(du, h)| *du += da * h);
            }
        }
    }
    (dg, du)
}

/// Hidden states `[T, 2h]` of a layer that reads forwards and backwards: `gates` `[T, 4h]` and `recurrent` `[4h, h]` of
/// each direction.
pub fn lstm<'m>(tape: &mut Tape<'m>, gates: [&Var; 2], recurrent: [&Var; 2]) -> Result<Var> {
    let (steps, four) = dims2("lstm", gates[0].tensor())?;
    let h = four / 4;
    for (g, u) in gates.iter().zip(recurrent) {
        if g.tensor().dims() != [steps, 4 * h] || u.tensor().dims() != [4 * h, h] {
            let what = format!("gates {:?} beside recurrent {:?}", g.tensor().dims(), u.tensor().dims());
            return Err(Error::shape("lstm", what));
        }
    }
    let device = gates[0].tensor().device().clone();
    let on_host = |v: &Var| -> Result<Vec<f32>> {
        Ok(host(&v.tensor().to_device(&Device::Cpu)?.contiguous()?)?.to_vec())
    };
    let u = [on_host(recurrent[0])?, on_host(recurrent[1])?];
    let scans = [scan(&on_host(gates[0])?, &u[0], h, false), scan(&on_host(gates[1])?, &u[1], h, true)];
    let mut out = Vec::with_capacity(steps * 2 * h);
    for t in 0..steps {
        scans.iter().for_each(|s| out.extend_from_slice(&s.hidden[t * h..][..h]));
    }
    let y = tensor_of(out, (steps, 2 * h))?.to_device(&device)?;
    let slots = [gates[0].slot(), gates[1].slot(), recurrent[0].slot(), recurrent[1].slot()];
    Ok(tape.record1(&slots, y, move |dy, sink| {
        let dy = dy.to_device(&Device::Cpu)?.contiguous()?;
        let dy = host(&dy)?;
        for (i, (s, u)) in scans.iter().zip(&u).enumerate() {
            let (dg, du) = scan_backward(s, u, &dy, i * h, h, i == 1);
            let place = |data: Vec<f32>, shape: (usize, usize)| -> Result<Tensor> {
                Ok(tensor_of(data, shape)?.to_device(&device)?)
            };
            sink.add(slots[i], place(dg, (steps, 4 * h))?)?;
            sink.add(slots[2 + i], place(du, (4 * h, h))?)?;
        }
        Ok(())
    }))
}
