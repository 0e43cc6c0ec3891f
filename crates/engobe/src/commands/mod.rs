//! The commands: each turns its flags into work of the library crates, and tells what came out.

pub mod compare;
pub mod convert;
pub mod demo;
pub mod embed;
pub mod eval;
pub mod fetch;
pub mod generate;
pub mod inspect;
pub mod lint;
pub mod merge;
pub mod methods;
pub mod plan;
pub mod quantize;
pub mod train;
