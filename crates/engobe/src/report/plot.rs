//! The loss curve as SVG.

use anyhow::{Result, anyhow};
use engobe_train::StepMetrics;
use plotters::coord::Shift;
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;

const SIZE: (u32, u32) = (900, 420);
/// colours that differ in lightness too
const TRAIN: RGBColor = RGBColor(170, 120, 80);
const CALM: RGBColor = RGBColor(120, 60, 20);
const EVAL: RGBColor = RGBColor(20, 90, 160);

/// Loss of each step, its running mean, and the validation loss where it was taken.
pub fn loss_svg(history: &[StepMetrics]) -> Result<String> {
    let mut svg = String::new();
    draw(&mut svg, history).map_err(|e| anyhow!("drawing the loss: {e}"))?;
    Ok(svg)
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Plane = Cartesian2d<RangedCoordf64, RangedCoordf64>;

fn draw(svg: &mut String, history: &[StepMetrics]) -> Result<(), Box<dyn std::error::Error>> {
    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let losses: Vec<(f64, f64)> = history.iter().map(|m| (m.step as f64, m.loss)).collect();
    let evals: Vec<(f64, f64)> = history.iter().filter_map(|m| Some((m.step as f64, m.eval_loss?))).collect();
    let (low, high) = range(losses.iter().chain(&evals).map(|p| p.1));
    let last = losses.last().map_or(1.0, |p| p.0).max(2.0);
    let mut chart = axes(&root, last, (low, high), "loss (nats per label token)")?;
    chart.draw_series(LineSeries::new(losses.iter().copied(), TRAIN.mix(0.45)))?;
    chart
        .draw_series(LineSeries::new(calm(&losses), CALM.stroke_width(2)))?
        .label("training (running mean)")
        .legend(|(x, y)| PathElement::new([(x, y), (x + 18, y)], CALM.stroke_width(2)));
    if !evals.is_empty() {
        chart
            .draw_series(LineSeries::new(evals.iter().copied(), EVAL.stroke_width(2)).point_size(3))?
            .label("validation")
            .legend(|(x, y)| PathElement::new([(x, y), (x + 18, y)], EVAL.stroke_width(2)));
    }
    chart.configure_series_labels().background_style(WHITE.mix(0.8)).border_style(BLACK.mix(0.2)).draw()?;
    root.present()?;
    Ok(())
}

/// Axes of steps and losses, with a grid.
fn axes<'a>(
    root: &Area<'a>,
    last_step: f64,
    (low, high): (f64, f64),
    losses: &str,
) -> Result<ChartContext<'a, SVGBackend<'a>, Plane>, Box<dyn std::error::Error>> {
    let mut chart = ChartBuilder::on(root)
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(56)
        .build_cartesian_2d(1.0..last_step, low..high)?;
    chart.configure_mesh().light_line_style(WHITE).x_desc("step").y_desc(losses).draw()?;
    Ok(chart)
}

/// One method's losses for [`compare_svg`].
pub struct Curve<'a> {
    /// the method
    pub name: &'a str,
    /// its steps
    pub history: &'a [StepMetrics],
}

/// The losses of several runs in one picture: running means in training, and points where rows were validated on.
pub fn compare_svg(curves: &[Curve<'_>]) -> Result<String> {
    let mut svg = String::new();
    draw_curves(&mut svg, curves).map_err(|e| anyhow!("drawing the losses: {e}"))?;
    Ok(svg)
}

fn draw_curves(svg: &mut String, curves: &[Curve<'_>]) -> Result<(), Box<dyn std::error::Error>> {
    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let calmed: Vec<Vec<(f64, f64)>> = curves
        .iter()
        .map(|c| calm(&c.history.iter().map(|m| (m.step as f64, m.loss)).collect::<Vec<_>>()))
        .collect();
    let evals = |c: &Curve<'_>| -> Vec<(f64, f64)> {
        c.history.iter().filter_map(|m| Some((m.step as f64, m.eval_loss?))).collect()
    };
    let all = calmed.iter().flatten().map(|p| p.1).chain(curves.iter().flat_map(evals).map(|p| p.1));
    let (low, high) = range(all);
    let last = calmed.iter().flatten().map(|p| p.0).fold(2.0, f64::max);
    let mut chart =
        axes(&root, last, (low, high), "loss: line in training (running mean), point on validation rows")?;
    for (i, (curve, points)) in curves.iter().zip(&calmed).enumerate() {
        let colour = Palette99::pick(i).to_rgba();
        chart
            .draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(2)))?
            .label(curve.name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
        chart.draw_series(evals(curve).into_iter().map(|p| Circle::new(p, 4, colour.filled())))?;
    }
    chart.configure_series_labels().background_style(WHITE.mix(0.8)).border_style(BLACK.mix(0.2)).draw()?;
    root.present()?;
    Ok(())
}

/// Exponential running mean over about a twentieth of the run.
fn calm(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let keep = 1.0 - 1.0 / (points.len() as f64 / 20.0).max(1.0);
    let mut mean = None;
    let step = |&(x, y): &(f64, f64)| {
        let m = mean.map_or(y, |m: f64| keep * m + (1.0 - keep) * y);
        mean = Some(m);
        (x, m)
    };
    points.iter().map(step).collect()
}

/// The range of the values with a margin; something that can be drawn for none and for equal ones.
fn range(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
    if !(low.is_finite() && high.is_finite()) {
        return (0.0, 1.0);
    }
    let margin = ((high - low) * 0.05).max(1e-3);
    ((low - margin).max(0.0), high + margin)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(step: usize, loss: f64, eval_loss: Option<f64>) -> StepMetrics {
        let (lr, grad_norm, seconds, epoch) = (0.0, 0.0, 0.0, 0.0);
        StepMetrics {
            step,
            loss,
            lr,
            grad_norm,
            tokens: 1,
            label_tokens: 1,
            seconds,
            epoch,
            eval_loss,
            eval_scores: Default::default(),
        }
    }

    #[test]
    fn several_runs_share_a_picture() {
        let runs = [vec![step(1, 2.0, None), step(2, 1.0, Some(1.5))], vec![]];
        let curves =
            runs.iter().zip(["lora", "prefix-tuning"]).map(|(history, name)| Curve { name, history });
        let svg = compare_svg(&curves.collect::<Vec<_>>()).unwrap();
        assert!(svg.contains("lora") && svg.contains("prefix-tuning") && svg.contains("circle"));
    }

    #[test]
    fn every_history_can_be_drawn() {
        for history in [vec![], vec![step(1, 2.0, None)], vec![step(1, 2.0, None), step(2, 2.0, Some(2.5))]] {
            let svg = loss_svg(&history).unwrap();
            assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
            assert_eq!(svg.contains("validation"), history.iter().any(|m| m.eval_loss.is_some()));
        }
    }
}
