//! What was said about quantizing a base, and what it means.

use crate::Usage;
use crate::settings::QLORA;
use anyhow::{Result, bail};
use engobe_kernels::codec::{FourBit, is_block_size};
use engobe_kernels::quantize::Scheme;

/// What was said.
#[derive(Clone, Copy, Debug, Default)]
pub struct Asked<'a> {
    /// the method; `qlora` quantizes
    pub method: Option<&'a str>,
    /// `nf4`, `fp4` or `int8`
    pub to: Option<&'a str>,
    /// quantize factors of blocks too
    pub double: Option<bool>,
    /// elements in a block
    pub block: Option<usize>,
}

/// Names of the settings, as errors call them: `quantize` is `--to` of `engobe quantize`.
#[derive(Clone, Copy, Debug)]
pub struct Names {
    /// of what the weights become
    pub to: &'static str,
    /// of the block size
    pub block: &'static str,
}

/// The names in `train`, `eval` and `generate`.
pub const SETTINGS: Names = Names { to: "quantize", block: "quant_block_size" };
/// The names in `quantize`.
pub const COMMAND: Names = Names { to: "to", block: "block_size" };

impl Asked<'_> {
    /// What linear layers become; `None` if they stay as they are.
    ///
    /// # Errors
    /// Unknown names, and settings that contradict each other.
    pub fn scheme(&self, names: Names) -> Result<Option<Scheme>> {
        let flag = |name: &str| name.replace('_', "-");
        let (to, block_flag) = (flag(names.to), flag(names.block));
        // (what is no method is refused with the adapter's settings)
        let qlora = matches!(self.method, Some(QLORA));
        // QLoRA is NF4 with double quantization, unless one of both was said otherwise
        let kind = match (self.to, qlora) {
            (None, false) => {
                let said = [("double-quant", self.double == Some(true)), (&block_flag, self.block.is_some())];
                return match said.iter().find(|(_, given)| *given) {
                    None => Ok(None),
                    Some((name, _)) => {
                        bail!(Usage(format!(
                            "--{name} says how to quantize, but not to what: give --{to} nf4 or fp4"
                        )))
                    }
                };
            }
            (None, true) | (Some("nf4"), _) => FourBit::Nf4,
            (Some("fp4"), _) => FourBit::Fp4,
            (Some("int8"), _) => return self.int8(&to, &block_flag).map(Some),
            (Some(other), _) => bail!(Usage(format!("--{to} {other}: expected nf4, fp4 or int8"))),
        };
        let block = self.block.unwrap_or(64);
        if !is_block_size(block) {
            bail!(Usage(format!("--{block_flag} {block}: expected a power of two from 32 to 4096")));
        }
        Ok(Some(Scheme::FourBit { kind, block, double: self.double.unwrap_or(qlora) }))
    }

    fn int8(&self, to: &str, block: &str) -> Result<Scheme> {
        if self.double == Some(true) {
            bail!(Usage(format!(
                "--double-quant goes with nf4 and fp4; --{to} int8 has one factor for each row"
            )));
        }
        if self.block.is_some() {
            bail!(Usage(format!("--{block} goes with nf4 and fp4; --{to} int8 has one factor for each row")));
        }
        Ok(Scheme::Int8)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn four(kind: FourBit, block: usize, double: bool) -> Scheme {
        Scheme::FourBit { kind, block, double }
    }

    #[test]
    fn what_is_said_is_what_is_meant() {
        let none = Asked::default();
        let qlora = Asked { method: Some("qlora"), ..none };
        for (asked, scheme) in [
            (none, None),
            (Asked { method: Some("lora"), double: Some(false), ..none }, None),
            (qlora, Some(four(FourBit::Nf4, 64, true))),
            (Asked { double: Some(false), ..qlora }, Some(four(FourBit::Nf4, 64, false))),
            (Asked { to: Some("fp4"), block: Some(128), ..qlora }, Some(four(FourBit::Fp4, 128, true))),
            (Asked { to: Some("int8"), ..qlora }, Some(Scheme::Int8)),
            (Asked { to: Some("nf4"), ..none }, Some(four(FourBit::Nf4, 64, false))),
            (Asked { to: Some("nf4"), double: Some(true), ..none }, Some(four(FourBit::Nf4, 64, true))),
        ] {
            assert_eq!(asked.scheme(SETTINGS).unwrap(), scheme, "{asked:?}");
        }
    }

    #[test]
    fn contradictions_are_named() {
        let none = Asked::default();
        for (asked, part) in [
            (Asked { to: Some("nf8"), ..none }, "--quantize nf8"),
            (Asked { double: Some(true), ..none }, "--double-quant says how"),
            (Asked { block: Some(64), ..none }, "--quant-block-size says how"),
            (Asked { to: Some("nf4"), block: Some(48), ..none }, "--quant-block-size 48"),
            (Asked { to: Some("int8"), double: Some(true), ..none }, "--double-quant goes with"),
            (Asked { to: Some("int8"), block: Some(64), ..none }, "--quant-block-size goes with"),
        ] {
            let error = asked.scheme(SETTINGS).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
        let error = Asked { to: Some("q4"), ..none }.scheme(COMMAND).unwrap_err().to_string();
        assert!(error.contains("--to q4"), "{error}");
    }
}
